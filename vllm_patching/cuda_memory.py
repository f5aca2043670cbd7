"""The memory of a ``FixedArena`` on a GPU, and how an updater maps it.

``PiecedMemory`` is for ``--staging in-place``: it grows with the weights that move into it, so that a model
may load that does not fit twice. ``DeviceMemory`` is plain device memory, shown by CUDA IPC handle, for
systems on which CUDA's virtual memory management cannot export memory as a file descriptor.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from bridge.errors import ConfigError
from bridge.wire import cuda, device_memory
from vllm_patching.cuda_arena import NO_ROOM, Physical

MAX_PIECES = 32  # descriptors that travel in one message
_ADVICE = f"That is one half of the weights: {NO_ROOM}"


def _piece(physical: Physical, nbytes: int) -> int:
    """The size of every piece of ``nbytes`` but the last, which is the rest; the same on both sides."""
    return physical.span(-(-physical.span(nbytes) // MAX_PIECES))


class PiecedMemory:
    """One half that is mapped piece by piece, as far as it was asked for. Owner: the worker process."""

    handle = ""

    def __init__(self, nbytes: int, device: torch.device, which: str) -> None:  # noqa: ARG002 - NO_ROOM says it
        """Reserve addresses for ``nbytes`` bytes on ``device``; memory follows.

        Raises:
            DeviceError: CUDA refused.
        """
        self._device = device
        self._physical = Physical(device)
        self._span = self._physical.span(nbytes)
        self._piece = _piece(self._physical, nbytes)
        self._address = self._physical.reserve(self._span)
        self._sizes: list[int] = []
        self._handles: list[Any] = []
        self._fds: tuple[int, ...] = ()

    def _grow(self, end: int) -> None:
        """Map pieces until the first ``end`` bytes are there."""
        mapped = sum(self._sizes)
        while mapped < end:
            size = min(self._piece, self._span - mapped)
            torch.cuda.synchronize(self._device)  # what has moved here is freed by ``allocate``
            handle = self._physical.allocate(size)
            self._physical.map(self._address + mapped, size, handle)
            self._handles.append(handle)
            self._sizes.append(size)
            mapped += size

    @property
    def fds(self) -> tuple[int, ...]:
        if not self._fds:
            self._grow(self._span)
            self._fds = tuple(self._physical.export(handle) for handle in self._handles)
        return self._fds

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 view [nbytes].

        Raises:
            DeviceError: the memory for it does not fit.
        """
        self._grow(offset + nbytes)
        return cuda.bytes_at(self._address + offset, nbytes, self._device)

    def copy_from(self, other: PiecedMemory) -> None:
        self.bytes(0, self._span).copy_(other.bytes(0, self._span))
        torch.cuda.synchronize(self._device)

    def quiesce(self) -> None:
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        torch.cuda.synchronize(self._device)
        start = self._address
        for size, handle in zip(self._sizes, self._handles, strict=True):
            self._physical.unmap(start, size)
            self._physical.release(handle)
            start += size
        for fd in self._fds:
            os.close(fd)


class PiecedHalves:
    """Another process's one half, mapped for writing piece by piece. Owner: an updater."""

    def __init__(self, fds: tuple[int, ...], nbytes: int, device: torch.device) -> None:
        """Map the pieces of a half of ``nbytes`` bytes on ``device``, and close ``fds``.

        Raises:
            ConfigError: what came are not the descriptors of such a half.
            DeviceError: CUDA refused to map one.
        """
        self.nbytes = nbytes
        self.device = device
        physical = Physical(device)
        span, piece = physical.span(nbytes), _piece(physical, nbytes)
        if len(fds) != -(-span // piece):
            raise ConfigError(f"expected {-(-span // piece)} pieces of the weights, received {len(fds)}")
        address = physical.reserve(span)
        for index, fd in enumerate(fds):
            handle = physical.adopt(fd)
            os.close(fd)
            physical.map(address + index * piece, min(piece, span - index * piece), handle)
            physical.release(handle)  # the mapping keeps the memory
        self.halves: tuple[torch.Tensor, ...] = (cuda.bytes_at(address, nbytes, device),)

    def synchronize(self) -> None:
        """Wait until everything written to the half is there.

        Raises:
            RuntimeError: a kernel or copy of this process has failed.
        """
        torch.cuda.synchronize(self.device)


class DeviceMemory:
    """One half of a ``FixedArena`` on a GPU. Owner: the worker process."""

    fds: tuple[int, ...] = ()

    def __init__(self, nbytes: int, device: torch.device, which: str) -> None:
        """Allocate ``nbytes`` bytes on ``device``.

        Raises:
            DeviceError: they do not fit, or cannot be exported; says of ``which`` half.
        """
        self._device = device
        cuda.use(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what moved into the arena left its room in torch's cache
        self._memory = cuda.OwnMemory(max(1, nbytes), device, advice=_ADVICE)
        cu = cuda.driver()
        handle = cuda.check(cu.cuIpcGetMemHandle(self._memory.address), f"exporting {which} of the weights")
        self.handle = bytes(handle.reserved).hex()

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        return cuda.bytes_at(self._memory.address + offset, nbytes, self._device)

    def copy_from(self, other: DeviceMemory) -> None:
        """One copy on the current stream, so after all that this stream was given to read.

        Waited for: on return the daemon may let the other half be written again.

        Raises:
            RuntimeError: the device is lost.
        """
        self._memory.tensor.copy_(other._memory.tensor)
        torch.cuda.synchronize(self._device)

    def quiesce(self) -> None:
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        torch.cuda.synchronize(self._device)
        self._memory.free()


class ShownHalves:
    """Another process's halves, mapped for writing by IPC handle. Owner: an updater."""

    def __init__(self, handles: tuple[str, ...], nbytes: int, device: torch.device) -> None:
        """Map the halves of ``nbytes`` bytes each on ``device``; they stay mapped until this process ends.

        Raises:
            ConfigError: what came is not one or two handles.
            DeviceError: CUDA refused to map one.
        """
        if len(handles) not in (1, 2):
            raise ConfigError(f"expected the handles of one or two halves, received {len(handles)}")
        self.nbytes = nbytes
        self.device = device
        cuda.use(device)
        addresses = [device_memory.open_handle(bytes.fromhex(handle)) for handle in handles]
        self.halves: tuple[torch.Tensor, ...] = tuple(
            cuda.bytes_at(address, nbytes, device) for address in addresses
        )

    def synchronize(self) -> None:
        """Wait until everything written to the halves is there.

        Raises:
            RuntimeError: a kernel or copy of this process has failed.
        """
        torch.cuda.synchronize(self.device)
