"""Two real servers and a trainer that publishes all the time, for hours, and a fault every minute.

    python -m tests.faults.soak --minutes 120 --seed 1 --out benchmarks/results/soak.json

The first server's vLLM, daemon and launcher are never touched, so what they hold is seen to stay what it was;
its updaters, the trainer, and all of the second server are killed and stopped. Both are asked for tokens all
the time. After each fault: the trainer had a receipt or an error in time, the next version goes live on both
servers again, and both answer with the tokens of its weights. The run ends at the first fault that led to
anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from tests.support.checks import own_answers
from tests.support.models import build_checkpoint
from tests.support.serving import (
    UNBOUND,
    Server,
    Trainers,
    alive,
    api_servers,
    end_in_order_on_sigterm,
    prompts,
    serving_together,
    wait_until,
)
from vllm_patching import residue

DEADLINE_S = 5.0
STAGE_TIMEOUT_S = 5.0
ANSWER_S = (
    5 * DEADLINE_S + 30
)  # until the trainer must know: deadlines, the search for a cause, two busy cores
RECOVER_S = 300.0  # vLLM starts in 25 s on an idle machine
TOKENS = 12
WEIGHTS = 3
KEEPER, VICTIM = 0, 1  # which server is whose

# What happens, to whom: of servers a number, else the trainer.
FAULTS: tuple[tuple[str, str, int | None], ...] = (
    ("kill", "updaters", KEEPER), ("stop", "updaters", KEEPER),
    ("kill", "updaters", VICTIM), ("stop", "updaters", VICTIM),
    ("kill", "daemon", VICTIM), ("stop", "daemon", VICTIM),
    ("kill", "workers", VICTIM), ("kill", "engines", VICTIM),
    ("kill", "api", VICTIM), ("stop", "engines", VICTIM),
    ("kill", "trainer", None), ("stop", "trainer", None),
)  # fmt: skip
BRIEFLY_STOPPED_S = 3.0
GROWTH_MB = 24.0
GROWTH_DESCRIPTORS = 4  # connections that are being answered
REST_S = 60.0  # in which groups of a lost epoch let go of peers that were stopped; 12 s were seen


def roles(server: Server) -> dict[str, int]:
    """Process ids of one server: its first updater, worker and engine core."""
    pids = server.status()["pids"]
    found = {role: int(pids[role][0]) for role in ("updaters", "workers", "engines") if pids.get(role)}
    found |= {"daemon": int(pids["daemon"])} if pids.get("daemon") else {}
    if apis := api_servers(server):
        found["api"] = apis[0]
    return {"launcher": server.process.pid, **found}


class Load(threading.Thread):
    """Requests to one server, one after the other with ``pause_s`` between them."""

    def __init__(self, server: Server, pause_s: float) -> None:
        super().__init__(name=f"load-{server.port}", daemon=True)
        self.server, self._pause_s = server, pause_s
        self.answered = self.failed = 0
        self.longest_s = 0.0  # until an answer came, from the one before it on
        self.errors: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        prompt, before = prompts(1)[0], time.monotonic()
        while not self._over.wait(self._pause_s):
            try:
                self.server.api.complete(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                now = time.monotonic()
                self.answered += 1
                self.longest_s, before = max(self.longest_s, now - before), now
            except (OSError, HTTPException, ValueError, LookupError) as err:  # cut off anywhere in an answer
                self.failed += 1
                if len(self.errors) < 20:
                    self.errors.append(f"{type(err).__name__}: {err}")

    def end(self) -> None:
        self._over.set()
        self.join(180)


@dataclass
class Sample:
    """What every process held at a moment."""

    minute: float
    who: str
    pid: int
    memory_mb: float
    descriptors: int


@dataclass
class Soak:
    """All of it; made by ``started``."""

    servers: list[Server]
    sets: list[Path]
    expected: list[list[list[int]]]
    directory: Path
    chance: random.Random
    loads: list[Load]
    trainers: Trainers
    started: float = field(default_factory=time.monotonic)
    version: int = 0
    weights: int = 0
    published: int = 0
    late: int = 0  # rounds that a server missed, though nothing had been done to it
    samples: list[Sample] = field(default_factory=list)

    # --- the trainer -------------------------------------------------------------------------------------

    def train(self) -> None:
        """A trainer in the place of one that is gone."""
        self.trainers = start_trainer(self.sets, self.directory, self.servers)

    def begin(self) -> None:
        """Send the next weights."""
        self.weights = (self.weights + 1) % WEIGHTS
        self.trainers.must("load", path=str(self.sets[self.weights]))
        self.trainers.send("broadcast")

    def answer(self) -> dict[str, Any]:
        """Receipt, error or {"died"}; never silence. Versions have no gaps and are never given twice."""
        (answer,) = self.trainers.answers(timeout_s=ANSWER_S)
        if "version" in answer:
            self.published += 1
            assert answer["version"] > self.version, f"version {answer['version']} behind {self.version}"
            self.version = answer["version"]
        return answer

    def publish(self) -> dict[str, Any]:
        self.begin()
        return self.answer()

    def recover(self) -> None:
        """Until a version is live on both, and both answer: vLLM's API server comes behind its engine."""
        deadline = time.monotonic() + RECOVER_S
        while True:
            answer = self.publish()
            live = len(answer.get("servers", ())) == len(self.servers)
            if live and all(server.api.healthy() for server in self.servers):
                return
            assert time.monotonic() < deadline, f"not both serve after {RECOVER_S:g} s: {answer}"
            threading.Event().wait(2.0)  # vLLM has the cores meanwhile

    def check(self) -> None:
        """Both serve the weights of the last receipt, whole."""
        for server in self.servers:
            status = server.status()
            assert status["weight_version"] == self.version, (status["weight_version"], self.version)
            found = [answer["tokens"] for answer in server.api.greedy(2, TOKENS)]
            assert found == self.expected[self.weights], f"{server.logdir.name}: tokens of other weights"

    # --- faults --------------------------------------------------------------------------------------------

    def suffer(self, what: str, role: str, which: int | None) -> dict[str, Any]:
        """One fault, somewhere in a round; what came of it, in seconds."""
        server = None if which is None else self.servers[which]
        pid = self.trainers.pids()[0] if server is None else roles(server)[role]
        self.begin()
        threading.Event().wait(self.chance.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        start = time.monotonic()
        if what == "stop" and role == "trainer":
            other = self.servers[VICTIM]
            wait_until("the daemon to notice", lambda: not other.status().get("trainer"), timeout_s=ANSWER_S)
            os.kill(pid, signal.SIGCONT)
        elif what == "stop" and role in ("engines", "daemon"):
            threading.Event().wait(BRIEFLY_STOPPED_S if role == "engines" else 2 * DEADLINE_S)
            os.kill(pid, signal.SIGCONT)
        answer = self.answer()
        noticed_s = time.monotonic() - start
        if (what, role) == ("kill", "trainer"):
            if "died" not in answer:  # the round had ended before the kill
                (end,) = self.trainers.answers(timeout_s=ANSWER_S)
                assert "died" in end, f"killed, and answers {end}"
            self.trainers.stop()
            self.train()
        else:
            assert "died" not in answer, f"the trainer died of {what} {role}: {answer}"
        self.recover()
        recovered_s = time.monotonic() - start
        if role == "updaters" or what == "kill":
            wait_until(f"the end of {role} pid {pid}", lambda: not alive(pid), timeout_s=60)
        self.check()
        back = re.findall(r"vLLM is back ([0-9.]+) s after it died", server.text()) if server else []
        restarted = what == "kill" and role in ("workers", "engines", "api")
        got = answer.get("type") or ("receipt" if "version" in answer else "died")
        on = len(answer.get("servers", ()))
        return {
            "fault": f"{what} {role}", "server": which, "answer": got, "live_on": on,
            "noticed_s": round(noticed_s, 2), "recovered_s": round(recovered_s, 2), "version": self.version,
            # Of which vLLM took so long until it was ready again.
            **({"back_s": float(back[-1])} if restarted else {}),
        }  # fmt: skip

    # --- what is held ------------------------------------------------------------------------------------

    def sample(self) -> None:
        minute = round((time.monotonic() - self.started) / 60, 2)
        wanted = [
            (f"server {n} {role}", pid) for n, s in enumerate(self.servers) for role, pid in roles(s).items()
        ]
        for who, pid in [*wanted, ("trainer", self.trainers.pids()[0])]:
            try:
                process = psutil.Process(pid)
                memory, descriptors = process.memory_full_info(), process.num_fds()
            except psutil.NoSuchProcess:
                continue  # an updater of a crew that was just replaced
            self.samples.append(Sample(minute, who, pid, round(memory.uss / 2**20, 2), descriptors))

    def sample_at_rest(self) -> None:
        """The last sample, once nobody holds more than before: what leaks stays, what is let go of goes."""
        least: dict[tuple[str, int], int] = {}
        for s in self.samples:
            least[s.who, s.pid] = min(s.descriptors, least.get((s.who, s.pid), s.descriptors))
        known, deadline = len(self.samples), time.monotonic() + REST_S
        while True:
            self.sample()
            more = [s.descriptors - least.get((s.who, s.pid), s.descriptors) for s in self.samples[known:]]
            if max(more) <= GROWTH_DESCRIPTORS or time.monotonic() > deadline:
                return
            del self.samples[known:]
            threading.Event().wait(1)


def start_trainer(sets: Sequence[Path], directory: Path, servers: Sequence[Server]) -> Trainers:
    env = {
        "BRIDGE_LOGDIRS": os.pathsep.join(str(server.logdir) for server in servers),
        "BRIDGE_COMMIT": "available",
        "BRIDGE_STAGE_TIMEOUT_S": f"{STAGE_TIMEOUT_S:g}",
        "BRIDGE_CONNECT_TIMEOUT_S": "20",
    }
    return Trainers("plain", sets[0], logdir=directory, dtype="float32", env=env)


@contextmanager
def started(directory: Path, seed: int, *, pause_s: float = 0.3) -> Iterator[Soak]:
    """Servers, trainer and load; ended afterwards, in order."""
    import torch
    from transformers import AutoModelForCausalLM

    sets = [
        build_checkpoint("qwen3", directory / f"weights{n}", dtype="float32", seed=n) for n in range(WEIGHTS)
    ]
    expected = [
        own_answers(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), num_prompts=2, tokens=TOKENS
        )
        for path in sets
    ]
    assert len({str(answers) for answers in expected}) == WEIGHTS
    places = [directory / "keeper", directory / "victim"]
    options: dict[str, Any] = {
        "flags": ["--dtype=float32", "--distributed-executor-backend=mp"],
        "bridge_flags": [
            f"--deadline={DEADLINE_S:g}", "--heartbeat-interval=0.5", "--max-daemon-restarts=10000",
            "--max-server-restarts=10000", f"--peers={os.pathsep.join(map(str, places))}",
        ],
        "env": UNBOUND,
    }  # fmt: skip
    with ExitStack() as stack:
        servers = stack.enter_context(serving_together(*((sets[0], place, options) for place in places)))
        made = Soak(
            servers, sets, expected, directory, random.Random(seed), [Load(s, pause_s) for s in servers],
            start_trainer(sets, directory, servers),
        )  # fmt: skip
        stack.callback(lambda: made.trainers.stop())
        for load in made.loads:
            load.start()
            stack.callback(load.end)
        yield made


