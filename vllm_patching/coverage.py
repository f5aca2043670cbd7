"""Proof that a trace writes every live element exactly once, or an account of where it does not.

Regions are swept per storage, as intervals; strided regions are swept one period at a time, so nothing of
the size of the weights is ever built.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

from bridge.errors import MappingError
from vllm_patching.affine import extent
from vllm_patching.tracing import LiveTensor, Trace, TracedFill, TracedWrite


class _Kind(enum.IntEnum):
    WANTED = 0
    WRITTEN = 1
    FILLED = 2


@dataclasses.dataclass(frozen=True)
class _Region:
    """Elements ``offset + sum(i * stride)``; dims are (count, stride), strides falling, the last one 1."""

    kind: _Kind
    offset: int
    dims: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        return self.offset + sum((count - 1) * stride for count, stride in self.dims) + 1


@dataclasses.dataclass
class _Tally:
    """Element counts of one sweep."""

    uncovered: int = 0
    doubled: int = 0
    overwritten: int = 0  # written and filled

    def add(self, other: _Tally, times: int) -> None:
        self.uncovered += other.uncovered * times
        self.doubled += other.doubled * times
        self.overwritten += other.overwritten * times


@dataclasses.dataclass(frozen=True)
class Gap:
    """A live tensor (or several sharing memory) that the trace does not write exactly once."""

    names: tuple[str, ...]
    numel: int
    uncovered: int
    doubled: int
    overwritten: int

    def __str__(self) -> str:
        faults = [
            f"{count} of {self.numel} elements {what}"
            for count, what in (
                (self.uncovered, "never written"),
                (self.doubled, "written more than once"),
                (self.overwritten, "written and then overwritten by a constant"),
            )
            if count
        ]
        return f"{' = '.join(self.names)}: {'; '.join(faults)}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The verdict on one trace.

    ``derived`` are tensors that vLLM's own load does not write either (attention scales, rotary tables): an
    update keeps them as they are. ``faults`` lists every gap and every refused transform, as sentences.
    """

    gaps: tuple[Gap, ...]
    derived: tuple[str, ...]
    faults: tuple[str, ...]

    def check(self, vocabulary: str) -> None:
        """Refuse a trace that would leave part of the model behind.

        Raises:
            MappingError: lists every fault.
        """
        if self.faults:
            listing = "\n  ".join(self.faults)
            raise MappingError(
                f"the {vocabulary} names cannot update this model exactly, {len(self.faults)} fault(s):\n"
                f"  {listing}"
            )


