"""One LoRA adapter of peft, sent by itself to a server that has loaded one. peft is not imported.

Only A and B travel, under the name that the adapter is served by. B carries its scaling, rounded as vLLM
rounds it when it loads an adapter's files, so that both serve the same bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import nn

from bridge import zero3
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names, has_adapters, is_kind_of, own_kind
from bridge.protocol.holders import CASTS
from bridge.protocol.mapping import ADAPTER_FLAG, Source, Vocabulary
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.plan import Leading
from bridge.sharding import LocalShards, Part, device_of, make_shards, part_of

PEFTS_DEFAULT = "default"  # the adapter's name where nobody gave one
_MATRIX = re.compile(r"^(?:base_model\.model\.)?(.+\.lora_[AB])\.[^.]+\.(weight)$")
# What a checkpoint of the adapter would be refused for too, or would not hold. By peft's LoraConfig.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of LoRA's own (lora_bias)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "modules_to_save": "modules_to_save: modules that are trained whole",
    "trainable_token_indices": "trainable_token_indices: tokens that are trained whole",
    "target_parameters": "target_parameters: LoRA of parameters that are no linear layer's",
}


@dataclasses.dataclass(frozen=True)
class AdapterTensors:
    """One adapter's matrices by the names of its vocabulary, each with its scaling, and whose they are.

    ``faults`` say why the adapter cannot be served by itself, whatever the server.
    """

    name: str
    served_as: str | None
    tensors: dict[str, tuple[torch.Tensor, float]]
    faults: tuple[str, ...]


def find(model: nn.Module, *, adapter: str | None, served_as: str | None) -> AdapterTensors:
    """The matrices of one adapter of a peft model, as they are in the model.

    Args:
        model: a model with LoRA adapters.
        adapter: peft's name of the one to send; None if one is active.
        served_as: the name it is served by; None for its own.

    Raises:
        ConfigError: there are no adapters, or ``adapter`` does not name one of them.
        MappingError: part of the model is wrapped by FSDP1.
    """
    layers = {name: module for name, module in model.named_modules() if has_adapters(module)}
    if not layers:
        raise ConfigError("adapters='only' needs a model with peft's LoRA adapters, and this one has none")
    name = _choose(layers, adapter)
    names = {id(tensor): name for name, tensor in canonical_names(model, adapters=True).items()}
    faults = list(_config_faults(model, name))
    tensors: dict[str, tuple[torch.Tensor, float]] = {}
    for path, layer in layers.items():
        if name not in _held(layer):
            continue
        if fault := _fault(layer, name):
            faults.append(f"{path}: {fault}")
            continue
        for matrices, scaling in ((layer.lora_A, 1.0), (layer.lora_B, float(layer.scaling[name]))):
            weight = matrices[name].weight
            if (found := _MATRIX.match(names[id(weight)])) is None:
                faults.append(f"{names[id(weight)]}: peft's name for it is not one the bridge can read")
            else:
                tensors[f"{found[1]}.{found[2]}"] = weight, scaling
    return AdapterTensors(name, served_as, tensors, tuple(faults))


def _held(layer: Any) -> list[str]:
    """The adapters that a layer of peft's has something for."""
    if is_kind_of(layer, "LoraLayer"):
        return [*layer.lora_A, *layer.lora_embedding_A]
    return [*getattr(layer, "modules_to_save", ()), *getattr(layer, "_adapters", ())]


def _choose(layers: dict[str, Any], wanted: str | None) -> str:
    known = list(dict.fromkeys(name for layer in layers.values() for name in _held(layer)))
    active = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    if wanted is not None:
        if wanted not in known:
            raise ConfigError(f"the model has no adapter {wanted!r}; it has: {', '.join(known)}")
        return wanted
    if len(active) != 1:
        listing = ", ".join(active) or "none"
        raise ConfigError(
            f"adapters='only' sends one adapter, and active are: {listing}; name the one by adapter="
        )
    return str(active[0])


def _config_faults(model: nn.Module, name: str) -> Iterator[str]:
    configs = (getattr(module, "peft_config", None) for module in model.modules())
    config = next((found[name] for found in configs if isinstance(found, dict) and name in found), None)
    if config is None:
        return
    for field, what in _VARIANTS.items():
        if getattr(config, field, None):
            yield f"adapter {name} has {what}, which is not served"
    if getattr(config, "bias", "none") != "none":
        yield f"adapter {name} trains biases of the base model (bias={config.bias!r})"
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"adapter {name} began with init_lora_weights={init!r}, which changes the base model's weights "
            "in the trainer, but not in the server"
        )


