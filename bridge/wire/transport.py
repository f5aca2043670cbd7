"""Moving bucket ``i`` of one lane: the small interface behind which every transport stands.

A lane joins one trainer rank (the ``Source``) to one inference rank (the ``Sink``). Both walk the same
buckets in the same order. The transports:

========  ==========================================================================================
pull      one host: the sink reads slices straight from the trainer's memory into their final place
pull-gpu  the same between GPUs, by their copy engines (``device_transport``)
nccl      the same GPUs on two hosts (``nccl_transport``)
gloo      anywhere: the source packs the slices the sink needs (cast to the target's dtype) and sends
========  ==========================================================================================

After the last bucket the source sends one checksum per bucket, over the bytes as they travel, and the sink
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from bridge.errors import ChecksumMismatch, PeerLost
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.plan import Bucket, Copy, Lane, Layout
from bridge.wire import peer_memory
from bridge.wire.checksum import Checksum, as_bytes, checksum_of
from bridge.wire.rendezvous import Group, first_line

PULL, GPU_PULL, NCCL, GLOO = "pull", "pull-gpu", "nccl", "gloo"
ADDRESS_TAG, DIGEST_TAG, BUCKET_TAG = 11, 12, 100
SLOWEST_BYTES_PER_S = 50e6  # a transfer slower than this is taken for dead
DIRECT_RUN_BYTES = 512  # shorter runs cost more as iovecs than reading the span and picking from it


class Landing(Protocol):
    """Where a sink puts elements: one inference rank's staging area."""

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:
        """The elements of one copy in their final place."""

    def address(self, target: int) -> int:
        """Where the first byte of ``target`` is."""

    def landed(self, target: int, count: int) -> None:
        """``count`` elements of ``target`` have been written."""


class DataLink:
    """One end of a lane on the data group, with the deadline of every wait on it."""

    def __init__(self, group: Group, peer: int, *, who: str, timeout_s: float) -> None:
        self._group = group
        self._peer = peer
        self.who = who
        self.timeout_s = timeout_s
        self._timeout = timedelta(seconds=timeout_s)

    def post_send(self, tensor: torch.Tensor, tag: int) -> dist.Work:
        """Start sending; the tensor must stay untouched until ``finish``.

        Raises:
            PeerLost: the peer is known to be gone.
        """
        return self._post(self._group.send, tensor, tag, "was sent")

    def post_receive(self, tensor: torch.Tensor, tag: int) -> dist.Work:
        """Start receiving into ``tensor``.

        Raises:
            PeerLost: the peer is known to be gone.
        """
        return self._post(self._group.recv, tensor, tag, "could come")

    def _post(self, post: Callable[..., dist.Work], tensor: torch.Tensor, tag: int, what: str) -> dist.Work:
        try:
            return post([tensor], self._peer, tag)
        except RuntimeError as err:
            raise PeerLost(f"lost {self.who} before more {what}: {first_line(err)}") from err

    def finish(self, work: dist.Work, what: str) -> None:
        """Wait for a posted transfer.

        Raises:
            PeerLost: the peer is gone, or nothing came within the deadline.
        """
        try:
            work.wait(self._timeout)
        except RuntimeError as err:
            raise PeerLost(
                f"lost {self.who} while moving {what} (waited up to {self._timeout.total_seconds():g} s): "
                f"{first_line(err)}"
            ) from err

    def send(self, tensor: torch.Tensor, tag: int, what: str) -> None:
        """Send and wait."""
        self.finish(self.post_send(tensor, tag), what)

    def receive(self, tensor: torch.Tensor, tag: int, what: str) -> torch.Tensor:
        """Receive and wait; returns ``tensor``."""
        self.finish(self.post_receive(tensor, tag), what)
        return tensor


def pick(tensor: torch.Tensor, copy: Copy) -> torch.Tensor:
    """The source view of one copy in a trainer's local shard."""
    return tensor.as_strided(copy.size, copy.src_stride, tensor.storage_offset() + copy.src_offset)


# --- sources: the trainer's end ----------------------------------------------------------------------


