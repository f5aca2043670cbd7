"""Where arriving elements land: the inactive half of one rank's arena, during one round.

Knows places, not names. A target that vLLM keeps in another layout than the checkpoint's (fused experts on a
CPU) is gathered in a scratch tensor and transformed into the half once its last element has arrived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from bridge.errors import ConfigError
from bridge.protocol.mapping import Target, Write
from vllm_patching import compat


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a mapping's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


class Staging:
    """One round's view of a half. Owner: whoever fills it; nobody else writes the half meanwhile."""

    def __init__(self, half: torch.Tensor, targets: Sequence[Target]) -> None:
        """``half`` is uint8 [arena_bytes]; ``targets`` are the rank's, in mapping order."""
        self._half = half
        self._start = half.data_ptr()
        self._targets = targets
        self._scratch: dict[int, torch.Tensor] = {}
        self._missing: dict[int, int] = {}
        # Made on demand: hundreds at once would hold up the first copy.
        self._flat: dict[int, torch.Tensor] = {}

    def _flatten(self, target: Target) -> torch.Tensor:
        # Writes address a target by strides from its first element, which may reach beyond nbytes
        # where targets are views of one storage; the arena's end is the only bound.
        dtype = torch_dtype(target.dtype)
        end = self._half.numel() - (self._half.numel() - target.offset) % dtype.itemsize
        return self._half[target.offset : end].view(dtype)

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:
        """The elements of one copy, to be written by the caller, who then reports ``landed``."""
        flat = self._whole(target)
        return flat.as_strided(size, stride, flat.storage_offset() + offset)

    def address(self, target: int) -> int:
        """Where the first byte of ``target`` is, for writers that need no tensor."""
        if self.is_direct(target):
            return self._start + self._targets[target].offset
        return self._scratch_of(target).data_ptr()

    def _whole(self, target: int) -> torch.Tensor:
        if not self.is_direct(target):
            return self._scratch_of(target)
        if target not in self._flat:
            self._flat[target] = self._flatten(self._targets[target])
        return self._flat[target]

    def is_direct(self, target: int) -> bool:
        """Whether bytes may be written straight into the half."""
        return not self._targets[target].transform

    def _scratch_of(self, index: int) -> torch.Tensor:
        if index not in self._scratch:
            target = self._targets[index]
            raw = torch.empty(target.shape, dtype=torch_dtype(target.dtype), device=self._half.device)
            self._scratch[index] = raw
            self._missing[index] = raw.numel()
        return self._scratch[index]

    def landed(self, target: int, count: int) -> None:
        """Report ``count`` elements written to ``target``; the last ones trigger its transform."""
        if target not in self._missing:
            return
        self._missing[target] -= count
        if self._missing[target] == 0:
            spec = self._targets[target]
            packed = self._half[spec.offset : spec.offset + spec.nbytes].view(torch_dtype(spec.dtype))
            compat.run_transform(spec.transform, self._scratch.pop(target), packed)
            del self._missing[target]

    def apply(self, writes: Sequence[Write], tensor: torch.Tensor) -> None:
        """Perform ``writes``, all from one whole source ``tensor`` (any strides; cast on the way)."""
        source = tensor.contiguous().flatten()
        for write in writes:
            source_view = source.as_strided(write.size, write.src_stride, write.src_offset)
            self.view(write.target, write.size, write.dst_offset, write.dst_stride).copy_(source_view)
            self.landed(write.target, write.numel)

    def finish(self) -> None:
        """Check that nothing is half gathered.

        Raises:
            ConfigError: a transformed target received only some of its elements.
        """
        if self._missing:
            listing = "\n  ".join(
                f"{self._targets[i].name}: {count} of {self._scratch[i].numel()} elements missing"
                for i, count in self._missing.items()
            )
            raise ConfigError(
                "vLLM keeps these parameters in another layout, so a round must carry all of each or "
                f"none; send the whole model:\n  {listing}"
            )


def writes_by_source(writes: Sequence[Write]) -> dict[int, list[Write]]:
    """Group a rank's writes by the source they read."""
    grouped: defaultdict[int, list[Write]] = defaultdict(list)
    for write in writes:
        grouped[write.source].append(write)
    return grouped
