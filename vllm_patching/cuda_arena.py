"""The arena on a GPU: two halves of physical memory, one of them under the live address range.

A half is one allocation of CUDA's virtual memory management (cuMemCreate), as large as the model: mapping
takes time by the piece (16 GiB: 0.5 ms in one piece, 8.6 ms in 256). Its handle leaves the process as a
file descriptor. A flip unmaps one half and maps the other at the same addresses, so parameters, captured CUDA
graphs and compiled code never learn of it, and not a byte is copied.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from bridge.errors import ConfigError, DeviceError
from bridge.wire import cuda

NO_ROOM = (
    "use a larger --tensor-parallel-size, a smaller model, a GPU that nobody else uses, or, unless that is "
    "done already, serve --staging in-place, which holds the weights once and stands still for every transfer"
)


def _free() -> str:
    free, total = torch.cuda.mem_get_info()
    return f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"


class Physical:
    """How this process allocates, exports, imports and maps physical memory of one device."""

    def __init__(self, device: torch.device) -> None:
        cuda.use(device)
        self._cu = cu = cuda.driver()
        self._fd_type = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = cu.CUmemAllocationProp()
        self._properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device.index
        self._properties.requestedHandleTypes = self._fd_type
        self._access = cu.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        kind = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        size = cuda.check(cu.cuMemGetAllocationGranularity(self._properties, kind), "asking for page sizes")
        self.granularity = int(size)

    def span(self, nbytes: int) -> int:
        """``nbytes`` rounded up to whole pages."""
        return max(1, -(-nbytes // self.granularity)) * self.granularity

    def reserve(self, span: int) -> int:
        """Reserve addresses; nothing is allocated."""
        result = self._cu.cuMemAddressReserve(span, self.granularity, 0, 0)
        return int(cuda.check(result, f"reserving {span} bytes of device addresses"))

    def allocate(self, span: int) -> Any:
        """Allocate one half, or a piece of one; returns its handle."""
        torch.cuda.empty_cache()
        return cuda.check(
            self._cu.cuMemCreate(span, self._properties, 0),
            f"allocating {span / 2**30:.2f} GiB for the weights ({_free()}; {NO_ROOM})",
        )

    def export(self, handle: Any) -> int:
        """A file descriptor of a half."""
        result = self._cu.cuMemExportToShareableHandle(handle, self._fd_type, 0)
        return int(cuda.check(result, "exporting one half as a file descriptor"))

    def adopt(self, fd: int) -> Any:
        """The handle of another process's half; ``fd`` may be closed then."""
        return cuda.check(
            self._cu.cuMemImportFromShareableHandle(fd, self._fd_type), "importing one half of the weights"
        )

    def map(self, address: int, span: int, handle: Any) -> None:
        """Put physical memory under an address range."""
        cuda.check(self._cu.cuMemMap(address, span, 0, handle, 0), f"mapping {span} bytes of device memory")
        try:
            cuda.check(self._cu.cuMemSetAccess(address, span, [self._access], 1), "allowing access to a half")
        except DeviceError:
            self.unmap(address, span)
            raise

    def unmap(self, address: int, span: int) -> None:
        """Take the physical memory from under an address range."""
        cuda.check(self._cu.cuMemUnmap(address, span), f"unmapping {span} bytes of device memory")

    def release(self, handle: Any) -> None:
        """Drop a handle; the memory lives on while somebody maps it."""
        cuda.check(self._cu.cuMemRelease(handle), "releasing a half")