class Source(Protocol):
    """The trainer's end of one lane."""

    def open(self) -> None:
        """Before the first bucket of a round."""

    def move(self, bucket: Bucket) -> None:
        """Let one bucket travel."""

    def close(self) -> None:
        """After the last bucket: flush, and send a digest of 16 bytes for each."""


class PullSource:
    """Says where its shards are; only hashing costs the trainer anything."""

    def __init__(self, link: DataLink, tensors: Sequence[torch.Tensor]) -> None:
        self._link = link
        self._tensors = tensors
        self._digests: list[bytes] = []

    def open(self) -> None:
        addresses = torch.tensor([t.data_ptr() for t in self._tensors], dtype=torch.int64)
        self._link.send(addresses, ADDRESS_TAG, "shard addresses")

    def move(self, bucket: Bucket) -> None:
        checksum = Checksum()
        for copy in bucket.copies:
            checksum.update(pick(self._tensors[copy.shard], copy))
        self._digests.append(checksum.digest())

    def close(self) -> None:
        send_digests(self._link, self._digests)


class SendBuffers:
    """Two buffers for all the lanes of a trainer rank: one is packed while the other travels.

    Kept from round to round: touching fresh pages costs more than sending them (measured: 64 MiB buffers made
    anew for each bucket brought Gloo to 0.28 of its bare speed).
    """

    def __init__(self) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._pending: list[tuple[DataLink, dist.Work] | None] = [None, None]
        self._next = 0

    def reserve(self, nbytes: int) -> torch.Tensor:
        """A buffer uint8 [nbytes], once what it held has been sent; ``post`` comes next."""
        self._flush(self._next)
        if self._memory[self._next].numel() < nbytes:
            self._memory[self._next] = torch.empty(0, dtype=torch.uint8)  # freed before the larger one
            self._memory[self._next] = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[self._next][:nbytes]

    def post(self, link: DataLink, buffer: torch.Tensor, tag: int) -> None:
        """Start sending what ``reserve`` gave."""
        self._pending[self._next] = (link, link.post_send(buffer, tag))
        self._next = 1 - self._next

    def _flush(self, slot: int) -> None:
        if (pending := self._pending[slot]) is not None:
            self._pending[slot] = None
            link, work = pending
            link.finish(work, "a bucket")

    def flush(self) -> None:
        """Wait until everything posted has been sent."""
        self._flush(0)
        self._flush(1)


class GlooSource:
    """Packs the slices that the sink needs and sends them: two buckets of memory, no more."""

    def __init__(
        self,
        link: DataLink,
        tensors: Sequence[torch.Tensor],
        wire_dtypes: Sequence[torch.dtype],
        buffers: SendBuffers,
    ) -> None:
        """``wire_dtypes`` are the inference rank's target dtypes, by target index."""
        self._link = link
        self._tensors = tensors
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._digests: list[bytes] = []

    def open(self) -> None:
        """Nothing: the first bucket says it all."""

    def move(self, bucket: Bucket) -> None:
        buffer = self._buffers.reserve(packed_bytes(bucket, self._wire_dtypes))
        pack(bucket, self._tensors, self._wire_dtypes, buffer)
        self._buffers.post(self._link, buffer, BUCKET_TAG + bucket.index)
        self._digests.append(checksum_of(buffer))

    def close(self) -> None:
        self._buffers.flush()
        send_digests(self._link, self._digests)


def send_digests(link: DataLink, digests: Sequence[bytes]) -> None:
    """Tell the sink what was sent, one digest for each bucket."""
    data = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
    link.send(data, DIGEST_TAG, "checksums")


def packed_bytes(bucket: Bucket, wire_dtypes: Sequence[torch.dtype]) -> int:
    """Bytes of a bucket as Gloo carries it."""
    return sum(torch.Size(c.size).numel() * wire_dtypes[c.target].itemsize for c in bucket.copies)


def mark_enqueued(tensors: Iterable[torch.Tensor]) -> tuple[torch.cuda.Event, ...]:
    """An event behind all that is enqueued now, on the current stream of every GPU that has a tensor.

    For tensors in host memory it is the current GPU's, if this process uses one: they may be pinned, and
    copied into with ``non_blocking=True``.
    """
    events = []
    devices = {tensor.get_device() for tensor in tensors}
    if -1 in devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.cuda.current_device())
    for device in devices - {-1}:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return tuple(events)


