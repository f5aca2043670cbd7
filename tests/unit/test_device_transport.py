"""What the GPU transport decides without a GPU: how copies are cut, which rounds are summed, the sums."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.protocol.plan import Bucket, Copy
from bridge.wire.copy_jobs import LaneSteps, rows_of
from bridge.wire.device_transport import SummedRounds
from bridge.wire.transport import DIRECT_RUN_BYTES

REPO = Path(__file__).parents[2]


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    strides = []
    for _ in range(2):
        order = draw(st.permutations(range(len(size))))
        step, stride = 1, [0] * len(size)
        for dim in order:
            stride[dim] = step
            step = step * size[dim] + draw(st.integers(0, 2))
        strides.append(tuple(stride))
    return Copy(shard=0, target=0, size=size, src_offset=0, src_stride=strides[0], dst_offset=0,
                dst_stride=strides[1])  # fmt: skip


def span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


@given(copies())
def test_jobs_move_every_element_to_its_place(copy: Copy) -> None:
    source = torch.arange(1, 1 + span(copy.size, copy.src_stride))
    expected = torch.zeros(span(copy.size, copy.dst_stride), dtype=torch.int64)
    found = expected.clone()
    expected.as_strided(copy.size, copy.dst_stride).copy_(source.as_strided(copy.size, copy.src_stride))
    for job in rows_of(copy):
        assert min(job.src_pitch, job.dst_pitch) >= job.width or job.rows == 1
        shape = (job.rows, job.width)
        found.as_strided(shape, (job.dst_pitch, 1), job.dst).copy_(
            source.as_strided(shape, (job.src_pitch, 1), job.src)
        )
    assert torch.equal(found, expected)


@given(copies(), st.integers(0, 3), st.integers(0, 3))
def test_a_lane_s_jobs_move_every_byte_to_its_place(copy: Copy, src_offset: int, dst_offset: int) -> None:
    copy = msgspec.structs.replace(copy, src_offset=src_offset, dst_offset=dst_offset)
    # Wide enough elements that short runs are jobs too.
    source = torch.arange(1, 1 + src_offset + span(copy.size, copy.src_stride)).to(torch.complex128)
    expected = torch.zeros(dst_offset + span(copy.size, copy.dst_stride), dtype=source.dtype)
    found = expected.clone()
    expected.as_strided(copy.size, copy.dst_stride, dst_offset).copy_(
        source.as_strided(copy.size, copy.src_stride, src_offset)
    )
    steps = LaneSteps([source.dtype])
    steps.use([source.dtype])
    (step,) = steps.of(Bucket(index=0, nbytes=0, copies=(copy,)))
    assert step.numel == math.prod(copy.size)
    if not step.jobs:
        assert source.dtype.itemsize < DIRECT_RUN_BYTES < step.numel * source.dtype.itemsize
    for job in step.jobs:
        for row in range(job.rows):
            ctypes.memmove(
                found.data_ptr() + job.dst + row * job.dst_pitch,
                source.data_ptr() + job.src + row * job.src_pitch,
                job.width,
            )
    assert not step.jobs or torch.equal(found, expected)


def test_a_lane_s_steps_follow_the_dtypes_that_are_shown() -> None:
    copy = Copy(shard=0, target=0, size=(512,), src_offset=4, src_stride=(1,), dst_offset=8, dst_stride=(1,))
    bucket = Bucket(index=0, nbytes=0, copies=(copy,))
    steps = LaneSteps([torch.bfloat16])
    steps.use([torch.bfloat16])
    assert [(job.src, job.dst, job.width) for job in steps.of(bucket)[0].jobs] == [(8, 16, 1024)]
    steps.use([torch.float32])
    assert steps.of(bucket)[0].jobs == ()


def test_a_contiguous_copy_is_one_job() -> None:
    copy = Copy(shard=0, target=0, size=(7, 5, 3), src_offset=2, src_stride=(15, 3, 1), dst_offset=0,
                dst_stride=(15, 3, 1))  # fmt: skip
    (job,) = rows_of(copy)
    assert (job.rows, job.width) == (1, 105)


def test_a_slice_of_columns_is_one_strided_job() -> None:
    copy = Copy(shard=0, target=0, size=(7, 5), src_offset=2, src_stride=(40, 1), dst_offset=0,
                dst_stride=(5, 1))  # fmt: skip
    (job,) = rows_of(copy)
    assert (job.rows, job.src_pitch, job.dst_pitch, job.width) == (7, 40, 5, 5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("first", [True, False, True, False, False]),
        ("always", [True] * 5),
        ("off", [False] * 5),
    ],
)
def test_which_rounds_are_summed(mode: str, expected: list[bool]) -> None:
    rounds = SummedRounds(mode)
    assert [rounds.includes(plan) for plan in (b"a", b"a", b"b", b"b", b"a")] == expected


INTERPRETED = """
import torch
from bridge.wire.device_checksum import _BLOCK, _BLOCKS_PER_PROGRAM, _INTEGERS, _as_rows
from bridge.wire.sums_kernel import sums

def check(tensor):
    rows = _as_rows(tensor.view(_INTEGERS[tensor.element_size()]))
    out, count, bits = torch.zeros(2, dtype=torch.int64), tensor.numel(), 8 * tensor.element_size()
    grid = (-(-count // (_BLOCK * _BLOCKS_PER_PROGRAM)),)
    sums[grid](rows, out, count, rows.shape[1], rows.stride(0), 5, FLAT=rows.is_contiguous(), BITS=bits,
               BLOCK=_BLOCK, BLOCKS=_BLOCKS_PER_PROGRAM)
    elements = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    if bits < 64:
        elements = elements & ((1 << bits) - 1)
    places = torch.arange(6, 6 + count)
    assert out.tolist() == [int(elements.sum()), int((elements * places).sum())], tensor.shape

draw = torch.Generator().manual_seed(0)
check(torch.randn(1000, 77, generator=draw).bfloat16())
check(torch.randn(300, 512, generator=draw)[:, 100:357])
check(torch.randn(30, 5, 64, generator=draw).bfloat16()[:, :3, 10:50])
check(torch.randint(0, 255, (99999,), dtype=torch.uint8, generator=draw))
check(torch.randint(-(2**62), 2**62, (5000,), generator=draw))
check(torch.randn(70, 80, generator=draw).t())
"""


def test_the_kernel_sums_as_defined() -> None:
    """In Triton's interpreter, which must be chosen before Triton is imported; on a GPU: tests/gpu."""
    pytest.importorskip("triton", reason="Triton is not installed, as no vLLM is")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
