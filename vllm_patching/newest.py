"""The highest version number ever asked for in a run directory: it outlives vLLM and the daemon.

A vLLM that was started again serves the checkpoint, which is version 0, and knows nothing of what was served
before it. No number may stand for two versions, so the daemon counts on from this one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bridge.errors import ConfigError, TransferError
from bridge.protocol.mapping import write_atomically
from bridge.protocol.messages import MAX_VERSION

FILE_NAME = "newest-version"
DIGITS = len(str(MAX_VERSION))


class Newest:
    """The number, kept in a file of the run directory; that of a launch, which removes an earlier one's."""

    def __init__(self, run_dir: Path) -> None:
        """Read what an earlier daemon of the same launch has left.

        Raises:
            ConfigError: the file is damaged.
        """
        self._path = run_dir / FILE_NAME
        self._fd = -1
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b"0"
        self.version = int(data) if re.fullmatch(b"[0-9]{1,%d}" % DIGITS, data) else MAX_VERSION + 1
        if self.version > MAX_VERSION:
            raise ConfigError(f"{self._path} holds {data[:32]!r}, which is no version; end the launcher")

    def raise_to(self, version: int) -> None:
        """``version`` is about to be asked for.

        Raises:
            TransferError: it could not be written down.
        """
        if version > self.version:
            try:
                self._write(b"%0*d" % (DIGITS, version))
            except OSError as err:
                raise TransferError(f"version {version} could not be noted in {self._path}: {err}") from err
            self.version = version

    def _write(self, data: bytes) -> None:
        """In one call, and of one length: who is killed in it has written all of it or nothing.

        It is between staged and live, so no disk is waited for: a launch ends with its host.
        """
        if self._fd < 0 or not os.fstat(self._fd).st_nlink:  # what was cleaned away is read by nobody
            self.close()
            write_atomically(self._path, data, durable=False)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        elif (written := os.pwrite(self._fd, data, 0)) != len(data):
            raise OSError(f"{written} of {len(data)} bytes could be written")

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def forget(run_dir: Path) -> None:
    """A launch begins or ends: the number is of no use to another."""
    (run_dir / FILE_NAME).unlink(missing_ok=True)