def faults_in_turn(chance: random.Random) -> Iterator[tuple[str, str, int | None]]:
    """All of them in a random order, again and again: each has come before one comes twice."""
    while True:
        yield from chance.sample(FAULTS, len(FAULTS))


def soak(
    made: Soak,
    *,
    minutes: float,
    every_s: float,
    publish_every_s: float,
    say: Callable[[dict[str, Any]], None],
    least_faults: int = 1,
) -> list[dict[str, Any]]:
    """Publish until the time is over, with a fault in each interval; a row for each.

    A fault that came due while the servers recovered from the one before it comes right afterwards. It goes
    on until there were ``least_faults``: a slow machine needs the longer for each, not the fewer.
    """
    made.recover()
    made.check()
    made.sample()
    rows: list[dict[str, Any]] = []
    faults, end = faults_in_turn(made.chance), made.started + 60 * minutes
    due = time.monotonic() + every_s
    while time.monotonic() < end or len(rows) < least_faults:
        if time.monotonic() >= due:
            row = made.suffer(*next(faults))
            made.sample()
            rows.append({"minute": round((time.monotonic() - made.started) / 60, 2), **row})
            say(rows[-1])
            due += every_s
        else:
            threading.Event().wait(publish_every_s)
            answer = made.publish()
            if len(answer.get("servers", ())) < len(made.servers):
                reasons = answer.get("absent", {}).values()
                merely_late = bool(reasons) and all("not staged" in reason for reason in reasons)
                assert merely_late, f"nothing was done to it, and it failed: {answer}"
                made.late += 1  # the other cores' work took the server's: counted, and it must catch up
                made.recover()
    made.recover()
    made.check()
    made.sample_at_rest()
    return rows


