"""The plan: which trainer rank's bytes land where on which inference rank, in which bucket.

A pure function of the mapping and of what each trainer rank holds. Every trainer rank and every updater
computes it alone; they compare digests before the first byte.
"""

from __future__ import annotations

import msgspec


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """The box of one source tensor that a trainer rank holds, contiguous and row-major in its memory.

    ``offset`` and ``shape`` are in elements of the source's own dimensions; ``dtype`` is the trainer's.
    """

    source: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """All that one trainer rank holds, under one vocabulary."""

    rank: int
    vocabulary: str
    shards: tuple[Shard, ...]


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """One strided copy: from shard ``shard`` of the lane's trainer to target ``target`` of its updater.

    Source strides are within the trainer's *local* shard; all in elements. ``size`` is ordered so
    that both sides walk the same elements in the same order.
    """

    shard: int
    target: int
    size: tuple[int, ...]
    src_offset: int
    src_stride: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Copies that travel together; ``nbytes`` in the trainer's dtypes."""

    index: int
    nbytes: int
    copies: tuple[Copy, ...]


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one trainer rank sends to one inference rank in a round."""

    trainer: int
    inference: int
    buckets: tuple[Bucket, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The agreed order of transfers. ``digest`` is blake3 (16 bytes) over mapping, layouts and lanes."""

    lanes: tuple[Lane, ...]
    num_buckets: int
    total_bytes: int
    digest: bytes
