"""What tests and campaigns could leave behind on a host, and a corner of it where all of that is theirs."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_LISTENS = "0A"  # in /proc/net/tcp


class LeftBehind(AssertionError):
    """Something outlives whoever made it; ``left`` names it."""

    def __init__(self, behind: str, left: Iterable[str]) -> None:
        self.left = sorted(left)
        super().__init__(f"{behind}: left behind: {', '.join(self.left)}")


def move_apart() -> None:
    """Adopt orphans from here on and, where we may, have a /dev/shm of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Orphans of a killed launcher become our children instead of init's: they cannot hide from a check.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # What is left in a /dev/shm of our own was certainly left by us.
    if libc.unshare(_CLONE_NEWNS) == 0:
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777")


def offspring() -> dict[int, str]:
    """What lives below this process, by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline()) or process.name()
            # multiprocessing's own helpers live as long as the interpreter that they belong to.
            helper = any(f"multiprocessing.{name}" in command for name in ("resource_tracker", "forkserver"))
            if process.status() != psutil.STATUS_ZOMBIE and not helper:
                found[process.pid] = command
        except psutil.NoSuchProcess:
            continue
    return found


def files(runtime: Path, *shm_dirs: Path) -> set[str]:
    """Our names in these /dev/shm, nodes' run directories in ``runtime``, and the sockets in there."""
    found = {path for shm in shm_dirs if shm.is_dir() for path in shm.iterdir() if _is_ours(path)}
    found |= set(runtime.glob("node-*"))
    found |= {path for path in runtime.rglob("*") if path.is_socket()}
    return {str(path) for path in found}


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def listeners(pid: int) -> set[int]:
    """The TCP ports that a process listens on; none if it is gone."""
    held = set()
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                held.add(str(fd.readlink()))
        return {port for port, inode in _listening(pid) if f"socket:[{inode}]" in held}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def listening(pid: int | None = None) -> set[int]:
    """The TCP ports that anybody listens on in a process's network namespace, by default this one's."""
    return {port for port, _ in _listening(pid or os.getpid())}


def _listening(pid: int) -> list[tuple[int, str]]:
    """Port and inode of each listener in a process's network namespace."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [(int(line[1].rpartition(":")[2], 16), line[9]) for line in lines if line[3] == _LISTENS]
