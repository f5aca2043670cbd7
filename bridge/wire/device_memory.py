"""Showing device memory to a process on the same host: which allocations, and where in them each shard lies.

The GPU's counterpart of ``peer_memory``: the trainer exports its allocations once (CUDA IPC), the updater
maps them and its copy engines read straight from the parameters. Every round says anew where the shards
are; an allocation is known by CUDA's buffer id, which no later allocation at the same address shares, so a
shard that moved is never read where it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec
import torch

from bridge.errors import DeviceError
from bridge.wire import cuda

_NONCE_BYTES = 32


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """One exported allocation: its identity in the owner, its size and its IPC handle (64 bytes)."""

    buffer_id: int
    nbytes: int
    handle: bytes


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where one shard's bytes start: an index into ``Exhibit.allocations``, an offset, and their dtype."""

    allocation: int
    offset: int
    dtype: str


class Exhibit(msgspec.Struct, frozen=True, kw_only=True):
    """All shards of one trainer rank in one round."""

    allocations: tuple[Allocation, ...]
    shards: tuple[Place, ...]


class DeviceWhereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer rank's GPU, and a nonce in its memory for others to probe."""

    uuid: str
    nonce: str
    allocation: Allocation


def can_be_shown(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be exported by IPC handle (expandable segments cannot)."""
    cu = cuda.driver()
    attribute = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
    return bool(cuda.check(cu.cuPointerGetAttribute(attribute, tensor.data_ptr()), "asking for IPC support"))


def _allocation_of(address: int) -> tuple[int, int, int]:
    """Buffer id, base address and size of the allocation that holds ``address``."""
    cu = cuda.driver()
    base, nbytes = cuda.check(cu.cuMemGetAddressRange(address), f"finding the allocation of {address:#x}")
    attribute = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID
    buffer_id = cuda.check(cu.cuPointerGetAttribute(attribute, address), "asking for the buffer id")
    return int(buffer_id), int(base), int(nbytes)


def _export(buffer_id: int, base: int, nbytes: int) -> Allocation:
    cu = cuda.driver()
    handle = cuda.check(cu.cuIpcGetMemHandle(base), f"exporting {nbytes} bytes of device memory")
    return Allocation(buffer_id=buffer_id, nbytes=nbytes, handle=bytes(handle.reserved))


def exhibit(tensors: Sequence[torch.Tensor]) -> Exhibit:
    """Say where ``tensors`` lie; all of them on the current device, and able to be shown.

    Raises:
        DeviceError: CUDA refused to export an allocation.
    """
    known: dict[int, tuple[int, int]] = {}  # buffer id -> index, base
    allocations: list[Allocation] = []
    ranges: list[tuple[int, int, int]] = []  # start, end, index: most shards share few allocations
    shards = []
    for tensor in tensors:
        address = tensor.data_ptr()
        found = next(((index, start) for start, end, index in ranges if start <= address < end), None)
        if found is None:
            buffer_id, base, nbytes = _allocation_of(address)
            if buffer_id not in known:
                known[buffer_id] = (len(allocations), base)
                allocations.append(_export(buffer_id, base, nbytes))
            found = known[buffer_id]
            ranges.append((base, base + nbytes, found[0]))
        dtype = str(tensor.dtype).removeprefix("torch.")
        shards.append(Place(allocation=found[0], offset=address - found[1], dtype=dtype))
    return Exhibit(allocations=tuple(allocations), shards=tuple(shards))


class PeerAllocations:
    """The allocations of one trainer rank, mapped into this process. Owner: an updater."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, bytes], int] = {}

    def refresh(self, shown: Exhibit) -> list[int]:
        """Map what is new, unmap what is gone; returns the address of each shard in this process.

        Raises:
            DeviceError: CUDA refused to map an allocation.
        """
        keys = [(allocation.buffer_id, allocation.handle) for allocation in shown.allocations]
        for key in self._mapped.keys() - set(keys):
            _unmap(self._mapped.pop(key))
        for key in keys:
            if key not in self._mapped:
                self._mapped[key] = _map(key[1])
        return [self._mapped[keys[place.allocation]] + place.offset for place in shown.shards]

    def close(self) -> None:
        """Unmap everything."""
        while self._mapped:
            _unmap(self._mapped.popitem()[1])


def _map(handle: bytes) -> int:
    cu = cuda.driver()
    opened = cu.CUipcMemHandle()
    opened.reserved = handle
    flags = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(cuda.check(cu.cuIpcOpenMemHandle(opened, int(flags)), "mapping the trainer's device memory"))


def _unmap(address: int) -> None:
    cuda.check(cuda.driver().cuIpcCloseMemHandle(address), "unmapping the trainer's device memory")


class DeviceNonce:
    """Random bytes in device memory, kept alive as long as someone may probe for them."""

    def __init__(self, device: torch.device) -> None:
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._device = device
        cuda.use(device)
        self._memory = cuda.OwnMemory(_NONCE_BYTES, device)
        self._memory.tensor.copy_(torch.frombuffer(bytearray(self._nonce), dtype=torch.uint8))
        torch.cuda.synchronize(device)

    def whereabouts(self) -> DeviceWhereabouts:
        """This rank's GPU, for the other side to probe."""
        shown = exhibit([self._memory.tensor])
        (allocation,) = shown.allocations
        return DeviceWhereabouts(
            uuid=cuda.uuid_of(self._device), nonce=self._nonce.hex(), allocation=allocation
        )


def can_pull(peer: DeviceWhereabouts, device: torch.device) -> str:
    """Try to read the peer's nonce into ``device``; returns "" if that works, else why not."""
    cuda.use(device)
    found = torch.empty(_NONCE_BYTES, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)
    try:
        address = _map(peer.allocation.handle)
        try:
            cuda.copy_rows(found.data_ptr(), 0, address, 0, width=_NONCE_BYTES, rows=1, stream=stream)
            stream.synchronize()
        finally:
            _unmap(address)
    except (DeviceError, RuntimeError) as err:
        return f"GPU {peer.uuid} cannot be read from {cuda.uuid_of(device)}: {err}"
    if found.cpu().numpy().tobytes().hex() != peer.nonce:
        return f"the memory mapped from GPU {peer.uuid} is not the trainer's"
    return ""
