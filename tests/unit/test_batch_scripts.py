"""The functions of slurm/common.sh, in a bash of their own; tests/slurm runs the scripts on a real SLURM."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from shlex import quote

import pytest

ROOT = Path(__file__).parents[2]
# What they call of SLURM: steps are plain processes here, listed in "steps", and scancel signals those.
COMMANDS = {
    "scancel": 'echo "scancel $1" >>calls; xargs -r kill "-${1#--signal=}" <steps 2>/dev/null; true',
    "scontrol": 'echo "scontrol $*" >>calls; exit "${REQUEUE_FAILS:-0}"',
    # A server's step says that it runs, and where it serves; of server 0 the first so many fail. By USR1 it
    # ends as one that cannot work. A trainer beside it comes once it is ready, and ends it.
    "srun": """
        for word; do
            i=$((i + 1))
            [[ $word != */server.sh ]] || server=${@:i+1:1} logdir=${@:i+2:1}
            [[ $word != */trainer.sh ]] || trainer=("${@:i}")
        done
        echo "srun ${server-trainer}" >>calls
        [[ -n $server ]] || exec "${trainer[@]}"
        if ((server == 0)) && (($(grep -c 'srun 0' calls) <= FAIL)); then exit 9; fi
        [[ ! -e $logdir/server.url ]] || echo "server.url of another" >>calls
        mkdir -p "$logdir"; trap 'rm "$logdir/server.url"; exit 0' TERM; trap 'exit 2' USR1
        echo $$ >>steps; touch "$logdir/server.url"
        if ((${#trainer[@]})); then touch "$logdir/trainer.log"; "${trainer[@]}"; exit; fi
        while :; do sleep 0.1; done""",
    "python": """
        echo "$*" >>calls
        case $3 in hosts) printf '%s\\n' $HOSTS ;; port) echo 4711 ;; address) echo 10.0.0.1 eth0 ;; esac
        [[ $2 == torch.* ]] || exit 0
        echo "after=$BRIDGE_VERSIONS_AFTER"
        exit "${TRAINER_ENDS:-0}\"""",
}


# start COMMAND: sets "pid"; returns once it has ended, or can be asked to.
START = """
start() {
    bash -c "$1" &
    pid=$!
    until grep -qx "$pid" steps || ! kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
}
"""


