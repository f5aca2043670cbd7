"""What stays on a host if a launch is killed with all that it had started: named in a file, for the next one.

Nobody is left to clean up then: Slurm kills a step whose srun has died like that, and so does whoever ends a
container or a control group. The next launch with the same log directory on the host does it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bridge.errors import ConfigError
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import write_atomically
from vllm_patching import residue
from vllm_patching.channel import is_kept

logger = logging.getLogger(__name__)


MAX_NAME_BYTES = 255  # of a file


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    run_dir: str
    shared_memory: tuple[str, ...]  # names in /dev/shm


def read_note(data: bytes) -> _Note:
    """What a launch has noted.

    Raises:
        ConfigError: it is damaged; what it names may be anybody's.
    """
    try:
        note = msgspec.json.decode(data, type=_Note)
    except UNREADABLE as err:
        raise ConfigError(f"it is no list of leftovers: {err}") from None
    if not Path(note.run_dir).is_absolute() or not _is_path(note.run_dir):
        raise ConfigError(f"the run directory {note.run_dir[:200]!r} is no absolute path")
    for name in note.shared_memory:
        if name in ("", ".", "..") or "/" in name or not _is_path(name):
            raise ConfigError(f"{name[:200]!r} names no file in {residue.SHM_DIR}")
    return note


def _is_path(text: str) -> bool:
    """Whether the kernel takes it; no part of a run directory's is longer than a name may be either."""
    try:
        parts = [os.fsencode(part) for part in text.split("/")]
    except UnicodeEncodeError:
        return False
    return "\0" not in text and all(len(part) <= MAX_NAME_BYTES for part in parts)


class Leftovers:
    """The file of one launch, in its log directory."""

    def __init__(self, logdir: Path, run_dir: Path) -> None:
        self._path = logdir / f"leftovers-{socket.gethostname()}.json"
        self._run_dir = run_dir
        self._noted: _Note | None = None

    def sweep(self) -> None:
        """Remove what an earlier launch here has left, unless it still lives; whatever is wrong, we start."""
        try:
            note = read_note(self._path.read_bytes())
        except FileNotFoundError:
            return  # it ended in order, or was never here
        except (OSError, ConfigError) as err:
            logger.warning("what an earlier launch has left cannot be read from %s: %s", self._path, err)
            self._set_aside()
            return
        try:
            self._remove(note)
        except OSError as err:
            logger.warning("what an earlier launch has left, named in %s, stays: %s", self._path, err)

    def _remove(self, note: _Note) -> None:
        run_dir = Path(note.run_dir)
        if run_dir != self._run_dir and is_kept(run_dir):
            logger.warning("another launch with this log directory lives, in %s", run_dir)
            return
        for path in residue.sweep({residue.SHM_DIR / name for name in note.shared_memory}):
            logger.info("removed %s, left behind by an earlier launch that was killed", path)
        if run_dir != self._run_dir:
            residue.remove_run_dir(run_dir)

    def _set_aside(self) -> None:
        """Keep a damaged file for whoever wants to know; this launch writes its own."""
        aside = self._path.with_suffix(".damaged")
        try:
            self._path.replace(aside)
            logger.warning("it is now %s; see for yourself what in %s is left over", aside, residue.SHM_DIR)
        except OSError as err:
            logger.warning("%s cannot be set aside: %s", self._path, err.strerror)

    def note(self, shared_memory: Iterable[Path]) -> None:
        """Write down what would stay now; only if that has changed."""
        # What lies deeper would be another file by its name alone.
        names = tuple(sorted(path.name for path in shared_memory if path.parent == residue.SHM_DIR))
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
