"""What ``collect`` found in a model, kept for the next broadcast while nothing about the model changes.

Walking a model of hundreds of tensors and checking each takes milliseconds, and the trainer waits for it even
with ``blocking=False``. Whether anything changed is a fraction of that: every module, parameter and buffer
must be the very object it was, in the very place of the tree, over the very memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bridge.guard import Guarded
from bridge.protocol.mapping import Mapping
from bridge.sharding import LocalShards


class Catalogue:
    """One model's shards under one mapping."""

    def __init__(
        self, model: nn.Module, mapping: Mapping, shards: LocalShards, parameters: Sequence[torch.Tensor]
    ) -> None:
        """Remember what was just collected.

        Args:
            model: what was walked.
            mapping: what it was compared with.
            shards: what was found.
            parameters: what an optimizer may hold.
        """
        self.model = model
        self.mapping = mapping
        self.shards = shards
        # The shards too: an optimizer may hold views of their memory, and not the parameters.
        self.guarded = Guarded([*parameters, *shards.tensors])
        modules = list(model.modules())
        self._sharded = [module for module in modules if isinstance(module, FSDPModule)]
        tables: list[dict[str, Any]] = []
        for module in modules:
            tables += [module._modules, module._parameters, module._buffers]
        self._sizes = [(table, len(table)) for table in tables]
        self._entries = [(table, key, value) for table in tables for key, value in table.items()]
        held = [value for _, _, value in self._entries if isinstance(value, torch.Tensor)]
        self._memory = [(tensor, _address(tensor), tensor.dtype) for tensor in held]

    def holds(self, model: nn.Module, mapping: Mapping) -> bool:
        """Whether ``shards`` is still what ``collect`` would find."""
        if model is not self.model or mapping is not self.mapping or not all(self.shards.contiguous):
            return False  # a tensor that is not contiguous was copied, and its copy is old
        for module in self._sharded:
            module.reshard()
        return (
            all(len(table) == size for table, size in self._sizes)
            and all(table.get(key) is value for table, key, value in self._entries)
            and all(
                _address(tensor) == address and tensor.dtype == dtype
                for tensor, address, dtype in self._memory
            )
        )


def _address(tensor: torch.Tensor) -> int:
    """Where this rank's part starts; 0 for what has no memory."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return 0 if local.is_meta else local.data_ptr()
