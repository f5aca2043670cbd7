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

import msgspec
import pytest

from bridge.errors import BridgeError, ConfigError, PeerLost, ProtocolError, RendezvousRefused
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire.rendezvous import Loan
from launch.display import show_place
from launch.options import ServeOptions, ServerView
from launch.topology import find_place
from vllm_patching import link as wire
from vllm_patching.build import BUILD
from vllm_patching.control_page import ControlPage
from vllm_patching.events import NodeFailed
from vllm_patching.frontdesk import FOLLOWS, FrontDesk
from vllm_patching.introductions import RoundRequest, UpdateRequest
from vllm_patching.lending import Lending
from vllm_patching.link import Link
from vllm_patching.nodes import Node, Nodes
from vllm_patching.registry import Member, Registry

Carry = Callable[[socket.socket, socket.socket], None]
JOIN = wire.Join(node_rank=1, nnodes=2, protocol_version=1, build=BUILD, launch="", host="there", pid=7)


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
    with linked(deadline_s=2.0) as (head, follower):
        follower.beat(0.1)
        assert [head.receive() for _ in range(25)] == [wire.Beat()] * 25, "for longer than the deadline"


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


HELLO = {
    "type": "worker", "rank": 1, "world_size": 2, "model": "m", "dtype": "bfloat16", "vllm_version": "0.32.0",
    "pid": 50, "host": "there",
}  # fmt: skip


def words(version: int, failures: int = 0) -> tuple[int, ...]:
    return (version, 1, 1, failures, version % 2, version, 0, 0)


class Head:
    """The head's side of one follower, over the real registry and control page."""

    def __init__(self, *, mapping: Any = None, launch: str = "") -> None:
        self.events: list[Any] = []
        args = SimpleNamespace(
            nnodes=2, master_addr="a", master_port=0, commit_timeout=3600.0, launch_id="one", deadline=5.0
        )
        self.registry = Registry(on_change=lambda: None)
        engine: Any = SimpleNamespace(send=lambda *_: None, close=lambda: None)
        self.registry.engines[0] = Member({"type": "engine", "index": 0, "pid": 1, "host": "here"}, engine)
        self.daemon = SimpleNamespace(
            args=args, events=SimpleNamespace(put=self.events.append), registry=self.registry,
            mapping=mapping, filing=False, failed="", last_error=None,
        )  # fmt: skip
        self.nodes = Nodes(self.daemon)  # type: ignore[arg-type]
        self.node = self.join(launch)

    def join(self, launch: str = "one") -> Node:
        """A follower's link is there, as ``_welcome`` leaves it."""
        link = SimpleNamespace(send=lambda _: None, close=lambda: None)
        node = Node(msgspec.structs.replace(JOIN, launch=launch), link)  # type: ignore[arg-type]
        self.nodes.here[1] = self.node = node
        self.nodes._is_back(node)
        return node

    def register(self, slot: tuple[int, ...]) -> None:
        self.node.waiting.append(wire.Registered(hello=HELLO, slot=slot))

    def hear(self, frame: wire.Frame) -> None:
        self.nodes._hear(self.node, frame)

    @property
    def failed(self) -> list[str]:
        return [event.why for event in self.events if isinstance(event, NodeFailed)]


@pytest.mark.parametrize("page_first", [True, False])
def test_late_words_are_not_overwritten_by_the_registration_they_follow(page_first: bool) -> None:
    head = Head()
    if page_first:
        head.registry.control = ControlPage.create(2)
    head.register(words(5))
    head.hear(wire.Slots({1: words(6), 0: words(9)}))  # of rank 0 nobody has heard: it is another node's
    page = head.registry.control = head.registry.control or ControlPage.create(2)
    head.nodes.admit_waiting()
    assert (page.slot(1).version, page.slot(0).version) == (6, 0)
    head.hear(wire.Slots({1: words(7)}))
    assert page.slot(1).version == 7
    assert head.failed == []


