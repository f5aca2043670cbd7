"""What a fault says of itself is true, and what is left behind can be told by what an error says."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from bridge.protocol.messages import Frame, Opcode
from tests.faults import campaign
from tests.support import left
from tests.support.faults import Armed, Fault, _Injector

BEGIN, BUCKET, HEARTBEAT = (Frame(opcode=code) for code in (Opcode.BEGIN, Opcode.BUCKET, Opcode.HEARTBEAT))


class Group:
    """In a control group's place."""


@pytest.mark.parametrize("later", [BUCKET, HEARTBEAT], ids=["frame", "heartbeat"])
def test_a_frame_is_reordered_once_another_one_is_ahead_of_it(tmp_path: Path, later: Frame) -> None:
    sent: list[tuple[tuple[int, ...], Frame]] = []

    def send(_: Any, peers: tuple[int, ...], frame: Frame) -> None:
        sent.append((peers, frame))

    group, injector = Group(), _Injector("trainer", tmp_path)
    with Armed(Fault("reorder", at="before_begin"), tmp_path) as armed:
        injector.send(group, (1, 2), BEGIN, send)
        injector.send(Group(), (1, 2), HEARTBEAT, send)  # of another server
        injector.send(group, (3,), HEARTBEAT, send)
        assert not armed.fired
        assert [frame for _, frame in sent] == [HEARTBEAT, HEARTBEAT]
        sent.clear()
        injector.send(group, (2,), later, send)
        assert armed.fired
        assert sent == [((2,), later), ((2,), BEGIN)]
        injector.send(group, (1, 2), HEARTBEAT, send)
        assert sent[2:] == [((1, 2), HEARTBEAT), ((1,), BEGIN)]


def test_a_seed_draws_the_same_faults_on_every_machine() -> None:
    """A failing case of a committed result is found again by its number: `--seed 9 --case 351`."""
    assert [
        (str(fault), transport) for fault, transport in (campaign.draw(9, case) for case in (31, 314, 351))
    ] == [
        ("stop trainer 0 at mid_bucket 0", "pull"),
        ("stop trainer 1 at staged", "gloo"),
        ("stop trainer 0 at mid_bucket 2", "pull"),
    ]
    link = campaign.draw(9, campaign.FIRST_LINK)
    assert link == campaign.draw(9, campaign.FIRST_LINK)
    assert link[1] == campaign.LINK


def test_a_reordering_that_nothing_has_come_behind_has_not_happened(tmp_path: Path) -> None:
    armed = Armed(Fault("reorder", at="committed"), tmp_path)
    _Injector("daemon", tmp_path).send(Group(), (0,), Frame(opcode=Opcode.COMMITTED), lambda *_: None)
    with pytest.raises(AssertionError, match="the fault never happened: reorder at committed"), armed:
        pass


@pytest.mark.parametrize(
    ("family", "host", "nobody"),
    [(socket.AF_INET, "127.0.0.1", "0.0.0.0"), (socket.AF_INET6, "::1", "::")],
    ids=["IPv4", "IPv6"],
)
def test_a_descriptor_is_named_with_addresses_and_state(family: int, host: str, nobody: str) -> None:
    me = os.getpid()
    before = left.descriptors(me)

    def named() -> dict[int, str]:
        new = dict(left.descriptors(me).items() - before.items())
        return {int(text.split()[0]): text.partition(" TCP ")[2] for text in left.named(me, new)}

    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert port in left.listeners(me)
        with socket.create_connection((host, port)) as client, server.accept()[0] as answered:
            theirs = client.getsockname()[1]
            assert named() == {
                server.fileno(): f"{host}:{port} to {nobody}:0 LISTEN",
                client.fileno(): f"{host}:{theirs} to {host}:{port} ESTABLISHED",
                answered.fileno(): f"{host}:{port} to {host}:{theirs} ESTABLISHED",
            }
            client.shutdown(socket.SHUT_WR)
            assert answered.recv(1) == b""
            assert named()[answered.fileno()] == f"{host}:{port} to {host}:{theirs} CLOSE_WAIT"
