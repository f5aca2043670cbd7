"""The arena on a CPU: two memfds under one address range.

A memfd has no name, so nothing can leak, and a file descriptor is its only handle. A flip moves page tables
(mremap with MREMAP_DONTUNMAP), because a plain mmap over the range would drop them and pay for each page
again in the next forward: measured with 1.2 GB, 0.16 ms for moving against 30-110 ms for mapping anew, plus
65 ms of faults. The kernel moves a whole gigabyte's table at once where both ends are aligned to it, hence
``ALIGNMENT``; unused address space costs nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time

import torch

from bridge.errors import ConfigError
from vllm_patching import linux

ALIGNMENT = 1 << 30
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


def _check(address: int | None, what: str) -> int:
    if address is None or address == _MAP_FAILED:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return address


def _reserve(nbytes: int) -> int:
    """Reserve ``nbytes`` of address space at a multiple of ``ALIGNMENT``; nothing is committed."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    span = nbytes + ALIGNMENT
    start = _check(_libc.mmap(None, span, 0, flags, -1, 0), f"reserving {span} bytes of address space")
    aligned = -(-start // ALIGNMENT) * ALIGNMENT
    if aligned > start:
        _libc.munmap(start, aligned - start)
    tail = start + span - (aligned + nbytes)
    if tail:
        _libc.munmap(aligned + nbytes, tail)
    return aligned


def _map_over(address: int, nbytes: int, fd: int) -> None:
    flags = mmap.MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE
    _check(_libc.mmap(address, nbytes, _READ_WRITE, flags, fd, 0), f"mapping {nbytes} bytes of fd {fd}")


def bytes_at(address: int, nbytes: int) -> torch.Tensor:
    """A uint8 tensor over raw memory; the caller keeps the memory mapped."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def why_no_remap() -> str:
    """Why this kernel cannot move the page tables of shared memory, found by trying; "" if it can."""
    nbytes = mmap.PAGESIZE
    fd = linux.memfd_create("bridge-probe", linux.MFD_CLOEXEC)
    address = _MAP_FAILED
    try:
        os.ftruncate(fd, nbytes)
        address = _check(_libc.mmap(None, nbytes, _READ_WRITE, mmap.MAP_SHARED, fd, 0), "mapping a page")
        moved = _libc.mremap(address, nbytes, nbytes, _MREMAP_MAYMOVE | _MREMAP_DONTUNMAP, None)
        if moved == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            return f"Linux {os.uname().release} cannot move shared page tables (mremap: {reason})"
        _libc.munmap(moved, nbytes)
        return ""
    finally:
        if address != _MAP_FAILED:
            _libc.munmap(address, nbytes)
        os.close(fd)


class CpuArena:
    """Two memfds under one address range, for CPU workers. Owner: the worker process."""

    kind = "remap"

    def __init__(self, nbytes: int) -> None:
        """Allocate both halves of ``nbytes`` bytes; pages are committed when first written.

        Raises:
            OSError: the kernel refuses the mapping.
        """
        self.nbytes = nbytes
        self.active = 0
        self._span = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        self._fds = tuple(self._allocate(i) for i in range(2))
        self._live = _reserve(self._span)
        self._parked = (_reserve(self._span), _reserve(self._span))
        _map_over(self._live, self._span, self._fds[0])
        for address, fd in zip(self._parked, self._fds, strict=True):
            _map_over(address, self._span, fd)

    def _allocate(self, index: int) -> int:
        fd = linux.memfd_create(f"bridge-half{index}", linux.MFD_CLOEXEC | linux.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self._span)  # sparse: only what is written exists
        return fd

    def live(self, offset: int, nbytes: int) -> torch.Tensor:
        return bytes_at(self._live + offset, nbytes)

    def open_second_half(self) -> None:
        """Nothing: a memfd takes memory only as it is written."""

    def half(self, index: int) -> torch.Tensor:
        """Read or prefill one half; the active one is seen through the live range."""
        return bytes_at(self._live if index == self.active else self._parked[index], self.nbytes)

    def export(self) -> tuple[int, ...]:
        return self._fds

    def handles(self) -> tuple[str, ...]:
        """None: halves in host memory have descriptors."""
        return ()

    def quiesce(self) -> None:
        """Nothing: a CPU's forward has ended when its call returned."""

    def flip(self, to: int) -> None:
        """Put half ``to`` under the live range; no thread may be reading the range meanwhile.

        Raises:
            OSError: the kernel refused; the old half is still live.
        """
        if to == self.active:
            return
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
        span = self._span
        parked = _libc.mremap(self._live, span, span, flags, self._parked[self.active])
        _check(parked, f"moving {span} bytes of page tables aside")
        if _libc.mremap(self._parked[to], span, span, flags, self._live) == _MAP_FAILED:
            _map_over(self._live, span, self._fds[to])  # slower, and right
        self.active = to

    def warm(self) -> float:
        """Copy the active half over the other, then flip twice; returns seconds.

        Tensors that come from no checkpoint must be in both halves, and first touches are slow: both
        are paid here, once, rather than by the first update.
        """
        start = time.perf_counter()
        self.half(1 - self.active).copy_(self.half(self.active))
        for _ in range(2):
            self.flip(1 - self.active)
        return time.perf_counter() - start

    def close(self) -> None:
        """Unmap everything and drop the handles; no tensor over the arena may be used afterwards."""
        for address in (self._live, *self._parked):
            _libc.munmap(address, self._span)
        for fd in self._fds:
            os.close(fd)


class HostMemory:
    """One half of a ``FixedArena`` in host memory: a memfd, mapped once."""

    handle = ""

    def __init__(self, nbytes: int, which: str) -> None:
        """Map ``nbytes`` bytes; pages are committed when first written.

        Raises:
            OSError: the kernel refuses, which the message says of ``which`` half.
        """
        self._nbytes = max(1, nbytes)
        fd = linux.memfd_create("bridge-half", linux.MFD_CLOEXEC)
        self.fds = (fd,)
        os.ftruncate(fd, self._nbytes)
        result = _libc.mmap(None, self._nbytes, _READ_WRITE, mmap.MAP_SHARED, fd, 0)
        self._address = _check(result, f"mapping {nbytes} bytes for {which} of the weights")

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        return bytes_at(self._address + offset, nbytes)

    def copy_from(self, other: HostMemory) -> None:
        ctypes.memmove(self._address, other._address, self._nbytes)

    def quiesce(self) -> None:
        """Nothing: a CPU's forward has ended when its call returned."""

    def free(self) -> None:
        _libc.munmap(self._address, self._nbytes)
        for fd in self.fds:
            os.close(fd)


class CpuHalves:
    """Another process's halves, mapped for writing. Owner: an updater."""

    def __init__(self, fds: tuple[int, ...], nbytes: int) -> None:
        """Map the halves of ``nbytes`` bytes each, and close ``fds``.

        Raises:
            ConfigError: what came is not one or two halves of that size.
        """
        sizes = [os.fstat(fd).st_size for fd in fds]
        if len(fds) not in (1, 2) or min(sizes) < nbytes:
            raise ConfigError(f"expected one or two halves of {nbytes} bytes, received sizes {sizes}")
        self.nbytes = nbytes
        self.device = torch.device("cpu")
        self._maps = [mmap.mmap(fd, max(nbytes, 1)) for fd in fds]
        for fd in fds:
            os.close(fd)
        self.halves = tuple(
            torch.frombuffer(m, dtype=torch.uint8)[:nbytes] if nbytes else torch.empty(0, dtype=torch.uint8)
            for m in self._maps
        )

    def synchronize(self) -> None:
        """Nothing: a CPU's writes are there when the call returns."""
