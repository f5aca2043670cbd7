"""Pull between GPUs of one host: the updater's copy engines read the trainer's memory; nobody packs or sends.

The trainer shows its parameters where they lie. Only what cannot be read there (float32 master weights that
the server wants in bfloat16, memory of expandable segments, shards offloaded to the host) is first written to
a snapshot in memory of our own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch

from bridge.errors import ProtocolError
from bridge.protocol.plan import Bucket, Copy, Lane
from bridge.wire import cuda, device_memory
from bridge.wire.copy_jobs import LaneSteps, Step
from bridge.wire.device_checksum import DeviceChecksums
from bridge.wire.transport import (
    ADDRESS_TAG,
    DataLink,
    Landing,
    compare_digests,
    pick,
    send_digests,
)
from bridge.wire.turns import Turns

logger = logging.getLogger(__name__)

_Geometry = tuple[int, torch.dtype, torch.device, torch.dtype]

SIZE_TAG = 10
_SLOT_ALIGNMENT = 256  # bytes, as torch's own allocator aligns
# The updater's kernels take turns with the forward's on the whole GPU, and each turn costs the forward some
# milliseconds whatever its length: so there are few.
SUM_BATCH_BYTES = 2 << 30
COPY_STREAMS = 8
KEPT_DIGESTS = 64


class SummedRounds:
    """In which rounds both ends sum device memory: they decide alike, each on its own.

    ``first`` is once for each plan of an epoch, so that wrong places and addresses show at once; later rounds
    walk the same ones, and single bits are guarded by the hardware (ECC, and CRC on the link). ``always``
    costs more: a kernel of the updater holds the forward up by four to five milliseconds, as two processes
    take turns on a GPU.
    """

    def __init__(self, mode: str) -> None:
        """``mode`` is first, always or off."""
        self._mode = mode
        self._plans: dict[bytes, None] = {}  # in the order they came; patches make one in each round

    def includes(self, plan_digest: bytes) -> bool:
        """Whether the round that begins now, under this plan, is summed."""
        first = plan_digest not in self._plans
        self._plans[plan_digest] = None
        if len(self._plans) > KEPT_DIGESTS:  # at both ends alike, as both see the same rounds
            del self._plans[next(iter(self._plans))]
        return self._mode == "always" or (self._mode == "first" and first)


# --- the trainer's end ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One round's shards where updaters read them, and the message that says so."""

    tensors: list[torch.Tensor]
    message: bytes


