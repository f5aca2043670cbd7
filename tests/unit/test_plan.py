"""Plans: each element of each write travels once, every rank finds the same plan, faults are listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import ConfigError, MappingError, TopologyError
from bridge.protocol.mapping import ITEMSIZE, Mapping, RankMap, Source, Target, Vocabulary, Write
from bridge.protocol.plan import Layout, Plan, Shard, build_plan
from tests.support.mappings import MISSING, interleaved, run_copies

MIB = 1 << 20


# --- mappings and layouts ----------------------------------------------------------------------------


def make_mapping(
    sources: Sequence[Source],
    writes: Sequence[Sequence[Write]],
    targets: Sequence[Sequence[Target]],
    *,
    vocabulary: str = "checkpoint",
    digest: str = "",
) -> Mapping:
    ranks = tuple(
        RankMap(rank=rank, arena_bytes=MIB, targets=tuple(ts), writes={vocabulary: tuple(ws)})
        for rank, (ws, ts) in enumerate(zip(writes, targets, strict=True))
    )
    return Mapping(
        model="tiny",
        vllm_version="0.32.0",
        dtype="float32",
        tp_degree=len(ranks),
        num_inference_ranks=len(ranks),
        vocabularies=(Vocabulary(name=vocabulary, sources=tuple(sources)),),
        ranks=ranks,
        param_mappings={},
        digest=digest,
    )


def make_target(name: str, numel: int, dtype: str = "float32") -> Target:
    return Target(
        name=name, shape=(numel,), stride=(1,), dtype=dtype, offset=0, nbytes=numel * ITEMSIZE[dtype]
    )


def make_write(index: int, view: torch.Tensor) -> Write:
    stride = torch.empty(view.shape, device="meta").stride()
    return Write(
        source=index,
        target=index,
        size=tuple(view.shape),
        src_offset=int(view.storage_offset()),
        src_stride=view.stride(),
        dst_offset=0,
        dst_stride=stride,
    )


def whole(*shapes: tuple[int, ...], ranks: int = 1, dtype: str = "float32") -> Mapping:
    """Sources w0, w1, .. that every inference rank takes as they are."""
    sources = [Source(name=f"w{i}", shape=shape, dtype="float32") for i, shape in enumerate(shapes)]
    writes = [make_write(i, torch.empty(shape, device="meta").flatten()) for i, shape in enumerate(shapes)]
    targets = [make_target(f"t{i}", math.prod(shape), dtype) for i, shape in enumerate(shapes)]
    return make_mapping(sources, [writes] * ranks, [targets] * ranks)


def shard(source: int, offset: tuple[int, ...], shape: tuple[int, ...], dtype: str = "float32") -> Shard:
    return Shard(source=source, offset=offset, shape=shape, dtype=dtype)


def layouts_of(*shards: Iterable[Shard]) -> list[Layout]:
    return [Layout(rank=r, vocabulary="checkpoint", shards=tuple(s)) for r, s in enumerate(shards)]


def replicated(mapping: Mapping, trainers: int, dtype: str = "float32") -> list[Layout]:
    sources = mapping.vocabularies[0].sources
    shards = [shard(i, (0,) * len(s.shape), s.shape, dtype) for i, s in enumerate(sources)]
    return layouts_of(*[shards] * trainers)


# --- the oracle --------------------------------------------------------------------------------------


def values(source: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 10_000 * source


def run_plan(plan: Plan, mapping: Mapping, layouts: Sequence[Layout]) -> list[list[torch.Tensor]]:
    """Per inference rank and target what arrives; asserts that nothing is written twice."""
    sources = mapping.vocabularies[0].sources

    def local(held: Shard) -> torch.Tensor:
        box = tuple(slice(o, o + n) for o, n in zip(held.offset, held.shape, strict=True))
        whole = interleaved(values(held.source, sources[held.source].shape), held.head_dim)
        return whole[box].clone(memory_format=torch.contiguous_format)

    held = {layout.rank: [local(held) for held in layout.shards] for layout in layouts}
    return run_copies(plan, mapping, held)


def run_writes(mapping: Mapping, only: frozenset[int] | None = None) -> list[list[torch.Tensor]]:
    """The same from whole tensors."""
    out = [[torch.full((t.nbytes // ITEMSIZE[t.dtype],), MISSING) for t in r.targets] for r in mapping.ranks]
    sources = mapping.vocabularies[0].sources
    for rank, targets in zip(mapping.ranks, out, strict=True):
        for write in rank.writes["checkpoint"]:
            if only is None or write.source in only:
                full = values(write.source, sources[write.source].shape).flatten()
                view = full.as_strided(write.size, write.src_stride, write.src_offset)
                targets[write.target].as_strided(write.size, write.dst_stride, write.dst_offset).copy_(view)
    return out


def assert_same(got: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for rank, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b), f"inference rank {rank}, target {index}"


def _replace(what: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(what, **fields)


def copies(plan: Plan) -> list[Any]:
    return [copy for lane in plan.lanes for bucket in lane.buckets for copy in bucket.copies]


# --- random models over random meshes ----------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> Mapping:
    """A few tensors, TP-split over the inference ranks in the ways that vLLM splits them."""
    ranks = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4))
    views = [
        draw(st.sampled_from([_same, _rows, _columns, _transposed, _interleaved, _flat])) for _ in shapes
    ]
    sources = [Source(name=f"w{i}", shape=shape, dtype="float32") for i, shape in enumerate(shapes)]
    writes, targets = [], []
    for rank in range(ranks):
        parts = [
            view(torch.empty(shape, device="meta"), rank, ranks)
            for view, shape in zip(views, shapes, strict=True)
        ]
        writes.append([make_write(i, part) for i, part in enumerate(parts)])
        targets.append([make_target(f"t{i}", part.numel()) for i, part in enumerate(parts)])
    return make_mapping(sources, writes, targets)


def _same(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full


def _rows(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full.tensor_split(ranks)[rank] if full.dim() else full


def _columns(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full.tensor_split(ranks, dim=-1)[rank] if full.dim() else full


def _transposed(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full.movedim(0, -1) if full.dim() else full


def _interleaved(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full[rank % 2 :: 2] if full.dim() else full


def _flat(full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return full.flatten()


@st.composite
def meshes(draw: st.DrawFn, mapping: Mapping) -> list[Layout]:
    """What the ranks of a mesh hold: per mesh dim a tensor dim is split as FSDP2 does it, or replicated.

    Some sources are in Meta's rotary order.
    """
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    placements = [
        [draw(st.sampled_from([None, *range(len(source.shape))])) for _ in mesh]
        for source in mapping.vocabularies[0].sources
    ]
    heads = [
        draw(st.sampled_from([0, *(n for n in range(2, 9, 2) if source.shape and source.shape[0] % n == 0)]))
        for source in mapping.vocabularies[0].sources
    ]
    held = []
    for rank in range(math.prod(mesh)):
        coordinates = [rank // math.prod(mesh[i + 1 :]) % size for i, size in enumerate(mesh)]
        held.append(
            [
                _replace(_place(index, source.shape, dims, coordinates, mesh), head_dim=head_dim)
                for index, (source, dims, head_dim) in enumerate(
                    zip(mapping.vocabularies[0].sources, placements, heads, strict=True)
                )
            ]
        )
    return layouts_of(*held)


def _place(
    source: int, shape: tuple[int, ...], dims: list[int | None], coordinates: list[int], mesh: list[int]
) -> Shard:
    offset, extent = [0] * len(shape), list(shape)
    for dim, coordinate, size in zip(dims, coordinates, mesh, strict=True):
        if dim is not None:
            chunk = -(-extent[dim] // size)  # torch.chunk: uneven, and empty at the end
            start = min(coordinate * chunk, extent[dim])
            offset[dim] += start
            extent[dim] = min(chunk, extent[dim] - start)
    return shard(source, tuple(offset), tuple(extent))


@given(st.data(), st.integers(4, 400))
@settings(max_examples=150)
def test_plan_moves_what_the_writes_say(data: st.DataObject, bucket_bytes: int) -> None:
    mapping = data.draw(models())
    layouts = data.draw(meshes(mapping))
    only = data.draw(
        st.none() | st.frozensets(st.integers(0, len(mapping.vocabularies[0].sources) - 1)), label="only"
    )
    plan = build_plan(mapping, layouts, bucket_bytes=bucket_bytes, only=only)
    assert_same(run_plan(plan, mapping, layouts), run_writes(mapping, only))
    assert build_plan(mapping, layouts[::-1], bucket_bytes=bucket_bytes, only=only) == plan
    keys = [(lane.inference, lane.trainer) for lane in plan.lanes]
    assert keys == sorted(set(keys))
    assert plan.num_buckets == max((len(lane.buckets) for lane in plan.lanes), default=0)
    buckets = [bucket for lane in plan.lanes for bucket in lane.buckets]
    assert all(lane.buckets[i].index == i for lane in plan.lanes for i in range(len(lane.buckets)))
    assert all(bucket.copies and bucket.nbytes <= bucket_bytes for bucket in buckets)
    assert all(b.nbytes == 4 * sum(math.prod(c.size) for c in b.copies) for b in buckets)
    moved = sum(
        w.numel for r in mapping.ranks for w in r.writes["checkpoint"] if only is None or w.source in only
    )
    assert plan.total_bytes == sum(bucket.nbytes for bucket in buckets) == 4 * moved


# --- choices -----------------------------------------------------------------------------------------


def test_replicas_share_the_load_and_ties_go_to_the_lowest_rank() -> None:
    mapping = whole((100,), (60,), (30,), (10,))
    plan = build_plan(mapping, replicated(mapping, 2), bucket_bytes=MIB)
    sent = {lane.trainer: [copy.target for copy in lane.buckets[0].copies] for lane in plan.lanes}
    assert sent == {0: [0], 1: [1, 2, 3]}
    plan = build_plan(whole((8, 8), ranks=4), replicated(whole((8, 8)), 4), bucket_bytes=MIB)
    assert [(lane.inference, lane.trainer) for lane in plan.lanes] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_whole_tensor_is_one_run() -> None:
    mapping = whole((16, 4, 8))
    plan = build_plan(mapping, replicated(mapping, 1), bucket_bytes=MIB)
    assert [(copy.size, copy.src_stride, copy.dst_stride) for copy in copies(plan)] == [((512,), (1,), (1,))]


def test_disjoint_parts_go_before_a_whole_which_goes_before_parts_that_do_not_suffice() -> None:
    mapping = whole((8, 2))
    parts = [[shard(0, (0, 0), (4, 2))], [shard(0, (4, 0), (4, 2))]]
    full = [shard(0, (0, 0), (8, 2))]
    chosen = build_plan(mapping, layouts_of(full, *parts), bucket_bytes=MIB)
    assert [lane.trainer for lane in chosen.lanes] == [1, 2]
    short = build_plan(mapping, layouts_of(parts[0], full), bucket_bytes=MIB)
    assert [lane.trainer for lane in short.lanes] == [1]
    crossing = layouts_of([shard(0, (0, 0), (5, 2))], parts[1], full)
    assert [lane.trainer for lane in build_plan(mapping, crossing, bucket_bytes=MIB).lanes] == [2]


def test_large_copies_are_cut_along_the_longest_outer_dim() -> None:
    sources = [Source(name="w", shape=(3, 10, 8), dtype="float32")]
    write = make_write(0, torch.empty(3, 10, 8, device="meta")[:, :9, :4])
    mapping = make_mapping(sources, [[write]], [[make_target("t", 108)]])
    layouts = layouts_of([shard(0, (0, 0, 0), (3, 10, 8))])
    plan = build_plan(mapping, layouts, bucket_bytes=3 * 4 * 4 * 4)
    assert [copy.size for copy in copies(plan)] == [(3, 4, 4), (3, 4, 4), (3, 1, 4)]
    assert_same(run_plan(plan, mapping, layouts), run_writes(mapping))
    fine = build_plan(mapping, layouts, bucket_bytes=8)
    assert {copy.size for copy in copies(fine)} == {(1, 1, 2)}
    assert {b.nbytes for b in fine.lanes[0].buckets} == {8}
    single = build_plan(mapping, layouts, bucket_bytes=1)  # less than an element: one element each
    assert {b.nbytes for b in single.lanes[0].buckets} == {4}


@pytest.mark.parametrize(("trainer", "target"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_bucket_fits_in_its_size_on_either_side_of_a_cast(trainer: str, target: str) -> None:
    mapping = whole((7, 9), (50,), (3,), dtype=target)
    plan = build_plan(mapping, replicated(mapping, 1, trainer), bucket_bytes=64)
    counts = [sum(math.prod(copy.size) for copy in bucket.copies) for bucket in plan.lanes[0].buckets]
    assert sum(counts) == 7 * 9 + 50 + 3
    assert max(counts) == 64 // ITEMSIZE["float32"]
    assert [b.nbytes for b in plan.lanes[0].buckets] == [n * ITEMSIZE[trainer] for n in counts]


def test_nothing_to_send_is_an_empty_plan() -> None:
    mapping = whole((4,), (0, 3))
    plan = build_plan(mapping, layouts_of([]), bucket_bytes=64, only=frozenset())
    assert (plan.lanes, plan.num_buckets, plan.total_bytes) == ((), 0, 0)
    empty = build_plan(mapping, layouts_of([]), bucket_bytes=64, only=frozenset([1]))
    assert empty.lanes == ()
    assert empty.digest != plan.digest


# --- the digest --------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the mapping": lambda a: {**a, "mapping": _replace(a["mapping"], vllm_version="0.33.0")},
    "the mapping's digest": lambda a: {**a, "mapping": _replace(a["mapping"], digest="abc")},
    "a dtype": lambda a: {**a, "layouts": replicated(a["mapping"], 2, "bfloat16")},
    "a trainer": lambda a: {**a, "layouts": replicated(a["mapping"], 3)},
    "a rank": lambda a: {**a, "layouts": [a["layouts"][0], _replace(a["layouts"][1], rank=5)]},
    "the buckets": lambda a: {**a, "bucket_bytes": MIB + 1},
    "the sources": lambda a: {**a, "only": frozenset([0])},
    "all sources by name": lambda a: {**a, "only": frozenset([0, 1])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_is_the_same_until_something_changes(change: str) -> None:
    def arguments() -> dict[str, Any]:
        mapping = whole((6, 4), (5,), ranks=2)
        return {"mapping": mapping, "layouts": replicated(mapping, 2), "bucket_bytes": MIB, "only": None}

    def digest(given: dict[str, Any]) -> bytes:
        return build_plan(given.pop("mapping"), given.pop("layouts"), **given).digest

    before = digest(arguments())
    assert len(before) == 16
    assert digest(arguments()) == before
    assert digest(CHANGES[change](arguments())) != before


def test_digest_does_not_depend_on_where_the_mapping_is_served() -> None:
    mapping = whole((6, 4))
    elsewhere = msgspec.structs.replace(mapping, run_dir="/tmp/elsewhere")
    layouts = replicated(mapping, 1)
    plans = [build_plan(m, layouts, bucket_bytes=MIB) for m in (mapping, elsewhere)]
    assert plans[0].digest == plans[1].digest


# --- faults ------------------------------------------------------------------------------------------


def refusal(mapping: Mapping, layouts: Sequence[Layout], only: frozenset[int] | None = None) -> list[str]:
    with pytest.raises(MappingError) as caught:
        build_plan(mapping, layouts, bucket_bytes=MIB, only=only)
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"the trainer's weights do not fit the server's model 'tiny', {len(lines)} fault(s):"
    return lines


def test_all_faults_are_listed_by_source_and_trainer_ranks() -> None:
    mapping = whole((4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), ranks=2)
    everything = (0, 0), (4, 2)
    lines = refusal(
        mapping,
        layouts_of(
            [
                shard(1, (0, 0), (2, 2)),
                shard(2, (0, 0), (3, 2)),
                shard(3, *everything, "int32"),
                shard(4, (2, 0), (4, 2)),
                shard(5, (0,), (8,)),
                shard(6, *everything, "float32"),
                shard(7, *everything, "complex64"),
                shard(8, (0, 0), (2, 2), "float32"),
                shard(99, *everything),
            ],
            [shard(2, (2, 0), (2, 2)), shard(4, (2, 0), (4, 2)), shard(6, *everything, "bfloat16")],
            [shard(8, (2, 0), (2, 2), "bfloat16")],
        ),
    )
    assert lines == [
        "w0 (trainer ranks 0-2): held by none of them",
        "w1 (trainer rank 0): held only in [0:2, 0:2] of its shape (4, 2), too little for inference "
        "ranks 0-1",
        "w2 (trainer ranks 0-1): [0:3, 0:2] and [2:4, 0:2] of its shape (4, 2) overlap without being equal",
        "w3 (trainer rank 0): held as int32, which is not cast to float32 (of t3)",
        "w4 (trainer ranks 0-1): a shard of shape (4, 2) at (2, 0) lies outside its shape (4, 2)",
        "w5 (trainer rank 0): a shard has shape (8,) and offset (0,), but its shape is (4, 2)",
        "w6 (trainer rank 1): held as bfloat16, but by rank 0 as float32",
        "w7 (trainer rank 0): its dtype 'complex64' is not one the bridge knows",
        "w8 (trainer rank 2): held as bfloat16, but by rank 0 as float32",
        "source 99 of 9 (trainer rank 0): is sent, but the vocabulary has no such source",
    ]


def test_a_partial_round_asks_for_its_own_sources_only() -> None:
    mapping = whole((4,), (4,), (4,))
    layouts = layouts_of([shard(1, (0,), (4,))])
    plan = build_plan(mapping, layouts, bucket_bytes=MIB, only=frozenset([1]))
    assert [copy.target for copy in copies(plan)] == [1]
    assert refusal(mapping, layouts, frozenset([1, 2])) == ["w2 (trainer rank 0): held by none of them"]
    assert refusal(mapping, layouts, frozenset([1, 7])) == [
        "source 7 of 3 (trainer rank 0): is to be sent, but the vocabulary has no such source"
    ]


def test_a_part_that_nobody_needs_may_be_missing() -> None:
    sources = [
        Source(name="w", shape=(8, 2), dtype="float32"),
        Source(name="dropped", shape=(3,), dtype="float32"),
    ]
    write = make_write(0, torch.empty(8, 2, device="meta")[4:])
    mapping = make_mapping(sources, [[write]], [[make_target("t", 8)]])
    layouts = layouts_of([shard(0, (4, 0), (4, 2))], [shard(0, (0, 0), (0, 2))])
    assert_same(
        run_plan(build_plan(mapping, layouts, bucket_bytes=MIB), mapping, layouts), run_writes(mapping)
    )


def test_a_write_outside_its_source_is_listed_with_both_names() -> None:
    mapping = whole((4,))
    damaged = [
        Write(source=0, target=0, size=(9,), src_offset=0, src_stride=(1,), dst_offset=0, dst_stride=(1,))
    ]
    mapping = make_mapping(mapping.vocabularies[0].sources, [damaged], [[make_target("fused", 9)]])
    (line,) = refusal(mapping, layouts_of([shard(0, (0,), (4,))]))
    assert line.startswith("w0 (trainer rank 0): cannot serve inference rank 0: w0: the write to fused reads")


@pytest.mark.parametrize(
    ("trainer", "target"),
    [
        *((d, d) for d in ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "bool")),
        *(("float64", d) for d in ("float32", "bfloat16", "float16")),
        *(("float32", d) for d in ("bfloat16", "float16")),
        *((d, "float32") for d in ("bfloat16", "float16")),
    ],
)
def test_casts_that_are_made(trainer: str, target: str) -> None:
    mapping = whole((6,), dtype=target)
    plan = build_plan(mapping, replicated(mapping, 1, trainer), bucket_bytes=MIB)
    assert plan.total_bytes == 6 * ITEMSIZE[trainer]


@pytest.mark.parametrize(
    ("trainer", "target"),
    [
        ("float32", "float64"),
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("float32", "float8_e4m3fn"),
        ("uint8", "int8"),
        ("int64", "int32"),
    ],
)
def test_casts_that_are_refused(trainer: str, target: str) -> None:
    mapping = whole((6,), dtype=target)
    assert refusal(mapping, replicated(mapping, 2, trainer)) == [
        f"w0 (trainer ranks 0-1): held as {trainer}, which is not cast to {target} (of t0)"
    ]


def test_layouts_must_fit_together() -> None:
    mapping = whole((4,))
    one, two = replicated(mapping, 2)
    with pytest.raises(TopologyError, match="no trainer rank has said what it holds"):
        build_plan(mapping, [], bucket_bytes=MIB)
    with pytest.raises(TopologyError, match="trainer rank 0 sent more than one layout"):
        build_plan(mapping, [one, one], bucket_bytes=MIB)
    other = msgspec.structs.replace(two, vocabulary="transformers")
    with pytest.raises(TopologyError, match="'checkpoint' on rank 0; 'transformers' on rank 1"):
        build_plan(mapping, [one, other], bucket_bytes=MIB)
    with pytest.raises(
        MappingError, match="mapping of 'tiny' has no vocabulary 'transformers'; it has: checkpoint"
    ):
        build_plan(mapping, [other], bucket_bytes=MIB)
    with pytest.raises(ConfigError, match="bucket_bytes is 0"):
        build_plan(mapping, [one], bucket_bytes=0)
    deaf = msgspec.structs.replace(mapping, ranks=(msgspec.structs.replace(mapping.ranks[0], writes={}),))
    with pytest.raises(MappingError, match="inference rank 0 of 'tiny' knows no vocabulary 'checkpoint'"):
        build_plan(deaf, [one], bucket_bytes=MIB)


# --- size --------------------------------------------------------------------------------------------


def test_a_large_model_repeats_its_layers_and_is_planned_quickly() -> None:
    """1,000 sources over 8 trainers and 8 inference ranks: guards against anything quadratic."""
    shape, ranks, sources = (512, 256), 8, 1000
    full = torch.empty(shape, device="meta")
    writes = [
        [make_write(i, (_rows, _columns)[i % 2](full, r, ranks)) for i in range(sources)]
        for r in range(ranks)
    ]
    targets = [[make_target(f"t{i}", 512 * 32) for i in range(sources)]] * ranks
    listed = [Source(name=f"w{i}", shape=shape, dtype="float32") for i in range(sources)]
    layouts = layouts_of(*([shard(i, (64 * t, 0), (64, 256)) for i in range(sources)] for t in range(8)))
    plan = build_plan(make_mapping(listed, writes, targets), layouts, bucket_bytes=64 * MIB)
    assert len(plan.lanes) == 64
    assert plan.total_bytes == sources * 512 * 256 * 4
