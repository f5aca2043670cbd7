"""What a model keeps beside the weights that updates reach: found at load, and again behind its forwards.

Some layers make a thing of weights once, and read it for ever: a fused gate, a rotary table with learnt
coefficients, a packed copy. No write of a mapping leads there, so after an update they would go on with old
values, without a word. At load ``loading`` looks for what the loader and post-processing made, and a
``Watch`` for what the first forwards do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from bridge.errors import MappingError
from vllm_patching.lora_compat import BASE_LAYER
from vllm_patching.verification import digest

logger = logging.getLogger(__name__)

_TORCHS_OWN = vars(nn.Module()).keys()  # a module's parameters, buffers, children and hooks
_DEPTH = 6  # of objects, lists and dicts within each other, from a module's attribute on
# Of vLLM, but no part of a model: its settings, what it says to other ranks, graphs, batches, adapters.
_NOT_THE_MODELS = (
    "vllm.compilation", "vllm.config", "vllm.distributed", "vllm.forward_context", "vllm.lora",
    "vllm.v1.worker", "vllm.utils",
)  # fmt: skip
# Rotary frequencies: where the config scales them, transformers computes them anew for longer prompts.
_COMPUTED_ANEW = "inv_freq"


class Held(NamedTuple):
    """A tensor that is neither parameter nor buffer. ``near``: an attribute of a module or of its backend."""

    tensor: torch.Tensor
    near: bool


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by the names they had before LoRA wrapped layers; aliases under each."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return {name.replace(BASE_LAYER, "."): tensor for name, tensor in found.items()}


def private_tensors(model: nn.Module) -> dict[str, Held]:
    """What modules keep as plain attributes, and in objects that these hold, by path.

    Neither parameters nor buffers, so nothing else finds them. Not what LoRA wraps a layer with. Each object
    is looked at once, where it lies least deep.
    """
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    seen = {id(module) for module in model.modules()}
    found: dict[str, Held] = {}
    level: list[tuple[str, Any, bool]] = []
    for name, module in model.named_modules():
        if not hasattr(module, BASE_LAYER.strip(".")):
            level += [(f"{name}.{k}", v, True) for k, v in vars(module).items() if k not in _TORCHS_OWN]
    for _ in range(_DEPTH):
        below: list[tuple[str, Any, bool]] = []
        for path, value, near in level:
            if isinstance(value, torch.Tensor):
                if has_memory(value):
                    found[path] = Held(value, near)
            elif id(value) not in seen:
                seen.add(id(value))
                below += _within(path, value, near, packages)
        level = below
    return found


def _within(path: str, value: Any, near: bool, packages: set[str]) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(value, (list, tuple)):
        yield from ((f"{path}[{index}]", one, near) for index, one in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{path}[{key}]", one, near) for key, one in value.items())
    elif (held := getattr(value, "__dict__", None)) and _is_searched(type(value), packages):
        near = near and path.endswith(".impl")
        yield from ((f"{path}.{name}", one, near) for name, one in held.items())


def _is_searched(kind: type, packages: set[str]) -> bool:
    """Whether objects of this type may be parts of a model; those of other libraries are not looked into."""
    where = kind.__module__
    if any(where == one or where.startswith(f"{one}.") for one in _NOT_THE_MODELS):
        return False
    return (
        where.partition(".")[0] in packages | {"vllm"}
        or where == "types"
        or (dataclasses.is_dataclass(kind) and not where.startswith("torch."))
    )


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether all elements are equal, as in a scale's default or a workspace that nobody has used."""
    return bool((tensor == tensor[(0,) * tensor.ndim]).all())


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie at an address; not those of meta, fake and sparse tensors."""
    return (
        tensor.device.type in ("cpu", "cuda")
        and tensor.layout is torch.strided
        and not isinstance(tensor, FakeTensor)
    )


def is_looked_at(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be made of weights and is more than a number."""
    return tensor.is_floating_point() and tensor.numel() > 1 and has_memory(tensor)


