"""How long a server whose vLLM is killed in a round is away, and how long the others are held up.

Two real servers on this host's CPU are fed by one trainer; each is the other's peer. A round is begun, stands
still in its middle on one of them, and there the engine core, its worker or the API server is killed. Every
repetition has servers of its own: from the second death on, a launcher pauses before it starts vLLM again.
Measured, in seconds:

* until the trainer has its receipt for the version on the survivor;
* until the one that died serves that version, which it gets from its peer;
* of that, until the launcher has started vLLM again, vLLM's own start (from its first process to its
  answering ``/health``), and what comes behind.

    PYTHONPATH=tests python benchmarks/comeback.py --out benchmarks/results/comeback.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from machine import machine
from support.models import build_checkpoint
from support.serving import (
    Server,
    Trainers,
    api_servers,
    end_in_order_on_sigterm,
    serving_together,
    stop,
    training,
    wait_until,
)

START_TIMEOUT_S = 600.0
FLAGS = ["--dtype=float32", "--distributed-executor-backend=mp"]  # the worker is a process of its own
ROLES = ("engine core", "worker", "API server")


def vllm_of(server: Server, *, since: float) -> psutil.Process | None:
    """The API server that was started after ``since``, in seconds since the epoch."""
    for pid in server.pids():
        try:
            process = psutil.Process(pid)
            if process.create_time() > since and "vllm.entrypoints" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def pid_of(server: Server, role: str) -> int:
    """The process of ``server`` that has one of ``ROLES``."""
    if role == "API server":
        (pid,) = api_servers(server)
        return pid
    return int(server.status()["pids"][{"engine core": "engines", "worker": "workers"}[role]][0])


def kill_in_a_round(
    trainers: Trainers, victim: Server, survivor: Server, *, role: str, seed: int
) -> dict[str, float]:
    """One repetition; both servers serve the same version before and after it."""
    trainers.must("broadcast")  # both are met, and have the updaters that the next round will have
    trainers.must("perturb", seed=seed)
    pid = pid_of(victim, role)
    stop(victim.status()["pids"]["updaters"][0])
    trainers.send("broadcast")
    wait_until("a round in the middle", lambda: victim.status()["state"] == "round", timeout_s=60)
    began, clock = time.monotonic(), time.time()
    os.kill(pid, signal.SIGKILL)
    (receipt,) = trainers.answers(timeout_s=60)
    committed_s = time.monotonic() - began
    made = receipt["version"]
    assert receipt["servers"] == [str(survivor.logdir)], receipt
    found: list[psutil.Process] = []

    def started() -> bool:
        found.extend(filter(None, [vllm_of(victim, since=clock)]))
        return bool(found)

    wait_until("the next vLLM", started, timeout_s=60, interval_s=0.05)
    until_started_s = found[0].create_time() - clock
    wait_until("it to answer", victim.api.healthy, timeout_s=START_TIMEOUT_S, interval_s=0.05)
    start_s = time.time() - found[0].create_time()

    def back() -> bool:
        status = victim.status()
        return status["state"] == "ready" and status["weight_version"] == made

    wait_until(f"version {made} on it", back, timeout_s=60, interval_s=0.02)
    back_s = time.monotonic() - began
    return {
        "survivor_committed_s": committed_s,
        "back_s": back_s,
        "until_started_s": until_started_s,
        "own_start_s": start_s,
        "behind_its_start_s": back_s - until_started_s - start_s,
        "beyond_own_start_s": back_s - start_s,
    }


def measure(role: str, seed: int) -> dict[str, float]:
    """One repetition, with servers of its own."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = build_checkpoint("qwen3", root / "model", dtype="float32", seed=0)
        places = [str(root / "one"), str(root / "two")]
        peers = f"--peers={os.pathsep.join(places)}"
        options: dict[str, Any] = {
            "flags": FLAGS,
            "bridge_flags": [peers],
            "env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        }
        env = {"BRIDGE_LOGDIRS": os.pathsep.join(places), "BRIDGE_COMMIT": "available"}
        with (
            serving_together(*((model, Path(place), dict(options)) for place in places)) as (one, two),
            training("plain", model, logdir=root, dtype="float32", env=env) as trainers,
        ):
            trainers.must("broadcast")
            return kill_in_a_round(trainers, one, two, role=role, seed=seed)


def summary(repetitions: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median": round(statistics.median(one[name] for one in repetitions), 3),
            "worst": round(max(one[name] for one in repetitions), 3),
        }
        for name in repetitions[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3, help="of each role")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end_in_order_on_sigterm()
    found: dict[str, list[dict[str, float]]] = {role: [] for role in ROLES}
    for repeat in range(args.repeats):
        for role in ROLES:
            found[role].append(measure(role, repeat))
            print(json.dumps({"killed": role, **found[role][-1]}), flush=True)
    document = {
        "what": (__doc__ or "").splitlines()[0],
        "command": ["benchmarks/comeback.py", *sys.argv[1:]],
        "machine": machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()[:2]],
        "summary": {
            "all": summary([one for ones in found.values() for one in ones]),
            **{role: summary(ones) for role, ones in found.items()},
        },
        "repetitions": found,
    }
    print(json.dumps(document["summary"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
