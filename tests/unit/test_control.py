"""The control group's end: nothing is torn down under a thread that waits, and nothing is kept behind it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.errors import PeerLost, TransferError
from bridge.protocol.messages import FRAME_BYTES, Frame, Opcode, decode, encode
from bridge.protocol.session import Coordinator
from bridge.wire import rendezvous
from bridge.wire.control import ASKS, CONTROL_TAG, NEVER_TAG, UNTAKEN, ControlGroup
from tests.support.serving import wait_until


class Silent:
    """A group whose peer says nothing until its connection breaks."""

    def __init__(self, broken: threading.Event) -> None:
        self._broken = broken

    def recv(self, _: Any, __: int, tag: int) -> Any:
        if tag == NEVER_TAG:
            raise RuntimeError("timed out, and ends nothing here")
        return Work(self._broken.wait)

    def send(self, *_: Any) -> Any:
        if self._broken.is_set():
            raise RuntimeError("connection reset by peer")
        return Work(lambda: None)


class Work:
    def __init__(self, until: Callable[[], object]) -> None:
        self._until = until

    def wait(self, _: object) -> None:
        self._until()
        if self._until.__name__ == "wait":
            raise RuntimeError("connection reset by peer")


def test_a_closed_group_lives_as_long_as_a_thread_waits_on_it_and_no_longer() -> None:
    broken = threading.Event()
    group: Any = Silent(broken)
    gone = weakref.ref(group)
    events: list[Any] = []
    control = ControlGroup(
        group, {0: "trainer rank 0"}, epoch=3, heartbeat_interval_s=60, deadline_s=5,
        deliver=lambda _, event: events.append(event),
    )  # fmt: skip
    del group
    assert not control.close(timeout_s=0.1), "the receiver waits"
    assert gone() is not None, "torn down under a thread that waits"
    with pytest.raises(PeerLost, match="the control group of epoch 3 is closed"):
        control.send([0], Frame(opcode=Opcode.SHUTDOWN, epoch=3))
    broken.set()
    assert control.close(timeout_s=5)
    assert gone() is None, "each epoch that ends like this keeps its sockets"
    assert events == [], "whoever closes wants to hear no more"


def test_a_frame_that_could_not_be_sent_keeps_no_group() -> None:
    broken = threading.Event()
    group: Any = Silent(broken)
    gone = weakref.ref(group)
    control = ControlGroup(
        group, {0: "trainer rank 0"}, epoch=3, heartbeat_interval_s=60, deadline_s=5,
        deliver=lambda *_: None,
    )  # fmt: skip
    del group
    broken.set()
    gc.disable()
    try:
        with pytest.raises(PeerLost, match="trainer rank 0 is gone") as caught:
            control.send([0], Frame(opcode=Opcode.SHUTDOWN, epoch=3))
        del caught
        assert control.close(timeout_s=5)
        assert gone() is None, "only the collector would find it"
    finally:
        gc.enable()


@contextmanager
def met(size: int) -> Iterator[list[Any]]:
    """The ends of one Gloo group, all in this process; who is given an end keeps nothing of it behind."""
    store, ends = dist.HashStore(), dict[int, Any]()

    def join(rank: int) -> None:
        ends[rank] = rendezvous.make_group(
            store, "control", rank=rank, size=size, address="127.0.0.1", timeout_s=20, named=str
        )

    joining = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in joining:
        thread.start()
    for thread in joining:
        thread.join(30)
    yield [ends.pop(rank) for rank in range(size)]


class End:
    """A control group's end, and what it has delivered.

    ``answers`` is sent to all peers whenever something is; ``holds`` holds up whoever delivers a frame.
    """

    def __init__(self, group: Any, peers: tuple[int, ...], deadline_s: float) -> None:
        self.heard: list[tuple[int, Any]] = []
        self.answers: Frame | None = None
        self.holds: threading.Event | None = None
        self._peers = peers
        self.control = ControlGroup(
            group, {peer: f"rank {peer}" for peer in peers}, epoch=1, heartbeat_interval_s=0.05,
            deadline_s=deadline_s, deliver=self._hear,
        )  # fmt: skip

    @classmethod
    def of(cls, group: Any, *peers: int, deadline_s: float = 30.0) -> End:
        return cls(group, peers, deadline_s)

    def _hear(self, peer: int, event: Any) -> None:
        self.heard.append((peer, event))
        if self.answers is not None:
            with contextlib.suppress(PeerLost):
                self.control.send(self._peers, self.answers)
        if self.holds is not None:
            assert self.holds.wait(20)

    def wait_for(self, count: int, *, timeout_s: float) -> None:
        wait_until(f"{count} event(s)", lambda: len(self.heard) >= count, timeout_s=timeout_s)


def test_a_peer_that_takes_nothing_holds_up_no_other_and_is_named_to_them() -> None:
    """Rank 1 is connected, and stands still: what rank 0 sends it is not taken."""
    with met(3) as (first, stands_still, third):
        hub, member = End.of(first, 1, 2, deadline_s=2.0), End.of(third, 0, deadline_s=2.0)
        hub.wait_for(1, timeout_s=20)
        peer, lost = hub.heard[0]
        assert peer == 1
        assert isinstance(lost, PeerLost)
        assert lost.first_hand
        assert str(lost) == "rank 1 was silent for 2 s (epoch 1)"
        assert member.heard == [], "it was held up by the one that stands still"
        began = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 was silent"):
            hub.control.send([1, 2], Frame(opcode=Opcode.ABORT, epoch=1, text=str(lost)))
        assert time.monotonic() - began < 1, "the owner waits for the one that stands still"
        member.wait_for(1, timeout_s=1)
        assert (member.heard[0][1].opcode, member.heard[0][1].text) == (Opcode.ABORT, str(lost))
        texts = set()
        while "ABORT" not in texts:  # the one that stood still goes on, and is told too
            buffer = torch.empty(FRAME_BYTES, dtype=torch.uint8)
            stands_still.recv([buffer], 0, CONTROL_TAG).wait(timedelta(seconds=5))
            texts.add(decode(buffer.numpy().tobytes()).opcode.name)
        assert len(hub.heard) == 1
        assert hub.control.close(timeout_s=20)
        member.wait_for(2, timeout_s=5)
        assert member.control.close(timeout_s=20)


def test_two_peers_that_stand_still_are_both_lost_in_one_deadline() -> None:
    """Whoever is told of the first loss tells the others, who do not take it."""
    with met(3) as (first, *_stand_still):
        hub = End.of(first, 1, 2, deadline_s=2.0)
        hub.answers = Frame(opcode=Opcode.ABORT, epoch=1, text="one is lost")
        began = time.monotonic()
        hub.wait_for(2, timeout_s=20)
        assert time.monotonic() - began < 3.5, (
            "the second was looked for only when the first had been waited for"
        )
        assert hub.control.close(timeout_s=1)


@pytest.mark.parametrize("lost", [False, True], ids=["all are there", "another is lost"])
def test_what_was_sent_to_a_busy_peer_arrives_before_the_end(lost: bool) -> None:
    """Rank 2 is there, and takes nothing for longer than closing waits for goodbyes."""
    with met(3) as (first, other, third):
        hub, busy = End.of(first, 1, 2, deadline_s=5.0), End.of(third, 0, deadline_s=5.0)
        another = End.of(other, 0, deadline_s=5.0)
        go_on = threading.Event()
        busy.holds = go_on
        hub.control.send([2], Frame(opcode=Opcode.BUCKET, epoch=1))
        busy.wait_for(1, timeout_s=5)
        if lost:
            another.control.close(timeout_s=0.1)
            hub.wait_for(1, timeout_s=5)
        word = Frame(opcode=Opcode.ABORT, epoch=1, text="the last word")
        sending = threading.Thread(target=hub.control.send, args=([2], word))
        sending.start()
        sending.join(1.0)
        assert sending.is_alive(), "nobody has taken it"
        closing = threading.Thread(target=hub.control.close, kwargs={"timeout_s": 0.2})
        closing.start()
        closing.join(1.0)
        assert closing.is_alive(), "it would be dropped"
        go_on.set()
        for thread in (sending, closing):
            thread.join(5)
            assert not thread.is_alive()
        busy.wait_for(3, timeout_s=5)
        assert busy.heard[1][1].text == "the last word"
        assert isinstance(busy.heard[2][1], PeerLost)
        busy.control.close(timeout_s=5)
        another.control.close(timeout_s=5)


def test_a_peer_that_beats_and_takes_nothing_is_waited_for_once() -> None:
    """It is not silent; its owner holds up whoever takes the frames."""
    with met(2) as (one, other):
        first, stuck = End.of(one, 1, deadline_s=2.5), End.of(other, 0, deadline_s=2.5)
        stuck.holds = go_on = threading.Event()
        first.control.send([1], Frame(opcode=Opcode.BUCKET, epoch=1))
        stuck.wait_for(1, timeout_s=5)
        began = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 did not take FAILED"):
            first.control.send([1], Frame(opcode=Opcode.FAILED, epoch=1))
        assert time.monotonic() - began > 2.4
        with pytest.raises(PeerLost, match="rank 1 did not take SHUTDOWN"):
            first.control.send([1], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
        first.control.close(timeout_s=0.1)
        assert time.monotonic() - began < 4.5, "it was waited for again"
        assert [event.opcode for _, event in stuck.heard] == [Opcode.BUCKET], "its own end was called silent"
        go_on.set()
        stuck.control.close(timeout_s=5)


@pytest.mark.parametrize("_time", range(10))
def test_sending_and_closing_at_once_lose_nothing_and_wait_for_nothing(_time: int) -> None:
    with met(2) as (one, other):
        first, second = End.of(one, 1, deadline_s=8.0), End.of(other, 0, deadline_s=8.0)
        sent: list[int] = []

        def send_until_closed() -> None:
            with contextlib.suppress(PeerLost):
                while True:
                    first.control.send([1], Frame(opcode=Opcode.BUCKET, epoch=1))
                    sent.append(1)

        senders = [threading.Thread(target=send_until_closed) for _ in range(3)]
        for thread in senders:
            thread.start()
        wait_until("some frames", lambda: len(sent) > 20, timeout_s=10)
        began = time.monotonic()
        first.control.close(timeout_s=0.1)
        assert time.monotonic() - began < 4, "a frame was counted and not seen to"
        for thread in senders:
            thread.join(10)
            assert not thread.is_alive()
        second.wait_for(len(sent), timeout_s=5)
        second.control.close(timeout_s=5)


def test_threads_that_cannot_be_had_leave_no_half_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with met(2) as (one, other):
        whole, count = End.of(one, 1), [0]
        start = threading.Thread.start

        def starts_one(thread: threading.Thread) -> None:
            count[0] += 1
            if count[0] == 2:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", starts_one)
        with pytest.raises(TransferError, match="epoch 1 takes 3 threads: can't start new thread"):
            End.of(other, 0)
        monkeypatch.undo()
        whole.wait_for(1, timeout_s=5)
        assert isinstance(whole.heard[0][1], PeerLost)
        assert whole.control.close(timeout_s=5)


def test_a_goodbye_that_is_answered_late_is_not_waited_for_again() -> None:
    with met(2) as (one, other):
        first, second = End.of(one, 1), End.of(other, 0)
        first.control.send([1], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
        second.wait_for(1, timeout_s=5)
        assert not threading.Event().wait(0.3), "several heartbeats' time"
        second.control.send([0], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
        first.wait_for(1, timeout_s=5)
        began = time.monotonic()
        assert first.control.close(timeout_s=10)
        assert second.control.close(timeout_s=10)
        assert time.monotonic() - began < 3, "a heartbeat went out that nobody takes"


def test_a_forked_child_leaves_the_group_to_its_parent() -> None:
    with met(2) as (one, other):
        first, second = End.of(one, 1), End.of(other, 0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with contextlib.suppress(PeerLost):
                    first.control.send([1], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
                    status = 2
                status = status if status == 2 else int(not first.control.close(timeout_s=1))
            finally:
                os._exit(status)
        ended: list[tuple[int, int]] = [(0, 0)]

        def child_is_over() -> bool:
            ended.append(os.waitpid(child, os.WNOHANG))
            return ended[-1][0] == child

        wait_until("the child", child_is_over, timeout_s=20)
        assert os.waitstatus_to_exitcode(ended[-1][1]) == 0, "2: it spoke for its parent"
        first.control.send([1], Frame(opcode=Opcode.BUCKET, epoch=1))
        second.wait_for(1, timeout_s=5)
        assert second.heard[0][1].opcode is Opcode.BUCKET
        assert first.control.close(timeout_s=0.1)
        assert second.control.close(timeout_s=5)


def test_who_leaves_without_a_word_is_missed_at_once() -> None:
    with met(2) as (one, other):
        ends = [End.of(one, 1), End.of(other, 0)]
        began = time.monotonic()
        assert ends[0].control.close(timeout_s=0.2), (
            "its threads wait for a peer that is alive and says nothing"
        )
        ends[1].wait_for(1, timeout_s=10)
        assert time.monotonic() - began < 10, "only the deadline ended it"
        assert "rank 0 is gone (epoch 1)" in str(ends[1].heard[0][1])
        assert ends[1].control.close(timeout_s=20)


def _join(store: Any, *, rank: int, timeout_s: float) -> Any:
    """One end of a group of two processes."""
    return rendezvous.make_group(
        store, "control", rank=rank, size=2, address="127.0.0.1", timeout_s=timeout_s, named=str
    )


@contextmanager
def _beside(target: Callable[[str, int], None]) -> Iterator[tuple[Any, Any]]:
    """A store, and another process that is told where it is; it is killed in the end."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    process = multiprocessing.get_context("spawn").Process(target=target, args=("127.0.0.1", store.port))
    process.start()
    try:
        yield store, process
    finally:
        process.kill()
        process.join(20)


