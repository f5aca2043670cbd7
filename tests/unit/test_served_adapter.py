"""One adapter by itself: what is sent of it, as vLLM would load it from files, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bridge import Bridge, BridgeConfig
from bridge.declared import DeclaredLayout
from bridge.errors import ConfigError, MappingError
from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Leading, build_plan
from bridge.served_adapter import collect_adapter, find
from bridge.sharding import LocalShards, collect
from tests.support.mappings import MISSING
from tests.support.served_adapters import MODULES, Base, brought, served

peft = pytest.importorskip("peft")


def adapted(*, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(7)
    arguments = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **config}
    model = peft.get_peft_model(Base(), peft.LoraConfig(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model.to(dtype)


def gathered(model: nn.Module, mapping: Mapping, **names: Any) -> LocalShards:
    found = find(model, adapter=names.get("adapter"), served_as=names.get("served_as"))
    return collect_adapter(found, mapping, rank=0)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"target_modules": ["down"]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_and_scaled_b_arrive_and_nothing_else(config: dict[str, Any], dtype: torch.dtype) -> None:
    model, mapping = adapted(dtype=dtype, **config), served("policy")
    shards = gathered(model, mapping)
    assert shards.partial
    found = brought([(shards.layout, shards.tensors)], mapping)
    assert found["sent"].item() == 1
    for module in MODULES:
        a, b = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
        layer = model.get_submodule(f"base_model.model.{module}")
        if module not in config.get("target_modules", MODULES):
            assert bool((a == MISSING).all() and (b == MISSING).all())
            continue
        assert torch.equal(a[:4], layer.lora_A["default"].weight.float())
        assert torch.equal(b[:, :4], layer.lora_B["default"].weight.float() * layer.scaling["default"])
        assert bool((a[4:] == MISSING).all() and (b[:, 4:] == MISSING).all())


def test_b_is_rounded_as_vllm_rounds_it() -> None:
    """Cast first, scaled in the server's dtype: 0.7 is not a power of two, so the order shows."""
    model, mapping = adapted(lora_alpha=2.8), served("policy", dtype="bfloat16")
    shards = gathered(model, mapping)
    weight = model.get_submodule("base_model.model.up").lora_B["default"].weight
    expected = weight.to(torch.bfloat16)
    expected *= 0.7
    assert not torch.equal(expected, (weight * 0.7).to(torch.bfloat16))
    assert torch.equal(
        brought([(shards.layout, shards.tensors)], mapping)["up.lora_B.weight"][:, :4], expected
    )


def test_the_model_may_change_at_once() -> None:
    model, mapping = adapted(), served("policy")
    first, shards = gathered(model, mapping), gathered(model, mapping)
    before = brought([(first.layout, first.tensors)], mapping)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    after = brought([(shards.layout, shards.tensors)], mapping)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_which_adapter_is_which() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["down"]))
    assert gathered(model, served("policy")).layout.vocabulary == "adapter:policy"  # nobody named either
    mapping = served("policy", "second")
    with pytest.raises(MappingError, match="would be served as 'default', and the server takes: policy, sec"):
        gathered(model, mapping)
    assert gathered(model, mapping, served_as="second").layout.vocabulary == "adapter:second"
    second = gathered(model, mapping, adapter="second")
    assert second.layout.vocabulary == "adapter:second"
    assert max(shard.shape[0] for shard in second.layout.shards if shard.shape[1:] == (12,)) == 2
    with pytest.raises(ConfigError, match="no adapter 'third'; it has: default, second"):
        gathered(model, mapping, adapter="third")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="active are: default, second"):
        gathered(model, mapping)
    with pytest.raises(MappingError, match="takes no adapters; start it with --enable-lora"):
        gathered(adapted(), served())


def test_all_that_does_not_fit_is_told_at_once() -> None:
    config = {"r": 16, "target_modules": ["up", "embed", "lm_head"], "modules_to_save": ["down"]}
    model = adapted(**config, bias="lora_only")
    with pytest.raises(MappingError) as caught:
        gathered(model, served("policy"))
    for words in (
        "has modules_to_save",
        r"trains biases of the base model \(bias='lora_only'\)",
        r"down: is trained whole \(modules_to_save\)",
        "embed: has LoRA of an embedding",
        "up.lora_A.weight: has rank 16, above the server's --max-lora-rank 8",
        "up.lora_B.weight: has rank 16",
        "lm_head.lora_A.weight: the server takes no LoRA there",
        "Nothing was sent, and the server keeps what it serves",
    ):
        caught.match(words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "has DoRA, which is not served"),
        ({"lora_bias": True, "target_modules": ["up"]}, "a bias of LoRA's own"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights in the trainer"),
    ],
)
def test_variants_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(MappingError, match=words):
        gathered(adapted(**config), served("policy"))