def pack(
    bucket: Bucket,
    tensors: Sequence[torch.Tensor],
    wire_dtypes: Sequence[torch.dtype],
    buffer: torch.Tensor,
    *,
    non_blocking: bool = False,
) -> None:
    """Put a bucket's elements one behind the other into ``buffer``, uint8 [packed_bytes].

    With ``non_blocking``, copies from a GPU into pinned memory are only enqueued.
    """
    offset = 0
    for copy in bucket.copies:
        picked = pick(tensors[copy.shard], copy)
        dtype = wire_dtypes[copy.target]
        nbytes = picked.numel() * dtype.itemsize
        place = buffer[offset : offset + nbytes]
        if place.storage_offset() % dtype.itemsize == 0:
            # Casts and gathers in place: a copy in between would be a third bucket's worth of memory.
            place.view(dtype).view(picked.shape).copy_(picked, non_blocking=non_blocking)
        else:  # behind elements of another size; a byte view of the cast has no alignment
            place.copy_(as_bytes(picked.to(dtype).contiguous()), non_blocking=non_blocking)
        offset += nbytes


def unpack(bucket: Bucket, buffer: torch.Tensor, landing: Landing) -> None:
    """Put a packed bucket's elements in their place."""
    offset = 0
    for copy in bucket.copies:
        place = landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
        nbytes = place.numel() * place.element_size()
        arrived = buffer[offset : offset + nbytes]
        if arrived.data_ptr() % place.element_size():
            arrived = arrived.clone()
        place.copy_(arrived.view(place.dtype).view(place.shape))
        landing.landed(copy.target, place.numel())
        offset += nbytes


# --- sinks: the updater's end ------------------------------------------------------------------------


class Sink(Protocol):
    """The updater's end of one lane."""

    def open(self) -> None:
        """Before the first bucket of a round."""

    def move(self, bucket: Bucket, landing: Landing) -> None:
        """Receive one bucket into place."""

    def close(self) -> None:
        """Wait until everything is in place, and compare with the source's digests."""


class PullSink:
    """Reads slices from the trainer's memory into their final place, or casts them on the way."""

    def __init__(self, link: DataLink, pid: int, layout: Layout) -> None:
        self._link = link
        self._pid = pid
        self._dtypes = [getattr(torch, shard.dtype) for shard in layout.shards]
        self._addresses: list[int] = []
        self._digests: list[bytes] = []

    def open(self) -> None:
        buffer = torch.empty(len(self._dtypes), dtype=torch.int64)
        self._addresses = self._link.receive(buffer, ADDRESS_TAG, "shard addresses").tolist()

    def move(self, bucket: Bucket, landing: Landing) -> None:
        checksum = Checksum()
        for copy in bucket.copies:
            place = landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
            checksum.update(self._pull_into(copy, place))
            landing.landed(copy.target, place.numel())
        self._digests.append(checksum.digest())

    def _pull_into(self, copy: Copy, place: torch.Tensor) -> torch.Tensor:
        """Fill ``place``; returns the elements as the trainer holds them, for the checksum."""
        base = self._addresses[copy.shard]
        if place.dtype == self._dtypes[copy.shard] and (runs := direct_runs(copy, base, place)) is not None:
            peer_memory.pull(self._pid, runs, who=self._link.who)
            return place
        return self._fetch(copy, place)

    def _fetch(self, copy: Copy, place: torch.Tensor) -> torch.Tensor:
        """Read the span that a copy's elements lie in, pick them, and write them to their place."""
        dtype = self._dtypes[copy.shard]
        span = 1 + sum((n - 1) * s for n, s in zip(copy.size, copy.src_stride, strict=True))
        scratch = torch.empty(span, dtype=dtype)
        start = self._addresses[copy.shard] + copy.src_offset * dtype.itemsize
        peer_memory.pull(self._pid, [(start, scratch.data_ptr(), span * dtype.itemsize)], who=self._link.who)
        picked = scratch.as_strided(copy.size, copy.src_stride)
        place.copy_(picked)
        return picked

    def close(self) -> None:
        compare_digests(self._link, self._digests)


