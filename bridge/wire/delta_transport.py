"""Gloo that sends of a bucket what changed, where that is shorter: both ends remember what was last sent.

The source keeps each bucket as it was last packed, in the host's memory and the server's dtype, and compares.
The sink writes what changed over the version that is served, which it brings into the half before. A round
may only follow the round right before it (``Chains``). Both ends see alone whether it does, and begin with
whole buckets otherwise.

The digests form a chain: each covers its bucket's payload and the digest before it, so that ends which have
not seen the very same rounds cannot agree.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import NamedTuple

import blake3
import torch
import torch.distributed as dist

from bridge.errors import DeviceError, ProtocolError
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.plan import Bucket, Lane
from bridge.wire import delta
from bridge.wire.checksum import as_bytes, checksum_of
from bridge.wire.delta import Form, Part, Piece, Search
from bridge.wire.rendezvous import first_line
from bridge.wire.transport import (
    BUCKET_TAG,
    DataLink,
    Landing,
    SendBuffers,
    compare_digests,
    make_room,
    mark_enqueued,
    pack,
    packed_bytes,
    pick,
    send_digests,
    unpack,
)

HEADER_TAG = 1 << 20
SMALL_BYTES = 64 << 10  # pieces below this are put together before they are compared
POSTED_BYTES = 64 << 20  # of payloads under way
AGAIN_SHARE = 0.0125  # of a bucket's bytes in changed units: to copy it takes as long as to write more again


class Sent(NamedTuple):
    """What a sink keeps of a bucket's last payload, uint8 [m], to write it again into the other half."""

    form: Form
    changes: int
    payload: torch.Tensor


class Chain:
    """What one end of a lane remembers from round to round.

    Digests; at the source, the buckets as last sent; at the sink, what the last round changed in each bucket,
    None where that was too much to keep.
    """

    def __init__(self, lane: Lane) -> None:
        self.digests = [b""] * len(lane.buckets)
        self.previous: dict[int, torch.Tensor] = {}
        self.latest: dict[int, Sent | None] = {}

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

    @property
    def nbytes(self) -> int:
        """The memory of what was sent."""
        return sum(known.numel() for chain in self._chains.values() for known in chain.previous.values())

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


