"""How long a version takes to reach 2 to 1,024 servers, by each way there is: the planner's plans on a model
of a cluster.

What travels is what ``bridge.protocol.plan`` makes of the shapes of an 8B, a 70B and a 1T model; links are
shared max-min fairly (``fluid.py``), the ways are in ``strategies.py``. The rates within a host are those
measured on H200s, and rounds measured there are predicted too and compared (``gpu_rates.py``). The network
between hosts is assumed: no bridge of ours has run on one.

    python -m benchmarks.simulate --out benchmarks/results/simulation.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import gpu_rates
from benchmarks.machine import machine
from benchmarks.model_shapes import KIMI_1T, LLAMA_70B, QWEN3_8B, Model, Server, Trainer, model_bytes
from benchmarks.strategies import (
    MOST_BUCKETS,
    STRATEGIES,
    Cluster,
    Lanes,
    direct_at_once,
    direct_each,
    direct_in_step,
    plan_lanes,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, who trains it and how a server divides it; ``layers`` as in ``plan_lanes``."""

    name: str
    model: Model
    trainer: Trainer
    server: Server
    layers: int = 0


CASES = (
    Case("8B", QWEN3_8B, Trainer(8), Server(2)),
    Case("8B, four replicas of the trainer", QWEN3_8B, Trainer(8, replicas=4), Server(2)),
    Case("70B", LLAMA_70B, Trainer(64), Server(8)),
    Case("1T", KIMI_1T, Trainer(256, expert_parallel=64), Server(8, engines=8), layers=3),
)
FEW = (1, 2, 4, 8)
DOUBLED = 0.01
SERVERS = tuple(2**n for n in range(1, 11))
ETHERNET = {"nic": 11.5e9, "nics_per_node": 1, "message_s": 60e-6, "hop_s": 30e-6}  # 100 Gbit/s, 92% of it


def clusters(rates: gpu_rates.Rates) -> list[Cluster]:
    """The two networks that are looked at, with the measured rates of an H200."""
    shared = {key: getattr(rates, key) for key in ("nccl", "nccl_bucket_s", "all_gather", "round_s")}
    fast = Cluster("400 Gbit/s for each GPU", **shared)
    return [fast, dataclasses.replace(fast, name="100 Gbit/s for each host", **ETHERNET)]


def predict(lanes: Lanes, cluster: Cluster, servers: Sequence[int]) -> dict[str, list[float]]:
    """Seconds by strategy, for each number of servers.

    Once two doublings of the servers have doubled the time, the trainers' links are all that counts, and
    further ones are not simulated.
    """
    found: dict[str, list[float]] = {}
    for name, way in STRATEGIES.items():
        seconds = found.setdefault(name, [])
        for index, count in enumerate(servers):
            doubled = [b / a for a, b in pairwise(seconds[-3:])]
            if len(doubled) == 2 and all(abs(d - 2) < DOUBLED for d in doubled):
                seconds.append(seconds[-1] * count / servers[index - 1])
            else:
                seconds.append(way(lanes, cluster, count))
    return found


def orders(lanes: Lanes, cluster: Cluster) -> list[dict[str, float]]:
    """What the order of lanes costs: servers in step, drifting, beginning apart, and without an order."""
    return [
        {
            "servers": n,
            "in_step": direct_in_step(lanes, cluster, n),
            "drifting": direct_each(lanes, cluster, n),
            "in_turns": direct_each(lanes, cluster, n, in_turns=True),
            "at_once": direct_at_once(lanes, cluster, n),
        }
        for n in FEW
    ]


def describe(case: Case, lanes: Lanes) -> dict[str, Any]:
    """What a case is, for the document."""
    return {
        "case": case.name,
        "model": dataclasses.asdict(case.model),
        "model_bytes": model_bytes(case.model),
        "trainer": dataclasses.asdict(case.trainer),
        "server": dataclasses.asdict(case.server),
        "planned_layers": lanes.planned_layers,
        "lanes": len(lanes.buckets),
        "buckets": sum(map(len, lanes.buckets.values())),
        "bytes_to_one_server": lanes.nbytes,
        "bytes_to_the_largest_rank": lanes.largest_rank,
    }


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"\n{title}\n", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(seconds: float) -> str:
    """Two figures, or whole seconds."""
    if seconds >= 10:
        return f"{seconds:,.0f}"
    return f"{seconds:.{max(0, 1 - math.floor(math.log10(seconds)))}f}"


def main() -> int:
    """Predict, compare with what was measured, and write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES]
    )
    parser.add_argument("--servers", type=int, nargs="+", default=list(SERVERS), help="each twice the last")
    parser.add_argument("--keep", action="store_true", help="what --out has of the other cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["cases"] if args.keep else []
    rates = gpu_rates.measured()
    document: dict[str, Any] = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": ["python", "-m", "benchmarks.simulate", *sys.argv[1:]],
        "machine": machine(),
        "rates": dataclasses.asdict(rates),
        "measured_on_gpus": gpu_rates.compare(rates),
        "clusters": [dataclasses.asdict(cluster) for cluster in clusters(rates)],
        "strategies": {
            name: " ".join((way.__doc__ or "").split("\n")[0].split()) for name, way in STRATEGIES.items()
        },
        "servers": args.servers,
        "cases": [found for found in kept if found["case"] not in args.cases],
    }
    write = sys.stdout.write
    write(
        table(
            "Predicted beside measured",
            ["round", "measured, ms", "predicted, ms", "ratio"],
            [
                [f"{r['round']} ({r['measured_in']})", f"{1e3 * r['measured_s']:.1f}",
                 f"{1e3 * r['predicted_s']:.1f}", f"{r['ratio']:.2f}"]
                for r in document["measured_on_gpus"]
            ],
        )
    )  # fmt: skip
    for case in (c for c in CASES if c.name in args.cases):
        start = time.monotonic()
        lanes = plan_lanes(case.model, case.trainer, case.server, layers=case.layers)
        found = {"planning_s": time.monotonic() - start, **describe(case, lanes), "seconds": {}}
        for cluster in clusters(rates):
            seconds = predict(lanes, cluster, args.servers)
            found["seconds"][cluster.name] = seconds
            rows = [[str(n), *(shown(seconds[s][i]) for s in seconds)] for i, n in enumerate(args.servers)]
            write(table(f"{case.name}, {cluster.name}: seconds", ["servers", *seconds], rows))
            sys.stdout.flush()
        if found["buckets"] <= MOST_BUCKETS:
            found["orders"] = orders(lanes, clusters(rates)[0])
            columns = ["servers", "in_step", "drifting", "in_turns", "at_once"]
            rows = [
                [shown(row[c]) if c != "servers" else str(row[c]) for c in columns] for row in found["orders"]
            ]
            write(
                table(f"{case.name}, {clusters(rates)[0].name}: direct, by the order of lanes", columns, rows)
            )
        document["cases"].append(found)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
        sys.stderr.write(f"{case.name}: {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
