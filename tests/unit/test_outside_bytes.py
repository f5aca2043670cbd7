"""Bytes from outside a process: a value, or a typed error that says something. Nothing else, at no price.

Never another exception, memory by what has come rather than by what was announced, and no wait without end.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge import fallback, nodes
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import (
    BridgeError,
    ConfigError,
    MappingError,
    ProtocolError,
    RendezvousError,
    RoundAborted,
    TransferError,
    UnsupportedVersion,
)
from bridge.job import Receipt
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import ITEMSIZE, Mapping, RankMap, Write
from bridge.protocol.messages import FRAME_BYTES, Frame, Opcode, encode
from bridge.protocol.plan import Layout, Shard, build_plan
from bridge.protocol.session import Coordinator, InferenceSession, Member
from bridge.wire import delta, rendezvous
from bridge.wire.control import ControlGroup
from bridge.wire.delta import Form
from bridge.wire.delta_transport import DeltaSink
from bridge.wire.device_transport import DevicePullSink
from bridge.wire.meeting import Meeting, Round
from tests.support.parsers import (
    DOCUMENT,
    KNOWN,
    LAYOUT,
    PARSERS,
    RECEIPT,
    REQUEST,
    SECRET,
    Parser,
    feed,
    hello,
)
from vllm_patching import admission, build
from vllm_patching.channel import MAX_FDS, MAX_MESSAGE_BYTES, Channel, ChannelClosed
from vllm_patching.crew import Crew, Report
from vllm_patching.events import Broken, Requested
from vllm_patching.frontdesk import FrontDesk
from vllm_patching.registry import Registry

# The same inputs in every run: what is found stays found, and a run cannot fail by luck.
fixed = settings(
    derandomize=True, database=None, max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

NUMBERS = st.sampled_from(
    [-(1 << 63), -1, 0, 1, 2, 255, 1 << 16, 1 << 31, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)
JUNK = st.binary(max_size=64) | st.sampled_from(
    [b"", b"[" * 5000, b"\x91" * 5000, b"{" * 5000, b'{"a":' * 3000, b'"\xff"', b"\xa1\xff",
     b"\xc6" + b"\xff" * 4, b"\xdd" + b"\xff" * 4, struct.pack("<Q", 1 << 60), b"\xff" * 64,
     b"9" * 500, b"null", b"[]", b"\xc0"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, parser: Parser) -> bytes:
    """A whole example with a few places replaced, cut short or repeated; or nothing like one."""
    if not parser.examples or draw(st.booleans()):
        value = draw(VALUES)
        try:
            return draw(st.sampled_from([msgspec.json.encode, msgspec.msgpack.encode]))(value)
        except (ValueError, OverflowError):
            return draw(JUNK)
    data = bytearray(draw(st.sampled_from(parser.examples)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=9) | JUNK)
        data[at : at + draw(st.integers(0, 16))] = piece
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@pytest.fixture
def bounded() -> Iterator[None]:
    """Address space for a GiB more and no further: what believes a length of 2**60 breaks here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_takes_what_is_whole(name: str) -> None:
    assert all(feed(PARSERS[name], data) for data in PARSERS[name].examples)


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_refuses_by_a_typed_error(name: str, bounded: None) -> None:
    parser = PARSERS[name]
    refused = 0

    @fixed
    @given(damaged(parser))
    def check(data: bytes) -> None:
        nonlocal refused
        refused += not feed(parser, data)

    check()
    assert refused > 10, "the inputs were not damaged enough to test anything"


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "data",
    [b"", b"[" * 200_000, b"\x91" * 200_000, b'{"type":' * 50_000, b'{"path":"\xff"}', b'{"a":{"b":"\xff"}}',
     b"\x82\xa4body\xa1\xff", struct.pack("<Q", 1 << 60), struct.pack("!I", (1 << 32) - 1)],
    ids=["nothing", "lists", "msgpack lists", "objects", "no UTF-8", "no UTF-8 within", "no UTF-8 in msgpack",
         "2**60", "2**32"],
)  # fmt: skip
def test_what_breaks_parsers_breaks_none_of_these(name: str, data: bytes, bounded: None) -> None:
    feed(PARSERS[name], data)


