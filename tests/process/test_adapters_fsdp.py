"""LoRA over real FSDP2 ranks: what they send, put together, is the whole model's; merged, and by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bridge.adapters import merge
from bridge.names import canonical_names
from bridge.served_adapter import collect_adapter, find
from bridge.sharding import collect
from tests.support.mappings import MISSING, identity_mapping, shapes_of
from tests.support.ranks import put_together, run_ranks
from tests.support.served_adapters import MODULES, Base, brought, served

pytest.importorskip("peft")


def merged(_: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 5), nn.Linear(5, 7, bias=False))
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1", "2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    expected = dict(copy.deepcopy(model).merge_and_unload().state_dict())
    fully_shard(model)
    before = [p.to_local().clone() for p in canonical_names(model, adapters=True).values()]  # type: ignore[attr-defined]
    mapping = identity_mapping(("checkpoint", shapes_of(expected)))
    shards = collect(merge(model), mapping, rank=dist.get_rank())
    plan, whole = put_together(shards, mapping)
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor)
    assert plan.total_bytes == sum(t.nbytes for t in expected.values())
    after = [p.to_local() for p in canonical_names(model, adapters=True).values()]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def by_itself(_: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(Base(), LoraConfig(r=3, lora_alpha=5, target_modules=list(MODULES)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    expected = {}
    for module in MODULES:
        layer = model.get_submodule(f"base_model.model.{module}")
        expected[f"{module}.lora_A.weight"] = layer.lora_A["default"].weight.detach().clone()
        expected[f"{module}.lora_B.weight"] = layer.lora_B["default"].weight.detach() * (5 / 3)
    for module in MODULES:
        fully_shard(model.get_submodule(f"base_model.model.{module}"))
    fully_shard(model)
    mapping = served("policy")
    shards = collect_adapter(find(model, adapter=None, served_as=None), mapping, rank=dist.get_rank())
    assert sum(t.numel() for t in shards.tensors) < 1 + sum(t.numel() for t in expected.values())
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (shards.layout, shards.tensors))
    found = brought(gathered, mapping)
    for name, whole in expected.items():
        rows, columns = whole.shape
        torch.testing.assert_close(found[name][:rows, :columns], whole, rtol=0, atol=0)
        assert int((found[name] != MISSING).sum()) == whole.numel()


@pytest.mark.processes
@pytest.mark.parametrize("scenario", [merged, by_itself])
def test_two_ranks(scenario: Callable[[Path], None], tmp_path: Path) -> None:
    run_ranks(scenario, 2, tmp_path)
