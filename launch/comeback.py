"""What died is started again: how often, after which pause, and a vLLM not before the dead one has let go."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

from launch.process import Child
from vllm_patching import residue

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0  # between SIGTERM and SIGKILL for what a dead vLLM has left running
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # what has been ready for so long does not wait when it dies
FORGIVEN_AFTER_S = 3600.0  # of a child that has lived for so long the count begins anew


class Restarts:
    """How many there were of one child, and whether there may be another."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self.limit = what, limit
        self.count = 0
        self._in_a_row = 0  # the pause grows with these
        self._ready_since: float | None = None

    @property
    def used_up(self) -> bool:
        """Whether the next death is the end."""
        return self.count >= self.limit

    def take(self) -> float:
        """One more; returns how long to pause before it, in seconds: only what soon dies again must wait."""
        if self._ready_s() > STEADY_S:
            self._in_a_row = 0
        self._ready_since = None
        self.count += 1
        self._in_a_row += 1
        return float(min(LONGEST_PAUSE_S, 2.0 ** (self._in_a_row - 2))) if self._in_a_row > 1 else 0.0

    def ready(self, *, cured: bool = False) -> None:
        """It is back; ``cured``: as it would not be while it still has what it died of."""
        self._ready_since = time.monotonic()
        if cured:
            self._in_a_row = 0

    def forgive(self) -> None:
        """Called while it is there: after a long time of that, earlier deaths do not count."""
        if self.count and self._ready_s() > FORGIVEN_AFTER_S:
            logger.info("%s has not died for %g s; restarts count anew", self._what, FORGIVEN_AFTER_S)
            self.count = self._in_a_row = 0

    def _ready_s(self) -> float:
        """For how long it has been ready."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since


class Comeback:
    """One restart on its way: first the dead vLLM is cleared away, then the new one is waited for."""

    def __init__(self, dead: Child, *, pause_s: float, timeout_s: float) -> None:
        """``timeout_s`` bounds the clearing, and then the start."""
        self.began = time.monotonic()
        self.started = False
        self._session = dead.pid  # every child leads one
        self._not_before = self.began + pause_s
        self._timeout_s = timeout_s
        self._due = self.began + timeout_s
        self._asked = False

    @property
    def overdue(self) -> bool:
        """Whether what is waited for has not come in time."""
        return time.monotonic() > self._due

    def left_of_the_dead(self, tree: Iterable[int]) -> list[int]:
        """Which processes of ``tree`` the dead vLLM has left running; they are told to end, then made to."""
        left = [pid for pid in tree if session_of(pid) == self._session]
        number, passed_s, told = signal.SIGTERM, time.monotonic() - self.began, left
        if passed_s > ASK_AGAIN_S:
            number = signal.SIGKILL
            if passed_s < 2 * ASK_AGAIN_S:  # trackers clean up behind the others, and end by themselves
                told = [pid for pid in left if not residue.is_tracker(pid)]
        elif self._asked:
            return left
        self._asked = True
        for pid in told:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it was faster
        return left

    def may_start(self, status: dict[str, Any] | None) -> bool:
        """Whether the pause is over, and the daemon has let go of the dead vLLM and of its memory."""
        if time.monotonic() < self._not_before or status is None:
            return False
        return not any(status["pids"].get(kind) for kind in ("engines", "workers", "updaters"))

    def start(self) -> None:
        """The new vLLM has been started."""
        self.started = True
        self._due = time.monotonic() + self._timeout_s


def session_of(pid: int) -> int | None:
    """The session that a process belongs to; None when it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
