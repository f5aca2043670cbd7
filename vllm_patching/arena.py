"""The arena: one fixed address range for a worker's weights, backed by one of two halves.

The forward reads ``live``; the daemon fills the half that is not under it; ``flip`` exchanges them between
two batches without copying a byte and without changing an address. Parameters, views, closures, captured
graphs and compiled code never learn of it. ``cpu_arena`` and ``cuda_arena`` make it so on their devices.
"""

from __future__ import annotations

from typing import Protocol

import torch

from bridge.errors import ConfigError

SEGMENT_ALIGNMENT = 256  # bytes; a cache line or a vector register never straddles two tensors


class Arena(Protocol):
    """What a worker needs of its weights' memory, on any device.

    ``active`` is the number of the half under the live range. ``export`` gives one file descriptor per
    half, for ``adopt`` in another process.
    """

    nbytes: int
    active: int

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
        """File descriptors of the two halves."""

    def flip(self, to: int) -> None:
        """Put half ``to`` under the live range; no thread may be reading the range meanwhile.

        Raises:
            OSError, DeviceError: the system refused; the old half is still live.
        """

    def close(self) -> None:
        """Release the memory."""


class Halves(Protocol):
    """Another process's two halves, as an updater writes them: uint8 [nbytes] each."""

    nbytes: int
    device: torch.device
    halves: tuple[torch.Tensor, ...]

    def synchronize(self) -> None:
        """Wait until everything written is there."""


def allocate(nbytes: int, device: torch.device) -> Arena:
    """An arena of ``nbytes`` bytes on ``device``.

    Raises:
        ConfigError: nobody has built one for such a device.
        OSError, DeviceError: no such memory is left.
    """
    if device.type == "cpu":
        from vllm_patching.cpu_arena import CpuArena

        return CpuArena(nbytes)
    if device.type == "cuda":
        from vllm_patching.cuda_arena import CudaArena

        return CudaArena(nbytes, device)
    raise ConfigError(f"the weights are on {device}; the bridge knows CPUs and CUDA devices")


def adopt(fds: tuple[int, ...], nbytes: int, gpu: str) -> Halves:
    """Another process's halves; ``gpu`` is the UUID of the device they are on, "" for the host's memory.

    Raises:
        ConfigError: what came is not two halves of that size, or the device is not visible here.
        DeviceError: the CUDA driver refused to map them.
    """
    if not gpu:
        from vllm_patching.cpu_arena import CpuHalves

        return CpuHalves(fds, nbytes)
    from bridge.wire import cuda
    from vllm_patching.cuda_arena import CudaHalves

    return CudaHalves(fds, nbytes, cuda.device_by_uuid(gpu))
