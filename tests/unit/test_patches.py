"""Patches of some elements: what lands on every rank, what travels, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import SparsePatch
from bridge.errors import ConfigError, MappingError
from bridge.parts import Round
from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import build_plan
from bridge.sharding import LocalShards
from bridge.wire import rendezvous
from bridge.wire.meeting import KEPT_LAYOUTS, KEPT_PATCHES, KEPT_PLANS, Meeting
from tests.support.mappings import MISSING, SOURCES, half_of, parallel_mapping, run_copies

NAMES = list(SOURCES)


def state() -> dict[str, torch.Tensor]:
    """Whole tensors in float32, none of whose values is one of a patch; exact in the server's dtypes."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randint(0, 200, shape, generator=generator).float()
        for name, (shape, *_) in SOURCES.items()
    }


def collected(mapping: Mapping, handed: Sequence[Any], *, world_size: int) -> list[LocalShards]:
    """Each rank's shards of a round of patches, and of tensors as (name, tensor)."""
    found = []
    for rank in range(world_size):
        made = Round(rank=rank, world_size=world_size)
        for one in handed:
            made.update_weight(*one) if isinstance(one, tuple) else made.update_weight(one)
        found.append(made.collect(mapping))
    return found


@st.composite
def patches(draw: st.DrawFn) -> SparsePatch:
    """Rows or elements of one source, values from 201 on: near each other, so that runs come about."""
    name = draw(st.sampled_from(NAMES))
    shape = SOURCES[name][0]
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=12, unique=True))
        return SparsePatch(name, torch.tensor(rows), torch.randint(201, 250, (len(rows), *shape[1:])).float())
    index = st.tuples(*(st.integers(0, min(n, 20) - 1) for n in shape))
    places = draw(st.lists(index, min_size=1, max_size=12, unique=True))
    return SparsePatch(name, torch.tensor(places), torch.randint(201, 250, (len(places),)).float())


def put(whole: dict[str, torch.Tensor], patch: SparsePatch) -> torch.Tensor:
    """Which elements of a patched tensor are new; ``whole`` is patched."""
    index = (patch.indices,) if patch.indices.ndim == 1 else patch.indices.unbind(1)
    new = torch.zeros(whole[patch.name].shape)
    new.index_put_(index, torch.ones(()))
    whole[patch.name] = whole[patch.name].index_put(index, patch.values)
    return new


@settings(max_examples=60)
@given(
    st.lists(patches(), min_size=1, max_size=3, unique_by=lambda patch: patch.name),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.booleans(),
)
def test_exactly_the_patched_elements_land_in_every_slice(
    handed: list[SparsePatch], tp: int, world_size: int, with_dense: bool
) -> None:
    mapping, old = parallel_mapping(tp), state()
    new, travels = dict(old), {name: torch.zeros(tensor.shape) for name, tensor in old.items()}
    for patch in handed:
        travels[patch.name] = put(new, patch)
    whole = [name for name in NAMES if name not in {patch.name for patch in handed}][:1] if with_dense else []
    for name in whole:
        new[name], travels[name] = -2 - old[name], torch.ones(old[name].shape)
    shards = collected(mapping, [*handed, *((name, new[name]) for name in whole)], world_size=world_size)
    assert all(part.partial for part in shards)
    only = frozenset(s.source for part in shards for s in part.layout.shards)
    plan = build_plan(mapping, [part.layout for part in shards], bucket_bytes=256, only=only)
    brought = run_copies(plan, mapping, {part.layout.rank: part.tensors for part in shards})
    for rank_map, targets in zip(mapping.ranks, brought, strict=True):
        expected, marks = half_of(rank_map, new), half_of(rank_map, travels)
        for target, got in zip(rank_map.targets, targets, strict=True):
            place = slice(target.offset, target.offset + target.nbytes)
            dtype = getattr(torch, target.dtype)
            landed = got != MISSING
            assert torch.equal(landed, marks[place].view(dtype) == 1), f"{target.name}: only these travel"
            assert torch.equal(got[landed], expected[place].view(dtype)[landed].float())


