"""What one server serves, read back as shards, brings another server's halves to the same bytes."""

from __future__ import annotations

import msgspec
import pytest
import torch

from bridge.errors import MappingError
from bridge.protocol.mapping import Mapping, Write
from bridge.protocol.plan import build_plan
from bridge.sharding import LocalShards
from bridge.wire.transport import pick
from tests.support.mappings import SOURCES, half_of, identity_mapping, parallel_mapping
from vllm_patching.reading_back import read_back
from vllm_patching.staging import Staging

SHAPES = {"plain": (6, 4), "woven": (16, 4)}


def bring(shards: LocalShards, wanted: Mapping) -> list[torch.Tensor]:
    """What a plan makes of the halves of a server that holds nothing yet."""
    halves = [torch.zeros(rank_map.arena_bytes, dtype=torch.uint8) for rank_map in wanted.ranks]
    plan = build_plan(wanted, [shards.layout], bucket_bytes=4096)
    for lane in plan.lanes:
        staging = Staging(halves[lane.inference], wanted.ranks[lane.inference].targets)
        for copy in (copy for bucket in lane.buckets for copy in bucket.copies):
            place = staging.view(copy.target, copy.size, copy.dst_offset, copy.dst_stride)
            place.copy_(pick(shards.tensors[copy.shard], copy))
    return halves


def state() -> dict[str, torch.Tensor]:
    described = SOURCES.items()
    return {name: torch.randn(shape).to(dtype) for name, (shape, _, dtype, _) in described}


@pytest.mark.parametrize(("tp", "other"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_any_layout_from_any_other(tp: int, other: int) -> None:
    held, mapping, wanted = state(), parallel_mapping(tp), parallel_mapping(other)
    halves = [half_of(rank_map, held) for rank_map in mapping.ranks]
    shards = read_back(mapping, halves, wanted)
    for rank_map, made in zip(wanted.ranks, bring(shards, wanted), strict=True):
        assert torch.equal(made, half_of(rank_map, held))
    memory = [(half.data_ptr(), half.data_ptr() + half.numel()) for half in halves]
    copied = {
        list(SOURCES)[shard.source]
        for shard, tensor in zip(shards.layout.shards, shards.tensors, strict=True)
        if not any(first <= tensor.data_ptr() < last for first, last in memory)
    }
    assert copied == {"row"}, "which lies transposed; the others need no memory"


def woven(rows: range = range(2)) -> tuple[Mapping, torch.Tensor, torch.Tensor]:
    """A server that keeps even rows before odd ones, or only some of them; its half, and the whole source."""
    mapping = identity_mapping(("checkpoint", SHAPES))
    whole = torch.randn(SHAPES["woven"]).to(torch.bfloat16)
    (rank_map,) = mapping.ranks
    writes = tuple(
        Write(
            source=1, target=1, size=(8, 4), src_offset=4 * odd, src_stride=(8, 1), dst_offset=32 * odd,
            dst_stride=(4, 1),
        )
        for odd in rows
    )  # fmt: skip
    plain = rank_map.writes["checkpoint"][0]
    made = msgspec.structs.replace(rank_map, writes={"checkpoint": (plain, *writes)})
    half = torch.zeros(rank_map.arena_bytes, dtype=torch.uint8)
    target = rank_map.targets[1]
    flat = half[target.offset : target.offset + target.nbytes].view(torch.bfloat16).view(16, 4)
    flat[:8], flat[8:] = whole[0::2], whole[1::2]
    return msgspec.structs.replace(mapping, ranks=(made,)), half, whole


def test_rows_that_are_no_run_are_pieced_together() -> None:
    mapping, half, whole = woven()
    wanted = identity_mapping(("checkpoint", SHAPES))
    shards = read_back(mapping, [half], wanted)
    (made,) = bring(shards, wanted)
    target = wanted.ranks[0].targets[1]
    assert torch.equal(made[target.offset :].view(torch.bfloat16).view(16, 4), whole)


def test_what_no_rank_holds_is_named() -> None:
    mapping, half, _ = woven(range(1))
    with pytest.raises(MappingError, match="woven: 32 of its 64 elements are held by no rank"):
        read_back(mapping, [half], identity_mapping(("checkpoint", SHAPES)))


def test_digits_are_not_made_up() -> None:
    narrow = identity_mapping(("checkpoint", SHAPES), dtype="bfloat16")
    wide = identity_mapping(("checkpoint", SHAPES), dtype="float32")
    halves = {m.dtype: [torch.zeros(m.ranks[0].arena_bytes, dtype=torch.uint8)] for m in (narrow, wide)}
    read_back(wide, halves["float32"], narrow)  # as the trainer's float32 would have been cast
    with pytest.raises(MappingError, match="held as bfloat16, and float32 made from that"):
        read_back(narrow, halves["bfloat16"], wide)


def test_a_layout_of_vllms_own_is_not_read() -> None:
    mapping = identity_mapping(("checkpoint", SHAPES))
    (rank_map,) = mapping.ranks
    packed = msgspec.structs.replace(rank_map.targets[1], transform="some_packing")
    ranks = (msgspec.structs.replace(rank_map, targets=(rank_map.targets[0], packed)),)
    with pytest.raises(MappingError, match=r"live\.woven in a layout of its own \(some_packing\)"):
        read_back(msgspec.structs.replace(mapping, ranks=ranks), [], mapping)


def test_another_model_is_refused() -> None:
    mapping = identity_mapping(("checkpoint", SHAPES))
    other = identity_mapping(("checkpoint", {**SHAPES, "plain": (6, 5), "more": (2, 2)}))
    half = torch.zeros(mapping.ranks[0].arena_bytes, dtype=torch.uint8)
    with pytest.raises(MappingError, match="2 fault") as caught:
        read_back(mapping, [half], other)
    assert "plain: has shape (6, 4) here, (6, 5) there" in str(caught.value)
    assert "more: held by no rank" in str(caught.value)