class Showcase:
    """Decides per shard whether it is read in place or from a snapshot; owns the snapshot's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory: cuda.OwnMemory | None = None
        self._exports = device_memory.Exports()
        self._said = ""
        self._in_place: list[_Geometry] = []
        self._message = b""

    def prepare(self, tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> Shown:
        """Make every shard readable; ``dtypes[i]`` is the one in which shard ``i`` is wanted.

        The caller has waited for the work that computes the shards.

        Raises:
            DeviceError: the snapshot does not fit, or CUDA refuses to export an allocation.
        """
        here = [(t.data_ptr(), t.dtype, t.device, d) for t, d in zip(tensors, dtypes, strict=True)]
        if here == self._in_place and self._exports.still_stand():
            return Shown(list(tensors), self._message)
        reasons = [self._why_not_here(t, dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        slots = self._slots([t for t, why in zip(tensors, reasons, strict=True) if why], dtypes, reasons)
        shown: list[torch.Tensor] = []
        with torch.cuda.stream(self.stream), torch.no_grad():
            for tensor, dtype, why in zip(tensors, dtypes, reasons, strict=True):
                if not why:
                    shown.append(tensor)
                    continue
                slot = next(slots).view(dtype).view(tensor.shape)
                slot.copy_(tensor)
                shown.append(slot)
        self.stream.synchronize()
        self._say(tensors, reasons)
        self._message = msgspec.msgpack.encode(self._exports.exhibit(shown))
        self._in_place = [] if any(reasons) else here  # a snapshot is written anew in every round
        return Shown(shown, self._message)

    def _why_not_here(self, tensor: torch.Tensor, dtype: torch.dtype) -> str:
        if tensor.device != self.device:
            return f"on {tensor.device}"
        if tensor.dtype != dtype:
            return f"{tensor.dtype} and wanted as {dtype}".replace("torch.", "")
        return "" if self._exports.can_show(tensor) else "in memory that CUDA IPC cannot export"

    def _slots(
        self, moved: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], reasons: Sequence[str]
    ) -> Iterator[torch.Tensor]:
        wanted = [dtype for dtype, why in zip(dtypes, reasons, strict=True) if why]
        sizes = [t.numel() * dtype.itemsize for t, dtype in zip(moved, wanted, strict=True)]
        ends = list(itertools.accumulate(-(-n // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT for n in sizes))
        total = ends[-1] if ends else 0
        if total and (self._memory is None or self._memory.nbytes < total):
            if self._memory is not None:
                self._memory.free()
                self._memory = None
            self._memory = cuda.OwnMemory(total, self.device)
        for start, size in zip([0, *ends], sizes, strict=False):
            assert self._memory is not None
            yield self._memory.tensor[start : start + size]

    def close(self) -> None:
        """Give the snapshot's memory back; no updater may be reading any more."""
        if self._memory is not None:
            with torch.cuda.device(self.device):
                cuda.use(self.device)
                self._memory.free()
            self._memory = None

    def _say(self, tensors: Sequence[torch.Tensor], reasons: Sequence[str]) -> None:
        moved = [(t, why) for t, why in zip(tensors, reasons, strict=True) if why]
        kinds = ", ".join(sorted({why for _, why in moved}))
        if moved and kinds != self._said:
            assert self._memory is not None
            logger.info(
                "%d of %d shards are read from a snapshot of %.0f MiB on %s: %s",
                len(moved),
                len(tensors),
                self._memory.nbytes / 2**20,
                self.device,
                kinds,
            )
            self._said = kinds


class DevicePullSource:
    """Says where its shards are; only summing them costs the trainer's GPU anything."""

    def __init__(
        self, link: DataLink, shown: Shown, lane: Lane, showcase: Showcase, *, checked: bool
    ) -> None:
        self._link = link
        self._shown = shown
        self._sums = DeviceChecksums(len(lane.buckets), showcase.device, showcase.stream) if checked else None

    def open(self) -> None:
        data = torch.frombuffer(bytearray(self._shown.message), dtype=torch.uint8)
        self._link.send(torch.tensor([data.numel()]), SIZE_TAG, "the size of the shards' places")
        self._link.send(data, ADDRESS_TAG, "the shards' places")

    def move(self, bucket: Bucket) -> None:
        if self._sums is not None:
            for copy in bucket.copies:
                self._sums.add(bucket.index, pick(self._shown.tensors[copy.shard], copy))

    def close(self) -> None:
        if self._sums is not None:
            send_digests(self._link, self._sums.digests())


# --- the updater's end ---------------------------------------------------------------------------------


class Engines:
    """An updater's streams: for copies, and one on which sums follow them bucket by bucket."""

    def __init__(self, device: torch.device) -> None:
        cuda.use(device)
        self.device = device
        self._copies = tuple(torch.cuda.Stream(device) for _ in range(COPY_STREAMS))  # type: ignore[no-untyped-call]
        self.sums = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def share(self, lane: int, lanes: int) -> tuple[torch.cuda.Stream, ...]:
        """The streams of one lane of several: of its own, so that all trainers are read at once.

        A single lane gets two that take turns, so that the gap after one copy is filled by the other.
        """
        return self._copies[:2] if lanes == 1 else (self._copies[lane % COPY_STREAMS],)


