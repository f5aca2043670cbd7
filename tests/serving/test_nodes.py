"""One server on two nodes that share a disk and a wire; the second is a network namespace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import Streams, flips
from tests.support.fresh_load import differing, fresh_loads, live_digests
from tests.support.full import only_in_full
from tests.support.serving import COMPLETED, Server, alive, stop, training, wait_until
from vllm_patching import residue
from vllm_patching.channel import ask

pytestmark = [pytest.mark.serving, pytest.mark.faults, pytest.mark.timeout(1800)]

SPLIT = {"tp": "--tensor-parallel-size=2", "pp": "--pipeline-parallel-size=2"}
GRACE_S = 40
# By the wire: of one kernel, the trainer's memory could be read from the second node too.
TIMES = ["--transport=gloo", "--deadline=15", "--heartbeat-interval=1", f"--commit-timeout={GRACE_S}"]
START_TIMEOUT_S = 900.0
SOON_S = 120.0


@dataclass(frozen=True)
class Wire:
    """The first node is where the test runs; commands with ``prefix`` run on the second."""

    address: str
    prefix: tuple[str, ...]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def wire() -> Iterator[Wire]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a second node needs root and iproute2 (ip netns)")
    pid = os.getpid()
    name, near, far = f"wb{pid}", f"wbn{pid}", f"wbf{pid}"
    subnet = f"10.{200 + pid % 50}.{pid // 50 % 250}"
    try:
        ip("netns", "add", name)
    except OSError as err:
        pytest.skip(f"a second node needs a network namespace: {err}")
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{subnet}.1/24", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{subnet}.2/24", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield Wire(f"{subnet}.1", ("ip", "netns", "exec", name))
    finally:
        ip("netns", "del", name)  # and the wire with it


@contextmanager
def nodes(
    model: Path, logdir: Path, wire: Wire, run_dir: Path, flags: list[str]
) -> Iterator[tuple[Server, Server]]:
    """Both launchers of one server, ready."""
    both = ["--nnodes=2", f"--master-addr={wire.address}", *TIMES]
    options: dict[str, Any] = {"flags": flags, "env": {**COMPLETED, "VLLM_SERVER_DEV_MODE": "1"}}
    head = Server(model, logdir, bridge_flags=[*both, "--node-rank=0"], **options)
    follower = Server(
        model, logdir, bridge_flags=[*both, "--node-rank=1", f"--run-dir={run_dir}"], prefix=wire.prefix,
        console="console1.log", **options,
    )  # fmt: skip
    try:
        head.wait_ready(timeout_s=START_TIMEOUT_S)
        yield head, follower
    finally:
        head.stop()
        follower.stop()


def daemon_of(run_dir: Path) -> int:
    return int(ask(run_dir, {"type": "status"}, timeout_s=10)["pids"]["daemon"])


def whole(server: Server) -> bool:
    status = server.status()
    return status.get("nodes", {}).get("missing") == [] and len(status["pids"]["updaters"]) == 2


@only_in_full("serving")  # a SLURM job has one server on two nodes always, and process tests its faults
@pytest.mark.parametrize("split", SPLIT)
def test_one_server_on_two_nodes(
    checkpoint: Callable[..., Path], tmp_path: Path, wire: Wire, split: str
) -> None:
    flags = ["--dtype=float32", SPLIT[split]]
    sets = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    fresh = fresh_loads(sets, flags=flags, **{split: 2})
    assert differing(*fresh) == sorted(fresh[0]), "nothing may pass by being the same in both"
    run_dir = Path(os.environ["XDG_RUNTIME_DIR"]) / "node1"
    shm = set(residue.SHM_DIR.iterdir())  # whoever may make a network namespace has one of his own here
    with nodes(sets[0], tmp_path / "live", wire, run_dir, flags) as (head, follower):
        assert "node           1 of 2" in follower.text()
        assert head.status()["nodes"]["missing"] == []
        assert differing(live_digests(head), fresh[0]) == []
        with training("plain", sets[0], logdir=head.logdir, dtype="float32") as trainers:
            for made, index in enumerate((1, 0, 1), start=1):
                trainers.must("load", path=str(sets[index]))
                assert trainers.must("broadcast")[0]["version"] == made
                assert differing(live_digests(head), fresh[index]) == []
            streams = Streams(head.api, width=4, tokens=200)
            for seed in range(4):
                trainers.must("perturb", seed=seed)
                trainers.must("broadcast")
            streams.stop()
            assert streams.failures == []
            assert flips(head, 0) == flips(head, 1)
            assert [version for _, version in flips(head, 0)] == list(range(1, 8))

            trainers.must("load", path=str(sets[0]))
            assert trainers.must("broadcast")[0]["version"] == 8
            trainers.must("load", path=str(sets[1]))
            stop(head.status()["pids"]["updaters"][1])  # a round that does not end by itself
            trainers.send("broadcast")
            wait_until("the round", lambda: head.status()["state"] == "round", timeout_s=SOON_S)
            os.kill(daemon_of(run_dir), signal.SIGKILL)
            (failed,) = trainers.answers()
            assert "node 1" in failed["error"]
            assert differing(live_digests(head), fresh[0]) == []
            wait_until("node 1 to come back", lambda: whole(head), timeout_s=SOON_S)
            assert trainers.must("broadcast")[0]["version"] == 9
            assert differing(live_digests(head), fresh[1]) == []
            assert flips(head, 0) == flips(head, 1)

            everything = [*head.pids(), *follower.pids()]
            node = [follower.process.pid, *follower.pids()]
            for pid in node:
                os.kill(pid, signal.SIGKILL)
            assert head.process.wait(GRACE_S + SOON_S) == 75
            assert "node 1" in head.text()
            wait_until("all to end", lambda: not any(map(alive, everything)), timeout_s=SOON_S)
    for path in set(residue.SHM_DIR.iterdir()) - shm:  # a node that is switched off keeps no memory,
        path.unlink()
    shutil.rmtree(run_dir)  # and no directory that anybody sees