def run(tmp_path: Path, script: str, **env: str) -> tuple[int, list[str], str]:
    """Exit code, the calls of SLURM's commands, and what was printed."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    (tmp_path / "steps").touch()
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\nsource {ROOT}/slurm/common.sh\n{START}{script}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job", "SHUTDOWN_TIMEOUT": "10", **env,
        },
    )  # fmt: skip
    return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout + done.stderr


SERVER = """
mkdir -p job/attempt-1/server-0 job/attempt-0/server-0
[[ -z $VERSION ]] || echo '{"at": 1, "version": '$VERSION'}' >job/attempt-0/server-0/flips-rank0.jsonl
export SERVE_FLAGS JOB_DIR=$PWD/job PYTHON=$PWD/python START_TIMEOUT=9 SERVER_PEERS=
"$REPO/slurm/server.sh" 0 "$JOB_DIR/attempt-1/server-0" "" some/model --dtype=float32
"""


@pytest.mark.parametrize(
    ("version", "after", "flags", "told"),
    [
        ("", "0", "", ["first"]),
        ("0", "0", "", ["first"]),
        ("7", "0", "", ["never"]),  # an earlier attempt has served it
        ("", "12", "", ["never"]),  # servers whose logs lie elsewhere have
        ("7", "0", "--serve-checkpoint always", ["never", "always"]),  # the later one wins
    ],
)
def test_a_server_that_takes_anothers_place_answers_nothing_with_the_checkpoint(
    tmp_path: Path, version: str, after: str, flags: str, told: list[str]
) -> None:
    code, calls, text = run(
        tmp_path, SERVER, VERSION=version, BRIDGE_VERSIONS_AFTER=after, SERVE_FLAGS=flags, REPO=str(ROOT)
    )
    assert code == 0, text
    (serve,) = [call.split() for call in calls if call.startswith("-m bridge.launch serve")]
    own = serve[: serve.index("--")]
    assert [own[i + 1] for i, word in enumerate(own) if word == "--serve-checkpoint"] == told
    assert serve[serve.index("--") + 1 :] == ["some/model", "--port", "4711", "--dtype=float32"]


TERM = "scancel --signal=TERM"
REQUEUE = "scontrol requeue 7"
STAYS = "echo $$ >>steps; while :; do sleep 0.1; done"
SERVES = f"trap 'exit 0' TERM; {STAYS}"  # and ends in order
LOST = f"trap 'exit 75' TERM; {STAYS}"  # on its way out when it is asked to end
STUBBORN = f"trap '' TERM; {STAYS}"


@pytest.mark.parametrize(
    ("server", "trainer", "code"),
    [
        (SERVES, "exit 0", 0),
        (SERVES, "exit 1", 1),
        (LOST, "exit 1", 75),  # the trainer failed since the server did
        (LOST, "exit 0", 0),
        ("exit 75", SERVES, 75),
        ("exit 2", SERVES, 2),
        ("exit 0", SERVES, 75),  # somebody ended it
    ],
)
def test_the_jobs_exit_code(tmp_path: Path, server: str, trainer: str, code: int) -> None:
    script = f"start {quote(server)}; servers+=($pid); start {quote(trainer)}; trainer=$pid; work"
    found, calls, output = run(tmp_path, script, SERVER_RETRIES="0")
    assert (found, calls) == (code, [TERM]), output


@pytest.mark.parametrize(("fail", "starts"), [(1, 2), (9, 3)])
def test_a_server_that_ends_is_started_again(tmp_path: Path, fail: int, starts: int) -> None:
    """So often; then the other one serves on, and the job goes on with it."""
    last, times = ("srun 0", 2) if fail == 1 else ("given up", 1)
    script = f"""
        say() {{ echo "$*"; [[ $* != *"given up"* ]] || echo "given up" >>calls; }}
        train() {{ until (($(grep -cx "{last}" calls) == {times})); do sleep 0.05; done; }}
        start_servers 0 2 ""
        train & trainer=$!
        work"""
    found, calls, output = run(tmp_path, script, MODEL="m", SERVER_RETRIES="2", FAIL=str(fail))
    assert found == 0, output
    assert (calls.count("srun 0"), calls.count("srun 1"), calls.count(TERM)) == (starts, 1, 1)
    assert "server 0 ended with 9; starting it again (1 of 2)" in output
    assert ("server 0 ended with 9, and is given up; 1 serve on" in output) == (fail == 9)


@pytest.mark.parametrize(("retries", "code"), [("1", 0), ("0", 75)])
def test_a_server_that_had_served_may_do_so_again_whatever_its_code(
    tmp_path: Path, retries: str, code: int
) -> None:
    script = f"""
        train() {{ until (($(grep -cx "srun 0" calls) == 2)); do sleep 0.05; done; }}
        start_servers 0 1 ""
        await_servers
        train & trainer=$!
        kill -USR1 "${{servers[0]}}"
        ((SERVER_RETRIES)) || kill "$trainer"
        {"work" if retries == "1" else 'wait_for "${servers[@]}"; survive || end_steps "$code"'}"""
    found, calls, output = run(tmp_path, script, MODEL="m", SERVER_RETRIES=retries)
    assert (found, calls.count("srun 0")) == (code, 1 + int(retries)), output
    assert ("server 0 ended with 2; starting it again (1 of 1)" in output) == (code == 0)


@pytest.mark.parametrize(("fail", "code", "starts"), [(1, 0, 2), (9, 9, 3)])
def test_a_server_that_ends_before_all_are_ready_is_started_again(
    tmp_path: Path, fail: int, code: int, starts: int
) -> None:
    """Another job may have taken its port. So often; then the job has that server's code."""
    script = 'start_servers 0 2 ""; await_servers; end_steps 0'
    found, calls, output = run(tmp_path, script, MODEL="m", SERVER_RETRIES="2", FAIL=str(fail))
    assert (found, calls.count("srun 0"), calls.count("srun 1")) == (code, starts, 1), output
    assert "server 0 ended with 9; starting it again (1 of 2)" in output
    assert ("serving at" in output) == (code == 0)
    assert ("server 0 ended with 9 before all were ready" in output) == (code == 9)


