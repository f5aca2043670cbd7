"""NCCL between GPUs of two hosts: each slice is sent from where it lies to where it belongs.

Point to point, because measured beside a broadcast it is as fast for one receiver, and an all-gather carries
the receiver's share of nothing (``benchmarks/nccl_paths.py``); several slices leave in one launch. A slice
that is contiguous at an end is not copied there; what is not, or is cast, goes through a buffer of one
bucket. Both ends launch when a word on the Gloo link has said that the other stands at the same bucket, so
that no kernel spins on the GPU that serves, waiting for a trainer that is late.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bridge.errors import PeerLost
from bridge.protocol.plan import Bucket, Copy, Lane
from bridge.wire.device_checksum import DeviceChecksums
from bridge.wire.nccl import Pair
from bridge.wire.transport import DataLink, Landing, compare_digests, pick, send_digests

GO_TAG, ARRIVED_TAG = 13, 14
SMALL_BYTES = 1 << 20  # slices below this travel in one message with their neighbours
_ALIGNMENT = 16  # bytes; of every slice within a message
_SLOT_ALIGNMENT = 256  # bytes; of every message within a buffer, as torch's own allocator aligns
_POLL_S = 0.0002


@dataclass(frozen=True)
class Message:
    """Copies of one bucket that travel as one run of bytes: (copy, offset in the run), and its length."""

    copies: tuple[tuple[Copy, int], ...]
    nbytes: int


def messages_of(bucket: Bucket, wire_dtypes: Sequence[torch.dtype]) -> Iterator[Message]:
    """Cut a bucket into messages; both ends do it alike. ``wire_dtypes`` are the targets', by index."""
    small: list[tuple[Copy, int]] = []
    end = 0
    for copy in bucket.copies:
        nbytes = math.prod(copy.size) * wire_dtypes[copy.target].itemsize
        if nbytes >= SMALL_BYTES:
            if small:
                yield Message(tuple(small), end)
                small, end = [], 0
            yield Message(((copy, 0),), nbytes)
        elif nbytes:
            # Aligned where it begins, exact where it ends: of a single copy one end may use its own memory.
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            small.append((copy, start))
            end = start + nbytes
    if small:
        yield Message(tuple(small), end)


