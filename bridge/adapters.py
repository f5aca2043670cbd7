"""LoRA adapters of peft, merged into the base model's weights for sending. peft is not imported.

An adapted weight is sent as ``W + scaling * B @ A`` under the name it has in the base model. The sums are
made one tensor at a time beside the weights, which stay as they are: the memory of the adapted weights once.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bridge import zero3
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names, has_adapters, is_kind_of, own_kind

# What peft puts into names, as of 0.17 to 0.21.
_PREFIX = re.compile(r"^base_model\.model\.")
_INSERTED = re.compile(r"(?:^|(?<=\.))(?:base_layer|original_module|modules_to_save\.[^.]+)\.")


class Merged(dict[str, torch.Tensor]):
    """Tensors by the base model's names. ``kept`` are the parameters among them, without the sums."""

    kept: list[torch.Tensor]


@torch.no_grad()
def merge(model: nn.Module) -> Merged:
    """What a model with LoRA adapters computes with, under the names of its base model.

    Every rank calls it: sums of DTensors may be collective.

    Returns:
        The sums of adapted weights and their active adapters, in the weights' dtypes; all other tensors as
        they are, those that peft trains beside the original (``modules_to_save``) in place of these.

    Raises:
        ConfigError: there are no adapters.
        MappingError: an adapter cannot be merged; lists every one.
    """
    layers = {name: module for name, module in model.named_modules() if has_adapters(module)}
    if not layers:
        raise ConfigError("adapters='merge' needs a model with peft's LoRA adapters, and this one has none")
    tensors = canonical_names(model, adapters=True)
    faults = [f"{name}: {fault}" for name, layer in layers.items() if (fault := _fault(layer))]
    if faults:
        raise _unmerged(faults)
    left_out = {id(t) for layer in layers.values() for t in _beside(layer)}
    replaced = {
        id(tensor)
        for layer in layers.values()
        if is_kind_of(layer, "ModulesToSaveWrapper") and _used(layer) is not layer.original_module
        for tensor in layer.original_module.parameters()
    }
    adapted = {id(layer.get_base_layer().weight): layer for layer in layers.values() if _is_adapted(layer)}
    known = {id(tensor) for tensor in tensors.values()}
    if faults := [
        f"{name}: its base weight is not among the model's parameters"
        for name, layer in layers.items()
        if _is_adapted(layer) and id(layer.get_base_layer().weight) not in known
    ]:
        raise _unmerged(faults)
    uses = Counter(id(tensor) for tensor in tensors.values())
    faults = [
        f"{name}: is tied to another weight, and an adapter of one of the two would change both"
        for name, tensor in tensors.items()
        if (id(tensor) in adapted and uses[id(tensor)] > 1)
        or (id(tensor) in replaced and "original_module." not in name)
    ]
    if faults:
        raise _unmerged(faults)
    found = Merged()
    found.kept = []
    for name, tensor in tensors.items():
        if id(tensor) in left_out:
            continue
        base_name = _INSERTED.sub("", _PREFIX.sub("", name))
        layer = adapted.get(id(tensor))
        if layer is None:
            found[base_name] = tensor
            found.kept.append(tensor)
        else:
            found[base_name] = _sum(tensor, layer)
    return found


def _fault(layer: Any) -> str:
    """Why a layer of peft's cannot be merged, or ""."""
    kind = own_kind(layer)
    if layer.disable_adapters:
        return "its adapters are disabled; enable them, or broadcast the base model"
    if is_kind_of(layer, "ModulesToSaveWrapper"):
        return ""
    if not (is_kind_of(layer, "LoraLayer") and kind in ("Linear", "Embedding")):
        return f"is adapted by {type(layer).__module__}.{kind}; only LoRA's Linear and Embedding are merged"
    active = _to_add(layer)
    if variants := [name for name in active if name in getattr(layer, "lora_variant", {})]:
        return f"adapter {', '.join(variants)} is a variant of LoRA (such as DoRA); only plain LoRA is merged"
    if biased := [name for name in active if getattr(layer, "lora_bias", {}).get(name)]:
        return f"adapter {', '.join(biased)} has a bias (lora_bias=True); only W + scaling * B @ A is merged"
    if any(zero3.is_partitioned(tensor) for tensor in layer.parameters()):
        return (
            "is partitioned by ZeRO-3; gather layer by layer, and hand the sums over with "
            "bridge.round() and update_weight"
        )
    return ""


def _unmerged(faults: list[str]) -> MappingError:
    listing = "\n  ".join(faults)
    return MappingError(
        f"{len(faults)} fault(s): adapters cannot be merged:\n  {listing}\nNothing was sent, and the server "
        "keeps its weights. Send what model.merge_and_unload() makes of a copy"
    )


def _to_add(layer: Any) -> list[str]:
    """Active adapters of a LoRA layer that are not in its weight already."""
    held = [*layer.lora_A, *layer.lora_embedding_A]
    return [name for name in layer.active_adapters if name in held and name not in layer.merged_adapters]


def _is_adapted(layer: Any) -> bool:
    return is_kind_of(layer, "LoraLayer") and bool(_to_add(layer))


def _beside(layer: Any) -> list[torch.Tensor]:
    """Parameters and buffers of a layer of peft's that the base model does not have, or does not use."""
    used = _used(layer)
    kept = {id(tensor) for tensor in (*used.parameters(), *used.buffers())}
    return [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in kept]


def _used(layer: Any) -> nn.Module:
    """The module in a layer of peft's whose tensors have the base model's names."""
    used: nn.Module
    if is_kind_of(layer, "ModulesToSaveWrapper"):
        trained = [name for name in layer.active_adapters if name in layer.modules_to_save]
        used = layer.modules_to_save[trained[0]] if trained else layer.original_module
    else:
        used = layer.get_base_layer()
    return used


def _sum(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """As peft's own merge, but into a copy; adapters of a wider dtype are rounded with the sum, once.

    So are an embedding's, as its forward does with unmerged adapters; peft's merge rounds B @ A before.
    """
    total = weight.detach().clone()
    with _without_autocast(total.device.type):  # which would round B @ A to its dtype
        for name in _to_add(layer):
            delta = layer.get_delta_weight(name)
            if isinstance(total, DTensor):
                delta = delta.redistribute(total.device_mesh, total.placements)
            total += delta
    return total


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
