"""A round that fails in the middle of writing over the live weights: nothing is served until
they are whole.

The model and the buckets are such that a round takes about a second, so that it can be stopped (SIGSTOP of
the updater) between its first byte and its last.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checks import Streams
from tests.support.models import build_checkpoint
from tests.support.serving import UNBOUND, Server, Trainers, alive, serving, stop, training, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.serving, pytest.mark.timeout(900)]

DEADLINE_S = 5.0
PATIENCE_S = 3 * DEADLINE_S + 10
REPAIR_S = 90.0  # a daemon starts again meanwhile, and a trainer comes, on a busy machine
ATTEMPTS = 5
FLAGS = [
    "--staging=in-place",
    "--transport=gloo",
    "--bucket-bytes=4096",
    f"--deadline={DEADLINE_S:g}",
    "--heartbeat-interval=0.5",
    f"--repair-timeout={REPAIR_S:g}",
    "--http",
    "--max-server-restarts=0",
]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server that is left with torn weights again and again, and for good at the end."""
    root = tmp_path_factory.mktemp("in-place")
    sets = [
        build_checkpoint("qwen3", root / str(seed), dtype="float32", seed=seed, intermediate_size=1024)
        for seed in (0, 1)
    ]
    with serving(
        sets[0], root / "logs", flags=["--dtype=float32"], bridge_flags=FLAGS, env=UNBOUND
    ) as server:
        yield SimpleNamespace(server=server, sets=sets, first=greedy(server))


def greedy(server: Server) -> list[dict[str, Any]]:
    return server.api.greedy(2, 16)


def train(node: SimpleNamespace) -> Any:
    env = {"BRIDGE_HTTP_URL": node.server.api.url}
    return training("plain", node.sets[0], logdir=node.server.logdir, dtype="float32", env=env)


def publish(node: SimpleNamespace, trainers: Trainers, index: int) -> int:
    trainers.must("load", path=str(node.sets[index]))
    return int(trainers.must("broadcast")[0]["version"])


def stop_midway(node: SimpleNamespace, trainers: Trainers) -> int:
    """Begin a round and stop its updater when it has begun to write; the updater's pid.

    Beside a busy test a round may be over before it is stopped: then the next one is.
    """
    server = node.server
    (updater,) = server.status()["pids"]["updaters"]

    def writes() -> bool:
        status = server.status()
        return bool(status["writing"] and status["bucket"] >= 50)

    for _ in range(ATTEMPTS):
        trainers.send("broadcast")
        wait_until("a round in the middle of writing", writes, timeout_s=30, interval_s=0.001)
        stop(updater)
        status = server.status()
        if status["state"] == "round":
            assert status["requested_version"] == status["weight_version"]
            return int(updater)
        os.kill(updater, signal.SIGCONT)
        (answer,) = trainers.answers(timeout_s=PATIENCE_S)
        assert "version" in answer, answer
    raise AssertionError(f"{ATTEMPTS} rounds were over before they could be stopped; make them longer")


def await_torn(server: Server, *causes: str) -> dict[str, Any]:
    wait_until("the round to end", lambda: server.status()["state"] == "torn", timeout_s=PATIENCE_S)
    status = server.status()
    for words in (*causes, "the weights are torn", "Broadcast the whole model again"):
        assert words in status["detail"], status["detail"]
    return status


def test_nothing_is_served_from_torn_weights(node):
    """The trainer dies midway: requests wait, a part is refused, another trainer's whole round repairs."""
    server = node.server
    with train(node) as doomed, train(node) as other:
        version = publish(node, doomed, 1)
        second = greedy(server)
        publish(node, doomed, 0)
        assert greedy(server) == node.first != second
        doomed.must("load", path=str(node.sets[1]))
        streams = Streams(server.api, width=4, tokens=480)
        updater = stop_midway(node, doomed)
        live = server.status()["weight_version"]
        assert live > version
        (trainer,) = doomed.pids()
        os.kill(trainer, signal.SIGKILL)
        await_torn(server, "trainer rank 0", f"pid {trainer}")
        assert not alive(updater)
        code, metrics = server.call("/bridge/metrics")
        assert code == 200
        assert "bridge_ready 0.0" in metrics

        def quiet() -> bool:
            before = streams.produced
            assert server.call("/bridge/metrics")[0] == 200  # by the process that sends the tokens
            return streams.produced == before

        wait_until("the tokens of whole weights to have come", quiet, timeout_s=20)
        produced = streams.produced
        (answer,) = other.command("single", name=NORM, value=1.0)
        assert "part of the weights was to be laid over the checkpoint, but" in answer["error"]
        await_torn(server, f"pid {trainer}")
        other.must("load", path=str(node.sets[1]))
        assert streams.produced == produced, "tokens came from torn weights"
        assert any(streams.alive()), "the requests wait"
        assert publish(node, other, 1) == live + 1
        streams.stop()
        assert streams.failures == []
        assert streams.produced > produced
        assert server.status()["state"] == "ready"
        assert greedy(server) == second
        other.must("close")


def test_a_trainer_that_dies_before_the_first_byte_disturbs_nobody(node):
    server = node.server
    with train(node) as trainers:
        publish(node, trainers, 0)
        (updater,) = server.status()["pids"]["updaters"]
        stop(updater)
        trainers.send("broadcast")
        wait_until("a round", lambda: server.status()["state"] == "round", timeout_s=30)
        assert greedy(server) == node.first, "the engine serves until the updaters have leave to write"
        (trainer,) = trainers.pids()
        os.kill(trainer, signal.SIGKILL)
        wait_until("the round to end", lambda: server.status()["trainer"] is None, timeout_s=PATIENCE_S)
        assert server.status()["state"] == "ready"
        assert greedy(server) == node.first


def test_torn_weights_are_known_to_the_next_daemon_and_repaired_by_a_file(node):
    server = node.server
    with train(node) as trainers:
        publish(node, trainers, 1)
        second = greedy(server)
        publish(node, trainers, 0)
        updater = stop_midway(node, trainers)
        daemon = server.status()["pids"]["daemon"]
        os.kill(daemon, signal.SIGKILL)
        (answer,) = trainers.answers(timeout_s=PATIENCE_S)
        assert f"pid {daemon}" in answer["error"]
        wait_until("another daemon", lambda: server.status()["state"] == "torn", timeout_s=90)
        assert not alive(updater)
        await_torn(server, "the daemon that wrote it ended")
        trainers.must("load", path=str(node.sets[1]))
        trainers.must("notify")
        assert server.status()["state"] == "ready"
        assert greedy(server) == second


def test_weights_that_nobody_repairs_end_the_server(node):
    server = node.server
    with train(node) as trainers:
        publish(node, trainers, 0)
        updater = stop_midway(node, trainers)
        os.kill(updater, signal.SIGKILL)
        (answer,) = trainers.answers(timeout_s=PATIENCE_S)
        assert f"updater of rank 0 (pid {updater}" in answer["error"]
        assert "the weights are torn" in answer["error"]
        await_torn(server, f"pid {updater}")
        assert server.process.wait(REPAIR_S + 60) == 75
        console = server.text()
        assert "no complete round came in time: the weights are torn" in console
        assert f"after --repair-timeout {REPAIR_S:g} s" in console
