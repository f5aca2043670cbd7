"""A bucket as Gloo carries it: one slice behind the other in the server's dtypes, no memory beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.protocol.plan import Bucket, Copy
from bridge.wire.transport import pack, packed_bytes, pick, unpack

ROWS, COLUMNS = 40, 33
SHARDS = [torch.randn(ROWS, COLUMNS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
WIRE = [torch.bfloat16, torch.bfloat16, torch.float32]  # by target


def columns(shard: int, target: int, *, width: int) -> Copy:
    """The columns from the fifth on, dense where they land."""
    return Copy(
        shard=shard, target=target, size=(ROWS, width),
        src_offset=5, src_stride=(COLUMNS, 1), dst_offset=0, dst_stride=(width, 1),
    )  # fmt: skip


class Memory(TorchDispatchMode):
    """How many bytes operators have taken."""

    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in before:
            self.taken += made.untyped_storage().nbytes()
        return made


class Home:
    def __init__(self, copies: tuple[Copy, ...]) -> None:
        self.tensors = {c.target: torch.zeros(c.size, dtype=WIRE[c.target]) for c in copies}

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[target].as_strided(size, stride, offset)

    def address(self, target: int) -> int:
        return self.tensors[target].data_ptr()

    def landed(self, target: int, count: int) -> None:
        assert count == self.tensors[target].numel()


@pytest.mark.parametrize("start", [0, 8])
@pytest.mark.parametrize(
    ("copies", "allowed"),
    [
        ((columns(0, 0, width=20), columns(1, 1, width=7)), 0),  # a cast, and a slice of columns
        # An odd number of bfloat16 elements, and float32 behind them: those are cast apart.
        ((Copy(shard=1, target=1, size=(7,), src_offset=3, src_stride=(1,), dst_offset=0, dst_stride=(1,)),
          columns(0, 2, width=20)), ROWS * 20 * 4),
    ],
)  # fmt: skip
def test_elements_arrive_bit_for_bit_without_memory_beside_the_buffer(
    copies: tuple[Copy, ...], allowed: int, start: int
) -> None:
    bucket = Bucket(index=0, nbytes=0, copies=copies)
    buffer = torch.zeros(start + packed_bytes(bucket, WIRE), dtype=torch.uint8)[start:]
    with Memory() as memory:
        pack(bucket, SHARDS, WIRE, buffer)
    assert memory.taken <= allowed
    home = Home(copies)
    unpack(bucket, buffer, home)
    for copy in copies:
        expected = pick(SHARDS[copy.shard], copy).to(WIRE[copy.target])
        assert torch.equal(home.tensors[copy.target], expected)
