"""The control group's end: nothing is torn down under a thread that waits, and nothing is kept behind it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from bridge.errors import PeerLost
from bridge.protocol.messages import Frame, Opcode
from bridge.wire.control import ControlGroup


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
