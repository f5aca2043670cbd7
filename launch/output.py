"""The children's logs, told again on the launcher's own output, each line under its child's name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO, TextIO

CHUNK_BYTES = 1 << 20


class _Tail:
    def __init__(self, name: str, path: Path) -> None:
        self.prefix = f"[{name}] "
        self.rest = b""
        path.touch(mode=0o644)
        self.file: BinaryIO = path.open("rb")
        self.file.seek(0, 2)  # earlier runs are appended to, not told again

    def lines(self, *, last: bool) -> list[str]:
        data = self.rest
        while chunk := self.file.read(CHUNK_BYTES):
            data += chunk
        *whole, self.rest = data.split(b"\n")
        if last and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        # A progress bar overwrites itself with carriage returns; its last state is what matters.
        return [
            self.prefix + line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in whole
        ]


class Relay:
    """Follows log files. Holds no pipe, so that neither side can block or break the other."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = output if output is not None else sys.stdout
        self._tails: dict[Path, _Tail] = {}
        self._broken = False

    def follow(self, name: str, path: Path) -> None:
        """Tell what is appended to ``path`` from now on; following it twice changes nothing."""
        if path not in self._tails:
            self._tails[path] = _Tail(name, path)

    def pump(self, *, last: bool = False) -> None:
        """Tell what has arrived; with ``last``, unfinished lines too."""
        lines = [line for tail in self._tails.values() for line in tail.lines(last=last)]
        if not lines or self._broken:
            return
        try:
            self._output.write("\n".join(lines) + "\n")
            self._output.flush()
        except BrokenPipeError:
            self._broken = True  # nobody listens any more; the files still have it all

    def close(self) -> None:
        """Tell the rest and close the files."""
        self.pump(last=True)
        for tail in self._tails.values():
            tail.file.close()