class DevicePullSink:
    """Reads slices from the trainer's GPU into their final place by copy engine, strided where they are."""

    def __init__(
        self,
        link: DataLink,
        lane: Lane,
        peer: device_memory.PeerAllocations,
        steps: LaneSteps,
        engines: Engines,
        streams: Sequence[torch.cuda.Stream],
        *,
        checked: bool,
        turns: Turns | None = None,
    ) -> None:
        """``streams`` are the lane's share of ``engines``; copies take turns on them.

        ``turns`` are taken where the trainer's memory is on the updater's own GPU.
        """
        self._link = link
        self._peer = peer
        self._steps = steps
        self._engines = engines
        self._streams = streams
        self._next_stream = itertools.cycle(streams)
        self._turns = turns
        self._sums = DeviceChecksums(len(lane.buckets), engines.device, engines.sums) if checked else None
        self._most_shards = max((1 + copy.shard for b in lane.buckets for copy in b.copies), default=0)
        self._addresses: list[int] = []
        self._dtypes: list[torch.dtype] = []
        self._unsummed: list[tuple[int, torch.Tensor]] = []
        self._unsummed_bytes = 0

    def open(self) -> None:
        size = self._link.receive(torch.empty(1, dtype=torch.int64), SIZE_TAG, "the shards' places")
        if not 0 <= int(size) <= device_memory.MAX_EXHIBIT_BYTES:
            raise ProtocolError(
                f"{self._link.who} says that its shards' places take {int(size)} bytes, "
                f"{device_memory.MAX_EXHIBIT_BYTES} at most are taken"
            )
        data = torch.empty(int(size), dtype=torch.uint8)
        message = self._link.receive(data, ADDRESS_TAG, "the shards' places").numpy().tobytes()
        self._addresses, self._dtypes = self._peer.read(message)
        if (missing := self._most_shards - len(self._addresses)) > 0:
            raise ProtocolError(f"{self._link.who} did not say where the last {missing} shards of its are")
        self._steps.use(self._dtypes)

    def move(self, bucket: Bucket, landing: Landing) -> None:
        for step in self._steps.of(bucket):
            copy = step.copy
            arrived = None if step.jobs else self._fetch(copy, _place(landing, copy))
            if arrived is None:
                self._pull(step, landing.address(copy.target))
            landing.landed(copy.target, step.numel)
            if self._sums is not None:
                arrived = _place(landing, copy) if arrived is None else arrived
                self._unsummed.append((bucket.index, arrived))
                self._unsummed_bytes += arrived.nbytes
        if self._unsummed_bytes >= SUM_BATCH_BYTES:
            self._sum()

    def _sum(self) -> None:
        assert self._sums is not None
        for stream in self._streams:
            self._engines.sums.wait_stream(stream)
        for bucket, tensor in self._unsummed:
            tensor.record_stream(self._engines.sums)
            self._sums.add(bucket, tensor)
        self._unsummed, self._unsummed_bytes = [], 0

    def _pull(self, step: Step, target: int) -> None:
        """Enqueue one copy's jobs; ``target`` is the address of its target."""
        shard, stream = self._addresses[step.copy.shard], next(self._next_stream)
        for job in step.jobs:
            if self._turns is not None:
                self._turns.take(job.rows * job.width)
            cuda.copy_rows(
                target + job.dst,
                job.dst_pitch,
                shard + job.src,
                job.src_pitch,
                width=job.width,
                rows=job.rows,
                stream=stream,
            )

    def _fetch(self, copy: Copy, place: torch.Tensor) -> torch.Tensor:
        """Copy the span that the elements lie in, pick and cast them here; returns them as they came."""
        dtype = self._dtypes[copy.shard]
        address = self._addresses[copy.shard] + copy.src_offset * dtype.itemsize
        span = 1 + sum((n - 1) * s for n, s in zip(copy.size, copy.src_stride, strict=True))
        stream = next(self._next_stream)
        with torch.cuda.stream(stream):
            scratch = torch.empty(span, dtype=dtype, device=self._engines.device)
            nbytes = span * dtype.itemsize
            if self._turns is not None:
                self._turns.take(nbytes)
            cuda.copy_rows(scratch.data_ptr(), 0, address, 0, width=nbytes, rows=1, stream=stream)
            picked = scratch.as_strided(copy.size, copy.src_stride)
            place.copy_(picked)
        return picked

    def close(self) -> None:
        """Wait for the last byte, then compare: nothing is written to the half after this.

        Raises:
            ChecksumMismatch: what arrived is not what the trainer holds.
        """
        if self._unsummed:
            self._sum()
        for stream in self._streams:
            stream.synchronize()
        if self._sums is not None:
            compare_digests(self._link, self._sums.digests())


def _place(landing: Landing, copy: Copy) -> torch.Tensor:
    return landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
