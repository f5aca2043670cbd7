"""What stays on a host if a launch is killed with all that it had started: named in a file, for the next one.

Nobody is left to clean up then: Slurm kills a step whose srun has died like that, and so does whoever ends a
container or a control group. The next launch with the same log directory on the host does it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import write_atomically
from vllm_patching import residue
from vllm_patching.channel import is_kept

logger = logging.getLogger(__name__)


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    run_dir: str
    shared_memory: tuple[str, ...]  # names in /dev/shm


class Leftovers:
    """The file of one launch, in its log directory."""

    def __init__(self, logdir: Path, run_dir: Path) -> None:
        self._path = logdir / f"leftovers-{socket.gethostname()}.json"
        self._run_dir = run_dir
        self._noted: _Note | None = None

    def sweep(self) -> None:
        """Remove what an earlier launch here has left, unless it still lives."""
        try:
            note = msgspec.json.decode(self._path.read_bytes(), type=_Note)
        except FileNotFoundError:
            return  # it ended in order, or was never here
        except (OSError, *UNREADABLE) as err:
            logger.warning("what an earlier launch has left cannot be read from %s: %s", self._path, err)
            return
        run_dir = Path(note.run_dir)
        if run_dir != self._run_dir and is_kept(run_dir):
            logger.warning("another launch with this log directory lives, in %s", run_dir)
            return
        found = {residue.SHM_DIR / name for name in note.shared_memory if "/" not in name}
        for path in residue.sweep(found):
            logger.info("removed %s, left behind by an earlier launch that was killed", path)
        if run_dir != self._run_dir:
            residue.remove_run_dir(run_dir)

    def note(self, shared_memory: Iterable[Path]) -> None:
        """Write down what would stay now; only if that has changed."""
        names = tuple(sorted(path.name for path in shared_memory))
        note = _Note(run_dir=str(self._run_dir), shared_memory=names)
        if note == self._noted:
            return
        try:
            write_atomically(self._path, msgspec.json.encode(note))
        except OSError as err:
            logger.debug("%s cannot be written: %s; tried again when it has changed", self._path, err)
        self._noted = note

    def forget(self) -> None:
        """The launch has cleaned up behind itself."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as err:
            logger.warning("%s cannot be removed: %s", self._path, err.strerror)
