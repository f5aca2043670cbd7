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

from bridge.errors import DeviceError, ProtocolError
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import ITEMSIZE
from bridge.wire import cuda

_NONCE_BYTES = 32
MAX_EXHIBIT_BYTES = 64 << 20  # a shard takes some twenty bytes of it
_HANDLE_BYTES = 64


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
    """A trainer rank's GPU, its NCCL ("" without), and a nonce in its memory for others to probe."""

    uuid: str
    nccl: str = ""
    nonce: str
    allocation: Allocation


class Exports:
    """What this process has exported, by buffer id: a round of the same memory costs little."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Allocation | None]] = {}  # buffer id -> base, None if it cannot be
        self._round: dict[int, tuple[int, Allocation | None]] = {}  # address -> the same, until the exhibit

    def _of(self, address: int) -> tuple[int, Allocation | None]:
        """Base address and export of the allocation that holds ``address``."""
        if address in self._round:
            return self._round[address]
        cu = cuda.driver()
        attributes = cu.CUpointer_attribute
        identity = attributes.CU_POINTER_ATTRIBUTE_BUFFER_ID
        buffer_id = int(cuda.check(cu.cuPointerGetAttribute(identity, address), "asking for the buffer id"))
        if buffer_id not in self._known:
            base, nbytes = map(int, cuda.check(cu.cuMemGetAddressRange(address), f"finding {address:#x}"))
            capable = attributes.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
            allocation = None
            if cuda.check(cu.cuPointerGetAttribute(capable, address), "asking for IPC support"):
                handle = cuda.check(cu.cuIpcGetMemHandle(base), f"exporting {nbytes} bytes of device memory")
                allocation = Allocation(buffer_id=buffer_id, nbytes=nbytes, handle=bytes(handle.reserved))
            self._known[buffer_id] = base, allocation
        self._round[address] = self._known[buffer_id]
        return self._round[address]

    def can_show(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory can be exported by IPC handle (expandable segments cannot).

        Raises:
            DeviceError: CUDA does not know the memory.
        """
        return self._of(tensor.data_ptr())[1] is not None

    def still_stand(self) -> bool:
        """Whether every allocation of the last exhibit is still the one it was."""
        cu = cuda.driver()
        identity = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID
        for buffer_id, (base, allocation) in self._known.items():
            if allocation is not None:
                code, found = cu.cuPointerGetAttribute(identity, base)
                if int(code) != 0 or int(found) != buffer_id:  # an error: nothing is allocated there now
                    return False
        return True

    def exhibit(self, tensors: Sequence[torch.Tensor]) -> Exhibit:
        """Say where ``tensors`` lie; all of them on the current device, and able to be shown.

        Raises:
            DeviceError: CUDA refused to export an allocation.
        """
        indices: dict[int, int] = {}
        allocations: list[Allocation] = []
        shards = []
        for tensor in tensors:
            address = tensor.data_ptr()
            base, allocation = self._of(address)
            if allocation is None:
                raise DeviceError(f"the memory at {address:#x} cannot be exported by IPC handle")
            if allocation.buffer_id not in indices:
                indices[allocation.buffer_id] = len(allocations)
                allocations.append(allocation)
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = Place(allocation=indices[allocation.buffer_id], offset=address - base, dtype=dtype)
            shards.append(place)
        self._round.clear()  # by the next round an address may be another allocation's
        self._known = {key: value for key, value in self._known.items() if key in indices or not value[1]}
        return Exhibit(allocations=tuple(allocations), shards=tuple(shards))


