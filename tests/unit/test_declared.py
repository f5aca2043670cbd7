"""Declared layouts: whatever a trainer cuts or interleaves by hand arrives as the checkpoint has it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bridge import Bridge, BridgeConfig, environment
from bridge.catalogue import Catalogue
from bridge.declared import DeclaredLayout
from bridge.environment import Ranks
from bridge.errors import ConfigError, MappingError, TopologyError
from bridge.guard import Guarded
from bridge.parts import collect_single
from bridge.protocol.mapping import Mapping, RankMap, Target, Write
from bridge.protocol.plan import build_plan
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, interleaved, run_copies, shapes_of

Tensors = dict[str, torch.Tensor]


def parts(tensor: torch.Tensor, degree: int, dim: int) -> list[torch.Tensor]:
    """As torch cuts it, with nothing for ranks that are left over."""
    found = list(tensor.chunk(degree, dim))
    return found + [tensor.narrow(dim, 0, 0)] * (degree - len(found))


def held_by(rank: int, whole: Tensors, layout: DeclaredLayout, *, replicated: Sequence[str] = ()) -> Tensors:
    """What a hand-written trainer has on one rank."""
    tp_rank = rank % layout.tp_degree
    dp_rank = rank // layout.tp_degree % layout.dp_shard_degree
    held = {}
    for name, tensor in whole.items():
        mine = interleaved(tensor, layout.head_dim or 0) if name in layout.needs_permute else tensor
        if name in layout.tp_shard_dim:
            mine = parts(mine, layout.tp_degree, layout.tp_shard_dim[name])[tp_rank]
        if mine.ndim and name not in replicated:
            mine = parts(mine, layout.dp_shard_degree, 0)[dp_rank]
        held[name] = mine.clone(memory_format=torch.contiguous_format)
    return held


def brought(mapping: Mapping, ranks: Sequence[Tensors], layout: DeclaredLayout) -> list[list[torch.Tensor]]:
    """Per inference rank and target what arrives of what the trainer ranks hold."""
    found = [collect(held, mapping, rank=rank, layout=layout) for rank, held in enumerate(ranks)]
    plan = build_plan(mapping, [shards.layout for shards in found], bucket_bytes=64)
    for shards in found:
        assert all(shards.contiguous)
        owned = [t.data_ptr() for t in shards.owners]
        assert owned == [t.data_ptr() for t in shards.tensors], "nothing is copied to be permuted"
    return run_copies(plan, mapping, {rank: shards.tensors for rank, shards in enumerate(found)})


# --- any split on both sides, any permutation ------------------------------------------------------------


def served(whole: Tensors, degree: int, dims: dict[str, int]) -> tuple[Mapping, list[Tensors]]:
    """A server of ``degree`` tensor-parallel ranks, and what each of them is to hold."""
    mapping = identity_mapping(("checkpoint", shapes_of(whole)), dtype="float32")
    ranks, expected = [], []
    for rank in range(degree):
        views = {n: parts(t, degree, dims[n])[rank] if n in dims else t for n, t in whole.items()}
        targets = [
            Target(name=n, shape=tuple(v.shape), stride=(), dtype="float32", offset=0, nbytes=4 * v.numel())
            for n, v in views.items()
        ]
        writes = [
            Write(
                source=index, target=index, size=tuple(v.shape), src_offset=int(v.storage_offset()),
                src_stride=v.stride(), dst_offset=0, dst_stride=torch.empty(v.shape, device="meta").stride(),
            )
            for index, v in enumerate(views.values())
        ]  # fmt: skip
        ranks.append(
            RankMap(
                rank=rank, arena_bytes=1 << 20, targets=tuple(targets), writes={"checkpoint": tuple(writes)}
            )
        )
        expected.append(views)
    return msgspec.structs.replace(mapping, ranks=tuple(ranks), num_inference_ranks=degree), expected


@st.composite
def trainers(draw: st.DrawFn) -> tuple[Tensors, DeclaredLayout]:
    head_dim = draw(st.sampled_from([2, 4, 6]))
    whole, dims, permuted = {}, {}, []
    for index in range(draw(st.integers(1, 3))):
        name = f"w{index}"
        if draw(st.booleans()):
            shape = [head_dim * draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), max_size=1))]
            permuted.append(name)
        else:
            shape = draw(st.lists(st.integers(1, 9), max_size=3))
        whole[name] = torch.arange(1.0, 1 + math.prod(shape)).view(shape) + 1000 * index
        if shape and draw(st.booleans()):
            dims[name] = draw(st.integers(0, len(shape) - 1))
    layout = DeclaredLayout(
        tp_degree=draw(st.integers(1, 3)),
        dp_shard_degree=draw(st.integers(1, 3)),
        tp_shard_dim=dims,
        needs_permute=permuted,
        head_dim=head_dim,
    )
    return whole, layout


@given(st.data(), trainers())
@settings(max_examples=150)
def test_every_split_arrives_as_the_checkpoint_has_it(
    data: st.DataObject, trainer: tuple[Tensors, DeclaredLayout]
) -> None:
    whole, layout = trainer
    dims = {n: data.draw(st.integers(0, t.ndim - 1)) for n, t in whole.items() if t.ndim}
    mapping, expected = served(whole, data.draw(st.integers(1, 3)), dims)
    world_size = layout.tp_degree * layout.dp_shard_degree * data.draw(st.integers(1, 2))
    layout.check_world(world_size)
    replicated = data.draw(st.frozensets(st.sampled_from(list(whole))))
    ranks = [held_by(rank, whole, layout, replicated=replicated) for rank in range(world_size)]
    found = brought(mapping, ranks, layout)
    for got, views in zip(found, expected, strict=True):
        for flat, view in zip(got, views.values(), strict=True):
            assert torch.equal(flat, view.flatten())


# --- the two orders, against transformers' own ------------------------------------------------------------


def to_transformers(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The permutation of transformers' conversion script for Meta's checkpoints, word for word."""
    rows, columns = weight.shape
    permuted = weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2)
    return permuted.reshape(rows, columns)