@pytest.mark.parametrize(
    "data",
    [b'{"hidden_size": null}', b'{"hidden_size": "x"}', b'{"vocab_size": 1e999}', b'{"text_config": []}'],
)
def test_shapes_that_are_none_are_refused(data: bytes) -> None:
    assert not feed(PARSERS["config.json"], data)


@st.composite
def pyslurms(draw: st.DrawFn) -> SimpleNamespace:
    """One that is as 25.11, but for one thing at most, which is missing or something else."""
    other = draw(VALUES | st.sampled_from([10**400, {(1, 2): 3}, object(), "\ud800", float("nan"), -1, {}]))
    at = {draw(st.sampled_from(["", "", "count", "gres", "on", "layout", "jobs", "attribute"])): other}
    gres = at.get("gres", {"gpu": 1, "gpu:a100": at.get("count", {"count": 2})})
    layout = at.get("layout", {"a1": at.get("on", {"gres": gres}), "a2": {"gres": {}}})
    job = SimpleNamespace(
        id=7, heterogeneous_id=7, heterogeneous_offset=0, requeue_count=2,
        get_resource_layout_per_node=lambda: layout,
    )  # fmt: skip
    jobs = at.get("jobs", draw(st.sampled_from([{7: job}, {}, {7: job, 8: job}])))
    told = SimpleNamespace(
        Job=SimpleNamespace(load=lambda _: job),
        Jobs=SimpleNamespace(load=lambda: jobs),
    )
    if "attribute" in at:
        place = draw(st.sampled_from([job, job, told]))
        name = draw(st.sampled_from(sorted(vars(place))))
        if draw(st.booleans()):
            delattr(place, name)
        else:
            setattr(place, name, other)
    return told


def test_a_pyslurm_of_any_form_tells_a_shape_or_is_named() -> None:
    """What the child asks, run here: an error that it did not catch would look like no pyslurm at all."""
    outcomes = []

    @settings(fixed, max_examples=200)
    @given(pyslurms())
    def check(told: SimpleNamespace) -> None:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setitem(sys.modules, "pyslurm", told)
            patch.setattr(sys, "argv", ["-c", "7"])
            exec(nodes._PYSLURM, {})
        try:
            shape = nodes.read_pyslurm(said.getvalue(), KNOWN)
        except UnsupportedVersion:
            outcomes.append("named")
        else:
            outcomes.append("shape")
            assert all(count >= 0 for part in shape.components for count in part.gpus or ())

    check()
    assert outcomes.count("named") > 10
    assert "shape" in outcomes


# --- what is whole, and says something impossible -----------------------------------------------------------


def reach_of(rank: RankMap, write: Write) -> tuple[int, int]:
    """First and last byte of the arena that a write touches."""
    target = rank.targets[write.target]
    size = ITEMSIZE[target.dtype]
    last = write.dst_offset + sum((n - 1) * s for n, s in zip(write.size, write.dst_stride, strict=True))
    return target.offset + write.dst_offset * size, target.offset + (last + 1) * size


@fixed
@given(st.data())
def test_a_mapping_that_is_taken_writes_within_its_arena(data: st.DataObject) -> None:
    document = msgspec.to_builtins(DOCUMENT)
    for _ in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.sampled_from(document["ranks"]))
        place = data.draw(st.sampled_from([*rank["targets"], *rank["writes"]["checkpoint"], rank]))
        field = data.draw(st.sampled_from([k for k, v in place.items() if isinstance(v, int | tuple | list)]))
        if isinstance(place[field], int):
            place[field] = data.draw(NUMBERS | st.integers(-3, 70000))
        elif place[field] and isinstance(place[field][0], int):
            numbers = list(place[field])
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(NUMBERS | st.integers(-3, 300))
            place[field] = tuple(numbers)
    try:
        made = mapping_file.decode(mapping_file.encode(msgspec.convert(document, Mapping)), origin="a file")
    except (BridgeError, OverflowError):  # 2**64 and above cannot be encoded to begin with
        return
    for rank in made.ranks:
        for write in rank.writes["checkpoint"]:
            first, end = reach_of(rank, write)
            assert not write.numel or 0 <= first < end <= rank.arena_bytes


