"""Small mapping documents without a vLLM: every source lands whole in a tensor of the one inference rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bridge.protocol.mapping import ITEMSIZE, RankMap, Source, Target, Vocabulary, Write
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.plan import Plan

Shapes = Mapping[str, Sequence[int]]
MISSING = -1.0


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
    *vocabularies: tuple[str, Shapes], dtype: str = "bfloat16", unused: Sequence[str] = (), digest: str = ""
) -> MappingDocument:
    """A document whose targets have ``dtype`` and the shapes of the sources.

    Args:
        vocabularies: (name, shapes by source name), the first one being the default.
        unused: names of sources that are listed, and written nowhere.
    """
    made, targets, writes, offset = [], [], {}, 0
    for vocabulary, shapes in vocabularies:
        sources = [Source(name=name, shape=tuple(shape), dtype=dtype) for name, shape in shapes.items()]
        dropped = tuple(name for name in shapes if name in unused)
        made.append(Vocabulary(name=vocabulary, sources=tuple(sources), unused=dropped))
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