def test_why_somebody_is_sent_away_is_not_said_at_each_knock(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head()
    head.daemon.secret = "s"
    second = msgspec.structs.replace(JOIN, protocol_version=PROTOCOL_VERSION, pid=8)

    def knock(secret: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        thread = threading.Thread(target=head.nodes._converse, args=(far,))
        thread.start()
        with near:
            Link(near, secret, role=wire.FOLLOWER, deadline_s=5.0).send(second)
            thread.join(5)
        assert not thread.is_alive()

    def knock_often() -> list[str]:
        caplog.clear()
        for _ in range(3):
            knock("another")
            knock("s")
        return [record.getMessage() for record in caplog.records]

    stranger, busy = knock_often()
    assert "signed with another launch's secret" in stranger
    assert "node 1 (daemon pid 7 on there) is here already" in busy
    assert knock_often() == []
    monkeypatch.setattr("vllm_patching.nodes.SAY_AGAIN_S", 0.0)
    assert len(knock_often()) == 6


def test_a_flip_that_fails_on_another_node_is_told_though_nobody_waits() -> None:
    head = Head()
    page = head.registry.control = ControlPage.create(2)
    head.register(words(5))
    head.nodes.admit_waiting()
    page.requested = 6
    head.hear(wire.Slots({1: words(5, failures=1)}))
    (why,) = head.failed
    assert "worker rank 1 (pid 50 on there) could not flip to version 6" in why
    head.hear(wire.Slots({1: words(5, failures=1)}))
    assert len(head.failed) == 1


def test_a_worker_that_dies_before_it_is_admitted_is_not_admitted() -> None:
    head = Head()
    head.register(words(0))
    head.hear(wire.Gone(1))
    head.registry.control = ControlPage.create(2)
    head.nodes.admit_waiting()
    assert not head.registry.workers
    assert head.failed == ["vLLM worker rank 1 on there is gone"]


def test_a_lost_node_is_waited_for_until_its_workers_are_back() -> None:
    head = Head()
    head.registry.control = ControlPage.create(2)
    head.register(words(0))
    head.nodes.admit_waiting()
    head.nodes._lose(head.node, "the link broke")
    timer = head.nodes._timers[1]
    head.join()
    assert head.nodes._timers == {1: timer}, "its daemon alone is not enough"
    head.nodes._lose(head.node, "the link broke again")
    assert head.nodes._timers == {1: timer}, "and begins no new wait"
    head.join()
    head.register(words(0))
    head.nodes.admit_waiting()
    assert head.nodes._timers == {}
    assert timer.finished.is_set()


@pytest.mark.parametrize(
    ("launch", "up", "found_running", "said"),
    [
        ("", False, False, ""),
        ("one", True, False, ""),
        ("", True, False, "are gone with their launcher"),
        ("", False, True, "are gone with their launcher"),
        ("two", False, False, "of an earlier start"),
    ],
)
def test_who_comes_without_the_workers_of_a_running_server_is_sent_away(
    launch: str, up: bool, found_running: bool, said: str
) -> None:
    head = Head(mapping="a mapping" if up else None)
    head.nodes.here.clear()
    head.registry.found_running = found_running
    join = msgspec.structs.replace(JOIN, launch=launch, protocol_version=PROTOCOL_VERSION)
    refused = head.nodes._refusal(join)
    assert (refused is None) == (said == "")
    if refused is not None:
        assert said in refused.reason
        assert (refused.try_again, refused.misconfigured) == (False, False)
    for change in ({"nnodes": 3}, {"build": "0123 with vllm 0.1"}):
        wrong = head.nodes._refusal(msgspec.structs.replace(join, **change))
        assert wrong is not None
        assert wrong.misconfigured


def test_a_defect_in_hearing_a_node_loses_the_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = Head()

    def broken(*_: Any) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(head.nodes, "_hear", broken)
    monkeypatch.setattr(head.nodes, "_welcome", lambda _: head.node)
    head.daemon.secret = "s"
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    other = threading.Thread(
        target=lambda: Link(theirs, "s", role=wire.FOLLOWER, deadline_s=5).send(wire.Beat())
    )
    other.start()
    head.nodes._converse(ours)
    other.join()
    theirs.close()
    assert head.nodes.missing == [1]
    assert head.node.lost == "TypeError: a defect"
    assert "broke in our own hands" in caplog.text
    head.nodes._timers[1].cancel()


def test_an_address_that_only_this_host_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda where: real(("127.0.0.1", where[1])))
    head = Head()
    with pytest.raises(ConfigError, match=r"--master-addr a leads to 127\.0\.0\.1 on this host"):
        head.nodes.listen()


def test_what_a_follower_passes_on_is_checked_again() -> None:
    (report,) = hear(wire.Reported(1, 1, {"type": "poised"}, "x"))
    assert report.message == {"type": "poised"}
    with pytest.raises(ProtocolError, match=r"'staged' report: .*`bytes`"):
        hear(wire.Reported(1, 1, {"type": "staged"}, "x"))
    with pytest.raises(ProtocolError, match="a 'status' cannot register from another node"):
        hear(wire.Registered(hello={"type": "status"}, slot=(0,) * 8))
    with pytest.raises(ProtocolError, match=r"'worker' message: .*`pid`"):
        hear(wire.Registered(hello={"type": "worker"}, slot=(0,) * 8))


@pytest.mark.parametrize("slot", [(0,) * 7, (0,) * 9, (0, -1, 0, 0, 0, 0, 0, 0)])
def test_words_that_do_not_fit_a_slot_are_no_frame(slot: tuple[int, ...]) -> None:
    with linked() as (head, follower):
        follower.send(wire.Slots({0: slot}))
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


def test_the_first_node_of_a_step_is_its_address_on_the_way_to_the_others(monkeypatch: Any) -> None:
    """Its own name leads to its loopback on many hosts."""
    asked = []
    monkeypatch.setattr(
        "bridge.nodes.own_address", lambda peers: (asked.append(peers), ("10.0.0.7", "eth0"))[1]
    )
    assert place({**STEP, "SLURM_NODEID": "0"}) == (2, 0, "10.0.0.7", "the SLURM step")
    assert asked == [["gpu08"]]


def test_a_launcher_prints_the_place_it_understood(capsys: pytest.CaptureFixture[str]) -> None:
    server = ServerView(
        bind_host="", connect_host="", port=8000, tensor_parallel_size=4, pipeline_parallel_size=2
    )
    options = ServeOptions(
        model="m", nnodes=2, node_rank=1, master_addr="10.0.0.7", place_origin="the SLURM step"
    )
    show_place(options, server)
    assert capsys.readouterr().out.splitlines() == [
        f"node           1 of 2 on {socket.gethostname()}, by the SLURM step: workers only",
        "node 0         10.0.0.7:any free port, tensor 4 x pipeline 2",
        "inference      8 rank(s), here 4, 5, 6, 7",
    ]


def test_a_place_that_is_not_known_is_refused() -> None:
    for flags in ({"nnodes": 2}, {"nnodes": 2, "node_rank": 1}, {"nnodes": 2, "master_addr": "a"}):
        with pytest.raises(ConfigError, match="give each node its --node-rank"):
            place({}, **flags)
    with pytest.raises(ConfigError, match=r"task 1 of its node .* --ntasks-per-node=1"):
        place({**STEP, "SLURM_LOCALID": "1"})
    with pytest.raises(BridgeError, match="--nnodes is 4"):
        place(STEP, nnodes=4)
