"""The line between daemons: who may speak on it, and what late, lost and strange messages do."""

from __future__ import annotations

import argparse
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.errors import BridgeError, ConfigError, PeerLost, ProtocolError, RendezvousRefused
from bridge.wire.rendezvous import Loan
from launch.topology import find_place
from vllm_patching import link as wire
from vllm_patching.frontdesk import FOLLOWS, FrontDesk
from vllm_patching.introductions import RoundRequest, UpdateRequest
from vllm_patching.lending import Lending
from vllm_patching.link import Link
from vllm_patching.nodes import Node, Nodes

Carry = Callable[[socket.socket, socket.socket], None]
JOIN = wire.Join(node_rank=1, nnodes=2, master_addr="a", protocol_version=1, launch="", host="there", pid=7)


def whole(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(1 << 16):
        target.sendall(data)


def in_pieces(source: socket.socket, target: socket.socket) -> None:
    """Late, and cut anywhere."""
    chance, pause = random.Random(1), threading.Event()
    while data := source.recv(chance.randint(1, 40)):
        pause.wait(chance.random() / 500)
        target.sendall(data)


def twice(source: socket.socket, target: socket.socket) -> None:
    """Every message behind the nonce is repeated."""
    target.sendall(source.recv(wire.NONCE_BYTES, socket.MSG_WAITALL))
    while data := source.recv(1 << 16):
        target.sendall(data + data)


def with_an_error(source: socket.socket, target: socket.socket) -> None:
    """The last bit of each piece is turned over."""
    target.sendall(source.recv(wire.NONCE_BYTES, socket.MSG_WAITALL))
    while data := source.recv(1 << 16):
        target.sendall(data[:-1] + bytes([data[-1] ^ 1]))


def not_at_all(source: socket.socket, target: socket.socket) -> None:
    """Nothing behind the nonce arrives."""
    target.sendall(source.recv(wire.NONCE_BYTES, socket.MSG_WAITALL))
    while source.recv(1 << 16):
        continue


@contextmanager
def linked(
    carry: Carry = whole, *, secrets: tuple[str, str] = ("s", "s"), deadline_s: float = 5.0
) -> Iterator[tuple[Link, Link]]:
    """The head's and the follower's end; what the follower sends is carried by ``carry``."""
    server = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(server.getsockname())
    far, _ = server.accept()
    follower = socket.create_connection(server.getsockname())
    entrance, _ = server.accept()
    links: dict[str, Link] = {}

    def run(step: Carry, source: socket.socket, target: socket.socket) -> None:
        try:
            step(source, target)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the test has ended

    threads = [
        threading.Thread(target=run, args=(carry, entrance, near)),
        threading.Thread(target=run, args=(whole, near, entrance)),
        threading.Thread(
            target=lambda: links.update(
                follower=Link(follower, secrets[1], role=wire.FOLLOWER, deadline_s=deadline_s)
            )
        ),
    ]
    for thread in threads:
        thread.start()
    links["head"] = Link(far, secrets[0], role=wire.HEAD, deadline_s=deadline_s)
    threads[2].join()
    try:
        yield links["head"], links["follower"]
    finally:
        for end in links.values():
            end.close()
        for sock in (near, entrance, server):
            sock.close()
        for thread in threads:
            thread.join(5)


FRAMES: list[wire.Frame] = [
    JOIN,
    wire.Beat(),
    wire.Slots({1: (1 << 62, 2, 3, 4, 5, 6, 7, 8)}),
    wire.Order(3, {"type": "stage", "joint": "ab", "half": 1}, {1: {"group_rank": 4}}),
    wire.Reported(3, 1, None, "updater of rank 1"),
    wire.Published(b"x" * 300_000),
]


@pytest.mark.parametrize("carry", [whole, in_pieces])
def test_frames_arrive_as_they_were_sent(carry: Carry) -> None:
    frames = FRAMES if carry is whole else FRAMES[:5]
    with linked(carry) as (head, follower):
        for frame in frames:
            follower.send(frame)
        assert [head.receive() for _ in frames] == frames
        head.send(wire.End(""))
        assert follower.receive() == wire.End("")


@pytest.mark.parametrize("carry", [twice, with_an_error])
def test_what_was_put_in_or_changed_is_refused(carry: Carry) -> None:
    with linked(carry) as (head, follower):
        follower.send(JOIN)
        if carry is twice:
            assert head.receive() == JOIN
        with pytest.raises(RendezvousRefused, match="another launch's secret"):
            head.receive()


def test_another_secret_is_refused_by_either_end() -> None:
    with linked(secrets=("s", "t")) as (head, follower):
        follower.send(JOIN)
        head.send(wire.Beat())
        for end in (head, follower):
            with pytest.raises(RendezvousRefused, match="another launch's secret"):
                end.receive()


def test_silence_ends_a_link_and_beats_keep_it() -> None:
    with linked(not_at_all, deadline_s=0.3) as (head, follower):
        follower.beat(0.05)
        with pytest.raises(PeerLost, match=r"was silent for 0\.3 s"):
            head.receive()
    with linked(deadline_s=0.5) as (head, follower):
        follower.beat(0.1)
        assert [head.receive() for _ in range(10)] == [wire.Beat()] * 10


def test_the_end_of_the_other_side_is_noticed() -> None:
    with linked() as (head, follower):
        follower.close()
        with pytest.raises(PeerLost, match="closed the link"):
            head.receive()


def test_nobody_unknown_makes_us_reserve_memory() -> None:
    with linked() as (head, follower):
        follower.send(wire.Published(b"x" * wire.MAX_FIRST_BYTES))
        with pytest.raises(RendezvousRefused, match="announced a frame of"):
            head.receive()


class Crew:
    """What a ``Node`` needs of one."""

    def __init__(self) -> None:
        self.ready: list[int] = []

    def mark_ready(self, rank: int) -> None:
        self.ready.append(rank)


def test_reports_of_an_ended_crew_are_dropped() -> None:
    told: list[wire.Frame] = []
    node = Node(JOIN, SimpleNamespace(send=told.append))  # type: ignore[arg-type]
    first: Any = Crew()
    second: Any = Crew()
    node.start(first, on_gpu=False)
    waiter = threading.Thread(target=node.end)
    waiter.start()
    assert node.crew_news(wire.CrewEnded(1)) is None
    waiter.join(5)
    assert not waiter.is_alive()
    node.start(second, on_gpu=False)
    assert node.crew_news(wire.Ready(1, 1, 50)) is None  # late, of the first
    assert node.crew_news(wire.Reported(1, 1, {"type": "staged"}, "x")) is None
    node.crew_news(wire.Ready(2, 1, 51))
    assert (first.ready, second.ready, node.pids()) == ([], [1], {1: 51})
    report = node.crew_news(wire.Reported(2, 1, None, "updater of rank 1 (pid 51, ended with -9)"))
    assert report is not None
    assert (report.crew, report.rank, report.message) == (second, 1, None)
    assert node.describe(1) == "updater of rank 1 (pid 51, ended with -9)"
    assert told == [wire.StartCrew(1, False), wire.EndCrew(1), wire.StartCrew(2, False)]


def test_the_end_of_a_crew_is_not_waited_for_on_a_lost_node() -> None:
    node = Node(JOIN, SimpleNamespace(send=lambda _: None))  # type: ignore[arg-type]
    crew: Any = Crew()
    node.start(crew, on_gpu=False)
    waiter = threading.Thread(target=node.end)
    waiter.start()
    node.end_of_link("it burnt")
    waiter.join(5)
    assert not waiter.is_alive()


def hear(frame: wire.Frame) -> list[Any]:
    """What a head's daemon is told when a follower says ``frame``."""
    events: list[Any] = []
    args = SimpleNamespace(nnodes=2, master_addr="a", master_port=0)
    daemon = SimpleNamespace(args=args, events=SimpleNamespace(put=events.append))
    node = Node(JOIN, SimpleNamespace(send=lambda _: None))  # type: ignore[arg-type]
    crew: Any = Crew()
    node.start(crew, on_gpu=False)
    Nodes(daemon)._hear(node, frame)  # type: ignore[arg-type]
    return events


def test_what_a_follower_passes_on_is_checked_again() -> None:
    (report,) = hear(wire.Reported(1, 1, {"type": "poised"}, "x"))
    assert report.message == {"type": "poised"}
    with pytest.raises(ProtocolError, match=r"'staged' report: .*`bytes`"):
        hear(wire.Reported(1, 1, {"type": "staged"}, "x"))
    with pytest.raises(ProtocolError, match="a 'status' cannot register from another node"):
        hear(wire.Registered(hello={"type": "status"}, slot=(0,) * 8))
    with pytest.raises(ProtocolError, match=r"'worker' message: .*`pid`"):
        hear(wire.Registered(hello={"type": "worker"}, slot=(0,) * 8))


@pytest.mark.parametrize("words", [(0,) * 7, (0,) * 9, (0, -1, 0, 0, 0, 0, 0, 0)])
def test_words_that_do_not_fit_a_slot_are_no_frame(words: tuple[int, ...]) -> None:
    with linked() as (head, follower):
        follower.send(wire.Slots({0: words}))
        with pytest.raises(ProtocolError, match="what is no frame"):
            head.receive()


def test_only_the_head_answers_for_rounds() -> None:
    desk = FrontDesk(SimpleNamespace())  # type: ignore[arg-type]
    order = RoundRequest(daemon=1, ended=0, aborted=0, version=None, timeout_s=1.0)
    for request in (order, UpdateRequest(path="x")):
        assert desk._reply(request) == {"type": "error", "error": FOLLOWS}


def test_a_server_on_several_nodes_lends_nothing() -> None:
    lending = Lending(SimpleNamespace(nodes=object()))  # type: ignore[arg-type]
    assert "runs on several nodes" in lending._refusal(Loan(session="s", borrower="b", start=True))


# --- which node this is ------------------------------------------------------------------------------

STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
BATCH = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}


