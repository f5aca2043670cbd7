"""The children's logs, told again on the launcher's own output, each line under its child's name.

Neither is needed to serve: an output that takes nothing, and a log that cannot be read, cost what is told.
"""

from __future__ import annotations

import logging
import os
import sys
from io import FileIO
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


class _Tail:
    """What is appended to the file of this name: logs are rotated, and shares go away and come back."""

    def __init__(self, name: str, path: Path) -> None:
        self.prefix = f"[{name}] "
        self.rest = b""
        self._path = path
        self._file: FileIO | None = None
        self._inode = 0
        self._position: int | None = None  # None: at the end, as earlier runs are not told again
        self._away = False
        try:
            path.touch(mode=0o644)
            self._open()
        except OSError as err:
            self._miss(err)

    def lines(self, *, last: bool) -> list[str]:
        try:
            self._read()
            if self._is_renewed():
                self.rest += b"\n" if self.rest else b""
                self.close()
                self._read()
            self._away = False
        except OSError as err:
            self._miss(err)
        *whole, self.rest = self.rest.split(b"\n")
        if last and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        # A progress bar overwrites itself with carriage returns; its last state is what matters.
        return [
            self.prefix + line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in whole
        ]

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError:
            pass  # nothing was written
        self._file = None

    def _open(self) -> FileIO:
        self._file = file = self._path.open("rb", buffering=0)
        inode = os.fstat(file.fileno()).st_ino
        if self._position is None:
            self._position = file.seek(0, os.SEEK_END)
        elif inode != self._inode:
            self._position = 0
        self._inode = inode
        return file

    def _read(self) -> None:
        file = self._file or self._open()
        assert self._position is not None
        if os.fstat(file.fileno()).st_size < self._position:  # logrotate's copytruncate
            self._position = 0
        file.seek(self._position)
        while chunk := file.read(CHUNK_BYTES):
            self.rest += chunk
            self._position += len(chunk)

    def _is_renewed(self) -> bool:
        """Whether the name leads to another file; one that is empty has no writer yet, ours may have."""
        try:
            now = self._path.stat()
        except OSError:
            return False  # renamed, and not made anew yet
        return now.st_ino != self._inode and now.st_size > 0

    def _miss(self, err: OSError) -> None:
        self.close()  # its handle may be stale for good
        if not self._away:
            logger.warning("%s cannot be read: %s; it is told again once it can be", self._path, err.strerror)
        self._away = True


class Relay:
    """Follows log files. Holds no pipe, so that neither side can block or break the other."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = output if output is not None else sys.stdout
        self._tails: dict[Path, _Tail] = {}
        self._lost = False

    def follow(self, name: str, path: Path) -> None:
        """Tell what is appended to ``path`` from now on; following it twice changes nothing."""
        if path not in self._tails:
            self._tails[path] = _Tail(name, path)

    def pump(self, *, last: bool = False) -> None:
        """Tell what has arrived; with ``last``, unfinished lines too."""
        lines = [line for tail in self._tails.values() for line in tail.lines(last=last)]
        if not lines:
            return
        try:
            self._output.write("\n".join(lines) + "\n")
            self._output.flush()
        except (OSError, UnicodeError) as err:  # tried again with the next lines: a full disk may get room
            if not self._lost:
                logger.warning("the launcher's own output loses lines (%s); the log files have them", err)
            self._lost = True

    def close(self) -> None:
        """Tell the rest and close the files."""
        self.pump(last=True)
        for tail in self._tails.values():
            tail.close()


def drop_unwritten() -> None:
    """What could not be written would fail again when Python ends, and cost the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), stream.fileno())
