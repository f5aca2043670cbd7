"""Changes of weights on a GPU, sent by Gloo: bit for bit what whole rounds bring, wherever compared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.protocol.plan import Bucket, Copy, Lane
from bridge.wire.delta_transport import Chain, Crossing, DeltaSink, DeltaSource
from bridge.wire.transport import DataLink, GlooSink, GlooSource, SendBuffers
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROUNDS = 10
SHARES = (0.0, 0.01, 0.001, 0.15, 1.0)  # one form after the other
SHARDS = [(6144, 4096), (2048, 3000), (77,), (130,)]
MASTERS = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
DTYPES = [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
WIRE_BYTES = 2 * 6144 * 4096 + 2 * 2048 * 2000 + 2 * 77 + 4 * 130
SPARE_BYTES = (
    200 << 20
)  # of one bucket's cast copy, and of what comparing a chunk takes when all of it changed


def lane() -> Lane:
    """Halves of one shard, columns of another that land transposed, two small ones of other element sizes."""
    half = (3072, 4096)
    first, second = (
        Copy(shard=0, target=0, size=half, src_offset=at, src_stride=(4096, 1), dst_offset=at,
             dst_stride=(4096, 1))
        for at in (0, 3072 * 4096)
    )  # fmt: skip
    columns = Copy(shard=1, target=1, size=(2048, 2000), src_offset=500, src_stride=(3000, 1),
                   dst_offset=0, dst_stride=(1, 2048))  # fmt: skip
    small = [
        Copy(shard=i, target=i, size=SHARDS[i], src_offset=0, src_stride=(1,), dst_offset=0, dst_stride=(1,))
        for i in (2, 3)
    ]
    groups = [(first,), (second, small[0]), (columns, small[1])]
    buckets = tuple(Bucket(index=i, nbytes=0, copies=copies) for i, copies in enumerate(groups))
    return Lane(trainer=0, inference=0, buckets=buckets)


class Home:
    """Targets as plain tensors."""

    def __init__(self, device: str) -> None:
        sizes = (6144 * 4096, 2000 * 2048, 77, 130)
        self.tensors = [torch.zeros(n, dtype=d, device=device) for n, d in zip(sizes, DTYPES, strict=True)]

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[target].as_strided(size, stride, offset)

    def address(self, target: int) -> int:  # noqa: ARG002
        raise AssertionError("bytes that come over Gloo are written as tensors")

    def landed(self, target: int, count: int) -> None:
        """Nothing waits for the last element here."""


def link(peer: int) -> DataLink:
    group = dist.distributed_c10d._get_default_group()
    return DataLink(group, peer, who=f"rank {peer}", timeout_s=60)


def states() -> Iterator[list[torch.Tensor]]:
    """The trainer's weights, round after round, changed in place by another share each time."""
    torch.manual_seed(3)
    tensors = [torch.randn(s, device="cuda").to(d) for s, d in zip(SHARDS, MASTERS, strict=True)]
    for round_ in range(ROUNDS):
        yield tensors
        for tensor in tensors:
            mask = torch.rand(tensor.shape, device="cuda") < SHARES[round_ % len(SHARES)]
            tensor[mask] = torch.randn(int(mask.sum()), device="cuda").to(tensor.dtype)
        torch.cuda.synchronize()


def trainer(snapshot: str) -> None:
    chain, buffers, lane_ = Chain(lane()), SendBuffers(), lane()
    crossing = Crossing() if snapshot == "host" else None
    place = torch.device("cuda", 0) if snapshot == "gpu" else torch.device("cpu")
    peaks = []
    with ThreadPoolExecutor(2) as workers:
        for tensors in states():
            whole = GlooSource(link(1), tensors, DTYPES, buffers)
            whole.open()
            for bucket in lane_.buckets:
                whole.move(bucket)
            whole.close()
            held = torch.cuda.memory_allocated() - sum(
                p.numel() for p in chain.previous.values() if p.is_cuda
            )
            torch.cuda.reset_peak_memory_stats()
            source = DeltaSource(
                link(1), tensors, DTYPES, buffers, chain, whole=(), workers=workers, snapshot=place,
                crossing=crossing,
            )  # fmt: skip
            source.open()
            for bucket, following in zip(lane_.buckets, [*lane_.buckets[1:], None], strict=True):
                source.prepare(bucket)
                if following is not None:
                    source.prepare(following)
                source.move(bucket)
            source.close()
            peaks.append(torch.cuda.max_memory_allocated() - held)
    kept = {p.device.type: p.numel() for p in chain.previous.values()}
    assert set(kept) == {place.type}
    assert sum(p.numel() for p in chain.previous.values()) == WIRE_BYTES
    sys.stderr.write(
        f"snapshot {snapshot}: {WIRE_BYTES / 2**20:.0f} MiB of weights, at most {max(peaks) / 2**20:.0f} MiB "
        "of the GPU beside them\n"
    )
    assert max(peaks) < (WIRE_BYTES if snapshot == "gpu" else 0) + SPARE_BYTES


def updater(device: str) -> None:
    chain, lane_ = Chain(lane()), lane()
    halves, reference = [Home(device), Home(device)], Home(device)
    changed, received = False, []
    for round_ in range(ROUNDS):
        before = [t.clone() for t in reference.tensors]
        whole = GlooSink(link(0), lane_, DTYPES, [])
        whole.open()
        for bucket in lane_.buckets:
            whole.move(bucket, reference)
        whole.close()
        landing, served = halves[round_ % 2], halves[1 - round_ % 2]
        sink = DeltaSink(
            link(0), lane_, DTYPES, [], chain, follows=round_ > 0, served=served if round_ else None
        )
        sink.open()
        for bucket in lane_.buckets:
            sink.move(bucket, landing)
        sink.close()
        received.append(sink.received_bytes)
        for got, want, old in zip(landing.tensors, reference.tensors, before, strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
            changed = changed or not torch.equal(want, old)
    assert changed
    assert received[0] == received[5] == WIRE_BYTES, "the first round, and that in which everything changed"
    assert received[1] == 0, "nothing changed"
    assert received[2] < 0.03 * WIRE_BYTES


def rounds(_: Path, *, snapshot: str, device: str) -> None:
    trainer(snapshot) if dist.get_rank() == 0 else updater(device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("snapshot", ["gpu", "host"])
def test_changes_bring_what_whole_rounds_bring(snapshot: str, device: str, tmp_path: Path) -> None:
    run_ranks(partial(rounds, snapshot=snapshot, device=device), 2, tmp_path)