@fixed
@given(st.data())
def test_any_layouts_make_a_plan_or_an_error(data: st.DataObject) -> None:
    small = st.integers(-2, 6) | st.sampled_from([37, 48, 64, 96, 128, 1 << 40])
    shard = st.builds(
        Shard,
        source=small,
        offset=st.lists(small, max_size=3).map(tuple),
        shape=st.lists(small, max_size=3).map(tuple),
        dtype=st.sampled_from(["bfloat16", "float32", "load", "", "int8"]),
        head_dim=small,
    )
    whole = st.sampled_from(LAYOUT.shards)
    layout = st.builds(
        Layout,
        rank=st.integers(-1, 2),
        vocabulary=st.sampled_from(["checkpoint", "checkpoint", "other"]),
        shards=st.lists(whole | whole | shard, max_size=8).map(tuple),
        order=st.lists(small, max_size=2).map(tuple),
    )
    layouts = data.draw(st.lists(layout, max_size=3))
    only = data.draw(st.none() | st.frozensets(small, max_size=3))
    try:
        plan = build_plan(DOCUMENT, layouts, bucket_bytes=data.draw(small | st.just(1 << 16)), only=only)
    except BridgeError:
        return
    assert plan.num_buckets < 100_000


FRAMES = st.builds(
    Frame,
    opcode=st.sampled_from(Opcode),
    epoch=st.sampled_from([1, 1, 1, 0, 2, (1 << 64) - 1]),
    version=st.sampled_from([0, 4, 5, 5, 5, 6, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
    index=st.integers(-2, 3) | st.just(-(1 << 63)),
    digest=st.binary(min_size=16, max_size=16),
    text=st.sampled_from(["", "dense", "rollback", "rollback 4", "rollback x", "x" * 3000, "\ud7ff"]),
)


@fixed
@given(st.lists(FRAMES, max_size=12), st.integers(0, 3))
def test_no_sequence_of_frames_brings_a_state_machine_down(frames: list[Frame], peer: int) -> None:
    daemon = InferenceSession(epoch=1, version=4, ranks=range(2))
    leader = Coordinator(epoch=1, version=4, trainers=3, daemons=1)
    member = Member(epoch=1, version=4)
    leader.begin(5, bytes(16), 1, "dense")
    member.begin(5, bytes(16), 1, "dense")
    for frame in frames:
        for take in (daemon.on_frame, lambda f: leader.on_frame(peer, f), member.on_frame):
            with contextlib.suppress(ProtocolError):
                take(frame)
        assert daemon.version < 1 << 63, "the control page has no room for more"


# --- frames -------------------------------------------------------------------------------------------------


@fixed
@given(st.lists(st.binary(min_size=FRAME_BYTES, max_size=FRAME_BYTES) | FRAMES.map(encode), max_size=4))
def test_a_control_group_delivers_frames_or_says_what_came(sent: list[bytes]) -> None:
    queue, delivered = list(sent), []
    over = threading.Event()

    def recv(buffers: list[torch.Tensor], peer: int, tag: int) -> Any:
        if not queue:
            over.set()
            raise RuntimeError("connection closed by peer")
        buffers[0].copy_(torch.frombuffer(bytearray(queue.pop(0)), dtype=torch.uint8))
        return SimpleNamespace(wait=lambda _: True)

    group: Any = SimpleNamespace(recv=recv, send=lambda *_: SimpleNamespace(wait=lambda _: True))
    control = ControlGroup(
        group, {0: "trainer rank 0"}, epoch=1, heartbeat_interval_s=60, deadline_s=5,
        deliver=lambda _, event: delivered.append(event),
    )  # fmt: skip
    control._receivers[0].join(5)
    assert not control._receivers[0].is_alive()
    assert control.close(timeout_s=5)
    assert all(isinstance(event, Frame | BridgeError) for event in delivered)
    assert over.is_set() or delivered, "silence"


# --- changes of a bucket ------------------------------------------------------------------------------------


@fixed
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 300), st.binary(max_size=1200),
    st.lists(NUMBERS | st.integers(-1, 700), min_size=3, max_size=3),
)  # fmt: skip
def test_changes_lie_within_their_bucket(unit: int, total: int, payload: bytes, header: list[int]) -> None:
    nbytes, link = total * unit, SimpleNamespace(who="trainer rank 0")
    sink = DeltaSink.__new__(DeltaSink)
    sink._link, sink._follows = link, True  # type: ignore[assignment]
    said, count, length = (min(max(n, 1 - (1 << 63)), (1 << 63) - 1) for n in header)
    for form in (*Form, said):
        fitting = delta.payload_bytes(form, count, nbytes, unit) if isinstance(form, Form) else length
        for claimed in (length, max(1 - (1 << 63), min(fitting, (1 << 63) - 1))):
            try:
                found, changes = sink._read(0, torch.tensor([int(form), count, claimed]), nbytes, unit)
                if found is Form.DENSE or not changes:
                    continue
                data = torch.frombuffer(
                    bytearray(payload.ljust(claimed, b"\x05")[:claimed]), dtype=torch.uint8
                )
                parts = list(delta.decode(found, data, changes, nbytes, unit))
            except ProtocolError:
                continue
            positions = [position for part in parts for position in part.positions.tolist()]
            assert positions == sorted(set(positions))
            assert min(positions) >= 0
            assert max(positions) < total
            assert sum(len(part.values) for part in parts) == changes


