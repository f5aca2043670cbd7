"""The highest version number ever asked for in a run directory: it outlives vLLM and the daemon.

A vLLM that was started again serves the checkpoint, which is version 0, and knows nothing of what was served
before it. No number may stand for two versions, so the daemon counts on from this one.
"""

from __future__ import annotations

import re
from pathlib import Path

from bridge.errors import ConfigError, TransferError
from bridge.protocol.mapping import write_atomically
from bridge.protocol.messages import MAX_VERSION

FILE_NAME = "newest-version"


class Newest:
    """The number, kept in a file of the run directory; that of a launch, which removes an earlier one's."""

    def __init__(self, run_dir: Path) -> None:
        """Read what an earlier daemon of the same launch has left.

        Raises:
            ConfigError: the file is damaged.
        """
        self._path = run_dir / FILE_NAME
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b"0"
        self.version = int(data) if re.fullmatch(b"[0-9]{1,19}", data) else MAX_VERSION + 1
        if self.version > MAX_VERSION:
            raise ConfigError(f"{self._path} holds {data[:32]!r}, which is no version; end the launcher")

    def raise_to(self, version: int) -> None:
        """``version`` is about to be asked for.

        Raises:
            TransferError: it could not be written down.
        """
        if version > self.version:
            try:
                write_atomically(self._path, str(version).encode())
            except OSError as err:
                raise TransferError(f"version {version} could not be noted in {self._path}: {err}") from err
            self.version = version


def forget(run_dir: Path) -> None:
    """A launch begins or ends: the number is of no use to another."""
    (run_dir / FILE_NAME).unlink(missing_ok=True)
