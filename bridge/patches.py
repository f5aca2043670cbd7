"""Some elements of a parameter, named by the caller: checked, shared between ranks, and laid out as boxes.

A box of a patch is a run of its elements without a gap, so that plan and transports carry it like any other.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import blake3
import torch
from torch.distributed.tensor import DTensor

from bridge import zero3
from bridge.protocol.messages import DIGEST_BYTES

MAX_RUNS = 1 << 16  # each costs every rank some 0.1 ms of planning

_Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class SparsePatch:
    """Elements of one parameter to be written over what is served; the others stay as they are.

    Attributes:
        name: the parameter's, as ``update_weight`` takes it.
        indices: int64 [n] along the first dimension (the rows of a matrix), or int64 [n, ndim], each the
            place of one element. They count in the whole tensor as the checkpoint has it, are not negative,
            and come in any order, none twice.
        values: [n, *shape[1:]] for rows, [n] for elements; of any dtype that is cast to the server's.
    """

    name: str
    indices: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class PatchShare:
    """What one rank sends of a patch that all ranks have; its own copy, in ascending order of places.

    ``places`` is int64 [m, 1] (rows) or [m, ndim]; ``low`` and ``high`` bound those of all ranks, and
    ``digest`` names them. ``fault`` is what is wrong with the patch whatever it is laid over, or "".
    """

    places: torch.Tensor
    values: torch.Tensor
    rows: bool
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()
    digest: bytes = b""
    fault: str = ""
    world_size: int = 1

    def boxes(self, shape: tuple[int, ...]) -> list[tuple[_Box, torch.Tensor]] | str:
        """The share as boxes of a tensor of ``shape``, each with its values; or why there are none."""
        if fault := self.fault or self._misfit(shape):
            return fault
        unit = math.prod(shape[1:]) if self.rows else 1
        extents = torch.tensor(shape[:1] if self.rows else shape, device="cpu")
        strides = extents.flip(0).cumprod(0).flip(0) // extents
        flat = (self.places * strides).sum(1)
        breaks = ((flat.diff() != 1).nonzero().flatten() + 1).tolist()
        if len(breaks) >= MAX_RUNS // self.world_size:
            return (
                f"its patch comes apart into some {(len(breaks) + 1) * self.world_size} runs, more than "
                f"{MAX_RUNS}; hand the whole tensor over, or broadcast the model with encoding='auto', which "
                "finds what changed"
            )
        edges = [0, *breaks, len(flat)] if len(flat) else [0]
        values, found, at = self.values.view(-1), [], 0
        for first, last in itertools.pairwise(edges):
            start = int(flat[first]) * unit
            for offset, extent in zero3.boxes_of_run(shape, start, start + (last - first) * unit):
                numel = math.prod(extent)
                found.append(((offset, extent), values[at : at + numel].view(extent)))
                at += numel
        return found

    def _misfit(self, shape: tuple[int, ...]) -> str:
        dims = 1 if self.rows else len(shape)
        if not shape or len(self.low) != dims:
            return f"its patch has places of {len(self.low)} indices, the server's shape is {shape}"
        for low, high, extent in zip(self.low, self.high, shape, strict=False):
            if low < 0 or high >= extent:
                wrong = low if low < 0 else high
                return f"its patch has an index {wrong}, outside the server's shape {shape}"
        want = shape[1:] if self.rows else ()
        if self.values.shape[1:] != want:
            return (
                f"its patch has values of shape {tuple(self.values.shape[1:])} per row, the server's {want}"
            )
        return ""


@torch.no_grad()
def share_of(patch: SparsePatch, *, rank: int, world_size: int) -> PatchShare:
    """Copies of the part of ``patch`` that ``rank`` sends: an even share of its places, in their order."""
    if fault := _fault(patch):
        return PatchShare(torch.empty(0, 1, dtype=torch.int64), torch.empty(0), rows=True, fault=fault)
    rows = patch.indices.ndim == 1
    places = patch.indices.detach().cpu().view(len(patch.indices), -1)
    order = torch.arange(len(places), device="cpu")
    for column in reversed(range(places.shape[1])):  # the first index counts most
        order = order[places[order, column].argsort(stable=True)]
    places = places[order]
    same = (places[1:] == places[:-1]).all(1)
    if same.any():
        twice = places[1:][same][0].tolist()
        what = f"row {twice[0]}" if rows else f"element {tuple(twice)}"
        fault = f"its patch names {int(same.sum())} place(s) more than once, such as {what}"
    start, end = (len(order) * at // world_size for at in (rank, rank + 1))
    mine = order[start:end].to(patch.values.device)
    return PatchShare(
        places=places[start:end],
        values=patch.values.detach().index_select(0, mine).contiguous(),
        rows=rows,
        low=tuple(places.amin(0).tolist()),
        high=tuple(places.amax(0).tolist()),
        digest=blake3.blake3(places.contiguous().numpy().tobytes()).digest(DIGEST_BYTES),
        fault=fault,
        world_size=world_size,
    )


def _fault(patch: SparsePatch) -> str:
    indices, values = patch.indices, patch.values
    for what, tensor in (("indices", indices), ("values", values)):
        if isinstance(tensor, DTensor) or zero3.is_partitioned(tensor):
            return f"its patch has {what} that are sharded; pass the same whole ones on every rank"
        if tensor.is_meta or tensor.layout is not torch.strided:
            return f"its patch has {what} without values of their own ({tensor.device}, {tensor.layout})"
    if indices.dtype != torch.int64 or indices.ndim not in (1, 2):
        return (
            f"its patch has indices {indices.dtype} {tuple(indices.shape)}; they are int64, [n] for rows or "
            "[n, ndim] for elements"
        )
    if not indices.numel():
        return "its patch names no element; leave it out"
    if not values.ndim or len(values) != len(indices) or (indices.ndim == 2 and values.ndim != 1):
        return f"its patch has indices {tuple(indices.shape)}, but values {tuple(values.shape)}"
    return ""