@pytest.mark.parametrize("size", [-1, 1 << 40, 1 << 60])
def test_the_places_of_shards_have_a_size_that_can_be(size: int, bounded: None) -> None:
    sink = DevicePullSink.__new__(DevicePullSink)
    sink._link = SimpleNamespace(who="trainer rank 0", receive=lambda *_: torch.tensor([size]))  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match=rf"trainer rank 0 says .* take {size} bytes"):
        sink.open()


# --- the store ----------------------------------------------------------------------------------------------


def test_values_in_the_store_count_under_their_key_only() -> None:
    store = dist.HashStore()
    ours = Meeting(store, DOCUMENT, epoch=1, timeout_s=0.01)
    ours.publish_links(0, ["gloo", "gloo"])
    store.set("e2/links/0", store.get("e1/links/0"))
    store.set("e1/links/1", store.get("e1/links/0"))
    assert ours.links(0) == ["gloo", "gloo"]
    with pytest.raises(TransferError, match=r"updater 1 to choose transports.*another job's secret"):
        ours.links(1)
    with pytest.raises(TransferError, match="another job's secret"):
        Meeting(store, DOCUMENT, epoch=2, timeout_s=0.01).links(0)
    stranger = msgspec.structs.replace(
        DOCUMENT, rendezvous=msgspec.structs.replace(DOCUMENT.rendezvous, secret="x")
    )
    Meeting(store, stranger, epoch=1, timeout_s=0.01)._set(
        "e1/round/r", Round(layouts=(), partial=False, encoding="dense", bucket_bytes=1)
    )
    with pytest.raises(TransferError, match=r"trainer rank 0's joint layout.*another job's secret"):
        ours.plan("r")


def test_a_store_outlives_what_strangers_write_to_its_port() -> None:
    store = rendezvous.serve_store("127.0.0.1", 0)
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\0" * 4096, struct.pack("<Q", 1 << 60) * 64):
        stranger = socket.create_connection(("127.0.0.1", store.port), timeout=5)
        with stranger, contextlib.suppress(OSError):  # hung up on, which is as it should be
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(0.3)
            stranger.recv(64)
    stranger = rendezvous.reach_store("127.0.0.1", store.port, timeout_s=5).raw
    lines = ("ticket", rendezvous.REQUESTS, rendezvous.LOANS)  # the first as earlier releases had it
    for key in lines:  # a store hangs up on whoever adds to what is no number
        stranger.set(key, b"abc")  # type: ignore[arg-type]
        assert stranger.check([key])
        assert_still_heard(store)
        stranger.delete_key(key)
        stranger.add(key, 10**12)
        assert_still_heard(store)
        stranger.delete_key(key)
    for data in (b"", b"abc", b"\x82\xa4body\xa1\xff" * 9, b"x" * (1 << 20)):
        for key in lines:
            stranger.queue_push(key, data)  # type: ignore[arg-type]
    assert_still_heard(store)
    for key in stranger.list_keys():
        stranger.delete_key(key)
    assert_still_heard(store)


