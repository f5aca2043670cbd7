"""The batch scripts on a real SLURM: trainers of two nodes feed real servers on two others.

With BRIDGE_TEST_SLURM=full each script brings ten versions to two servers; without, the later two bring less.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.support.checks import own_answers
from tests.support.faults import Armed, Fault
from tests.support.full import in_full, only_in_full
from tests.support.serving import REPO, UNBOUND, Api, wait_until, whole_lines

FULL = in_full("slurm")
TRAINER = str(REPO / "tests" / "slurm" / "paced_trainer.py")
VLLM_FLAGS = (
    "--dtype=float32 --max-model-len=512 --enforce-eager --disable-uvicorn-access-log --max-num-seqs=32"
)
SLURMD_KILLS = 20
JOB_TIMEOUT_S = 900.0
END_TIMEOUT_S = 180.0
# --signal of the scripts: how long before the limit, and how much earlier SLURM may send it. The limit leaves
# time for servers to start, and for rounds.
WARNED_S, EARLY_S, TIME_LIMIT_MIN = 300, 60, 9
BUSY_S = 30  # until the script has it

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
Record = Callable[[str, object], None]


def api_of(logdir: Path, model: Path) -> Api:
    """The server of a log directory, which says where it answers while it is ready."""
    api = Api(0, str(model))
    api.url = (logdir / "server.url").read_text().strip()
    return api


class Job:
    """A batch job of one of the scripts, in a directory of its own."""

    def __init__(self, cluster: Cluster, directory: Path, script: str, options: Sequence[str],
                 words: Sequence[str], **env: str) -> None:  # fmt: skip
        directory.mkdir()
        self.cluster, self.directory, self.script = cluster, directory, script
        self.output = directory / "output"
        settings = {
            "REPO": str(REPO), "PYTHON": sys.executable, "LOGROOT": str(directory), "VLLM_FLAGS": VLLM_FLAGS,
            "START_TIMEOUT": f"{JOB_TIMEOUT_S:g}", "STOP_TIMEOUT": "100", "TRAINERS_PER_NODE": "2",
            "PACE_DIR": str(directory), "PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "HF_HUB_OFFLINE": "1",
            # What servers leave behind on a node is found there; torchrun leaves logs in its temporary one.
            "XDG_RUNTIME_DIR": str(cluster.local), "TMPDIR": str(directory),
            "VLLM_CPU_KVCACHE_SPACE": "1", **UNBOUND,
        }  # fmt: skip
        command = ["sbatch", "--parsable", "--cpus-per-task=2", f"--output={self.output}", *options]
        command += [str(REPO / "slurm" / script), *words]
        self.id = cluster.call(*command, cwd=directory, **{**settings, **env}).strip()

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def told(self, name: str) -> str:
        return self.cluster.call(
            "squeue", "--noheader", "--states=all", f"--jobs={self.id}", f"--Format={name}:40"
        ).split()[0]

    @property
    def exit_code(self) -> str:
        """Exit code and signal of the batch script."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        found = re.search(r"\bExitCode=(\S+)", text)
        assert found is not None, text
        return found[1]

    def wait(self, what: str, check: Callable[[], object], *, timeout_s: float = JOB_TIMEOUT_S) -> None:
        def done() -> bool:
            state = self.told("State")  # before: it may become what is waited for meanwhile
            if check():
                return True
            goes_on = state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            assert goes_on, f"{state}: {self.text()[-6000:]}"
            return False

        wait_until(f"job {self.id}: {what} (output {self.output})", done, timeout_s=timeout_s, interval_s=0.5)

    def wait_end(self, state: str) -> None:
        self.wait(f"to be {state}", lambda: self.told("State") == state, timeout_s=END_TIMEOUT_S)

    def wait_file(self, name: str) -> None:
        self.wait(f"the file {name}", (self.directory / name).exists)

    def logdirs(self, attempt: int = 0) -> list[Path]:
        return sorted(self.directory.glob(f"*/attempt-{attempt}/server-*"))

    def apis(self, model: Path, attempt: int = 0) -> list[Api]:
        return [api_of(logdir, model) for logdir in self.logdirs(attempt)]

    def wait_versions(self, expected: list[tuple[int, int]]) -> None:
        """What it printed may come later than a file that it made after that."""
        self.wait(f"{len(expected)} versions", lambda: len(self.versions()) >= len(expected))
        assert self.versions() == expected

    def versions(self) -> list[tuple[int, int]]:
        """(step, version) as the trainer told them, each of which was live on all servers."""
        return [
            (int(a), int(b))
            for a, b in re.findall(
                r"^(?:\[trainer\] )?step (\d+): version (\d+) live after", self.text(), re.M
            )
        ]

    def flips(self, attempt: int = 0) -> list[list[int]]:
        """The versions that each server of an attempt has served, in order, as its first worker says."""
        return [
            [json.loads(line)["version"] for line in whole_lines(logdir / "flips-rank0.jsonl")]
            for logdir in self.logdirs(attempt)
        ]

    def wait_flips(self, expected: list[list[int]], attempt: int = 0) -> None:
        """A worker writes them down behind the batch, which is not waited for."""
        self.wait(f"{expected} to have been flipped to", lambda: self.flips(attempt) == expected,
                  timeout_s=END_TIMEOUT_S)  # fmt: skip

    def wait_paused(self, made: int, attempt: int = 0) -> None:
        """Until the trainer of an attempt stands still behind the steps that it made, or has made all."""
        files = [self.directory / name for name in (f"paused{attempt}.{made}", "done")]
        self.wait(f"{made} steps of attempt {attempt}", lambda: any(file.exists() for file in files))

    def go(self, made: int, attempt: int = 0) -> None:
        """It stands there: let it make the next one."""
        (self.directory / f"go{attempt}.{made}").touch()

    def release(self) -> None:
        (self.directory / "release").touch()

    def cancel(self) -> None:
        self.cluster.call("scancel", self.id)