def _stand_still(host: str, port: int) -> None:
    """A process that is stopped, and says how it found the other when it went on."""
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
    group = _join(store, rank=1, timeout_s=20)
    end = End.of(group, 0, deadline_s=2.0)
    store.set("up", b"")
    end.wait_for(1, timeout_s=60)
    store.set("heard", str(end.heard[0][1]).encode())
    end.control.close(timeout_s=5)


def test_who_was_stopped_says_so_when_it_finds_the_others_gone() -> None:
    with _beside(_stand_still) as (store, process):
        group = _join(store, rank=0, timeout_s=60)
        end = End.of(group, 1, deadline_s=2.0)
        store.wait(["up"])
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        end.wait_for(1, timeout_s=20)
        end.control.close(timeout_s=5)
        os.kill(process.pid, signal.SIGCONT)
        store.wait(["heard"])
        said = store.get("heard").decode()
        assert re.match(
            r"rank 0 is gone \(epoch 1\): .*; this process itself had stood still for [23]\.\d s$", said
        )
        process.join(20)
        assert process.exitcode == 0


def _take_much(host: str, port: int) -> None:
    """A process that is ready to take many frames, and is killed."""
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
    group = _join(store, rank=1, timeout_s=20)
    taken = [torch.empty(FRAME_BYTES, dtype=torch.uint8) for _ in range(20_000)]
    coming = [group.recv([buffer], 0, CONTROL_TAG) for buffer in taken]
    store.set("up", b"")
    coming[-1].wait(timedelta(seconds=60))


