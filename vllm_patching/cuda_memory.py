"""Halves in plain device memory, shown to the updater by CUDA IPC handle: a ``FixedArena``'s on a GPU.

For systems on which CUDA's virtual memory management cannot export memory as a file descriptor, and for
``--staging in-place``, which has no use for it.
"""

from __future__ import annotations

import torch

from bridge.errors import ConfigError
from bridge.wire import cuda, device_memory
from vllm_patching.cuda_arena import NO_ROOM

_ADVICE = f"That is one half of the weights: {NO_ROOM}"


class DeviceMemory:
    """One half of a ``FixedArena`` on a GPU. Owner: the worker process."""

    fd: int | None = None

    def __init__(self, nbytes: int, device: torch.device, which: str) -> None:
        """Allocate ``nbytes`` bytes on ``device``.

        Raises:
            DeviceError: they do not fit, or cannot be exported; says of ``which`` half.
        """
        self._device = device
        cuda.use(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what moved into the arena left its room in torch's cache
        self._memory = cuda.OwnMemory(max(1, nbytes), device, advice=_ADVICE)
        cu = cuda.driver()
        handle = cuda.check(cu.cuIpcGetMemHandle(self._memory.address), f"exporting {which} of the weights")
        self.handle = bytes(handle.reserved).hex()

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        return cuda.bytes_at(self._memory.address + offset, nbytes, self._device)

    def copy_from(self, other: DeviceMemory) -> None:
        """One copy on the current stream, so after all that this stream was given to read.

        Waited for: on return the daemon may let the other half be written again.

        Raises:
            RuntimeError: the device is lost.
        """
        self._memory.tensor.copy_(other._memory.tensor)
        torch.cuda.synchronize(self._device)

    def quiesce(self) -> None:
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        torch.cuda.synchronize(self._device)
        self._memory.free()


class ShownHalves:
    """Another process's halves, mapped for writing by IPC handle. Owner: an updater."""

    def __init__(self, handles: tuple[str, ...], nbytes: int, device: torch.device) -> None:
        """Map the halves of ``nbytes`` bytes each on ``device``; they stay mapped until this process ends.

        Raises:
            ConfigError: what came is not one or two handles.
            DeviceError: CUDA refused to map one.
        """
        if len(handles) not in (1, 2):
            raise ConfigError(f"expected the handles of one or two halves, received {len(handles)}")
        self.nbytes = nbytes
        self.device = device
        cuda.use(device)
        addresses = [device_memory.open_handle(bytes.fromhex(handle)) for handle in handles]
        self.halves = tuple(cuda.bytes_at(address, nbytes, device) for address in addresses)

    def synchronize(self) -> None:
        """Wait until everything written to the halves is there.

        Raises:
            RuntimeError: a kernel or copy of this process has failed.
        """
        torch.cuda.synchronize(self.device)
