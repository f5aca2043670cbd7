"""FSDP2's parameters that are unsharded at the moment: gathered copies, which no optimizer step changes.

The root stays so after a forward pass without gradients, and everything does after
``set_reshard_after_backward(False)``. By name they look like any whole tensor, but may be of before the last
step, or rounded, and are freed when FSDP2 shards again. No attribute of theirs says so: what FSDP2 keeps of
each live module does (internals of torch, as of 2.9 to 2.13).
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bridge.errors import MappingError

FAULT = (
    "is the copy that FSDP2 has gathered to compute with, which an optimizer step leaves as it was; pass the "
    "module itself, or call reshard() on each of its FSDP2 modules and take the parameters anew"
)


def memory() -> frozenset[int]:
    """Where the storages of all such copies start.

    Raises:
        MappingError: this torch keeps FSDP2's state otherwise, so they cannot be told apart.
    """
    if not FSDPModule.__subclasses__():  # fully_shard makes one for each class of module
        return frozenset()
    try:
        return frozenset(map(address, _copies())) - {0}
    except (ImportError, AttributeError, TypeError) as err:
        raise MappingError(
            f"torch {torch.__version__} does not say which parameters FSDP2 has unsharded ({err}), and what "
            "is handed over by name might be such copies; pass the module itself to broadcast_weights"
        ) from err


def _copies() -> list[torch.Tensor]:
    from torch.distributed._composable_state import _module_state_mapping

    found = []
    for module in list(_module_state_mapping):
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None and not group.is_sharded:  # gathered, or cut otherwise after the forward
                name = "_unsharded_param" if group.is_unsharded else "_sharded_post_forward_param"
                found += [getattr(parameter, name) for parameter in group.fsdp_params]
    return found


def is_copy(tensor: torch.Tensor, copies: frozenset[int]) -> bool:
    """Whether ``tensor`` is one of ``copies``, or a view of it."""
    return bool(copies) and address(tensor) in copies


def address(tensor: torch.Tensor) -> int:
    """Where the memory of this rank's part starts in this process; 0 if it has none of its own."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if local.is_meta or local.layout is not torch.strided or hasattr(local, "__tensor_flatten__"):
        return 0
    return local.untyped_storage().data_ptr()