def _posts_to_rank_1(control: ControlGroup) -> Callable[[], bool]:
    return lambda: control._posted[1] > 0


def test_what_gloo_forgets_as_a_connection_breaks_holds_nobody() -> None:
    """Of what it was about to write then, neither success nor failure ever comes."""
    with _beside(_take_much) as (store, process):
        group = _join(store, rank=0, timeout_s=60)
        store.wait(["up"])
        gone, end = weakref.ref(group), End.of(group, 1)
        del group
        wait_until("a heartbeat", _posts_to_rank_1(end.control), timeout_s=20)
        killing = threading.Timer(0.005, process.kill)
        killing.start()
        sent = 0
        with contextlib.suppress(PeerLost):
            while sent < 20_000:
                end.control.send([1], Frame(opcode=Opcode.BUCKET, epoch=1), awaited=False)
                sent += 1
        assert sent < 20_000, "it may have been told all before it was killed"
        end.wait_for(1, timeout_s=5)
        assert "rank 1 is gone" in str(end.heard[0][1])
        assert end.control.close(timeout_s=5), "a thread waits for what is never to come"
        del end
        assert gone() is None
        killing.join()


def test_heartbeats_that_are_not_taken_are_kept_within_bounds() -> None:
    with met(2) as (one, _deaf):
        end = End.of(one, 1)
        wait_until("as many as are sent", lambda: len(end.control._kept[1]) == UNTAKEN, timeout_s=20)
        assert not threading.Event().wait(0.3), "several heartbeats' time"
        assert len(end.control._kept[1]) == UNTAKEN
        end.control.close(timeout_s=0)


