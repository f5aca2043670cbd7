"""A server on two nodes: every version on both before the same batch, or on neither, whoever dies when."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bridge
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import BridgeError, RendezvousError
from bridge.protocol.mapping import CONFIG_NAME
from tests.support.checks import flips_of
from tests.support.faults import LINKS
from tests.support.link import Link
from tests.support.link import why_not as link_missing
from tests.support.nodes import Daemon, Server, expected, weights
from tests.support.serving import stop, wait_until
from vllm_patching.channel import ask, socket_path
from vllm_patching.nodes import read_meeting

pytestmark = [pytest.mark.processes, pytest.mark.faults, pytest.mark.timeout(600)]

SOON_S = 180.0
WIRE = {"cut": LINKS["cut"], "slow": LINKS["slow link"], "lossy": {"loss": 0.05}}
ROUNDS = 10  # enough for a packet to be lost


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("nodes")
    before = os.umask(0)  # daemons take it over, and must not rely on it
    try:
        server = Server(root)
    finally:
        os.umask(before)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Link]]:
    """A server whose second node is behind a link."""
    if reason := link_missing():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("apart")
    with Link(root) as link:
        server = Server(root, link=link)
        yield server, link
        server.stop()


@pytest.fixture
def trainer(server: Server) -> Iterator[bridge.Bridge]:
    with bridge.Bridge(
        BridgeConfig(logdir=str(server.logdir), connect_timeout_s=SOON_S), ranks=Ranks()
    ) as trainer:
        yield trainer


def send(trainer: bridge.Bridge, state: dict[str, torch.Tensor]) -> int:
    return int(trainer.broadcast_weights(state).version)


def assert_serves(server: Server, version: int, state: dict[str, torch.Tensor]) -> None:
    assert server.read() == [(version, digest) for digest in expected(state)]


def flips(server: Server, rank: int) -> list[tuple[int, int]]:
    return flips_of(server.logdir, rank, up_to=server.head.status()["ranks"][rank]["version"])


def test_versions_arrive_on_both_nodes_before_the_same_batch(server: Server, trainer: bridge.Bridge) -> None:
    assert_serves(server, 0, weights(0))
    for version in (1, 2, 3):
        assert send(trainer, weights(version)) == version
        assert_serves(server, version, weights(version))
        assert [row["version"] for row in server.head.status()["ranks"]] == [version, version]
    assert flips(server, 0) == flips(server, 1)
    assert [version for _, version in flips(server, 0)] == [1, 2, 3]


def test_the_secret_is_nowhere_that_others_can_read(server: Server) -> None:
    secret = read_meeting(server.logdir).secret.encode()
    files = [path for path in server.root.rglob("*") if path.is_file()]
    having = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files if secret in path.read_bytes()}
    assert having == {"nodes.json": 0o600, CONFIG_NAME: 0o600}
    for daemon in (server.head, server.follower):
        socket = socket_path(daemon.run_dir)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (daemon.run_dir, socket)]
        assert modes == [0o700, 0o600], daemon.run_dir


def test_daemons_of_both_nodes_log_who_they_are_and_about_what_in_every_thread(server: Server) -> None:
    def stranger(daemon: Daemon) -> str:
        """What the daemon logs of somebody who wants nothing it knows, in a thread of that connection."""
        before = len(daemon.log.read_text())
        with pytest.raises(RendezvousError, match="refused a request"):
            ask(daemon.run_dir, {"type": "no such thing"}, timeout_s=SOON_S)
        return daemon.log.read_text()[before:]

    daemons = enumerate((server.head, server.follower))
    who = {daemon: f"[bridge daemon rank {rank} pid {daemon.process.pid}" for rank, daemon in daemons}
    with bridge.Bridge(
        BridgeConfig(logdir=str(server.logdir), connect_timeout_s=SOON_S), ranks=Ranks()
    ) as trainer:
        version = send(trainer, weights(1))
        epoch = server.head.status()["epoch"]
        for daemon, name in who.items():
            about = f"epoch {epoch} version {version}"
            assert f"{name} {about}] pid {os.getpid()} was refused" in stranger(daemon)
    for daemon, name in who.items():
        idle = f"{name} version {version}] pid {os.getpid()} was refused"
        wait_until(
            "the epoch's end in the log",
            lambda daemon=daemon, idle=idle: idle in stranger(daemon),  # type: ignore[misc]
            timeout_s=SOON_S,
        )


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_a_follower_lost_in_a_round_costs_that_round(
    server: Server, trainer: bridge.Bridge, what: str
) -> None:
    version = send(trainer, weights(1))
    updater = server.head.status()["pids"]["updaters"][1]
    stop(updater)  # a round that does not end by itself
    pending = trainer.broadcast_weights(weights(2), blocking=False)
    wait_until("the round", lambda: server.head.status()["state"] == "round", timeout_s=SOON_S)
    if what == "killed":
        server.follower.kill()
    else:
        server.follower.process.send_signal(signal.SIGSTOP)  # its link is up, and nothing comes
    try:
        # A link that is silent is noticed no sooner than by those in the round who wait as long.
        with pytest.raises(BridgeError, match="node 1" if what == "killed" else "node 1|rank 0"):
            pending.wait()
        wait_until("the loss", lambda: server.head.status()["state"] == "recovering", timeout_s=SOON_S)
        assert_serves(server, version, weights(1))
        status = server.head.status()
        assert (status["complete"], status["nodes"]["missing"]) == (False, [1])
        assert "node 1" in status["last_error"]
        assert [wait["waits_for"] for wait in status["waits"]] == ["nodes [1] to come back"]
    finally:
        if what == "killed":
            server.follower.start()
        else:
            server.follower.process.send_signal(signal.SIGCONT)
    server.wait_whole()
    assert updater not in server.head.status()["pids"]["updaters"]
    made = send(trainer, weights(3))
    assert made > version
    assert_serves(server, made, weights(3))
    assert flips(server, 0) == flips(server, 1)


def test_a_followers_daemon_that_is_told_to_end_is_another_daemons_to_replace(
    server: Server, trainer: bridge.Bridge
) -> None:
    server.follower.process.terminate()  # not by its launcher's order
    assert server.follower.process.wait(SOON_S) == 128 + signal.SIGTERM
    wait_until(  # or the server could still look whole
        "the head to notice", lambda: server.head.status()["nodes"]["missing"] == [1], timeout_s=SOON_S
    )
    server.follower.start()
    server.wait_whole()
    made = send(trainer, weights(4))
    assert_serves(server, made, weights(4))


def test_a_restarted_head_gathers_its_nodes_again(server: Server) -> None:
    before = server.read()
    server.head.kill()
    assert server.read() == before
    who = f"[bridge worker rank 0 pid {server.workers[0].pid} version {before[0][0]}]"
    log = server.logdir / "vllm.log"
    wait_until(
        "the worker to say so, in another thread",
        lambda: f"{who} worker rank 0 lost the daemon" in log.read_text(),
        timeout_s=SOON_S,
    )
    server.head.start()
    server._until(server.head, lambda: server.head.status()["nodes"]["missing"] == [])
    server.wait_whole()
    with bridge.Bridge(BridgeConfig(logdir=str(server.logdir)), ranks=Ranks()) as trainer:
        made = send(trainer, weights(5))
    assert made > before[0][0]
    assert_serves(server, made, weights(5))


@pytest.mark.parametrize("what", WIRE)
def test_the_wire_between_the_nodes(apart: tuple[Server, Link], what: str) -> None:
    """Cut, it costs the round, on both; slow or lossy, it costs time."""
    server, link = apart
    with bridge.Bridge(
        BridgeConfig(logdir=str(server.logdir), connect_timeout_s=SOON_S), ranks=Ranks()
    ) as trainer:
        version = send(trainer, weights(1))
        assert_serves(server, version, weights(1))
        link.set(**WIRE[what])
        try:
            if what == "cut":
                with pytest.raises(BridgeError, match=r"node 1|rank 1"):
                    send(trainer, weights(2))
                assert_serves(server, version, weights(1))
                wait_until(
                    "the loss", lambda: server.head.status()["nodes"]["missing"] == [1], timeout_s=SOON_S
                )
            else:
                for seed in range(2, 2 + ROUNDS):
                    version = send(trainer, weights(seed))
                    assert_serves(server, version, weights(seed))
            packets = link.packets()
            assert packets["late"] + packets["lost"] > 0, "nothing was done to the wire"
        finally:
            link.set()
        server.wait_whole()
        made = send(trainer, weights(0))
    assert made > version
    assert_serves(server, made, weights(0))
    assert flips(server, 0) == flips(server, 1)


def test_a_stranger_at_the_port_is_sent_away(server: Server) -> None:
    """Another start's follower, and one with another secret, leave the server as it is."""
    root: Path = server.root / "stranger"
    root.mkdir()
    (root / "log").symlink_to(server.logdir)
    other = Daemon(1, root)
    try:
        wait_until("its refusal", lambda: "node 0 has no place" in other.log.read_text(), timeout_s=SOON_S)
        assert "is here already" in other.log.read_text()
        other.kill()
        (other.run_dir / "launch").write_text("another")
        other.start()
        assert other.process.wait(SOON_S) == 75
    finally:
        other.kill()
    assert "its workers are of an earlier start of this server" in other.log.read_text()
    server.wait_whole()


def test_a_dead_worker_of_another_node_ends_the_engine(server: Server) -> None:
    server.workers[1].kill()
    server.engine.join(SOON_S)
    assert server.engine.exitcode == -signal.SIGKILL
    assert "worker rank 1" in server.head.status()["given_up"]
    assert server.head.stop() == 0
    assert server.follower.process.wait(SOON_S) == 0
    assert not (server.logdir / "nodes.json").exists()
