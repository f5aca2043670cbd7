"""A server's live weights as a trainer's shards: its mapping read backwards.

The mapping says which part of which checkpoint tensor was written where. So what lies there now is that part
of it, and another server can be sent it by the same plans, transports and checksums as from a trainer,
whatever its own layout is. Most parts are boxes that lie in the half as they are, and need no copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bridge.errors import MappingError
from bridge.protocol.holders import CASTS
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.mapping import RankMap, Source, Write
from bridge.protocol.plan import Layout, Shard
from bridge.protocol.region import BROADCAST, Box, box_write, row_major
from bridge.sharding import LocalShards
from vllm_patching.lending import unreadable
from vllm_patching.staging import torch_dtype

Place = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape in the source
# A widening cast would make up digits that the trainer may have had otherwise.
_SAME_AS_SENT = frozenset(cast for cast in CASTS if cast[1] != "float32" or cast[0] == "float64")


@dataclass
class _Held:
    """What the halves hold of one source: boxes with their memory, and the writes to piece it together by."""

    dtypes: dict[str, str] = field(default_factory=dict)  # each with the name of a target that has it
    boxes: dict[Place, torch.Tensor] = field(default_factory=dict)
    writes: list[tuple[Write, torch.Tensor]] = field(default_factory=list)
    irregular: bool = False


def read_back(
    mapping: MappingDocument, halves: Sequence[torch.Tensor], wanted: MappingDocument
) -> LocalShards:
    """All that another server needs, as shards of a trainer of one rank.

    Args:
        mapping: of the server whose weights these are.
        halves: its live halves by rank, uint8 [arena_bytes]; shards are views of them where they can be, and
            copies in host memory where not, as of all that is on a GPU.
        wanted: the other server's.

    Raises:
        MappingError: it cannot be sent the same version: names or shapes differ, elements are held nowhere,
            or in a dtype that the other's are not made from; lists every fault.
    """
    if reason := unreadable(mapping):
        raise MappingError(f"the weights of {mapping.model!r} cannot be read back: {reason}")
    name = next((v.name for v in wanted.vocabularies if v.name in {o.name for o in mapping.vocabularies}), "")
    if not name:
        raise MappingError("the two servers have no vocabulary in common")
    own, theirs = mapping.vocabulary(name), wanted.vocabulary(name)
    held = _gather(mapping, name, halves)
    by_name = {source.name: index for index, source in enumerate(own.sources)}
    needed = _needed(wanted, name)
    faults: list[str] = []
    shards: list[Shard] = []
    tensors: list[torch.Tensor] = []
    for index, dtypes in sorted(needed.items()):
        source = theirs.sources[index]
        found = held.get(by_name.get(source.name, -1))
        fault = _fault(source, own.sources[by_name[source.name]] if found else None, found, dtypes)
        if fault or found is None:
            faults.append(f"{source.name}: {fault}")
            continue
        (dtype,) = found.dtypes
        try:
            boxes = _boxes(source, found)
        except MappingError as err:
            faults.append(str(err))
            continue
        for (offset, shape), tensor in boxes.items():
            shards.append(Shard(source=index, offset=offset, shape=shape, dtype=dtype))
            tensors.append(tensor.cpu().contiguous())
    if faults:
        listing = "\n  ".join(faults)
        raise MappingError(
            f"what {mapping.model!r} is served with is not what the other server needs, {len(faults)} "
            f"fault(s):\n  {listing}"
        )
    layout = Layout(rank=0, vocabulary=name, shards=tuple(shards))
    return LocalShards(layout, tensors, (True,) * len(tensors), lasting=False)


def _needed(wanted: MappingDocument, vocabulary: str) -> dict[int, set[str]]:
    """By source the dtypes of what it is written to."""
    needed: dict[int, set[str]] = {}
    for rank_map in wanted.ranks:
        for write in rank_map.writes.get(vocabulary, ()):
            if write.numel:
                needed.setdefault(write.source, set()).add(rank_map.targets[write.target].dtype)
    return needed


def _fault(source: Source, own: Source | None, found: _Held | None, dtypes: set[str]) -> str:
    if own is None or found is None:
        return "held by no rank"
    if own.shape != source.shape:
        return f"has shape {own.shape} here, {source.shape} there"
    if len(found.dtypes) > 1:
        return f"is held as {' and '.join(f'{d} ({name})' for d, name in found.dtypes.items())}"
    (dtype,) = found.dtypes
    if strange := sorted(d for d in dtypes if d != dtype and (dtype, d) not in _SAME_AS_SENT):
        return f"is held as {dtype}, and {strange[0]} made from that need not be what the trainer sent"
    return ""


def _gather(mapping: MappingDocument, vocabulary: str, halves: Sequence[torch.Tensor]) -> dict[int, _Held]:
    sources = mapping.vocabulary(vocabulary).sources
    held: dict[int, _Held] = {}
    for rank_map in mapping.ranks:
        for write in rank_map.writes.get(vocabulary, ()):
            if write.numel:
                flat = _flat(rank_map, write, halves[rank_map.rank])
                _add(held.setdefault(write.source, _Held()), sources[write.source], rank_map, write, flat)
    return held


def _flat(rank_map: RankMap, write: Write, half: torch.Tensor) -> torch.Tensor:
    target = rank_map.targets[write.target]
    return half[target.offset : target.offset + target.nbytes].view(torch_dtype(target.dtype))


def _add(held: _Held, source: Source, rank_map: RankMap, write: Write, flat: torch.Tensor) -> None:
    target = rank_map.targets[write.target]
    held.dtypes.setdefault(target.dtype, target.name)
    held.writes.append((write, flat))
    for box in box_write(write, source, target=target.name):
        made = _view(box, source, flat)
        if made is None:
            held.irregular = True
            return
        held.boxes.setdefault(made[0], made[1])


def _view(box: Box, source: Source, flat: torch.Tensor) -> tuple[Place, torch.Tensor] | None:
    """Place and memory of a boxed part; None where its indices of some dimension are no plain run."""
    shape, strides = [1] * len(source.shape), [0] * len(source.shape)
    for axis in box.axes:
        if axis.dim == BROADCAST:
            continue  # the same elements once more
        if axis.step != 1 or shape[axis.dim] != 1:
            return None
        shape[axis.dim], strides[axis.dim] = axis.length, axis.dst_stride
    first = int(flat.storage_offset()) + box.dst_offset
    return (box.start, tuple(shape)), flat.as_strided(shape, strides, first)


def _boxes(source: Source, held: _Held) -> dict[Place, torch.Tensor]:
    """Boxes of which none lies within another; one of the whole source where they cannot be had."""
    places = list(held.boxes)
    kept = [p for p in places if not any(p != q and _within(p, q) for q in places)]
    if not held.irregular and not any(_overlap(p, q) for p, q in _pairs(kept)):
        return {place: held.boxes[place] for place in kept}
    whole = _piece_together(source, held)
    return {((0,) * len(source.shape), source.shape): whole}


def _pairs(places: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    return ((p, q) for i, p in enumerate(places) for q in places[:i])


def _within(inner: Place, outer: Place) -> bool:
    ends = zip(*inner, *outer, strict=True)
    return all(low <= lo and lo + n <= low + extent for lo, n, low, extent in ends)


def _overlap(one: Place, other: Place) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))


def _piece_together(source: Source, held: _Held) -> torch.Tensor:
    """The whole source in host memory, out of what every write has put somewhere.

    Raises:
        MappingError: elements of it were written nowhere.
    """
    dtype = held.writes[0][1].dtype
    whole, there = torch.empty(source.numel, dtype=dtype), torch.zeros(source.numel, dtype=torch.bool)
    for write, flat in held.writes:
        size = [1 if stride == 0 else n for n, stride in zip(write.size, write.src_stride, strict=True)]
        first = int(flat.storage_offset()) + write.dst_offset
        view = (size, write.src_stride, write.src_offset)
        whole.as_strided(*view).copy_(flat.as_strided(size, write.dst_stride, first))
        there.as_strided(*view).fill_(True)
    if missing := source.numel - int(there.sum()):
        raise MappingError(f"{source.name}: {missing} of its {source.numel} elements are held by no rank")
    return whole.as_strided(source.shape, row_major(source.shape))