class PeerAllocations:
    """The allocations of one trainer rank, mapped into this process. Owner: an updater."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, bytes], int] = {}
        self._message = b""
        self._places: tuple[list[int], list[torch.dtype]] = ([], [])

    def read(self, message: bytes) -> tuple[list[int], list[torch.dtype]]:
        """Address in this process and dtype of each shard, of an encoded ``Exhibit``.

        Raises:
            ProtocolError: that is no exhibit, or a place in it lies outside of what it shows.
            DeviceError: CUDA refused to map an allocation.
        """
        if message != self._message:  # the same message names the same allocations, which are still mapped
            shown = read_exhibit(message)
            self._message = b""  # until all of it is mapped
            self._places = self.refresh(shown), [getattr(torch, place.dtype) for place in shown.shards]
            self._message = message
        return self._places

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
                self._mapped[key] = open_handle(key[1])
        return [self._mapped[keys[place.allocation]] + place.offset for place in shown.shards]

    def close(self) -> None:
        """Unmap everything."""
        self._message = b""
        while self._mapped:
            _unmap(self._mapped.popitem()[1])


def read_exhibit(message: bytes) -> Exhibit:
    """Decode what a trainer rank says of its shards.

    Raises:
        ProtocolError: that is no exhibit, or a place in it lies outside of what it shows.
    """
    try:
        shown = msgspec.msgpack.decode(message, type=Exhibit)
    except UNREADABLE as err:
        raise ProtocolError(f"{len(message)} bytes that should say where shards are do not: {err}") from err
    for index, found in enumerate(shown.allocations):
        if len(found.handle) != _HANDLE_BYTES or found.nbytes < 0:
            raise ProtocolError(
                f"allocation {index} of {found.nbytes} bytes has an IPC handle of {len(found.handle)} bytes"
            )
    for index, place in enumerate(shown.shards):
        known = 0 <= place.allocation < len(shown.allocations) and place.dtype in ITEMSIZE
        if not known or not 0 <= place.offset <= shown.allocations[place.allocation].nbytes:
            raise ProtocolError(
                f"shard {index} is said to be {place.dtype!r} at byte {place.offset} of allocation "
                f"{place.allocation}; there are {len(shown.allocations)}"
            )
    return shown


def open_handle(handle: bytes) -> int:
    """Map another process's allocation by its IPC handle of 64 bytes; returns its address in this process.

    Raises:
        DeviceError: CUDA refused; the owner may be gone.
    """
    cu = cuda.driver()
    opened = cu.CUipcMemHandle()
    opened.reserved = handle
    flags = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(cuda.check(cu.cuIpcOpenMemHandle(opened, int(flags)), "mapping another process's memory"))


def _unmap(address: int) -> None:
    cuda.check(cuda.driver().cuIpcCloseMemHandle(address), "unmapping the trainer's device memory")


class DeviceNonce:
    """Random bytes in device memory, kept alive as long as someone may probe for them."""

    def __init__(self, device: torch.device) -> None:
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._device = device
        with torch.cuda.device(device):  # the user's thread: its own device is current again afterwards
            cuda.use(device)
            self._memory = cuda.OwnMemory(_NONCE_BYTES, device)
            self._memory.tensor.copy_(torch.frombuffer(bytearray(self._nonce), dtype=torch.uint8))
            torch.cuda.current_stream(device).synchronize()

    def whereabouts(self, *, nccl: str) -> DeviceWhereabouts:
        """This rank's GPU, for the other side to probe; ``nccl`` is its version of that."""
        with torch.cuda.device(self._device):
            cuda.use(self._device)
            shown = Exports().exhibit([self._memory.tensor])
        (allocation,) = shown.allocations
        return DeviceWhereabouts(
            uuid=cuda.uuid_of(self._device), nccl=nccl, nonce=self._nonce.hex(), allocation=allocation
        )

    def close(self) -> None:
        """Give the memory back; nobody can probe any more."""
        with torch.cuda.device(self._device):
            cuda.use(self._device)
            self._memory.free()


def can_pull(peer: DeviceWhereabouts, device: torch.device) -> str:
    """Try to read the peer's nonce into ``device``; returns "" if that works, else why not."""
    cuda.use(device)
    found = torch.empty(_NONCE_BYTES, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)
    try:
        address = open_handle(peer.allocation.handle)
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