def trained_answers(model: Path, state: Path) -> list[list[int]]:
    """Tokens of the trainer's last weights, loaded from what it saved, by a forward of their own."""
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = fresh.state_dict()
    dcp.load({"model": weights}, checkpoint_id=state / (state / "latest").read_text(), no_dist=True)
    fresh.load_state_dict(weights)
    return own_answers(fresh)


def assert_served(job: Job, model: Path, state: Path, *, servers: int, attempt: int = 0) -> int:
    """Every server gives the tokens of the trainer's last weights, which are not those that it loaded.

    Returns how many tokens were compared.
    """
    expected = trained_answers(model, state)
    served = [[answer["tokens"] for answer in api.greedy(4, 16)] for api in job.apis(model, attempt)]
    assert served == [expected] * servers
    assert expected != untrained(model)
    return servers * sum(map(len, expected))


@dataclass
class Steps:
    """The steps of a trainer that waits for a sign before each, and what all servers answer behind each."""

    trains: Job
    serves: Job  # the same, or the servers' own
    model: Path
    state: Path
    servers: int
    attempt: int = 0
    before: int = 0  # that earlier attempts have made
    versions: list[int] = field(default_factory=list)
    tokens: int = 0  # that were compared

    def begin(self, step: int) -> None:
        self.trains.wait_paused(step - 1 - self.before, self.attempt)
        self.trains.go(step - 1 - self.before, self.attempt)

    def wait_live(self, step: int) -> None:
        """The last version is of ``step``, whoever serves it."""
        self.trains.wait(f"step {step}", lambda: [made for made, _ in self.trains.versions()][-1:] == [step])

    def check(self, step: int) -> None:
        """The last version is of ``step``, and all servers give its tokens."""
        self.trains.wait_paused(step - self.before, self.attempt)
        self.wait_live(step)
        self.tokens += assert_served(
            self.serves, self.model, self.state, servers=self.servers, attempt=self.serves_in
        )
        self.versions.append(self.trains.versions()[-1][1])

    def make(self, *steps: int) -> None:
        for step in steps:
            self.begin(step)
            self.check(step)

    def requeued(self, step: int) -> None:
        """The next attempt goes on from ``step``, which is served first of all."""
        self.attempt, self.before = self.attempt + 1, step
        known = len(self.versions)
        self.trains.wait("its version", lambda: len(self.trains.versions()) > known)
        self.check(step)

    @property
    def serves_in(self) -> int:
        """The attempt of the job that serves."""
        return self.attempt if self.serves is self.trains else int(self.serves.told("RestartCnt"))

    def found(self) -> dict[str, Any]:
        """In numbers, for the result."""
        return {"servers": self.servers, "versions": self.versions, "tokens_equal": self.tokens}


