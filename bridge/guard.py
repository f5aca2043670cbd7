"""Keeps the next optimizer step from changing weights that are still being read, and notices other writes."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from bridge.unsharded import address

# torch walks its table of hooks while it calls them, so a hook cannot take itself out. One hook therefore
# stays for the life of the process; the guards come and go in a tuple of ours, replaced and never changed.
_lock = threading.Lock()
_active: tuple[StepGuard, ...] = ()
_installed = False


def _before_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    for guard in _active:
        guard.before_step(optimizer)


class Guarded:
    """Weights by what an optimizer that holds them can be recognised by."""

    def __init__(self, parameters: Iterable[torch.Tensor], *, hold: bool = False) -> None:
        """``parameters`` are not kept alive, unless ``hold`` says so: whoever guards them holds them."""
        held = tuple(parameters)
        self.held = held if hold else None
        self.ids = frozenset(map(id, held))
        self.storages = frozenset(filter(None, map(address, held)))

    @classmethod
    def together(cls, every: Sequence[Guarded]) -> Guarded:
        """What any of them is recognised by; nothing is held."""
        if len(every) == 1:
            return every[0]
        made = cls([])
        made.ids = frozenset().union(*(one.ids for one in every))
        made.storages = frozenset().union(*(one.storages for one in every))
        return made


_version_of = operator.attrgetter("_version")


class WriteCounts:
    """How often each weight has been written in place, as autograd counts: for writes that no guard sees.

    Not counted are writes by ``.data``, by fused optimizers, by foreach functions over DTensors, in CUDA
    graphs and in other processes.
    """

    def __init__(self, owners: Sequence[torch.Tensor], local: Sequence[torch.Tensor]) -> None:
        """Count now. ``local`` is this rank's part of each of ``owners``: a DTensor's has its own count."""
        self._watched = [owners] if local is owners else [owners, local]
        self._counts = list(map(_counts, self._watched))

    def written(self) -> list[int]:
        """Places of those that were written since, until ``forget``."""
        pairs = zip(map(_counts, self._watched), self._counts, strict=True)
        return sorted({at for now, then in pairs for at in range(len(then)) if now[at] != then[at]})

    def forget(self) -> None:
        """Let go of the tensors."""
        self._watched, self._counts = [], []


def _counts(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:  # tensors made in inference mode have no count
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class Reader(Protocol):
    """Whatever reads the weights."""

    @property
    def free(self) -> bool:
        """Whether they may change."""

    def wait_released(self) -> None:
        """Wait until they may; what it raises comes out of ``optimizer.step()``."""


class StepGuard:
    """While in force, an optimizer over any of the parameters waits before it steps.

    An optimizer is recognised by the parameter objects it holds, or by their memory: FSDP2 swaps the objects
    between forward and backward, and flattening optimizers hold views.
    """

    def __init__(
        self,
        guarded: Guarded,
        reader: Reader,
        *,
        module: nn.Module | None = None,
        holding: Iterable[torch.Tensor] = (),
    ) -> None:
        """Start guarding.

        Args:
            guarded: the weights that are being read.
            reader: whoever reads them, and is waited for.
            module: its ``load_state_dict`` waits too.
            holding: what is kept alive meanwhile, so that no other object can get one of their ids.
        """
        global _active, _installed
        self._guarded = guarded
        self._holding = tuple(holding)
        self._reader = reader
        self._module_hook = (
            None if module is None else module.register_load_state_dict_pre_hook(self._before_load)  # type: ignore[no-untyped-call]
        )
        with _lock:
            if not _installed:
                register_optimizer_step_pre_hook(_before_step)
                _installed = True
            _active = (*_active, self)

    @property
    def active(self) -> bool:
        """Whether a step would still wait."""
        return self in _active

    def guards(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` would change one of the weights."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        guarded = self._guarded
        return any(id(p) in guarded.ids for p in held) or any(address(p) in guarded.storages for p in held)

    def before_step(self, optimizer: Optimizer) -> None:
        """Wait if ``optimizer`` is concerned; the guard is spent then, even if the round has failed."""
        if self.active and self.guards(optimizer):
            self._finish()

    def _before_load(self, *_: Any) -> None:
        if self.active:
            self._finish()

    def _finish(self) -> None:
        try:
            self._reader.wait_released()
        finally:
            if self._reader.free:  # else a signal cut the wait short, and the next step must wait again
                self._deactivate()

    def _deactivate(self) -> None:
        global _active
        with _lock:
            _active = tuple(guard for guard in _active if guard is not self)
        self._holding = ()

    def remove(self) -> None:
        """End the protection without waiting. Idempotent; not from inside a hook."""
        self._deactivate()
        if self._module_hook is not None:
            self._module_hook.remove()
            self._module_hook = None
