"""Control frames over Gloo, heartbeats both ways, and a name for whoever falls silent.

One thread per peer takes its frames, one more sends heartbeats, and one counts how long each peer has been
silent. A broken connection is noticed at once. What comes is handed to ``deliver``, from one of these
threads; owners put it into a queue of theirs.

Gloo ends a wait in one way only: it times out, and then all connections of the group are closed. So no wait
of Gloo's is as short as the deadline: the owner could tell nobody any more who is lost, and be taken for lost
itself. Whoever else is there stays connected meanwhile. When the owner closes the group, a wait that times
out at once ends all others.

All but one kind: what Gloo is just writing when a connection breaks, it forgets to fail, and nothing ends a
wait for that but its own limit. So no thread waits for what it has sent. It is kept until the peer has said
how many frames it has taken (``TAKEN``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from bridge.errors import PeerLost, ProtocolError, TransferError
from bridge.protocol.messages import FRAME_BYTES, HEARTBEAT_ASKS, Frame, Opcode, decode, encode
from bridge.wire.rendezvous import Group, first_line

logger = logging.getLogger(__name__)

CONTROL_TAG = 7
NEVER_TAG = 8  # nothing is ever sent with it
AT_ONCE = timedelta(milliseconds=1)
QUIET = timedelta(minutes=10)  # a job may be suspended as a whole for so long, and then go on
ASKS = 8  # frames of which a peer has not said that it took them, behind which a heartbeat asks
UNTAKEN = 4 * ASKS  # and behind which it gets no more heartbeats until it has
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
        self._numbered = dict.fromkeys(self._peers, 0)  # of those, all but ``TAKEN``
        self._news = threading.Condition()  # of all that follows up to the heartbeats
        self._posted = dict.fromkeys(self._peers, 0)  # frames to each peer, but for ``TAKEN``
        self._words = dict.fromkeys(self._peers, 0)  # the number of the last one that was no heartbeat
        self._taken = dict.fromkeys(self._peers, 0)  # how many it says that it has taken
        # Gloo drops what nobody keeps: by the number that says, once it is taken, that this one is too.
        self._kept: dict[int, deque[tuple[int, dist.Work]]] = {peer: deque() for peer in self._peers}
        self._spoke = dict.fromkeys(self._peers, -math.inf)  # when each was last sent something
        self._lost: dict[int, str] = {}  # and how
        self._left: set[int] = set()  # said goodbye
        self._late: set[int] = set()  # have let a frame lie for the deadline, and none is waited for again
        self._dismissed: set[int] = set()  # were told goodbye
        self._telling: set[int] = set()  # whose receiver is held up by the owner
        self._beats = (-math.inf, {False: b"", True: b""})  # when the last were made; whether one asks
        self._looked = time.monotonic()  # for who is silent
        self._stood_still = (-math.inf, 0.0)  # when this process itself went on, and after how many seconds
        self._closing = threading.Event()
        self._receivers = [self._thread(f"bridge-control-{peer}", self._receive, peer) for peer in peers]
        self._others = [
            self._thread("bridge-heartbeat", self._beat_on),
            self._thread("bridge-silence", self._watch),
        ]
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
        """Send one frame to each of ``peers``, and wait until those that are there say they have taken it.

        Unless it is ``awaited`` nobody waits: what is sent behind it comes behind it. Nor does who is told
        something by ``deliver``, whose thread is the one to hear what is taken; nor is anybody waited for who
        has said goodbye, of whom no more is heard.

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
        awaited = awaited and threading.current_thread() not in self._receivers
        with self._news:
            for peer, number in numbers.items() if awaited else ():
                while not (self._has_taken(peer, number) or self._hopeless(peer)):
                    self._news.wait(max(0.0, until - time.monotonic()))
                    if time.monotonic() >= until and not self._has_taken(peer, number):
                        self._late.add(peer)
                if not self._has_taken(peer, number):
                    late = f"{self._peers[peer]} did not take {frame.opcode.name} (epoch {self._epoch})"
                    failed.append(self._lost.get(peer, late))
        if failed:
            raise PeerLost(failed[0])

    def _has_taken(self, peer: int, number: int) -> bool:
        """Whether ``peer`` says that it has taken so many frames, or says nothing any more as it has left."""
        return self._taken[peer] >= number or peer in self._left

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

    def _post(self, peer: int, data: bytes, *, heartbeat: bool = False) -> int:
        """Which of the frames to ``peer`` this is; nothing of Gloo's blocks here."""
        with self._news:  # counted in the order in which they go out
            self._hand_over(self._open_group(), peer, data, self._posted[peer] + 1)
            self._spoke[peer] = time.monotonic()  # what is said by ``TAKEN`` says nothing else
            self._posted[peer] += 1
            if not heartbeat:
                self._words[peer] = self._posted[peer]
            return self._posted[peer]

    def _hand_over(self, group: Group, peer: int, data: bytes, number: int) -> None:
        """Give Gloo a frame, and keep it until ``peer`` says that it has taken number ``number``."""
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            self._kept[peer].append((number, group.send([buffer], peer, CONTROL_TAG)))
        except RuntimeError as err:
            raise self._gone(peer, err) from err

    def _beat_on(self) -> None:
        """Send heartbeats where nothing else is sent. Who listens says that a connection has broken."""
        wait_s = 0.0
        while not self._closing.wait(wait_s):
            now = time.monotonic()
            for peer in self._peers:
                if now - self._spoke[peer] < self._interval_s:
                    continue
                if self._wants_to_hear(peer):
                    with contextlib.suppress(PeerLost):
                        self._beat(peer)
                self._spoke[peer] = now
            next_s = min(self._spoke.values(), default=now) + self._interval_s - time.monotonic()
            wait_s = max(next_s, self._interval_s / 16)

    def _wants_to_hear(self, peer: int) -> bool:
        """Not who leaves, or is lost; and who has much to take already takes no heartbeat either.

        While our own owner holds up who would hear what it has taken, nobody knows how much that is.
        """
        if peer in self._left or peer in self._dismissed or peer in self._lost:
            return False
        return self._posted[peer] - self._taken[peer] < UNTAKEN or peer in self._telling

    def beat(self) -> None:
        """Send one heartbeat to every peer now, and wait until it is taken.

        Raises:
            PeerLost: as ``send``.
        """
        self.send(self._peers, self._heartbeat(asks=True))

    def _heartbeat(self, *, asks: bool) -> Frame:
        index = HEARTBEAT_ASKS if asks else -1
        return Frame(opcode=Opcode.HEARTBEAT, epoch=self._epoch, index=index, text=self.doing())

    def _beat(self, peer: int) -> None:
        """One heartbeat, the same to all peers: with many of them, making it costs more than sending it."""
        now, (made, frames) = time.monotonic(), self._beats
        if now - made > self._interval_s / 2:
            frame = self._heartbeat(asks=False)
            asking = msgspec.structs.replace(frame, index=HEARTBEAT_ASKS)
            frames = {False: encode(frame), True: encode(asking)}
            self._beats = (now, frames)
        untaken = self._posted[peer] - self._taken[peer]
        self._post(peer, frames[untaken >= ASKS], heartbeat=True)

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
            if frame.opcode is Opcode.TAKEN:
                if self._let_go(peer, frame.index):
                    continue
                sent = f"was sent {self._posted[peer]} frames and says that it took {frame.index}"
                self._lose(peer, ProtocolError(f"{self._peers[peer]} {sent} (epoch {self._epoch})"))
                return
            self._numbered[peer] += 1
            if frame.opcode is not Opcode.HEARTBEAT or frame.index == HEARTBEAT_ASKS:
                self._say_taken(group, peer)
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

    def _say_taken(self, group: Group, peer: int) -> None:
        """Tell ``peer`` how many of its frames we have, also while this end is being closed."""
        data = encode(Frame(opcode=Opcode.TAKEN, epoch=self._epoch, index=self._numbered[peer]))
        # Whoever is gone is missed by this thread's next wait.
        with self._news, contextlib.suppress(PeerLost):
            self._hand_over(group, peer, data, self._posted[peer] + 1)

    def _let_go(self, peer: int, count: int) -> bool:
        """``peer`` has taken ``count`` of our frames, and whatever was sent before those; if that can be."""
        with self._news:
            if not 0 <= count <= self._posted[peer]:
                return False
            self._taken[peer] = max(self._taken[peer], count)
            kept = self._kept[peer]
            while kept and kept[0][0] <= self._taken[peer]:
                kept.popleft()
            self._late.discard(peer)
            self._news.notify_all()
            return True

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
                heard = self._frames[peer] != seen[peer] or peer in self._telling
                if heard or peer in self._left:  # of whom nothing more is to come
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
            self._news.wait_for(lambda: all(map(self._settled, self._peers)), timeout=self._deadline_s)
        if self._lost.keys() <= self._left:
            self._join(self._receivers, timeout_s)
        self._end_waits()
        # Its sockets are closed by now. Torn down under a thread that still waits, the group would take the
        # whole process with it, so each has a reference of its own.
        with self._news:
            self._group = None
            for kept in self._kept.values():
                kept.clear()
            self._news.notify_all()
        return self._join([*self._receivers, *self._others], ENDS_WITHIN_S)

    def _settled(self, peer: int) -> bool:
        """Whether nothing that was sent to ``peer`` is still to be taken, but for heartbeats."""
        return self._has_taken(peer, self._words[peer]) or self._hopeless(peer)

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
