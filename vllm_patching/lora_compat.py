"""Every private name of vLLM's LoRA that the bridge touches; what ``compat`` is for all else.

Names and signatures were compared in 0.26.0 to 0.33.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from bridge.errors import UnsupportedVersion
from vllm_patching import compat

MANAGER_MODULE = "vllm.lora.model_manager"
LOADING_MODULE = "vllm.lora.worker_manager"
BASE_LAYER = ".base_layer."  # what vLLM puts into the names of what it wraps


def manager_of(worker: Any) -> Any:
    """What holds a worker's adapters and their slots; None without ``--enable-lora``."""
    if worker.vllm_config.lora_config is None:
        return None
    return worker.model_runner.lora_manager._adapter_manager


def max_rank(manager: Any) -> int:
    """The highest rank that a slot has room for."""
    return int(manager.lora_config.max_lora_rank)


def linear_layers(manager: Any) -> dict[str, Any]:
    """The wrapped linear layers by their names in vLLM."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return {name: m for name, m in manager.modules.items() if isinstance(m, BaseLinearLayerWithLoRA)}


def other_layers(manager: Any) -> list[Any]:
    """The wrapped layers that are no linear ones: embeddings, logits, experts."""
    linear = linear_layers(manager)
    return [module for name, module in manager.modules.items() if name not in linear]


def stacks(layer: Any) -> list[tuple[str, torch.Tensor]]:
    """All slots of a linear layer: tensors [slots, 1, ...], A's first, each with a name."""
    found = []
    for which in ("a", "b"):
        stacked = getattr(layer, f"lora_{which}_stacked")
        found += [(f"lora_{which}.{index}", cast(torch.Tensor, one)) for index, one in enumerate(stacked)]
    return found


def layer_of(manager: Any, module: str) -> str:
    """The name in vLLM, before layers are packed, of a module as transformers makes it; "" for none."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = _without_packing(getattr(manager.model, "hf_to_vllm_mapper", None))
    try:
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
    except ValueError:  # the mapper drops it
        return ""
    return str(name)


def _without_packing(mapper: Any) -> Any:
    """What vLLM names adapters' modules by; a mapper of weights turns q_proj into what it is packed into."""
    if mapper is None:
        return None
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # since 0.29.0, and before
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    raise UnsupportedVersion(
        f"this vLLM's {type(mapper).__name__} has neither get_rename_mapper nor get_unstacked_mapper, so "
        "nobody knows what it calls the modules of adapters; "
        'pass --adapters "" to serve them as their files are'
    )


def packed_layers(manager: Any) -> dict[str, list[str]]:
    """The names of what is packed into one layer, in order, by the name of that layer."""
    return dict(manager.packed_modules)


def slots(manager: Any) -> Iterator[tuple[int, int]]:
    """The slots in use: index, and the id of the adapter that is there."""
    for index, lora_id in enumerate(manager.lora_index_to_id):
        if lora_id is not None:
            yield index, int(lora_id)


def fill_from_files(manager: Any, index: int, lora_id: int) -> None:
    """Fill a slot as vLLM does, from what it has read of the adapter's files."""
    adapter = manager.get_adapter(lora_id)
    for name, layer in manager.modules.items():
        weights = manager._get_lora_layer_weights(adapter, name)
        if weights:
            layer.set_lora(index, weights.lora_a, weights.lora_b)
        else:
            layer.reset_lora(index)


def hooks(worker: Any) -> dict[str, bool]:
    """Which of vLLM's calls must be wrapped where adapters may be sent, and whether they are."""
    from vllm.lora.model_manager import LoRAModelManager

    return {
        "activate_adapter": compat.is_wrapped(LoRAModelManager.activate_adapter),
        "_load_adapter": compat.is_wrapped(type(worker.model_runner.lora_manager)._load_adapter),
    }
