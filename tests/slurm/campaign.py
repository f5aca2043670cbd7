"""Faults drawn at random on a job of a real batch script: on what SLURM runs itself, and in its steps.

    python -m tests.slurm.campaign --cases 30 --seed 1 --out faults-slurm.json

Four nodes, two that train and two with a server each. In each case the trainer makes a step, somebody dies
or stands still meanwhile, and the version must be live all the same; then both servers must come to serve
it, token for token. Case ``k`` of a seed is the same in every run, but for where in the step it strikes.
All cases share one job, so a case is had again with those before it; ``--until 17`` ends the job behind it:

    python -m tests.slurm.campaign --seed 1 --until 17
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from tests.slurm.cluster import Cluster
from tests.slurm.test_jobs import TRAINER, Job, assert_nothing_left, trained_answers
from tests.support.models import build_checkpoint
from tests.support.serving import Api, stop, wait_until

SERVERS = ("node3", "node4")
# By role, what is in the command line of one on a server's node (of srun: on the batch script's). Not
# slurmstepd: without it tasks go on, and srun never hears of their end, whatever we do.
ROLES = {
    "launcher": "bridge.launch serve",
    "daemon": "vllm_patching.daemon",
    "updater": "vllm_patching.updater",
    "api": "openai.api_server",
    "engine": "VLLM::EngineCore",
    "srun": "server.sh",
}
KILLED = ("slurmd", "slurmd", "srun", "launcher", "daemon", "updater", "api", "engine")
STOPPED = ("slurmd", "daemon", "updater", "engine")
STOPPED_S = 8.0
VERSION_TIMEOUT_S, RECOVER_TIMEOUT_S = 300.0, 400.0


def draw(seed: int, case: int) -> tuple[str, str, str, float]:
    """What happens, to which role, on which server's node, and how long after the step has begun."""
    chance = random.Random(f"slurm/{seed}/{case}")
    what = chance.choice(["kill", "kill", "stop"])
    role = chance.choice(KILLED if what == "kill" else STOPPED)
    where = chance.choice(("node1", "node2", *SERVERS) if role == "slurmd" else SERVERS)
    return what, role, where, chance.uniform(0.0, 1.0)


