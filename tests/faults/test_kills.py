"""SIGKILL of everybody, in the middle of a round: survivors say who died, the old version is served.

A round is held in the middle by stopping (SIGSTOP) the updater before the broadcast: the trainer is moving
bytes, the daemon waits for "staged", the engine serves.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bridge.protocol import mapping as mapping_file
from tests.support.serving import (
    START_TIMEOUT_S,
    UNBOUND,
    Server,
    Trainers,
    alive,
    api_servers,
    serving,
    stop,
    training,
    wait_until,
)
from vllm_patching import residue

pytestmark = [pytest.mark.faults, pytest.mark.serving, pytest.mark.timeout(1500)]

DEADLINE_S = 5.0
TIMES = [f"--deadline={DEADLINE_S:g}", "--heartbeat-interval=0.5"]
# After its peer's deadline a trainer asks for the root cause for some seconds; the rest is a busy machine.
PATIENCE_S = 3 * DEADLINE_S + 10
# A worker process of its own, and with it vLLM's message queues in /dev/shm, even for one rank.
FLAGS = ["--dtype=float32", "--distributed-executor-backend=mp"]


def start(model: Path, logdir: Path, *more: str) -> Any:
    env = {**UNBOUND, "VLLM_SERVER_DEV_MODE": "1"}  # for /pause and /resume
    return serving(model, logdir, flags=FLAGS, bridge_flags=[*TIMES, *more], env=env)


def greedy(server: Server) -> list[dict[str, Any]]:
    return server.api.greedy(2, 16)


def tokens(server: Server) -> list[list[int]]:
    """Of what is served: logprobs depend on who else is in a batch."""
    return [answer["tokens"] for answer in greedy(server)]


class Held:
    """A round that stands in the middle, and its updater's pid."""

    def __init__(self, server: Server, trainers: Trainers) -> None:
        self.server, self.trainers = server, trainers
        self.before = server.status()
        assert self.before["state"] == "ready", self.before
        assert self.before["trainer"], (
            "the first round must have been made: this one must not stand in the meeting"
        )
        (self.updater,) = self.before["pids"]["updaters"]
        stop(self.updater)
        trainers.send("broadcast")
        wait_until("a round in the middle", lambda: server.status()["state"] == "round", timeout_s=30)
        self.since = math.nan  # when what ends the round has happened

    def strike(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send ``pid`` a signal: from now on the deadline counts."""
        self.since = time.monotonic()
        os.kill(pid, number)

    def kill(self, pid: int) -> None:
        """End ``pid``, and let the updater go on where it stood."""
        self.strike(pid)
        self.release()

    def release(self) -> None:
        if alive(self.updater):
            os.kill(self.updater, signal.SIGCONT)

    def errors(self, *, survivors: list[int] | None = None) -> list[str]:
        """The error that every surviving trainer rank raises, within the deadline."""
        answers = self.trainers.answers(timeout_s=PATIENCE_S)
        chosen = range(len(answers)) if survivors is None else survivors
        assert all("error" in answers[rank] for rank in chosen), answers
        assert time.monotonic() - self.since < PATIENCE_S
        return [answers[rank]["error"] for rank in chosen]


@pytest.fixture(scope="module")
def sets(checkpoint: Callable[..., Path]) -> list[Path]:
    return [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def node(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server that survives what is done to its trainers, daemon and updaters."""
    with start(sets[0], tmp_path_factory.mktemp("node")) as server:
        yield SimpleNamespace(server=server, sets=sets)


def begin(node: SimpleNamespace, trainers: Trainers) -> list[dict[str, Any]]:
    """Make one good round of set 0; what is served then."""
    trainers.must("load", path=str(node.sets[0]))
    trainers.must("broadcast")
    served = greedy(node.server)
    trainers.must("load", path=str(node.sets[1]))
    return served


def assert_old_version(node: SimpleNamespace, held: Held, served: list[dict[str, Any]], *names: str) -> None:
    """The round ended, the daemon says why, and the old version is served whole."""
    server = node.server
    wait_until("the round to end", lambda: server.status()["trainer"] is None, timeout_s=PATIENCE_S)
    status = server.status()
    assert status["state"] == "ready"
    assert status["weight_version"] == held.before["weight_version"]
    for name in names:
        assert name in status["last_error"], status["last_error"]
    assert greedy(server) == served


def assert_next_round_works(node: SimpleNamespace, trainers: Trainers, held: Held) -> None:
    """A new epoch commits the next version, and it is another one."""
    old = greedy(node.server)
    trainers.must("load", path=str(node.sets[1]))
    (receipt, *_) = trainers.must("broadcast")
    assert receipt["version"] > held.before["weight_version"]
    status = node.server.status()
    assert status["weight_version"] == receipt["version"]
    assert greedy(node.server) != old


def test_trainer_rank_0(node):
    with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as trainers:
        served = begin(node, trainers)
        held = Held(node.server, trainers)
        held.kill(trainers.pids()[0])
        assert_old_version(node, held, served, "trainer rank 0", f"pid {trainers.pids()[0]}")
        assert trainers.answers() == [{"died": -signal.SIGKILL}]
    with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as restarted:
        assert_next_round_works(node, restarted, held)
        assert node.server.status()["epoch"] == held.before["epoch"] + 1
        restarted.must("close")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_trainer_ranks(node, victim):
    with training("ddp", node.sets[0], logdir=node.server.logdir, dtype="float32", ranks=2) as trainers:
        served = begin(node, trainers)
        held = Held(node.server, trainers)
        held.kill(trainers.pids()[victim])
        (error,) = held.errors(survivors=[1 - victim])
        assert f"trainer rank {victim}" in error
        assert f"pid {trainers.pids()[victim]}" in error
        assert_old_version(node, held, served, f"trainer rank {victim}", f"pid {trainers.pids()[victim]}")
        for (
            process
        ) in trainers.processes:  # the default group of the survivor is broken: it has no orderly end
            process.kill()


def test_a_rank_that_fails_while_the_others_bytes_move(node):
    """It lives on, so no connection tells the others; they must not wait for it as for a slow transfer."""
    with training("fsdp2", node.sets[0], ranks=2, logdir=node.server.logdir) as trainers:
        served = begin(node, trainers)
        before = node.server.status()["weight_version"]
        trainers.must("break_moves", rank=1)
        began = time.monotonic()
        trainers.send("broadcast")
        answers = trainers.answers(timeout_s=PATIENCE_S)
        assert time.monotonic() - began < DEADLINE_S - 1, "an updater waited for what will never come"
        assert all("no memory for a snapshot" in answer["error"] for answer in answers), answers
        wait_until("the round to end", lambda: node.server.status()["trainer"] is None, timeout_s=PATIENCE_S)
        assert node.server.status()["weight_version"] == before
        assert greedy(node.server) == served
        trainers.must("break_moves", rank=-1)
        assert trainers.must("broadcast")[0]["version"] == before + 1
        assert greedy(node.server) != served


def test_updater(node):
    with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as trainers:
        served = begin(node, trainers)
        held = Held(node.server, trainers)
        held.kill(held.updater)
        (error,) = held.errors()
        assert f"updater of rank 0 (pid {held.updater}" in error
        assert_old_version(node, held, served, f"updater of rank 0 (pid {held.updater}")
        assert_next_round_works(node, trainers, held)
        trainers.must("close")


def test_daemon(node):
    server = node.server
    with training("plain", node.sets[0], logdir=server.logdir, dtype="float32") as trainers:
        served = begin(node, trainers)
        held = Held(server, trainers)
        place = mapping_file.load(server.config).rendezvous
        assert place is not None
        daemon = held.before["pids"]["daemon"]
        held.kill(daemon)
        (error,) = held.errors()
        assert "weight-updater daemon" in error
        assert f"pid {daemon}" in error
        assert greedy(server) == served, "serving must not need the daemon"
        wait_until("the daemon to be back", lambda: server.status()["state"] == "ready", timeout_s=90)
        now = mapping_file.load(server.config).rendezvous
        assert now is not None
        assert now.secret != place.secret
        assert now.launch == place.launch != ""
        console = server.text()
        assert f"daemon (pid {daemon}) was killed by SIGKILL; restarting it" in console
        log, served_version = (server.logdir / "vllm.log").read_text(), held.before["weight_version"]
        for who in ("worker", "engine"):  # said by a thread that does nothing else
            said = rf"\[bridge {who} rank 0 pid \d+ version {served_version}\] vLLM .* lost the daemon"
            assert re.search(said, log), who
        assert "[bridge vllm " not in log, "a line that does not say whose it is"
        status = server.status()
        assert status["pids"]["daemon"] != daemon
        assert status["weight_version"] == held.before["weight_version"]
        assert greedy(server) == served
        assert not alive(held.updater)
        assert_next_round_works(node, trainers, held)  # the same trainer process, without a further call
        trainers.must("close")


def test_a_silent_trainer_ends_the_round_not_the_server(node):
    with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as trainers:
        served = begin(node, trainers)
        held = Held(node.server, trainers)
        (pid,) = trainers.pids()
        stop(pid)
        held.release()
        try:
            assert_old_version(node, held, served, "trainer rank 0", f"pid {pid}")
        finally:
            held.strike(pid, signal.SIGCONT)
        held.errors()
        assert_next_round_works(node, trainers, held)
        trainers.must("close")


def test_a_second_trainer_is_refused(node):
    with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as first:
        begin(node, first)
        with training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32") as second:
            (answer,) = second.command("broadcast")
            assert answer["type"] == "RendezvousRefused"
            assert "another trainer is connected" in answer["error"]
            assert f"rank 0 pid {first.pids()[0]}" in answer["error"]
            (receipt,) = first.must("broadcast")  # and the first has not noticed
            assert node.server.status()["weight_version"] == receipt["version"]
            first.must("close")
            wait_until("the first to leave", lambda: node.server.status()["trainer"] is None, timeout_s=10)
            second.must("broadcast")
            second.must("close")


# --- vLLM comes back, and the launcher's death is the end ---------------------------------------------------


def assert_comes_back(server: Server, trainers: Trainers, checkpoint: list[dict[str, Any]]) -> None:
    """vLLM's API server dies in a round: vLLM is started again, and the next round makes it whole.

    Until then it answers nothing, as it has only the ``checkpoint``. Engine cores and workers die in
    ``test_soak``.
    """
    held = Held(server, trainers)
    newest, daemon = held.before["weight_version"], held.before["pids"]["daemon"]
    vllm = [pid for pid in server.pids() if pid not in (daemon, *held.before["pids"]["updaters"])]
    (pid,) = api_servers(server)
    held.strike(pid)  # and the updater stays where it is: the daemon has to end it
    (error,) = held.errors()
    # The engine core ends itself without its API server, and workers without their engine core: the trainer
    # may hear of those first.
    named = [pid, *held.before["pids"]["engines"], *held.before["pids"]["workers"]]
    assert any(f"(pid {number}" in error for number in named), error
    wait_until("status to say so", lambda: server.status()["state"] == "recovering", timeout_s=30)
    wait_until("vLLM", lambda: "vLLM is back" in server.text(), timeout_s=START_TIMEOUT_S)
    status = server.status()
    versions = status["weight_version"], status["requested_version"]
    assert (status["state"], versions) == ("recovering", (0, newest)), status
    assert status["pids"]["daemon"] == daemon
    assert not any(map(alive, vllm)), "nothing of the dead vLLM is left running"
    assert f"vllm (pid {pid}) was killed by SIGKILL" in server.text()
    assert "requests are refused meanwhile" in status["detail"]
    code, text = server.call("/v1/completions", {"model": str(server.model), "prompt": "1", "max_tokens": 1})
    assert code == 503
    assert f"has version 0 (the checkpoint), but the newest version is {newest}; it comes with" in text
    # As loops do that pause vLLM for a transfer: refused, they would never come to it.
    assert server.call("/pause?mode=keep", {})[0] == 200
    (receipt,) = trainers.must("broadcast")
    assert server.call("/resume", {})[0] == 200
    assert tokens(server) != [answer["tokens"] for answer in checkpoint]
    assert receipt["version"] == newest + 1
    assert server.status()["state"] == "ready"


def test_vllm_comes_back_and_the_launchers_death_is_the_end(sets, tmp_path, runtime_dir):
    shm_before, runs_before = set(residue.SHM_DIR.iterdir()), set(runtime_dir.iterdir())
    logdir = tmp_path / "logs"
    with (
        start(sets[0], logdir) as server,
        training("plain", sets[0], logdir=logdir, dtype="float32") as trainers,
    ):
        first = begin(SimpleNamespace(server=server, sets=sets), trainers)  # the checkpoint's weights
        assert_comes_back(server, trainers, first)
        served = greedy(server)
        tree = server.pids()
        held = Held(server, trainers)
        assert greedy(server) == served  # in the middle of the round
        held.strike(server.process.pid)
        held.errors()
        assert server.process.wait(90) == -signal.SIGKILL
        wait_until(
            f"the end of {[p for p in tree if alive(p)]}", lambda: not any(map(alive, tree)), timeout_s=60
        )
        wait_until("its run directory to go", lambda: set(runtime_dir.iterdir()) <= runs_before, timeout_s=30)
        left = {path for path in set(residue.SHM_DIR.iterdir()) - shm_before if path.exists()}
        assert not left - residue.snapshot(psutil.pids()), "shared memory left behind"
        trainers.must("close")
        trainers.must("environ", BRIDGE_CONNECT_TIMEOUT_S="10")  # this one meets nobody
        (answer,) = trainers.command("broadcast", timeout_s=PATIENCE_S + 60)
        assert answer["type"] in ("RendezvousError", "MappingError"), answer
