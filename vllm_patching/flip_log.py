"""``flips-rankR.jsonl``: what a worker has flipped to, for people and for the next attempt of a batch job.

A thread of its own writes it. The log directory is often on a file system of the cluster's that is full or
away for minutes, and a worker that waited for it would stop every token. What could not be written is kept
and tried again, because a requeued job counts on from the highest version that it finds here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

KEPT = 4096  # flips that could not be written yet; of more, the oldest are lost
RETRY_S = 5.0
CLOSE_TIMEOUT_S = 2.0


class FlipLog:
    """The log of one worker. ``add`` never waits, and never raises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: deque[str] = deque(maxlen=KEPT)
        self._news = threading.Condition()
        self._closing = False
        self._failing = ""
        self._thread = threading.Thread(target=self._run, name="bridge-flip-log", daemon=True)
        self._thread.start()

    def add(self, flip: dict[str, int]) -> None:
        """Have one flip written down."""
        with self._news:
            self._lines.append(json.dumps(flip) + "\n")
            self._news.notify_all()

    def close(self) -> None:
        """Write what can still be written, for as long as ``CLOSE_TIMEOUT_S``."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._lines or self._closing)
                lines, self._lines = self._lines, deque(maxlen=KEPT)
            written = self._write(lines) if lines else True
            with self._news:
                if not written:
                    self._lines = deque([*lines, *self._lines], maxlen=KEPT)
                if self._closing and not (written and self._lines):
                    return
                if self._failing:
                    self._news.wait_for(lambda: self._closing, timeout=RETRY_S)

    def _write(self, lines: Iterable[str]) -> bool:
        # Opened anew each time: a handle may go stale, and the file may be moved away by who rotates logs.
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                # Behind a write that failed there may be half a line.
                data = ("\n" if self._failing else "").encode() + "".join(lines).encode()
                if (written := os.write(fd, data)) != len(data):
                    raise OSError(f"only {written} of {len(data)} bytes could be written")
            finally:
                os.close(fd)
        except OSError as err:
            if str(err) != self._failing:
                logger.warning("flips cannot be logged to %s, and are kept meanwhile: %s", self._path, err)
            self._failing = str(err)
            return False
        self._failing = ""
        return True