def as_run(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor's bytes as uint8 [nbytes] where they lie; None if NCCL cannot take them from there."""
    if tensor.device == device and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor.reshape(-1).view(torch.uint8)
    return None


class _Buffer:
    """Device memory that grows to the largest bucket that needs any."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._end = 0

    def begin(self, nbytes: int) -> None:
        """Start a bucket that needs ``nbytes``; on the stream that uses the memory."""
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8, device=self._memory.device)
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self._memory.device)
        self._end = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes``, aligned for every dtype."""
        start = self._end
        self._end += _room(nbytes)
        return self._memory[start : start + nbytes]


def _room(nbytes: int) -> int:
    """What a message takes of a buffer."""
    return -(-nbytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


class Workspace:
    """What all NCCL lanes of one process share: a stream, two buffers, and what they still hold."""

    def __init__(self, device: torch.device, interrupted: threading.Event | None = None) -> None:
        """``interrupted`` ends every wait for the GPU when it is set."""
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._interrupted = interrupted or threading.Event()
        with torch.cuda.stream(self.stream):
            self._slots = [_Buffer(device), _Buffer(device)]
        self._works: list[dist.Work | None] = [None, None]
        self._next = 0

    def runs(
        self, messages: Sequence[Message], found: Sequence[torch.Tensor | None], link: DataLink
    ) -> list[torch.Tensor]:
        """The bytes of a bucket's messages: where they were found, else in a buffer that is free by then.

        Raises:
            PeerLost: what was in the buffer has not travelled in time.
        """
        pairs = list(zip(messages, found, strict=True))
        slot = self._slot(sum(_room(message.nbytes) for message, run in pairs if run is None), link)
        return [slot.take(message.nbytes) if run is None else run for message, run in pairs]

    def _slot(self, nbytes: int, link: DataLink) -> _Buffer:
        self._next = 1 - self._next
        if (work := self._works[self._next]) is not None:
            # Not on the stream: it would wait for a dead peer for ever, and whoever waits for the stream too.
            self.poll(work.is_completed, link, "a bucket to travel")
        self._slots[self._next].begin(nbytes)
        return self._slots[self._next]

    def poll(self, done: Callable[[], bool], link: DataLink, what: str) -> None:
        """Wait for the GPU. CUDA's own wait knows no deadline, and a peer that died leaves kernels waiting.

        Raises:
            PeerLost: the deadline has passed, or the epoch is over.
        """
        deadline, pause = time.monotonic() + link.timeout_s, threading.Event()
        while not done():
            if self._interrupted.is_set():
                raise PeerLost(f"the epoch ended while {link.who} was waited for ({what})")
            if time.monotonic() > deadline:
                raise PeerLost(f"lost {link.who}: waited {link.timeout_s:g} s for {what}")
            pause.wait(_POLL_S)

    def finish(self, link: DataLink, what: str) -> None:
        """Wait until the stream has done all it was given.

        Raises:
            PeerLost: as ``poll``.
        """
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self.stream)
        self.poll(done.query, link, what)

    def let_go(self) -> None:
        """All has travelled: torch holds what it sent until somebody has waited for it."""
        with torch.cuda.stream(self.stream):
            for work in self._works:
                if work is not None:
                    work.wait()
        self._works = [None, None]

    def posted(self, work: dist.Work) -> None:
        """The slot's contents travel with ``work``."""
        self._works[self._next] = work


class NcclSource:
    """The trainer's end of a lane."""

    def __init__(
        self,
        link: DataLink,
        pair: Pair,
        tensors: Sequence[torch.Tensor],
        wire_dtypes: Sequence[torch.dtype],
        lane: Lane,
        workspace: Workspace,
        *,
        checked: bool,
    ) -> None:
        """``wire_dtypes`` are the inference rank's target dtypes, by target index."""
        self._link = link
        self._pair = pair
        self._tensors = tensors
        self._wire_dtypes = wire_dtypes
        self._workspace = workspace
        self._sums = (
            DeviceChecksums(len(lane.buckets), workspace.device, workspace.stream) if checked else None
        )

    def open(self) -> None:
        """Nothing: the first bucket's word says it all."""

    def move(self, bucket: Bucket) -> None:
        workspace, messages = self._workspace, list(messages_of(bucket, self._wire_dtypes))
        with torch.cuda.stream(workspace.stream), torch.no_grad():
            found = [self._where_it_lies(message) for message in messages]
            runs = workspace.runs(messages, found, self._link)
            for message, run, lies in zip(messages, runs, found, strict=True):
                if lies is None:
                    self._pack(message, run)
                if self._sums is not None:
                    self._sums.add(bucket.index, run)
            self._link.send(torch.tensor([bucket.index]), GO_TAG, f"the word for bucket {bucket.index}")
            workspace.posted(self._pair.send(runs))

    def _where_it_lies(self, message: Message) -> torch.Tensor | None:
        if len(message.copies) > 1:
            return None
        ((copy, _),) = message.copies
        dtype = self._wire_dtypes[copy.target]
        return as_run(pick(self._tensors[copy.shard], copy), self._workspace.device, dtype)

    def _pack(self, message: Message, run: torch.Tensor) -> None:
        if len(message.copies) > 1:
            run.zero_()  # the gaps of alignment travel too, and are summed
        for copy, offset in message.copies:
            dtype = self._wire_dtypes[copy.target]
            nbytes = math.prod(copy.size) * dtype.itemsize
            place = run[offset : offset + nbytes].view(dtype).view(copy.size)
            place.copy_(pick(self._tensors[copy.shard], copy))

    def close(self) -> None:
        # On the link first: it notices a dead peer, which a wait for the GPU would not.
        self._link.receive(torch.empty(1, dtype=torch.int64), ARRIVED_TAG, "the word that all has arrived")
        self._workspace.finish(self._link, "the last bucket to travel")
        if self._sums is not None:
            send_digests(self._link, self._sums.digests())


class NcclSink:
    """The updater's end of a lane."""

    def __init__(
        self,
        link: DataLink,
        pair: Pair,
        lane: Lane,
        wire_dtypes: Sequence[torch.dtype],
        workspace: Workspace,
        *,
        checked: bool,
    ) -> None:
        """``wire_dtypes`` are the rank's target dtypes, by target index."""
        self._link = link
        self._pair = pair
        self._wire_dtypes = wire_dtypes
        self._workspace = workspace
        self._sums = (
            DeviceChecksums(len(lane.buckets), workspace.device, workspace.stream) if checked else None
        )

    def open(self) -> None:
        """Nothing: receiving the first word says that this end is ready."""

    def move(self, bucket: Bucket, landing: Landing) -> None:
        workspace, messages = self._workspace, list(messages_of(bucket, self._wire_dtypes))
        word = self._link.receive(
            torch.empty(1, dtype=torch.int64), GO_TAG, f"the word for bucket {bucket.index}"
        )
        if int(word) != bucket.index:
            raise PeerLost(f"{self._link.who} is at bucket {int(word)}, this updater at {bucket.index}")
        with torch.cuda.stream(workspace.stream), torch.no_grad():
            found = [self._where_it_belongs(message, landing) for message in messages]
            runs = workspace.runs(messages, found, self._link)
            self._pair.receive(runs).wait()  # the stream does, not this thread
            for message, run, place in zip(messages, runs, found, strict=True):
                if self._sums is not None:
                    self._sums.add(bucket.index, run)
                if place is None:
                    self._unpack(message, run, landing)
        for message in messages:
            for copy, _ in message.copies:
                landing.landed(copy.target, math.prod(copy.size))

    def _where_it_belongs(self, message: Message, landing: Landing) -> torch.Tensor | None:
        if len(message.copies) > 1:
            return None
        ((copy, _),) = message.copies
        place = landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
        return as_run(place, self._workspace.device, self._wire_dtypes[copy.target])

    def _unpack(self, message: Message, run: torch.Tensor, landing: Landing) -> None:
        for copy, offset in message.copies:
            dtype = self._wire_dtypes[copy.target]
            nbytes = math.prod(copy.size) * dtype.itemsize
            place = landing.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
            place.copy_(run[offset : offset + nbytes].view(dtype).view(copy.size))

    def close(self) -> None:
        """Wait for the last byte, say so, then compare: nothing is written to the half after this.

        Raises:
            PeerLost: the last byte did not come in time.
            ChecksumMismatch: what arrived is not what was sent.
        """
        self._workspace.finish(self._link, "the last bytes to arrive")
        self._link.send(torch.ones(1, dtype=torch.int64), ARRIVED_TAG, "the word that all has arrived")
        if self._sums is not None:
            compare_digests(self._link, self._sums.digests())
