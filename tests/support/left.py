"""What tests and campaigns could leave behind on a host, and a corner of it where all of that is theirs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
# In /proc/net/tcp they are numbered from 1 on.
_STATES = (
    "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV",
)  # fmt: skip


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


def descriptors(pid: int) -> dict[int, str]:
    """What each of a process's descriptors is open on, as the kernel names it."""
    held = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held[int(fd.name)] = str(fd.readlink())
    return held


def named(pid: int, held: dict[int, str]) -> list[str]:
    """These descriptors of a process; its TCP sockets with both addresses and the state that they are in."""
    sockets = {f"socket:[{inode}]": (local, remote, state) for local, remote, state, inode in _sockets(pid)}
    found = []
    for fd, what in sorted(held.items()):
        local, remote, state = sockets.get(what, ("", "", ""))
        found.append(f"{fd} {what}" + (f" TCP {local} to {remote} {state}" if state else ""))
    return found


def listeners(pid: int) -> set[int]:
    """The TCP ports that a process listens on; none if it is gone."""
    try:
        held = set(descriptors(pid).values())
        return {port for port, inode in _listening(pid) if f"socket:[{inode}]" in held}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def listening(pid: int) -> set[int]:
    """The TCP ports that anybody listens on in a process's network namespace."""
    return {port for port, _ in _listening(pid)}


def _listening(pid: int) -> list[tuple[int, str]]:
    """Port and inode of each listener in a process's network namespace."""
    return [
        (int(local.rpartition(":")[2]), inode)
        for local, _, state, inode in _sockets(pid)
        if state == "LISTEN"
    ]


def _sockets(pid: int) -> list[tuple[str, str, str, str]]:
    """Local and remote address, state and inode of each TCP socket in a process's network namespace."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [(_address(line[1]), _address(line[2]), _STATES[int(line[3], 16) - 1], line[9]) for line in lines]


def _address(text: str) -> str:
    """From hexadecimal; IPv4 addresses are one word there and IPv6 ones four, each in the host's order."""
    host, _, port = text.partition(":")
    words = [int(host[start : start + 8], 16) for start in range(0, len(host), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
    return f"{address}:{int(port, 16)}"