def test_what_began_by_changing_the_base_model_is_refused() -> None:
    model = adapted()
    model.peft_config["default"].init_lora_weights = "lora_ga"  # set by itself it needs gradients of a model
    with pytest.raises(MappingError, match="init_lora_weights='lora_ga', which changes the base model's"):
        gathered(model, served("policy"))


def test_another_adapter_that_is_merged_into_the_base_model_is_refused() -> None:
    model = adapted()
    model.add_adapter("sft", peft.LoraConfig(r=4, target_modules=["up"]))
    model.merge_adapter(["sft"])
    with pytest.raises(MappingError, match="up: has sft merged into its weights"):
        gathered(model, served("policy"), adapter="default")


def test_float16_is_not_cast_to_bfloat16() -> None:
    with pytest.raises(MappingError, match="is float16, which is not cast to the server's bfloat16"):
        gathered(adapted(dtype=torch.float16), served("policy", dtype="bfloat16"))


def test_another_model_is_refused_by_shape() -> None:
    model = adapted()
    layer = model.get_submodule("base_model.model.up").lora_A["default"]
    layer.weight = nn.Parameter(torch.zeros(4, 9))
    with pytest.raises(MappingError, match=r"has shape \(4, 9\), of which the server takes up to \(8, 8\)"):
        gathered(model, served("policy"))


def test_ranks_must_have_the_same_adapter_and_all_of_it() -> None:
    mapping = served("policy")
    one = gathered(adapted(), mapping)
    other = gathered(adapted(r=2), mapping)
    other = copy.copy(other)
    object.__setattr__(other, "layout", type(other.layout)(**{**fields(other.layout), "rank": 1}))
    with pytest.raises(MappingError, match=r"is \(2, 8\) in this rank's adapter, \(4, 8\) in that of rank 0"):
        brought([(one.layout, one.tensors), (other.layout, other.tensors)], mapping)
    # A source that is announced, and of which nobody holds a part; and one of which a row is missing.
    layout = one.layout
    held = [shard for shard in layout.shards if shard.source != layout.leading[0].source]
    lost = type(layout)(**{**fields(layout), "shards": tuple(held)})
    with pytest.raises(MappingError, match="held by none of them"):
        build_plan(mapping, [lost], bucket_bytes=64, only=lost.named)
    more = Leading(source=layout.leading[0].source, shape=(5, 8))
    short = type(layout)(**{**fields(layout), "leading": (more, *layout.leading[1:])})
    with pytest.raises(MappingError, match="too little for inference rank 0"):
        build_plan(mapping, [short], bucket_bytes=64, only=short.named)


def fields(layout: Any) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in layout.__struct_fields__}


def test_names_of_adapters_are_no_names_of_the_model() -> None:
    mapping = served("policy")
    matrices = {s.name: torch.zeros(s.shape) for s in mapping.adapters["policy"].sources}
    with pytest.raises(MappingError, match="no parameter of the model has a name the server knows"):
        collect(matrices, mapping, rank=0)
    assert [vocabulary.name for vocabulary in mapping.of_the_model] == ["checkpoint"]


def test_options_that_contradict_each_other() -> None:
    layout = DeclaredLayout(tp_degree=1, dp_shard_degree=1, tp_shard_dim={})
    with Bridge(BridgeConfig(logdir="unused")) as trainer:
        for options, words in (
            ({"adapters": "merge", "adapters_only": True}, "adapters='merge' does not"),
            ({"served_as": "policy"}, "with adapters='only'"),
            ({"adapters": "merge", "adapter": "default"}, "with adapters='only'"),
            ({"adapters_only": True, "layout": layout}, "takes no layout"),
        ):
            with pytest.raises(ConfigError, match=words):
                trainer.broadcast_weights(adapted(), **options)
        with pytest.raises(ConfigError, match="is for a model"):
            trainer.broadcast_weights({"up.lora_A.weight": torch.zeros(4, 8)}, adapters_only=True)
        with pytest.raises(ConfigError, match="this one has none"):
            trainer.broadcast_weights(Base(), adapters_only=True)