def assert_still_heard(store: rendezvous.Store) -> None:
    """A daemon's admission hears of a trainer that asks now, and of nothing else."""
    daemon: Any = SimpleNamespace(store=store, secret=SECRET, events=SimpleQueue())
    door = admission.Admission(daemon)
    door.watch()
    client = rendezvous.reach_store("127.0.0.1", store.port, timeout_s=5)
    rendezvous.ask(client, REQUEST, SECRET, timeout_s=5)
    try:
        assert daemon.events.get(timeout=20) == Requested(REQUEST)
    finally:
        door.close()
    assert daemon.events.empty()


def test_a_stranger_at_the_store_does_not_hold_up_whoever_comes_next() -> None:
    store = rendezvous.serve_store("127.0.0.1", 0)
    stopping = threading.Event()
    for _ in range(500):
        store.queue_push(rendezvous.LOANS, b"x")  # type: ignore[arg-type]
    loan = rendezvous.Loan(session="ab", borrower="/logs", start=True)
    rendezvous.ask(store, loan, SECRET, timeout_s=5, line=rendezvous.LOANS)
    heard = admission.line(
        rendezvous.LOANS,
        lambda: rendezvous.next_loan(store, secret=SECRET),
        stopping=stopping,
        poll_s=0.05,
    )
    began = time.monotonic()
    assert next(heard) == loan
    assert time.monotonic() - began < 5, "each of them took a turn"


# --- the node's socket --------------------------------------------------------------------------------------


def descriptors() -> set[str]:
    """Those of this process, but for control pages, which last as long as somebody knows them."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that this loop has open
            if "bridge-control" not in str(path.readlink()):
                found.add(path.name)
    return found


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.settimeout(5)
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_memory_follows_what_has_come_not_what_was_announced(
    pair: tuple[Channel, socket.socket], bounded: None
) -> None:
    channel, peer = pair
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peer.sendall(struct.pack("!I", MAX_MESSAGE_BYTES) + b"{")
    peer.close()
    with pytest.raises(BridgeError, match="in the middle of a message"):
        channel.receive()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_peer_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_patching.channel.SEND_TIMEOUT_S", 1.0)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    channel = Channel(ours)  # which waits for ever for what it is to read
    with pytest.raises(ChannelClosed, match="has read nothing"):
        channel.send({"what": "x" * (8 << 20)})
    channel.close()
    theirs.close()


@pytest.mark.parametrize(
    "data", [b"\0", b"\0\0\0\x04", b"\0\0\0\x04nope", b"\xff\xff\xff\xff", b'\0\0\0\x03"\xff"']
)
def test_descriptors_of_a_broken_message_are_closed(pair: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, peer = pair
    before = descriptors()
    with tempfile.TemporaryFile() as file:
        socket.send_fds(peer, [data], [file.fileno()] * 3)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(BridgeError):
            channel.receive()
    assert descriptors() == before


def test_more_descriptors_than_can_be_are_refused_and_closed(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    before = descriptors()
    with tempfile.TemporaryFile() as file:
        socket.send_fds(peer, [b"\0\0\0\x02{}"], [file.fileno()] * (MAX_FDS + 9))
        with pytest.raises(ProtocolError, match=f"more than {MAX_FDS} descriptors"):
            channel.receive()
    assert descriptors() == before


UPDATER = {"type": "updater", "rank": 1, "pid": 7, "host": "h"}


class Desk:
    """The daemon's front desk, and whoever comes to it."""

    def __init__(self) -> None:
        self.daemon: Any = SimpleNamespace(
            registry=Registry(on_change=lambda: None), events=SimpleQueue(), crew=None, mapping=None,
            failed="", last_error=None, vllm_pids=set(), limits=SimpleNamespace(commit_timeout_s=1.0),
        )  # fmt: skip
        self.desk = FrontDesk(self.daemon)

    def hear(self, message: Any, *, fds: int = 0) -> dict[str, Any]:
        """What the daemon answers; {} if it hangs up without a word."""
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        for end in (ours, theirs):
            end.settimeout(10)
        thread = threading.Thread(target=self.desk._converse, args=(Channel(ours),))
        with theirs, tempfile.TemporaryFile() as file:
            visitor = Channel(theirs)
            visitor.send(message, (file.fileno(),) * fds)
            thread.start()
            try:
                answer, more = visitor.receive()
                for fd in more:
                    os.close(fd)
            except BridgeError:
                answer = {}
            theirs.close()
        thread.join(10)
        assert not thread.is_alive(), "the desk hangs"
        return answer


