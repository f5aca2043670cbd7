"""Rates of one H200 and its links, taken from some committed results, and what they predict of the others.

Nothing here is fitted to what it is compared with: bare mechanisms come from ``copy-paths.json``,
``nccl-paths.json`` and the floors of ``swap-1x1-asked.json``; the time of a round without bytes, and of
beginning a copy on a link, from ``swap-1x1-32b.json``. The other rounds are predicted with these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fluid import Link, Transfer, simulate
from benchmarks.model_shapes import QWEN3_8B, QWEN3_32B, Model, Server, Trainer
from benchmarks.strategies import plan_of
from bridge.protocol.plan import Bucket, Copy, Lane, Plan
from bridge.wire import turns

RESULTS = Path(__file__).parent / "results"
ITEMSIZE = 2
MIB = 1 << 20
KERNEL_MIB = 64  # long enough that enqueuing is none of the time


@dataclass(frozen=True)
class Rates:
    """Bytes per second and seconds, on an H200."""

    copy_engine: float
    local_copy: float
    local_rows: float
    nccl: float
    nccl_bucket_s: float
    all_gather: float
    enqueue_s: float
    kernel_s: float
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
    paths = read("copy-paths.json")
    ways = paths["ways"]
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
        enqueue_s=statistics.mean(paths["enqueue_s"].values()),
        # Between two copies of one stream; the other of two fills it.
        kernel_s=KERNEL_MIB * MIB * (1 / alone(ways, 1) - 1 / alone(ways, 2)),
    )
    document = read(FITTED.file)["found"]
    transfer = statistics.median(r["transfer_s"] for r in document["not_blocking"])
    stage = statistics.median(r["stage_s"] for r in document["not_blocking"])
    (lane,) = _plan(FITTED).lanes
    copies = sum(len(bucket.copies) for bucket in lane.buckets)
    bare = predict(FITTED, rates)
    return dataclasses.replace(rates, copy_s=(transfer - bare) / copies, round_s=stage - transfer)


def alone(ways: dict[str, Any], streams: int) -> float:
    """Bytes per second of copies within a GPU, one behind the other on so many streams."""
    name = f"local in copies of {KERNEL_MIB} MiB, {streams} stream(s)"
    return 1e9 * float(ways[name]["alone_gb_per_s"])


def _plan(kind: Round) -> Plan:
    return plan_of(kind.model, Trainer(kind.trainers), Server(kind.tp))


def predict(kind: Round, rates: Rates) -> float:
    """Seconds from BEGIN until all ranks have staged, on an idle server."""
    plan = _plan(kind)
    if kind.transport == "nccl":
        return rates.round_s + _by_nccl([b for lane in plan.lanes for b in lane.buckets], rates)
    made = _Round(kind, rates)
    for inference in range(kind.tp):
        made.receive([lane for lane in plan.lanes if lane.inference == inference])
    return rates.round_s + simulate(made.links, made.transfers).seconds


class _Round:
    """The copies of one round as ``bridge/wire/device_transport.py`` makes them.

    An updater's thread enqueues them one by one, bucket by bucket and lane by lane. Over a link a lane's
    copies follow one another, each begun by the copy engine in ``copy_s``. Within a GPU they are kernels on
    one stream, or two if there is no other lane, and made in parts (``bridge/wire/turns.py``).
    """

    def __init__(self, kind: Round, rates: Rates) -> None:
        self.links: dict[Link, float] = {}
        self.transfers: list[Transfer] = []
        self._kind, self._rates = kind, rates

    def receive(self, lanes: Sequence[Lane]) -> None:
        """All lanes of one updater, which begins with another trainer than the updater before it."""
        start = lanes[0].inference % len(lanes)
        lanes = [*lanes[start:], *lanes[:start]]
        streams = 2 if len(lanes) == 1 else 1
        before: dict[int, list[int]] = {lane.trainer: [] for lane in lanes}  # copies, by lane
        thread: list[int] = []  # what it has to wait for
        part_s = 0.0
        for lane, copy in _in_order(lanes):
            local = self._kind.shared and lane.trainer == lane.inference
            earlier = before[lane.trainer]
            nbytes = ITEMSIZE * math.prod(copy.size)
            alone_s = max(nbytes / self._rates.local_copy, turns.COPY_S)
            if local and part_s and part_s + alone_s > turns.PART_S:
                thread, part_s = [*thread, *earlier[-streams:]], 0.0
            part_s += alone_s if local else 0.0
            enqueued = self._add(Transfer(self._rates.enqueue_s, (), tuple(thread), limit=1.0))
            thread = [enqueued]
            last = len(earlier) - (streams if local else 1)  # the one before on this copy's stream
            after = (enqueued, *([earlier[last]] if last >= 0 else []))
            made = self._within(lane, copy, nbytes, after) if local else self._across(lane, nbytes, after)
            earlier.append(self._add(made))

    def _add(self, transfer: Transfer) -> int:
        self.transfers.append(transfer)
        return len(self.transfers) - 1

    def _memory(self, gpu: int) -> Link:
        """Counted in bytes read or written: a copy does both, so a GPU's memory is twice as fast as it."""
        self.links["memory", gpu] = 2 * self._rates.local_copy
        return "memory", gpu

    def _within(self, lane: Lane, copy: Copy, nbytes: int, after: tuple[int, ...]) -> Transfer:
        limit = self._rates.local_rows if len(copy.size) > 1 else self._rates.local_copy
        uses = ((self._memory(lane.inference), 2),)
        return Transfer(nbytes, uses, after, latency_s=self._rates.kernel_s, limit=limit)

    def _across(self, lane: Lane, nbytes: int, after: tuple[int, ...]) -> Transfer:
        target = lane.inference
        source = lane.trainer if self._kind.shared else self._kind.tp + lane.trainer
        out, into = ("out", source), ("in", target)
        self.links[out] = self.links[into] = self._rates.copy_engine
        uses = ((self._memory(source), 1), (self._memory(target), 1), (out, 1), (into, 1))
        return Transfer(nbytes, uses, after, latency_s=self._rates.copy_s)


def _in_order(lanes: Sequence[Lane]) -> Iterator[tuple[Lane, Copy]]:
    """All copies, bucket by bucket through all lanes."""
    for index in range(max(len(lane.buckets) for lane in lanes)):
        for lane in lanes:
            if index < len(lane.buckets):
                yield from ((lane, copy) for copy in lane.buckets[index].copies)


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
