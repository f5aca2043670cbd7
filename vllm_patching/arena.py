"""The arena: one fixed address range for a worker's weights, backed by one of two halves.

The forward reads ``live``; the daemon fills the half that is not under it; ``flip`` exchanges them between
two batches without copying a byte and without changing an address. Parameters, views, closures, captured
graphs and compiled code never learn of it. ``cpu_arena`` and ``cuda_arena`` make it so on their devices;
``fixed_arena`` is for systems that cannot, or have no room for a second half.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol

import torch

from bridge.errors import ConfigError
from vllm_patching.fixed_arena import COPY, IN_PLACE, FixedArena

logger = logging.getLogger(__name__)

REMAP = "remap"
SEGMENT_ALIGNMENT = 256  # bytes; a cache line or a vector register never straddles two tensors


class Arena(Protocol):
    """What a worker needs of its weights' memory, on any device.

    ``kind`` is ``REMAP``, ``COPY`` or ``IN_PLACE``, and says what a flip does. ``active`` is the number of
    the half that the forward reads. Another process gets at the halves, in order, by ``adopt`` with what
    ``export`` and ``handles`` give. In place there is one half, else two.
    """

    nbytes: int
    active: int
    kind: str

    def live(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 view of the live range."""

    def open_second_half(self) -> None:
        """Make room for the other half, once the tensors that moved into the first are gone."""

    def half(self, index: int) -> torch.Tensor:
        """A uint8 view of all of one half, whichever is live; of the inactive one until ``warm``."""

    def warm(self) -> float:
        """Copy the active half over the other, then flip twice; returns seconds.

        Tensors that come from no checkpoint must be in both halves, and first touches are slow: both
        are paid here, once, rather than by the first update.
        """

    def export(self) -> tuple[int, ...]:
        """File descriptors of the halves; none where they are shown by handle."""

    def handles(self) -> tuple[str, ...]:
        """CUDA IPC handles of the halves, in hex; none where they are shown by descriptor."""

    def quiesce(self) -> None:
        """Wait until nothing on the device reads the live range.

        Raises:
            RuntimeError: the device is lost.
        """

    def flip(self, to: int) -> None:
        """Make half ``to`` what the forward reads; no thread may be reading the live range meanwhile.

        Raises:
            OSError, DeviceError: the system refused; the old half is still live, or the device is lost.
        """

    def close(self) -> None:
        """Release the memory."""


class Halves(Protocol):
    """Another process's halves, as an updater writes them: uint8 [nbytes] each, two or (in place) one."""

    nbytes: int
    device: torch.device
    halves: tuple[torch.Tensor, ...]

    def synchronize(self) -> None:
        """Wait until everything written is there."""


def staging() -> str:
    """``serve --staging``, as the launcher has told all of vLLM's processes."""
    return os.environ.get("BRIDGE_STAGING", "double")


def allocate(nbytes: int, device: torch.device, *, staging: str, flip: str) -> Arena:
    """An arena of ``nbytes`` bytes on ``device``.

    Args:
        nbytes: of one half.
        device: where the weights are.
        staging: "double" or "in-place".
        flip: "remap", "copy", or "auto" for the first of them that works here; not looked at in place.

    Raises:
        ConfigError: nobody has built one for such a device, or ``remap`` was asked for and is not possible.
        OSError, DeviceError: no such memory is left.
    """
    if device.type == "cpu":
        from vllm_patching import cpu_arena

        kind = _choose(staging, flip, cpu_arena.why_no_remap, nbytes)
        if kind == REMAP:
            return cpu_arena.CpuArena(nbytes)
        return FixedArena(nbytes, lambda which: cpu_arena.HostMemory(nbytes, which), kind=kind)
    if device.type == "cuda":
        from vllm_patching import cuda_arena, cuda_memory

        kind = _choose(staging, flip, lambda: cuda_arena.why_no_remap(device), nbytes)
        if kind == REMAP:
            return cuda_arena.CudaArena(nbytes, device)
        in_pieces = kind == IN_PLACE and not cuda_arena.why_no_remap(device)
        memory = cuda_memory.PiecedMemory if in_pieces else cuda_memory.DeviceMemory
        return FixedArena(nbytes, lambda which: memory(nbytes, device, which), kind=kind)
    raise ConfigError(f"the weights are on {device}; the bridge knows CPUs and CUDA devices")


def _choose(staging: str, flip: str, why_no_remap: Callable[[], str], nbytes: int) -> str:
    if staging == IN_PLACE:
        return IN_PLACE
    if flip == COPY:
        return COPY
    why_not = why_no_remap()
    if not why_not:
        return REMAP
    if flip == REMAP:
        raise ConfigError(f"--flip remap was asked for, but {why_not}; use --flip auto or --flip copy")
    logger.warning(
        "--flip auto takes copy, since %s: each flip copies %d MiB within the device's memory while the rank "
        "stands still (a GPU takes about 0.5 ms for a GiB, a CPU about 100 ms)",
        why_not,
        nbytes >> 20,
    )
    return COPY


def adopt(fds: tuple[int, ...], nbytes: int, gpu: str, handles: tuple[str, ...], kind: str) -> Halves:
    """Another process's halves, of an arena of that kind, as it exported them.

    ``gpu`` is the UUID of the device they are on, "" for the host's memory.

    Raises:
        ConfigError: what came is not one or two halves of that size, or the device is not visible here.
        DeviceError: the CUDA driver refused to map them.
    """
    if not gpu:
        from vllm_patching.cpu_arena import CpuHalves

        return CpuHalves(fds, nbytes)
    from bridge.wire import cuda

    device = cuda.device_by_uuid(gpu)
    if kind != REMAP:
        from vllm_patching.cuda_memory import PiecedHalves, ShownHalves

        return ShownHalves(handles, nbytes, device) if handles else PiecedHalves(fds, nbytes, device)
    from vllm_patching.cuda_arena import CudaHalves

    return CudaHalves(fds, nbytes, device)