def test_scattered_rows_are_one_box_for_each_run_and_shared_evenly() -> None:
    rows = torch.tensor([90, 5, 6, 40, 7, 8])
    values = torch.arange(6.0)[:, None].expand(6, 128)
    first, second = collected(parallel_mapping(2), [SparsePatch("embed", rows, values)], world_size=2)
    assert [(s.offset, s.shape) for s in first.layout.shards] == [((5, 0), (3, 128))]
    assert [(s.offset[0], s.shape[0]) for s in second.layout.shards] == [(8, 1), (40, 1), (90, 1)]
    assert [int(t[0, 0]) for t in second.tensors] == [5, 3, 0]
    plan = build_plan(
        parallel_mapping(2), [first.layout, second.layout], bucket_bytes=1 << 20, only=frozenset([0])
    )
    assert plan.total_bytes == values.numel() * 4


def test_what_was_handed_over_may_be_overwritten() -> None:
    rows, values = torch.tensor([3, 1]), torch.ones(2, 128)
    made = Round(rank=0, world_size=1)
    made.update_weight(SparsePatch("embed", rows, values))
    rows.zero_()
    values.fill_(float("nan"))
    shards = made.collect(parallel_mapping(1))
    assert [s.offset[0] for s in shards.layout.shards] == [1, 3]
    assert all(bool((t == 1).all()) for t in shards.tensors)


