"""The other ways to bring a version in: over the live weights, engine at rest, and by a copy."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checks import SINGLE, Streams, assert_equal, assert_labels_in_order
from tests.support.full import only_in_full
from tests.support.serving import (
    UNBOUND,
    Server,
    Trainers,
    serving,
    serving_together,
    stop,
    training,
    wait_until,
)

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

F32 = ["--dtype=float32"]
KINDS = {"in-place": ["--staging=in-place"], "copy": ["--flip=copy"]}
# /pause, /resume and /is_paused are vLLM's only in this mode.
ENV = {**UNBOUND, "VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def servers(
    fresh_qwen3: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """One server of each kind, both started at once."""
    root = tmp_path_factory.mktemp("staging")
    wanted = [
        (fresh_qwen3.sets[0], root / kind, {"flags": F32, "bridge_flags": [*flags, "--http"], "env": ENV})
        for kind, flags in KINDS.items()
    ]
    with serving_together(*wanted) as started:
        yield dict(zip(KINDS, started, strict=True))


@pytest.fixture(scope="module")
def trainers(servers: dict[str, Server], fresh_qwen3: SimpleNamespace) -> Iterator[dict[str, Trainers]]:
    """One plain trainer for each server."""
    running: dict[str, Trainers] = {}
    try:
        for kind, server in servers.items():
            env = {"BRIDGE_HTTP_URL": server.api.url}
            running[kind] = Trainers(
                "plain", fresh_qwen3.sets[0], logdir=server.logdir, dtype="float32", env=env
            )
        yield running
    finally:
        for trainer in running.values():
            trainer.stop()


@pytest.fixture(params=list(KINDS))
def node(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    trainers: dict[str, Trainers],
    fresh_qwen3: SimpleNamespace,
) -> SimpleNamespace:
    kind = request.param
    return SimpleNamespace(kind=kind, server=servers[kind], trainer=trainers[kind], fresh=fresh_qwen3)


@pytest.fixture
def in_place(
    servers: dict[str, Server], trainers: dict[str, Trainers], fresh_qwen3: SimpleNamespace
) -> SimpleNamespace:
    kind = "in-place"
    return SimpleNamespace(kind=kind, server=servers[kind], trainer=trainers[kind], fresh=fresh_qwen3)


def publish(node: SimpleNamespace, index: int) -> dict[str, Any]:
    """Weights of set ``index`` become live; the receipt."""
    node.trainer.must("load", path=str(node.fresh.sets[index]))
    return node.trainer.must("broadcast")[0]


def assert_serves(node: SimpleNamespace, index: int, prompts: int = 8) -> None:
    expected = node.fresh.answers[index]["greedy"][:prompts]
    assert_equal(node.server.api.greedy(prompts), expected, tolerance=1e-5)


def daemon_log(node: SimpleNamespace) -> str:
    return (node.server.logdir / "daemon.log").read_text()


def halves(server: Server) -> list[Path]:
    """The halves that the worker holds, as files; the live one first."""
    (worker,) = server.status()["pids"]["workers"]
    found = [fd for fd in Path(f"/proc/{worker}/fd").iterdir() if "bridge-half" in str(fd.readlink())]
    return sorted(found, key=lambda fd: int(fd.name))


def test_answers_equal_a_fresh_server_at_every_version(node):
    assert_serves(node, 0)
    before = node.server.status()["weight_version"]
    for step, index in enumerate((1, 0, 2, 1), start=1):  # and the engine is idle each time
        receipt = publish(node, index)
        assert receipt["version"] == before + step
        assert node.server.status()["weight_version"] == before + step
        assert_serves(node, index)
    assert len(halves(node.server)) == {"in-place": 1, "copy": 2}[node.kind]


def test_streams_run_through_many_updates(node):
    streams = Streams(node.server.api, width=8, tokens=480)
    receipts = []
    for seed in range(12):
        node.trainer.must("perturb", seed=seed)
        receipts.append(node.trainer.must("broadcast")[0])
    streams.stop()
    assert streams.failures == []
    assert assert_labels_in_order(node.server, streams.finished) >= 4
    for receipt in receipts:
        assert receipt["flip_s"] > 0
        if node.kind == "in-place":
            assert receipt["flip_s"] >= receipt["transfer_s"], "a stand-still spans the whole transfer"
    if node.kind == "in-place":
        log = daemon_log(node)
        assert "generation stands still for the length of every transfer" in log
        assert f"version {receipts[-1]['version']}: generation stood still for" in log
    publish(node, 1)
    assert_serves(node, 1)


def test_a_single_parameter_changes_nothing_else(node):
    publish(node, 0)
    publish(node, 1)
    node.trainer.must("single", name=SINGLE, value=0.01)
    assert_serves(node, 2)
    node.trainer.must("load", path=str(node.fresh.sets[1]))
    node.trainer.must("single", name=SINGLE, value=0.02)
    node.trainer.must("single", name=SINGLE, value=0.01)  # over a half that a partial round has filled
    assert_serves(node, 2)


def test_a_single_parameter_after_a_round_that_was_given_up(servers, trainers, fresh_qwen3):
    """What an aborted round left in the half to be filled must not come in with the next partial one."""
    node = SimpleNamespace(server=servers["copy"], trainer=trainers["copy"], fresh=fresh_qwen3)
    publish(node, 1)
    before = node.server.status()
    (updater,) = before["pids"]["updaters"]
    stop(updater)
    node.trainer.send("broadcast")
    wait_until("a round", lambda: node.server.status()["state"] == "round", timeout_s=30)
    _, filled = halves(node.server)
    with filled.open("r+b") as half:
        half.write(b"\xa5" * filled.stat().st_size)
    os.kill(updater, signal.SIGKILL)
    (answer,) = node.trainer.answers()
    assert f"updater of rank 0 (pid {updater}" in answer["error"]
    assert_serves(node, 1)
    node.trainer.must("single", name=SINGLE, value=0.01)
    assert_serves(node, 2)


def test_an_announced_file_becomes_live(node):
    before = node.server.status()["weight_version"]
    for step, index in enumerate((1, 0), start=1):
        node.trainer.must("close")
        node.trainer.must("load", path=str(node.fresh.sets[index]))
        (receipt,) = node.trainer.must("notify")
        assert receipt["version"] == before + step
        assert receipt["transport"] == "file"
        assert_serves(node, index)


def test_what_is_refused_before_the_first_byte_disturbs_nobody(in_place):
    publish(in_place, 1)
    in_place.trainer.must("close")
    server = in_place.server
    stills = daemon_log(in_place).count("the engine stands still; version")
    damaged = server.logdir / "updates" / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    code, text = server.call("/bridge/notify_update", {"path": str(damaged)})
    assert code == 409, text
    assert "not a whole safetensors file" in text
    assert "torn" not in text
    assert server.status()["state"] == "ready"
    assert daemon_log(in_place).count("the engine stands still; version") == stills
    assert_serves(in_place, 1)


def paused(server: Server) -> bool:
    code, text = server.call("/is_paused")
    assert code == 200, text
    return bool(json.loads(text)["is_paused"])


def test_vllms_own_pause_goes_before_and_on_after(node):
    server = node.server
    publish(node, 0)
    streams = Streams(server.api, width=4, tokens=480)
    code, text = server.call("/pause?mode=keep&clear_cache=false", {})
    assert code == 200, text
    publish(node, 1)
    assert paused(server), "an update is no reason to end somebody's pause"
    code, text = server.call("/resume", {})
    assert code == 200, text
    publish(node, 0)
    streams.stop()
    assert streams.failures == []
    assert not paused(server)
    assert_serves(node, 0)


# --- two tensor-parallel ranks ---------------------------------------------------------------------------


@only_in_full("serving")  # one rank in place, and two ranks of other kinds, are tested always
def test_two_ranks_in_place(fresh_qwen3, tmp_path):
    options: dict[str, Any] = {"flags": [*F32, "--tensor-parallel-size=2"], "env": UNBOUND}
    sets = fresh_qwen3.sets
    with serving(sets[1], tmp_path / "fresh", bridge=False, **options) as other:
        fresh = other.api.greedy()
    flags = ["--staging=in-place", "--transport=gloo"]
    with (
        serving(sets[0], tmp_path / "live", bridge_flags=flags, **options) as server,
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        first = server.api.greedy()
        streams = Streams(server.api, width=4, tokens=400)
        for seed in range(5):
            trainers.must("perturb", seed=seed)
            trainers.must("broadcast")
        streams.stop()
        assert streams.failures == []
        for index, expected in ((1, fresh), (0, first)):
            trainers.must("load", path=str(sets[index]))
            trainers.must("broadcast")
            assert_equal(server.api.greedy(), expected, tolerance=1e-5)
