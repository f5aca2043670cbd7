"""Gloo that sends of a bucket what changed, where that is shorter: both ends remember what was last sent.

The source keeps each bucket as it was last packed, in the host's memory and the server's dtype, and compares.
The sink writes what changed over the version that is served, which its updater has brought into the half
before. A round may only follow the round right before it (``Chains``). Both ends see alone whether it does,
and begin with whole buckets otherwise.

The digests form a chain: each covers its bucket's payload and the digest before it, so that ends which have
not seen the very same rounds cannot agree.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import blake3
import torch
import torch.distributed as dist

from bridge.errors import ProtocolError
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.plan import Bucket, Lane
from bridge.wire import delta
from bridge.wire.checksum import as_bytes, checksum_of
from bridge.wire.delta import Changes, Form, Piece
from bridge.wire.transport import (
    BUCKET_TAG,
    DataLink,
    Landing,
    SendBuffers,
    compare_digests,
    make_room,
    pack,
    packed_bytes,
    pick,
    send_digests,
    unpack,
)

HEADER_TAG = 1 << 20
SMALL_BYTES = 64 << 10  # pieces below this are put together before they are compared
POSTED_BYTES = 64 << 20  # of payloads under way


class Chain:
    """What one end of a lane remembers from round to round: digests, and at the source the buckets."""

    def __init__(self, lane: Lane) -> None:
        self.digests = [b""] * len(lane.buckets)
        self.previous: dict[int, torch.Tensor] = {}

    def extend(self, index: int, header: torch.Tensor, payload: torch.Tensor) -> None:
        """Add what was sent of a bucket to its digest."""
        link = self.digests[index] + header.numpy().tobytes() + checksum_of(payload)
        self.digests[index] = blake3.blake3(link).digest(DIGEST_BYTES)


class Chains:
    """One process's chains, by the rank at the other end, and the rule of when they go on. One per epoch.

    A round may carry changes only if the round right before it ended well and was its like: the same layouts
    and encoding, which is the same ``joint``.
    """

    def __init__(self) -> None:
        self._chains: dict[int, Chain] = {}
        self._last = ""

    def follow(self, joint: str) -> bool:
        """Whether a round of ``joint`` would be laid over the one before it."""
        return bool(self._chains) and joint == self._last

    def of(self, peer: int, lane: Lane) -> Chain:
        """The chain of the lane that joins this process to ``peer``; a new one begins with whole buckets."""
        return self._chains.setdefault(peer, Chain(lane))

    @contextmanager
    def round(self, joint: str) -> Iterator[None]:
        """Around one round, of either encoding; an exception out of it ends all chains."""
        if not self.follow(joint):
            self._chains.clear()
        self._last = ""  # until this round has ended well
        try:
            yield
        except BaseException:
            self.forget()  # the error may keep this object for long
            raise
        self._last = joint

    def forget(self) -> None:
        """End all chains, and give back the memory of what was sent."""
        self._chains.clear()
        self._last = ""


def _unit(bucket: Bucket, wire_dtypes: Sequence[torch.dtype]) -> int:
    return delta.unit_of([wire_dtypes[copy.target].itemsize for copy in bucket.copies])


class DeltaSource:
    """Compares each bucket with the last one, and sends the shortest form."""

    def __init__(
        self,
        link: DataLink,
        tensors: Sequence[torch.Tensor],
        wire_dtypes: Sequence[torch.dtype],
        buffers: SendBuffers,
        chain: Chain,
        *,
        whole: Collection[int],
        workers: Executor,
    ) -> None:
        """``chain`` is that of the round before, or new; targets in ``whole`` must arrive complete.

        ``workers`` compare; the memory of what the tensors hold is read by them until ``move`` returns.
        """
        self._link = link
        self._tensors = tensors
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._chain = chain
        self._whole = whole
        self._workers = workers
        self._posted: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._headers: list[tuple[torch.Tensor, dist.Work]] = []

    def open(self) -> None:
        """Nothing: each bucket has a header."""

    def move(self, bucket: Bucket) -> None:
        unit = _unit(bucket, self._wire_dtypes)
        previous = self._chain.previous.get(bucket.index)
        if previous is not None:
            changes = delta.take_changes(self._pieces(bucket, previous), unit, self._workers)
            if changes is not None:
                form, payload = delta.encode(changes, previous.numel(), unit)
                if form is not Form.DENSE:
                    self._announce(bucket, form, changes.positions.numel(), payload)
                    self._post(bucket, payload)
                    return
        buffer = self._buffers.reserve(packed_bytes(bucket, self._wire_dtypes))
        pack(bucket, self._tensors, self._wire_dtypes, buffer)
        if previous is not None:
            previous.copy_(buffer)
        elif not any(copy.target in self._whole for copy in bucket.copies):
            self._chain.previous[bucket.index] = buffer.clone()
        self._announce(bucket, Form.DENSE, 0, buffer)
        self._buffers.post(self._link, buffer, BUCKET_TAG + bucket.index)

    def _announce(self, bucket: Bucket, form: Form, count: int, payload: torch.Tensor) -> None:
        header = torch.tensor([form, count, payload.numel()])
        self._headers.append((header, self._link.post_send(header, HEADER_TAG + bucket.index)))
        self._chain.extend(bucket.index, header, payload)

    def _post(self, bucket: Bucket, payload: torch.Tensor) -> None:
        """Send in the background: the sink is not ready before it has brought its half up to date."""
        if not payload.numel():
            return
        while self._posted and sum(sent.numel() for sent, _ in self._posted) > POSTED_BYTES:
            self._finish_first()
        self._posted.append((payload, self._link.post_send(payload, BUCKET_TAG + bucket.index)))

    def _finish_first(self) -> None:
        _, work = self._posted.popleft()
        self._link.finish(work, "a bucket")

    def _pieces(self, bucket: Bucket, previous: torch.Tensor) -> list[Piece]:
        """The bucket as it is now beside ``previous``: read in place where it lies as it would be packed."""
        found: list[torch.Tensor] = []
        small: list[torch.Tensor] = []
        for copy in bucket.copies:
            picked = pick(self._tensors[copy.shard], copy)
            now = as_bytes(picked.to(self._wire_dtypes[copy.target]).contiguous()).cpu()
            if now.numel() < SMALL_BYTES:
                small.append(now)
                continue
            found += [torch.cat(small), now] if small else [now]
            small = []
        found += [torch.cat(small)] if small else []
        remembered = torch.split(previous, [now.numel() for now in found])
        return list(zip(found, remembered, strict=True))

    def close(self) -> None:
        self._buffers.flush()
        while self._posted:
            self._finish_first()
        for _, work in self._headers:
            self._link.finish(work, "a bucket's header")
        send_digests(self._link, self._chain.digests)


class DeltaSink:
    """Receives each bucket's header, then its payload, and writes over what is there."""

    def __init__(
        self,
        link: DataLink,
        lane: Lane,
        wire_dtypes: Sequence[torch.dtype],
        buffers: list[torch.Tensor],
        chain: Chain,
        *,
        follows: bool,
    ) -> None:
        """``buffers`` is the lane's memory, as ``GlooSink`` has it.

        ``follows`` says that the half holds what this lane brought in the round before.
        """
        self._link = link
        self._lane = lane
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._chain = chain
        self._follows = follows
        self._header: tuple[torch.Tensor, dist.Work] | None = None
        self.received_bytes = 0

    def open(self) -> None:
        make_room(self._buffers, 1, self._lane, self._wire_dtypes)
        self._expect(0)

    def _expect(self, index: int) -> None:
        if index < len(self._lane.buckets):
            header = torch.empty(3, dtype=torch.int64)
            self._header = header, self._link.post_receive(header, HEADER_TAG + index)

    def move(self, bucket: Bucket, landing: Landing) -> None:
        assert self._header is not None
        header, work = self._header
        self._link.finish(work, f"the header of bucket {bucket.index}")
        nbytes, unit = packed_bytes(bucket, self._wire_dtypes), _unit(bucket, self._wire_dtypes)
        form, count = self._read(bucket.index, header, nbytes, unit)
        payload = self._buffers[0][: int(header[2])]
        if payload.numel():
            self._link.receive(payload, BUCKET_TAG + bucket.index, f"bucket {bucket.index}")
        self._chain.extend(bucket.index, header, payload)
        self._expect(bucket.index + 1)
        self.received_bytes += payload.numel()
        if form is Form.DENSE:
            unpack(bucket, payload, landing)
        elif count:
            self._apply(bucket, delta.decode(form, payload, count, nbytes, unit), landing, unit)

    def _read(self, index: int, header: torch.Tensor, nbytes: int, unit: int) -> tuple[Form, int]:
        said, count, length = header.tolist()
        what = f"{self._link.who} sends bucket {index} as form {said} with {count} changes, {length} bytes"
        try:
            form = Form(said)
        except ValueError as err:
            raise ProtocolError(f"{what}: no such form") from err
        fitting = delta.payload_bytes(form, count, nbytes, unit)
        if not 0 <= count <= nbytes // unit or length != fitting or length > nbytes:
            raise ProtocolError(f"{what}: impossible for a bucket of {nbytes} bytes in units of {unit}")
        if form is not Form.DENSE and not self._follows:
            raise ProtocolError(f"{what}, but nothing was sent before that it could be laid over")
        return form, count

    def _apply(self, bucket: Bucket, changes: Changes, landing: Landing, unit: int) -> None:
        sizes = [math.prod(copy.size) * self._wire_dtypes[copy.target].itemsize for copy in bucket.copies]
        ends = torch.tensor(sizes).cumsum(0) // unit
        splits = torch.searchsorted(changes.positions, ends).tolist()
        start = first = 0
        for copy, split, end in zip(bucket.copies, splits, ends.tolist(), strict=True):
            if split > start:
                place = landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
                own = Changes(changes.positions[start:split] - first, changes.values[start:split])
                delta.scatter(place, own, unit)
            start, first = split, end

    def close(self) -> None:
        """Compare: what arrived, and all that came before it, is what was sent.

        Raises:
            ChecksumMismatch: it is not.
        """
        compare_digests(self._link, self._chain.digests)
