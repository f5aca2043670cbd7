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
from bridge.protocol.plan import Plan, build_plan
from bridge.sharding import LocalShards
from tests.support.mappings import run_copies
from tests.support.serving import wait_until

JOIN_TIMEOUT_S = 120  # ranks import torch, and some DeepSpeed, on a busy machine

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
        # Another rank may still be in the barrier, and what this one has sent be lost with its connection.
        (path / f"done{rank}").touch()
        done = [path / f"done{other}" for other in range(world_size)]
        wait_until("every rank to be done", lambda: all(map(Path.exists, done)), timeout_s=JOIN_TIMEOUT_S)
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


def put_together(shards: LocalShards, mapping: Mapping) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan of all ranks' layouts, and what its copies make of their tensors, by source.

    Args:
        shards: this rank's.
        mapping: an ``identity_mapping``.
    """
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (shards.layout, shards.tensors))
    plan = build_plan(mapping, [layout for layout, _ in gathered], bucket_bytes=64)
    (brought,) = run_copies(plan, mapping, {layout.rank: tensors for layout, tensors in gathered})
    sources = mapping.vocabularies[0].sources
    return plan, {s.name: flat.view(s.shape) for s, flat in zip(sources, brought, strict=True)}
