"""Control frames over Gloo, heartbeats both ways, and a name for whoever falls silent.

Two threads per peer, one that takes its frames and one that sees to what it is sent: what is sent to a peer
that has stopped is not taken, and must hold up no other peer's. One more thread counts how long each peer has
been silent. A broken connection is noticed at once. What comes is handed to ``deliver``, from one of these
threads; owners put it into a queue of theirs.

Gloo ends a wait in one way only: it times out, and then all connections of the group are closed. So no wait
of Gloo's is as short as the deadline: the owner could tell nobody any more who is lost, and be taken for lost
itself. Whoever else is there stays connected meanwhile. When the owner closes the group, a wait that times
out at once ends all others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from bridge.errors import PeerLost, ProtocolError, TransferError
from bridge.protocol.messages import FRAME_BYTES, Frame, Opcode, decode, encode
from bridge.wire.rendezvous import Group, first_line

logger = logging.getLogger(__name__)

CONTROL_TAG = 7
NEVER_TAG = 8  # nothing is ever sent with it
AT_ONCE = timedelta(milliseconds=1)
QUIET = timedelta(minutes=10)  # a job may be suspended as a whole for so long, and then go on
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
        self._pid = os.getpid()
        self._frames = dict.fromkeys(self._peers, 0)  # taken of each peer; each counted by its own thread
        self._news = threading.Condition()  # of the next five
        self._posted = dict.fromkeys(self._peers, 0)  # frames to each peer
        self._taken = dict.fromkeys(self._peers, 0)  # of those
        self._lost: dict[int, str] = {}  # and how
        self._left: set[int] = set()  # said goodbye
        self._late: set[int] = set()  # have let a frame lie for the deadline, and none is waited for again
        self._dismissed: set[int] = set()  # were told goodbye
        self._telling: set[int] = set()  # whose receiver is held up by the owner
        self._sent: dict[int, queue.SimpleQueue[dist.Work | None]] = {p: queue.SimpleQueue() for p in peers}
        self._beats = (-math.inf, b"")  # when the last heartbeat was made, and its bytes
        self._looked = time.monotonic()  # for who is silent
        self._stood_still = (-math.inf, 0.0)  # when this process itself went on, and after how many seconds
        self._closing = threading.Event()
        self._receivers = [self._thread(f"bridge-control-{peer}", self._receive, peer) for peer in peers]
        self._others = [self._thread(f"bridge-heartbeat-{peer}", self._see_to, peer) for peer in peers]
        self._others.append(self._thread("bridge-silence", self._watch))
        try:
            for thread in (*self._receivers, *self._others):
                thread.start()
        except RuntimeError as err:
            self.close(timeout_s=0)
            count = len(self._receivers) + len(self._others)
            raise TransferError(f"the control group of epoch {epoch} takes {count} threads: {err}") from err

    @staticmethod
    def _thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        return threading.Thread(target=target, args=args, name=name, daemon=True)

    # --- to the peers ------------------------------------------------------------------------------

    def send(self, peers: Iterable[int], frame: Frame, *, awaited: bool = True) -> None:
        """Send one frame to each of ``peers``, and wait until those that are there have taken it.

        Unless it is ``awaited`` nobody waits: what is sent behind it comes behind it.

        Raises:
            PeerLost: names the first peer that is lost, or did not take it within the deadline. The others
                are sent it all the same, and so is the lost one, should it wake up.
        """
        self._open_group()
        peers, data = tuple(peers), encode(frame)
        if frame.opcode is Opcode.SHUTDOWN:
            self._dismissed.update(peers)
        until, numbers, failed = time.monotonic() + self._deadline_s, {}, list[str]()
        for peer in peers:
            try:
                numbers[peer] = self._post(peer, data)
            except PeerLost as err:
                failed.append(str(err))
        with self._news:
            for peer, number in numbers.items() if awaited else ():
                while self._taken[peer] < number and not self._hopeless(peer):
                    self._news.wait(max(0.0, until - time.monotonic()))
                    if time.monotonic() >= until:
                        self._late.add(peer)
                if self._taken[peer] < number:
                    late = f"{self._peers[peer]} did not take {frame.opcode.name} (epoch {self._epoch})"
                    failed.append(self._lost.get(peer, late))
        if failed:
            raise PeerLost(failed[0])

    def _hopeless(self, peer: int) -> bool:
        """Whether nobody waits for what was sent to ``peer``."""
        return peer in self._lost or peer in self._late or self._group is None

    def _open_group(self) -> Group:
        group = self._group
        if os.getpid() != self._pid:
            raise PeerLost(f"the control group of epoch {self._epoch} is that of process {self._pid}")
        if group is None or self._closing.is_set():
            raise PeerLost(f"the control group of epoch {self._epoch} is closed")
        return group

    def _post(self, peer: int, data: bytes) -> int:
        """Which of the frames to ``peer`` this is. Gloo drops what nobody keeps: its thread does."""
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with self._news:  # counted before it can be taken, and before the end that closing puts behind it
            group = self._open_group()
            try:
                self._sent[peer].put(group.send([buffer], peer, CONTROL_TAG))
            except RuntimeError as err:
                raise self._gone(peer, err) from err
            self._posted[peer] += 1
            return self._posted[peer]

    def _see_to(self, peer: int) -> None:
        """Keep what was sent until it is taken; send heartbeats while nothing else is."""
        group = self._group  # as torn down under a wait, it would take the process with it
        assert group is not None, "closing waits for this thread"
        while True:
            try:
                work = self._sent[peer].get(timeout=self._interval_s)
            except queue.Empty:
                if self._closing.is_set() or peer in self._left or peer in self._dismissed:
                    continue  # whoever leaves takes nothing more
                try:
                    self._beat(peer)
                except PeerLost as err:
                    if not self._closing.is_set():
                        self._lose(peer, err)
                        return
                continue
            if work is None:
                return
            try:
                work.wait(QUIET)
            except RuntimeError as err:
                self._lose(peer, self._gone(peer, err))
                return
            with self._news:
                self._taken[peer] += 1
                self._late.discard(peer)
                self._news.notify_all()

    def beat(self) -> None:
        """Send one heartbeat to every peer now.

        Raises:
            PeerLost: as ``send``.
        """
        self.send(self._peers, Frame(opcode=Opcode.HEARTBEAT, epoch=self._epoch, text=self.doing()))

    def _beat(self, peer: int) -> None:
        """One heartbeat, the same to all peers: with many of them, making it costs more than sending it."""
        now, (made, data) = time.monotonic(), self._beats
        if now - made > self._interval_s / 2:
            data = encode(Frame(opcode=Opcode.HEARTBEAT, epoch=self._epoch, text=self.doing()))
            self._beats = (now, data)
        self._post(peer, data)

    # --- from the peers ----------------------------------------------------------------------------

    def _receive(self, peer: int) -> None:
        buffer = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        group = self._group
        assert group is not None, "closing waits for this thread"
        while True:
            try:
                group.recv([buffer], peer, CONTROL_TAG).wait(QUIET)
                frame = decode(buffer.numpy().tobytes())
            except RuntimeError as err:
                self._lose(peer, self._gone(peer, err))
                return
            except ProtocolError as err:
                self._lose(peer, err)
                return
            self._frames[peer] += 1
            if frame.opcode is Opcode.SHUTDOWN:
                with self._news:
                    self._left.add(peer)
                    self._news.notify_all()
            if frame.opcode is Opcode.HEARTBEAT:
                self.said[peer] = frame.text
            else:
                self._telling.add(peer)
                self._deliver(peer, frame)
                self._telling.discard(peer)
            if frame.opcode is Opcode.SHUTDOWN:
                return

    def _lose(self, peer: int, event: PeerLost | ProtocolError) -> None:
        """Say once that ``peer`` is lost. Whoever left before is missed by nobody."""
        with self._news:
            known = peer in self._lost or peer in self._left
            self._lost.setdefault(peer, str(event))
            self._news.notify_all()
        if not (known or self._closing.is_set()):
            self._deliver(peer, event)

    def _watch(self) -> None:
        """Count how long each peer has been silent, in time in which this process ran: after it was stopped
        itself, or held its interpreter, what has come meanwhile is still to be taken."""
        tick_s = min(self._interval_s, self._deadline_s / 8)
        seen, silent_s = dict(self._frames), dict.fromkeys(self._peers, 0.0)
        self._looked = time.monotonic()
        while not self._closing.wait(tick_s):
            now = time.monotonic()
            passed_s, self._looked = now - self._looked, now
            if passed_s > self._deadline_s / 2:
                self._stood_still = (now, passed_s)
            for peer in self._peers.keys() - self._lost.keys():
                silent_s[peer] += min(passed_s, tick_s + self._interval_s)
                left = peer in self._left and self._taken[peer] >= self._posted[peer]
                if self._frames[peer] != seen[peer] or peer in self._telling or left:
                    seen[peer], silent_s[peer] = self._frames[peer], 0.0
                elif silent_s[peer] >= self._deadline_s:
                    self._miss(peer)

    def _miss(self, peer: int) -> None:
        """In a thread of its own: who is told tells others, some of whom are as silent and not yet lost."""
        lost = PeerLost(f"{self._peers[peer]} was silent for {self._deadline_s:g} s (epoch {self._epoch})")
        lost.first_hand = True
        try:
            self._thread(f"bridge-lost-{peer}", self._lose, peer, lost).start()
        except RuntimeError:  # there is none to be had
            self._lose(peer, lost)

    def _gone(self, peer: int, err: Exception) -> PeerLost:
        """A broken connection. Whoever stood still was given up by the others, and sees them gone."""
        still_s = self._own_silence_s()
        share = f"; this process itself had stood still for {still_s:.1f} s" if still_s else ""
        lost = PeerLost(f"{self._peers[peer]} is gone (epoch {self._epoch}): {first_line(err)}{share}")
        lost.first_hand = bool(share) and still_s > self._deadline_s - 2 * self._interval_s
        return lost

    def _own_silence_s(self) -> float:
        """For how long this process has just run no thread of ours, if that is long; else 0."""
        now = time.monotonic()
        went_on, still_s = self._stood_still
        longest = max(now - self._looked, still_s if now - went_on < self._deadline_s else 0.0)
        return longest if longest > self._deadline_s / 2 else 0.0

    # --- the end -----------------------------------------------------------------------------------

    def close(self, *, timeout_s: float) -> bool:
        """Stop beating, and wait for the peers' SHUTDOWN or their death. What waits then is ended.

        Whatever was sent is taken first by all that are there, for as long as the deadline. Where a peer is
        lost, no other one's SHUTDOWN is waited for. A forked child does nothing: the group is its parent's.

        Returns:
            Whether all threads have ended.
        """
        if os.getpid() != self._pid:
            return True
        with self._news:
            self._closing.set()
            self._deliver = _ignore  # whoever is told holds this group, and would be held by it
            for sent in self._sent.values():
                sent.put(None)  # behind what was sent last
            self._news.wait_for(lambda: all(map(self._settled, self._peers)), timeout=self._deadline_s)
        if self._lost.keys() <= self._left:
            self._join(self._receivers, timeout_s)
        self._end_waits()
        # Its sockets are closed by now. Torn down under a thread that still waits, the group would take the
        # whole process with it, so each has a reference of its own.
        with self._news:
            self._group = None
            self._news.notify_all()
        return self._join([*self._receivers, *self._others], ENDS_WITHIN_S)

    def _settled(self, peer: int) -> bool:
        """Whether nothing that was sent to ``peer`` is still to be taken."""
        return self._taken[peer] >= self._posted[peer] or peer in self._left or self._hopeless(peer)

    def _end_waits(self) -> None:
        """End every wait on the group, here and, as all connections are closed by it, at its other ends."""
        group = self._group
        if group is None:
            return
        for peer in self._peers:
            with contextlib.suppress(RuntimeError):  # it times out, or the connection is closed already
                group.recv([torch.empty(1, dtype=torch.uint8)], peer, NEVER_TAG).wait(AT_ONCE)

    @staticmethod
    def _join(threads: Iterable[threading.Thread], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        others = [t for t in threads if t.ident is not None and t is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)
