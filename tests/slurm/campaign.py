"""Faults drawn at random on a job of a real batch script: on what SLURM runs itself, and in its steps.

    python -m tests.slurm.campaign --cases 30 --seed 1 --out faults-slurm.json

Four nodes, two that train and two with a server each. In each case the trainer makes a step, somebody dies
or stands still meanwhile, and the version must be live all the same; then both servers must come to serve
it, token for token. Case ``k`` of a seed is the same in every run, but for where in the step it strikes.

Only a trainer rank that dies ends the job, as slurm/README.md says: with exit code 1, no requeue, and nothing
left on any node. Until then servers answer by the version before the step or by the step's, whole. The next
job, told of the last version that was served, goes on from the trainer's saved state and makes the step.

All cases share a job otherwise, so one is had again with those before it; ``--until 17`` ends behind it:

    python -m tests.slurm.campaign --seed 1 --until 17
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from tests.slurm.cluster import Cluster
from tests.slurm.test_jobs import (
    TRAINER,
    VLLM_FLAGS,
    Job,
    assert_nothing_left,
    trained_answers,
    untrained,
)
from tests.support.models import build_checkpoint
from tests.support.serving import Api, end_in_order_on_sigterm, stop, wait_until

TRAINING, SERVERS = ("node1", "node2"), ("node3", "node4")
RANKS_PER_NODE = 2
# By role, what is in the command line of one on its node (of srun: on the batch script's). Not slurmstepd:
# without it tasks go on, and srun never hears of their end, whatever we do.
ROLES = {
    "launcher": "bridge.launch serve",
    "daemon": "vllm_patching.daemon",
    "updater": "vllm_patching.updater",
    "api": "openai.api_server",
    "engine": "VLLM::EngineCore",
    "worker": "VLLM::Worker",
    "srun": "server.sh",
    "trainer": f"-u {TRAINER}",  # as torchrun starts a rank; what starts torchrun names it too
}
KILLED = ("slurmd", "slurmd", "srun", "launcher", "daemon", "updater", "api", "engine", "worker", "trainer")
STOPPED = ("slurmd", "daemon", "updater", "engine", "worker", "trainer")
# Less than a server's deadline costs time alone. A trainer rank also stands still for more, which costs the
# round, and the trainer sends it again.
STOPPED_S, TOO_LONG_S = 8.0, 20.0
VERSION_TIMEOUT_S, RECOVER_TIMEOUT_S = 300.0, 400.0


@dataclass(frozen=True)
class Fault:
    """What happens to which role on which node, how long after the step has begun, and for how long."""

    what: str
    role: str
    where: str
    after_s: float
    local_rank: int  # of trainer ranks, which are several on a node
    stopped_s: float  # if it is

    def __str__(self) -> str:
        return f"{self.what} {self.role}"

    @property
    def ends_the_job(self) -> bool:
        return (self.what, self.role) == ("kill", "trainer")


def draw(seed: int, case: int) -> Fault:
    """The fault of one case."""
    chance = random.Random(f"slurm/{seed}/{case}")
    what = chance.choice(["kill", "kill", "stop"])
    role = chance.choice(KILLED if what == "kill" else STOPPED)
    where = chance.choice({"slurmd": TRAINING + SERVERS, "trainer": TRAINING}.get(role, SERVERS))
    after_s, local_rank = chance.uniform(0.0, 1.0), chance.randrange(RANKS_PER_NODE)
    stopped_s = chance.choice((TOO_LONG_S, STOPPED_S) if role == "trainer" else (STOPPED_S,))
    return Fault(what, role, where, after_s, local_rank, stopped_s)


def flips(logdir: Path) -> list[int]:
    """The versions that a server has flipped to, in order."""
    log = logdir / "flips-rank0.jsonl"
    return [json.loads(line)["version"] for line in log.read_text().splitlines()] if log.exists() else []


class Campaign:
    """One job, from case to case, and the next one behind a fault that ends it."""

    def __init__(self, directory: Path, cases: int) -> None:
        self.cluster = Cluster(Path(tempfile.mkdtemp(prefix="vbs-")))
        self.model = build_checkpoint("qwen3", directory / "model", dtype="float32", seed=0)
        self.directory, self.state = directory, directory / "state"
        self.step, self._steps = 0, cases
        self._jobs, self._last = 0, 0  # how many there were, and the last version that any of them has served
        self._answers = untrained(self.model)  # of the weights of ``step``
        self.cluster.start()
        self.job = self._submit()

    def _submit(self) -> Job:
        """A job whose trainer goes on from what it has saved."""
        latest = self.state / "latest"
        self._restored = int(latest.read_text()) if latest.exists() else 0
        self._jobs += 1
        return Job(
            self.cluster,
            self.directory / f"job{self._jobs}",
            "train_and_serve.sbatch",
            ["--nodes=4"],
            [TRAINER, str(self.model), str(self.state), str(self._steps)],
            MODEL=str(self.model),
            SERVE_NODES="2",
            STEP_BY_STEP="1",
            SERVER_RETRIES="1000",
            TRAINERS_PER_NODE=str(RANKS_PER_NODE),
            BRIDGE_VERSIONS_AFTER=str(self._last),
            VLLM_FLAGS=f"{VLLM_FLAGS} --distributed-executor-backend=mp",  # one worker has a process too
        )

    def processes(self, fault: Fault) -> list[psutil.Process]:
        """Those of the fault's role; of trainer ranks the one."""
        node = "node1" if fault.role == "srun" else fault.where
        found = []
        for process in self.cluster.inside(node):
            try:
                words = process.cmdline() or [process.name()]
                if ROLES[fault.role] not in f"{process.name()} {' '.join(words)}":
                    continue
                if fault.role == "srun" and not self._is_srun_of(words, fault.where):
                    continue
                if fault.role == "trainer" and process.environ()["LOCAL_RANK"] != str(fault.local_rank):
                    continue
            except psutil.NoSuchProcess:
                continue
            found.append(process)
        return found

    def _is_srun_of(self, words: list[str], where: str) -> bool:
        index = words.index(next(word for word in words if word.endswith("server.sh"))) + 1
        return words[0].endswith("srun") and words[index] == str(SERVERS.index(where))

    def strike(self, fault: Fault) -> None:
        if fault.role == "slurmd" and fault.what == "kill":
            self.cluster.replace_slurmd(fault.where)
            return
        if fault.role == "slurmd":
            pid = self.cluster.slurmd(fault.where)
        else:  # the one before may have died in the case before
            what = f"the {fault.role} of {fault.where}"
            wait_until(what, lambda: bool(self.processes(fault)), timeout_s=120)
            # The first of several: what is forked of one has the same command line for a moment.
            pid = self.processes(fault)[0].pid
        if fault.what == "kill":
            os.kill(pid, signal.SIGKILL)
            return
        stop(pid)
        threading.Event().wait(fault.stopped_s)
        try:
            if fault.role == "slurmd":  # nsenter stops with what it waits for
                os.kill(psutil.Process(pid).ppid(), signal.SIGCONT)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            assert fault.role == "updater", f"{fault.role} was ended while it stood still"

    def run(self, seed: int, case: int) -> dict[str, Any]:
        fault = draw(seed, case)
        row: dict[str, Any] = {"case": case, "fault": str(fault), "where": fault.where}
        if fault.role == "trainer":
            row["local_rank"] = fault.local_rank
        if fault.what == "stop":
            row["stopped_s"] = fault.stopped_s
        self._wait_paused()
        return row | (self._lose_the_job(fault) if fault.ends_the_job else self._go_on(fault))

    def _go_on(self, fault: Fault) -> dict[str, Any]:
        """The version must be live all the same, then on both servers, and until then the one before it."""
        before = self._answers
        with self._watching() as given:
            self._begin_step()
            threading.Event().wait(fault.after_s)
            began = time.monotonic()
            self.strike(fault)
            self._wait_live()
            live_s = time.monotonic() - began
            self._wait_served()
            recovered_s = time.monotonic() - began
        self._assert_whole(given, before)
        return {
            "version": self.job.versions()[-1][1],
            "answers": len(given),
            "live_s": round(live_s, 2),
            "recovered_s": round(recovered_s, 2),
        }

    @contextlib.contextmanager
    def _watching(self) -> Iterator[list[tuple[float, list[list[int]]]]]:
        """Ask both servers all the while; what they answer, and when they were asked, is there behind it."""
        ending, given = threading.Event(), list[tuple[float, list[list[int]]]]()
        with ThreadPoolExecutor(1) as thread:
            watch = thread.submit(self._watch, self.job.logdirs(), ending)
            try:
                yield given
            finally:
                ending.set()
            given += watch.result()

    def _assert_whole(self, given: list[tuple[float, list[list[int]]]], before: list[list[int]]) -> None:
        torn = [answer for _, answer in given if answer not in (before, self._answers)]
        assert not torn, f"{torn} are of neither the step before, {before}, nor of this one, {self._answers}"

    def _lose_the_job(self, fault: Fault) -> dict[str, Any]:
        """It must end as it is said to, with nothing torn until then, and the next one make the step."""
        before = [flips(logdir) for logdir in self.job.logdirs()]
        with self._watching() as given:
            self._begin_step()
            threading.Event().wait(fault.after_s)
            began = time.monotonic()
            self.strike(fault)
            self.job.wait_end("FAILED")
        assert self.job.exit_code == "1:0", self.job.text()[-6000:]
        assert self.job.told("RestartCnt") == "0"
        assert re.search(r": exit 1; logs in ", self.job.text()), self.job.text()[-6000:]
        assert_nothing_left(self.cluster)
        ended_s = time.monotonic() - began
        after = [flips(logdir) for logdir in self.job.logdirs()]
        newest = max([self._last, *(one[-1] for one in before if one)])
        self._last = max([newest, *(one[-1] for one in after if one)])
        for old, new in zip(before, after, strict=True):
            once = new == old or (self._last > newest and new == [*old, self._last])
            assert once, f"{old} were served before the step, whose version is {self._last}, and then {new}"

        old_answers, wanted = self._answers, self.step
        self.job = self._submit()
        assert self._restored in (wanted - 1, wanted), f"step {self._restored} was saved, of {wanted}"
        self.step = self._restored
        self._wait_paused()
        if self.step < wanted:
            self._begin_step()
        self._wait_live()
        version = self.job.versions()[-1][1]
        assert version > self._last, f"version {version} is another one of the job before"
        self._wait_served()
        served_s = time.monotonic() - began
        self._assert_whole(given, old_answers)
        return {
            "version": version,
            "answers": len(given),
            "answers_behind": sum(asked >= began for asked, _ in given),
            "ended_s": round(ended_s, 2),
            "next_job_serves_s": round(served_s, 2),
        }

    def _watch(self, logdirs: list[Path], ending: threading.Event) -> list[tuple[float, list[list[int]]]]:
        """When servers were asked, and their answers by one version from the first token to the last."""
        given = []
        while not ending.is_set():
            for logdir in logdirs:
                version, asked = flips(logdir), time.monotonic()
                if (answer := self._ask(logdir)) is not None and flips(logdir) == version:
                    given.append((asked, answer))
            ending.wait(0.05)
        return given

    def _wait_paused(self) -> None:
        """Until the trainer has made all steps so far, and stands before the next one or at the end."""
        self.job.wait_paused(self.step - self._restored)

    def _begin_step(self) -> None:
        self.job.go(self.step - self._restored)
        self.step += 1

    def _wait_live(self) -> None:
        self.job.wait(
            f"version of step {self.step}",
            lambda: self.job.versions()[-1:] and self.job.versions()[-1][0] >= self.step,
            timeout_s=VERSION_TIMEOUT_S,
        )

    def _wait_served(self) -> None:
        self._wait_paused()
        self._answers = trained_answers(self.model, self.state)
        wait_until(
            f"both servers to serve step {self.step}",
            lambda: [self._ask(logdir) for logdir in self.job.logdirs()] == [self._answers] * len(SERVERS),
            timeout_s=RECOVER_TIMEOUT_S,
            interval_s=0.5,
        )

    def _ask(self, logdir: Path) -> list[list[int]] | None:
        """What a server answers now; None for one that does not."""
        api = Api(0, str(self.model))
        try:
            api.url = (logdir / "server.url").read_text().strip()
            return [answer["tokens"] for answer in api.greedy(4, 16)]
        except (OSError, ValueError, http.client.HTTPException):
            return None

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
                "median": statistics.median(row[key] for row in good if key in row),
                "worst": max(row[key] for row in good if key in row),
            }
            for key in ("live_s", "recovered_s", "ended_s", "next_job_serves_s")
            if any(key in row for row in good)
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.slurm.campaign")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until", type=int, metavar="CASE", help="the last case, instead of --cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end_in_order_on_sigterm()
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
        drawn = draw(args.seed, len(rows))
        fault = str(drawn) if len(rows) < cases else "the end of the job"
        rows.append({"case": len(rows), "fault": fault, "where": drawn.where, "failure": failure})
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
