"""Control frames over Gloo, heartbeats both ways, and a name for whoever falls silent.

Two threads per peer, one that takes its frames and one that sees to what it is sent: what is sent to a peer
that has stopped is not taken, and must hold up neither the owner nor another peer. One more thread counts how
long each peer has been silent. A broken connection is noticed at once. What comes is handed to ``deliver``,
from one of these threads; owners put it into a queue of theirs.

Gloo ends a wait in one way only: it times out, and then all connections of the group are closed. So no wait
here is as short as the deadline: the owner could tell nobody any more who is lost, and be taken for lost
itself. Some seconds later, or when the group is closed, a wait that times out at once ends all others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from bridge.errors import PeerLost, ProtocolError
from bridge.protocol.messages import FRAME_BYTES, Frame, Opcode, decode, encode
from bridge.wire.rendezvous import Group, first_line

logger = logging.getLogger(__name__)

CONTROL_TAG = 7
NEVER_TAG = 8  # nothing is ever sent with it
AT_ONCE = timedelta(milliseconds=1)
LAST_WORDS_S = 5.0  # for the owner to look for the cause of a loss, and to tell the other peers
ENDS_WITHIN_S = 1.0  # threads whose waits have been ended
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
        self._deadline_s = deadline_s
        self._deliver = deliver
        self.doing: Callable[[], str] = str  # asked with every heartbeat: what this end waits for then
        self.said: dict[int, str] = {}  # what each peer's last heartbeat said
        self._frames = dict.fromkeys(self._peers, 0)  # taken of each peer; each counted by its own thread
        self._left: set[int] = set()  # they said goodbye
        self._lost: set[int] = set()
        self._ended = False  # every wait was, which tells nothing of a peer
        self._sent: dict[int, queue.SimpleQueue[dist.Work | None]] = {p: queue.SimpleQueue() for p in peers}
        self._looked = time.monotonic()  # for who is silent
        self._stood_still = (-math.inf, 0.0)  # when this process itself went on, and after how many seconds
        self._closing = threading.Event()
        self._receivers = {p: self._thread(f"bridge-control-{p}", self._receive, p) for p in peers}
        self._senders = {p: self._thread(f"bridge-heartbeat-{p}", self._see_to, p) for p in peers}
        watch = self._thread("bridge-silence", self._watch)
        self._threads = [*self._receivers.values(), *self._senders.values(), watch]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _thread(name: str, target: Callable[..., None], *args: int) -> threading.Thread:
        return threading.Thread(target=target, args=args, name=name, daemon=True)

    def send(self, peers: Iterable[int], frame: Frame) -> None:
        """Send one frame to each of ``peers``; who does not take it is found to be silent.

        Raises:
            PeerLost: names the first peer whose connection is broken; the others are still sent it.
        """
        data = encode(frame)
        lost: PeerLost | None = None
        for peer in peers:
            try:
                self._sent[peer].put(self._post(peer, data))
            except PeerLost as err:
                lost = lost or err
        if lost:
            try:
                raise lost
            finally:
                del lost  # or it and this frame, by its traceback, keep each other, and the group with them

    def _post(self, peer: int, data: bytes) -> dist.Work:
        group = self._group
        if group is None:
            raise PeerLost(f"the control group of epoch {self._epoch} is closed")
        try:
            return group.send([torch.frombuffer(bytearray(data), dtype=torch.uint8)], peer, CONTROL_TAG)
        except RuntimeError as err:
            raise self._gone(peer, err) from err

    def _gone(self, peer: int, err: Exception) -> PeerLost:
        """A broken connection. Whoever stood still was given up by the others, and sees them gone."""
        still_s = self._own_silence_s()
        share = f"; this process itself had stood still for {still_s:.1f} s" if still_s else ""
        lost = PeerLost(f"{self._peers[peer]} is gone (epoch {self._epoch}): {first_line(err)}{share}")
        lost.first_hand = bool(share)
        return lost

    def _own_silence_s(self) -> float:
        """For how long this process has just run no thread of ours, if that is long; else 0."""
        now = time.monotonic()
        went_on, still_s = self._stood_still
        longest = max(now - self._looked, still_s if now - went_on < self._deadline_s else 0.0)
        return longest if longest > self._deadline_s / 2 else 0.0

    def _receive(self, peer: int) -> None:
        buffer = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        group = self._group
        assert group is not None, "closing waits for this thread"
        while True:
            try:
                group.recv([buffer], peer, CONTROL_TAG).wait(self._backstop)
                frame = decode(buffer.numpy().tobytes())
            except RuntimeError as err:
                self._lose(peer, self._gone(peer, err))
                return
            except ProtocolError as err:
                self._deliver(peer, err)
                return
            self._frames[peer] += 1
            if frame.opcode is Opcode.SHUTDOWN:
                self._left.add(peer)
            if frame.opcode is Opcode.HEARTBEAT:
                self.said[peer] = frame.text
            else:
                self._deliver(peer, frame)
            if frame.opcode is Opcode.SHUTDOWN:
                return

    @property
    def _backstop(self) -> timedelta:
        """What even a wait has whose end another thread sees to."""
        return timedelta(seconds=2 * (self._deadline_s + self._interval_s + LAST_WORDS_S))

    def _lose(self, peer: int, event: PeerLost) -> None:
        """Say once that ``peer`` is lost."""
        if not (self._closing.is_set() or self._ended or peer in self._lost):
            self._lost.add(peer)
            self._deliver(peer, event)

    def _watch(self) -> None:
        """Count how long each peer has been silent, in time in which this process ran: after it was stopped
        itself, or held its interpreter, what has come meanwhile is still to be taken."""
        tick_s = min(self._interval_s, self._deadline_s / 8)
        seen, silent_s = dict(self._frames), dict.fromkeys(self._peers, 0.0)
        self._looked = time.monotonic()
        while not (self._closing.wait(tick_s) or self._lost):
            now = time.monotonic()
            passed_s, self._looked = now - self._looked, now
            if passed_s > self._deadline_s / 2:
                self._stood_still = (now, passed_s)
            for peer in self._peers.keys() - self._left:
                silent_s[peer] += min(passed_s, tick_s + self._interval_s)
                if self._frames[peer] != seen[peer]:
                    seen[peer], silent_s[peer] = self._frames[peer], 0.0
                elif silent_s[peer] >= self._deadline_s:
                    self._lose(peer, self._silent(peer))
        self._looked = math.inf  # nobody does so any more
        if not self._closing.wait(LAST_WORDS_S):
            self._end_waits()

    def _silent(self, peer: int) -> PeerLost:
        who = f"{self._peers[peer]} was silent for {self._deadline_s:g} s (epoch {self._epoch})"
        lost = PeerLost(who)
        lost.first_hand = True
        return lost

    def beat(self) -> None:
        """Send one heartbeat to every peer now.

        Raises:
            PeerLost: as ``send``.
        """
        self.send(self._peers, self._heartbeat())

    def _heartbeat(self) -> Frame:
        return Frame(opcode=Opcode.HEARTBEAT, epoch=self._epoch, text=self.doing())

    def _post_heartbeat(self, peer: int) -> dist.Work | None:
        try:
            return self._post(peer, encode(self._heartbeat()))
        except PeerLost as err:
            logger.debug("heartbeats end: %s", err)
            return None

    def _see_to(self, peer: int) -> None:
        """Keep what was sent until it is taken, or Gloo drops it; send heartbeats while nothing else is."""
        while True:
            try:
                work = self._sent[peer].get(timeout=self._interval_s)
            except queue.Empty:
                ends = self._closing.is_set() or peer in self._left  # who left takes nothing more
                work = None if ends else self._post_heartbeat(peer)
            if work is None:
                return
            try:
                work.wait(self._backstop)
            except RuntimeError as err:
                # The peer's own receiver thread reports the loss; here it only ends the beating.
                logger.debug("nothing more is sent to %s: %s", self._peers[peer], err)
                return

    def _end_waits(self) -> None:
        """End every wait on the group, here and, as all connections are closed by it, at its other ends."""
        group, self._ended = self._group, True
        if group is None:
            return
        for peer in self._peers:
            with contextlib.suppress(RuntimeError):  # it times out, or the connection is closed already
                group.recv([torch.empty(1, dtype=torch.uint8)], peer, NEVER_TAG).wait(AT_ONCE)

    def close(self, *, timeout_s: float) -> bool:
        """Stop beating, and wait until what was sent is taken, and for the peers' SHUTDOWN or their death.

        Where a peer is lost already nobody is waited for. What still waits then is ended.

        Returns:
            Whether all threads have ended.
        """
        self._closing.set()
        self._deliver = _ignore  # whoever is told holds this group, and would be held by it
        for sent in self._sent.values():
            sent.put(None)  # behind what was sent last
        awaited = [*self._receivers.values(), *(self._senders[p] for p in self._peers if p not in self._left)]
        if not self._lost:
            self._join(awaited, timeout_s)
        self._end_waits()
        # Its sockets are closed by now. Torn down under a thread that still waits, the group would take the
        # whole process with it, so each has a reference of its own.
        self._group = None
        return self._join(self._threads, ENDS_WITHIN_S)

    @staticmethod
    def _join(threads: Iterable[threading.Thread], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)
