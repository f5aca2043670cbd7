"""The pieces under a GPU server: halves that change places, memory shown to others, copies and sums."""

from __future__ import annotations

import multiprocessing
import random
import socket
from collections.abc import Iterator

import pytest
import torch

from bridge.protocol.plan import Copy
from tests.support import gpu_peer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

SPAWN = multiprocessing.get_context("spawn")
BYTES = 64 << 20


@pytest.fixture
def device() -> Iterator[torch.device]:
    from bridge.wire import cuda

    found = torch.device("cuda", 0)
    cuda.use(found)
    yield found
    torch.cuda.synchronize(found)


def test_a_captured_graph_reads_the_half_that_was_flipped_in(device: torch.device) -> None:
    from vllm_patching.cuda_arena import CudaArena

    arena = CudaArena(BYTES, device)
    weight = arena.live(0, 1 << 20).view(torch.bfloat16).view(1024, 512)
    weight.fill_(3)
    arena.open_second_half()
    arena.warm()
    ours, theirs = socket.socketpair()
    peer = SPAWN.Process(target=gpu_peer.fill_halves, args=(theirs, BYTES, (1.0, 2.0)))
    peer.start()
    socket.send_fds(ours, [b"!"], list(arena.export()))
    assert ours.recv(1) == b"!"
    x = torch.ones(8, 1024, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = x @ weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ weight
    seen = []
    for to in (1, 0, 0, 1):
        arena.flip(to)
        graph.replay()
        torch.cuda.synchronize()
        seen.append(float(y[0, 0]))
    ours.sendall(b"!")
    peer.join(30)
    for end in (ours, theirs):
        end.close()
    del graph
    assert peer.exitcode == 0
    assert seen == [2048.0, 1024.0, 1024.0, 2048.0]
    assert arena.active == 1
    arena.close()


FIXED = {  # case -> kind of the arena, its memory, what another process writes into its halves
    "copy": ("copy", "DeviceMemory", (3.0, 2.0)),
    "in place": ("in-place", "PiecedMemory", (2.0,)),
    "in place, by handle": ("in-place", "DeviceMemory", (2.0,)),
}


def replayed(graph: torch.cuda.CUDAGraph, y: torch.Tensor) -> float:
    graph.replay()
    torch.cuda.synchronize()
    return float(y[0, 0])


@pytest.mark.parametrize("case", list(FIXED))
def test_memory_that_stays_where_it_is(device: torch.device, case: str) -> None:
    """What another process wrote is read by a captured graph, with ``copy`` only after the flip."""
    from vllm_patching import cuda_memory
    from vllm_patching.fixed_arena import FixedArena

    kind, memory, values = FIXED[case]
    nbytes = 5 * BYTES + 512  # not a whole number of pages, nor of pieces
    arena = FixedArena(nbytes, lambda which: getattr(cuda_memory, memory)(nbytes, device, which), kind=kind)
    for start in range(0, nbytes - 512, BYTES):  # as the tensors of a model move in, one after the other
        arena.live(start, BYTES).view(torch.bfloat16).fill_(3)
    arena.live(nbytes - 512, 512).view(torch.bfloat16).fill_(3)
    weight = arena.live(nbytes - (1 << 20), 1 << 20).view(torch.bfloat16).view(1024, 512)
    arena.open_second_half()
    arena.warm()
    assert all(arena.half(i).view(torch.bfloat16).eq(3).all() for i in range(len(values)))
    x = torch.ones(8, 1024, device=device, dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        y = x @ weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ weight
    assert replayed(graph, y) == 3072.0
    ours, theirs = socket.socketpair()
    peer = SPAWN.Process(target=gpu_peer.fill_adopted, args=(theirs, nbytes, arena.handles(), kind, values))
    peer.start()
    socket.send_fds(ours, [b"!"], list(arena.export()))
    assert ours.recv(1) == b"!"
    assert replayed(graph, y) == (3072.0 if kind == "copy" else 2048.0)
    arena.flip(1 - arena.active)
    assert replayed(graph, y) == 2048.0
    assert arena.live(0, nbytes).view(torch.bfloat16).eq(2).all()
    ours.sendall(b"!")
    peer.join(30)
    for end in (ours, theirs):
        end.close()
    del graph
    assert peer.exitcode == 0
    arena.close()


def test_remapping_is_possible_here(device: torch.device) -> None:
    """Where these tests run, --flip auto must not fall back without a word of why."""
    from vllm_patching import cuda_arena

    assert cuda_arena.why_no_remap(device) == ""


def test_a_closed_arena_gives_its_memory_back(device: torch.device) -> None:
    from vllm_patching.cuda_arena import CudaArena

    free = torch.cuda.mem_get_info(device)[0]
    for _ in range(3):
        arena = CudaArena(1 << 30, device)
        arena.open_second_half()
        arena.warm()
        arena.export()
        arena.close()
    assert free - torch.cuda.mem_get_info(device)[0] < 64 << 20


def test_memory_that_moved_is_read_where_it_is_now(device: torch.device) -> None:
    from bridge.wire import cuda, device_memory

    ours, theirs = SPAWN.Pipe()
    moves = 4
    peer = SPAWN.Process(target=gpu_peer.show, args=(theirs, BYTES, moves))
    peer.start()
    known = device_memory.PeerAllocations()
    found = torch.empty(1024, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream()
    for number in range(moves + 1):
        assert ours.poll(60)
        (address,), _ = known.read(ours.recv())
        cuda.copy_rows(found.data_ptr(), 0, address, 0, width=1024, rows=1, stream=stream)
        stream.synchronize()
        assert found.unique().tolist() == [number]
        ours.send("next")
    peer.join(30)
    known.close()
    assert peer.exitcode == 0


def random_copy(choose: random.Random) -> tuple[Copy, int, int]:
    """A strided copy between two flat tensors, and how many elements each must have."""
    size = tuple(choose.choice((1, 2, 3, 5, 64, 257)) for _ in range(choose.randint(1, 4)))
    strides = []
    for _ in range(2):
        order = list(range(len(size)))
        if choose.random() < 0.3:
            choose.shuffle(order)
        step, stride = 1, [0] * len(size)
        for dim in reversed(order):
            stride[dim] = step
            step = step * size[dim] + choose.choice((0, 0, 8))
        strides.append(tuple(stride))
    spans = [1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) for stride in strides]
    copy = Copy(shard=0, target=0, size=size, src_offset=choose.randint(0, 9), src_stride=strides[0],
                dst_offset=0, dst_stride=strides[1])  # fmt: skip
    return copy, copy.src_offset + spans[0], spans[1]


@pytest.mark.parametrize("seed", range(40))
def test_strided_copies_land_as_torch_would_put_them(device: torch.device, seed: int) -> None:
    from bridge.protocol.plan import Bucket, Lane
    from bridge.wire.copy_jobs import LaneSteps
    from bridge.wire.device_memory import PeerAllocations
    from bridge.wire.device_transport import DevicePullSink, Engines

    copy, source_numel, target_numel = random_copy(random.Random(seed))
    source = torch.randn(source_numel, device=device).bfloat16()
    dtype = torch.float32 if seed % 5 == 0 else torch.bfloat16
    target = torch.zeros(target_numel, device=device, dtype=dtype)
    lane = Lane(trainer=0, inference=0, buckets=(Bucket(index=0, nbytes=0, copies=(copy,)),))
    engines, steps = Engines(device), LaneSteps([dtype])
    sink = DevicePullSink(
        None, lane, PeerAllocations(), steps, engines, engines.share(0, 1 + seed % 2), checked=False
    )  # type: ignore[arg-type]
    sink._addresses, sink._dtypes = [source.data_ptr()], [torch.bfloat16]
    steps.use(sink._dtypes)

    class Landing:
        def view(
            self, _target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]
        ) -> torch.Tensor:
            return target.as_strided(size, stride, offset)

        def address(self, _target: int) -> int:
            return target.data_ptr()

        def landed(self, _target: int, _count: int) -> None: ...

    torch.cuda.synchronize()
    sink.move(lane.buckets[0], Landing())
    sink.close()
    expected = torch.zeros_like(target)
    expected.as_strided(copy.size, copy.dst_stride).copy_(
        source.as_strided(copy.size, copy.src_stride, copy.src_offset)
    )
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64])
def test_sums_follow_every_element_and_its_place(device: torch.device, dtype: torch.dtype) -> None:
    from bridge.wire.device_checksum import DeviceChecksums

    def digest(*tensors: torch.Tensor) -> bytes:
        sums = DeviceChecksums(1, device, torch.cuda.current_stream())
        for tensor in tensors:
            sums.add(0, tensor)
        return sums.digests()[0]

    data = torch.randint(0, 255, (1000, 1031 * 8), device=device, dtype=torch.uint8).view(dtype)
    whole = digest(data)
    assert digest(data[:400], data[400:]) == whole
    column = data[:, 3:77]
    assert digest(column) == digest(column.contiguous())
    turned = data.t()
    assert digest(turned) == digest(turned.contiguous())
    raw = data.view(torch.uint8)
    raw[500, 77] ^= 1
    assert digest(data) != whole
    raw[500, 77] ^= 1
    assert digest(data) == whole
    rows = data.clone()
    rows[[3, 4]] = rows[[4, 3]]
    assert digest(rows) != whole