def test_one_that_was_killed_is_not_taken_for_ready_while_it_starts_again(tmp_path: Path) -> None:
    script = """
        start_servers 0 1 ""
        await_servers
        kill -KILL "${servers[0]}"
        wait_for "${servers[0]}"
        survive
        await_servers
        end_steps 0"""
    found, calls, output = run(tmp_path, script, MODEL="m", FAIL="0")
    assert (found, calls) == (0, ["srun 0", "srun 0", TERM]), output


@pytest.mark.parametrize("warning", ["kill -USR2 $$", "end_steps 3"])
def test_a_pause_before_a_restart_holds_nothing_up(tmp_path: Path, warning: str) -> None:
    """Another server's death is seen meanwhile; a warning, or the end of the job, is the end of the pause."""
    script = f"""
        start_servers 0 2 ""
        retries[0]=11
        wait_for "${{servers[@]}}"
        survive
        until [[ -e ${{logdirs[1]}}/server.url ]]; do sleep 0.05; done
        kill -KILL "${{servers[1]}}"
        wait_for "${{servers[@]}}"
        survive
        until [[ -e ${{logdirs[1]}}/server.url ]]; do sleep 0.05; done
        {warning}
        wait_for "${{servers[0]}}"
        end_steps 3"""
    began = time.monotonic()
    found, calls, output = run(tmp_path, script, MODEL="m", SERVER_RETRIES="12", FAIL="9")
    assert (found, calls.count("srun 0"), calls.count("srun 1")) == (75 if "USR2" in warning else 3, 1, 2), (
        output
    )
    assert time.monotonic() - began < 25
    assert "server 0 ended with 9; starting it again (12 of 12)" in output
    assert "server 1 ended with 137; starting it again (1 of 12)" in output
    assert "server 0 is not started again" in output


@pytest.mark.parametrize(("again", "pause"), [(0, 0), (1, 2), (2, 4), (4, 16), (5, 30), (98, 30)])
def test_the_pause_before_a_restart_grows_and_ends_somewhere(tmp_path: Path, again: int, pause: int) -> None:
    script = f"""
        logdirs=(.) servers=(9) began=(0) served=(0) retries=({again}) ended=9 code=1
        start_server() {{ echo "server $1 in $2 s"; }}
        start_again"""
    assert f"server 0 in {pause} s" in run(tmp_path, script, SERVER_RETRIES="99")[2]


BATCH = {
    "one node": ("train_and_serve.sbatch", {"HOSTS": "n1", "SLURM_JOB_NUM_NODES": "1"}),
    "two nodes": ("train_and_serve.sbatch", {"HOSTS": "n1 n2", "SLURM_JOB_NUM_NODES": "2"}),
    "two components": (
        "train_and_serve_het.sbatch",
        {
            "HOSTS": "n1", "SLURM_HET_SIZE": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
            "SLURM_JOB_NODELIST_HET_GROUP_0": "n1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n2",
        },
    ),
}  # fmt: skip


def run_batch(tmp_path: Path, name: str, **env: str) -> tuple[int, list[str], str]:
    script, variables = BATCH[name]
    found = {"REPO": str(ROOT), "PYTHON": str(tmp_path / "python"), "SLURM_PROCID": "0", "MODEL": "m"}
    return run(tmp_path, f"set -- train.py\nsource {ROOT}/slurm/{script}", **found, **variables, **env)


@pytest.mark.parametrize("name", BATCH)
def test_torchruns_port_is_looked_for_when_the_trainers_start(tmp_path: Path, name: str) -> None:
    """Another job may take one that was found before the servers started."""
    code, calls, output = run_batch(tmp_path, name, FAIL="0")
    assert code == 0, output
    first, *rest = [call for call in calls if call != "srun trainer"]
    assert first.startswith("-m bridge.nodes hosts"), calls
    assert rest[:3] == ["srun 0", "-m bridge.nodes port", "-m bridge.nodes address n1"], calls
    assert "--rdzv-endpoint=n1:4711 " in rest[3], calls


