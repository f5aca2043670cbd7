"""What the tensors of a model are called, whatever it is wrapped in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from bridge.errors import MappingError

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPED_ANYWHERE = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPED)})\.")
# Wrappers whose child is called "module", a name that a model's own part may have too.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def is_kind_of(module: nn.Module, *names: str) -> bool:
    """Whether one of these classes is among the module's, by name: whose they are need not be installed."""
    return any(base.__name__ in names for base in type(module).__mro__)


def own_kind(module: nn.Module) -> str:
    """The name of its class as it was made: FSDP2 puts one of its own over that of a module it shards."""
    return next(
        base.__name__
        for base in type(module).__mro__
        if not any(parent.__name__ == "FSDPModule" for parent in base.__mro__)
    )


def has_adapters(module: nn.Module) -> bool:
    """Whether this very module is one that peft put around one of the base model's."""
    return is_kind_of(module, "BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")


def canonical_names(model: nn.Module, *, adapters: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by the name they have without wrappers; tied ones under each name.

    FSDP2 modules that are still unsharded from a forward pass are resharded first, as ``state_dict`` does.
    ``adapters`` are peft's: with True their tensors are there too, all under peft's names.

    Raises:
        MappingError: part of the model is wrapped by FSDP1, or has adapters that were not asked for.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise MappingError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel (FSDP1), whose flat "
                "parameters do not show which rank holds what; use FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        if not adapters and has_adapters(module):
            raise MappingError(
                f"{name or 'the model'} has adapters of peft beside its weights, which the server does not "
                'know; call broadcast_weights(model, adapters="merge"), which sends their sums'
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
    is_wrapper = is_kind_of(module, *_WRAPPERS)
    for name, child in module._modules.items():
        if child is not None:
            wrapped = name in _WRAPPED or (is_wrapper and name == "module")
            yield from _walk(child, prefix if wrapped else f"{prefix}{name}.")


def without_wrappers(names: Iterable[str]) -> list[str]:
    """Names as ``canonical_names`` gives them, from those of a wrapped model's state dict."""
    stripped = [_WRAPPED_ANYWHERE.sub("", name) for name in names]
    while stripped and all(name.startswith("module.") for name in stripped):
        stripped = [name.removeprefix("module.") for name in stripped]
    return stripped
