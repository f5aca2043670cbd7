"""Small mapping documents without a vLLM: of one inference rank that has everything whole, and of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bridge.protocol.mapping import ITEMSIZE, RankMap, Source, Target, Vocabulary, Write
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.plan import Plan
from bridge.protocol.region import row_major

Shapes = Mapping[str, Sequence[int]]
MISSING = -1.0

# What the ranks of ``parallel_mapping`` cut along a dimension: shape, trainer's dtype, server's, dimension.
SOURCES: dict[str, tuple[tuple[int, ...], torch.dtype, torch.dtype, int | None]] = {
    "embed": ((96, 128), torch.bfloat16, torch.bfloat16, 0),
    "gate": ((64, 80), torch.float32, torch.bfloat16, 0),
    "up": ((64, 80), torch.float32, torch.bfloat16, 0),
    "row": ((48, 64), torch.bfloat16, torch.bfloat16, 1),
    "norm": ((37,), torch.float32, torch.float32, None),
}
_TARGETS = {"embed": ("embed",), "gate_up": ("gate", "up"), "row": ("row",), "norm": ("norm",)}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def interleaved(whole: Tensor, head_dim: int) -> Tensor:
    """A checkpoint's tensor in Meta's rotary order: of each head, rows of the two halves in turn."""
    if not head_dim:
        return whole
    halves = whole.reshape(-1, 2, head_dim // 2, *whole.shape[1:])
    return halves.transpose(1, 2).reshape(whole.shape)


def identity_mapping(
    *vocabularies: tuple[str, Shapes], dtype: str = "bfloat16", unused: Sequence[str] = (),
    tied: dict[str, str] | None = None, digest: str = "",
) -> MappingDocument:  # fmt: skip
    """A document whose targets have ``dtype`` and the shapes of the sources.

    Args:
        vocabularies: (name, shapes by source name), the first one being the default.
        unused: names of sources that are listed, and written nowhere.
        tied: names of them that are another name of a source.
    """
    made, targets, writes, offset = [], [], {}, 0
    for vocabulary, shapes in vocabularies:
        sources = [Source(name=name, shape=tuple(shape), dtype=dtype) for name, shape in shapes.items()]
        dropped = tuple(name for name in shapes if name in unused)
        ties = {name: kept for name, kept in (tied or {}).items() if name in dropped}
        made.append(Vocabulary(name=vocabulary, sources=tuple(sources), unused=dropped, tied=ties))
        writes[vocabulary] = []
        for index, source in enumerate(sources):
            if source.name in unused:
                continue
            nbytes = source.numel * ITEMSIZE[dtype]
            strides = tuple(math.prod(source.shape[dim + 1 :]) for dim in range(len(source.shape)))
            targets.append(
                Target(
                    name=f"live.{source.name}", shape=source.shape, stride=strides, dtype=dtype,
                    offset=offset, nbytes=nbytes,
                )
            )  # fmt: skip
            offset += nbytes
            writes[vocabulary].append(
                Write(
                    source=index, target=len(targets) - 1, size=source.shape, src_offset=0,
                    src_stride=strides, dst_offset=0, dst_stride=strides,
                )
            )  # fmt: skip
    rank = RankMap(
        rank=0,
        arena_bytes=offset,
        targets=tuple(targets),
        writes={name: tuple(found) for name, found in writes.items()},
    )
    return MappingDocument(
        model="tests/tiny",
        vllm_version="0.0",
        dtype=dtype,
        tp_degree=1,
        num_inference_ranks=1,
        vocabularies=tuple(made),
        ranks=(rank,),
        param_mappings={},
        digest=digest,
    )


def run_copies(
    plan: Plan, mapping: MappingDocument, held: Mapping[int, Sequence[Tensor]]
) -> list[list[Tensor]]:
    """What a plan's copies bring to each target of each inference rank, flat, in the trainer's dtype.

    Args:
        held: by trainer rank, its shards' memory.

    Where nothing is brought there is ``MISSING``; nothing is brought twice.
    """
    dtype = next((tensor.dtype for tensors in held.values() for tensor in tensors), torch.float32)
    sizes = [[t.nbytes // ITEMSIZE[t.dtype] for t in rank.targets] for rank in mapping.ranks]
    out = [[torch.full((n,), MISSING, dtype=dtype) for n in rank] for rank in sizes]
    count = [[torch.zeros(n, dtype=torch.int32) for n in rank] for rank in sizes]
    for lane in plan.lanes:
        for copy in (copy for bucket in lane.buckets for copy in bucket.copies):
            local = held[lane.trainer][copy.shard]
            assert local.is_contiguous()
            first = int(local.storage_offset()) + copy.src_offset
            picked = local.as_strided(copy.size, copy.src_stride, first)
            place = (copy.size, copy.dst_stride, copy.dst_offset)
            out[lane.inference][copy.target].as_strided(*place).copy_(picked)
            count[lane.inference][copy.target].as_strided(*place).add_(1)
    assert all(bool((t <= 1).all()) for rank in count for t in rank), "an element was written twice"
    return out


def parallel_mapping(tp: int) -> MappingDocument:
    """A document of ``tp`` tensor-parallel ranks with the ``SOURCES``.

    "gate" and "up" share a target, one behind the other; "row" lies transposed; "embed" has rows of padding.
    """
    sources = tuple(
        Source(name=name, shape=shape, dtype=dtype_name(dtype))
        for name, (shape, _, dtype, _) in SOURCES.items()
    )
    return MappingDocument(
        model="tests/parallel",
        vllm_version="0.0",
        dtype="bfloat16",
        tp_degree=tp,
        num_inference_ranks=tp,
        vocabularies=(Vocabulary(name="checkpoint", sources=sources),),
        ranks=tuple(_parallel_rank(rank, tp) for rank in range(tp)),
        param_mappings={},
    )


def _parallel_rank(rank: int, tp: int) -> RankMap:
    targets, writes, offset = [], [], 0
    for name, parts in _TARGETS.items():
        shape, _, dtype, dim = SOURCES[parts[0]]
        cut, strides, first = list(shape), row_major(shape), 0
        if dim is not None:
            cut[dim] //= tp
            first = rank * cut[dim] * strides[dim]
        dst_strides = (1, cut[0]) if name == "row" else row_major(cut)
        numel = math.prod(cut)
        for nth, part in enumerate(parts):
            writes.append(
                Write(
                    source=list(SOURCES).index(part), target=len(targets), size=tuple(cut), src_offset=first,
                    src_stride=strides, dst_offset=nth * numel, dst_stride=dst_strides,
                )
            )  # fmt: skip
        padding = 4 * shape[1] if name == "embed" else 0
        nbytes = (len(parts) * numel + padding) * dtype.itemsize
        targets.append(
            Target(
                name=name, shape=(len(parts) * cut[0], *cut[1:]), stride=dst_strides, dtype=dtype_name(dtype),
                offset=offset, nbytes=nbytes,
            )
        )  # fmt: skip
        offset += nbytes + -nbytes % 16
    return RankMap(
        rank=rank, arena_bytes=offset, targets=tuple(targets), writes={"checkpoint": tuple(writes)}
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as mappings have it."""
    return str(dtype).removeprefix("torch.")


def half_of(rank_map: RankMap, state: Mapping[str, Tensor]) -> Tensor:
    """A half of a ``parallel_mapping``'s rank, uint8: every write done by hand, from whole tensors."""
    half = torch.zeros(rank_map.arena_bytes, dtype=torch.uint8)
    for write in rank_map.writes["checkpoint"]:
        target = rank_map.targets[write.target]
        dtype = getattr(torch, target.dtype)
        flat = half[target.offset : target.offset + target.nbytes].view(dtype)
        whole = state[list(SOURCES)[write.source]].to(dtype)
        picked = whole.as_strided(write.size, write.src_stride, write.src_offset)
        flat.as_strided(write.size, write.dst_stride, flat.storage_offset() + write.dst_offset).copy_(picked)
    return half
