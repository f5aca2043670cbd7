"""The older bridge's view of a mapping: one row per checkpoint tensor, with its tensor-parallel dimension."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bridge.protocol.mapping import ParamMapping, RankMap, Source, Vocabulary, Write


def param_mappings(vocabulary: Vocabulary, ranks: Sequence[RankMap]) -> dict[str, ParamMapping]:
    """Rows for every used source, from what the first rank that holds any of it receives."""
    holders: dict[int, RankMap] = {}
    writes: defaultdict[int, list[Write]] = defaultdict(list)
    for rank in ranks:
        for write in rank.writes[vocabulary.name]:
            if holders.setdefault(write.source, rank) is rank:
                writes[write.source].append(write)
    rows = {}
    for index, source in enumerate(vocabulary.sources):
        if index not in writes:
            continue
        local = local_shape(source, writes[index])
        sharded = [
            dim for dim, (whole, part) in enumerate(zip(source.shape, local, strict=True)) if part < whole
        ]
        rows[source.name] = ParamMapping(
            vllm_name=holders[index].targets[writes[index][0].target].name,
            shape=source.shape,
            local_shape=local,
            dtype=source.dtype,
            tp_shard_dim=sharded[0] if sharded else None,
        )
    return rows


def local_shape(source: Source, writes: Sequence[Write]) -> tuple[int, ...]:
    """Extent, per dimension of the source, of the elements that ``writes`` read."""
    low, high = list(source.shape), [0] * len(source.shape)
    for write in writes:
        for dim, (start, stop) in enumerate(_extent(source.shape, write)):
            low[dim], high[dim] = min(low[dim], start), max(high[dim], stop)
    return tuple(max(0, stop - start) for start, stop in zip(low, high, strict=True))


def _extent(shape: Sequence[int], write: Write) -> list[tuple[int, int]]:
    """Per dimension, the first index read and one past the last."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    starts, rest = [], write.src_offset
    for stride in strides:
        starts.append(rest // stride)
        rest %= stride
    stops = [start + 1 for start in starts]
    for size, step in zip(write.size, write.src_stride, strict=True):
        reach = (size - 1) * step
        for dim, stride in enumerate(strides):
            moved = reach // stride
            if moved and stops[dim] - 1 + moved >= shape[dim] and dim:
                # A run that was merged across dimensions covers the inner ones whole.
                starts[dim:], stops[dim:] = [0] * (len(shape) - dim), list(shape[dim:])
                break
            stops[dim] += moved
            reach -= moved * stride
    return list(zip(starts, [min(s, n) for s, n in zip(stops, shape, strict=True)], strict=True))
