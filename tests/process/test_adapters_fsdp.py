"""LoRA over real FSDP2 ranks: the ranks' sums put together are what peft's merge makes of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bridge.adapters import merge
from bridge.names import canonical_names
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, shapes_of
from tests.support.ranks import put_together, run_ranks

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


@pytest.mark.processes
def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(merged, 2, tmp_path)