@pytest.mark.parametrize(
    ("fail", "ends", "code", "starts"),
    [(1, 0, 0, 2), (9, 0, 9, 3), (0, 1, 1, 1)],
    ids=["once", "ever", "not"],
)
def test_a_server_is_started_again_until_the_trainer_beside_it_has_started(
    tmp_path: Path, fail: int, ends: int, code: int, starts: int
) -> None:
    """On a job's only node, where the server's launcher ends with the trainer's code."""
    found, calls, output = run_batch(
        tmp_path, "one node", FAIL=str(fail), TRAINER_ENDS=str(ends), SERVER_RETRIES="2"
    )
    assert (found, calls.count("srun 0")) == (code, starts), output


def test_the_last_server_that_is_given_up_ends_the_job(tmp_path: Path) -> None:
    script = f'start_servers 0 1 ""; start {quote(SERVES)}; trainer=$pid; work'
    found, calls, output = run(tmp_path, script, MODEL="m", SERVER_RETRIES="1", FAIL="9")
    assert (found, calls.count("srun 0")) == (9, 2), output
    assert "a server ended before the trainers, with 9" in output


def test_trainers_that_fail_while_a_server_is_away_may_try_again(tmp_path: Path) -> None:
    script = """
        start_servers 0 2 ""
        await_servers
        rm "${logdirs[1]}/server.url" # as its launcher does when vLLM has died
        bash -c 'exit 1' & trainer=$!
        work"""
    found, _, output = run(tmp_path, script, MODEL="m", FAIL="0")
    assert found == 75, output
    assert "the trainers ended with 1 while these did not serve" in output


def test_a_task_of_a_job_array_speaks_for_itself(tmp_path: Path) -> None:
    """Its first task has the id that stands for all."""
    script = f"start {quote(SERVES)}; trainer=$pid; kill -USR2 $$; wait_for $pid; finish 75"
    found, calls, output = run(
        tmp_path, script, MAX_REQUEUES="1", STOP_TIMEOUT="1", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3"
    )
    assert (found, calls) == (75, [TERM, "scontrol requeue 7_3"]), output


def test_a_requeue_that_fails_leaves_the_exit_code(tmp_path: Path) -> None:
    found, calls, output = run(tmp_path, "finish 75", MAX_REQUEUES="1", REQUEUE_FAILS="1")
    assert (found, calls) == (75, [REQUEUE] * 3), output
    assert "it was not requeued" in output


@pytest.mark.parametrize(("epoch", "requeued"), [("", True), ("1", True), ("2", False)])
def test_a_warned_job_is_requeued_so_often(tmp_path: Path, epoch: str, requeued: bool) -> None:
    """The trainer sees the file, and ends with torchrun's 1."""
    trainer = "until [[ -e $BRIDGE_STOP_FILE ]]; do sleep 0.1; done; exit 1"
    script = f"bash -c '{trainer}' & trainer=$!\nkill -USR2 $$\nwork"
    found, calls, output = run(tmp_path, script, MAX_REQUEUES="2", SLURM_RESTART_COUNT=epoch)
    assert (found, calls) == (75, [REQUEUE] * requeued), output
    assert (tmp_path / f"logs/job-7/attempt-{epoch or 0}/stop").exists()


