"""Copies of a plan as jobs for a GPU's copy engines, cut once and used in every round.

Enqueuing must be faster than copying: with a sharded model a rank's share is thousands of copies of a few
megabytes, and what is worked out anew for each of them in each round is soon the larger part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bridge.protocol.plan import Bucket, Copy
from bridge.protocol.region import Dim, merge_dims
from bridge.wire.transport import DIRECT_RUN_BYTES


@dataclass(frozen=True)
class Job:
    """A part of a copy that one strided copy-engine job can do.

    ``rows_of`` counts in elements, from the copy's first ones on both sides; the jobs of a ``Step`` are in
    bytes, from the first ones of shard and target.
    """

    src: int
    dst: int
    rows: int
    src_pitch: int
    dst_pitch: int
    width: int

    def in_bytes(self, unit: int, copy: Copy) -> Job:
        """The same in bytes, for elements of ``unit`` bytes, from where ``copy``'s shard and target begin."""
        return Job(
            src=(copy.src_offset + self.src) * unit,
            dst=(copy.dst_offset + self.dst) * unit,
            rows=self.rows,
            src_pitch=self.src_pitch * unit,
            dst_pitch=self.dst_pitch * unit,
            width=self.width * unit,
        )


@dataclass(frozen=True)
class Step:
    """One copy, its number of elements, and its jobs; none if it is read as a whole and picked from here."""

    copy: Copy
    numel: int
    jobs: tuple[Job, ...]


class LaneSteps:
    """The steps of one lane's buckets, kept from round to round while the trainer's dtypes stay."""

    def __init__(self, target_dtypes: Sequence[torch.dtype]) -> None:
        """``target_dtypes`` are the inference rank's, by target index."""
        self._target_dtypes = target_dtypes
        self._shard_dtypes: Sequence[torch.dtype] = ()
        self._known: dict[int, list[Step]] = {}

    def use(self, shard_dtypes: Sequence[torch.dtype]) -> None:
        """The trainer shows its shards in these dtypes from now on."""
        if shard_dtypes != self._shard_dtypes:
            self._shard_dtypes = list(shard_dtypes)
            self._known.clear()

    def of(self, bucket: Bucket) -> list[Step]:
        """What to do for ``bucket``."""
        if bucket.index not in self._known:
            self._known[bucket.index] = [self._step(copy) for copy in bucket.copies]
        return self._known[bucket.index]

    def _step(self, copy: Copy) -> Step:
        numel, dtype = math.prod(copy.size), self._shard_dtypes[copy.shard]
        unit = dtype.itemsize
        jobs = list(rows_of(copy))
        in_place = dtype == self._target_dtypes[copy.target]
        if not in_place or jobs[0].width * unit < DIRECT_RUN_BYTES < numel * unit:
            return Step(copy, numel, ())
        return Step(copy, numel, tuple(job.in_bytes(unit, copy) for job in jobs))


def rows_of(copy: Copy) -> Iterator[Job]:
    """Cut a copy into jobs: a contiguous run, repeated at a pitch; outer dimensions become separate jobs.

    Destination offsets are relative to the copy's first element.
    """
    dims = merge_dims(Dim(*dim) for dim in zip(copy.size, copy.src_stride, copy.dst_stride, strict=True))
    width = 1
    if dims and dims[-1][1] == dims[-1][2] == 1:
        width = dims.pop()[0]
    rows, src_pitch, dst_pitch = dims.pop() if dims else (1, width, width)
    if min(src_pitch, dst_pitch) < width:  # overlapping or reversed rows are no rows to a copy engine
        dims.append(Dim(rows, src_pitch, dst_pitch))
        rows, src_pitch, dst_pitch = 1, width, width
    for index in itertools.product(*(range(n) for n, _, _ in dims)):
        yield Job(
            src=sum(i * s for i, (_, s, _) in zip(index, dims, strict=True)),
            dst=sum(i * d for i, (_, _, d) in zip(index, dims, strict=True)),
            rows=rows,
            src_pitch=src_pitch,
            dst_pitch=dst_pitch,
            width=width,
        )