def find_gaps(trace: Trace, tensors: Sequence[LiveTensor], *, own_load: Trace | None) -> Coverage:
    """Sweep every storage of the model.

    Args:
        trace: what the names to be judged would write.
        tensors: ``tracing.live_tensors`` of the same model.
        own_load: the trace of the checkpoint's own names (``trace`` itself, if it is that one). Tensors that
            neither writes at all are derived. None if the model was not loaded from a checkpoint (dummy
            weights): then unwritten parameters are faults, and only unwritten buffers are derived.

    Returns:
        All gaps, not just the first.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    regions: dict[str, list[_Region]] = defaultdict(list)
    orders: dict[str, list[tuple[int, _Region]]] = defaultdict(list)
    kinds: list[tuple[_Kind, Sequence[TracedWrite | TracedFill]]] = [
        (_Kind.WRITTEN, trace.writes),
        (_Kind.FILLED, trace.fills),
    ]
    for kind, records in kinds:
        for record in records:
            base = by_name[record.target].offset + record.dst_offset
            region = _region(kind, base, record.size, record.dst_stride)
            regions[record.target].append(region)
            orders[record.target].append((record.order, region))
    touched_before: set[str] = set()
    if own_load is not None:
        for touched in (own_load.writes, own_load.fills, own_load.refused):
            touched_before |= {record.target for record in touched}
    refused = {refusal.target for refusal in trace.refused}
    gaps: list[Gap] = []
    derived: list[str] = []
    for group in _groups(tensors):
        found = [region for tensor in group for region in regions[tensor.name]]
        names = tuple(itertools.chain.from_iterable((t.name, *t.aliases) for t in group))
        is_parameter = any(tensor.is_parameter for tensor in group)
        expected = refused | touched_before
        required = is_parameter if own_load is None else any(t.name in expected for t in group)
        if not found and not required and refused.isdisjoint(t.name for t in group):
            derived += names
            continue
        if not refused.isdisjoint(t.name for t in group) and not found:
            continue  # the refusal says more than that nothing was written
        ordered = [item for tensor in group for item in orders[tensor.name]]
        if gap := _gap(group, names, found, ordered):
            gaps.append(gap)
    faults = [str(refusal) for refusal in trace.refused] + [str(gap) for gap in gaps]
    return Coverage(gaps=tuple(gaps), derived=tuple(derived), faults=tuple(faults))


def _gap(
    group: Sequence[LiveTensor],
    names: tuple[str, ...],
    found: list[_Region],
    ordered: list[tuple[int, _Region]],
) -> Gap | None:
    wanted = [_region(_Kind.WANTED, t.offset, t.shape, t.stride) for t in group if 0 not in t.shape]
    tally = _sweep([*wanted, *found])
    overwritten = _count_late_fills(ordered) if tally.overwritten else 0
    if not (tally.uncovered or tally.doubled or overwritten):
        return None
    numel = _sweep(wanted).uncovered
    return Gap(names, numel, tally.uncovered, tally.doubled, overwritten)


def _count_late_fills(ordered: list[tuple[int, _Region]]) -> int:
    """Elements that were filled after they had been written; the other way round is how padding works."""
    total = 0
    for order, fill in ordered:
        if fill.kind is _Kind.FILLED:
            earlier = [region for at, region in ordered if at < order and region.kind is _Kind.WRITTEN]
            total += _sweep([*earlier, fill]).overwritten
    return total


def _groups(tensors: Iterable[LiveTensor]) -> Iterable[list[LiveTensor]]:
    """Tensors whose memory may overlap, together; all others alone. Empty tensors are left out."""
    storages: dict[int, list[tuple[int, int, LiveTensor]]] = defaultdict(list)
    for tensor in tensors:
        first, end = extent(tensor.shape, tensor.stride, tensor.offset)
        if end > first:
            storages[tensor.storage].append((first, end, tensor))
    for members in storages.values():
        members.sort(key=lambda member: member[0])
        group, reach = [members[0][2]], members[0][1]
        for first, end, tensor in members[1:]:
            if first >= reach:
                yield group
                group = []
            group.append(tensor)
            reach = max(reach, end)
        yield group


def _region(kind: _Kind, offset: int, size: Sequence[int], stride: Sequence[int]) -> _Region:
    """In normal form: falling strides, merged where contiguous, down to a run of stride 1."""
    merged: list[tuple[int, int]] = []
    for count, step in sorted(zip(size, stride, strict=True), key=lambda d: d[1], reverse=True):
        if count == 1 or step == 0:
            continue
        if merged and merged[-1][1] == count * step:
            merged[-1] = (merged[-1][0] * count, step)
        else:
            merged.append((count, step))
    if not merged or merged[-1][1] != 1:
        merged.append((1, 1))
    return _Region(kind, offset, tuple(merged))


def _sweep(regions: Sequence[_Region]) -> _Tally:
    """Count elements by how often they are wanted, written and filled."""
    periods = [region.dims[0][1] for region in regions if len(region.dims) > 1]
    if not periods:
        return _sweep_runs(regions)
    return _sweep_rows(regions, max(periods))


def _sweep_runs(regions: Sequence[_Region]) -> _Tally:
    events: list[tuple[int, int, int]] = []
    for region in regions:
        events.append((region.offset, 1, region.kind))
        events.append((region.offset + region.dims[0][0], -1, region.kind))
    events.sort()
    tally, counts, previous = _Tally(), [0, 0, 0], 0
    for position, change, kind in events:
        wanted, written, filled = counts
        length = position - previous
        if wanted and not written and not filled:
            tally.uncovered += length
        if written > 1:
            tally.doubled += length
        if written and filled:
            tally.overwritten += length
        counts[kind] += change
        previous = position
    return tally


def _sweep_rows(regions: Sequence[_Region], period: int) -> _Tally:
    """Fold the line into rows of ``period`` elements and sweep each band of equal rows once."""
    bands: list[tuple[int, int, _Region]] = []
    for region in regions:
        bands += _fold(region, period)
    edges = sorted({edge for start, stop, _ in bands for edge in (start, stop)})
    opening: dict[int, list[tuple[int, _Region]]] = defaultdict(list)
    for start, stop, region in bands:
        opening[start].append((stop, region))
    total, active = _Tally(), list[tuple[int, _Region]]()
    for top, bottom in itertools.pairwise(edges):
        active = [(stop, region) for stop, region in active if stop > top] + opening[top]
        total.add(_sweep([region for _, region in active]), bottom - top)
    return total


def _fold(region: _Region, period: int) -> Iterable[tuple[int, int, _Region]]:
    """(first row, one past the last, the region within such a row); cut where a region crosses rows."""
    (count, stride), *inner = region.dims
    row, column = divmod(region.offset, period)
    width = region.end - region.offset - (count - 1) * stride  # of one step of the outermost dimension
    if region.offset // period == (region.end - 1) // period:
        yield row, row + 1, _Region(region.kind, column, region.dims)
    elif stride == period and column + width <= period:
        yield row, row + count, _Region(region.kind, column, tuple(inner))
    elif len(region.dims) == 1:
        start, end = region.offset, region.end
        head = min(end, (row + 1) * period)
        if column:
            yield row, row + 1, _Region(region.kind, column, ((head - start, 1),))
            start, row = head, row + 1
        full = (end - start) // period
        if full:
            yield row, row + full, _Region(region.kind, 0, ((period, 1),))
        if rest := (end - start) % period:
            yield row + full, row + full + 1, _Region(region.kind, 0, ((rest, 1),))
    else:
        for index in range(count):
            yield from _fold(_Region(region.kind, region.offset + index * stride, tuple(inner)), period)