def why_no_remap(device: torch.device) -> str:
    """Why the memory under an address range cannot be exchanged on ``device``, found by trying; "" if it can.

    Raises:
        ConfigError: cuda-bindings is not installed.
        DeviceError: CUDA does not know the device.
    """
    cuda.use(device)
    cu = cuda.driver()
    ordinal = cuda.check(cu.cuDeviceGet(device.index), f"finding {device}")
    attributes = cu.CUdevice_attribute
    for attribute, what in (
        (attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
        (
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            "showing memory by file descriptor",
        ),
    ):
        if not int(cuda.check(cu.cuDeviceGetAttribute(attribute, ordinal), f"asking for {what}")):
            return f"{device} does not support {what}"
    try:  # a driver or container may refuse what the device could do
        physical = Physical(device)
        handle = physical.allocate(physical.granularity)
        try:
            os.close(physical.export(handle))
        finally:
            physical.release(handle)
    except DeviceError as err:
        return f"{device} refuses it: {err}"
    return ""


class CudaArena:
    """Two cuMemCreate allocations under one address range. Owner: the worker process."""

    kind = "remap"

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Allocate the first half on ``device``; the second follows when the originals are gone.

        Raises:
            DeviceError: the device has no such memory left, or cannot map memory this way.
        """
        self.nbytes = nbytes
        self.active = 0
        self._device = device
        self._physical = Physical(device)
        self._span = self._physical.span(nbytes)
        self._live = self._physical.reserve(self._span)
        self._parking = self._physical.reserve(self._span)
        self._parked: int | None = None
        self._handles = [self._physical.allocate(self._span)]
        self._physical.map(self._live, self._span, self._handles[0])
        self._fds: tuple[int, ...] = ()

    def live(self, offset: int, nbytes: int) -> torch.Tensor:
        return cuda.bytes_at(self._live + offset, nbytes, self._device)

    def open_second_half(self) -> None:
        """Allocate the other half; first, what the moved tensors left in torch's cache is given back.

        Raises:
            DeviceError: both halves do not fit; says what is free and what is needed.
        """
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        if free < self._span:
            raise DeviceError(
                f"the second half of the weights needs {self._span / 2**30:.2f} GiB on {self._device}, "
                f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free; {NO_ROOM}"
            )
        self._handles.append(self._physical.allocate(self._span))

    def half(self, index: int) -> torch.Tensor:
        """All of one half; the inactive one stays mapped for reading and prefilling until ``warm``."""
        if index == self.active:
            return self.live(0, self.nbytes)
        if self._parked is None:
            self._physical.map(self._parking, self._span, self._handles[index])
            self._parked = index
        assert self._parked == index, "the inactive half changed while it was mapped"
        return cuda.bytes_at(self._parking, self.nbytes, self._device)

    def _clear_parking(self) -> None:
        if self._parked is not None:
            torch.cuda.synchronize(self._device)
            self._physical.unmap(self._parking, self._span)
            self._parked = None

    def export(self) -> tuple[int, ...]:
        if not self._fds:
            self._fds = tuple(self._physical.export(handle) for handle in self._handles)
        return self._fds

    def handles(self) -> tuple[str, ...]:
        """None: these halves have descriptors."""
        return ()

    def quiesce(self) -> None:
        torch.cuda.synchronize(self._device)

    def flip(self, to: int) -> None:
        """Put half ``to`` under the live range, once no kernel reads it any more.

        Raises:
            DeviceError: CUDA refused; the old half is live again, or the device is lost.
        """
        if to == self.active:
            return
        torch.cuda.synchronize(self._device)
        self._physical.unmap(self._live, self._span)
        try:
            self._physical.map(self._live, self._span, self._handles[to])
        except DeviceError:
            self._physical.map(self._live, self._span, self._handles[self.active])
            raise
        self.active = to

    def warm(self) -> float:
        """Copy the active half over the other, then flip twice; returns seconds."""
        start = time.perf_counter()
        self.half(1 - self.active).copy_(self.half(self.active))
        self._clear_parking()
        for _ in range(2):
            self.flip(1 - self.active)
        return time.perf_counter() - start

    def close(self) -> None:
        """Unmap everything and drop the handles; no tensor over the arena may be used afterwards."""
        torch.cuda.synchronize(self._device)
        self._clear_parking()
        self._physical.unmap(self._live, self._span)
        for handle in self._handles:
            self._physical.release(handle)
        for fd in self._fds:
            os.close(fd)


class CudaHalves:
    """Another process's two halves, mapped for writing. Owner: an updater."""

    def __init__(self, fds: tuple[int, ...], nbytes: int, device: torch.device) -> None:
        """Map the halves of ``nbytes`` bytes each on ``device``, and close ``fds``.

        Raises:
            ConfigError: what came is not two descriptors.
            DeviceError: they are not halves of that size on this device.
        """
        if len(fds) != 2:
            raise ConfigError(f"expected the descriptors of two halves, received {len(fds)}")
        self.nbytes = nbytes
        self.device = device
        physical = Physical(device)
        span = physical.span(nbytes)
        halves = []
        for fd in fds:
            handle = physical.adopt(fd)
            os.close(fd)
            address = physical.reserve(span)
            physical.map(address, span, handle)
            physical.release(handle)  # the mapping keeps the memory
            halves.append(cuda.bytes_at(address, nbytes, device))
        self.halves = tuple(halves)

    def synchronize(self) -> None:
        """Wait until everything written to the halves is there.

        Raises:
            RuntimeError: a kernel or copy of this process has failed.
        """
        torch.cuda.synchronize(self.device)
