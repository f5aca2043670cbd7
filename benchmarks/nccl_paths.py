"""By which NCCL call a bucket gets from a trainer's GPU into a server's, and what each costs a decode.

Two processes, one for each GPU, form one communicator for each limit on its CTAs. Every call moves the
same useful bytes, bucket by bucket, alone and beside a process that replays decode-sized products on the
receiving GPU (``copy_paths.decode``):

    python benchmarks/nccl_paths.py --out benchmarks/results/nccl-paths.json                   (two GPUs)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from copy_paths import decode

TOTAL = 8 << 30
REPEATS = 5
BUCKETS = (16 << 20, 64 << 20, 256 << 20)
CTAS = (0, 1, 2, 4, 8, 16)  # 0: as NCCL likes
TIMEOUT_S = 60.0


def _group(rank: int, store: dist.Store, ctas: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    if ctas:
        options.config.min_ctas = options.config.max_ctas = ctas
    options._timeout = timedelta(seconds=TIMEOUT_S)
    group = dist.ProcessGroupNCCL(dist.PrefixStore(f"ctas{ctas}", store), rank, 2, options)
    group.eager_connect_single_device(torch.device("cuda", rank))
    return group


def calls(
    rank: int, group: Any, bucket: int, data: torch.Tensor, room: torch.Tensor
) -> dict[str, Callable[[int], Any]]:
    """Enqueue bucket ``i``, by each call; rank 1 is the trainer."""

    def piece(i: int) -> torch.Tensor:
        return data[i * bucket : (i + 1) * bucket]

    def point_to_point(i: int) -> Any:
        return group.send([piece(i)], 0, 0) if rank else group.recv([piece(i)], 1, 0)

    def broadcast(i: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 1
        return group.broadcast([piece(i)], options)

    def gather(i: int) -> Any:
        # The receiver's own part is padding, as every rank's is that has nothing to say.
        return group._allgather_base(room[: 2 * bucket], piece(i))

    return {"send and recv": point_to_point, "broadcast": broadcast, "padded all-gather": gather}


def run(rank: int, pipe: Any, port: int) -> None:
    """One rank: does what the parent says, in step with the other."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=TIMEOUT_S))
    data = torch.randint(0, 255, (TOTAL,), dtype=torch.uint8, device=device)
    room = torch.empty(2 * max(BUCKETS), dtype=torch.uint8, device=device)
    groups: dict[int, Any] = {}
    while (order := pipe.recv()) is not None:
        name, bucket, ctas = order
        if ctas not in groups:
            groups[ctas] = _group(rank, store, ctas)
        call = calls(rank, groups[ctas], bucket, data, room)[name]
        call(0).wait()
        torch.cuda.synchronize()
        pipe.send("ready")
        pipe.recv()  # both are
        start = time.monotonic()
        for i in range(TOTAL // bucket):
            work = call(i)
        work.wait()
        torch.cuda.synchronize()
        pipe.send((start, time.monotonic()))
    for group in groups.values():
        group.abort()
    pipe.send("ended")
    os._exit(0)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    context = mp.get_context("spawn")
    port = 29611
    pipes, children = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        children.append(context.Process(target=run, args=(rank, theirs, port)))
        children[-1].start()
        pipes.append(ours)

    def measure(order: tuple[str, int, int]) -> tuple[float, float]:
        for pipe in pipes:
            pipe.send(order)
        for pipe in pipes:
            assert pipe.poll(TIMEOUT_S), order
            assert pipe.recv() == "ready"
        for pipe in pipes:
            pipe.send("go")
        for pipe in pipes:
            assert pipe.poll(TIMEOUT_S), order
        spans = [pipe.recv() for pipe in pipes]
        return min(a for a, _ in spans), max(b for _, b in spans)

    names = ("send and recv", "broadcast", "padded all-gather")
    orders = [(name, bucket, 0) for name in names for bucket in BUCKETS]
    orders += [("send and recv", 64 << 20, ctas) for ctas in CTAS if ctas]
    alone = {order: [measure(order) for _ in range(REPEATS)] for order in orders}
    stop, out = context.Event(), context.Queue()
    load = context.Process(target=decode, args=(stop, out))
    load.start()
    assert out.get(timeout=60) == "ready"
    marks = {}
    for order in orders:
        time.sleep(0.05)  # an undisturbed stretch between two
        marks[order] = [measure(order) for _ in range(REPEATS)]
    stop.set()
    steps = out.get(timeout=60)
    load.join(60)
    for pipe in pipes:
        pipe.send(None)
        pipe.recv()
    inside = [span for spans in marks.values() for span in spans]
    quiet = [s for end, s in steps if not any(a <= end and end - s <= b for a, b in inside)]
    result: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "hardware": f"2 x {torch.cuda.get_device_name(0)}, NCCL {torch.cuda.nccl.version()}",
        "bytes": TOTAL,
        "decode_step_ms": {"median": 1e3 * statistics.median(quiet), "max": 1e3 * max(quiet)},
        "runs": [],
    }
    for order in orders:
        hit = [s for end, s in steps if any(a <= end and end - s <= b for a, b in marks[order])]
        speeds = [
            TOTAL / statistics.median(b - a for a, b in spans) / 1e9 for spans in (alone[order], marks[order])
        ]
        result["runs"].append({
            "call": order[0], "bucket_bytes": order[1], "ctas": order[2] or "NCCL's own choice",
            "alone_gb_per_s": speeds[0], "loaded_gb_per_s": speeds[1],
            "decode_step_ms": {"median": 1e3 * statistics.median(hit), "max": 1e3 * max(hit)},
        })  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
