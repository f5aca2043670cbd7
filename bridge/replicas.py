"""Whether trainer ranks that hold the same part of a parameter hold the same numbers in it.

The plan takes each part from whichever of its holders has the least to send. Where replicas differ, what is
served would be a patchwork of them, which is nobody's model: before an average (LocalSGD, DiLoCo), where a
checkpoint was loaded on one rank after DDP had wrapped the model, where a buffer is updated by each rank for
itself, or where a tensor that was split by hand is declared as whole.

So each rank says with its layout what its parts add up to, and rank 0 compares before a byte is sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from bridge.errors import MappingError, ProtocolError
from bridge.protocol.holders import name_ranks
from bridge.protocol.mapping import Source
from bridge.protocol.plan import Layout, Shard
from bridge.wire.checksum import as_bytes

_WORD_BYTES, _PIECE_BYTES = 8, 64 << 20
ADVICE = (
    "Replicas must be equal when they are sent, or what is served is nobody's model: average them before the "
    "broadcast, load a checkpoint on every rank, name a dimension that was split by hand in tp_shard_dim. "
    "BRIDGE_COMPARE_REPLICAS=never sends each part from whichever rank has the least to send"
)


def sums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """What each tensor's memory adds up to, read as 64-bit words, modulo 2**64.

    Training that went apart changes words all over, which a sum shows; an exchange of words is no such thing.
    One pass over the memory, on the device where it is, on a stream of its own; contiguous tensors are not
    copied.
    """
    with torch.no_grad(), ExitStack() as streams:
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            streams.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]
        found = [_sum(tensor.detach()) for tensor in tensors]
        if len({value.device for value in found}) > 1:  # some are offloaded
            found = [value.cpu() for value in found]
        return torch.stack(found).tolist() if found else []


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    parts = []
    for piece in torch.split(as_bytes(tensor.contiguous()), _PIECE_BYTES):
        aligned = piece if piece.storage_offset() % _WORD_BYTES == 0 else piece.clone()
        whole = aligned.numel() - aligned.numel() % _WORD_BYTES
        parts.append(aligned[:whole].view(torch.int64).sum())
        if whole < aligned.numel():
            parts.append(aligned[whole:].sum(dtype=torch.int64))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def compare(layouts: Sequence[Layout], added: Sequence[Sequence[int]], sources: Sequence[Source]) -> int:
    """Compare what several ranks hold alike; returns how many parts those are.

    Args:
        layouts: by rank.
        added: what ``sums`` made of each rank's shards, in their order.
        sources: of the vocabulary that the layouts are named by.

    Raises:
        MappingError: some parts differ; names each, with the ranks that agree.
        ProtocolError: a rank's sums are not those of its layout.
    """
    held: defaultdict[Shard, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for layout, theirs in zip(layouts, added, strict=True):
        if len(theirs) != len(layout.shards):
            raise ProtocolError(
                f"trainer rank {layout.rank} holds {len(layout.shards)} parts, and said what {len(theirs)} "
                "add up to"
            )
        for shard, value in zip(layout.shards, theirs, strict=True):
            if 0 not in shard.shape:
                held[shard][value].append(layout.rank)
    differing = {shard: values for shard, values in held.items() if len(values) > 1}
    if differing:
        lines = [
            f"{sources[shard.source].name}{_box(shard, sources)}: "
            + " differs from ".join(f"trainer {name_ranks(ranks)}" for ranks in values.values())
            for shard, values in sorted(differing.items(), key=lambda item: (item[0].source, item[0].offset))
        ]
        listing = "\n  ".join(lines)
        raise MappingError(
            f"{len(differing)} part(s) of the model differ between trainer ranks that hold the same one:\n  "
            f"{listing}\n{ADVICE}"
        )
    return sum(len(ranks) > 1 for values in held.values() for ranks in values.values())


def _box(shard: Shard, sources: Sequence[Source]) -> str:
    if tuple(shard.shape) == tuple(sources[shard.source].shape):
        return ""
    return f"[{', '.join(f'{lo}:{lo + n}' for lo, n in zip(shard.offset, shard.shape, strict=True))}]"