def same_values(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether ``new`` is ``old``, cast or moved to another device at most."""
    return old.shape == new.shape and torch.equal(old.detach().to(new.device, new.dtype), new.detach())


def origin_of(tensor: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> str:
    """Which weight is part of ``tensor``, at either end of a dimension, cast or turned; "" for none."""
    whole = tensor.detach().squeeze()
    for name, weight in weights.items():
        flat = weight.detach().squeeze()
        ends = any(_ends_with(whole, turned) for turned in ((flat, flat.T) if flat.ndim == 2 else (flat,)))
        if ends and weight.numel() > 1 and not is_constant(weight):
            return name
    return ""


def storage_key(tensor: torch.Tensor) -> int:
    """The address of the storage under a tensor; its own while that storage lives."""
    return tensor.untyped_storage().data_ptr()


class Watch:
    """What lies beside the arena when a worker publishes, to see what the first forwards make of weights."""

    def __init__(
        self, model: nn.Module, *, arena: torch.Tensor, run_time: Callable[[], Iterable[torch.Tensor]]
    ) -> None:
        """
        Args:
            model: whose weights have moved into ``arena`` (a view of all of it).
            run_time: tensors that vLLM fills as it runs, such as KV caches.
        """
        self._model = model
        self._reach = range(arena.data_ptr(), arena.data_ptr() + arena.numel())
        self._run_time = run_time
        self._named = {
            name: (tensor.detach(), digest(tensor)) for name, tensor in self._beside(named_tensors(model))
        }
        self._private = {path: held.tensor for path, held in private_tensors(model).items()}
        self._said: set[str] = set()

    def check(self) -> None:
        """Look again, behind a forward.

        A buffer that no update writes may only be cast, or replaced by other rotary frequencies. Of what is
        new, copies of weights are refused; what else they may have been made of cannot be told from tables
        and workspaces, so that is a warning.

        Raises:
            MappingError: lists what the forwards made of weights and keep.
        """
        faults = [fault for name, tensor in self._beside(named_tensors(self._model))
                  if (fault := self._buffer_fault(name, tensor))]  # fmt: skip
        private = {path: held.tensor for path, held in private_tensors(self._model).items()}
        known = {storage_key(tensor) for tensor in (*self._private.values(), *self._run_time())}
        for path, tensor in self._beside(private):
            if path in self._said or storage_key(tensor) in known:
                continue
            if self._is_cast(self._private.get(path), tensor) or is_constant(tensor):
                continue
            if origin := self._origin(tensor):
                faults.append(f"{self._what(path, tensor)} is a copy of {origin}")
            else:
                self._said.add(path)
                logger.warning(
                    "%s was made by a forward, outside the weights' memory; if it is made of weights, it "
                    "stays as it is when they change, and this model cannot be kept in step",
                    self._what(path, tensor),
                )
        if faults:
            listing = "\n  ".join(faults)
            raise MappingError(
                f"the first forwards of {type(self._model).__name__} make tensors of its weights and keep "
                f"them ({len(faults)}), where no update reaches; this model cannot be kept in step, so serve "
                f"it without the bridge, or turn off what keeps them:\n  {listing}"
            )

    def _beside(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that may be made of weights and lie elsewhere, each once: all layers share a rotary table."""
        seen: set[tuple[Any, ...]] = set()
        for path, tensor in tensors.items():
            if is_looked_at(tensor) and tensor.data_ptr() not in self._reach:
                place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if place not in seen:
                    seen.add(place)
                    yield path, tensor

    def _buffer_fault(self, name: str, tensor: torch.Tensor) -> str:
        """Why a parameter or buffer outside the arena has not stayed what it was; "" if it has."""
        if name not in self._named:
            origin = self._origin(tensor)
            return f"{self._what(name, tensor)} is a copy of {origin}" if origin else ""
        old, before = self._named[name]
        if digest(old) == before and (
            tensor.data_ptr() == old.data_ptr() or name.endswith(_COMPUTED_ANEW) or self._is_cast(old, tensor)
        ):
            return ""
        return f"{self._what(name, tensor)} was filled by a forward"

    def _is_cast(self, old: torch.Tensor | None, new: torch.Tensor) -> bool:
        return old is not None and same_values(old, new)

    def _origin(self, tensor: torch.Tensor) -> str:
        """A weight that is part of ``tensor``; "" for none."""
        named = named_tensors(self._model)
        return origin_of(tensor, {n: t for n, t in named.items() if t.data_ptr() in self._reach})

    def _what(self, path: str, tensor: torch.Tensor) -> str:
        """A tensor by its path, and by the class of the module that has it."""
        modules = {name.replace(BASE_LAYER, "."): module for name, module in self._model.named_modules()}
        owner = path
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        return f"{path} {tuple(tensor.shape)} of {type(modules[owner]).__name__}"


def _ends_with(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether ``whole`` begins or ends with ``part``, along the one dimension in which they may differ."""
    if whole.ndim != part.ndim or whole.device != part.device:
        return False
    longer = [d for d in range(whole.ndim) if whole.shape[d] != part.shape[d]]
    if len(longer) > 1:
        return False
    along = longer[0] if longer else 0
    size, count = whole.shape[along], part.shape[along]
    return count <= size and any(
        torch.equal(whole.narrow(along, start, count), part.to(whole.dtype)) for start in {0, size - count}
    )