ROW, GATE = torch.ones(1, 128), torch.ones(1, 80)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (SparsePatch("embed", torch.tensor([0, 96]), torch.ones(2, 128)), "index 96, outside .*96, 128"),
        (SparsePatch("embed", torch.tensor([-1]), ROW), "index -1, outside"),
        (SparsePatch("embed", torch.tensor([[5, 128]]), torch.ones(1)), "index 128, outside"),
        (SparsePatch("embed", torch.tensor([4, 2, 4]), torch.ones(3, 128)), "1 place.* such as row 4"),
        (SparsePatch("embed", torch.tensor([[4, 2]] * 2), torch.ones(2)), r"such as element \(4, 2\)"),
        (SparsePatch("embed", torch.tensor([4], dtype=torch.int32), ROW), r"indices torch.int32 \(1,\)"),
        (SparsePatch("embed", torch.tensor(4), ROW), r"indices torch.int64 \(\)"),
        (SparsePatch("embed", torch.tensor([], dtype=torch.int64), torch.ones(0, 128)), "names no element"),
        (SparsePatch("embed", torch.tensor([1, 2]), ROW), r"indices \(2,\), but values \(1, 128\)"),
        (SparsePatch("embed", torch.tensor([[1, 2]]), ROW), r"indices \(1, 2\), but values \(1, 128\)"),
        (SparsePatch("embed", torch.tensor([1]), GATE), r"values of shape \(80,\) per row"),
        (SparsePatch("norm", torch.tensor([[1, 2]]), torch.ones(1)), "places of 2 indices, .*\\(37,\\)"),
        (SparsePatch("embed", torch.tensor([1]), ROW.int()), "int32, which is not cast to .* bfloat16"),
        (SparsePatch("embed", torch.tensor([1]), ROW.to("meta")), "values without values of their own"),
        (SparsePatch("head", torch.tensor([1]), ROW), "the server knows no such parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_patched_is_refused_by_name(patch: SparsePatch, said: str) -> None:
    with pytest.raises(MappingError, match=rf"\n  {patch.name}: .*{said}"):
        collected(parallel_mapping(2), [patch], world_size=1)


def test_every_fault_is_listed_at_once() -> None:
    handed = [
        SparsePatch("embed", torch.tensor([99]), ROW),
        SparsePatch("gate", torch.tensor([1]), GATE),
        ("gate", torch.ones(64, 80)),
        SparsePatch("up", torch.tensor([1, 1]), torch.ones(2, 80)),
    ]
    with pytest.raises(MappingError, match=r"^3 fault\(s\)") as caught:
        collected(parallel_mapping(1), handed, world_size=1)
    assert "gate: handed over 2 times in one round" in str(caught.value)


def test_too_many_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.patches.MAX_RUNS", 3)
    collected(parallel_mapping(1), [SparsePatch("norm", torch.arange(0, 6, 2), torch.ones(3))], world_size=1)
    patch = SparsePatch("norm", torch.arange(0, 8, 2), torch.ones(4))
    with pytest.raises(MappingError, match="norm: its patch comes apart into some 4 runs"):
        collected(parallel_mapping(1), [patch], world_size=1)


def test_what_vllm_packs_is_refused_by_name() -> None:
    mapping = parallel_mapping(2)
    packed = msgspec.structs.replace(mapping.ranks[1].targets[1], transform="cpu_moe_w13:amx")
    targets = (mapping.ranks[1].targets[0], packed, *mapping.ranks[1].targets[2:])
    ranks = (mapping.ranks[0], msgspec.structs.replace(mapping.ranks[1], targets=targets))
    mapping = msgspec.structs.replace(mapping, ranks=ranks)
    with pytest.raises(MappingError, match=r"gate: vLLM keeps it in another layout \(cpu_moe_w13:amx\)"):
        collected(mapping, [SparsePatch("gate", torch.tensor([1]), GATE)], world_size=1)
    collected(mapping, [SparsePatch("embed", torch.tensor([1]), ROW)], world_size=1)


@pytest.mark.parametrize(
    "other", [SparsePatch("embed", torch.tensor([2]), ROW), ("embed", torch.ones(96, 128))]
)
def test_ranks_that_patch_other_elements_are_named(other: Any) -> None:
    mapping, patch = parallel_mapping(1), SparsePatch("embed", torch.tensor([1]), ROW)
    layouts = [
        collected(mapping, [one], world_size=2)[rank].layout for rank, one in enumerate((patch, other))
    ]
    with pytest.raises(MappingError, match=r"embed \(trainer rank 1\): its patch names other elements"):
        build_plan(mapping, layouts, bucket_bytes=64, only=frozenset([0]))


def test_a_name_alone_is_refused() -> None:
    made: Any = Round(rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"update_weight\('embed'\) needs a tensor"):
        made.update_weight("embed")


def test_a_run_of_patches_leaves_no_layouts_or_plans_behind() -> None:
    mapping = parallel_mapping(1)
    store = rendezvous.serve_store("127.0.0.1", 0)
    trainer, updater = (Meeting(store, mapping, epoch=1, timeout_s=5) for _ in range(2))
    whole = [collected(mapping, [("embed", torch.ones(96, 128))], world_size=1)[0]]
    digests = []
    for row in (0, 1, 2, None, 3, 4, 5, 6, 0, None):
        patch = SparsePatch("embed", torch.tensor([row or 0]), ROW)
        (shards,) = whole if row is None else collected(mapping, [patch], world_size=1)
        digests.append(trainer.publish_layout(shards.layout))
        joint = trainer.publish_round([digests[-1]], partial=True, encoding="dense", bucket_bytes=1 << 20)
        plans = [end.plan(joint)[0] for end in (trainer, updater)]
        assert plans[0].digest == plans[1].digest
        assert plans[0].total_bytes == (96 if row is None else 1) * 128 * 4
    kept = [d for d in dict.fromkeys(digests) if store.check([f"e1/layout/{d.hex()}"])]
    assert kept == [digests[0], digests[3], digests[7]]
    assert len(kept) == KEPT_PATCHES + 1
    assert len(trainer._plans) == len(updater._plans) == KEPT_PLANS


def test_rounds_of_ever_other_parameters_leave_no_layouts_behind() -> None:
    """Of two trainer ranks; and all of the rounds come again."""
    mapping = parallel_mapping(1)
    store = rendezvous.serve_store("127.0.0.1", 0)
    trainers = [Meeting(store, mapping, epoch=1, timeout_s=5) for _ in range(2)]
    updater = Meeting(store, mapping, epoch=1, timeout_s=5)
    whole = state()
    subsets = [NAMES[:1], NAMES[1:3], *([name] for name in NAMES[3:8]), NAMES[:2], NAMES]
    published = []
    for names in [*subsets, *subsets]:
        shards = collected(mapping, [(name, whole[name]) for name in names], world_size=2)
        digests = [end.publish_layout(s.layout) for end, s in zip(trainers, shards, strict=True)]
        joint = trainers[0].publish_round(
            digests, partial=shards[0].partial, encoding="dense", bucket_bytes=1 << 20
        )
        assert len({end.plan(joint)[0].digest for end in (*trainers, updater)}) == 1
        assert len([key for key in store.list_keys() if "/layout/" in key]) <= 2 * KEPT_LAYOUTS
        published += digests
    assert store.check([f"e1/layout/{digest.hex()}" for digest in published[-2 * KEPT_LAYOUTS :]])
