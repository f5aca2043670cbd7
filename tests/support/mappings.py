"""Small mapping documents without a vLLM: every source lands whole in a tensor of the one inference rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from bridge.protocol.mapping import ITEMSIZE, RankMap, Source, Target, Vocabulary, Write
from bridge.protocol.mapping import Mapping as MappingDocument

Shapes = Mapping[str, Sequence[int]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