@fixed
@given(
    st.sampled_from(["worker", "engine", "updater", "await_round", "notify_update", "shutdown", "x"]),
    st.data(),
)
def test_the_front_desk_answers_whatever_it_is_told(kind: str, data: st.DataObject) -> None:
    message = hello("worker" if kind == "worker" else "engine") | {"type": kind}
    for field in data.draw(st.lists(st.sampled_from(sorted(message)), max_size=3)):
        value = data.draw(LEAVES.filter(lambda v: not isinstance(v, bytes)) | st.just([]) | st.just({}))
        message[field] = value
        if data.draw(st.booleans()):
            message.pop(field)
    desk, before = Desk(), descriptors()
    answer = desk.hear(message, fds=data.draw(st.integers(0, 3)))
    assert answer.get("type") in ("welcome", "error", "ok"), answer
    assert not desk.daemon.registry.members(), "whoever has hung up is still registered"
    if page := desk.daemon.registry.control:
        os.close(page.fd)
    left = descriptors() - before
    assert not left, f"{len(left)} descriptors are left open"


def test_an_updater_whose_worker_has_died_is_told_so() -> None:
    desk = Desk()
    desk.daemon.mapping = DOCUMENT
    desk.daemon.crew = SimpleNamespace(processes={1: SimpleNamespace(pid=7)})
    answer = desk.hear({**UPDATER, build.KEY: build.BUILD})
    assert answer == {"type": "error", "error": "worker rank 1 is not registered any more"}


def test_who_runs_other_code_is_not_talked_to() -> None:
    desk = Desk()
    desk.daemon.crew = SimpleNamespace(processes={1: SimpleNamespace(pid=os.getpid())})
    for message in (UPDATER, {**UPDATER, build.KEY: "0123 with vllm 0.1"}):
        answer = desk.hear(message)
        assert answer["type"] == "error"
        assert f"updater (pid {os.getpid()}) runs other code than this daemon: build " in answer["error"]
        broken = desk.daemon.events.get_nowait()
        assert isinstance(broken, Broken), "its successors would be refused too"
        assert broken.why == answer["error"]
    assert not desk.daemon.failed
    answer = desk.hear({"type": "lender", "pid": 7})
    assert "runs other code" in answer["error"]
    assert desk.daemon.events.empty(), "the server goes on without lending"
    answer = desk.hear({**hello("worker"), build.KEY: "0123"}, fds=2)
    assert desk.daemon.failed == answer["error"]
    assert "worker (pid" in answer["error"]


def test_a_worker_that_dies_before_its_welcome_is_not_registered() -> None:
    desk, before = Desk(), descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with theirs, tempfile.TemporaryFile() as file:
        Channel(theirs).send(hello("worker"), (file.fileno(),) * 2)
    desk.desk._converse(Channel(ours))
    assert not desk.daemon.registry.members()
    assert desk.daemon.registry.control is None, "the next vLLM must not get the page of a dead one"
    assert descriptors() == before


def test_a_file_that_is_no_control_page_is_refused() -> None:
    desk, before = Desk(), descriptors()
    answer = desk.hear(hello("engine") | {"has_control": True}, fds=1)
    assert answer["type"] == "error"
    assert "no bridge control page" in answer["error"]
    assert descriptors() == before


