"""Mappings and layouts of models too large to load: from a config's numbers to what vLLM and FSDP2 make.

The writes are those that tracing vLLM's own loader gives; ``trace_shapes.py`` compares them one by one. The
planner is given these documents as it is given real ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bridge.protocol.mapping import Mapping, RankMap, Source, Target, Vocabulary, Write
from bridge.protocol.plan import Layout, Shard

DTYPE, ITEMSIZE = "bfloat16", 2
MANY = 1 << 30
VOCABULARY = "transformers"


@dataclass(frozen=True)
class Model:
    """The numbers of a config.json that its tensors follow from; ``experts`` 0 is a dense model.

    With experts the attention is multi-head latent attention and the first ``dense_layers`` layers have no
    experts, as in DeepSeek-V3 and Kimi K2.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int = 0
    head_dim: int = 128
    qk_norm: bool = False
    experts: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0


QWEN3_8B = Model(
    "Qwen3-8B", hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, vocab=151936, qk_norm=True
)
QWEN3_32B = dataclasses.replace(
    QWEN3_8B, name="Qwen3-32B", hidden=5120, intermediate=25600, layers=64, heads=64
)
LLAMA_70B = Model(
    "Llama-3-70B", hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256
)
KIMI_1T = Model(
    "Kimi-K2", hidden=7168, intermediate=18432, layers=61, heads=64, vocab=163840, experts=384,
    expert_intermediate=2048, dense_layers=1, q_rank=1536, kv_rank=512, rope_dim=64,
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """How one server divides a model: ``tp`` ranks, times ``engines`` of data parallelism.

    Experts are divided over all ranks (expert parallelism); everything else over ``tp``.
    """

    tp: int
    engines: int = 1

    @property
    def ranks(self) -> int:
        """Inference ranks."""
        return self.tp * self.engines


@dataclass(frozen=True)
class Trainer:
    """FSDP2 over ``shards`` ranks, ``replicas`` times (HSDP); rank = replica * shards + shard.

    Fused experts lie with ``expert_parallel`` groups of experts along their first dimension, and within
    one along the second; 1 is plain FSDP2.
    """

    shards: int
    replicas: int = 1
    expert_parallel: int = 1

    @property
    def ranks(self) -> int:
        """Trainer ranks."""
        return self.shards * self.replicas


@dataclass(frozen=True)
class _Tensor:
    """A source, the target it goes to, and how: the rows before it there, and what is cut over the ranks."""

    name: str
    shape: tuple[int, ...]
    target: str
    cut: str = "whole"  # "rows", "columns" or "experts"
    before: tuple[tuple[int, int], ...] = ()  # (rows, heads) of what comes before it in the target
    heads: int = MANY  # rows are cut in no more parts, and repeated where ranks outnumber them
    parts: int = 1  # of one expert, each loaded by itself


# --- the tensors of a model -------------------------------------------------------------------------------


def _tensors(model: Model) -> Iterator[_Tensor]:
    h, m = model.hidden, model
    yield _Tensor("model.embed_tokens.weight", (m.vocab, h), "model.embed_tokens.weight", "rows")
    for layer in range(m.layers):
        at = f"model.layers.{layer}"
        yield from _latent_attention(m, at) if m.experts else _attention(m, at)
        if m.experts and layer >= m.dense_layers:
            yield from _experts(m, at)
        else:
            yield from _mlp(h, m.intermediate, f"{at}.mlp")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield _Tensor(f"{at}.{norm}.weight", (h,), f"{at}.{norm}.weight")
    yield _Tensor("model.norm.weight", (h,), "model.norm.weight")
    yield _Tensor("lm_head.weight", (m.vocab, h), "lm_head.weight", "rows")


def _attention(m: Model, at: str) -> Iterator[_Tensor]:
    q, kv = (m.heads * m.head_dim, m.heads), (m.kv_heads * m.head_dim, m.kv_heads)
    for name, (rows, heads), before in (("q", q, ()), ("k", kv, (q,)), ("v", kv, (q, kv))):
        yield _Tensor(
            f"{at}.self_attn.{name}_proj.weight", (rows, m.hidden), f"{at}.self_attn.qkv_proj.weight",
            "rows", before, heads,
        )  # fmt: skip
    o_proj = f"{at}.self_attn.o_proj.weight"
    yield _Tensor(o_proj, (m.hidden, q[0]), o_proj, "columns")
    for name in ("q_norm", "k_norm") if m.qk_norm else ():
        yield _Tensor(f"{at}.self_attn.{name}.weight", (m.head_dim,), f"{at}.self_attn.{name}.weight")


def _latent_attention(m: Model, at: str) -> Iterator[_Tensor]:
    h, attn = m.hidden, f"{at}.self_attn"
    kv_a, fused = m.kv_rank + m.rope_dim, f"{attn}.fused_qkv_a_proj.weight"
    yield _Tensor(f"{attn}.q_a_proj.weight", (m.q_rank, h), fused)
    yield _Tensor(f"{attn}.q_a_layernorm.weight", (m.q_rank,), f"{attn}.q_a_layernorm.weight")
    q_b = f"{attn}.q_b_proj.weight"
    yield _Tensor(q_b, (m.heads * (m.head_dim + m.rope_dim), m.q_rank), q_b, "rows")
    yield _Tensor(f"{attn}.kv_a_proj_with_mqa.weight", (kv_a, h), fused, "whole", ((m.q_rank, MANY),))
    yield _Tensor(f"{attn}.kv_a_layernorm.weight", (m.kv_rank,), f"{attn}.kv_a_layernorm.weight")
    kv_b, o_proj = f"{attn}.kv_b_proj.weight", f"{attn}.o_proj.weight"
    yield _Tensor(kv_b, (m.heads * 2 * m.head_dim, m.kv_rank), kv_b, "rows")
    yield _Tensor(o_proj, (h, m.heads * m.head_dim), o_proj, "columns")


def _mlp(hidden: int, intermediate: int, at: str) -> Iterator[_Tensor]:
    for name, before in (("gate_proj", ()), ("up_proj", ((intermediate, MANY),))):
        yield _Tensor(
            f"{at}.{name}.weight", (intermediate, hidden), f"{at}.gate_up_proj.weight", "rows", before
        )
    yield _Tensor(f"{at}.down_proj.weight", (hidden, intermediate), f"{at}.down_proj.weight", "columns")


def _experts(m: Model, at: str) -> Iterator[_Tensor]:
    h, inner, mlp = m.hidden, m.expert_intermediate, f"{at}.mlp"
    yield _Tensor(f"{mlp}.gate.weight", (m.experts, h), f"{mlp}.gate.weight")
    bias = f"{mlp}.gate.e_score_correction_bias"
    yield _Tensor(bias, (m.experts,), bias)
    up, down = f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"
    yield _Tensor(
        up, (m.experts, 2 * inner, h), f"{mlp}.experts.routed_experts.w13_weight", "experts", parts=2
    )
    yield _Tensor(down, (m.experts, h, inner), f"{mlp}.experts.routed_experts.w2_weight", "experts")
    yield from _mlp(h, inner, f"{mlp}.shared_experts")


# --- what a server makes of them ---------------------------------------------------------------------------


def mapping_of(model: Model, server: Server) -> Mapping:
    """The mapping document that a server of this model would write, under transformers' names."""
    tensors = list(_tensors(model))
    targets: dict[str, int] = {}
    for tensor in tensors:
        targets.setdefault(tensor.target, len(targets))
    return Mapping(
        model=model.name,
        vllm_version="0",
        dtype=DTYPE,
        tp_degree=server.tp,
        num_inference_ranks=server.ranks,
        vocabularies=(Vocabulary(name=VOCABULARY, sources=tuple(_source(tensor) for tensor in tensors)),),
        ranks=tuple(_rank_map(tensors, targets, server, rank) for rank in range(server.ranks)),
        param_mappings={},
    )


def _source(tensor: _Tensor) -> Source:
    return Source(name=tensor.name, shape=tensor.shape, dtype=DTYPE)


def _rank_map(tensors: Sequence[_Tensor], targets: dict[str, int], server: Server, rank: int) -> RankMap:
    writes = [
        write
        for index, tensor in enumerate(tensors)
        for write in _writes(tensor, index, targets[tensor.target], server, rank)
    ]
    sizes = dict.fromkeys(targets.values(), 0)
    for write in writes:
        sizes[write.target] += write.numel
    found, offset = [], 0
    for name, index in targets.items():
        nbytes = sizes[index] * ITEMSIZE
        found.append(
            Target(name=name, shape=(sizes[index],), stride=(1,), dtype=DTYPE, offset=offset, nbytes=nbytes)
        )
        offset += nbytes
    return RankMap(rank=rank, arena_bytes=offset, targets=tuple(found), writes={VOCABULARY: tuple(writes)})


def _writes(tensor: _Tensor, source: int, target: int, server: Server, rank: int) -> Iterator[Write]:
    tp_rank, tp = rank % server.tp, server.tp
    shape, numel = tensor.shape, math.prod(tensor.shape)
    if tensor.cut == "columns" and tp > 1:
        columns = shape[1] // tp
        yield Write(
            source=source, target=target, size=(shape[0], columns), src_offset=tp_rank * columns,
            src_stride=(shape[1], 1), dst_offset=0, dst_stride=(columns, 1),
        )  # fmt: skip
        return
    if tensor.cut == "experts":
        own, expert = shape[0] // server.ranks, numel // shape[0]
        run, first = expert // tensor.parts, rank * own * expert
        for i in range(own * tensor.parts):
            yield _run(source, target, run, first + i * run, i * run)
        return
    parts, part = 1, 0
    if tensor.cut == "rows":
        parts = min(tp, tensor.heads)
        part = tp_rank * parts // tp
    cut = tp if tensor.cut == "rows" else 1
    before = sum(rows // min(cut, heads) for rows, heads in tensor.before)
    length = numel // parts
    yield _run(source, target, length, part * length, before * (numel // shape[0]))


def _run(source: int, target: int, numel: int, src_offset: int, dst_offset: int) -> Write:
    return Write(
        source=source, target=target, size=(numel,), src_offset=src_offset, src_stride=(1,),
        dst_offset=dst_offset, dst_stride=(1,),
    )  # fmt: skip


# --- what a trainer holds -----------------------------------------------------------------------------------


def layouts_of(model: Model, trainer: Trainer) -> list[Layout]:
    """What each trainer rank holds, as DTensors of FSDP2 or HSDP lie: chunks of the first dimension."""
    tensors = list(_tensors(model))
    found = []
    for rank in range(trainer.ranks):
        shard = rank % trainer.shards
        boxes = [(i, _box(tensor, trainer, shard)) for i, tensor in enumerate(tensors)]
        shards = tuple(
            Shard(source=index, offset=offset, shape=shape, dtype=DTYPE)
            for index, (offset, shape) in boxes
            if math.prod(shape)
        )
        found.append(Layout(rank=rank, vocabulary=VOCABULARY, shards=shards))
    return found


def _box(tensor: _Tensor, trainer: Trainer, shard: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    groups = trainer.expert_parallel if tensor.cut == "experts" else 1
    if groups == 1:
        first, rows = chunk(tensor.shape[0], trainer.shards, shard)
        return (first, *(0 for _ in tensor.shape[1:])), (rows, *tensor.shape[1:])
    within = trainer.shards // groups
    expert, experts = chunk(tensor.shape[0], groups, shard // within)
    first, rows = chunk(tensor.shape[1], within, shard % within)
    return (expert, first, 0), (experts, rows, tensor.shape[2])


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """First index and length of one of ``torch.chunk``'s parts; the last ones may be short or empty."""
    size = -(-length // parts)
    first = min(index * size, length)
    return first, min(size, length - first)


def model_bytes(model: Model) -> int:
    """Bytes of all tensors, each once."""
    return sum(math.prod(tensor.shape) for tensor in _tensors(model)) * ITEMSIZE
