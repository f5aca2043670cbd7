"""A lane that carries changes, between two real processes over Gloo: what lands is what the source holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.errors import ChecksumMismatch, ProtocolError
from bridge.protocol.plan import Bucket, Copy, Lane
from bridge.wire import delta_transport
from bridge.wire.delta import Form
from bridge.wire.delta_transport import HEADER_TAG, Chain, DeltaSink, DeltaSource
from bridge.wire.transport import DataLink, SendBuffers
from tests.support.ranks import run_ranks

SHARDS = [(96, 64), (40, 33), (7,)]
DTYPES = [torch.bfloat16, torch.float32, torch.bfloat16]
MASTERS = [torch.float32, torch.float32, torch.bfloat16]  # what the source holds; cast on the way
WHOLE = 2  # a target that must arrive complete


def lane() -> Lane:
    """Rows of one shard, columns of another, transposed where they land; a small one sent whole."""
    rows = [
        Copy(
            shard=0, target=0, size=(32, 64),
            src_offset=first * 64, src_stride=(64, 1), dst_offset=first * 64, dst_stride=(64, 1),
        )
        for first in (0, 32, 64)
    ]  # fmt: skip
    columns = Copy(
        shard=1,
        target=1,
        size=(40, 20),
        src_offset=5,
        src_stride=(33, 1),
        dst_offset=5 * 40,
        dst_stride=(1, 40),
    )
    small = Copy(shard=2, target=2, size=(7,), src_offset=0, src_stride=(1,), dst_offset=0, dst_stride=(1,))
    groups = [(rows[0], rows[1]), (rows[2], columns), (small,)]
    return Lane(
        trainer=0,
        inference=0,
        buckets=tuple(Bucket(index=i, nbytes=0, copies=copies) for i, copies in enumerate(groups)),
    )


class Home:
    """Targets as plain tensors."""

    def __init__(self) -> None:
        self.tensors = [torch.zeros(n, dtype=d) for n, d in zip((96 * 64, 33 * 40, 7), DTYPES, strict=True)]

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[target].as_strided(size, stride, offset)

    def address(self, target: int) -> int:  # noqa: ARG002
        raise AssertionError("bytes that come over Gloo are written as tensors")

    def landed(self, target: int, count: int) -> None:
        """Nothing waits for the last element here."""


def link(peer: int) -> DataLink:
    group = dist.distributed_c10d._get_default_group()
    return DataLink(group, peer, who=f"rank {peer}", timeout_s=20)


def move_all(end: DeltaSource | DeltaSink, *landing: Home) -> None:
    end.open()
    for bucket in lane().buckets:
        end.move(bucket, *landing)
    end.close()


def change(tensors: list[torch.Tensor], round_: int) -> None:
    """Another share of the elements in each round, none in some."""
    share = (0.0, 0.01, 0.1, 1.0, 0.001)[round_ % 5]
    for tensor in tensors:
        mask = torch.rand(tensor.shape) < share
        tensor[mask] = torch.randn(int(mask.sum())).to(tensor.dtype)


def source(chain: Chain, tensors: list[torch.Tensor], buffers: SendBuffers) -> DeltaSource:
    workers = ThreadPoolExecutor(2)
    return DeltaSource(link(1), tensors, DTYPES, buffers, chain, whole={WHOLE}, workers=workers)


def sink(chain: Chain, *, follows: bool, served: Home | None = None) -> DeltaSink:
    return DeltaSink(link(0), lane(), DTYPES, [], chain, follows=follows, served=served)


def random_rounds(_: Path) -> None:
    """Into one half again and again, or into two in turn, each of which lacks a round when it is written."""
    for num_halves in (1, 2):
        random_rounds_into(num_halves)


def random_rounds_into(num_halves: int) -> None:
    torch.manual_seed(7)
    delta_transport.AGAIN_SHARE = 0.005  # so that some rounds are written again and others are copied
    delta_transport.SMALL_BYTES = 3000  # so that there are pieces of both kinds
    delta_transport.POSTED_BYTES = 500
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip(SHARDS, MASTERS, strict=True)]
    chain, buffers, homes = Chain(lane()), SendBuffers(), [Home() for _ in range(num_halves)]
    sent = []
    for round_ in range(25):
        home, served = homes[round_ % num_halves], homes[1 - round_ % num_halves] if num_halves > 1 else None
        if dist.get_rank() == 0:
            change(tensors, round_)
            move_all(source(chain, tensors, buffers))
        else:
            end = sink(chain, follows=round_ > 0, served=served)
            move_all(end, home)
            sent.append(end.received_bytes)
        held = [tensors if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(held, 0)
        if dist.get_rank() == 1:
            assert torch.equal(home.tensors[0], held[0][0].to(torch.bfloat16).flatten())
            columns = held[0][1][:, 5:25]
            assert torch.equal(home.tensors[1].view(33, 40)[5:25], columns.T)
            assert not home.tensors[1].view(33, 40)[:5].any()
            assert torch.equal(home.tensors[2], held[0][2])
    if dist.get_rank() == 1:
        assert sent[5] == 14, "nothing changed, and the small one is always whole"
        assert sent[6] < sent[0] / 20
        assert sent[7] < sent[0] / 2
        assert sent[8] == sent[0]


def test_rounds_of_any_density_arrive_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(random_rounds, 2, tmp_path)


def other_base(_: Path) -> None:
    tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(SHARDS, MASTERS, strict=True)]
    chain, buffers, home = Chain(lane()), SendBuffers(), Home()
    for round_ in range(2):
        if dist.get_rank() == 0:
            tensors[0][0, 0] = round_
            move_all(source(chain, tensors, buffers))
        elif round_ == 0:
            move_all(sink(chain, follows=False), home)
        else:
            chain.digests[1] = b"of another round"
            with pytest.raises(ChecksumMismatch, match="bucket 1"):
                move_all(sink(chain, follows=True), home)


def test_ends_with_different_pasts_do_not_agree(tmp_path: Path) -> None:
    run_ranks(other_base, 2, tmp_path)


def nonsense(_: Path) -> None:
    one_change = [Form.INDEX, 1, 8]
    for header, follows, why in (
        ([9, 0, 0], True, "no such form"),
        ([Form.INDEX, 5, 3], True, "impossible"),
        ([Form.BITMAP, -1, 4], True, "impossible"),
        ([Form.DENSE, 0, 1 << 40], True, "impossible"),
        (one_change, False, "nothing was sent before"),
    ):
        if dist.get_rank() == 0:
            link(1).send(torch.tensor(header), HEADER_TAG, "a header")
        else:
            with pytest.raises(ProtocolError, match=f"bucket 0.*{why}"):
                move_all(sink(Chain(lane()), follows=follows), Home())


def test_headers_from_outside_are_checked(tmp_path: Path) -> None:
    run_ranks(nonsense, 2, tmp_path)
