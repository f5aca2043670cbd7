"""LoRA: what is sent is what peft's own merge makes of a copy, under the base model's names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bridge import Bridge, BridgeConfig
from bridge.adapters import merge
from bridge.declared import DeclaredLayout
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, shapes_of

peft = pytest.importorskip("peft")


class Base(nn.Module):
    def __init__(self, *, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.relu(self.up(self.embed(tokens)))))


def adapted(*, tie: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model with adapters that change what it computes."""
    torch.manual_seed(7)
    arguments = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **config}
    return randomised(peft.get_peft_model(Base(tie=tie), peft.LoraConfig(**arguments)), dtype)


def randomised(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.no_grad():  # B is zero at first, and a copy that is to be saved equals its original
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["embed", "down"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_sums_are_those_of_pefts_own_merge(config: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    found = merge(model)
    assert list(found) == list(Base().state_dict())
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["down.weight"], before["base_model.model.down.base_layer.weight"])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    mapping = identity_mapping(("checkpoint", shapes_of(expected)), dtype="bfloat16")
    assert len(collect(found, mapping, rank=0).tensors) == len(expected)


def test_float32_adapters_of_bfloat16_weights_are_rounded_once() -> None:
    model = adapted(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    up = model.base_model.model.up
    expected = up.base_layer.weight.float() + up.lora_B.default.weight @ up.lora_A.default.weight * (6 / 4)
    found = merge(model)["up.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(found, copy.deepcopy(model).merge_and_unload().up.weight)


def test_float32_adapters_of_a_bfloat16_embedding_are_rounded_with_the_sum() -> None:
    model = adapted(dtype=torch.bfloat16, target_modules=["embed"])
    embed = model.base_model.model.embed
    for factor in (embed.lora_embedding_A, embed.lora_embedding_B):
        factor.default.data = torch.randn(factor.default.shape)
    delta = (embed.lora_embedding_B.default @ embed.lora_embedding_A.default).T * (6 / 4)
    found = merge(model)["embed.weight"]
    assert torch.equal(found, (embed.base_layer.weight.float() + delta).bfloat16())
    assert not torch.equal(found, copy.deepcopy(model).merge_and_unload().embed.weight)


def test_sums_are_the_same_under_autocast() -> None:
    model = adapted()
    expected = merge(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_adapted_weights_are_copied() -> None:
    model = adapted()
    own = {t.data_ptr() for t in model.parameters()}
    found = merge(model)
    assert {name for name, t in found.items() if t.data_ptr() not in own} == {"up.weight", "down.weight"}
    assert len(found.kept) == len(found) - 2


def test_all_active_adapters_count_and_merged_ones_once() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    randomised(model)
    alone = merge(model)
    model.base_model.set_adapter(["default", "other"])
    expected = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"]).state_dict()
    both = merge(model)
    assert torch.equal(both["up.weight"], expected["up.weight"])
    assert not torch.equal(both["up.weight"], alone["up.weight"])
    model.base_model.merge_adapter(["default"])
    torch.testing.assert_close(merge(model)["up.weight"], expected["up.weight"])


def test_a_module_that_the_active_adapter_does_not_replace_is_the_original() -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    randomised(model)
    model.set_adapter("other")
    found = merge(model)
    assert torch.equal(found["lm_head.weight"], model.base_model.model.lm_head.original_module.weight)
    assert torch.equal(found["down.weight"], model.base_model.model.down.base_layer.weight)
    assert list(found) == list(Base().state_dict())


def test_wrappers_around_it_leave_no_trace() -> None:
    assert list(merge(nn.DataParallel(torch.compile(adapted())))) == list(Base().state_dict())


def test_sums_of_parts_are_placed_by_the_base_models_names() -> None:
    shapes = {**shapes_of(canonical_names(Base())), "up.weight": (24, 8), "up.bias": (24,)}
    layout = DeclaredLayout(tp_degree=2, tp_shard_dim={"up.weight": 0, "up.bias": 0})
    sums, mapping = merge(adapted()), identity_mapping(("checkpoint", shapes))
    found = collect(sums, mapping, rank=1, layout=layout)
    index = list(shapes).index("up.weight")
    ((shard, tensor),) = [
        (s, t) for s, t in zip(found.layout.shards, found.tensors, strict=True) if s.source == index
    ]
    assert (shard.offset, shard.shape) == ((12, 0), (12, 8))
    assert torch.equal(tensor, sums["up.weight"])


# --- refusals ---------------------------------------------------------------------------------------------


def test_adapters_that_nobody_asked_for_are_refused_with_what_to_call() -> None:
    mapping = identity_mapping(("checkpoint", shapes_of(canonical_names(Base()))))
    with pytest.raises(MappingError, match=r'model\.up has adapters .*\(model, adapters="merge"\)'):
        collect(adapted(), mapping, rank=0)


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: adapted(use_dora=True), [r"up: adapter default is a variant of LoRA", r"down: adapter"]),
        (lambda: adapted(lora_bias=True, target_modules=["up"]), [r"up: adapter default has a bias"]),
        (lambda: disabled(adapted()), [r"up: its adapters are disabled", r"down: its adapters"]),
        (
            lambda: adapted(tie=True, target_modules=["embed"]),
            [r"embed\.base_layer\.weight: is tied", r"lm_head\.weight: is tied"],
        ),
        (
            lambda: adapted(tie=True, modules_to_save=["embed"]),
            [r"lm_head\.weight: is tied to another"],
        ),
        (
            lambda: peft.get_peft_model(
                Base(), peft.IA3Config(target_modules=["up"], feedforward_modules=["up"])
            ),
            [r"up: is adapted by peft\.tuners\.ia3\.layer\.Linear; only LoRA's"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")
def test_what_cannot_be_merged_is_refused_by_name(make: Any, said: list[str]) -> None:
    with pytest.raises(MappingError, match=rf"^{len(said)} fault\(s\)") as caught:
        merge(make())
    for words in said:
        caught.match(words)


def test_adapters_need_a_model_that_has_some() -> None:
    with Bridge(BridgeConfig(logdir="unused")) as trainer:
        with pytest.raises(ConfigError, match="this one has none"):
            trainer.broadcast_weights(Base(), adapters="merge")
        with pytest.raises(ConfigError, match="adapters is 'both'; it must be 'merge' or 'only'"):
            trainer.broadcast_weights(Base(), adapters="both")  # type: ignore[arg-type]
