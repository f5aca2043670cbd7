"""The plan: which trainer rank's bytes land where on which inference rank, in which bucket.

A pure function of the mapping and of what each trainer rank holds. Every trainer rank and every updater
computes it alone; they compare digests before the first byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import blake3
import msgspec

from bridge.errors import ConfigError, MappingError, TopologyError
from bridge.protocol.holders import (
    CASTS,
    Faults,
    Held,
    check_leading,
    check_order,
    check_patches,
    find_held,
    name_ranks,
)
from bridge.protocol.mapping import ITEMSIZE, Mapping, Source, Target, Write, compute_digest
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.region import Piece, box_write, intersect, row_major

SHOWN_BOXES = 8  # in one fault; hundreds of ranks may hold a part each


class Shard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The box of one source tensor that a trainer rank holds, contiguous and row-major in its memory.

    ``offset`` and ``shape`` are in elements of the trainer's dimensions; ``dtype`` is the trainer's. These
    dimensions are the source's own, unless ``head_dim`` is set: then the trainer's row 2j + p of each
    ``head_dim`` rows is row p * head_dim / 2 + j of the source's.
    """

    source: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    head_dim: int = 0


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """A source of which only some elements are sent; ``digest`` names them, and is equal on all ranks."""

    source: int
    digest: bytes


class Leading(msgspec.Struct, frozen=True, kw_only=True):
    """A source of which the leading ``shape`` is sent, and the rest is zero: a matrix of lower rank."""

    source: int
    shape: tuple[int, ...]


