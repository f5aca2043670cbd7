"""DeepSpeed ZeRO-3 over real ranks: runs of flattened parameters, put together, are the whole tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bridge import Bridge, BridgeConfig, zero3
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names
from bridge.parts import Round
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, shapes_of
from tests.support.ranks import put_together, run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    # Small parameters are kept whole on every rank, the others are partitioned.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 12},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
}


class Net(nn.Module):
    """Parameters of one to three dimensions, in sizes that 2 and 3 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.experts = nn.Parameter(torch.randn(3, 5, 7))
        self.norm = nn.Parameter(torch.ones(7))
        self.bias = nn.Parameter(torch.zeros(17))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) * self.norm
        return torch.einsum("bsh,eih->bsei", hidden, self.experts).sum() + self.bias.sum()


def engine(world_size: int, **zero: object) -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    # Else it compiles a collective of its own first, under a lock that a killed process leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(3)
    model = Net()
    config = {**CONFIG, "train_batch_size": world_size}
    config["zero_optimization"] = {**CONFIG["zero_optimization"], **zero}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def whole(model: Any) -> dict[str, torch.Tensor]:
    """What DeepSpeed itself gathers."""
    import deepspeed

    found = {}
    for name, parameter in model.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            found[name] = parameter.detach().clone()
    return found


def step(model: Any) -> None:
    model.backward(model(torch.arange(4)[None]))
    model.step()


def partitioned(_: Path) -> None:
    model = engine(dist.get_world_size())
    expected = whole(model)
    mapping = identity_mapping(("checkpoint", shapes_of(expected)))
    for _round in range(2):
        shards = collect(model, mapping, rank=dist.get_rank())
        plan, found = put_together(shards, mapping)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert plan.total_bytes == sum(t.nbytes for t in expected.values())
        # Nothing was gathered or copied: what a rank shows is its own partition.
        owned = {p.ds_tensor.untyped_storage().data_ptr() for p in model.module.parameters()}
        mine = [
            t for t, owner in zip(shards.tensors, shards.owners, strict=True) if zero3.is_partitioned(owner)
        ]
        assert mine
        assert {t.untyped_storage().data_ptr() for t in mine} <= owned
        assert not shards.lasting
        step(model)
        before, expected = expected, whole(model)
        assert not torch.equal(before["experts"], expected["experts"])


def gathered(_: Path) -> None:
    """One parameter gathered at a time, handed over, and let go: each rank keeps its share of it."""
    import deepspeed

    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = engine(world_size)
    expected = whole(model)
    mapping = identity_mapping(("checkpoint", shapes_of(expected)))
    one_by_one = Round(rank=rank, world_size=world_size)
    for name, parameter in model.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            one_by_one.update_weight(name, parameter)
    as_they_are = Round(rank=rank, world_size=world_size)
    for name, parameter in model.module.named_parameters():
        as_they_are.update_weight(name, parameter)
    step(model)
    for made in (one_by_one, as_they_are):
        shards = made.collect(mapping)
        plan, found = put_together(shards, mapping)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert plan.total_bytes == sum(t.nbytes for t in expected.values())
        held = sum(t.untyped_storage().nbytes() for t in shards.tensors)
        assert held < 0.6 * plan.total_bytes, "a rank keeps what it sends, not the model"


def refusals(_: Path) -> None:
    model = engine(dist.get_world_size())
    assert zero3.steps_by_itself(model.module, model.module.parameters())
    assert zero3.steps_by_itself(model, [])
    assert not zero3.steps_by_itself(Net(), Net().parameters())
    expected = whole(model)
    wrong = {**shapes_of(expected), "experts": (3, 5, 8)}
    with pytest.raises(MappingError, match=r"experts: the model's has shape \(3, 5, 7\)"):
        collect(model, identity_mapping(("checkpoint", wrong)), rank=dist.get_rank())
    parameter = dict(canonical_names(model))["experts"]
    parameter.ds_tensor = parameter.ds_tensor.to(torch.float16)  # type: ignore[attr-defined]
    with pytest.raises(MappingError, match=r"quantised torch\.float16"):
        collect(model, identity_mapping(("checkpoint", shapes_of(expected))), rank=dist.get_rank())


def whole_in_flat_buffers(_: Path) -> None:
    """ZeRO-1 and 2 step in place where nobody is asked, over what a state dict shows without a mark."""
    before = Net()
    assert not zero3.steps_by_itself(None, before.state_dict().values())
    for stage in (1, 2):
        model = engine(dist.get_world_size(), stage=stage)
        assert not zero3.steps_by_itself(before, before.parameters()), "another model is not DeepSpeed's"
        state = model.module.state_dict()
        held = {name: tensor.clone() for name, tensor in state.items()}
        with Bridge(BridgeConfig(logdir="unused")) as trainer:
            for named in (model, model.module, state):
                with pytest.raises(ConfigError, match=r"DeepSpeed.*blocking=True.*round\(blocking=False\)"):
                    trainer.broadcast_weights(named, blocking=False)
            with pytest.raises(ConfigError, match="DeepSpeed"):
                trainer.broadcast_single_param("norm", state["norm"], blocking=False)
        step(model)
        assert not any(torch.equal(held[name], state[name]) for name in held), "they are its own memory"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("scenario", "world_size"),
    [(partitioned, 2), (partitioned, 3), (gathered, 2), (refusals, 2), (whole_in_flat_buffers, 2)],
)
def test_ranks(scenario: Any, world_size: int, tmp_path: Path) -> None:
    run_ranks(scenario, world_size, tmp_path)
