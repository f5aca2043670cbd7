"""Several ranks of one scenario, each a process of its own, joined by a Gloo default group."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Layout
from bridge.sharding import LocalShards

JOIN_TIMEOUT_S = 40

# Forked from a process that has imported torch already and does nothing else: seconds cheaper than spawn.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"]
)


def _rank(scenario: Callable[[Path], None], rank: int, world_size: int, path: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world_size
        )
        scenario(path)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (path / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def run_ranks(scenario: Callable[[Path], None], world_size: int, path: Path) -> None:
    """Run ``scenario`` in ``world_size`` processes; the first failure ends all of them."""
    ranks = [
        _context.Process(target=_rank, args=(scenario, rank, world_size, path), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
        if any(p.exitcode for p in ranks):
            break
        connection.wait([p.sentinel for p in ranks if p.is_alive()], timeout=1)
    stuck = [i for i, p in enumerate(ranks) if p.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    failures = "\n".join(file.read_text() for file in sorted(path.glob("rank*.txt")))
    assert not failures, failures
    assert not stuck, f"ranks {stuck} did not end within {JOIN_TIMEOUT_S} s"
    assert [p.exitcode for p in ranks] == [0] * world_size


def put_together(
    shards: LocalShards, mapping: Mapping, expected: dict[str, torch.Tensor]
) -> tuple[list[Layout], dict[str, torch.Tensor]]:
    """All ranks' layouts, and their boxes laid into tensors like ``expected``; NaN where nobody holds any."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (shards.layout, shards.tensors))
    whole = {n: torch.full_like(t, float("nan")) for n, t in expected.items()}
    names = [source.name for source in mapping.vocabularies[0].sources]
    for layout, tensors in gathered:
        for shard, tensor in zip(layout.shards, tensors, strict=True):
            box = tuple(slice(lo, lo + n) for lo, n in zip(shard.offset, shard.shape, strict=True))
            whole[names[shard.source]][box] = tensor
    return [layout for layout, _ in gathered], whole
