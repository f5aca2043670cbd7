"""Tensors handed over by name: shares, copies, faults, and the block that makes a round of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bridge
from bridge.errors import BridgeError, ConfigError, MappingError, RoundAborted
from bridge.job import Encoding, Job
from bridge.parts import Round, collect_parts, collect_single, share, snapshot
from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Layout, build_plan
from bridge.rounds import Session
from tests.support.mappings import identity_mapping

SHAPES = {"a": (5, 4), "b": (3,), "c": (2, 3, 4)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def handed_over(names: str, *, rank: int = 0, world_size: int = 1) -> Round:
    made = Round(rank=rank, world_size=world_size)
    for name in names:
        made.update_weight(name, tensors()[name])
    return made


# --- what a rank keeps ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), max_size=3), st.integers(1, 5))
def test_shares_are_disjoint_even_and_make_up_the_whole(shape: list[int], world_size: int) -> None:
    covered = torch.zeros(shape, dtype=torch.int)
    sizes = []
    for rank in range(world_size):
        boxes = share(shape, rank=rank, world_size=world_size)
        sizes.append(sum(math.prod(extent) for _, extent in boxes))
        for offset, extent in boxes:
            covered[tuple(slice(lo, lo + n) for lo, n in zip(offset, extent, strict=True))] += 1
    assert bool((covered == 1).all())
    assert max(sizes) - min(sizes) <= max(1, math.prod(shape) // world_size // 8)


def test_a_share_of_enough_rows_is_one_box() -> None:
    found = [share((26, 4, 3), rank=rank, world_size=3) for rank in range(3)]
    assert found == [[((0, 0, 0), (8, 4, 3))], [((8, 0, 0), (9, 4, 3))], [((17, 0, 0), (9, 4, 3))]]


@pytest.mark.parametrize("make", [torch.clone, lambda t: t.T.contiguous().T, nn.Parameter])
def test_copies_outlive_what_was_handed_over(make: Any) -> None:
    expected = tensors()["a"]
    given_ = make(tensors()["a"])
    parts = [snapshot(given_, rank=rank, world_size=2) for rank in range(2)]
    with torch.no_grad():
        given_.fill_(float("nan"))
    copies = [copy for part in parts for _, copy in part.boxes]
    assert torch.equal(torch.cat([copy.flatten() for copy in copies]), expected.flatten())
    assert all(copy.is_contiguous() and not copy.requires_grad for copy in copies)
    assert sum(copy.untyped_storage().nbytes() for copy in copies) == expected.nbytes, "each keeps its own"
    assert all(part.owner is None for part in parts)


# --- what becomes of it -------------------------------------------------------------------------------------


def test_all_names_are_a_full_round_and_some_are_a_partial_one() -> None:
    mapping = identity_mapping(("checkpoint", {**SHAPES, "inv_freq": (2,)}), unused=["inv_freq"])
    full = handed_over("abc").collect(mapping)
    assert not full.partial
    assert full.layout.order == (0, 1, 2)
    some = handed_over("ca").collect(mapping)
    assert some.partial
    assert some.layout.order == (2, 0)
    assert {shard.source for shard in some.layout.shards} == {0, 2}
    assert collect_single("b", torch.ones(3), mapping, rank=0).partial


def test_two_ranks_shares_are_one_plan() -> None:
    mapping = identity_mapping(("checkpoint", SHAPES), dtype="float32")
    layouts = [handed_over("abc", rank=r, world_size=2).collect(mapping).layout for r in range(2)]
    plan = build_plan(mapping, layouts, bucket_bytes=64)
    assert plan.total_bytes == sum(t.nbytes for t in tensors().values())
    sent = dict.fromkeys(range(2), 0)
    for lane in plan.lanes:
        sent[lane.trainer] += sum(bucket.nbytes for bucket in lane.buckets)
    assert abs(sent[0] - sent[1]) <= 4 * (4 + 1 + 1)


def test_names_may_be_those_of_a_wrapped_model() -> None:
    made = Round(rank=0, world_size=1)
    for name, tensor in tensors().items():
        made.update_weight(f"module._orig_mod.{name}", tensor)
    assert not made.collect(identity_mapping(("checkpoint", SHAPES))).partial


def test_every_fault_is_listed_at_once() -> None:
    made = handed_over("aa")
    made.update_weight("b", torch.ones(4))
    made.update_weight("c", torch.ones(2, 3, 4, dtype=torch.int8))
    made.update_weight("d", torch.ones(1))
    made.update_weight("inv_freq", torch.ones(1))  # the loader drops it, like the module's own walk does
    mapping = identity_mapping(("checkpoint", {**SHAPES, "inv_freq": (2,)}), unused=["inv_freq"])
    with pytest.raises(MappingError) as caught:
        made.collect(mapping)
    text = str(caught.value)
    assert text.startswith("4 fault(s) between trainer rank 0's model and the server's 'tests/tiny'")
    assert "a: handed over 2 times in one round" in text
    assert "b: the model's has shape (4,), the server's (3,)" in text
    assert "c: the model's is int8, which is not cast to the server's bfloat16" in text
    assert "d: the server knows no such parameter among 4 checkpoint names" in text


def test_a_tensor_without_values_is_refused_by_name() -> None:
    part = snapshot(torch.empty(3, device="meta"), rank=0, world_size=1)
    with pytest.raises(MappingError, match="b: is on the meta device"):
        collect_parts([("b", part)], identity_mapping(("checkpoint", SHAPES)), rank=0)


# --- ranks that differ ----------------------------------------------------------------------------------


def layouts_of(mapping: Mapping, *names: str) -> list[Layout]:
    return [
        handed_over(given_, rank=rank, world_size=len(names)).collect(mapping).layout
        for rank, given_ in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("abc", "acb"), ["number 2: trainer rank 1 handed over c, trainer rank 0 b"]),
        (("abc", "ab", "ab"), ["number 3: trainer ranks 1-2 handed over no more than 2, trainer rank 0 c"]),
        (
            ("ab", "abc", "b"),
            [
                "number 3: trainer rank 1 handed over c, trainer rank 0 no more than 2",
                "number 1: trainer rank 2 handed over b, trainer rank 0 a",
            ],
        ),
    ],
)
def test_ranks_that_differ_are_named_with_what_they_named(names: tuple[str, ...], said: list[str]) -> None:
    mapping = identity_mapping(("checkpoint", SHAPES))
    layouts = layouts_of(mapping, *names)
    only = frozenset(s.source for layout in layouts for s in layout.shards)
    with pytest.raises(MappingError, match="with the same names in the same order") as caught:
        build_plan(mapping, layouts, bucket_bytes=64, only=only)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == said


# --- the block -----------------------------------------------------------------------------------------


class Recorder:
    """Stands where a session is: takes what is submitted, and says whether the round was refused."""

    def __init__(self) -> None:
        self.mapping = identity_mapping(("checkpoint", SHAPES), dtype="float32")
        self.rank, self.world_size, self.version = 0, 1, 0  # the checkpoint
        self.device, self.closed, self.stale, self.outdated = None, "", False, False
        self.sent: list[tuple[int, dict[int, torch.Tensor], bool]] = []

    def submit(self, shards: Any, *, call: int, version: int | None, encoding: Encoding) -> Job:
        job = Job(shards, version=version or self.version + 1, call=call, encoding=encoding)
        values = {s.source: t.clone() for s, t in zip(shards.layout.shards, shards.tensors, strict=True)}
        self.sent.append((call, values, shards.partial))
        self.version = job.version
        job.finish(
            bridge.Receipt(
                version=job.version, bytes=1, transfer_s=0.0, stage_s=0.0, flip_s=0.0, transport="pull"
            ),
            None,
        )
        return job

    def refuse_round(self, reason: str) -> None:
        self.closed = reason

    def close(self) -> None:
        self.closed = self.closed or "closed"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The sessions that were opened."""
    found: list[Recorder] = []

    def open_(*_: object, **__: object) -> Recorder:
        found.append(Recorder())
        return found[-1]

    monkeypatch.setattr(Session, "open", open_)
    for name in ("VLLM_ENABLE_SHARED_WEIGHTS", "NUM_INFERENCE_NODES", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def trainer(opened: list[Recorder]) -> Iterator[bridge.Bridge]:
    with bridge.Bridge(bridge.BridgeConfig(logdir="unused")) as made:
        yield made


def one_round(trainer: bridge.Bridge, names: str = "abc", *, then: Any = lambda: None) -> Round:
    """A round of these parameters; ``then`` is called in its block behind the first one."""
    with trainer.round() as made:
        for index, name in enumerate(names):
            trainer.update_weight(name, tensors().get(name, torch.ones(1)))
            if index == 0:
                then()
    return made


@pytest.mark.parametrize("blocking", [True, False])
def test_a_block_is_one_version(opened: list[Recorder], trainer: bridge.Bridge, blocking: bool) -> None:
    buffer = torch.empty(0)
    with trainer.round(version=9, blocking=blocking) as made:
        for name, tensor in tensors().items():
            buffer = buffer.resize_(tensor.shape).copy_(tensor)  # one buffer for all of them
            trainer.update_weight(name, buffer)
        with pytest.raises(ConfigError, match="when its block has ended"):
            _ = made.receipt
        assert opened[0].sent == []
    ((call, values, partial),) = opened[0].sent
    assert call == 1
    assert not partial
    assert all(torch.equal(values[i], t) for i, t in enumerate(tensors().values()))
    assert made.receipt.version == 9
    assert made.receipt is made.receipt
    with pytest.raises(ConfigError, match=r"update_weight\('a'\) came after its round"):
        made.update_weight("a", tensors()["a"])


def test_update_weight_outside_a_round_says_what_to_call(
    opened: list[Recorder], trainer: bridge.Bridge
) -> None:
    with pytest.raises(ConfigError, match=r"update_weight\('a'\) belongs into a round.*broadcast_single_par"):
        trainer.update_weight("a", torch.ones(5, 4))
    assert opened == []


@pytest.mark.parametrize(
    "inner",
    [
        lambda t: t.round().__enter__(),
        lambda t: t.broadcast_single_param("a", torch.ones(5, 4)),
        lambda t: t.broadcast_weights(nn.Linear(2, 2)),
    ],
)
def test_a_round_inside_a_round_is_refused_and_abandons_it(
    opened: list[Recorder], trainer: bridge.Bridge, inner: Any
) -> None:
    with pytest.raises(ConfigError, match="a round is open"):
        one_round(trainer, then=lambda: inner(trainer))
    assert "the round was abandoned: ConfigError: a round is open" in opened[0].closed
    assert opened[0].sent == []


def test_an_empty_round_is_refused(opened: list[Recorder], trainer: bridge.Bridge) -> None:
    with pytest.raises(ConfigError, match="the round names no parameter"):
        one_round(trainer, "")
    assert "names no parameter" in opened[0].closed, "other ranks must not wait for this one"


def test_an_exception_abandons_the_round_and_the_next_one_is_a_new_epochs(
    opened: list[Recorder], trainer: bridge.Bridge
) -> None:
    made: list[Round] = []

    def fail() -> None:
        assert trainer._round is not None
        made.append(trainer._round)
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        one_round(trainer, then=fail)
    assert opened[0].closed == "the round was abandoned: ZeroDivisionError: by zero"
    assert opened[0].sent == []
    with pytest.raises(ConfigError, match="has a receipt when"):
        _ = made[0].receipt
    assert one_round(trainer, "a").receipt.version == 1
    ((call, _, partial),) = opened[1].sent
    assert call == 2, "abandoned rounds count: ranks compare the numbers of their broadcasts"
    assert partial


def test_a_round_that_another_rank_abandoned_is_told_at_its_end(
    opened: list[Recorder], trainer: bridge.Bridge
) -> None:
    """Gathers are collective: every rank must go through all of them."""
    seen: list[str] = []

    def go_through_all() -> None:
        opened[0].closed = "trainer rank 1: gone"
        for name in "bc":
            trainer.update_weight(name, tensors()[name])
            seen.append(name)

    with pytest.raises(RoundAborted, match="not sent: trainer rank 1: gone"):
        one_round(trainer, "a", then=go_through_all)
    assert seen == ["b", "c"]
    assert len(opened) == 1, "no other epoch is begun for it"


def test_faults_end_the_round_for_all_ranks(opened: list[Recorder], trainer: bridge.Bridge) -> None:
    with pytest.raises(MappingError, match="z: the server knows no such"):
        one_round(trainer, "z")
    assert "z: the server knows no such" in opened[0].closed
    assert opened[0].sent == []


def test_a_part_is_laid_over_this_trainers_own_version_only(
    opened: list[Recorder], trainer: bridge.Bridge
) -> None:
    one_round(trainer)
    opened[0].version = 12  # somebody else's
    with pytest.raises(ConfigError, match=r"laid over version 1, but the server at .* serves version 12"):
        one_round(trainer, "a")
    one_round(trainer)  # a whole one needs no base
    assert opened[1].sent


def test_the_module_functions_use_one_connection(
    opened: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_LOGDIR", "unused")
    try:
        with bridge.round() as made:
            for name, tensor in tensors().items():
                bridge.update_weight(name, tensor)
        assert made.receipt.version == 1
        with pytest.raises(BridgeError, match="belongs into a round"):
            bridge.update_weight("a", tensors()["a"])
    finally:
        bridge.close()
    assert len(opened) == 1


def test_copies_are_let_go_once_they_were_sent(opened: list[Recorder], trainer: bridge.Bridge) -> None:
    with trainer.round(blocking=False) as made:
        trainer.update_weight("a", tensors()["a"])
    assert made._named is None
    pending = made._outcome
    assert isinstance(pending, bridge.PendingBroadcast)
    assert pending.done
    assert pending._guard._holding == ()
    assert pending._job.shards.tensors == []
