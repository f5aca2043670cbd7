"""DeepSpeed ZeRO-3: each rank holds a run of every parameter's flattened elements, and sends just that.

DeepSpeed is not imported: a partitioned parameter carries all that is needed (``ds_tensor``, ``ds_shape``,
``ds_numel``, ``ds_zero_partition_rank``, as of 0.16 to 0.19).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

Box = tuple[tuple[int, ...], tuple[int, ...]]


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether only a part of this parameter is here; one that DeepSpeed has gathered is whole."""
    return hasattr(tensor, "ds_id") and tensor.numel() != getattr(tensor, "ds_numel", -1)


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The parameter's shape, which a partitioned one does not have itself."""
    marked: Any = tensor
    return tuple(marked.ds_shape) if is_partitioned(tensor) else tuple(tensor.shape)


def steps_by_itself(module: nn.Module | None, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether DeepSpeed's own optimizers write these parameters: no hook of torch's sees it coming.

    Its engine and its ZeRO stages are recognised; the model inside an engine without ZeRO bears no mark. Nor
    do tensors by name (without a ``module``), as those of a state dict, which lie in the buffers of ZeRO-1
    and 2 all the same: while DeepSpeed is in use, they are taken for its own.
    """
    if not _is_in_use():  # before the model is walked, for which the trainer would wait
        return False
    if any(base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__):
        return True
    held = list(tensors)
    if module is None and held:
        return True
    marks = ("ds_id", "_z3_optimizer", "_zero_optimizer", "_hp_mapping")
    return any(hasattr(t, mark) for t in held for mark in marks)


def _is_in_use() -> bool:
    """Whether DeepSpeed is initialised, as every engine has it; transformers imports it wherever it is."""
    comm = sys.modules.get("deepspeed.comm")
    return comm is not None and bool(getattr(comm, "is_initialized", lambda: True)())


def partition(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's run of a partitioned parameter, padding included; the parameter itself is empty."""
    marked: Any = tensor
    held: torch.Tensor = marked.ds_tensor
    return held


def parts(tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]] | str:
    """This rank's boxes of a partitioned parameter, each with the memory it lies in; or why there are none.

    The run from ``rank * size`` on is at most three boxes for two dimensions: what is left of a row, whole
    rows, and the start of another; for more dimensions, rows come apart in the same way.
    """
    marked: Any = tensor
    held = partition(tensor)
    if getattr(getattr(held, "status", None), "name", "AVAILABLE") != "AVAILABLE":
        return "is offloaded to NVMe by DeepSpeed; keep parameters in memory (offload_param: cpu or none)"
    if held.dtype != tensor.dtype or hasattr(held, "ds_quant_scale"):
        return f"is held by DeepSpeed as quantised {held.dtype}; switch zero_quantized_weights off"
    size = held.numel()  # padded at the end, so that all ranks' are equal
    start = size * int(marked.ds_zero_partition_rank)
    end = min(start + size, int(marked.ds_numel))
    flat = held.detach().view(-1)
    found, at = [], 0
    for offset, shape in boxes_of_run(full_shape(tensor), start, end):
        numel = math.prod(shape)
        found.append(((offset, shape), flat[at : at + numel].view(shape)))
        at += numel
    return found


def boxes_of_run(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Elements ``start`` to ``end`` of a row-major tensor as boxes, in order; each is contiguous."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if first > last:  # all of it within one row
        yield from _within(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last - first, *shape[1:])
    if last * row < end:
        yield from _within(shape, last, 0, end - last * row)


def _within(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Box]:
    for offset, extent in boxes_of_run(shape[1:], start, end):
        yield (index, *offset), (1, *extent)
