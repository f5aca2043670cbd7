"""Who holds what: the trainer ranks' shards by source, checked and reduced to disjoint boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bridge.errors import MappingError
from bridge.protocol.mapping import ITEMSIZE, Source
from bridge.protocol.region import row_major

if TYPE_CHECKING:  # plan.py imports this module
    from bridge.protocol.plan import Layout, Shard

_Place = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape
_FLOATS = ("bfloat16", "float16")
CASTS = frozenset(
    [("float64", to) for to in ("float32", *_FLOATS)]
    + [("float32", to) for to in _FLOATS]
    + [(wide, "float32") for wide in _FLOATS]
)  # trainer dtype -> target dtype, besides equal ones


@dataclass(slots=True)
class Held:
    """One box of a source, with the trainer ranks that hold it and their shard's index."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    head_dim: int = 0
    holders: list[tuple[int, int]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    @property
    def form(self) -> str:
        """What all boxes of a source must agree in."""
        return _form(self.dtype, self.head_dim)

    @property
    def trainers(self) -> list[int]:
        """Ranks of the holders, ascending."""
        return [trainer for trainer, _ in self.holders]

    def __str__(self) -> str:
        return f"[{', '.join(f'{o}:{o + n}' for o, n in zip(self.offset, self.shape, strict=True))}]"


class Faults:
    """Faults by source, in the order of the sources; equal sentences are joined over trainer ranks."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._found: dict[tuple[int, str], set[int]] = {}
        self.sources: set[int] = set()

    def name(self, source: int) -> str:
        """What the trainer calls a source."""
        known = 0 <= source < len(self._sources)
        return self._sources[source].name if known else f"source {source} of {len(self._sources)}"

    def add(self, source: int, text: str, trainers: Iterable[int]) -> None:
        """Note that ``text`` holds for ``source`` as far as ``trainers`` have it."""
        self._found.setdefault((source, text), set()).update(trainers)
        self.sources.add(source)

    def check(self, model: str) -> None:
        """Raise what was found, if anything."""
        if not self._found:
            return
        lines = sorted((s, text, sorted(ranks)) for (s, text), ranks in self._found.items())
        listing = "\n  ".join(
            f"{self.name(s)} (trainer {name_ranks(ranks)}): {text}" for s, text, ranks in lines
        )
        raise MappingError(
            f"the trainer's weights do not fit the server's model {model!r}, {len(lines)} fault(s):\n  "
            f"{listing}"
        )


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks for a message, as in ``rank 3`` or ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{'rank' if len(runs) == 1 and len(runs[0]) == 1 else 'ranks'} {text}"


def _shard_fault(shard: Shard, sources: Sequence[Source]) -> str:
    if not 0 <= shard.source < len(sources):
        return "is sent, but the vocabulary has no such source"
    shape = sources[shard.source].shape
    if not len(shard.offset) == len(shard.shape) == len(shape):
        return f"a shard has shape {shard.shape} and offset {shard.offset}, but its shape is {shape}"
    fits = all(
        lo >= 0 and n >= 0 and lo + n <= whole
        for lo, n, whole in zip(shard.offset, shard.shape, shape, strict=True)
    )
    if not fits:
        return f"a shard of shape {shard.shape} at {shard.offset} lies outside its shape {shape}"
    if shard.dtype not in ITEMSIZE:
        return f"its dtype {shard.dtype!r} is not one the bridge knows"
    if shard.head_dim and (
        shard.head_dim < 0 or shard.head_dim % 2 or not shape or shape[0] % shard.head_dim
    ):
        return f"its halves are interleaved in heads of {shard.head_dim} rows, but its shape is {shape}"
    return ""


def _form(dtype: str, head_dim: int) -> str:
    return f"{dtype}, halves interleaved in heads of {head_dim} rows" if head_dim else dtype


def _all(layouts: Sequence[Layout]) -> list[int]:
    return [layout.rank for layout in layouts]


def _group(
    layouts: Sequence[Layout], sources: Sequence[Source], only: frozenset[int] | None, faults: Faults
) -> dict[int, dict[_Place, Held]]:
    """Per source its distinct boxes, by place; empty ones (FSDP2 over short dims) hold nothing."""
    tables: dict[int, dict[_Place, Held]] = {}
    for layout in layouts:
        for index, shard in enumerate(layout.shards):
            if only is not None and shard.source not in only:
                continue
            if fault := _shard_fault(shard, sources):
                faults.add(shard.source, fault, [layout.rank])
                continue
            if 0 in shard.shape:
                continue
            table = tables.setdefault(shard.source, {})
            held = table.get((shard.offset, shard.shape))
            if held is None:
                held = Held(shard.offset, shard.shape, shard.dtype, shard.head_dim)
                table[shard.offset, shard.shape] = held
            if not held.holders or held.holders[-1][0] != layout.rank:
                held.holders.append((layout.rank, index))
            if (form := _form(shard.dtype, shard.head_dim)) != held.form:
                text = f"held as {form}, but by rank {held.trainers[0]} as {held.form}"
                faults.add(shard.source, text, [layout.rank])
    return tables


def check_order(layouts: Sequence[Layout], sources: Sequence[Source]) -> None:
    """Ranks that hand tensors over one by one must name the same ones in the same order.

    Another order is no harm to the plan, but gathers that ranks call in different orders mix tensors up.

    Raises:
        MappingError: they do not; names the first difference of each group of ranks from the first group.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for layout in layouts:
        groups.setdefault(layout.order, []).append(layout.rank)
    (order, ranks), *others = groups.items()
    lines = []
    for other, differing in others:
        first = next(
            (i for i, (a, b) in enumerate(zip(order, other, strict=False)) if a != b),
            min(len(order), len(other)),
        )
        theirs, ours = (_handed(found, first, sources) for found in (other, order))
        lines.append(
            f"number {first + 1}: trainer {name_ranks(differing)} handed over {theirs}, "
            f"trainer {name_ranks(ranks)} {ours}"
        )
    if lines:
        listing = "\n  ".join(lines)
        raise MappingError(
            f"trainer ranks handed over different parameters in one round:\n  {listing}\nCall update_weight "
            "on every rank with the same names in the same order"
        )


def check_patches(layouts: Sequence[Layout], faults: Faults) -> frozenset[int]:
    """The sources that are patched. Ranks share a patch by its order, so all must have the same one."""
    first = {patch.source: patch.digest for patch in layouts[0].patches}
    patched = set(first)
    for layout in layouts[1:]:
        theirs = {patch.source: patch.digest for patch in layout.patches}
        for source in first.keys() | theirs.keys():
            if theirs.get(source) != first.get(source):
                text = f"its patch names other elements than on rank {layouts[0].rank}; pass the same to all"
                faults.add(source, text, [layout.rank])
        patched |= theirs.keys()
    return frozenset(patched)


def check_leading(layouts: Sequence[Layout], faults: Faults) -> dict[int, tuple[int, ...]]:
    """The shapes of sources of which only the leading part is sent; ranks must have the same adapter."""
    first = {lead.source: lead.shape for lead in layouts[0].leading}
    for layout in layouts[1:]:
        theirs = {lead.source: lead.shape for lead in layout.leading}
        for source in first.keys() | theirs.keys():
            if theirs.get(source) != first.get(source):
                here, there = (found.get(source, "absent") for found in (theirs, first))
                text = f"is {here} in this rank's adapter, {there} in that of rank {layouts[0].rank}"
                faults.add(source, text, [layout.rank])
    return first


def _handed(order: Sequence[int], index: int, sources: Sequence[Source]) -> str:
    if index >= len(order):
        return f"no more than {len(order)}"
    known = 0 <= order[index] < len(sources)
    return sources[order[index]].name if known else f"source {order[index]} of {len(sources)}"


def find_held(
    layouts: Sequence[Layout], sources: Sequence[Source], only: frozenset[int] | None, faults: Faults
) -> dict[int, tuple[Held, ...]]:
    """Per source the boxes to take it from: disjoint, in order of offset.

    Args:
        layouts: in order of rank.
        sources: the vocabulary's.
        only: the sources to look at; None for all.
        faults: takes what is wrong; sources whose boxes overlap are left out of the result.
    """
    for index in only or ():
        if not 0 <= index < len(sources):
            faults.add(index, "is to be sent, but the vocabulary has no such source", _all(layouts))
    tables = _group(layouts, sources, only, faults)
    chosen: dict[tuple[object, ...], tuple[int, ...] | None] = {}
    found: dict[int, tuple[Held, ...]] = {}
    for source, table in tables.items():
        boxes = sorted(table.values(), key=lambda held: (held.offset, held.shape))
        key = (sources[source].shape, *sorted(table))
        if key not in chosen:  # layers repeat, so few geometries are ever looked at
            chosen[key] = _choose(boxes, sources[source].shape)
        if (picked := chosen[key]) is None:
            shape = sources[source].shape
            one, other = next(_overlaps(boxes, shape))
            text = f"{one} and {other} of its shape {shape} overlap without being equal"
            faults.add(source, text, one.trainers + other.trainers)
        else:
            found[source] = tuple(boxes[i] for i in picked)
            _check_forms(source, found[source], faults)
    return found


def _check_forms(source: int, boxes: Sequence[Held], faults: Faults) -> None:
    for held in boxes:
        if held.form != boxes[0].form:
            text = f"held as {held.form}, but by rank {boxes[0].trainers[0]} as {boxes[0].form}"
            faults.add(source, text, held.trainers)


def _choose(boxes: Sequence[Held], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Indices of disjoint boxes to use: parts that make up the whole, else the whole, else what there is."""
    numel = math.prod(shape)
    parts = [i for i, held in enumerate(boxes) if held.numel < numel]
    wholes = [i for i, held in enumerate(boxes) if held.numel == numel]
    disjoint = next(_overlaps([boxes[i] for i in parts], shape), None) is None
    if wholes and not (disjoint and sum(boxes[i].numel for i in parts) == numel):
        return (wholes[0],)
    return tuple(parts) if disjoint else None


def _overlaps(boxes: Sequence[Held], shape: tuple[int, ...]) -> Iterator[tuple[Held, Held]]:
    """Pairs of boxes of ``shape`` that share an element; ``boxes`` in order of offset."""
    strides = row_major(shape)
    starts = [_dot(held.offset, strides) for held in boxes]
    for i, one in enumerate(boxes):
        last = starts[i] + _dot([n - 1 for n in one.shape], strides)
        for j in range(i + 1, len(boxes)):
            if starts[j] > last:  # as all that follow it
                break
            other = boxes[j]
            apart = any(
                a + n <= b or b + m <= a
                for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
            )
            if not apart:
                yield one, other


def _dot(counts: Sequence[int], strides: Sequence[int]) -> int:
    return sum(n * stride for n, stride in zip(counts, strides, strict=True))
