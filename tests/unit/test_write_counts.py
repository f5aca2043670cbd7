"""Writes in place that no guard sees: the round in which weights were written fails, by their names."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bridge.catalogue import Catalogue
from bridge.errors import TransferError
from bridge.guard import Guarded
from bridge.job import Job
from bridge.moving import Mover
from bridge.names import canonical_names
from bridge.parts import Round, collect_single
from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import build_plan
from bridge.protocol.session import Released
from bridge.rounds import Session
from bridge.sharding import LocalShards, collect
from bridge.wire.transport import ADDRESS_TAG, DIGEST_TAG, PULL
from tests.support.mappings import identity_mapping, shapes_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)
        self.down = nn.Linear(3, 4, bias=False)
        self.register_buffer("scale", torch.ones(3))


def mapping_of(model: nn.Module) -> Mapping:
    return identity_mapping(("checkpoint", shapes_of(canonical_names(model))), dtype="float32")


def walked(model: Model, mapping: Mapping) -> LocalShards:
    return collect(model, mapping, rank=0)


def known(model: Model, mapping: Mapping) -> LocalShards:
    shards = walked(model, mapping)
    found = Catalogue(model, mapping, shards, Guarded(model.parameters())).find(model, mapping)
    assert found is not None
    return found


def by_name(model: Model, mapping: Mapping) -> LocalShards:
    return collect(model.state_dict(), mapping, rank=0)


def average(model: Model) -> None:
    model.down.weight.lerp_(torch.ones(4, 3), 0.5)


def copy_from_masters(model: Model) -> None:
    torch._foreach_copy_([model.down.weight], [torch.ones(4, 3)])


def write_a_view(model: Model) -> None:
    model.down.weight.detach()[1:].zero_()


def said(shards: LocalShards, mapping: Mapping) -> str:
    with pytest.raises(TransferError) as caught:
        shards.check_unwritten(mapping, "the round was given up")
    return str(caught.value)


@pytest.mark.parametrize("find", [walked, known, by_name])
@pytest.mark.parametrize("write", [average, copy_from_masters, write_a_view])
def test_a_write_is_noticed_by_name(
    find: Callable[[Model, Mapping], LocalShards], write: Callable[[Model], None]
) -> None:
    model = Model()
    mapping = mapping_of(model)
    shards = find(model, mapping)
    with torch.no_grad():
        model.up.weight.clone().zero_()
        shards.check_unwritten(mapping, "all is well")
        write(model)
        text = said(shards, mapping)
        assert "1 weight(s) were written in place while they were read (down.weight)" in text
        assert "wait_released() before other writes" in text
        model.scale.zero_()
        assert "2 weight(s)" in said(shards, mapping)
        find(model, mapping).check_unwritten(mapping, "the next round begins anew")


def test_copies_may_be_written_over() -> None:
    """Handed over in a round, or not contiguous and therefore copied."""
    model, mapping = Model(), identity_mapping(("checkpoint", {"w": (4, 3)}), dtype="float32")
    made = Round(rank=0, world_size=1)
    made.update_weight("w", model.down.weight)
    turned = torch.ones(3, 4).t()
    for shards in (made.collect(mapping), collect({"w": turned}, mapping, rank=0)):
        with torch.no_grad():
            model.down.weight.zero_()
            turned.zero_()
        shards.check_unwritten(mapping, "all is well")
    single = collect_single("w", model.down.weight, mapping, rank=0)
    with torch.no_grad():
        model.down.weight.zero_()
    assert "(w)" in said(single, mapping)


def test_tensors_without_a_count_are_let_be() -> None:
    with torch.inference_mode():
        tensor = torch.ones(4, 3)
    plain, mapping = torch.ones(2), identity_mapping(("checkpoint", {"a": (4, 3), "b": (2,)}))
    shards = collect({"a": tensor, "b": plain}, mapping, rank=0)
    with torch.inference_mode():
        tensor.zero_()
    shards.check_unwritten(mapping, "nobody counted")
    plain.zero_()
    assert "(b)" in said(shards, mapping)


def test_nothing_is_held_behind_the_round() -> None:
    model = Model()
    mapping = mapping_of(model)
    shards = known(model, mapping)
    gone = weakref.ref(model.down.weight)
    Job(shards, version=1, call=1, encoding="dense").finish(None, None)
    del model
    assert gone() is None
    shards.check_unwritten(mapping, "it is over")


class Group:
    """In the place of the data group: remembers what was sent."""

    def __init__(self) -> None:
        self.tags: list[int] = []

    def send(self, _: Any, __: int, tag: int) -> Any:
        self.tags.append(tag)
        return self

    def wait(self, _: Any) -> None:
        pass


def test_without_checksums_nothing_is_staged() -> None:
    model = Model()
    mapping = mapping_of(model)
    shards = walked(model, mapping)
    plan = build_plan(mapping, [shards.layout], bucket_bytes=16)
    group: Any = Group()
    mover = Mover(group, [PULL], mapping, rank=0, world_size=1, deadline_s=9, device=None, checksum="always")

    def in_the_middle(index: int) -> None:
        if index == 1:
            with torch.no_grad():
                average(model)

    with pytest.raises(TransferError, match=r"\(down\.weight\), so the round was given up"):
        mover.move(plan, shards, joint="a", encoding="dense", before=in_the_middle)
    assert group.tags == [ADDRESS_TAG]
    mover.move(plan, walked(model, mapping), joint="b", encoding="dense", before=lambda _: None)
    assert group.tags == [ADDRESS_TAG, ADDRESS_TAG, DIGEST_TAG]


def test_weights_are_looked_at_again_before_they_are_free() -> None:
    """Updaters that read GPUs do so later than the trainer's own end can tell."""
    model = Model()
    session = object.__new__(Session)
    session.mapping = mapping_of(model)
    job = Job(walked(model, session.mapping), version=7, call=1, encoding="dense")
    with torch.no_grad():
        average(model)
    with pytest.raises(TransferError, match=r"\(down\.weight\), so version 7 may be live and a mixture"):
        session._perform(job, Released(7))
    assert not job.free
