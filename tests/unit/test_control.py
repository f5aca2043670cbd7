"""The control group's end: nothing is torn down under a thread that waits, and nothing is kept behind it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from bridge.errors import PeerLost
from bridge.protocol.messages import Frame, Opcode
from bridge.protocol.session import Coordinator
from bridge.wire import rendezvous
from bridge.wire.control import ControlGroup
from tests.support.serving import wait_until


class Silent:
    """A group whose peer says nothing until its connection breaks."""

    def __init__(self, broken: threading.Event) -> None:
        self._broken = broken

    def recv(self, *_: Any) -> Any:
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


def test_heartbeats_say_what_an_end_waits_for() -> None:
    store = dist.HashStore()
    ends: dict[int, ControlGroup] = {}

    def join(rank: int) -> None:
        group = rendezvous.make_group(
            store, "control", rank=rank, size=2, address="127.0.0.1", timeout_s=20, named=str
        )
        ends[rank] = ControlGroup(
            group, {1 - rank: f"rank {1 - rank}"}, epoch=1, heartbeat_interval_s=0.05, deadline_s=5,
            deliver=lambda *_: None,
        )  # fmt: skip

    joining = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in joining:
        thread.start()
    for thread in joining:
        thread.join(30)
    coordinator = Coordinator(epoch=1, version=0, trainers=4, daemons=1)
    coordinator.begin(1, b"d" * 32, call=1, encoding="auto")
    coordinator.on_frame(2, Frame(opcode=Opcode.READY, epoch=1, version=1, index=1, text="auto"))
    ends[0].doing = lambda: coordinator.waits_for
    wanted = "trainer rank(s) 1, 3 to call broadcast_weights"
    wait_until("a heartbeat", lambda: ends[1].said.get(0) == wanted, timeout_s=20)
    wait_until("the other's", lambda: ends[0].said == {1: ""}, timeout_s=20)
    for rank, end in ends.items():
        end.send([1 - rank], Frame(opcode=Opcode.SHUTDOWN, epoch=1))
    for end in ends.values():  # a heartbeat that nobody takes any more ends at the deadline
        assert end.close(timeout_s=20)
