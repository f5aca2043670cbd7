"""A checksum of device memory at the speed of reading it, by a kernel at either end of a transfer.

Two 64-bit sums over a bucket's elements, taken as unsigned integers in the order in which both sides walk
them: of the elements, and of the elements times their place in the bucket. A single change always shows, an
exchange almost always; it guards against faults, not against forgery. Every element is read once.
"""

from __future__ import annotations

from typing import Any

import torch

from bridge.errors import ConfigError
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.region import Dim, merge_dims

_BLOCK = 4096  # elements a program reads at a time
_BLOCKS_PER_PROGRAM = 16
_WORDS = DIGEST_BYTES // 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kernel() -> Any:
    """Imported on first use, so that a machine without a GPU never imports Triton."""
    try:
        from bridge.wire.sums_kernel import sums
    except ImportError as err:
        raise ConfigError(
            "checksums of device memory need Triton, which torch's CUDA builds bring along: "
            "pip install triton, or start the server with --checksum off"
        ) from err
    return sums


class DeviceChecksums:
    """The checksums of all buckets of a lane, kept on the device until they are asked for."""

    def __init__(self, num_buckets: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        """``stream`` is where the sums are taken; the caller orders it after what it reads."""
        self._stream = stream
        with torch.cuda.stream(stream):
            self._sums = torch.zeros((max(num_buckets, 1), _WORDS), dtype=torch.int64, device=device)
        self._counts = [0] * num_buckets

    def add(self, bucket: int, tensor: torch.Tensor) -> None:
        """Enqueue a tensor's elements, of any strides, as the next ones of ``bucket``."""
        count = tensor.numel()
        if count == 0:
            return
        with torch.cuda.stream(self._stream):
            rows = _as_rows(tensor.view(_INTEGERS[tensor.element_size()]))
            grid = (-(-count // (_BLOCK * _BLOCKS_PER_PROGRAM)),)
            _kernel()[grid](
                rows,
                self._sums[bucket],
                count,
                rows.shape[1],
                rows.stride(0),
                self._counts[bucket],
                FLAT=rows.is_contiguous(),
                BITS=8 * tensor.element_size(),
                BLOCK=_BLOCK,
                BLOCKS=_BLOCKS_PER_PROGRAM,
            )
        self._counts[bucket] += count

    def digests(self) -> list[bytes]:
        """Wait for the sums; one digest of 16 bytes for each bucket."""
        self._stream.synchronize()
        data = self._sums.cpu().numpy().tobytes()
        return [data[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(len(self._counts))]


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in the same order as [rows, cols], rows contiguous; a copy if need be."""
    dims = merge_dims(Dim(n, s, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if not dims or (len(dims) == 1 and dims[0].src == 1):
        return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1))
    if len(dims) == 2 and dims[1].src == 1:
        return tensor.as_strided((dims[0].length, dims[1].length), (dims[0].src, 1))
    return tensor.contiguous().view(1, -1)