def test_a_warned_job_that_has_finished_is_done(tmp_path: Path) -> None:
    script = "bash -c 'sleep 0.3' & trainer=$!\nkill -USR2 $$\nwork"
    assert run(tmp_path, script, MAX_REQUEUES="2")[:2] == (0, [])


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("end", ["KILL", "USR1"])
def test_a_server_that_ends_after_the_warning_does_not_end_the_trainers(
    tmp_path: Path, servers: int, end: str
) -> None:
    """They end at the boundary of their round, and save; nothing is started again."""
    trainer = """
        trap 'exit 1' TERM; echo $$ >>steps
        until [[ -e $BRIDGE_STOP_FILE && -e gone ]]; do sleep 0.05; done
        : >saved; exit 75"""
    script = f"""
        say() {{ echo "$*"; [[ $* != *"given up"* ]] || : >gone; }}
        start_servers 0 {servers} ""
        await_servers
        start {quote(trainer)}; trainer=$pid
        kill -USR2 $$
        kill -{end} ${{servers[0]}}
        work"""
    found, calls, output = run(tmp_path, script, MODEL="m", FAIL="0")
    assert (found, (tmp_path / "saved").exists()) == (75, True), output
    assert calls.count("srun 0") == 1
    assert f"is given up; {servers - 1} serve on" in output


def test_servers_alone_that_all_end_after_the_warning_end_the_job(tmp_path: Path) -> None:
    """Of two the other one serves on until it is asked to end."""
    script = """
        say() { echo "$*"; [[ $* != *"given up"* ]] || kill -KILL "${servers[1]}"; }
        start_servers 0 2 ""
        await_servers
        kill -USR2 $$
        kill -KILL "${servers[0]}"
        while wait_for "${servers[@]}" && survive; do :; done
        end_steps $EX_TEMPFAIL"""
    found, calls, output = run(tmp_path, script, MODEL="m", FAIL="0")
    assert (found, calls.count(TERM)) == (75, 0), output


def test_who_does_not_look_at_the_file_is_ended_later(tmp_path: Path) -> None:
    script = f'start {quote(SERVES)}; servers+=($pid); kill -USR2 $$; wait_for $pid; end_steps "$EX_TEMPFAIL"'
    found, calls, output = run(tmp_path, script, STOP_TIMEOUT="1")
    assert (found, calls) == (75, [TERM]), output


def test_who_does_not_end_is_killed(tmp_path: Path) -> None:
    script = f"start {quote(STUBBORN)}; servers+=($pid); end_steps 1"
    found, calls, output = run(tmp_path, script, SHUTDOWN_TIMEOUT="1")
    assert (found, calls) == (1, [TERM, "scancel --signal=KILL"]), output


def flipped(logdir: Path, rank: int, *versions: int) -> None:
    logdir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"rank": rank, "version": v, "flip_ns": 99, "batch": 40}) for v in versions]
    (logdir / f"flips-rank{rank}.jsonl").write_text("\n".join(lines) + "\n")


def test_numbers_go_on_above_what_any_attempt_has_served(tmp_path: Path) -> None:
    """Of this job or, where it only trains, of the servers' job; whatever number it was given besides."""
    script = 'set_versions; echo "after=$BRIDGE_VERSIONS_AFTER"'
    assert "after=0\n" in run(tmp_path, script)[2]
    job, serve = (tmp_path / "logs" / name for name in ("job-7", "serve-6"))
    flipped(job / "attempt-0/server-0", 0, 1, 2, 11)
    flipped(job / "attempt-0/server-1", 1, 12)
    flipped(job / "attempt-1/server-0", 0, 3)
    assert "after=12\n" in run(tmp_path, script, SLURM_RESTART_COUNT="2")[2]

    def trainers_only(*logdirs: Path, after: str = "") -> tuple[int, list[str], str]:
        named = ":".join(map(str, logdirs))
        return run_batch(
            tmp_path, "two nodes", SERVE_NODES="0", BRIDGE_LOGDIRS=named, BRIDGE_VERSIONS_AFTER=after
        )

    (serve / "attempt-1").mkdir(parents=True)
    for server in (0, 1):  # as serve.sbatch leads to the last attempt's, which no launcher has made yet
        (serve / f"server-{server}").symlink_to(serve / f"attempt-1/server-{server}")
    links = (tmp_path / "not/begun/server-0", serve / "server-0", serve / "server-1")
    code, _, output = trainers_only(*links)
    assert (code, "after=12\n" in output) == (0, True), output
    flipped(serve / "attempt-0/server-0", 0, 13, 14)
    flipped(serve / "attempt-1/server-1", 0, 1)
    assert "after=14\n" in trainers_only(*links)[2]
    assert "after=14\n" in trainers_only(serve / "attempt-1/server-1")[2]
    assert "after=20\n" in trainers_only(*links, after="20")[2]
    flipped(tmp_path / "by hand", 0, 15)
    assert "after=15\n" in trainers_only(*links, tmp_path / "by hand")[2]


