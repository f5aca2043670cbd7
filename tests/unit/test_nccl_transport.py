"""How a bucket is cut into NCCL's messages, and what may be sent from where it lies; no GPU needed."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.protocol.plan import Bucket, Copy
from bridge.wire import nccl
from bridge.wire.device_memory import Allocation, DeviceWhereabouts
from bridge.wire.nccl_transport import SMALL_BYTES, as_run, messages_of

DTYPES = [torch.bfloat16, torch.float32]
CPU = torch.device("cpu")


def contiguous(target: int, numel: int) -> Copy:
    return Copy(shard=0, target=target, size=(numel,), src_offset=0, src_stride=(1,), dst_offset=0,
                dst_stride=(1,))  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from((0, 1, 3, 4096, SMALL_BYTES // 4, SMALL_BYTES))))
)
def test_every_copy_travels_once_in_order_and_aligned(parts: list[tuple[int, int]]) -> None:
    copies = tuple(contiguous(target, numel) for target, numel in parts)
    messages = list(messages_of(Bucket(index=0, nbytes=0, copies=copies), DTYPES))
    assert [copy for m in messages for copy, _ in m.copies] == [c for c in copies if math.prod(c.size)]
    for message in messages:
        end = 0
        for copy, offset in message.copies:
            nbytes = math.prod(copy.size) * DTYPES[copy.target].itemsize
            assert offset % 16 == 0
            assert offset >= end
            end = offset + nbytes
            assert nbytes < SMALL_BYTES or len(message.copies) == 1
        assert message.nbytes == end, "an end that needs no buffer would send or expect less"


def test_large_slices_travel_alone_and_small_ones_together() -> None:
    large, small = contiguous(0, SMALL_BYTES), contiguous(1, 5)
    bucket = Bucket(index=0, nbytes=0, copies=(small, small, large, small, large))
    assert [len(message.copies) for message in messages_of(bucket, DTYPES)] == [2, 1, 1, 1]


def test_only_a_contiguous_run_of_the_wire_s_dtype_is_sent_from_where_it_lies() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    run = as_run(tensor, CPU, torch.float32)
    assert run is not None
    assert run.data_ptr() == tensor.data_ptr()
    assert run.numel() == 48
    assert as_run(tensor[:, 1:3], CPU, torch.float32) is None
    assert as_run(tensor, CPU, torch.bfloat16) is None
    assert as_run(tensor, torch.device("meta"), torch.float32) is None


def test_nccl_is_refused_by_name_where_there_is_none() -> None:
    assert "not on a GPU that can be named" in nccl.why_not(None, CPU)
    shown = Allocation(buffer_id=1, nbytes=32, handle=b"")
    peer = DeviceWhereabouts(uuid="GPU-1", nccl="2.28.9", nonce="", allocation=shown)
    why = nccl.why_not(peer, CPU)
    assert "2.28.9" in why or "one GPU" in why
