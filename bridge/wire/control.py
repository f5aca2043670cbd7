"""Control frames over Gloo, heartbeats both ways, and a name for whoever falls silent.

One thread per peer waits for that peer's frames; a wait as long as the deadline means that not even a
heartbeat came, so the peer is lost. A broken connection is noticed at once. What comes is handed to
``deliver``, from that peer's thread; owners put it into a queue of theirs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch

from bridge.errors import PeerLost, ProtocolError
from bridge.protocol.messages import FRAME_BYTES, Frame, Opcode, decode, encode
from bridge.wire.rendezvous import Group, first_line

logger = logging.getLogger(__name__)

CONTROL_TAG = 7
Event = Frame | PeerLost | ProtocolError


def _ignore(_: int, __: Event) -> None:
    """Nobody is told any more."""


class ControlGroup:
    """This process's end of the control group. ``peers`` maps control ranks to names for messages."""

    def __init__(
        self,
        group: Group,
        peers: Mapping[int, str],
        *,
        epoch: int,
        heartbeat_interval_s: float,
        deadline_s: float,
        deliver: Callable[[int, Event], None],
    ) -> None:
        self._group: Group | None = group
        self._peers = dict(peers)
        self._epoch = epoch
        self._interval_s = heartbeat_interval_s
        self._deadline = timedelta(seconds=deadline_s)
        self._deliver = deliver
        self.doing: Callable[[], str] = str  # asked with every heartbeat: what this end waits for then
        self.said: dict[int, str] = {}  # what each peer's last heartbeat said
        self._send_lock = threading.Lock()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._receive, args=(peer,), name=f"bridge-control-{peer}", daemon=True)
            for peer in peers
        ]
        self._threads.append(threading.Thread(target=self._beat, name="bridge-heartbeat", daemon=True))
        for thread in self._threads:
            thread.start()

    def send(self, peers: Iterable[int], frame: Frame) -> None:
        """Send one frame to each of ``peers``.

        Raises:
            PeerLost: names the first peer that could not be reached; the others are still tried.
        """
        data = encode(frame)
        lost: PeerLost | None = None
        for peer in peers:
            try:
                self._send_one(peer, data)
            except PeerLost as err:
                lost = lost or err
        if lost:
            try:
                raise lost
            finally:
                del lost  # or it and this frame, by its traceback, keep each other, and the group with them

    def _send_one(self, peer: int, data: bytes) -> None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            with self._send_lock:
                group = self._group
                if group is None:
                    raise PeerLost(f"the control group of epoch {self._epoch} is closed")
                group.send([buffer], peer, CONTROL_TAG).wait(self._deadline)
        except RuntimeError as err:
            raise self._lost(peer, err) from err

    def _lost(self, peer: int, err: Exception) -> PeerLost:
        return PeerLost(
            f"{self._peers[peer]} is gone or was silent for {self._deadline.total_seconds():g} s "
            f"(epoch {self._epoch}): {first_line(err)}"
        )

    def _receive(self, peer: int) -> None:
        buffer = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        group = self._group
        assert group is not None, "closing waits for this thread"
        while True:
            try:
                group.recv([buffer], peer, CONTROL_TAG).wait(self._deadline)
                frame = decode(buffer.numpy().tobytes())
            except RuntimeError as err:
                if not self._closing.is_set():
                    self._deliver(peer, self._lost(peer, err))
                return
            except ProtocolError as err:
                self._deliver(peer, err)
                return
            if frame.opcode is Opcode.HEARTBEAT:
                self.said[peer] = frame.text
            else:
                self._deliver(peer, frame)
            if frame.opcode is Opcode.SHUTDOWN:
                return

    def beat(self) -> None:
        """Send one heartbeat to every peer now."""
        self.send(self._peers, Frame(opcode=Opcode.HEARTBEAT, epoch=self._epoch, text=self.doing()))

    def _beat(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                self.beat()
            except PeerLost as err:
                # The peer's own receiver thread reports the loss; here it only ends the beating.
                logger.debug("heartbeats end: %s", err)
                return

    def close(self, *, timeout_s: float) -> bool:
        """Stop beating and wait for the receivers, which end with the peers' SHUTDOWN or their death.

        Returns whether all ended; Gloo has no way to interrupt the others, which end at their deadline.
        """
        self._closing.set()
        self._deliver = _ignore  # whoever is told holds this group, and would be held by it
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        # Its sockets are closed now, or when the last thread that still waits on it ends: torn down under
        # that thread, the group would take the whole process with it, so each has a reference of its own.
        self._group = None
        return not any(thread.is_alive() for thread in self._threads)