def test_servers_elsewhere_do_not_count_in_a_job_that_has_its_own(tmp_path: Path) -> None:
    flipped(tmp_path / "old", 0, 40)
    for name in ("one node", "two nodes"):
        code, _, output = run_batch(tmp_path, name, FAIL="0", BRIDGE_LOGDIRS=str(tmp_path / "old"))
        assert (code, "after=0\n" in output) == (0, True), output


def pauses(tmp_path: Path, mends: str = "") -> None:
    """Pauses are listed among the calls, and take no time; ``mends`` is run in each."""
    (tmp_path / "sleep").write_text(f'#!/bin/bash\necho "sleep $1" >>calls\n{mends}\n')
    (tmp_path / "sleep").chmod(0o755)


@pytest.mark.parametrize("job", ["job-7", "serve-6"])
@pytest.mark.parametrize("what", ["a log", "a link to nothing"])
def test_numbers_do_not_begin_again_where_one_log_cannot_be_read(tmp_path: Path, what: str, job: str) -> None:
    logdir = tmp_path / f"logs/{job}/attempt-0/server-0"
    logdir.mkdir(parents=True)
    (logdir / "flips-rank0.jsonl").write_text('{"rank": 0, "version": 12}\n')
    if what == "a log":
        (logdir / "flips-rank1.jsonl").mkdir()  # root may read any file, but no directory
    else:
        (logdir / "flips-rank1.jsonl").symlink_to("gone")
    pauses(tmp_path)
    script = 'set_versions; echo "after=$BRIDGE_VERSIONS_AFTER"'
    found, calls, output = run(tmp_path, script, BRIDGE_LOGDIRS=str(logdir))
    assert (found, "after=" in output) == (75, False), output
    assert sum(int(call.removeprefix("sleep ")) for call in calls) == 20, calls
    assert "what earlier attempts have served could not be read" in output
    assert "for 20 s" in output
    assert "flips-rank1.jsonl" in output


@pytest.mark.parametrize("since", [1, 4])
def test_a_log_that_cannot_be_read_for_a_moment_counts(tmp_path: Path, since: int) -> None:
    logdir = tmp_path / "logs/job-7/attempt-0/server-0"
    logdir.mkdir(parents=True)
    (logdir / "flips-rank0.jsonl").write_text('{"rank": 0, "version": 12}\n')
    (logdir / "flips-rank1.jsonl").symlink_to("back")
    back = quote(str(logdir / "back"))
    pauses(tmp_path, f"""(($1 < {2 * since})) || echo '{{"rank": 1, "version": 13}}' >{back}""")
    found, calls, output = run(tmp_path, 'set_versions; echo "after=$BRIDGE_VERSIONS_AFTER"')
    assert (found, calls) == (0, [f"sleep {2 * (number + 1)}" for number in range(since)]), output
    assert "after=13\n" in output


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({}, "MODEL is not set"),
        ({"MODEL": "m", "NODES_PER_SERVER": "2"}, "1 node(s) to serve cannot be divided"),
        ({"MODEL": "m", "NODES_PER_SERVER": "0"}, "servers of NODES_PER_SERVER=0 nodes"),
        ({"MODEL": "m", "SLURM_JOB_NAME": "a:b"}, "logs/a:b-7, but a ':' separates servers"),
        ({"MODEL": "m", "BRIDGE_VERSIONS_AFTER": "v3"}, "BRIDGE_VERSIONS_AFTER is v3, and must be a number"),
        ({"MODEL": "m", "LOGROOT": "x:y"}, "would be x:y/job-7, but a ':' separates servers"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, env: dict[str, str], why: str) -> None:
    code, _, output = run(tmp_path, 'start_servers 0 1 ""', **env)
    assert code == 2
    assert why in output