def test_who_answers_what_it_is_told_does_not_wait_for_its_own_thread() -> None:
    """That thread is the one to hear that the answer was taken."""
    with met(2) as (one, other):
        hub, member = End.of(one, 1, deadline_s=5.0), End.of(other, 0, deadline_s=5.0)
        hub.answers = Frame(opcode=Opcode.ABORT, epoch=1, text="as you say")
        began = time.monotonic()
        member.control.send([0], Frame(opcode=Opcode.FAILED, epoch=1))
        member.control.send([0], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
        member.wait_for(1, timeout_s=5)
        assert time.monotonic() - began < 2
        assert member.heard[0][1].text == "as you say"
        for end in (hub, member):
            end.control.close(timeout_s=5)


def test_an_end_whose_owner_is_busy_is_not_called_silent() -> None:
    """It does not hear what is taken of its heartbeats, which go on."""
    with met(2) as (one, other):
        first, busy = End.of(one, 1, deadline_s=1.0), End.of(other, 0, deadline_s=1.0)
        busy.holds = go_on = threading.Event()
        first.control.send([1], Frame(opcode=Opcode.BUCKET, epoch=1))
        wait_until("many heartbeats", lambda: busy.control._posted[0] > 2 * UNTAKEN, timeout_s=20)
        assert first.heard == []
        go_on.set()
        for end in (first, busy):
            end.control.close(timeout_s=5)


def test_a_peer_that_took_more_than_it_was_sent_is_lost() -> None:
    with met(2) as (one, other):
        first, second = End.of(one, 1), End.of(other, 0)
        second.control._post(0, encode(Frame(opcode=Opcode.TAKEN, epoch=1, index=1 << 40)))
        first.wait_for(1, timeout_s=5)
        assert re.search(r"was sent \d+ frames and says that it took 1099511627776", str(first.heard[0][1]))
        for end in (first, second):
            end.control.close(timeout_s=0.1)


def test_frames_that_are_taken_are_let_go() -> None:
    """At both ends: one speaks more often than heartbeats come, and the other only says what it has taken."""
    with met(2) as (one, other):
        ends = [End.of(one, 1).control, End.of(other, 0).control]
    while ends[1]._posted[0] < 3 * ASKS:
        ends[0].beat()
    wait_until("few that are kept", lambda: len(ends[0]._kept[1]) <= ASKS, timeout_s=5)
    assert ends[0]._taken[1] > 3 * ASKS
    wait_until("few of the other's", lambda: len(ends[1]._kept[0]) <= ASKS, timeout_s=5)
    for rank, end in enumerate(ends):
        end.send([1 - rank], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
    for end in ends:
        assert end.close(timeout_s=20)


def test_heartbeats_say_what_an_end_waits_for() -> None:
    with met(2) as groups:
        ends = [End.of(group, 1 - rank).control for rank, group in enumerate(groups)]
    coordinator = Coordinator(epoch=1, version=0, trainers=4, daemons=1)
    coordinator.begin(1, b"d" * 32, call=1, encoding="auto")
    coordinator.on_frame(2, Frame(opcode=Opcode.READY, epoch=1, version=1, index=1, text="auto"))
    ends[0].doing = lambda: coordinator.waits_for
    wanted = "trainer rank(s) 1, 3 to call broadcast_weights"
    wait_until("a heartbeat", lambda: ends[1].said.get(0) == wanted, timeout_s=20)
    wait_until("the other's", lambda: ends[0].said == {1: ""}, timeout_s=20)
    for rank, end in enumerate(ends):
        end.send([1 - rank], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
    for end in ends:
        assert end.close(timeout_s=20)
