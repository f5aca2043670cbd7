"""The supervisor over real processes and real signals: who dies, what happens to the rest, what is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.serving import free_port, stop
from vllm_patching.channel import is_kept

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "support" / "stand_ins.py"
END_TIMEOUT_S = 60.0

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


def poll_until(what: str, predicate: Callable[[], object], timeout_s: float = END_TIMEOUT_S) -> None:
    """Wait for a condition of another process; fail naming it."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        pause.wait(0.05)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; an orphan that ended is a zombie here, as the tests' process adopts orphans."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launched:
    """A launcher with stand-ins, and everything it could leave behind."""

    def __init__(
        self, tmp_path: Path, *flags: str, prefix: tuple[str, ...] = (), output: Path | int | None = None
    ) -> None:
        self.logdir = tmp_path / "logs"
        self.logdir.mkdir(exist_ok=True)
        self.run_dir = Path(f"/tmp/bridge-test-{uuid.uuid4().hex[:8]}")  # short, as socket paths must be
        self.shm_file = Path(f"/dev/shm/bridge-test-{uuid.uuid4().hex[:8]}")
        self.output = output or tmp_path / "launcher.out"
        self.pids = tmp_path / "pids"
        argv = [*prefix, sys.executable, str(STAND_INS), "launch", "--run-dir", str(self.run_dir)]
        argv += ["--logdir", str(self.logdir), "--shm-file", str(self.shm_file), "--pids", str(self.pids)]
        argv += ["--port", str(free_port()), *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env.pop("PYTHONUNBUFFERED", None)  # as users run it
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env)
        self.tree: list[psutil.Process] = []

    @property
    def text(self) -> str:
        return self.output.read_text()

    def see_tree(self) -> dict[str, psutil.Process]:
        """Remember every process below the launcher, and name those we know."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.tree += [p for p in below if p not in self.tree]
        roles = {}
        for process in below:
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:  # an orphan that the launcher has yet to reap
                continue
            if len(words) > 2 and str(STAND_INS) in words:
                roles[words[2]] = process
        return roles

    def wait_ready(self) -> dict[str, psutil.Process]:
        poll_until(
            f"ready\n{self.text}", lambda: "ready after" in self.text or self.process.poll() is not None
        )
        assert self.process.poll() is None, self.text
        assert self.shm_file.exists()
        return self.see_tree()

    def wait_end(self) -> int:
        code = self.process.wait(END_TIMEOUT_S)
        self.assert_nothing_left()
        return code

    def assert_nothing_left(self) -> None:
        poll_until("all processes end", lambda: not any(_lives(p) for p in self.tree))
        poll_until(f"{self.shm_file} is removed", lambda: not self.shm_file.exists())
        poll_until(f"{self.run_dir} is removed", lambda: not self.run_dir.exists())


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*flags: str, **options: Any) -> Launched:
        started.append(Launched(tmp_path, *flags, **options))
        return started[-1]

    yield start
    for launched in started:  # only after a failed assertion is anything left here
        if launched.process.poll() is None:
            launched.see_tree()
            launched.process.kill()
            launched.process.wait()
        for process in launched.tree:
            if process.is_running():
                process.kill()
        launched.shm_file.unlink(missing_ok=True)


def test_sigterm_ends_everything_in_order(launch):
    launched = launch()
    roles = launched.wait_ready()
    assert set(roles) == {"vllm", "engine", "daemon"}
    # Siblings, each the leader of a session of its own: a terminal's Ctrl-C must reach the launcher alone.
    assert roles["vllm"].ppid() == roles["daemon"].ppid() == launched.process.pid
    assert os.getsid(roles["vllm"].pid) == roles["vllm"].pid
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text
    assert f"[vllm] stand-in vLLM pid {roles['vllm'].pid}" in launched.text
    assert "an engine or a worker, has ended" not in launched.text, "they were asked to"
    assert f"[daemon] stand-in daemon pid {roles['daemon'].pid}" in launched.text
    assert f"stand-in vLLM pid {roles['vllm'].pid}" in (launched.logdir / "vllm.log").read_text()


def test_a_launcher_under_nohup_does_not_end_with_its_terminal(launch):
    launched = launch(prefix=("nohup",))
    launched.wait_ready()
    launched.process.send_signal(signal.SIGHUP)  # the lower number: of two that wait the first to be seen
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text
    assert "SIGTERM: shutting down" in launched.text


def test_the_run_directory_is_locked_while_the_launcher_or_the_daemon_lives(launch):
    launched = launch()
    roles = launched.wait_ready()
    stop(launched.process.pid)  # nobody starts another daemon
    roles["daemon"].kill()
    poll_until("its end", lambda: not _lives(roles["daemon"]))
    assert is_kept(launched.run_dir), "of the launcher alone"
    os.kill(launched.process.pid, signal.SIGCONT)
    poll_until("the daemon is back", lambda: "the daemon is back" in launched.text)
    again = launched.see_tree()
    stop(again["daemon"].pid)
    launched.process.kill()
    launched.process.wait()
    assert is_kept(launched.run_dir), "of the daemon alone"
    os.kill(again["daemon"].pid, signal.SIGCONT)
    launched.assert_nothing_left()


def test_sigkill_of_the_launcher_leaves_nothing(launch):
    launched = launch()
    launched.wait_ready()
    launched.process.kill()
    assert launched.wait_end() == -signal.SIGKILL


def test_what_a_launch_left_that_was_killed_with_all_it_had_started_goes_with_the_next_one(launch):
    """As Slurm kills a step whose srun has died: nobody is there to clean up."""
    killed = launch()
    roles = killed.wait_ready()
    stop(killed.process.pid)
    for role in ("daemon", "vllm", "engine"):
        roles[role].kill()
    killed.process.kill()
    killed.process.wait()
    assert killed.shm_file.exists()
    again = launch()
    again.wait_ready()
    assert not killed.shm_file.exists()
    assert not killed.run_dir.exists()
    assert f"removed {killed.shm_file}, left behind by an earlier launch that was killed" in again.text
    third = launch()  # by mistake
    poll_until("a word on it", lambda: "another launch with this log directory lives" in third.text)
    for launched in (third, again):
        launched.see_tree()
        launched.process.terminate()
        assert launched.wait_end() in (0, 128 + signal.SIGTERM)
    assert list(again.logdir.glob("leftovers-*")) == []


def test_sigkill_of_vllm_ends_the_rest_and_names_it(launch):
    launched = launch()
    roles = launched.wait_ready()
    roles["vllm"].kill()  # its engine is an orphan now
    assert launched.wait_end() == 75, launched.text
    assert f"vllm (pid {roles['vllm'].pid}) was killed by SIGKILL" in launched.text
    assert f"removed {launched.shm_file}" in launched.text


def test_vllm_is_restarted_until_it_dies_too_often(launch):
    launched = launch("--server-restarts", "2", "--trainer", "import signal; signal.pause()")
    first = launched.wait_ready()
    argv = first["vllm"].cmdline()
    first["vllm"].kill()  # its engine is an orphan, and maps a file in /dev/shm
    poll_until("vLLM is back", lambda: launched.text.count("vLLM is back") == 1)
    second = launched.see_tree()
    assert (
        f"vllm (pid {first['vllm'].pid}) was killed by SIGKILL; starting it again once it has let go (1 of 2)"
        in (launched.text)
    )
    assert second["vllm"].pid != first["vllm"].pid
    assert second["vllm"].cmdline() == argv
    assert not _lives(first["engine"])
    assert f"removed {launched.shm_file}, left behind by vLLM" in launched.text
    assert launched.shm_file.exists(), "the new engine has one of its own"
    assert second["daemon"].pid == first["daemon"].pid
    second["engine"].kill()  # vLLM's API server ends by itself then, and so does the stand-in
    poll_until("vLLM is back again", lambda: launched.text.count("vLLM is back") == 2)
    third = launched.see_tree()
    assert "starting it again in 1 s (2 of 2)" in launched.text
    third["vllm"].kill()
    assert launched.wait_end() == 75, launched.text
    assert f"vllm (pid {third['vllm'].pid}) was killed by SIGKILL, after 2 restart(s)" in launched.text


@pytest.mark.parametrize("mode", ["outlive", "deaf"])
def test_an_api_server_that_outlives_its_engine_is_ended_and_started_again(launch, mode):
    launched = launch("--server-restarts", "1", "--vllm-mode", mode, "--outlive", "4")
    first = launched.wait_ready()
    vllm, engine = first["vllm"].pid, first["engine"].pid
    first["engine"].kill()
    poll_until("vLLM is back", lambda: "vLLM is back" in launched.text)
    assert f"vLLM's process {engine}, an engine or a worker, has ended" in launched.text
    assert f"asking vllm (pid {vllm}) to end behind process {engine}" in launched.text
    made_to = f"vllm (pid {vllm}) outlives its engine or workers by 4 s"
    assert (made_to in launched.text) == (mode == "deaf")
    second = launched.see_tree()
    assert second["vllm"].pid != first["vllm"].pid
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text


def test_a_vllm_that_the_daemon_has_lost_is_ended_and_started_again(launch):
    launched = launch("--server-restarts", "1", "--outlive", "1")
    first = launched.wait_ready()
    lost = Path(f"{launched.pids}.lost")
    lost.touch()
    poll_until("its end", lambda: "starting it again once it has let go (1 of 1)" in launched.text)
    assert f"vllm (pid {first['vllm'].pid}) outlives its engine or workers by 1 s" in launched.text
    lost.unlink()
    poll_until("vLLM is back", lambda: "vLLM is back" in launched.text)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text


def test_a_restarted_vllm_that_does_not_come_up_is_another_death(launch):
    launched = launch("--server-restarts", "1", "--vllm-mode", "once")
    roles = launched.wait_ready()
    roles["vllm"].kill()
    assert launched.wait_end() == 75, launched.text
    assert "ended with exit code 9, after 1 restart(s), as many as --max-server-restarts" in launched.text


def test_sigterm_while_vllm_comes_back_ends_everything(launch):
    launched = launch("--server-restarts", "1")
    roles = launched.wait_ready()
    Path(f"{launched.pids}.lost").touch()  # and it will not be back before it is asked to end
    roles["vllm"].kill()
    poll_until("the launcher to know", lambda: "starting it again" in launched.text)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text
    assert "vLLM is back" not in launched.text


def test_daemon_is_restarted_until_it_dies_too_often(launch):
    launched = launch()
    first = launched.wait_ready()["daemon"]
    argv = first.cmdline()
    first.kill()
    poll_until("the daemon is back", lambda: "the daemon is back" in launched.text)
    roles = launched.see_tree()
    assert f"daemon (pid {first.pid}) was killed by SIGKILL; restarting it (1 of 1)" in launched.text
    assert roles["daemon"].pid != first.pid
    assert roles["daemon"].cmdline() == argv
    assert roles["vllm"].is_running()
    roles["daemon"].kill()
    assert launched.wait_end() == 75, launched.text
    assert f"daemon (pid {roles['daemon'].pid}) was killed by SIGKILL, after 1 restart(s)" in launched.text


def test_a_daemon_that_answers_nobody_is_replaced(launch):
    launched = launch()
    roles = launched.wait_ready()
    os.kill(roles["daemon"].pid, signal.SIGSTOP)
    poll_until("the launcher to kill it", lambda: "has not answered for 3 s; killing it" in launched.text)
    poll_until("a new daemon", lambda: "the daemon is back" in launched.text)
    assert launched.see_tree()["daemon"].pid != roles["daemon"].pid
    assert roles["vllm"].is_running()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text


def test_a_run_directory_that_is_deleted_is_the_end_and_is_named(launch):
    launched = launch()
    roles = launched.wait_ready()
    shutil.rmtree(launched.run_dir)
    assert launched.wait_end() == 75, launched.text
    said = f"the daemon (pid {roles['daemon'].pid}) lives, but {launched.run_dir}/daemon.sock is gone"
    assert said in launched.text
    assert "--run-dir" in launched.text
    assert "killing it" not in launched.text


def test_a_daemon_that_answers_nobody_while_vllm_is_dead_is_replaced(launch):
    """A dead vLLM is started again only when the daemon has let go of it, which a hung one never says."""
    launched = launch("--server-restarts", "1")
    roles = launched.wait_ready()
    os.kill(roles["daemon"].pid, signal.SIGSTOP)
    roles["vllm"].kill()
    poll_until("vLLM to be back", lambda: "vLLM is back" in launched.text, timeout_s=2 * END_TIMEOUT_S)
    assert "has not answered for 3 s; killing it" in launched.text
    after = launched.see_tree()
    assert {after[name].pid for name in roles}.isdisjoint(process.pid for process in roles.values())
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text


def test_trainer_starts_when_ready_and_gives_the_exit_code(launch):
    launched = launch("--trainer", "import sys; print('training'); sys.exit(7)")
    assert launched.process.wait(END_TIMEOUT_S) == 7, launched.text
    launched.assert_nothing_left()
    assert launched.text.index("ready after") < launched.text.index("[trainer] training")


def test_interrupted_trainer_did_not_succeed(launch):
    launched = launch("--trainer", "import signal; print('training', flush=True); signal.pause()")
    launched.wait_ready()
    poll_until("the trainer runs", lambda: "[trainer] training" in launched.text)
    launched.see_tree()
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait_end() == 128 + signal.SIGINT, launched.text


def test_stubborn_vllm_is_killed_after_the_shutdown_timeout(launch):
    launched = launch("--vllm-mode", "stubborn", "--shutdown-timeout", "1")
    launched.wait_ready()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text
    assert "did not end in time; killing them" in launched.text


@pytest.mark.parametrize("reason", ["full", "closed"])
def test_a_launcher_whose_output_is_lost_serves_on_and_ends_in_order(launch, reason):
    """As nohup.out on a full file system, and as a terminal that was closed."""
    near, output = os.openpty() if reason == "closed" else (None, Path("/dev/full"))
    launched = launch("--vllm-mode", "stubborn", "--shutdown-timeout", "1", output=output)
    if near is not None:
        os.close(near)
    url = launched.logdir / "server.url"
    poll_until("ready", url.exists)
    first = launched.see_tree()
    first["daemon"].kill()
    log = launched.logdir / "daemon.log"
    poll_until("a new daemon", lambda: log.read_text().count("stand-in daemon pid") == 2)
    launched.see_tree()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0
    assert not url.exists()


def test_a_log_directory_that_is_away_is_in_nobodys_way(launch):
    launched = launch("--server-restarts", "1", "--outlive", "2")
    first = launched.wait_ready()
    url, away = launched.logdir / "server.url", launched.logdir.with_name("away")

    def unmount() -> None:
        launched.logdir.rename(away)
        launched.logdir.touch()  # whatever is done below it is an error now

    def mount() -> None:
        launched.logdir.unlink()
        away.rename(launched.logdir)

    unmount()
    first["vllm"].kill()
    poll_until("vLLM is back", lambda: "vLLM is back" in launched.text)
    launched.see_tree()["daemon"].kill()
    poll_until("the daemon is back", lambda: "the daemon is back" in launched.text)
    launched.see_tree()
    assert f"{url} cannot be removed: Not a directory" in launched.text
    assert f"{launched.logdir / 'vllm.log'} cannot be written: Not a directory" in launched.text
    (away / url.name).unlink()  # which could not be done
    mount()
    poll_until("clients are told where the server is", url.exists)
    unmount()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_end() == 0, launched.text
    assert launched.text.count(f"{url} cannot be removed") == 2, "said once each time"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--vllm-mode", "die"), 1, "ended with exit code 9 before the server was ready"),
        (("--vllm-mode", "sick", "--start-timeout", "3"), 75, "vLLM does not answer at http://127.0.0.1:"),
        (("--daemon-mode", "refuse"), 2, "ended with exit code 2: it refuses its configuration"),
        (("--daemon-mode", "wait"), 2, "the bridge's plugin did not load. VLLM_PLUGINS is not set"),
    ],
)
def test_failed_start_says_why(launch, monkeypatch, flags, code, said):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    launched = launch(*flags)
    assert launched.wait_end() == code, launched.text
    assert said in launched.text
