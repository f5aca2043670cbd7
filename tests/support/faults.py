"""Faults at named points of a round, and the proof that they happened.

A test arms one ``Fault`` in a node's log directory. Trainer and daemon run with their control group and data
link wrapped (``install``): when the named frame passes, the fault is done right there, in the process that
sends or has received it, and said in ``fired.json``. The product knows nothing of it.

==============  =============================================
point           when
==============  =============================================
idle            no round is under way
before_begin    trainer rank 0 is about to send BEGIN
mid_bucket      it is about to send BUCKET ``bucket``
staged          the daemon is about to send STAGED, and commits behind it
committed       the daemon is about to send COMMITTED
==============  =============================================

These are the points of one server alone, whose daemon awaits no COMMIT.

A frame that is reordered is kept until the next one to the same peer, a heartbeat if nothing else comes, has
gone ahead of it. Only then has the fault happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bridge.protocol.messages import encode

if TYPE_CHECKING:
    from tests.support.link import Link

POINTS = {
    "before_begin": ("trainer", "send", "BEGIN"),
    "mid_bucket": ("trainer", "send", "BUCKET"),
    "staged": ("daemon", "send", "STAGED"),
    "committed": ("daemon", "send", "COMMITTED"),
}
FULL_SHM = "full_shm"  # nothing fits into the server's /dev/shm, where ``who``, which is killed, starts again
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,  # as by who preempts
    FULL_SHM: signal.SIGKILL,
}
ENDS = ("kill", "term", FULL_SHM)  # whoever meets them ends
SEVERAL = ("trainer", "updater", "worker")  # roles of several processes, numbered by rank
FRAMES = ("drop", "duplicate", "reorder", "corrupt", "stale", "other_version", "delay")
PLANS = ("other_plan",)  # BEGIN, with the digest of another one than the ranks compute
CHANGES: dict[str, Callable[[Any], Any]] = {
    "stale": lambda frame: msgspec.structs.replace(frame, epoch=frame.epoch - 1),
    "other_version": lambda frame: msgspec.structs.replace(frame, version=max(0, frame.version - 2)),
    "other_plan": lambda frame: msgspec.structs.replace(frame, digest=bytes(reversed(frame.digest))),
}
# What the error says that such a frame leads to: its own value, and the right one.
BOTH_VALUES = {
    "stale": r"of epoch (\w+) in epoch (\w+)",
    "other_version": r"of version (\w+) in a round of version (\w+)|version (\w+) offered, version (\w+) is",
    "other_plan": r"trainer rank 0 has (\w+), (?:updater|trainer rank) \d+ has (\w+)",
    "corrupt_bucket": r"sent (\w+), arrived (\w+)",
}
BUCKETS = ("corrupt_bucket",)
LINKS: dict[str, dict[str, Any]] = {
    "cut": {"cut_after": 12},  # packets: in the middle of the round that has just begun
    "slow link": {"delay_s": 0.1},
    "lossy link": {"loss": 0.01},
    "very lossy link": {"loss": 0.2},
}
LOSSY = tuple(what for what, link in LINKS.items() if "loss" in link)


@dataclass(frozen=True)
class Fault:
    """``what`` happens to ``who`` (of ``SIGNALS``) at point ``at``; frames and buckets are nobody's.

    Of several it is number ``which``.
    """

    what: str
    who: str = ""
    at: str = "mid_bucket"
    bucket: int = 1
    seconds: float = 1.0
    which: int = 0

    def __str__(self) -> str:
        who = f"{self.who} {self.which}" if self.who in SEVERAL else self.who
        where = f"{self.at} {self.bucket}" if self.at == "mid_bucket" else self.at
        return f"{self.what} {who} at {where}".replace("  ", " ")


class Armed:
    """A fault that waits in ``directory``. A context manager: it must have fired by the end."""

    def __init__(
        self,
        fault: Fault,
        directory: Path,
        *,
        pid: int = 0,
        link: Link | None = None,
        shm: Path | None = None,
        seed: int = 0,
    ) -> None:
        """``pid`` is whom a signal goes to; ``link`` is what packets go through; ``shm``, what is filled.

        ``seed`` draws the packets that a link loses.
        """
        self.fault, self._shm = fault, shm
        self._link = link if fault.what in LINKS else None
        self._order, self._fired = directory / "fault.json", directory / "fired.json"
        self._fired.unlink(missing_ok=True)
        if fault.what in LINKS:
            assert link is not None
            link.set(seed=seed, **LINKS[fault.what])
            return
        if fault.at == "idle":
            self._fired.write_text(json.dumps({"at": time.monotonic()}))
            os.kill(pid, SIGNALS[fault.what])
            return
        partial = self._order.with_suffix(".new")
        partial.write_text(json.dumps({**asdict(fault), "pid": pid, "shm": str(shm)}))
        partial.replace(self._order)

    def __enter__(self) -> Armed:
        return self

    @property
    def fired(self) -> bool:
        if self._link is not None:
            packets = self._link.packets()
            return packets["late"] + packets["lost"] > 0
        if self.fault.what == FULL_SHM:
            assert self._shm is not None
            return self._fired.exists() and os.statvfs(self._shm).f_bavail == 0
        return self._fired.exists()

    def __exit__(self, kind: Any, *_: object) -> None:
        self._order.unlink(missing_ok=True)
        if kind is None:
            assert self.fired, f"the fault never happened: {self.fault}"


# --- within the trainer and the daemon ------------------------------------------------------------------


class _Injector:
    """One process's frames and buckets on their way."""

    def __init__(self, side: str, directory: Path) -> None:
        self._side = side
        self._order, self._fired = directory / "fault.json", directory / "fired.json"
        self._lock = threading.Lock()
        # A group whose epoch is over is not to be held by what it will never send.
        self._kept: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
        self._reordering = False  # until the first of what is kept is on its way

    def take(self, way: str, opcode: str, index: int) -> dict[str, Any] | None:
        """The armed fault, if this is its point; it is spent then and, but for a reordering, has fired."""
        with self._lock:
            try:
                order: dict[str, Any] = json.loads(self._order.read_text())
            except (OSError, ValueError):
                return None
            if order["what"] in BUCKETS:  # not the frame that announces it
                return None
            side, wanted_way, wanted = POINTS[order["at"]]
            if (side, wanted_way, wanted) != (self._side, way, opcode):
                return None
            if order["at"] == "mid_bucket" and index != order["bucket"]:
                return None
            if not self._spend():
                return None
            if order["what"] != "reorder":
                self._say_fired()
            return order

    def _say_fired(self) -> None:
        partial = self._fired.with_suffix(".new")
        partial.write_text(json.dumps({"at": time.monotonic(), "pid": os.getpid()}))
        partial.replace(self._fired)

    def _spend(self) -> bool:
        """Whether it is this process that takes the fault: several trainer ranks may meet it at once."""
        try:
            self._order.unlink()
        except FileNotFoundError:
            return False
        return True

    def install(self) -> None:
        from bridge.wire.control import ControlGroup
        from bridge.wire.transport import BUCKET_TAG, DataLink

        send, start, beat = ControlGroup.send, ControlGroup.__init__, ControlGroup._beat
        post = DataLink.post_send

        def faulty_send(group: Any, peers: Any, frame: Any, *, awaited: bool = True) -> None:
            self.send(group, tuple(peers), frame, partial(send, awaited=awaited))

        def faulty_beat(group: Any, peer: int) -> None:
            overtaken = self._take_kept(group, (peer,))
            beat(group, peer)
            for _, kept in overtaken:
                group._post(peer, encode(kept))  # by the thread that sends heartbeats, which waits for nobody
                self._say_reordered()

        def faulty_init(group: Any, *args: Any, deliver: Any, **kwargs: Any) -> None:
            def faulty_deliver(peer: int, event: Any) -> None:
                opcode = getattr(event, "opcode", None)
                order = self.take("deliver", opcode.name, event.index) if opcode is not None else None
                if order and order["what"] in SIGNALS:
                    _strike(order)
                deliver(peer, event)

            start(group, *args, deliver=faulty_deliver, **kwargs)

        def faulty_post(link: Any, tensor: Any, tag: int) -> Any:
            if tag >= BUCKET_TAG and self._buckets_broken(tag - BUCKET_TAG):
                tensor = tensor.clone()
                tensor[tensor.numel() // 2] ^= 1
            return post(link, tensor, tag)

        ControlGroup.send = faulty_send  # type: ignore[method-assign]
        ControlGroup._beat = faulty_beat  # type: ignore[method-assign]
        ControlGroup.__init__ = faulty_init  # type: ignore[method-assign, assignment]
        DataLink.post_send = faulty_post  # type: ignore[method-assign]

    def send(self, group: Any, peers: tuple[int, ...], frame: Any, send: Any) -> None:
        """Send ``frame`` by ``send``, as the armed fault has it, and behind it what was kept until then."""
        overtaken = self._take_kept(group, peers)  # and not what is kept while this frame is on its way
        self._send(group, peers, frame, send)
        for peer, kept in overtaken:
            send(group, (peer,), kept)
            self._say_reordered()

    def _say_reordered(self) -> None:
        with self._lock:
            first, self._reordering = self._reordering, False
        if first:
            self._say_fired()

    def _send(self, group: Any, peers: tuple[int, ...], frame: Any, send: Any) -> None:
        order = self.take("send", frame.opcode.name, frame.index)
        what = order["what"] if order else ""
        if order and what in SIGNALS:
            _strike(order)
        elif order and what == "delay":
            time.sleep(order["seconds"])
        elif what == "drop":
            return
        elif what == "reorder":
            with self._lock:
                self._kept[group], self._reordering = dict.fromkeys(peers, frame), True
            return
        elif what in CHANGES:
            frame = CHANGES[what](frame)
        elif order and what == "corrupt":
            data = bytearray(encode(frame))
            data[order["bucket"] % 8] ^= 0x40  # magic, version or opcode
            for peer in peers:
                group._post(peer, bytes(data))
            return
        send(group, peers, frame)
        if what == "duplicate":
            send(group, peers, frame)

    def _take_kept(self, group: Any, peers: tuple[int, ...]) -> list[tuple[int, Any]]:
        """What ``peers`` are to get behind the next frame to them."""
        with self._lock:
            kept = self._kept.get(group, {})
            return [(peer, kept.pop(peer)) for peer in peers if peer in kept]

    def _buckets_broken(self, index: int) -> bool:
        try:
            order = json.loads(self._order.read_text())
        except (OSError, ValueError):
            return False
        if order["what"] not in BUCKETS or index != order["bucket"] or not self._spend():
            return False
        self._say_fired()
        return True


def _strike(order: dict[str, Any]) -> None:
    if order["what"] == FULL_SHM:  # ``empty`` undoes it
        with Path(order["shm"], FULL_SHM).open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
    os.kill(order["pid"], SIGNALS[order["what"]])


def empty(directory: Path) -> None:
    """Let things fit again."""
    Path(directory, FULL_SHM).unlink()


def install(side: str) -> None:
    """Let faults that are armed in BRIDGE_TEST_FAULTS happen in this process."""
    if directory := os.environ.get("BRIDGE_TEST_FAULTS"):
        _Injector(side, Path(directory)).install()


def _watch_pickles(directory: Path) -> None:
    """Say so if this process unpickles anything from here on."""

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "pickle.find_class":
            with (directory / "unpickled.txt").open("a") as file:
                file.write(f"{arguments}\n")

    sys.addaudithook(audit)


if __name__ == "__main__":
    install("daemon")
    _watch_pickles(Path(os.environ["BRIDGE_TEST_FAULTS"]))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