class Campaign:
    """One job, from case to case."""

    def __init__(self, directory: Path, cases: int) -> None:
        self.cluster = Cluster(Path(tempfile.mkdtemp(prefix="vbs-")))
        self.model = build_checkpoint("qwen3", directory / "model", dtype="float32", seed=0)
        self.state = directory / "state"
        self.cluster.start()
        self.job = Job(
            self.cluster,
            directory / "job",
            "train_and_serve.sbatch",
            ["--nodes=4"],
            [TRAINER, str(self.model), str(self.state), str(cases)],
            MODEL=str(self.model),
            SERVE_NODES="2",
            STEP_BY_STEP="1",
            SERVER_RETRIES="1000",
        )
        self.step, self._steps = 0, cases

    def processes(self, role: str, where: str) -> list[psutil.Process]:
        node = "node1" if role == "srun" else where
        found = []
        for process in self.cluster.inside(node):
            try:
                words = process.cmdline() or [process.name()]
                name = process.name() if role == "engine" else " ".join(words)
            except psutil.NoSuchProcess:
                continue
            line = f"{name} {' '.join(words)}"
            if ROLES[role] in line and (role != "srun" or self._is_srun_of(words, where)):
                found.append(process)
        return found

    def _is_srun_of(self, words: list[str], where: str) -> bool:
        index = words.index(next(word for word in words if word.endswith("server.sh"))) + 1
        return words[0].endswith("srun") and words[index] == str(SERVERS.index(where))

    def strike(self, what: str, role: str, where: str) -> None:
        if role == "slurmd" and what == "kill":
            self.cluster.replace_slurmd(where)
            return
        if role == "slurmd":
            pid = self.cluster.slurmd(where)
        else:  # the one before may have died in the case before
            wait_until(f"the {role} of {where}", lambda: bool(self.processes(role, where)), timeout_s=120)
            # The first of several: what is forked of one has the same command line for a moment.
            pid = self.processes(role, where)[0].pid
        if what == "kill":
            os.kill(pid, signal.SIGKILL)
            return
        stop(pid)
        threading.Event().wait(STOPPED_S)
        try:
            if role == "slurmd":  # nsenter stops with what it waits for
                os.kill(psutil.Process(pid).ppid(), signal.SIGCONT)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            assert role == "updater", f"{role} was ended while it stood still"

    def run(self, seed: int, case: int) -> dict[str, Any]:
        what, role, where, after_s = draw(seed, case)
        self.job.wait_file(f"paused{self.step}")
        (self.job.directory / f"go{self.step}").touch()
        self.step += 1
        threading.Event().wait(after_s)
        began = time.monotonic()
        self.strike(what, role, where)
        self.job.wait(
            f"version of step {self.step}",
            lambda: self.job.versions()[-1:] and self.job.versions()[-1][0] >= self.step,
            timeout_s=VERSION_TIMEOUT_S,
        )
        live_s = time.monotonic() - began
        self.job.wait_file(f"paused{self.step}" if self.step < self._steps else "done")
        expected = trained_answers(self.model, self.state)
        wait_until(
            f"both servers to serve step {self.step}",
            lambda: all(served == expected for served in self.served()),
            timeout_s=RECOVER_TIMEOUT_S,
            interval_s=0.5,
        )
        return {
            "case": case,
            "fault": f"{what} {role}",
            "where": where,
            "version": self.job.versions()[-1][1],
            "live_s": round(live_s, 2),
            "recovered_s": round(time.monotonic() - began, 2),
        }

    def served(self) -> Iterator[Any]:
        """What each server answers now; None for one that does not."""
        for logdir in self.job.logdirs():
            api = Api(0, str(self.model))
            try:
                api.url = (logdir / "server.url").read_text().strip()
                yield [answer["tokens"] for answer in api.greedy(4, 16)]
            except (OSError, ValueError):
                yield None

    def end(self) -> None:
        """The job in order; nothing may be left on a node."""
        self.job.release()
        self.job.wait_end("COMPLETED")
        assert self.job.told("RestartCnt") == "0"
        assert_nothing_left(self.cluster)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if "failure" not in row]
    return {
        "cases": len(rows),
        "failures": len(rows) - len(good),
        "by_fault": dict(sorted(Counter(row["fault"] for row in rows).items())),
        **{
            key: {
                "median": statistics.median(row[key] for row in good),
                "worst": max(row[key] for row in good),
            }
            for key in ("live_s", "recovered_s")
            if good
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.slurm.campaign")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until", type=int, metavar="CASE", help="the last case, instead of --cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = args.cases if args.until is None else args.until + 1
    directory = Path(tempfile.mkdtemp(prefix="slurm-campaign-"))
    directory.chmod(0o755)
    campaign = Campaign(directory, cases)
    rows: list[dict[str, Any]] = []

    def write() -> None:
        document = {
            "command": f"python -m tests.slurm.campaign {' '.join(sys.argv[1:])}",
            "machine": machine(),
            "summary": summary(rows),
            "cases": rows,
        }
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    failure = ""
    try:
        for case in range(cases):
            rows.append(campaign.run(args.seed, case))
            print(json.dumps(rows[-1]), flush=True)
            write()
        campaign.end()
    except Exception:  # noqa: BLE001 - the job is of no further use
        failure = traceback.format_exc()
        what, role, where, _ = draw(args.seed, len(rows))
        fault = f"{what} {role}" if len(rows) < cases else "the end of the job"
        rows.append({"case": len(rows), "fault": fault, "where": where, "failure": failure})
        print(failure, campaign.job.text()[-6000:], flush=True)
    finally:
        campaign.job.cancel()
        campaign.cluster.stop()
        shutil.rmtree(campaign.cluster.root, ignore_errors=True)
    write()
    print(json.dumps(summary(rows), indent=1), f"logs in {directory}")
    return int(bool(failure))


if __name__ == "__main__":
    raise SystemExit(main())
