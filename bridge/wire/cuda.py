"""The CUDA driver where torch does not reach: raw memory as tensors, IPC handles, copies by copy engine.

``cuda.bindings`` comes with torch's CUDA builds; nothing here is imported on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from bridge.errors import ConfigError, DeviceError


@functools.cache
def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as err:
        raise ConfigError(
            "cuda-bindings is not installed, which torch's CUDA builds bring along: pip install cuda-bindings"
        ) from err


def driver() -> Any:
    """``cuda.bindings.driver``.

    Raises:
        ConfigError: it is not installed.
    """
    return _bindings("driver")


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call; ``what`` says what was tried.

    Raises:
        DeviceError: the call failed; carries CUDA's name for it.
    """
    code, *values = result
    if int(code) != 0:
        raise DeviceError(f"{what}: {getattr(code, 'name', code)}")
    return values[0] if len(values) == 1 else tuple(values)


def use(device: torch.device) -> None:
    """Make ``device``'s primary context current in this thread, for torch and for the driver's calls."""
    runtime = _bindings("runtime")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(device)
    check(runtime.cudaSetDevice(device.index), f"using {device}")


def uuid_of(device: torch.device) -> str:
    """The device's identity, whatever number CUDA_VISIBLE_DEVICES gives it in which process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_by_uuid(uuid: str) -> torch.device:
    """The device of that identity in this process.

    Raises:
        ConfigError: this process does not see it.
    """
    seen = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in seen:
        if uuid_of(device) == uuid:
            return device
    raise ConfigError(
        f"GPU {uuid} is not visible to this process, which sees {', '.join(map(uuid_of, seen)) or 'none'}; "
        "start the bridge with the same CUDA_VISIBLE_DEVICES and in the same cgroup as vLLM"
    )


@functools.cache
def memory_bytes_per_s(device: torch.device) -> float:
    """What the device's memory can do at most, by clock and width of its bus; 0 if it does not say."""
    attribute = driver().CUdevice_attribute

    def ask(name: str) -> int:
        which = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(driver().cuDeviceGetAttribute(which, device.index), f"asking {device} for {name}"))

    return 2e3 * ask("MEMORY_CLOCK_RATE") * ask("GLOBAL_MEMORY_BUS_WIDTH") / 8  # kHz, two transfers each


class _Memory:
    """A stretch of device memory in the form that ``torch.as_tensor`` takes without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 tensor over raw device memory of ``device``; the caller keeps the memory mapped."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.as_tensor(_Memory(address, nbytes), device=device)


TRAINER_ADVICE = (
    "Weights that are read where they lie need none of it: train in the server's dtype, without expandable "
    "segments, or shard over more ranks; or serve with --transport gloo"
)


class OwnMemory:
    """Device memory that can be shown to other processes, whatever allocator torch was configured with.

    Plain ``cuMemAlloc``: torch's expandable segments cannot be exported by IPC handle.
    """

    def __init__(self, nbytes: int, device: torch.device, *, advice: str = TRAINER_ADVICE) -> None:
        """Allocate ``nbytes`` on ``device``, which must be current in this thread.

        Args:
            nbytes: above 0.
            device: where.
            advice: what to do if there is no room, for the error.

        Raises:
            DeviceError: the device has no such memory left.
        """
        self.nbytes = nbytes
        self.address = self._allocate(device, advice)
        self.tensor = bytes_at(self.address, nbytes, device)

    def _allocate(self, device: torch.device, advice: str) -> int:
        what = f"allocating {self.nbytes} bytes on {device}"
        try:
            return int(check(driver().cuMemAlloc(self.nbytes), what))
        except DeviceError:
            torch.cuda.empty_cache()  # what torch keeps for itself may be all that is missing
        try:
            return int(check(driver().cuMemAlloc(self.nbytes), what))
        except DeviceError as err:
            free, total = torch.cuda.mem_get_info(device)
            raise DeviceError(
                f"{err}; {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free. {advice}"
            ) from err

    def free(self) -> None:
        """Give the memory back; ``tensor`` must not be used afterwards. The device must be current."""
        check(driver().cuMemFree(self.address), "freeing device memory")


@functools.cache
def _copying() -> tuple[Any, Any]:
    # Looking names up in the bindings takes longer than the calls they are for.
    runtime = _bindings("runtime")
    return runtime, runtime.cudaMemcpyKind.cudaMemcpyDefault


def copy_rows(
    dst: int, dst_pitch: int, src: int, src_pitch: int, *, width: int, rows: int, stream: torch.cuda.Stream
) -> None:
    """Enqueue a copy of ``rows`` rows of ``width`` bytes, each ``pitch`` bytes after the one before.

    Done by the copy engines, also from a peer GPU's mapped memory: no multiprocessor takes part. Within one
    GPU the driver takes a kernel (``turns``).

    Raises:
        DeviceError: the copy could not be enqueued.
    """
    runtime, kind = _copying()
    if rows == 1:
        result = runtime.cudaMemcpyAsync(dst, src, width, kind, stream.cuda_stream)
    else:
        result = runtime.cudaMemcpy2DAsync(
            dst, dst_pitch, src, src_pitch, width, rows, kind, stream.cuda_stream
        )
    check(result, f"enqueuing a copy of {rows} x {width} bytes")