def direct_runs(copy: Copy, base: int, place: torch.Tensor) -> list[peer_memory.Run] | None:
    """The copy as runs of bytes contiguous on both sides, or None if they are too short to be worth it."""
    itemsize = place.element_size()
    run, split = 1, len(copy.size)
    for n, src, dst in zip(
        reversed(copy.size), reversed(copy.src_stride), reversed(copy.dst_stride), strict=True
    ):
        if n != 1 and not src == dst == run:
            break
        run *= n
        split -= 1
    nbytes = run * itemsize
    if nbytes < DIRECT_RUN_BYTES and split:
        return None
    outer = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for n, src, dst in zip(copy.size[:split], copy.src_stride[:split], copy.dst_stride[:split], strict=True):
        steps = torch.arange(n, dtype=torch.int64)
        outer = tuple((o[:, None] + steps * s).flatten() for o, s in zip(outer, (src, dst), strict=True))  # type: ignore[assignment]
    remote = (base + (outer[0] + copy.src_offset) * itemsize).tolist()
    local = (place.data_ptr() + outer[1] * itemsize).tolist()
    return [(r, w, nbytes) for r, w in zip(remote, local, strict=True)]


def make_room(
    buffers: list[torch.Tensor], count: int, lane: Lane, wire_dtypes: Sequence[torch.dtype]
) -> None:
    """See to it that ``buffers``, kept from round to round, has ``count`` for any bucket of ``lane``."""
    largest = max((packed_bytes(bucket, wire_dtypes) for bucket in lane.buckets), default=0)
    if len(buffers) < count or buffers[0].numel() < largest:
        buffers[:] = [torch.empty(largest, dtype=torch.uint8) for _ in range(count)]


class GlooSink:
    """Receives packed buckets and puts their elements in place; the next one arrives meanwhile."""

    def __init__(
        self,
        link: DataLink,
        lane: Lane,
        wire_dtypes: Sequence[torch.dtype],
        buffers: list[torch.Tensor],
    ) -> None:
        """``buffers`` is the lane's memory, empty at first and kept by the caller from round to round."""
        self._link = link
        self._lane = lane
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._posted: dict[int, tuple[torch.Tensor, dist.Work]] = {}
        self._digests: list[bytes] = []
        self.received_bytes = 0

    def open(self) -> None:
        self._posted.clear()
        make_room(self._buffers, 2, self._lane, self._wire_dtypes)
        for bucket in self._lane.buckets[:2]:
            self._post(bucket)

    def _post(self, bucket: Bucket) -> None:
        buffer = self._buffers[bucket.index % 2][: packed_bytes(bucket, self._wire_dtypes)]
        self._posted[bucket.index] = (buffer, self._link.post_receive(buffer, BUCKET_TAG + bucket.index))

    def move(self, bucket: Bucket, landing: Landing) -> None:
        buffer, work = self._posted.pop(bucket.index)
        self._link.finish(work, f"bucket {bucket.index}")
        self.received_bytes += buffer.numel()
        unpack(bucket, buffer, landing)
        self._digests.append(checksum_of(buffer))
        if bucket.index + 2 < len(self._lane.buckets):
            self._post(self._lane.buckets[bucket.index + 2])

    def close(self) -> None:
        compare_digests(self._link, self._digests)


def compare_digests(link: DataLink, digests: Sequence[bytes]) -> None:
    """Receive the source's digests and compare.

    Raises:
        ChecksumMismatch: names the first bucket that arrived as something else.
    """
    buffer = torch.empty(len(digests) * DIGEST_BYTES, dtype=torch.uint8)
    sent = link.receive(buffer, DIGEST_TAG, "checksums").numpy().tobytes()
    for index, digest in enumerate(digests):
        expected = sent[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if digest != expected:
            raise ChecksumMismatch(
                f"bucket {index} from {link.who}: sent {expected.hex()}, arrived {digest.hex()}; nothing of "
                "this version is used"
            )
