"""What a swap costs a server that is generating, beside vLLM's own reload and an unpatched vLLM, in one run.

A Qwen3-0.6B shape (untied, about 1.2 GB in bfloat16, random weights) on the CPU; a few streams decode
all the time.

1. Unpatched vLLM: tokens per second; then ``reload_weights`` from disk, several times.
2. The bridge: tokens per second without updates; then updates at a steady pace.
3. Publish to staged on an idle server by both transports, beside a bare Gloo transfer of the same bytes.

    PYTHONPATH=tests python benchmarks/stall.py --out benchmarks/results/stall.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import machine
from support.models import write_tokenizer
from support.serving import Api, free_port, serving, training

FLAGS = ("--dtype=bfloat16", "--max-model-len=2048")
WARM_TOKENS = 8


def build_model(path: Path, vocab: int) -> int:
    """Random weights in Qwen3-0.6B's shape; returns their bytes."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    write_tokenizer(path)
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Load:
    """Streams that decode without a pause; remembers when each token came."""

    def __init__(self, api: Api, streams: int) -> None:
        self.arrivals: list[list[float]] = [[] for _ in range(streams)]
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(api, i), daemon=True) for i in range(streams)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, api: Api, index: int) -> None:
        while not self._stop.is_set():
            try:
                for at, _ in api.stream([1, 5 + index], max_tokens=1900, temperature=1.0, ignore_eos=True):
                    self.arrivals[index].append(at)
                    if self._stop.is_set():
                        return
            except OSError as err:
                self.failures.append(str(err))
                return

    def wait_warm(self) -> None:
        """Until every stream has decoded a few tokens."""
        deadline = time.monotonic() + 120
        while min(map(len, self.arrivals)) < WARM_TOKENS and time.monotonic() < deadline:
            time.sleep(0.1)

    def gaps(self, since: float, until: float) -> list[tuple[float, float]]:
        """(start, length) of every gap that ends in the window, over all streams."""
        found = []
        for times in self.arrivals:
            found += [(a, b - a) for a, b in pairwise(times) if since <= b <= until]
        return found

    def rate(self, since: float, until: float) -> float:
        """Tokens per second over all streams."""
        return sum(since <= t <= until for times in self.arrivals for t in times) / (until - since)

    def stop(self) -> None:
        """End the streams."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def around(load: Load, events: list[tuple[float, float]], median: float) -> list[float]:
    """Per event (start, end), the longest gap that overlaps it, minus the median gap; seconds."""
    stalls = []
    for start, end in events:
        touching = [
            length for begin, length in load.gaps(start, end + 10) if begin <= end and begin + length >= start
        ]
        stalls.append(max(touching, default=0.0) - median)
    return stalls


def spread(values: list[float]) -> dict[str, float]:
    """Quantiles in milliseconds."""
    ordered = sorted(values)
    pick = lambda q: round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3)  # noqa: E731
    return {
        "n": len(ordered),
        "min": pick(0),
        "p50": pick(0.5),
        "p90": pick(0.9),
        "p99": pick(0.99),
        "max": pick(1),
    }


def unpatched(model: Path, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Phase 1."""
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    with serving(model, root / "plain", bridge=False, flags=FLAGS, env=env) as server:
        load = Load(server.api, args.streams)
        load.wait_warm()
        start = time.monotonic()
        time.sleep(args.seconds)
        end = time.monotonic()
        rate = load.rate(start, end)
        median = statistics.median(length for _, length in load.gaps(start, end))
        events = []
        for _ in range(args.reloads):
            begin = time.monotonic()
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
            server.api.open("/collective_rpc", body, timeout_s=120).close()
            events.append((begin, time.monotonic()))
            time.sleep(2)
        stalls = around(load, events, median)
        load.stop()
        return {
            "tokens_per_s": rate,
            "median_gap_ms": median * 1e3,
            "failures": load.failures,
            "reload_call_ms": [1e3 * (b - a) for a, b in events],
            "reload_stall_ms": [1e3 * s for s in stalls],
        }


