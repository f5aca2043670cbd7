"""What a model calls its tensors: the names they have without torch's wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from bridge.errors import MappingError

Named = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPED_ANYWHERE = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPED)})\.")
# Wrappers whose child is called "module", a name that a model's own part may have too.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def canonical_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by the name they have without wrappers; tied ones under each name.

    FSDP2 modules that are still unsharded from a forward pass are resharded first, as ``state_dict`` does.

    Raises:
        MappingError: part of the model is wrapped by FSDP1.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise MappingError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel (FSDP1), whose flat "
                "parameters do not show which rank holds what; use FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(_walk(model, ""))


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    is_wrapper = any(base.__name__ in _WRAPPERS for base in type(module).__mro__)
    for name, child in module._modules.items():
        if child is not None:
            wrapped = name in _WRAPPED or (is_wrapper and name == "module")
            yield from _walk(child, prefix if wrapped else f"{prefix}{name}.")


def by_name(named: Named) -> dict[str, torch.Tensor]:
    """Tensors by the name they have without wrappers: a model's, or those of a mapping such as a state dict.

    Raises:
        MappingError: as ``canonical_names``.
    """
    if isinstance(named, nn.Module):
        return canonical_names(named)
    items = list(named.items() if isinstance(named, Mapping) else named)
    stripped = [(_WRAPPED_ANYWHERE.sub("", name), tensor) for name, tensor in items]
    while stripped and all(name.startswith("module.") for name, _ in stripped):
        stripped = [(name.removeprefix("module."), tensor) for name, tensor in stripped]
    return dict(stripped)