NOT_THE_CHECKPOINT = "no version was broadcast yet, and --serve-checkpoint never keeps requests out"


def refusals(job: Job, model: Path, attempt: int = 0, servers: Sequence[int] = (0, 1)) -> list[str]:
    """What each server of an attempt says to a request that it refuses; "" of one that is not there yet.

    None may give tokens.
    """
    found = []
    logdirs = job.logdirs(attempt)
    for index in servers:
        try:
            answer = api_of(logdirs[index], model).complete([1, 2, 3], max_tokens=1)
        except urllib.error.HTTPError as err:
            with err:
                found.append(f"{err.code} {err.read().decode()}")
        except (OSError, HTTPException, IndexError):
            found.append("")
        else:
            raise AssertionError(f"{logdirs[index]} answers with the checkpoint: {answer}")
    return found


@cache
def untrained(model: Path) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    return own_answers(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))


def assert_nothing_left(cluster: Cluster) -> None:
    try:
        wait_until("the nodes to be clean", lambda: not cluster.residue(), timeout_s=END_TIMEOUT_S)
    except TimeoutError:
        assert cluster.residue() == []  # says what it is


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``submit(name, script, options, words, **env)``; what still runs at the end is cancelled."""
    jobs: list[Job] = []

    def make(name: str, script: str, options: Sequence[str], words: Sequence[str], **env: str) -> Job:
        jobs.append(Job(cluster, tmp_path / name, script, options, words, **env))
        return jobs[-1]

    yield make
    for job in jobs:
        cluster.call("scancel", job.id, check=False)


BEFORE = [(step, step) for step in range(1, 5)]
# The restored weights first, under the next number; then the steps that were missing.
REQUEUED = [*BEFORE, (4, 5), *((step, step + 1) for step in range(5, 11))]


def paused_job(
    cluster: Cluster, directory: Path, model: Path, state: Path, *, nodes: int, servers: int,
    het: bool = False, **env: str,
) -> Steps:  # fmt: skip
    """Ten steps that may be requeued once, of which four are served; ``het`` asks for two components."""
    together = [f"--nodes={nodes}"]
    apart = [f"--nodes={nodes - servers}", ":", f"--nodes={servers}", "--cpus-per-task=2"]
    job = Job(
        cluster,
        directory,
        "train_and_serve_het.sbatch" if het else "train_and_serve.sbatch",
        apart if het else together,
        [TRAINER, str(model), str(state), "10"],
        MODEL=str(model),
        **({} if het else {"SERVE_NODES": str(servers)}),
        MAX_REQUEUES="1",
        STEP_BY_STEP="1",
        **env,
    )
    steps = Steps(job, job, model, state, servers)
    steps.make(1, 2, 3, 4)
    job.wait_versions(BEFORE)
    return steps


def go_on(steps: Steps) -> None:
    """What a requeued job of the above must do until it is done."""
    job = steps.trains
    steps.requeued(4)
    steps.make(5, 6, 7, 8, 9, 10)
    job.wait_file("done")
    job.wait_versions(REQUEUED)
    assert job.told("RestartCnt") == "1"


@pytest.mark.parametrize("het", [False, True] if FULL else [False])
def test_a_requeued_job_goes_on_from_what_was_served(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path, record_property: Record, het: bool
) -> None:
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    steps = paused_job(breakable, tmp_path / "job", model, state, nodes=4, servers=2, het=het)
    job = steps.trains
    for name in breakable.names:  # jobs do not die with it, nor does the next signal
        breakable.replace_slurmd(name)
    ports = {api.url.rpartition(":")[2] for api in job.apis(model)}
    assert len(ports) == 2
    breakable.call("scancel", "--batch", "--signal=USR2", job.id)
    job.wait("to be requeued", lambda: "requeue 1 of 1" in job.text(), timeout_s=END_TIMEOUT_S)
    assert "exit 75" in job.text()
    go_on(steps)
    record_property(job.script, steps.found())
    job.release()
    job.wait_end("COMPLETED")
    assert job.exit_code == "0:0"
    assert_nothing_left(breakable)


IN_ROUNDS = "--bucket-bytes=65536"  # SERVE_FLAGS for rounds of many buckets, to be held between two of them


def cancel_in_a_round(steps: Steps) -> None:
    """Let a paused trainer begin a round, and cancel both jobs, or the one, while bytes are on the way."""
    trains, serves = steps.trains, steps.serves
    before, jobs = trains.versions(), dict.fromkeys((trains, serves))
    fault = Fault("delay", at="mid_bucket", bucket=1, seconds=JOB_TIMEOUT_S)
    with Armed(fault, trains.directory) as held:
        steps.begin(before[-1][0] + 1)
        trains.wait("to be in a round", lambda: held.fired)
        for job in jobs:
            job.cancel()
    for job in jobs:
        job.wait_end("CANCELLED")
    # The server whose bytes were held does not have that version. Another one may, if it was the last to go.
    served = [version for _, version in before]
    assert served in serves.flips()
    assert all(flips in (served, [*served, served[-1] + 1]) for flips in serves.flips())


@only_in_full("slurm")
@pytest.mark.parametrize("het", [False, True])
def test_a_job_that_is_cancelled_in_a_round_leaves_nothing(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path, het: bool
) -> None:
    directory, model = tmp_path / "job", checkpoint("qwen3", "float32", 0)
    steps = paused_job(
        breakable, directory, model, tmp_path / "state", nodes=4, servers=2, het=het, SERVE_FLAGS=IN_ROUNDS,
        BRIDGE_TEST_FAULTS=str(directory),
    )  # fmt: skip
    cancel_in_a_round(steps)
    assert steps.trains.told("RestartCnt") == "0"
    assert_nothing_left(breakable)


@only_in_full("slurm")
def test_slurm_itself_warns_ahead_of_the_time_limit_and_the_job_goes_on(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path, record_property: Record
) -> None:
    """Rounds go on until the script's own ``--signal`` comes, and end with one that is whole."""
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    job = Job(
        breakable,
        tmp_path / "job",
        "train_and_serve.sbatch",
        ["--nodes=4", f"--time={TIME_LIMIT_MIN}"],
        [TRAINER, str(model), str(state), "1000000"],
        MODEL=str(model),
        SERVE_NODES="2",
        MAX_REQUEUES="1",
        MORE_STEPS="2",
    )
    job.wait("the first version", job.versions)
    ends = datetime.fromisoformat(job.told("EndTime"))
    assert "USR2" not in job.text(), f"all of {TIME_LIMIT_MIN} min but five went by before the first version"
    # The next attempt stays away until the nodes that this one has left were looked at.
    partition = ("scontrol", "update", "PartitionName=all")
    breakable.call(*partition, "State=DOWN")
    job.wait("to be requeued", lambda: "requeue 1 of 1" in job.text() and job.told("State") == "PENDING")
    before = job.versions()
    last = len(before)
    assert before == [(step, step) for step in range(1, last + 1)]
    assert job.flips() == [list(range(1, last + 1))] * 2
    assert "is sent again" not in job.text()
    assert (state / "latest").read_text() == str(last)
    assert {path.name for path in job.directory.glob("stopped*")} == {f"stopped{rank}" for rank in range(4)}
    assert "exit 75" in job.text()
    found = re.search(r"^(\S+) \S+: USR2", job.text(), re.M)
    assert found is not None, job.text()[-6000:]
    left_s = (ends - datetime.combine(ends, time.fromisoformat(found[1]))).total_seconds() % 86400
    assert WARNED_S - BUSY_S <= left_s <= WARNED_S + EARLY_S
    record_property("warned_s_ahead", left_s)
    assert_nothing_left(breakable)
    assert job.told("State") == "PENDING"

    breakable.call(*partition, "State=UP")
    job.wait_file("done")
    job.wait_versions([*before, *((last + step, last + step + 1) for step in range(3))])
    job.wait_flips([[last + 1, last + 2, last + 3]] * 2, attempt=1)
    record_property("tokens_equal", assert_served(job, model, state, servers=2, attempt=1))
    assert job.told("RestartCnt") == "1"
    job.release()
    job.wait_end("COMPLETED")
    assert job.exit_code == "0:0"
    assert_nothing_left(breakable)


