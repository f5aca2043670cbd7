"""System calls that a Python may have been built without: conda's is, as its C library's headers are older.

Linux and the C library that runs have them: vLLM's own wheels need a newer one.
"""

from __future__ import annotations

import ctypes
import os

MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2  # of linux/memfd.h
_PIDFD_OPEN = 434  # on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def pidfd_open(pid: int) -> int:
    """``os.pidfd_open``: a descriptor that can be read once the process has ended.

    Raises:
        ProcessLookupError: it is gone.
        OSError: Linux is older than 5.3.
    """
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    return _checked(_libc.syscall(_PIDFD_OPEN, pid, 0))


def memfd_create(name: str, flags: int) -> int:
    """``os.memfd_create``: a file without a place, in memory.

    Raises:
        OSError: it cannot be had.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, flags)
    return _checked(_libc.memfd_create(name.encode(), flags))


def _checked(descriptor: int) -> int:
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor
