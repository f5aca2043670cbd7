"""How fast bytes get from a trainer's GPU into a server's, by each way there is, and what it costs a decode.

One process owns both GPUs and copies; another replays a CUDA graph of decode-sized matrix products on the
first GPU and times each replay. Every way is run alone and beside that load:

    python benchmarks/copy_paths.py --out benchmarks/results/copy-paths.json                   (two GPUs)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bridge.wire import cuda

TOTAL = 3 << 30  # bytes moved by one run; whole rows of either width
REPEATS = 5
LOCAL_MIB = (4, 16, 64)
ENQUEUED, ENQUEUED_BYTES = 400, 64 << 10  # fewer than a stream holds, or enqueuing would wait for the copies
# Rows of row-parallel weights of Qwen3-8B at TP 2: o_proj and down_proj; half of a row each.
WIDTHS = (4 << 10, 12 << 10)
LAYERS, ROWS, COLUMNS = 36, 4096, 12288


def decode(stop: Any, out: Any) -> None:
    """Replay a memory-bound graph until told to stop; report (end, seconds) of each replay."""
    device = torch.device("cuda", 0)
    weights = [torch.randn(ROWS, COLUMNS, device=device, dtype=torch.bfloat16) for _ in range(LAYERS)]
    x = torch.randn(64, COLUMNS, device=device, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    for _ in range(2):
        _ = [x @ w.T for w in weights]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _ = [x @ w.T for w in weights]
    steps: list[tuple[float, float]] = []
    out.put("ready")
    while not stop.is_set():
        start = time.monotonic()
        graph.replay()
        torch.cuda.synchronize()
        end = time.monotonic()
        steps.append((end, end - start))
    out.put(steps)


class Ways:
    """The ways, by name; each moves TOTAL bytes that count into ``dst`` and returns after enqueuing."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, scratch: torch.Tensor) -> None:
        """``src`` is uint8 [3 * TOTAL] there; ``dst`` [TOTAL] and ``scratch`` [2 * TOTAL] are here."""
        self.src, self.dst, self.scratch = src, dst, scratch
        self.here = [torch.cuda.Stream(dst.device) for _ in range(8)]
        self.there = [torch.cuda.Stream(src.device) for _ in range(8)]

    def named(self) -> dict[str, Callable[[], None]]:
        """Every way."""
        found: dict[str, Callable[[], None]] = {
            f"pull contiguous, {n} stream(s)": partial(self.contiguous, n) for n in (1, 2, 4)
        }
        for mib in LOCAL_MIB:
            for n in (1, 2):
                name = f"local in copies of {mib} MiB, {n} stream(s)"
                found[name] = partial(self.local_copies, mib << 20, n)
        for w in WIDTHS:
            kib = f"{w >> 10} KiB"
            for n in (1, 2, 4, 8):
                found[f"pull rows of {kib}, {n} stream(s)"] = partial(self.strided, w, self.here[:n])
            found[f"push rows of {kib}, 1 stream"] = partial(self.strided, w, self.there[:1])
            found[f"push rows of {kib}, 4 streams"] = partial(self.strided, w, self.there[:4])
            found[f"local rows of {kib} by copy engine"] = partial(self.local, w)
            found[f"local rows of {kib} by torch's kernel"] = partial(self.kernel, w)
            found[f"pull whole rows, then local rows of {kib}"] = partial(self.two_steps, w)
            found[f"rows of {kib} packed by the trainer's engines, then pulled"] = partial(self.packed, w)
        return found

    def contiguous(self, n: int) -> None:
        part = TOTAL // n
        for i in range(n):
            cuda.copy_rows(self.dst.data_ptr() + i * part, 0, self.src.data_ptr() + i * part, 0,
                           width=part, rows=1, stream=self.here[i])  # fmt: skip

    def local_copies(self, nbytes: int, n: int) -> None:
        for i in range(TOTAL // nbytes):
            cuda.copy_rows(self.dst.data_ptr() + i * nbytes, 0, self.scratch.data_ptr() + i * nbytes, 0,
                           width=nbytes, rows=1, stream=self.here[i % n])  # fmt: skip

    def strided(self, width: int, streams: list[torch.cuda.Stream]) -> None:
        """Half of each row of twice the width, in 16 jobs."""
        rows = TOTAL // width // 16
        for i in range(16):
            cuda.copy_rows(self.dst.data_ptr() + i * rows * width, width,
                           self.src.data_ptr() + i * rows * width * 2, width * 2,
                           width=width, rows=rows, stream=streams[i % len(streams)])  # fmt: skip

    def local(self, width: int) -> None:
        cuda.copy_rows(self.dst.data_ptr(), width, self.scratch.data_ptr(), width * 2,
                       width=width, rows=TOTAL // width, stream=self.here[0])  # fmt: skip

    def kernel(self, width: int) -> None:
        with torch.cuda.stream(self.here[0]):
            self.dst.view(-1, width).copy_(self.scratch.view(-1, 2 * width)[:, :width])

    def two_steps(self, width: int) -> None:
        part = 2 * TOTAL // 32
        for i in range(32):
            cuda.copy_rows(self.scratch.data_ptr() + i * part, 0, self.src.data_ptr() + i * part, 0,
                           width=part, rows=1, stream=self.here[0])  # fmt: skip
            self.here[1].wait_stream(self.here[0])
            cuda.copy_rows(self.dst.data_ptr() + i * part // 2, width,
                           self.scratch.data_ptr() + i * part, width * 2,
                           width=width, rows=part // 2 // width, stream=self.here[1])  # fmt: skip

    def packed(self, width: int) -> None:
        part = TOTAL // 32
        spare = self.src.data_ptr() + 2 * TOTAL
        for i in range(32):
            with torch.cuda.device(self.src.device):
                cuda.copy_rows(spare + i * part, width, self.src.data_ptr() + 2 * i * part, width * 2,
                               width=width, rows=part // width, stream=self.there[0])  # fmt: skip
            self.here[0].wait_stream(self.there[0])
            cuda.copy_rows(self.dst.data_ptr() + i * part, 0, spare + i * part, 0,
                           width=part, rows=1, stream=self.here[0])  # fmt: skip


def enqueuing(src: torch.Tensor, dst: torch.Tensor, streams: list[torch.cuda.Stream]) -> float:
    """Seconds that the host needs to enqueue one copy, the streams by turns."""
    found = []
    for _ in range(REPEATS):
        for index in (0, 1):
            torch.cuda.synchronize(index)
        start = time.perf_counter()
        for i in range(ENQUEUED):
            cuda.copy_rows(dst.data_ptr() + i * ENQUEUED_BYTES, 0, src.data_ptr() + i * ENQUEUED_BYTES, 0,
                           width=ENQUEUED_BYTES, rows=1, stream=streams[i % len(streams)])  # fmt: skip
        found.append((time.perf_counter() - start) / ENQUEUED)
    return statistics.median(found[1:])


def timed(way: Callable[[], None]) -> tuple[float, float, float]:
    """(start, end, seconds) of one run, by the wall clock, everything done."""
    for index in (0, 1):
        torch.cuda.synchronize(index)
    start = time.monotonic()
    way()
    for index in (0, 1):
        torch.cuda.synchronize(index)
    end = time.monotonic()
    return start, end, end - start


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    cuda.use(there)
    src = torch.randint(0, 255, (3 * TOTAL,), dtype=torch.uint8, device=there)
    cuda.use(here)
    dst = torch.empty(TOTAL, dtype=torch.uint8, device=here)
    scratch = torch.empty(2 * TOTAL, dtype=torch.uint8, device=here)
    scratch[:1024].copy_(src[:1024])  # torch opens the way between the two
    made = Ways(src, dst, scratch)
    ways = made.named()
    enqueue_s = {
        "pull": enqueuing(src, dst, made.here[:1]),
        "local": enqueuing(scratch, dst, made.here[:1]),
    }
    runs = {name: {"alone_s": [timed(way)[2] for _ in range(REPEATS)][1:]}
            for name, way in ways.items()}  # fmt: skip
    context = mp.get_context("spawn")
    stop, out = context.Event(), context.Queue()
    child = context.Process(target=decode, args=(stop, out))
    child.start()
    assert out.get(timeout=60) == "ready"
    marks: dict[str, list[tuple[float, float, float]]] = {}
    for name, way in ways.items():
        time.sleep(0.05)  # an undisturbed stretch between two ways
        marks[name] = [timed(way) for _ in range(REPEATS)]
    stop.set()
    steps = out.get(timeout=60)
    child.join(60)
    inside = [(a, b) for spans in marks.values() for a, b, _ in spans]
    quiet = [s for end, s in steps if not any(a <= end and end - s <= b for a, b in inside)]
    result: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "hardware": torch.cuda.get_device_name(here),
        "bytes": TOTAL,
        "enqueue_s": enqueue_s,
        "decode_step_ms": {"median": 1e3 * statistics.median(quiet), "max": 1e3 * max(quiet)},
        "ways": {},
    }
    for name, run in runs.items():
        spans = marks[name]
        hit = [s for end, s in steps if any(a <= end and end - s <= b for a, b, _ in spans)]
        result["ways"][name] = {
            "alone_gb_per_s": TOTAL / statistics.median(run["alone_s"]) / 1e9,
            "loaded_gb_per_s": TOTAL / statistics.median(s for *_, s in spans) / 1e9,
            "decode_step_ms": {"median": 1e3 * statistics.median(hit), "max": 1e3 * max(hit)},
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