@pytest.mark.parametrize("data", [b"\0\0\0\x04nope", b"\0\0\0\x02{}", b'\0\0\0\x11{"type":"staged"}'])
def test_an_updater_that_talks_nonsense_counts_as_dead(data: bytes) -> None:
    reports: SimpleQueue[Any] = SimpleQueue()
    crew = Crew.__new__(Crew)
    crew._reports, crew._channels, crew._ready, crew._ending = reports, {}, set(), False
    crew._limbs = {}
    crew._here = threading.Condition()
    crew.processes = {0: SimpleNamespace(pid=7, poll=lambda: None)}  # type: ignore[dict-item]
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with theirs:
        crew.adopt(0, Channel(ours))
        theirs.sendall(data)
        assert reports.get(timeout=20) == Report(crew, 0, None)
    ours.close()


# --- HTTP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"nonsense", RendezvousError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", RendezvousError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff", RendezvousError),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"round": 3}', RendezvousError),
        (b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n\xff\xfe", RoundAborted),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 99\r\n\r\nx", RoundAborted),
        (b"", RendezvousError),
    ],
)
def test_a_trainer_takes_no_other_answer_for_a_receipt(answer: bytes, kind: type[BridgeError]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(kind, match=url):
            fallback.post(url, BridgeConfig(http_url=url, api_key="k"), {"path": "/x"})
        thread.join(5)


def test_every_rank_has_rank_0s_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What rank 0 has shared, however long and whatever it is made of, is what the others raise or return."""
    shared: list[bytes] = []

    def share(data: bytes) -> bytes:
        if data:
            shared.append(data.ljust(fallback.OUTCOME_BYTES)[: fallback.OUTCOME_BYTES])
        return shared[-1]

    answers: list[Receipt | BridgeError] = [
        RECEIPT, RoundAborted("no " + "room" * 5000), ConfigError("/p\udcff is no path"),
        msgspec.structs.replace(RECEIPT, transport="x" * 5000),
    ]  # fmt: skip

    def announce(*_: Any) -> Receipt:
        answer = answers.pop(0)
        if isinstance(answer, BridgeError):
            raise answer
        return answer

    monkeypatch.setattr(fallback, "_share", share)
    monkeypatch.setattr(fallback, "_announce", announce)
    config = BridgeConfig(http_url="http://h:1", update_dir=str(tmp_path), logdir=str(tmp_path))

    def update(rank: int) -> Receipt:
        return fallback.notify_update(config, {}, Ranks(rank=rank, world_size=2), version=1)

    assert update(0) == update(1) == RECEIPT
    with pytest.raises(RoundAborted, match="no roomroom"):
        update(0)
    with pytest.raises(RoundAborted, match="rank 0's update was not committed: no roomroom"):
        update(1)
    with pytest.raises(ConfigError, match="is no path"):
        update(0)
    with pytest.raises(RoundAborted, match=r"not committed: /p\? is no path"):
        update(1)
    assert update(0).transport == "x" * 5000
    with pytest.raises(ProtocolError, match="status tells"):  # never that it was not committed
        update(1)


# --- update files -------------------------------------------------------------------------------------------


def test_update_files_lie_below_the_directory_and_can_be_read(tmp_path: Path) -> None:
    from vllm_patching import update_files

    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(PARSERS["update file"].examples[0])
    (inside / "sub").mkdir()
    (inside / "sub" / "a.safetensors").symlink_to(outside / "model.safetensors")
    (inside / "link").symlink_to(outside)
    (inside / "pipes").mkdir()
    os.mkfifo(inside / "pipes" / "a.safetensors")
    assert update_files.find(str(inside), inside) == [inside / "model.safetensors"]
    for path in ("sub", "link", "link/model.safetensors", "../out", "sub/../../out", "/etc/passwd"):
        with pytest.raises(ConfigError, match="is not below"):
            update_files.find(str(inside / path), inside)
    with pytest.raises(ConfigError, match="no regular file"):
        update_files.find(str(inside / "pipes"), inside)
    for path in ("\0", str(inside / "x\0y")):
        with pytest.raises(ConfigError, match="is no path"):
            update_files.find(path, inside)
    (inside / "empty").mkdir()
    with pytest.raises(MappingError, match="no \\*\\.safetensors"):
        update_files.find(str(inside / "empty"), inside)