@only_in_full("slurm")
@pytest.mark.parametrize("grace_s", [0, 120])
def test_a_preempted_job_goes_on_behind_the_urgent_one(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path, record_property: Record, grace_s: int
) -> None:
    """Where there is a grace time, the warning comes first, and the script asks for the requeue itself."""
    breakable.call("scontrol", "update", "PartitionName=all", f"GraceTime={grace_s}")
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    steps = paused_job(breakable, tmp_path / "job", model, state, nodes=4, servers=2)
    job = steps.trains
    began, end = tmp_path / "began", tmp_path / "end"
    wait = f"touch {began}; until [ -e {end} ]; do sleep 0.2; done"
    options = ["--partition=urgent", "--nodes=4", "--exclusive", f"--output={tmp_path / 'urgent'}"]
    breakable.call("sbatch", *options, "--wrap", wait, cwd=tmp_path)
    job.wait("to give way", began.exists, timeout_s=END_TIMEOUT_S)
    assert job.told("State") == "PENDING"
    assert ("USR2" in job.text()) == ("exit 75" in job.text()) == (grace_s > 0)
    assert job.versions() == BEFORE
    # The next attempt stays away until the nodes that this one has left were looked at.
    partition = ("scontrol", "update", "PartitionName=all")
    breakable.call(*partition, "State=DOWN")
    end.touch()
    assert_nothing_left(breakable)
    assert job.told("State") == "PENDING"
    breakable.call(*partition, "State=UP")
    go_on(steps)
    record_property(job.script, steps.found())
    job.release()
    job.wait_end("COMPLETED")
    assert job.exit_code == "0:0"
    assert_nothing_left(breakable)