def place(environ: dict[str, str], **flags: Any) -> tuple[int, int, str, str]:
    given = {"nnodes": None, "node_rank": None, "master_addr": None, "master_port": 0, **flags}
    found = find_place(argparse.Namespace(**given), environ)
    return found.nnodes, found.node_rank, found.master_addr, found.origin


def test_the_place_is_read_from_flags_or_the_step() -> None:
    assert place({}) == (1, 0, "", "alone")
    assert place(BATCH) == (1, 0, "", "alone")
    assert place(STEP) == (2, 1, "gpu07", "the SLURM step")
    assert place(STEP, nnodes=1) == (1, 0, "", "alone")
    assert place(STEP, master_addr="10.0.0.1") == (2, 1, "10.0.0.1", "the SLURM step")
    assert place({}, nnodes=4, node_rank=3, master_addr="a") == (4, 3, "a", "flags")


def test_a_place_that_is_not_known_is_refused() -> None:
    for flags in ({"nnodes": 2}, {"nnodes": 2, "node_rank": 1}, {"nnodes": 2, "master_addr": "a"}):
        with pytest.raises(ConfigError, match="give each node its --node-rank"):
            place({}, **flags)
    with pytest.raises(BridgeError, match="--nnodes is 4"):
        place(STEP, nnodes=4)