def test_metas_rotary_order_becomes_that_of_transformers() -> None:
    heads, head_dim, hidden = 4, 6, 5
    meta = torch.randn(heads * head_dim, hidden)
    layout = DeclaredLayout(
        tp_degree=2, tp_shard_dim={"q.weight": 0}, needs_permute=["q.weight"], head_dim=head_dim
    )
    mapping = identity_mapping(("checkpoint", {"q.weight": tuple(meta.shape)}), dtype="float32")
    ((arrived,),) = brought(mapping, [{"q.weight": part.clone()} for part in meta.chunk(2)], layout)
    assert torch.equal(arrived.view(meta.shape), to_transformers(meta, heads))
    assert not torch.equal(arrived.view(meta.shape), meta)


def test_attention_scores_are_the_same_in_either_order() -> None:
    """Rotating neighbours (Meta) and rotating halves (transformers) agree after the permutation."""
    head_dim, hidden, position = 8, 16, 3.0
    torch.manual_seed(0)
    x = torch.randn(hidden, dtype=torch.float64)
    q, k = torch.randn(head_dim, hidden, dtype=torch.float64), torch.randn(head_dim, hidden).double()
    angles = position / 10000 ** (torch.arange(0, head_dim, 2).double() / head_dim)

    def neighbours(vector: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(vector.view(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten()

    def halves(vector: torch.Tensor) -> torch.Tensor:
        a, b = vector.chunk(2)
        return vector * angles.cos().repeat(2) + torch.cat([-b, a]) * angles.sin().repeat(2)

    layout = DeclaredLayout(needs_permute=["q", "k"], head_dim=head_dim)
    mapping = identity_mapping(("checkpoint", {"q": q.shape, "k": k.shape}), dtype="float64")
    (arrived,) = brought(mapping, [{"q": q, "k": k}], layout)
    theirs_q, theirs_k = (flat.view(q.shape) for flat in arrived)
    expected = neighbours(q @ x) @ (k @ x)
    assert torch.allclose(halves(theirs_q @ x) @ (theirs_k @ x), expected)
    assert not torch.allclose(halves(q @ x) @ (k @ x), expected)


def test_a_permuted_weight_costs_one_strided_copy() -> None:
    layout = DeclaredLayout(needs_permute=["q"], head_dim=4)
    mapping = identity_mapping(("checkpoint", {"q": (8, 3)}), dtype="float32")
    shards = collect({"q": torch.ones(8, 3)}, mapping, rank=0, layout=layout)
    assert shards.layout.shards[0].head_dim == 4
    (lane,) = build_plan(mapping, [shards.layout], bucket_bytes=1 << 20).lanes
    (copy,) = lane.buckets[0].copies
    assert (copy.size, copy.src_stride) == ((2, 2, 2, 3), (12, 3, 6, 1))


def test_weights_of_one_shape_in_two_orders_do_not_share_their_pieces() -> None:
    whole = {name: torch.randn(8, 3) for name in ("v", "q", "o")}
    layout = DeclaredLayout(needs_permute=["q"], head_dim=4)
    mapping = identity_mapping(("checkpoint", shapes_of(whole)), dtype="float32")
    (arrived,) = brought(mapping, [held_by(0, whole, layout)], layout)
    for flat, tensor in zip(arrived, whole.values(), strict=True):
        assert torch.equal(flat.view(8, 3), tensor)


# --- refusals ----------------------------------------------------------------------------------------------


def test_a_layout_that_no_trainer_can_have_is_refused_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        DeclaredLayout(
            tp_degree=0, dp_shard_degree=True, tp_shard_dim={"a": -1, "b": "x"}, needs_permute=["q"]  # type: ignore[dict-item]
        )  # fmt: skip
    assert str(caught.value).splitlines()[1:] == [
        "  tp_degree is 0, it must be an integer of at least 1",
        "  dp_shard_degree is True, it must be an integer of at least 1",
        "  a: tp_shard_dim is -1, it must be a dimension, counted from 0",
        "  b: tp_shard_dim is 'x', it must be a dimension, counted from 0",
        "  head_dim is not given, and 1 parameter(s) need a permutation",
    ]
    for head_dim in (0, 7, 4.0, True):
        with pytest.raises(ConfigError, match=rf"head_dim is {head_dim!r}, it must be an even integer"):
            DeclaredLayout(head_dim=head_dim)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs_permute is 'wq', it must be a collection"):
        DeclaredLayout(needs_permute="wq", head_dim=2)


def test_degrees_that_do_not_divide_the_world_are_refused() -> None:
    layout = DeclaredLayout(tp_degree=2, dp_shard_degree=3)
    for world_size in (6, 12):
        layout.check_world(world_size)
    for world_size in (1, 3, 8):
        with pytest.raises(TopologyError, match=rf"2 x dp_shard_degree 3 .* the {world_size} trainer rank"):
            layout.check_world(world_size)


def test_all_that_is_not_as_declared_comes_at_once() -> None:
    whole = {"a": (9, 4), "b": (4, 6), "c": (6,), "d": (2, 2, 2), "e": (6, 3), "f": (8, 2)}
    layout = DeclaredLayout(
        tp_degree=2, dp_shard_degree=2, tp_shard_dim={"a": 0, "b": 1, "c": 1, "embed": 0},
        needs_permute=["d", "e", "f", "ff"], head_dim=4,
    )  # fmt: skip
    held = {
        "a": torch.ones(3, 4), "b": torch.ones(2, 2), "c": torch.ones(3), "d": torch.ones(2, 2, 2),
        "e": torch.ones(6, 3), "f": torch.ones(5, 2),
    }  # fmt: skip
    with pytest.raises(MappingError) as caught:
        collect(held, identity_mapping(("checkpoint", whole)), rank=3, layout=layout)
    assert str(caught.value).splitlines()[1:-1] == [
        "  embed: declared in the layout, but the model has no such parameter (it has nothing alike)",
        "  ff: declared in the layout, but the model has no such parameter (it has f)",
        "  a: the model's has shape (3, 4), the server's (9, 4), of which rank 3 holds (2, 4): cut along "
        "dimension 0 over tp (rank 1 of 2), then dimension 0 over dp_shard (rank 1 of 2)",
        "  b: the model's has shape (2, 2), the server's (4, 6), of which rank 3 holds (2, 3): cut along "
        "dimension 1 over tp (rank 1 of 2), then dimension 0 over dp_shard (rank 1 of 2)",
        "  c: tp_shard_dim is 1, but the server's has shape (6,)",
        "  d: needs_permute is for weights of one or two dimensions, and this has shape (2, 2, 2)",
        "  e: needs_permute: its 6 rows are no whole heads of head_dim 4",
        "  f: the model's has shape (5, 2), the server's (8, 2), of which rank 3 holds (4, 2): cut along "
        "dimension 0 over dp_shard (rank 1 of 2)",
    ]


def test_a_part_that_was_not_declared_is_refused() -> None:
    mapping = identity_mapping(("checkpoint", {"a": (8, 2)}))
    with pytest.raises(MappingError, match=r"\(4, 2\), the server's \(8, 2\), and the declared layout does"):
        collect({"a": torch.ones(4, 2)}, mapping, rank=0, layout=DeclaredLayout(tp_degree=2))
    layout = DeclaredLayout(tp_degree=2, tp_shard_dim={"a": 0})
    with pytest.raises(MappingError, match=r"has shape \(8, 2\), .* of which rank 0 holds \(4, 2\)"):
        collect({"a": torch.ones(8, 2)}, mapping, rank=0, layout=layout)


def test_ranks_that_declare_another_order_are_refused() -> None:
    mapping = identity_mapping(("checkpoint", {"q": (8, 2)}))
    layouts = [
        DeclaredLayout(tp_degree=2, tp_shard_dim={"q": 0}, needs_permute=["q"], head_dim=head_dim)
        for head_dim in (2, 4)
    ]
    found = [
        collect({"q": torch.ones(4, 2)}, mapping, rank=rank, layout=layout).layout
        for rank, layout in enumerate(layouts)
    ]
    expected = "held as float32, halves interleaved in heads of 4 rows, but by rank 0 as float32, halves"
    with pytest.raises(MappingError, match=expected):
        build_plan(mapping, found, bucket_bytes=64)
    same_box = [found[0], msgspec.structs.replace(found[0], rank=1, shards=_reordered(found[0].shards, 0))]
    with pytest.raises(MappingError, match="held as float32, but by rank 0 as float32, halves interleaved"):
        build_plan(mapping, same_box, bucket_bytes=64)
    for head_dim in (3, -2, 16):
        odd = msgspec.structs.replace(found[0], shards=_reordered(found[0].shards, head_dim))
        with pytest.raises(MappingError, match=rf"interleaved in heads of {head_dim} rows, but its shape is"):
            build_plan(mapping, [odd], bucket_bytes=64)


def _reordered(shards: Sequence[msgspec.Struct], head_dim: int) -> tuple[msgspec.Struct, ...]:
    return tuple(msgspec.structs.replace(shard, head_dim=head_dim) for shard in shards)


def test_a_layout_that_does_not_divide_the_ranks_is_refused_before_anybody_is_called() -> None:
    model, layout = nn.Linear(2, 4), DeclaredLayout(tp_degree=2)
    with Bridge(BridgeConfig(logdir="unused"), ranks=Ranks(rank=0, world_size=3)) as trainer:
        with pytest.raises(TopologyError, match="do not divide the 3 trainer rank"):
            trainer.broadcast_weights(model, layout=layout)
        with pytest.raises(TopologyError, match="do not divide the 3 trainer rank"):
            trainer.broadcast_single_param("weight", model.weight, layout=layout)


# --- one parameter, and the catalogue ----------------------------------------------------------------------


def test_one_declared_parameter_is_found_under_the_vocabulary_it_fits() -> None:
    mapping = identity_mapping(("checkpoint", {"w": (4, 2)}), ("transformers", {"w": (6, 2)}))
    layout = DeclaredLayout(tp_degree=2, tp_shard_dim={"w": 0})
    found = collect_single("w", torch.ones(3, 2), mapping, rank=1, layout=layout).layout
    assert (found.vocabulary, found.shards[0].offset, found.shards[0].shape) == (
        "transformers",
        (3, 0),
        (3, 2),
    )


def test_a_catalogue_is_of_one_layout() -> None:
    model = nn.Linear(2, 4, bias=False)
    mapping = identity_mapping(("checkpoint", {"weight": (4, 2)}))
    layout = DeclaredLayout(needs_permute=["weight"], head_dim=4)
    catalogue = Catalogue(model, mapping, collect(model, mapping, rank=0, layout=layout), Guarded(()), layout)
    again = catalogue.find(model, mapping, DeclaredLayout(needs_permute={"weight"}, head_dim=4))
    assert again is not None
    assert again.layout.shards[0].head_dim == 4
    assert catalogue.find(model, mapping) is None
    assert catalogue.find(model, mapping, DeclaredLayout(needs_permute=["weight"], head_dim=2)) is None


def test_what_was_checked_cannot_be_changed_behind_the_layouts_back() -> None:
    dims = {"a": 0}
    layout = DeclaredLayout(tp_shard_dim=dims)
    dims["a"] = -1
    assert layout == DeclaredLayout(tp_shard_dim={"a": 0})


def test_one_parameter_that_the_layout_names_otherwise_is_refused() -> None:
    mapping = identity_mapping(("checkpoint", {"q": (4, 2), "k": (4, 2)}))
    layout = DeclaredLayout(needs_permute=["module.q"], head_dim=4)
    with pytest.raises(MappingError, match=r"q: the layout declares it as module\.q"):
        collect_single("module.q", torch.ones(4, 2), mapping, rank=0, layout=layout)
    of_another = DeclaredLayout(needs_permute=["k"], head_dim=4)
    assert (
        collect_single("q", torch.ones(4, 2), mapping, rank=0, layout=of_another).layout.shards[0].head_dim
        == 0
    )


def test_a_part_of_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "initialised_ranks", lambda: Ranks(rank=3, world_size=4, local_rank=3))
    with pytest.raises(TopologyError, match="says rank 3 of 4; a part of a group cannot broadcast"):
        Bridge(BridgeConfig(logdir="unused"), ranks=Ranks(rank=1, world_size=2))
    Bridge(BridgeConfig(logdir="unused"), ranks=Ranks(rank=3, world_size=4))
    Bridge(BridgeConfig(logdir="unused"), ranks=Ranks())
