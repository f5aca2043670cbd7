"""Rates of one H200 and its links, taken from some committed results, and what they predict of the others.

Nothing here is fitted to what it is compared with: bare mechanisms come from ``copy-paths.json``,
``nccl-paths.json`` and the floors of ``swap-1x1-asked.json``; the time of a round without bytes, and of
beginning a copy, from ``swap-1x1-32b.json``. The other rounds are predicted with these.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fluid import Link, Transfer, simulate
from benchmarks.model_shapes import QWEN3_8B, QWEN3_32B, Model, Server, Trainer
from benchmarks.strategies import plan_of
from bridge.protocol.plan import Bucket, Copy, Plan

RESULTS = Path(__file__).parent / "results"
ITEMSIZE = 2
MIB = 1 << 20


@dataclass(frozen=True)
class Rates:
    """Bytes per second and seconds, on an H200."""

    copy_engine: float
    local_copy: float
    local_rows: float
    nccl: float
    nccl_bucket_s: float
    all_gather: float
    copy_s: float = 0.0
    round_s: float = 0.0


@dataclass(frozen=True)
class Round:
    """A measured kind of round: who sends to whom, and the file with its figures."""

    file: str
    model: Model
    trainers: int
    tp: int
    transport: str = "pull-gpu"
    shared: bool = False  # trainer rank i and inference rank i on one GPU


FITTED = Round("swap-1x1-32b.json", QWEN3_32B, 1, 1)
ROUNDS = (
    Round("swap-1x1.json", QWEN3_8B, 1, 1),
    Round("swap-1x1-uniproc.json", QWEN3_8B, 1, 1),
    FITTED,
    Round("swap-1x1-nccl.json", QWEN3_8B, 1, 1, transport="nccl"),
    Round("swap-shared.json", QWEN3_8B, 1, 1, shared=True),
    Round("swap-2x2-shared.json", QWEN3_8B, 2, 2, shared=True),
    Round("swap-2x2.json", QWEN3_8B, 2, 2),
)


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def measured() -> Rates:
    """The rates, from the files that the module's first lines name."""
    ways = read("copy-paths.json")["ways"]
    runs = {
        (run["call"], run["bucket_bytes"]): run["alone_gb_per_s"] * 1e9
        for run in read("nccl-paths.json")["runs"]
        if run["ctas"] == "NCCL's own choice"
    }
    # Two bucket sizes give a rate and the time that each bucket takes besides.
    sizes = (64 * MIB, 256 * MIB)
    small, large = (size / runs["send and recv", size] for size in sizes)
    nccl = (sizes[1] - sizes[0]) / (large - small)
    rates = Rates(
        copy_engine=ways["pull contiguous, 1 stream(s)"]["alone_gb_per_s"] * 1e9,
        local_copy=read("swap-1x1-asked.json")["floors_gb_per_s"]["device_copy"] * 1e9,
        local_rows=ways["local rows of 12 KiB by copy engine"]["alone_gb_per_s"] * 1e9,
        nccl=nccl,
        nccl_bucket_s=large - sizes[1] / nccl,
        all_gather=runs["padded all-gather", sizes[1]],
    )
    document = read(FITTED.file)["found"]
    transfer = statistics.median(r["transfer_s"] for r in document["not_blocking"])
    stage = statistics.median(r["stage_s"] for r in document["not_blocking"])
    copies = [len(lane) for lane in _copies(_plan(FITTED)).values()]
    bare = predict(FITTED, rates)
    return Rates(**{**rates.__dict__, "copy_s": (transfer - bare) / copies[0], "round_s": stage - transfer})


def _plan(kind: Round) -> Plan:
    return plan_of(kind.model, Trainer(kind.trainers), Server(kind.tp))


def _copies(plan: Plan) -> dict[tuple[int, int], list[Copy]]:
    return {
        (lane.trainer, lane.inference): [copy for bucket in lane.buckets for copy in bucket.copies]
        for lane in plan.lanes
    }


def predict(kind: Round, rates: Rates) -> float:
    """Seconds from BEGIN until all ranks have staged, on an idle server."""
    plan = _plan(kind)
    if kind.transport == "nccl":
        return rates.round_s + _by_nccl([b for lane in plan.lanes for b in lane.buckets], rates)
    links: dict[Link, float] = {}
    transfers = []
    for (trainer, inference), copies in _copies(plan).items():
        source = inference if kind.shared else kind.tp + trainer
        source = trainer if kind.shared else source
        transfers.append(_lane(links, rates, source, inference, copies))
    return rates.round_s + simulate(links, transfers).seconds


def _lane(
    links: dict[Link, float], rates: Rates, source: int, target: int, copies: Sequence[Copy]
) -> Transfer:
    """All copies of a lane, which has a stream: its reads and writes of memory, and the link if there is one.

    A copy within a GPU reads and writes the same memory, so it is had at half the memory's own rate.
    """
    nbytes = ITEMSIZE * sum(math.prod(copy.size) for copy in copies)
    rows = ITEMSIZE * sum(math.prod(copy.size) for copy in copies if len(copy.size) > 1)
    for gpu in (source, target):
        links["memory", gpu] = 2 * rates.local_copy
    gaps = len(copies) * rates.copy_s
    if source == target:
        limit = nbytes / ((nbytes - rows) / rates.local_copy + rows / rates.local_rows)
        return Transfer(nbytes, ((("memory", source), 2),), latency_s=gaps, limit=limit)
    links["out", source] = links["in", target] = rates.copy_engine
    uses = ((("memory", source), 1), (("memory", target), 1), (("out", source), 1), (("in", target), 1))
    return Transfer(nbytes, uses, latency_s=gaps)


def _by_nccl(buckets: Sequence[Bucket], rates: Rates) -> float:
    """One lane: buckets one behind the other."""
    transfers = [
        Transfer(b.nbytes, (("link", 1),), (i - 1,) if i else (), latency_s=rates.nccl_bucket_s)
        for i, b in enumerate(buckets)
    ]
    return simulate({"link": rates.nccl}, transfers).seconds


def compare(rates: Rates) -> list[dict[str, Any]]:
    """Each measured kind of round beside what the rates predict of it."""
    found = []
    for kind in ROUNDS:
        document = read(kind.file)
        idle = [r["stage_s"] for r in document["found"]["idle"]["bridge"]]
        taken, expected = statistics.median(idle), predict(kind, rates)
        found.append(
            {
                "round": f"{kind.model.name}, {kind.trainers} x {kind.tp}, {kind.transport}"
                + (", one GPU for both" if kind.shared else ""),
                "measured_in": kind.file,
                "fitted": kind is FITTED,
                "measured_s": taken,
                "predicted_s": expected,
                "ratio": expected / taken,
            }
        )
    return found
