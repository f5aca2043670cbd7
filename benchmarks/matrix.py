"""Every way to shard the trainer times every layout of the server: are the bytes right, what do they cost?

In each cell a trainer broadcasts five sets of weights to a live server. After each, SHA-256 of every
parameter of every inference rank must be that of a fresh load of the same weights: by vLLM's own loader in
processes of its own, unpatched (``tests/support/fresh_load.py``), once for each set and layout. No trainer
rank's memory may rise above what it held before the first broadcast by more than two buckets and
``SLACK_BYTES``, libraries' code apart; the largest parameters are larger than that, so no rank can have put
one together.

vLLM by itself cannot serve a pipeline, or a mixture of experts data parallel, on a CPU; what it lacks there
is added by ``tests/support/layouts_on_cpu``.

    PYTHONPATH=tests python benchmarks/matrix.py --out benchmarks/results/matrix.json

``--models``, ``--servers``, ``--transports`` and ``--trainers`` run a part, which is merged into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine
from support.fresh_load import (
    Digests,
    arena_bytes,
    broadcast_each,
    differing,
    fresh_loads,
    live_digests,
    of_engines,
)
from support.models import build_checkpoint
from support.serving import COMPLETED, RETURN_MEMORY, UNBOUND, Server, Trainers, serving_together, training

VERSIONS = 5
BUCKET_BYTES = 4 << 20
SLACK_BYTES = 1 << 20  # the plan and the interpreter, whatever the size of model and buckets
COMMON = ("--dtype=bfloat16",)
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}  # opens vLLM's weight checker

# Vocabulary and down projections (or experts) are of more than two buckets each. The dense model has one head
# of keys and values, which tensor parallel ranks replicate; of the other's two each has one.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "qwen3",
        {"vocab_size": 20480, "hidden_size": 256, "intermediate_size": 20480, "num_key_value_heads": 1},
    ),
    "moe": ("qwen3_moe", {"vocab_size": 20480, "hidden_size": 256, "moe_intermediate_size": 5120}),
}
TRAINERS = {
    "plain": ("plain", 1),
    "DDP 2": ("ddp", 2),
    "FSDP2 x2": ("fsdp2", 2),
    "FSDP2 x3": ("fsdp2", 3),
    "HSDP 2x2": ("hsdp", 4),
    "TP 2": ("tp", 2),
    "TP 2 x FSDP2 2": ("tp_fsdp2", 4),
    "ZeRO-3 x2": ("zero3", 2),
}


@dataclass(frozen=True)
class Layout:
    """A server's: ``engines`` are copies of one another, ``lockstep`` ones share experts; which ``models``.

    ``env`` is the server's.
    """

    flags: tuple[str, ...]
    tp: int = 1
    pp: int = 1
    engines: int = 1
    lockstep: int = 1
    models: tuple[str, ...] = ("dense", "moe")
    env: Mapping[str, str] = field(default_factory=lambda: UNBOUND)


SERVERS = {
    "TP 1": Layout(()),
    "TP 2": Layout(("--tensor-parallel-size=2",), tp=2),
    "TP 2 EP": Layout(("--tensor-parallel-size=2", "--enable-expert-parallel"), tp=2, models=("moe",)),
    "DP 2": Layout(("--data-parallel-size=2",), engines=2, models=("dense",)),
    "DP 2 EP": Layout(
        ("--data-parallel-size=2", "--enable-expert-parallel"), lockstep=2, models=("moe",), env=COMPLETED
    ),
    "PP 2": Layout(("--pipeline-parallel-size=2",), pp=2, env=COMPLETED),
}


def build_sets(model: str, root: Path) -> list[Path]:
    """What the server starts with, and one set for each version."""
    kind, sizes = MODELS[model]
    return [
        build_checkpoint(kind, root / f"{model}-{seed}", seed=seed, **sizes) for seed in range(VERSIONS + 1)
    ]


def truth_of(
    layout: Layout, sets: Sequence[Path], known: dict[tuple[str, ...], list[Digests]]
) -> list[Digests]:
    """Fresh loads of all sets; an engine of several loads what one alone does."""
    flags = layout.flags if layout.engines == 1 else ()
    if flags not in known:
        ranks = {"tp": layout.tp, "pp": layout.pp, "dp": layout.lockstep}
        known[flags] = fresh_loads(sets, flags=[*COMMON, *flags], **ranks)
    if layout.engines == 1:
        return known[flags]
    return [of_engines(fresh, layout.engines) for fresh in known[flags]]


def run_cell(
    server: Server, trainers: Trainers, sets: Sequence[Path], truth: Sequence[Digests]
) -> dict[str, Any]:
    """Five versions by one trainer to one server."""
    held = trainers.must("held")
    rounds = list(broadcast_each(server, trainers, sets[1:], truth[1:]))
    peaks = [max(r["peak_above_bytes"][rank] for r in rounds) for rank in range(len(held))]
    wrong = {str(r["version"]): r["differing"] for r in rounds if r["differing"]}
    return {
        "ok": not wrong and max(peaks) <= 2 * BUCKET_BYTES + SLACK_BYTES,
        "versions_equal": sum(not r["differing"] for r in rounds),
        "versions": len(rounds),
        "tensors_compared": len(truth[0]),
        "bytes_compared": arena_bytes(server, truth[0]),
        "travelled_by": rounds[0]["transport"],
        "differing": wrong,
        "peak_above_bytes_by_rank": peaks,
        "held_bytes_by_rank": [h["bytes"] for h in held],
        "largest_held_in_part_bytes": max(h["largest_in_part_bytes"] for h in held),
    }


def run_columns(
    model: str, names: Sequence[str], args: argparse.Namespace, root: Path
) -> Iterator[dict[str, Any]]:
    """Servers side by side, and one trainer after the other that turns from server to server."""
    sets = build_sets(model, root)
    known: dict[tuple[str, ...], list[Digests]] = {}
    truths = [truth_of(SERVERS[name], sets, known) for name in names]
    for transport in args.transports:
        yield from run_transport(model, transport, names, args.trainers, root, sets, truths)


def run_transport(
    model: str,
    transport: str,
    names: Sequence[str],
    kinds: Sequence[str],
    root: Path,
    sets: Sequence[Path],
    truths: Sequence[Sequence[Digests]],
) -> Iterator[dict[str, Any]]:
    """The cells of one model and transport."""
    options = {"bridge_flags": [f"--transport={transport}", f"--bucket-bytes={BUCKET_BYTES}"]}

    def of(layout: Layout) -> dict[str, Any]:
        return {**options, "flags": [*COMMON, *layout.flags], "env": {**layout.env, **DEVELOPER}}

    with serving_together(
        *((sets[0], root / f"{transport}-{index}", of(SERVERS[name])) for index, name in enumerate(names))
    ) as servers:
        for server, truth in zip(servers, truths, strict=True):
            assert differing(live_digests(server), truth[0]) == [], f"{server.model} before any broadcast"
        for trainer in kinds:
            kind, ranks = TRAINERS[trainer]
            with training(kind, sets[0], logdir=root, ranks=ranks, env=RETURN_MEMORY) as trainers:
                for name, server, truth in zip(names, servers, truths, strict=True):
                    cell = {"model": model, "server": name, "transport": transport, "trainer": trainer}
                    start = time.monotonic()
                    try:
                        cell |= run_cell(server, trainers, sets, truth)
                    except (AssertionError, TimeoutError) as err:
                        yield {**cell, "ok": False, "error": str(err)}
                        break  # these ranks may be out of step; the next trainer's are new
                    yield {**cell, "seconds": round(time.monotonic() - start, 1)}


def say(cell: dict[str, Any]) -> None:
    """One line."""
    if "error" in cell:
        sys.stdout.write(json.dumps(cell) + "\n")
        return
    peak = max(cell["peak_above_bytes_by_rank"]) / 2**20
    sys.stdout.write(
        f"{cell['model']:6}{cell['transport']:6}{cell['server']:9}{cell['trainer']:16}"
        f"{cell['versions_equal']}/{cell['versions']} equal, peak {peak:.1f} MiB, {cell['seconds']} s\n"
    )
    sys.stdout.flush()


# --- all of it ---------------------------------------------------------------------------------------------


def key(cell: dict[str, Any]) -> tuple[str, ...]:
    """What a later run of the same cell replaces."""
    return tuple(cell.get(part, "") for part in ("model", "server", "transport", "trainer"))


def merge(out: Path | None, cell: dict[str, Any]) -> None:
    """Put a cell into the document at ``out`` at once: a run that is cut off keeps what it has measured."""
    if out is None:
        return
    known = json.loads(out.read_text()) if out.exists() else {"commands": [], "cells": []}
    command = " ".join(map(shlex.quote, sys.argv))
    cells = {key(c): c for c in [*known["cells"], cell]}
    document = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "machine": machine(),
        "commands": [*(c for c in known["commands"] if c != command), command],
        "bucket_bytes": BUCKET_BYTES,
        "cells": [cells[k] for k in sorted(cells)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1))


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All chosen cells, as they are measured."""
    for model in args.models:
        if names := [name for name in args.servers if model in SERVERS[name].models]:
            with tempfile.TemporaryDirectory(prefix="matrix-") as root:
                yield from run_columns(model, names, args, Path(root))


def main() -> int:
    """Run the chosen part; exit code 1 if a cell that ran differs, or takes more memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--transports", nargs="+", choices=("pull", "gloo"), default=["pull", "gloo"])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    failed = 0
    for cell in run(args):
        merge(args.out, cell)
        say(cell)
        failed += not cell["ok"]
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
