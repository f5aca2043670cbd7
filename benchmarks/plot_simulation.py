"""The picture of ``simulate.py``'s result: seconds until all servers have a version, by number of servers.

python -m benchmarks.plot_simulation benchmarks/results/simulation.json docs/simulation.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")
# The bridge's own in one colour, relays in another, what others do in greys.
STYLES = {
    "direct": ("#1b7f5c", "-"),
    "direct, all lanes at once": ("#1b7f5c", "--"),
    "relay, a chain": ("#2f6db5", ":"),
    "relay, a tree": ("#2f6db5", "-"),
    "relay, doubling": ("#2f6db5", "--"),
    "gather on rank 0, broadcast": ("#c0392b", "-"),
    "ring of hosts": ("#888888", "--"),
    "tree of hosts": ("#888888", "-"),
    "shared disk": ("#b8860b", "-"),
}


def main() -> int:
    """Draw one result file."""
    source, target = map(Path, sys.argv[1:3])
    document = json.loads(source.read_text())
    cases, clusters = document["cases"], [cluster["name"] for cluster in document["clusters"]]
    size = (3.6 * len(cases), 3.4 * len(clusters) + 0.8)
    figure, axes = plt.subplots(
        len(clusters), len(cases), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for row, cluster in zip(axes, clusters, strict=True):
        for axis, case in zip(row, cases, strict=True):
            for name, seconds in case["seconds"][cluster].items():
                colour, line = STYLES[name]
                axis.plot(document["servers"], seconds, line, color=colour, label=name, linewidth=1.4)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            axis.set_title(f"{case['case']}\n{cluster}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("servers", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(target, dpi=100)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
