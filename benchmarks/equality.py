"""Does the live server answer as a fresh vLLM does, version after version?

For each architecture, dtype and tensor-parallel degree: a few sets of random weights; what an unpatched vLLM,
started from each set, answers greedily; then one live server that is given the sets in turn by
``bridge.broadcast_weights``, and must give the very same tokens and logprobs at every version.

    PYTHONPATH=tests python benchmarks/equality.py --out benchmarks/results/equality.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine
from support.models import build_checkpoint
from support.serving import serving, training

KINDS = ("qwen3", "llama_tied", "gemma2", "qwen3_moe", "deepseek_v2")
LOGPROB_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.0}


def compare(live: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> tuple[int, float]:
    """Prompts with identical tokens, and the largest difference of logprobs among those."""
    same = [(a, b) for a, b in zip(live, fresh, strict=True) if a["tokens"] == b["tokens"]]
    worst = max(
        (abs(x - y) for a, b in same for x, y in zip(a["logprobs"], b["logprobs"], strict=True)), default=0.0
    )
    return len(same), worst


def run_case(kind: str, dtype: str, tp: int, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One architecture, dtype and degree."""
    flags = [f"--dtype={dtype}", f"--tensor-parallel-size={tp}"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"} if tp > 1 else {}
    sets = [
        build_checkpoint(kind, root / f"{kind}-{dtype}-{s}", dtype=dtype, seed=s) for s in range(args.sets)
    ]
    fresh = []
    for index, path in enumerate(sets):
        logdir = root / f"fresh-{kind}-{dtype}-{tp}-{index}"
        with serving(path, logdir, bridge=False, flags=flags, env=env) as server:
            fresh.append(server.api.greedy(args.prompts, args.tokens))
    logdir = root / f"live-{kind}-{dtype}-{tp}"
    rows = []
    with (
        serving(sets[0], logdir, flags=flags, env=env) as server,
        training(
            args.trainer, sets[0], logdir=logdir, dtype=args.trainer_dtype or dtype, ranks=args.ranks
        ) as trainers,
    ):
        same, worst = compare(server.api.greedy(args.prompts, args.tokens), fresh[0])
        rows.append({"version": 0, "set": 0, "same": same, "worst": worst})
        for version in range(1, args.versions + 1):
            index = version % len(sets)
            trainers.must("load", path=str(sets[index]))
            receipt = trainers.must("broadcast")[0]
            same, worst = compare(server.api.greedy(args.prompts, args.tokens), fresh[index])
            rows.append({"version": receipt["version"], "set": index, "same": same, "worst": worst})
    between = compare(fresh[0], fresh[1])[0]
    worst = max(row["worst"] for row in rows)
    ok = all(row["same"] == args.prompts for row in rows) and worst <= LOGPROB_TOLERANCE[dtype]
    return {
        "kind": kind, "dtype": dtype, "tp": tp, "ok": ok and between < args.prompts,
        "versions": len(rows) - 1, "prompts": args.prompts, "tokens": args.tokens,
        "versions_identical": sum(row["same"] == args.prompts for row in rows), "worst_logprob_diff": worst,
        "prompts_alike_between_sets": between, "rows": rows,
    }  # fmt: skip


def main() -> int:
    """Run the chosen cases; exit code 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trainer", default="plain")
    parser.add_argument("--trainer-dtype", default="")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for tp in args.tp:
        for dtype in args.dtypes:
            for kind in args.kinds:
                start = time.monotonic()
                with tempfile.TemporaryDirectory(prefix="equality-") as root:
                    case = run_case(kind, dtype, tp, args, Path(root))
                case["seconds"] = round(time.monotonic() - start, 1)
                results.append(case)
                sys.stdout.write(json.dumps({k: v for k, v in case.items() if k != "rows"}) + "\n")
                sys.stdout.flush()
                if args.out:
                    document = {
                        "machine": machine(),
                        "command": sys.argv,
                        "cases": results,
                    }
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(document, indent=1))
    return 0 if all(case["ok"] for case in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