def _fault(layer: Any, name: str) -> str:
    """Why a layer's part of an adapter cannot be sent, or ""."""
    kind = own_kind(layer)
    if is_kind_of(layer, "ModulesToSaveWrapper"):
        return "is trained whole (modules_to_save), which an adapter alone does not carry"
    if is_kind_of(layer, "LoraLayer") and kind == "Embedding":
        return "has LoRA of an embedding, which is not served"
    if not (is_kind_of(layer, "LoraLayer") and kind == "Linear"):
        return f"is adapted by {type(layer).__module__}.{kind}; only LoRA of linear layers is sent"
    if name in getattr(layer, "lora_variant", {}):
        return f"adapter {name} is a variant of LoRA there (such as DoRA); only plain LoRA is sent"
    if getattr(layer, "lora_bias", {}).get(name):
        return f"adapter {name} has a bias there (lora_bias=True)"
    if others := sorted(set(getattr(layer, "merged_adapters", ())) - {name}):
        return f"has {', '.join(others)} merged into its weights, which the server's base model has not"
    if any(zero3.is_partitioned(tensor) for tensor in layer.parameters()):
        return "is partitioned by ZeRO-3; its matrices cannot be sent by themselves"
    return ""


@torch.no_grad()
def collect_adapter(found: AdapterTensors, mapping: MappingDocument, *, rank: int) -> LocalShards:
    """This rank's shards of an adapter: copies, in the server's dtype, so the model may change at once.

    Raises:
        MappingError: the adapter is not served, or does not fit; lists every fault.
    """
    faults = list(found.faults)
    vocabulary = _vocabulary(found, mapping)
    if isinstance(vocabulary, str):
        raise _unfit([vocabulary, *faults], found, mapping, rank)
    known = {source.name: (index, source) for index, source in enumerate(vocabulary.sources)}
    present: list[tuple[int, Source, Part]] = []
    leading: list[Leading] = []
    for name, (tensor, scaling) in found.tensors.items():
        if name not in known or name in vocabulary.unused:
            faults.append(f"{name}: the server takes no LoRA there")
            continue
        index, source = known[name]
        part = part_of(tensor)
        if fault := part.fault or _misfit(name, part, source):
            faults.append(f"{name}: {fault}")
            continue
        leading.append(Leading(source=index, shape=part.shape))
        dtype = getattr(torch, source.dtype)
        copies = [(box, _copied(local, dtype, scaling)) for box, local in part.boxes]
        present.append((index, source, Part(source.shape, source.dtype, copies)))
    if not found.tensors:
        faults.append(f"adapter {found.name} has no matrix that could be sent")
    if faults:
        raise _unfit(faults, found, mapping, rank)
    index, source = known[ADAPTER_FLAG]
    device = device_of(tensor for tensor, _ in found.tensors.values())  # shards are sent from one
    flag = torch.ones(source.shape, dtype=getattr(torch, source.dtype), device=device)
    present.append((index, source, Part(source.shape, source.dtype, [(((0,), (1,)), flag)])))
    leading.append(Leading(source=index, shape=source.shape))
    shards = make_shards(present, mapping, vocabulary, rank, [])
    layout = msgspec.structs.replace(shards.layout, leading=tuple(leading))
    return dataclasses.replace(shards, layout=layout, partial=True)


def _vocabulary(found: AdapterTensors, mapping: MappingDocument) -> Vocabulary | str:
    """The one of the served name, or why there is none."""
    served = mapping.adapters
    if not served:
        return (
            "the server takes no adapters; start it with --enable-lora and --lora-modules NAME=PATH, or name "
            "those that are loaded later by the bridge's --adapters"
        )
    name = found.served_as or found.name
    if found.served_as is None and name == PEFTS_DEFAULT and name not in served and len(served) == 1:
        return next(iter(served.values()))  # nobody named it, and there is one it can be
    if name not in served:
        return (
            f"adapter {found.name} would be served as {name!r}, and the server takes: {', '.join(served)}; "
            "say by served_as= which it is, or name it by the bridge's --adapters"
        )
    return served[name]


def _misfit(name: str, part: Part, source: Source) -> str:
    along = 0 if name.endswith("lora_A.weight") else 1
    if len(part.shape) != 2 or part.shape[1 - along] != source.shape[1 - along]:
        return f"has shape {part.shape}, of which the server takes up to {source.shape}"
    if part.shape[along] > source.shape[along]:
        return f"has rank {part.shape[along]}, above the server's --max-lora-rank {source.shape[along]}"
    if part.dtype != source.dtype and (part.dtype, source.dtype) not in CASTS:
        return f"is {part.dtype}, which is not cast to the server's {source.dtype}"
    return ""


def _copied(local: torch.Tensor, dtype: torch.dtype, scaling: float) -> torch.Tensor:
    """In vLLM's order: cast, then scaled in the server's dtype."""
    made = local.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return made if scaling == 1.0 else made.mul_(scaling)


def _unfit(faults: Sequence[str], found: AdapterTensors, mapping: MappingDocument, rank: int) -> MappingError:
    listing = "\n  ".join(faults)
    return MappingError(
        f"{len(faults)} fault(s) between adapter {found.name} of trainer rank {rank} and the server of "
        f"{mapping.model!r}:\n  {listing}\nNothing was sent, and the server keeps what it serves"
    )