def submit_trainers(
    submit: Callable[..., Job],
    nodes: Sequence[str],
    words: Sequence[str],
    logdirs: Sequence[Path],
    **env: str,
) -> Job:
    """Trainers, a step at a sign, of servers that are another job's."""
    served = {"SERVE_NODES": "0", "BRIDGE_LOGDIRS": ":".join(map(str, logdirs)), "STEP_BY_STEP": "1"}
    return submit("train", "train_and_serve.sbatch", nodes, [TRAINER, *words], **served, **env)


def end_in_order(steps: Steps, cluster: Cluster) -> None:
    """The trainers have made all steps, and their servers, another job, are not wanted any more."""
    steps.trains.release()
    steps.trains.wait_end("COMPLETED")
    steps.serves.cancel()
    steps.serves.wait_end("CANCELLED")
    assert_nothing_left(cluster)


@pytest.mark.parametrize("nodes_per_server", [1, 2] if FULL else [2])
def test_two_jobs_on_the_same_nodes_and_what_scancel_leaves(
    cluster: Cluster, submit: Callable[..., Job], checkpoint: Callable[..., Path], tmp_path: Path,
    record_property: Record, nodes_per_server: int,
) -> None:  # fmt: skip
    """A heterogeneous job, and servers whose trainers are another job, at the same time on the same nodes.

    Of two nodes that serve, each has a server, or the second job has one server on both.
    """
    models = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    states = [tmp_path / "state0", tmp_path / "state1"]
    versions, servers, where = (10, 2, "node[3-4]") if FULL else (3, 1, "node3")
    nodes = ["--nodelist=node[1-2]", "--nodes=2"]
    het = submit(
        "het",
        "train_and_serve_het.sbatch",
        [*nodes, "--cpus-per-task=2", ":", f"--nodes={servers}", f"--nodelist={where}", "--cpus-per-task=2"],
        [TRAINER, str(models[0]), str(states[0]), str(versions)],
        MODEL=str(models[0]),
        STEP_BY_STEP="1",
    )
    serve = submit(
        "serve",
        "serve.sbatch",
        ["--nodes=2", "--nodelist=node[3-4]"],
        [],
        MODEL=str(models[1]),
        NODES_PER_SERVER=str(nodes_per_server),
        VLLM_FLAGS=f"{VLLM_FLAGS} --tensor-parallel-size={nodes_per_server}",
        SERVE_FLAGS=IN_ROUNDS,
    )
    serve.wait("to serve", lambda: "serving at" in serve.text())
    words = [str(models[1]), str(states[1]), str(versions + 1)]
    faults = {"BRIDGE_TEST_FAULTS": str(tmp_path / "train")}
    train = submit_trainers(submit, nodes, words, serve.logdirs(), **faults)
    both = (
        Steps(het, het, models[0], states[0], servers),
        Steps(train, serve, models[1], states[1], 2 // nodes_per_server),
    )
    for step in range(1, versions + 1):
        for steps in both:
            steps.begin(step)
        for steps in both:
            steps.check(step)
    for steps in both:
        steps.trains.wait_versions([(step, step) for step in range(1, versions + 1)])
        record_property(steps.serves.script, steps.found())
    assert trained_answers(models[0], states[0]) != trained_answers(models[1], states[1])

    cancel_in_a_round(both[1])
    het.release()
    het.wait_end("COMPLETED")
    assert het.exit_code == "0:0"
    assert_nothing_left(cluster)


@only_in_full("slurm")
def test_of_two_servers_of_two_nodes_each_one_is_lost_whole_and_comes_back(
    cluster: Cluster, submit: Callable[..., Job], checkpoint: Callable[..., Path], tmp_path: Path,
    record_property: Record,
) -> None:  # fmt: skip
    """With a worker on its second node; the other one gets the version meanwhile."""
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    serve = submit(
        "serve",
        "serve.sbatch",
        ["--nodes=4"],
        [],
        MODEL=str(model),
        NODES_PER_SERVER="2",
        VLLM_FLAGS=f"{VLLM_FLAGS} --tensor-parallel-size=2",
    )
    serve.wait("to serve", lambda: "serving at" in serve.text())
    words = [str(model), str(state), "4"]
    train = submit_trainers(submit, ["--nodes=2"], words, serve.logdirs(), TRAINERS_PER_NODE="1")

    steps = Steps(train, serve, model, state, servers=2)
    steps.make(1, 2)
    assert serve.flips() == [[1, 2], [1, 2]]
    worker = next(process for process in cluster.inside("node4") if "VLLM::Worker" in process.name())
    worker.kill()
    steps.begin(3)
    steps.wait_live(3)
    assert serve.flips()[0] == [1, 2, 3]
    serve.wait("it to be lost", lambda: "server 1 ended with 75" in serve.text())
    serve.wait("it to be there again", lambda: NOT_THE_CHECKPOINT in refusals(serve, model, servers=[1])[0])
    assert "server 1 ended with 75; starting it again (1 of 3)" in serve.text()
    steps.make(4)
    assert [number for number, _ in train.versions()] == [1, 2, 3, 4]
    record_property(serve.script, steps.found())
    end_in_order(steps, cluster)


@only_in_full("slurm")
def test_servers_that_are_requeued_get_the_next_version(
    cluster: Cluster, submit: Callable[..., Job], checkpoint: Callable[..., Path], tmp_path: Path,
    record_property: Record,
) -> None:  # fmt: skip
    """Their trainers are another job, which runs all the while and names the links to the last attempt."""
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    serve = submit("serve", "serve.sbatch", ["--nodes=2"], [], MODEL=str(model), MAX_REQUEUES="1")
    serve.wait("to serve", lambda: "serving at" in serve.text())
    links = sorted(serve.directory.glob("*/server-*"))
    assert len(links) == 2
    words = [str(model), str(state), "10"]
    # "all", or the one that is there first would have the version first
    train = submit_trainers(submit, ["--nodes=2"], words, links, BRIDGE_COMMIT="all")
    steps = Steps(train, serve, model, state, servers=2)
    steps.make(1, 2, 3, 4)
    cluster.call("scancel", "--batch", "--signal=USR2", serve.id)
    serve.wait("to be requeued", lambda: "requeue 1 of 1" in serve.text(), timeout_s=END_TIMEOUT_S)
    serve.wait(
        "them to be there again",
        lambda: all(NOT_THE_CHECKPOINT in said for said in refusals(serve, model, attempt=1)),
    )
    steps.make(5)
    assert serve.told("RestartCnt") == "1"
    steps.make(6, 7, 8, 9, 10)
    train.wait_versions([(step, step) for step in range(1, 11)])
    serve.wait_flips([[1, 2, 3, 4]] * 2)
    serve.wait_flips([[5, 6, 7, 8, 9, 10]] * 2, attempt=1)
    record_property(serve.script, steps.found())
    end_in_order(steps, cluster)


@only_in_full("slurm")
def test_one_node_trains_and_serves(
    cluster: Cluster, submit: Callable[..., Job], checkpoint: Callable[..., Path], tmp_path: Path,
    record_property: Record,
) -> None:  # fmt: skip
    """The launcher has the trainer beside the server, and ends with its exit code."""
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    words = [TRAINER, str(model), str(state), "10"]
    env = {"MODEL": str(model), "STEP_BY_STEP": "1"}
    job = submit("one", "train_and_serve.sbatch", ["--nodes=1"], words, **env)
    steps = Steps(job, job, model, state, servers=1)
    steps.make(*range(1, 11))
    job.wait_file("done")
    job.wait_versions([(step, step) for step in range(1, 11)])
    record_property(job.script, steps.found())
    job.release()
    job.wait_end("COMPLETED")
    assert job.exit_code == "0:0"
    assert_nothing_left(cluster)


@only_in_full("slurm")
@pytest.mark.parametrize("lost", ["node1", "node3"])
def test_a_lost_node_is_replaced_and_the_job_goes_on(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    """One that trains, with the batch script, or one that serves; there is a spare one."""
    node4 = ("scontrol", "update", "NodeName=node4")
    breakable.call(*node4, "State=DRAIN", "Reason=spare")
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    steps = paused_job(breakable, tmp_path / "job", model, state, nodes=3, servers=1)
    job = steps.trains
    breakable.call(*node4, "State=RESUME")
    breakable.crash(lost)
    steps.begin(5)
    job.wait("to be requeued", lambda: job.told("RestartCnt") == "1")
    go_on(steps)
    job.release()
    job.wait_end("COMPLETED")
    breakable.boot(lost)  # or it could not be looked at
    assert_nothing_left(breakable)


@only_in_full("slurm")
def test_slurmds_die_at_random_and_every_version_comes(
    breakable: Cluster, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """One in each step or right behind it, on any node; nobody notices."""
    chance = random.Random(1)
    model, state = checkpoint("qwen3", "float32", 0), tmp_path / "state"
    job = Job(
        breakable,
        tmp_path / "job",
        "train_and_serve.sbatch",
        ["--nodes=4"],
        [TRAINER, str(model), str(state), str(SLURMD_KILLS)],
        MODEL=str(model),
        SERVE_NODES="2",
        STEP_BY_STEP="1",
    )
    steps = Steps(job, job, model, state, servers=2)
    for step in range(1, SLURMD_KILLS + 1):
        steps.begin(step)
        threading.Event().wait(chance.uniform(0.0, 1.0))
        breakable.replace_slurmd(chance.choice(breakable.names))
        steps.check(step)
    job.wait_file("done")
    job.wait_versions([(step, step) for step in range(1, SLURMD_KILLS + 1)])
    assert job.told("RestartCnt") == "0"
    job.release()
    job.wait_end("COMPLETED")
    assert job.exit_code == "0:0"
    assert_nothing_left(breakable)
