"""The control group's end: nothing is torn down under a thread that waits, and nothing is kept behind it."""

from __future__ import annotations

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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from bridge.errors import PeerLost
from bridge.protocol.messages import Frame, Opcode
from bridge.protocol.session import Coordinator
from bridge.wire import rendezvous
from bridge.wire.control import LAST_WORDS_S, NEVER_TAG, ControlGroup
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


@dataclass
class End:
    """A control group's end, and what it has delivered."""

    control: ControlGroup
    heard: list[tuple[int, Any]]

    @classmethod
    def of(cls, group: Any, *peers: int, deadline_s: float = 30.0) -> End:
        heard: list[tuple[int, Any]] = []
        control = ControlGroup(
            group, {peer: f"rank {peer}" for peer in peers}, epoch=1, heartbeat_interval_s=0.05,
            deadline_s=deadline_s, deliver=lambda peer, event: heard.append((peer, event)),
        )  # fmt: skip
        return cls(control, heard)

    def wait_for(self, count: int, *, timeout_s: float) -> None:
        wait_until(f"{count} event(s)", lambda: len(self.heard) >= count, timeout_s=timeout_s)


def test_a_peer_that_takes_nothing_holds_up_no_other_and_is_named_to_them() -> None:
    """Rank 1 is connected, and stands still: what rank 0 sends it is not taken."""
    with met(3) as (first, _stands_still, third):
        hub, member = End.of(first, 1, 2, deadline_s=2.0), End.of(third, 0, deadline_s=2.0)
        hub.wait_for(1, timeout_s=20)
        peer, lost = hub.heard[0]
        assert peer == 1
        assert isinstance(lost, PeerLost)
        assert lost.first_hand
        assert str(lost) == "rank 1 was silent for 2 s (epoch 1)"
        assert member.heard == [], "it was held up by the one that stands still"
        began = time.monotonic()
        hub.control.send([1, 2], Frame(opcode=Opcode.ABORT, epoch=1, text=str(lost)))
        assert time.monotonic() - began < 1, "the owner waits for the one that stands still"
        member.wait_for(1, timeout_s=1)
        assert (member.heard[0][1].opcode, member.heard[0][1].text) == (Opcode.ABORT, str(lost))
        member.wait_for(2, timeout_s=LAST_WORDS_S + 5)
        assert isinstance(member.heard[1][1], PeerLost), "and then the connections are closed"
        assert len(hub.heard) == 1, "that they are tells rank 0 nothing"
        assert hub.control.close(timeout_s=20)
        assert member.control.close(timeout_s=20)


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


def _stand_still(host: str, port: int) -> None:
    """A process that is stopped, and says how it found the other when it went on."""
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
    group: Any = rendezvous.make_group(
        store, "control", rank=1, size=2, address="127.0.0.1", timeout_s=20, named=str
    )
    end = End.of(group, 0, deadline_s=2.0)
    store.set("up", b"")
    end.wait_for(1, timeout_s=60)
    store.set("heard", str(end.heard[0][1]).encode())
    end.control.close(timeout_s=5)


def test_who_was_stopped_says_so_when_it_finds_the_others_gone() -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    process = multiprocessing.get_context("spawn").Process(
        target=_stand_still, args=("127.0.0.1", store.port)
    )
    process.start()
    try:
        group: Any = rendezvous.make_group(
            store, "control", rank=0, size=2, address="127.0.0.1", timeout_s=60, named=str
        )
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
    finally:
        process.kill()


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