def growth(samples: Sequence[Sample], *, least: int = 8) -> list[dict[str, Any]]:
    """What each life of at least ``least`` samples held early and late, of a process that was killed too.

    Early and late are its first and last quarter; its first sample does not count, in which connections,
    buffers and caches are still made. Memory is the quarter's median. Of descriptors it is the least: a
    connection that is being made or answered comes and goes, and what leaks is in every sample.
    """
    found = []
    for who, pid in dict.fromkeys((s.who, s.pid) for s in samples):
        mine = [s for s in samples if (s.who, s.pid) == (who, pid)]
        if len(mine) < least:
            continue
        quarter = max(2, len(mine[1:]) // 4)
        early, late = mine[1 : 1 + quarter], mine[-quarter:]
        found.append(
            {
                "who": who,
                "pid": pid,
                "samples": len(mine),
                "memory_mb": [statistics.median(s.memory_mb for s in part) for part in (early, late)],
                "descriptors": [min(s.descriptors for s in part) for part in (early, late)],
            }
        )
    return found


def grown(held_by: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Who of ``growth`` held more late than early, by more than what comes and goes."""
    return [
        held
        for held in held_by
        for (memory_early, memory_late), (open_early, open_late) in [(held["memory_mb"], held["descriptors"])]
        if memory_late - memory_early >= GROWTH_MB or open_late - open_early > GROWTH_DESCRIPTORS
    ]


def summary(made: Soak, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def times(of: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
        values = [row[key] for row in of]
        return {"median": round(statistics.median(values), 2), "worst": max(values)}

    by_fault = {
        fault: {
            "cases": len(of),
            "noticed_s": times(of, "noticed_s"),
            "recovered_s": times(of, "recovered_s"),
        }
        for fault in sorted({row["fault"] for row in rows})
        for of in [[row for row in rows if row["fault"] == fault]]
    }
    behind = [{"behind_s": row["recovered_s"] - row["back_s"]} for row in rows if "back_s" in row]
    return {
        "minutes": round((time.monotonic() - made.started) / 60, 1),
        "versions": made.published,
        "faults": len(rows),
        "late": made.late,
        "requests": [{"answered": load.answered, "failed": load.failed} for load in made.loads],
        "by_fault": by_fault,
        # From vLLM's being ready again to the newest version on both.
        "behind_its_own_start": times(behind, "behind_s") if behind else None,
        "growth": growth(made.samples),
    }


def left_behind(shm_before: set[Path]) -> list[str]:
    """Shared memory of ours or of vLLM's that is there now and was not before."""
    new = {path for path in set(residue.SHM_DIR.iterdir()) - shm_before if path.exists()}
    return sorted(map(str, new - residue.snapshot(psutil.pids())))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=60, help="seconds between faults")
    parser.add_argument("--publish-every", type=float, default=2, help="seconds between versions")
    parser.add_argument("--ask-every", type=float, default=2, help="seconds between a server's requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end_in_order_on_sigterm()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    shm_before = set(residue.SHM_DIR.iterdir())
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "command": f"python -m tests.faults.soak {' '.join(sys.argv[1:])}",
        "machine": machine(),
    }

    def write(failure: str = "") -> None:
        if rows:
            document.update(summary=summary(made, rows), failure=failure, faults=rows)
            document["samples"] = [[s.minute, s.who, s.pid, s.memory_mb, s.descriptors] for s in made.samples]
        if args.out is not None:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    def say(row: dict[str, Any]) -> None:
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        write()

    failure = ""
    with started(directory, args.seed, pause_s=args.ask_every) as made:
        try:
            soak(made, minutes=args.minutes, every_s=args.every, publish_every_s=args.publish_every, say=say)
            assert made.loads[KEEPER].failed == 0, f"the first server failed: {made.loads[KEEPER].errors}"
        except Exception:  # noqa: BLE001 - written down, and the run's result
            failure = traceback.format_exc()
        write(failure)
    document["left_behind"] = left_behind(shm_before)
    if more := grown(growth(made.samples)):
        failure += f"grown: {json.dumps(more)}\n"
    document["load_errors"] = [load.errors for load in made.loads]
    write(failure)
    sys.stdout.write(f"{failure}{json.dumps(document.get('summary'), indent=1)}\nlogs in {directory}\n")
    return int(bool(failure or document["left_behind"]))


if __name__ == "__main__":
    raise SystemExit(main())
