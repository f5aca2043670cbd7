"""Pulling from another process's memory on the same host: one copy, made by the kernel.

The CPU's counterpart of a GPU's copy engine. The puller reads straight from the trainer's tensors into
the inactive half (process_vm_readv(2)): the trainer packs nothing, sends nothing and needs no memory. Linux
allows it between processes of one user, unless a security module or a container forbids it; whether it
works is tried with a nonce when two ranks meet, never guessed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from bridge.errors import PeerLost
from bridge.wire.device_memory import DeviceWhereabouts
from bridge.wire.rendezvous import boot_id

_IOV_MAX = 1024
_PR_SET_PTRACER = 0x59616D61
_readers: set[int] = set()
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
]

Run = tuple[int, int, int]
"""Remote address, local address, bytes."""


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process's memory can be found, and a nonce at a known address to prove it.

    ``on_gpu`` says that the rank's weights are on a GPU, and ``gpu`` how its memory can be mapped, if it can.
    """

    boot_id: str
    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    host: str
    nonce_address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    nonce: str
    on_gpu: bool = False
    gpu: DeviceWhereabouts | None = None


class Nonce:
    """Random bytes at a fixed address, kept alive as long as someone may probe for them."""

    def __init__(self) -> None:
        self._bytes = secrets.token_bytes(32)
        self._buffer = ctypes.create_string_buffer(self._bytes, 32)

    def whereabouts(self, host: str, *, on_gpu: bool, gpu: DeviceWhereabouts | None) -> Whereabouts:
        """This process, for the other side to probe."""
        return Whereabouts(
            boot_id=boot_id(),
            pid=os.getpid(),
            host=host,
            nonce_address=ctypes.addressof(self._buffer),
            nonce=self._bytes.hex(),
            on_gpu=on_gpu,
            gpu=gpu,
        )


def allow_reader(pid: int) -> None:
    """Let ``pid`` and its children read this process where Yama would refuse (ptrace_scope 1).

    Yama keeps one name only: for the daemons of several servers, every process of this user is let.
    """
    if not (_YAMA.exists() and _YAMA.read_text().strip() == "1"):
        return
    _readers.add(pid)
    _readers.intersection_update([reader for reader in _readers if _exists(reader)])
    allowed = ctypes.c_ulong(-1) if len(_readers) > 1 else ctypes.c_ulong(pid)  # -1: PR_SET_PTRACER_ANY
    _libc.prctl(_PR_SET_PTRACER, allowed, 0, 0, 0)


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def can_pull(peer: Whereabouts) -> str:
    """Try to read the peer's nonce; returns "" if that works, else why not."""
    if peer.boot_id != boot_id():
        return f"{peer.host} is another host"
    buffer = ctypes.create_string_buffer(32)
    try:
        pull(peer.pid, [(peer.nonce_address, ctypes.addressof(buffer), 32)], who=f"pid {peer.pid}")
    except PeerLost as err:
        return str(err)
    if buffer.raw.hex() != peer.nonce:
        return f"pid {peer.pid} is another process here (separate pid namespaces)"
    return ""


def pull(pid: int, runs: Sequence[Run], *, who: str) -> None:
    """Read ``runs`` from process ``pid``.

    Raises:
        PeerLost: the process is gone, or the kernel refuses (with its reason).
    """
    for start in range(0, len(runs), _IOV_MAX):
        _pull_batch(pid, runs[start : start + _IOV_MAX], who)


def _pull_batch(pid: int, runs: Sequence[Run], who: str) -> None:
    count = len(runs)
    # ctypes makes structures of tuples, which typeshed does not know.
    remote = (_IoVec * count)(*((r[0], r[2]) for r in runs))  # type: ignore[misc]
    local = (_IoVec * count)(*((r[1], r[2]) for r in runs))  # type: ignore[misc]
    wanted = sum(r[2] for r in runs)
    got = _libc.process_vm_readv(pid, local, count, remote, count, 0)
    if got == wanted:
        return
    if got <= 0:
        errno = ctypes.get_errno()
        raise PeerLost(f"cannot read the memory of {who}: {os.strerror(errno)} (process_vm_readv)")
    # The kernel stops at 2 GiB a call, or where the peer unmapped memory: go on run by run from there.
    rest = []
    for remote_address, local_address, nbytes in runs:
        done = min(got, nbytes)
        got -= done
        if done < nbytes:
            rest.append((remote_address + done, local_address + done, nbytes - done))
    _pull_batch(pid, rest, who)