class Crossing:
    """Pinned buffers through which weights come from a GPU to be compared in host memory, two in turn.

    Kept from round to round: pinning takes longer than crossing.
    """

    def __init__(self) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._next = 0

    def bring(
        self, bucket: Bucket, tensors: Sequence[torch.Tensor], wire_dtypes: Sequence[torch.dtype]
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """A bucket as packed, uint8 [n], and what to call before reading it; good until the next but one."""
        nbytes, turn = packed_bytes(bucket, wire_dtypes), self._next
        self._next = 1 - turn
        if self._memory[turn].numel() < nbytes:
            self._memory[turn] = torch.empty(0, dtype=torch.uint8)  # freed before the larger one
            self._memory[turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        buffer = self._memory[turn][:nbytes]
        pack(bucket, tensors, wire_dtypes, buffer, non_blocking=True)
        arrived = mark_enqueued(tensors[copy.shard] for copy in bucket.copies)

        def wait() -> None:
            for event in arrived:
                event.synchronize()

        return buffer, wait


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
        snapshot: torch.device | None = None,
        crossing: Crossing | None = None,
    ) -> None:
        """``chain`` is that of the round before, or new; targets in ``whole`` must arrive complete.

        ``workers`` compare in host memory, and read what the tensors hold until ``move`` returns. What was
        sent is remembered on ``snapshot``, by default in host memory; there, tensors on a GPU come by
        ``crossing``.
        """
        self._link = link
        self._tensors = tensors
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._chain = chain
        self._whole = whole
        self._workers = workers
        self._snapshot = snapshot or torch.device("cpu")
        self._crossing = crossing
        self._ahead: dict[int, tuple[Search, torch.Tensor | None]] = {}
        self._posted: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._headers: list[tuple[torch.Tensor, dist.Work]] = []

    def open(self) -> None:
        """Nothing: each bucket has a header."""

    def prepare(self, bucket: Bucket) -> None:
        """Begin to compare ``bucket``, of which ``move`` is called next but one at the latest."""
        previous = self._chain.previous.get(bucket.index)
        if previous is None or bucket.index in self._ahead:
            return
        unit, packed, ready = _unit(bucket, self._wire_dtypes), None, None
        if self._crossing is not None:
            packed, ready = self._crossing.bring(bucket, self._tensors, self._wire_dtypes)
            pieces = [(packed, previous)]
        else:
            pieces = self._pieces(bucket, previous)
        self._ahead[bucket.index] = Search(pieces, unit, self._workers, ready=ready), packed

    def move(self, bucket: Bucket) -> None:
        self.prepare(bucket)
        search, packed = self._ahead.get(bucket.index, (None, None))
        changes = search.result() if search is not None else None
        self._ahead.pop(bucket.index, None)
        if changes is not None:
            nbytes, unit = packed_bytes(bucket, self._wire_dtypes), _unit(bucket, self._wire_dtypes)
            form, payload = delta.encode(changes, nbytes, unit)
            if form is not Form.DENSE:
                self._announce(bucket, form, changes.places.numel(), payload)
                self._post(bucket, payload)
                return
        self._move_whole(bucket, packed)

    def _move_whole(self, bucket: Bucket, packed: torch.Tensor | None) -> None:
        nbytes = packed_bytes(bucket, self._wire_dtypes)
        buffer = self._buffers.reserve(nbytes)
        previous = self._chain.previous.get(bucket.index)
        if previous is None and not any(copy.target in self._whole for copy in bucket.copies):
            previous = self._chain.previous[bucket.index] = self._remember(nbytes)
        if packed is not None:
            buffer.copy_(packed)
        elif previous is not None and previous.device.type != "cpu":
            pack(bucket, self._tensors, self._wire_dtypes, previous)  # so that it crosses but once
            buffer.copy_(previous)
        else:
            pack(bucket, self._tensors, self._wire_dtypes, buffer)
        if previous is not None and previous.device.type == "cpu":
            previous.copy_(buffer)
        self._announce(bucket, Form.DENSE, 0, buffer)
        self._buffers.post(self._link, buffer, BUCKET_TAG + bucket.index)

    def _remember(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._snapshot)
        except torch.cuda.OutOfMemoryError as err:
            kept = sum(known.numel() for known in self._chain.previous.values())
            raise DeviceError(
                f"{self._snapshot} has no room for a snapshot of what is sent to {self._link.who}, after "
                f"{kept / 2**30:.2f} GiB of it: {first_line(err)}; keep it in host memory "
                "(BRIDGE_SNAPSHOT=host), or send whole rounds (encoding='dense')"
            ) from err

    def _announce(self, bucket: Bucket, form: Form, count: int, payload: torch.Tensor) -> None:
        header = torch.tensor([form, count, payload.numel()])
        self._headers.append((header, self._link.post_send(header, HEADER_TAG + bucket.index)))
        self._chain.extend(bucket.index, header, payload)

    def _post(self, bucket: Bucket, payload: torch.Tensor) -> None:
        """Send in the background: the sink may still be bringing its half up to date."""
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
            now = as_bytes(picked.to(self._wire_dtypes[copy.target]).contiguous()).to(previous.device)
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

    def drop(self) -> None:
        """Compare no further, whatever was begun; when it returns nobody reads the weights any more."""
        for search, _ in self._ahead.values():
            search.drop()
        self._ahead.clear()


class DeltaSink:
    """Receives each bucket's header, then its payload, and writes over what is there.

    A half that is one round behind is first brought up to date, bucket by bucket: what the round before
    brought is written again, or, where that was much or is not known any more, copied from the half that is
    served.
    """

    def __init__(
        self,
        link: DataLink,
        lane: Lane,
        wire_dtypes: Sequence[torch.dtype],
        buffers: list[torch.Tensor],
        chain: Chain,
        *,
        follows: bool,
        served: Landing | None = None,
    ) -> None:
        """``buffers`` is the lane's memory, as ``GlooSink`` has it.

        ``follows`` says that what this lane brought in the round before is served. It lies in the half that
        is written, or else in ``served``; then that half lacks just that round.
        """
        self._link = link
        self._lane = lane
        self._wire_dtypes = wire_dtypes
        self._buffers = buffers
        self._chain = chain
        self._follows = follows
        self._served = served
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
        length = int(header[2])
        kept = form is not Form.DENSE and count * unit <= AGAIN_SHARE * nbytes
        payload = torch.empty(length, dtype=torch.uint8) if kept else self._buffers[0][:length]
        arriving = self._link.post_receive(payload, BUCKET_TAG + bucket.index) if length else None
        if form is not Form.DENSE and self._served is not None:
            self._catch_up(bucket, landing, self._served, nbytes, unit)
        if arriving is not None:
            self._link.finish(arriving, f"bucket {bucket.index}")
        self._chain.extend(bucket.index, header, payload)
        self._chain.latest[bucket.index] = Sent(form, count, payload) if kept else None
        self._expect(bucket.index + 1)
        self.received_bytes += length
        if form is Form.DENSE:
            unpack(bucket, payload, landing)
        else:
            self._apply(bucket, Sent(form, count, payload), landing, nbytes, unit)

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

    def _catch_up(self, bucket: Bucket, landing: Landing, served: Landing, nbytes: int, unit: int) -> None:
        latest = self._chain.latest.get(bucket.index)
        if latest is not None:
            self._apply(bucket, latest, landing, nbytes, unit)
            return
        for copy in bucket.copies:
            where = copy.target, copy.size, copy.dst_offset, copy.dst_stride
            landing.view(*where).copy_(served.view(*where))

    def _apply(self, bucket: Bucket, sent: Sent, landing: Landing, nbytes: int, unit: int) -> None:
        if not sent.changes:
            return
        sizes = [math.prod(copy.size) * self._wire_dtypes[copy.target].itemsize for copy in bucket.copies]
        ends = torch.tensor(sizes).cumsum(0) // unit
        bounds = [0, *ends.tolist()]
        views = [landing.view(c.target, c.size, c.dst_offset, c.dst_stride) for c in bucket.copies]
        on_gpu = views[0].device.type != "cpu"
        for part in delta.decode(sent.form, sent.payload, sent.changes, nbytes, unit, onto_gpu=on_gpu):
            splits = [0, *torch.searchsorted(part.positions, ends).tolist()]
            for place, first, start, end in zip(views, bounds, splits, splits[1:], strict=False):
                if end > start:
                    own = Part(part.positions[start:end] - first, part.values[start:end])
                    delta.scatter(place, own, unit)

    def close(self) -> None:
        """Compare: what arrived, and all that came before it, is what was sent.

        Raises:
            ChecksumMismatch: it is not.
        """
        compare_digests(self._link, self._chain.digests)