class Layout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that one trainer rank holds, under one vocabulary.

    ``order`` are the sources in the order in which they were handed over one by one; empty for a model.
    ``patches`` are those of them whose shards are no more than what is to be written over. ``leading`` are
    all that a round of an adapter sends, equal on all ranks, whoever holds them.
    """

    rank: int
    vocabulary: str
    shards: tuple[Shard, ...]
    order: tuple[int, ...] = ()
    patches: tuple[Patch, ...] = ()
    leading: tuple[Leading, ...] = ()

    @property
    def named(self) -> frozenset[int]:
        """The sources that the round is to carry, where it does not carry all."""
        return frozenset([s.source for s in self.shards] + [lead.source for lead in self.leading])


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


# --- lanes -------------------------------------------------------------------------------------------


class _Filling:
    """Buckets of one lane, filled in order."""

    def __init__(self, bucket_bytes: int) -> None:
        self._limit = bucket_bytes
        self._copies: list[Copy] = []
        self._nbytes = self._room = 0
        self._buckets: list[Bucket] = []

    def add(self, piece: Piece, shard: int, target: int, itemsize: int, packed: int) -> None:
        """``packed`` is the target's item size: Gloo's buffers hold its dtype, which may be the wider one."""
        wide = max(itemsize, packed)
        for part in _fit(piece, self._limit // wide):
            size, src_offset, src_stride, dst_offset, dst_stride = part
            numel = math.prod(size)
            if self._copies and self._room + numel * wide > self._limit:
                self._flush()
            self._copies.append(
                Copy(
                    shard=shard,
                    target=target,
                    size=size,
                    src_offset=src_offset,
                    src_stride=src_stride,
                    dst_offset=dst_offset,
                    dst_stride=dst_stride,
                )
            )
            self._nbytes += numel * itemsize
            self._room += numel * wide

    def _flush(self) -> None:
        bucket = Bucket(index=len(self._buckets), nbytes=self._nbytes, copies=tuple(self._copies))
        self._buckets.append(bucket)
        self._copies, self._nbytes, self._room = [], 0, 0

    def finish(self) -> tuple[Bucket, ...]:
        if self._copies:
            self._flush()
        return tuple(self._buckets)


def _fit(piece: Piece, limit: int) -> Iterator[Piece]:
    """Cut a piece into parts of at most ``limit`` elements (or 1), along its longest outer dim."""
    if piece.numel <= max(limit, 1):
        yield piece
        return
    outer = range(len(piece.size) - 1)
    j = max(outer, key=lambda i: (piece.size[i], -i), default=0)
    if piece.size[j] == 1:
        j = len(piece.size) - 1
    count = piece.size[j]
    chunk = max(1, limit // (piece.numel // count))
    for first in range(0, count, chunk):
        part = piece._replace(
            size=(*piece.size[:j], min(chunk, count - first), *piece.size[j + 1 :]),
            src_offset=piece.src_offset + first * piece.src_stride[j],
            dst_offset=piece.dst_offset + first * piece.dst_stride[j],
        )
        yield from _fit(part, limit)


def _span(source: Source, held: Held) -> tuple[int, int]:
    """First element of a box in the flat source, and the one after its last; at least between these."""
    if held.head_dim:
        return 0, source.numel
    strides = row_major(source.shape)
    first = sum(lo * stride for lo, stride in zip(held.offset, strides, strict=True))
    return first, first + 1 + sum((n - 1) * s for n, s in zip(held.shape, strides, strict=True))


class _Builder:
    """Routes writes to trainer ranks. Every choice follows from the arguments alone, so all ranks agree."""

    def __init__(
        self,
        sources: Sequence[Source],
        held: dict[int, tuple[Held, ...]],
        faults: Faults,
        bucket_bytes: int,
        trainers: Sequence[int],
        patched: frozenset[int],
        leading: dict[int, tuple[int, ...]],
    ) -> None:
        self._sources, self._held, self._faults = sources, held, faults
        self._patched = patched
        self._leading = leading
        self._bucket_bytes = bucket_bytes
        self._load = dict.fromkeys(trainers, 0)
        self._fillings: dict[tuple[int, int], _Filling] = {}
        # Layers repeat: the same write of a source cut the same way need be worked out only once.
        self._pieces: dict[tuple[object, ...], list[tuple[int, list[Piece], int]]] = {}
        self._geometry: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._geometries: dict[tuple[object, ...], tuple[int, list[tuple[int, int]]]] = {}
        self._gaps: dict[int, set[int]] = {}

    def add(self, inference: int, write: Write, target: Target) -> None:
        """Route one write of one inference rank."""
        source, boxes = write.source, self._held.get(write.source, ())
        if write.numel == 0:
            return
        if not boxes:
            if source not in self._faults.sources:
                self._faults.add(source, "held by none of them", self._load)
            return
        dtype = boxes[0].dtype
        if dtype != target.dtype and (dtype, target.dtype) not in CASTS:
            text = f"held as {dtype}, which is not cast to {target.dtype} (of {target.name})"
            self._faults.add(source, text, [t for held in boxes for t in held.trainers])
            return
        try:
            routes = self._route(write, target, boxes)
        except MappingError as err:
            self._faults.add(source, f"cannot serve inference rank {inference}: {err}", self._load)
            return
        if source not in self._patched and sum(numel for _, _, numel in routes) != self._due(write, target):
            self._gaps.setdefault(source, set()).add(inference)
            return
        itemsize = ITEMSIZE[dtype]
        for index, pieces, numel in routes:
            trainer, shard = self._least_loaded(boxes[index])
            self._load[trainer] += numel * itemsize
            filling = self._fillings.get((inference, trainer))
            if filling is None:
                filling = self._fillings[inference, trainer] = _Filling(self._bucket_bytes)
            for piece in pieces:
                filling.add(piece, shard, write.target, itemsize, ITEMSIZE[target.dtype])

    def _due(self, write: Write, target: Target) -> int:
        """How many elements of a write must be held by somebody."""
        if (shape := self._leading.get(write.source)) is None:
            return write.numel
        boxed = box_write(write, self._sources[write.source], target=target.name)
        return sum(piece.numel for piece in intersect(boxed, (0,) * len(shape), shape))

    def _least_loaded(self, held: Held) -> tuple[int, int]:
        if len(held.holders) == 1:
            return held.holders[0]
        return min(held.holders, key=lambda holder: (self._load[holder[0]], holder[0]))

    def _route(
        self, write: Write, target: Target, boxes: Sequence[Held]
    ) -> list[tuple[int, list[Piece], int]]:
        """Per box that serves a part of the write: its index, the pieces and their elements."""
        source = write.source
        if source not in self._geometry:
            shapes = (
                self._sources[source].shape,
                boxes[0].head_dim,
                *((held.offset, held.shape) for held in boxes),
            )
            if shapes not in self._geometries:
                spans = [_span(self._sources[source], held) for held in boxes]
                self._geometries[shapes] = (len(self._geometries), spans)
            self._geometry[source] = self._geometries[shapes]
        geometry, spans = self._geometry[source]
        key = (
            geometry,
            write.size,
            write.src_offset,
            write.src_stride,
            write.dst_offset,
            write.dst_stride,
        )
        if (routes := self._pieces.get(key)) is None:
            boxed = box_write(write, self._sources[source], target=target.name, head_dim=boxes[0].head_dim)
            last = sum((n - 1) * stride for n, stride in zip(write.size, write.src_stride, strict=True))
            cut = [
                (i, intersect(boxed, held.offset, held.shape))
                for i, (held, (start, end)) in enumerate(zip(boxes, spans, strict=True))
                if start <= write.src_offset + last and write.src_offset < end
            ]
            routes = [(i, pieces, sum(p.numel for p in pieces)) for i, pieces in cut if pieces]
            self._pieces[key] = routes
        return routes

    def lanes(self) -> tuple[Lane, ...]:
        """Everything routed so far."""
        for source, ranks in self._gaps.items():
            boxes = self._held[source]
            shown = ", ".join(map(str, boxes[:SHOWN_BOXES])) + (", .." if len(boxes) > SHOWN_BOXES else "")
            shape = self._sources[source].shape
            text = f"held only in {shown} of its shape {shape}, too little for inference {name_ranks(ranks)}"
            self._faults.add(source, text, [t for held in boxes for t in held.trainers])
        return tuple(
            Lane(trainer=trainer, inference=inference, buckets=filling.finish())
            for (inference, trainer), filling in sorted(self._fillings.items(), key=lambda item: item[0])
        )


def build_plan(
    mapping: Mapping, layouts: Sequence[Layout], *, bucket_bytes: int, only: frozenset[int] | None = None
) -> Plan:
    """Decide which trainer rank sends which of its elements where, in which bucket.

    Where several trainer ranks hold the same box, the one with the fewest bytes so far sends it.

    Args:
        mapping: what the inference ranks need.
        layouts: what each trainer rank holds, in any order.
        bucket_bytes: the most bytes in a bucket, in the trainer's dtypes or the server's, whichever are
            wider; larger copies are cut.
        only: the sources (indices) of a partial round; None for all.

    Raises:
        ConfigError: ``bucket_bytes`` is not positive.
        TopologyError: there are no layouts, two of one rank, or different vocabularies.
        MappingError: an element that is needed is held by nobody, or boxes overlap without being equal, or
            shapes or dtypes do not fit, or ranks handed over different sources or patches; lists every fault
            found.
    """
    if bucket_bytes <= 0:
        raise ConfigError(f"bucket_bytes is {bucket_bytes}; a bucket must hold at least one byte")
    ordered = sorted(layouts, key=lambda layout: layout.rank)
    vocabulary = mapping.vocabulary(_common_vocabulary(ordered))
    sources = vocabulary.sources
    check_order(ordered, sources)
    faults = Faults(sources)
    held = find_held(ordered, sources, only, faults)
    patched, leading = check_patches(ordered, faults), check_leading(ordered, faults)
    trainers = [layout.rank for layout in ordered]
    builder = _Builder(sources, held, faults, bucket_bytes, trainers, patched, leading)
    for rank_map in sorted(mapping.ranks, key=lambda r: r.rank):
        if vocabulary.name not in rank_map.writes:
            raise MappingError(
                f"inference rank {rank_map.rank} of {mapping.model!r} knows no vocabulary "
                f"{vocabulary.name!r}, so nothing sent under it would reach that rank"
            )
        for write in rank_map.writes[vocabulary.name]:
            if only is None or write.source in only:
                builder.add(rank_map.rank, write, rank_map.targets[write.target])
    lanes = builder.lanes()
    faults.check(mapping.model)
    agreed = (
        mapping.digest or compute_digest(mapping),
        ordered,
        bucket_bytes,
        None if only is None else sorted(only),
        lanes,
    )
    return Plan(
        lanes=lanes,
        num_buckets=max((len(lane.buckets) for lane in lanes), default=0),
        total_bytes=sum(bucket.nbytes for lane in lanes for bucket in lane.buckets),
        digest=blake3.blake3(msgspec.msgpack.encode(agreed)).digest(DIGEST_BYTES),
    )


def _common_vocabulary(layouts: Sequence[Layout]) -> str:
    if not layouts:
        raise TopologyError("no trainer rank has said what it holds, so there is nothing to plan")
    ranks = [layout.rank for layout in layouts]
    if len(set(ranks)) != len(ranks):
        twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
        raise TopologyError(
            f"trainer {name_ranks(twice)} sent more than one layout; each rank sends exactly one"
        )
    names: dict[str, list[int]] = {}
    for layout in layouts:
        names.setdefault(layout.vocabulary, []).append(layout.rank)
    if len(names) > 1:
        listing = "; ".join(f"{name!r} on {name_ranks(found)}" for name, found in names.items())
        raise TopologyError(f"trainer ranks name their weights by different vocabularies: {listing}")
    return layouts[0].vocabulary
