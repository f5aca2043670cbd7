"""What was collected is used again only while the model is, object by object and byte by byte, the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bridge.catalogue import Catalogue
from bridge.guard import Guarded
from bridge.names import canonical_names
from bridge.protocol.mapping import Mapping
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, shapes_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.ones(3))


def made() -> tuple[Model, Mapping, Catalogue]:
    model = Model()
    mapping = identity_mapping(("checkpoint", shapes_of(canonical_names(model))))
    shards = collect(model, mapping, rank=0)
    return model, mapping, Catalogue(model, mapping, shards, Guarded(model.parameters()))


def test_an_optimizer_step_changes_nothing_that_matters() -> None:
    model, mapping, catalogue = made()
    assert catalogue.find(model, mapping) is not None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    again = catalogue.find(model, mapping)
    assert again is not None
    fresh = collect(model, mapping, rank=0)
    assert again.layout == fresh.layout
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, fresh.tensors, strict=True))


def test_what_is_being_sent_is_memory_and_not_the_parameter_that_had_it() -> None:
    """A trainer may put other memory under its parameters while a round is under way."""
    model, mapping, catalogue = made()
    shards = catalogue.find(model, mapping)
    assert shards is not None
    before = [tensor.clone() for tensor in shards.tensors]
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 7.0)
    assert all(torch.equal(a, b) for a, b in zip(shards.tensors, before, strict=True))


def replace_parameter(model: Model) -> None:
    model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach().clone())


def replace_module(model: Model) -> None:
    model.layers[0] = nn.Linear(4, 4)


def move_memory(model: Model) -> None:
    model.embed.weight.data = model.embed.weight.detach().clone()


def turn(model: Model) -> None:
    model.layers[0].weight.data = model.layers[0].weight.data.t()


def change_dtype(model: Model) -> None:
    model.half()


def add_module(model: Model) -> None:
    model.head = nn.Linear(4, 2)


def test_nothing_is_kept_alive() -> None:
    model, _, catalogue = made()
    memory = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [reference() for reference in memory] == [None] * len(memory)
    assert catalogue.guarded.ids


def replace_buffer(model: Model) -> None:
    model.scale = torch.zeros(3)


def drop_parameter(model: Model) -> None:
    del model.layers[1].bias


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter,
        replace_module,
        move_memory,
        turn,
        change_dtype,
        add_module,
        replace_buffer,
        drop_parameter,
    ],
)
def test_any_other_change_is_noticed(change: Callable[[Model], None]) -> None:
    model, mapping, catalogue = made()
    change(model)
    assert catalogue.find(model, mapping) is None


def test_another_model_or_mapping_is_not_the_same() -> None:
    model, mapping, catalogue = made()
    assert catalogue.find(Model(), mapping) is None
    other = identity_mapping(("checkpoint", shapes_of(canonical_names(model))))
    assert catalogue.find(model, other) is None


def test_a_parameter_that_was_copied_is_copied_again() -> None:
    model, _, _ = made()
    model.layers[0].weight = nn.Parameter(torch.ones(4, 4).t()[:, :])
    model.layers[0].weight.data = torch.arange(16.0).view(4, 4).t()
    mapping = identity_mapping(("checkpoint", shapes_of(canonical_names(model))))
    shards = collect(model, mapping, rank=0)
    assert not all(shards.contiguous)
    assert Catalogue(model, mapping, shards, Guarded(())).find(model, mapping) is None
