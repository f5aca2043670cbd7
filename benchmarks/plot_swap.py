"""The picture of a ``swap.py`` result: token gaps over time with both systems' updates, and what they cost.

python benchmarks/plot_swap.py benchmarks/results/swap-1x1.json docs/swap-1x1.png
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")
COLOURS = {"bridge": "#1b7f5c", "native": "#c0392b"}
NAMES = {"bridge": "vllm-weight-bridge", "native": "vLLM's own NCCL transfer"}


def draw_gaps(axis: Any, stretch: dict[str, Any], what: str) -> None:
    """Each token's gap, and the updates as bands; the scale is logarithmic."""
    arrivals = stretch["arrivals"]
    times = [b for _, b in pairwise(arrivals)]
    gaps = [1e3 * max(b - a, 1e-4) for a, b in pairwise(arrivals)]
    for start, end in stretch["events"]:
        axis.axvspan(start, end, color=COLOURS[what], alpha=0.18, linewidth=0)
    axis.plot(times, gaps, color=COLOURS[what], linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(2, 2000)
    axis.set_xlim(0, max(end for _, end in stretch["events"]) + 0.2)
    axis.set_title(f"{NAMES[what]}: {len(stretch['events'])} updates (bands)", fontsize=9, loc="left")
    axis.set_ylabel("token gap, ms")


def draw_bars(axis: Any, summary: dict[str, Any], key: str, title: str, scale: float = 1.0) -> None:
    """One figure of both systems."""
    systems = [what for what in COLOURS if what in summary]
    values = [scale * summary[what][key] for what in systems]
    bars = axis.bar(range(len(systems)), values, color=[COLOURS[what] for what in systems], width=0.6)
    axis.bar_label(bars, fmt="%.3g", fontsize=8)
    axis.set_xticks(range(len(systems)), ["bridge", "native"][: len(systems)], fontsize=8)
    axis.set_ylim(0, 1.2 * max(values))
    axis.set_title(title, fontsize=8)


def main() -> int:
    """Draw one result file."""
    source, target = map(Path, sys.argv[1:3])
    document = json.loads(source.read_text())
    found, summary = document["found"], document["summary"]
    systems = [what for what in COLOURS if f"spaced_{what}" in found]
    figure = plt.figure(figsize=(10, 2.2 * len(systems) + 2.4), layout="constrained")
    grid = figure.add_gridspec(len(systems) + 1, 3)
    for row, what in enumerate(systems):
        axis = figure.add_subplot(grid[row, :])
        draw_gaps(axis, found[f"spaced_{what}"], what)
    axis.set_xlabel("seconds")
    draw_bars(figure.add_subplot(grid[-1, 0]), summary, "stall_ms", "stall at an update, ms")
    draw_bars(figure.add_subplot(grid[-1, 1]), summary, "idle_gb_per_s", "transfer, idle server, GB/s")
    kept = "throughput kept, update every 200 ms, %"
    draw_bars(figure.add_subplot(grid[-1, 2]), summary, "throughput_kept", kept, scale=100)
    size = f"{summary['model_bytes'] / 1e9:.1f} GB"
    # In two lines: the command alone is as wide as the picture.
    figure.suptitle(f"{document['machine']}, {size}\n{' '.join(document['command'])}", fontsize=9)
    figure.savefig(target, dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
