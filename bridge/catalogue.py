"""What ``collect`` found in a model, kept for the next broadcast while nothing about the model changes.

Walking a model of hundreds of tensors and checking each takes milliseconds, and the trainer waits for it even
with ``blocking=False``. Whether anything changed is a fraction of that: every module, parameter and buffer
must be the very object it was, in the very place of the tree, over the very memory. Nothing of the model is
kept alive by this.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bridge.declared import DeclaredLayout
from bridge.guard import Guarded, WriteCounts
from bridge.protocol.mapping import Mapping
from bridge.sharding import LocalShards
from bridge.wire.transport import mark_enqueued

# Of all tensors at once, each in a list of its own: a loop in Python over hundreds takes twice as long.
_Geometries = tuple[list[int], list[torch.dtype], list[torch.Size], list[tuple[int, ...]]]

_tables_of = operator.attrgetter("_modules", "_parameters", "_buffers")
_data_of = operator.attrgetter("data")
_dtype_of = operator.attrgetter("dtype")
_shape_of = operator.attrgetter("shape")


class Catalogue:
    """One model's shards under one mapping."""

    def __init__(
        self,
        model: nn.Module,
        mapping: Mapping,
        shards: LocalShards,
        guarded: Guarded,
        declared: DeclaredLayout | None = None,
    ) -> None:
        """Remember what was just collected.

        Args:
            model: what was walked.
            mapping: what it was compared with.
            shards: what was found.
            guarded: what an optimizer that must wait is recognised by.
            declared: the layout it was collected by.
        """
        self.guarded = guarded
        self._model = weakref.ref(model)
        self._mapping = mapping
        self._declared = declared
        self._layout = shards.layout
        self._contiguous = shards.contiguous
        modules = list(model.modules())
        self._sharded = [weakref.ref(module) for module in modules if isinstance(module, FSDPModule)]
        self._modules = [weakref.ref(module) for module in modules]
        self._tree = _contents(modules)
        self._owners = [weakref.ref(owner) for owner in shards.owners]
        self._any_distributed = any(isinstance(owner, DTensor) for owner in shards.owners)
        self._geometries = _geometries(self._local(shards.owners))

    def find(
        self, model: nn.Module, mapping: Mapping, declared: DeclaredLayout | None = None
    ) -> LocalShards | None:
        """What ``collect`` would find now, or None if it must look again."""
        if declared != self._declared:
            return None
        if self._model() is not model or mapping is not self._mapping or not all(self._contiguous):
            return None  # a tensor that is not contiguous was copied, and its copy is old
        for sharded in self._sharded:
            if (module := sharded()) is None:
                return None
            module.reshard()
        modules = [reference() for reference in self._modules]
        if None in modules or _contents(modules) != self._tree:
            return None
        held = [owner for reference in self._owners if (owner := reference()) is not None]
        # Of their own: a parameter whose .data is replaced while it is sent must not lead to other memory.
        local = self._local(held)
        tensors = list(map(_data_of, local))
        if _geometries(tensors) != self._geometries:
            return None
        computed, counts = mark_enqueued(tensors), WriteCounts(held, local)
        return LocalShards(self._layout, tensors, self._contiguous, held, computed, counts=counts)

    def _local(self, owners: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if not self._any_distributed:
            return owners
        # As to_local(), which takes twenty times as long: with hundreds of tensors that is felt.
        return [owner._local_tensor if isinstance(owner, DTensor) else owner for owner in owners]


def _contents(modules: list[Any]) -> tuple[list[int], list[str], list[int]]:
    """Which objects modules hold under which names: lengths of their tables, then all names, then all ids.

    In few passes over all of them, as there are thousands of tables, and most are empty.
    """
    tables = list(itertools.chain.from_iterable(map(_tables_of, modules)))
    filled = list(filter(None, tables))
    names = list(itertools.chain.from_iterable(filled))
    objects = itertools.chain.from_iterable(map(dict.values, filled))
    return list(map(len, tables)), names, list(map(id, objects))


def _geometries(tensors: Sequence[torch.Tensor]) -> _Geometries:
    return (
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(_dtype_of, tensors)),
        list(map(_shape_of, tensors)),
        list(map(torch.Tensor.stride, tensors)),
    )