def bridged(model: Path, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Phase 2."""
    logdir = root / "bridge"
    with (
        serving(model, logdir, flags=FLAGS) as server,
        training("plain", model, logdir=logdir) as trainers,
    ):
        memory = first_broadcast(trainers)
        load = Load(server.api, args.streams)
        load.wait_warm()
        start = time.monotonic()
        time.sleep(args.seconds)
        quiet_end = time.monotonic()
        quiet = load.rate(start, quiet_end)
        quiet_gaps = [length for _, length in load.gaps(start, quiet_end)]
        median = statistics.median(quiet_gaps)
        receipts, events = [], []
        update_start = time.monotonic()
        for seed in range(args.swaps):
            trainers.must("perturb", seed=seed)
            begin = time.monotonic()
            receipts.append(trainers.must("broadcast")[0])
            end = time.monotonic()
            events.append((max(begin, end - median - receipts[-1]["flip_s"] - 0.05), end))
            time.sleep(args.pace)
        update_end = time.monotonic()
        stalls = around(load, events, median)
        # The same statistic where nothing happened: the longest of several gaps exceeds the median anyway.
        shift = args.pace / 2
        controls = around(load, [(begin + shift, end + shift) for begin, end in events], median)
        inside = [length for begin, length in load.gaps(update_start, update_end)]
        result = {
            "tokens_per_s_between_updates": quiet,
            "tokens_per_s_while_updating": load.rate(update_start, update_end),
            "median_gap_ms": median * 1e3,
            "failures": load.failures,
            "flip_ms": [1e3 * r["flip_s"] for r in receipts],
            "swap_stall_ms": [1e3 * s for s in stalls],
            "control_stall_ms": [1e3 * s for s in controls],
            "gaps_quiet_ms": spread(quiet_gaps),
            "gaps_while_updating_ms": spread(inside),
            "gaps_at_swaps_ms": spread([s + median for s in stalls]),
            "gaps_at_controls_ms": spread([s + median for s in controls]),
            "stage_ms_under_load": [1e3 * r["stage_s"] for r in receipts],
        }
        load.stop()
        result["idle"] = idle_rounds(trainers, args) | memory
        return result


def first_broadcast(trainers: Any) -> dict[str, Any]:
    """Connect, then measure the first broadcast: what it allocates may be kept for the later ones."""
    trainers.must("heartbeat")
    peak = trainers.must("measured_broadcast")[0]["peak_above_bytes"]
    return {"trainer_peak_above_model_bytes": peak}


def idle_rounds(trainers: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds on a server that generates nothing, and what they cost the trainer."""
    receipts = [trainers.must("broadcast")[0] for _ in range(args.idle_rounds)]
    calls = []
    for _ in range(args.idle_rounds):
        calls.append(trainers.must("broadcast", blocking=False)[0]["seconds"])
        trainers.must("wait")
    blocking = statistics.median(r["seconds"] for r in receipts)
    return {
        "transport": receipts[0]["transport"],
        "bytes": receipts[0]["bytes"],
        "stage_ms": [1e3 * r["stage_s"] for r in receipts],
        "broadcast_ms": [1e3 * r["seconds"] for r in receipts],
        "gigabytes_per_s": statistics.median(r["bytes"] / r["stage_s"] / 1e9 for r in receipts),
        "non_blocking_call_ms": [1e3 * c for c in calls],
        "non_blocking_share_of_blocking": statistics.median(calls) / blocking,
    }


def by_gloo(model: Path, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Phase 3: the same server with Gloo forced."""
    logdir = root / "gloo"
    with (
        serving(model, logdir, flags=FLAGS, bridge_flags=("--transport=gloo",)) as server,
        training("plain", model, logdir=logdir) as trainers,
    ):
        assert server.status()["state"] == "ready"
        memory = first_broadcast(trainers)
        return idle_rounds(trainers, args) | memory


def _bare(rank: int, port: int, nbytes: int, chunk: int, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    data = torch.ones(nbytes, dtype=torch.uint8)
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for offset in range(0, nbytes, chunk):
            piece = data[offset : offset + chunk]
            dist.send(piece, 1) if rank == 0 else dist.recv(piece, 0)
        dist.barrier()
        if rank == 1:
            results.put(time.perf_counter() - start)
    dist.destroy_process_group()


def bare_gloo(nbytes: int, rounds: int) -> list[float]:
    """Seconds for a plain send of the same bytes in the same pieces between the same number of ranks."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_bare, args=(r, port, nbytes, 64 << 20, rounds, results)) for r in range(2)
    ]
    for process in ranks:
        process.start()
    times = [results.get(timeout=300) for _ in range(rounds)]
    for process in ranks:
        process.join(60)
    return times


def main() -> int:
    """Run all phases and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=75776)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--pace", type=float, default=2.0)
    parser.add_argument("--reloads", type=int, default=5)
    parser.add_argument("--idle-rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stall-") as directory:
        root = Path(directory)
        nbytes = build_model(root / "model", args.vocab)
        plain = unpatched(root / "model", root, args)
        ours = bridged(root / "model", root, args)
        gloo = by_gloo(root / "model", root, args)
        bare = bare_gloo(nbytes, args.idle_rounds)
    swap_stall, control_stall, reload_stall = (
        statistics.median(stalls)
        for stalls in (ours["swap_stall_ms"], ours["control_stall_ms"], plain["reload_stall_ms"])
    )
    bare_rate = nbytes / statistics.median(bare) / 1e9
    document = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": sys.argv,
        "machine": machine(),
        "model_bytes": nbytes,
        "summary": {
            "flip_ms_median": statistics.median(ours["flip_ms"]),
            "swap_stall_ms_median": swap_stall,
            "control_stall_ms_median": control_stall,
            "reload_stall_ms_median": reload_stall,
            "swap_above_control_share_of_reload": (swap_stall - control_stall) / reload_stall,
            "tokens_per_s_share_of_unpatched": ours["tokens_per_s_between_updates"] / plain["tokens_per_s"],
            "bare_gloo_gb_per_s": bare_rate,
            "pull_share_of_bare_gloo": ours["idle"]["gigabytes_per_s"] / bare_rate,
            "gloo_share_of_bare_gloo": gloo["gigabytes_per_s"] / bare_rate,
            "non_blocking_share_of_blocking": ours["idle"]["non_blocking_share_of_blocking"],
            "trainer_peak_above_model_mib": {
                "pull": ours["idle"]["trainer_peak_above_model_bytes"] / 2**20,
                "gloo": gloo["trainer_peak_above_model_bytes"] / 2**20,
            },
        },
        "unpatched": plain,
        "bridge": ours,
        "gloo": gloo,
        "bare_gloo_s": bare,
    }
    sys.stdout.write(json.dumps(document["summary"], indent=1) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
