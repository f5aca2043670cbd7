"""What a launcher does about deaths, and leaves behind when it ends everything by an error."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge import flight
from bridge.errors import PeerLost
from launch import process
from launch.commands import Command
from launch.options import ServeOptions, ServerView
from launch.process import Child
from launch.supervisor import Launch, Limits, Supervisor
from vllm_patching import residue


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """One whose children are processes that nobody started, and which ends nothing."""
    monkeypatch.setattr(flight, "_who", ("launcher", None))
    flight._events.clear()
    monkeypatch.setattr(process, "become_subreaper", lambda: None)
    pids = iter(range(100, 200))

    def start(command: Command, _: Path) -> Child:
        popen: Any = SimpleNamespace(pid=next(pids), returncode=None)
        return Child(command, popen)

    monkeypatch.setattr(process, "start", start)
    monkeypatch.setattr(Supervisor, "_shut_down", lambda self: self._relay.close())
    return Supervisor(
        Launch(
            vllm=Command(name="vllm", argv=(), env={}),
            daemon=Command(name="daemon", argv=(), env={}),
            trainer=None,
            server=ServerView(bind_host="127.0.0.1", connect_host="127.0.0.1", port=1),
            public_url="http://127.0.0.1:1",
            run_dir=tmp_path / "run",
            logdir=tmp_path,
            limits=Limits(start_timeout_s=5, shutdown_timeout_s=5, max_daemon_restarts=1),
        )
    )


def test_a_daemon_that_dies_at_each_start_is_given_time(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full file system: some seconds of that must not use up the restarts."""
    clock, deaths = [1000.0], []

    def reap(_: float) -> None:
        if (child := supervisor.children["daemon"]).alive:
            child.end(1 << 8)
            deaths.append(clock[0])

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(supervisor, "_wait", reap)
    supervisor._daemon_restarts.limit = ServeOptions.max_daemon_restarts
    supervisor._start(supervisor.launch.daemon)
    supervisor._ready = True

    def live() -> None:
        while True:
            supervisor._step()
            clock[0] += 0.25
            assert clock[0] < (supervisor._daemon_due or 0), "the workers have not been waited for yet"

    with pytest.raises(PeerLost, match="as many as --max-daemon-restarts allows"):
        live()
    assert [round(after - before) for before, after in pairwise(deaths)] == [0, 1, 2, 4, 8]
    supervisor._relay.close()


def test_shared_memory_is_remembered_as_long_as_it_is_there(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting, passing = tmp_path / "lasting", tmp_path / "passing"
    lasting.touch()
    passing.touch()
    mapped = {lasting, passing}
    monkeypatch.setattr(supervisor, "_tree", lambda: [1])
    monkeypatch.setattr(residue, "snapshot", lambda pids: mapped if pids else set())
    supervisor._observe(every_s=0.0)
    assert supervisor._shm == {lasting, passing}
    mapped = set()
    passing.unlink()
    supervisor._observe(every_s=0.0)
    assert supervisor._shm == {lasting}, "its process may be dead"


def test_a_launcher_that_gives_up_leaves_a_record(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = iter([(100, signal.SIGKILL), (102, 75 << 8)])

    died: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "waitpid", lambda *_: died.pop() if died else (0, 0))

    def live(_: object) -> int:
        supervisor._start(supervisor.launch.daemon)
        supervisor._start(supervisor.launch.vllm)
        for death in deaths:
            died.append(death)
            supervisor._step()
        raise AssertionError("the second death is the end")

    monkeypatch.setattr(supervisor, "_live", live)
    assert supervisor.run() == PeerLost.exit_code
    (record,) = tmp_path.glob("flight-*")
    assert record.name == f"flight-launcher-{os.getpid()}.jsonl"
    head, *events = [json.loads(line) for line in record.read_text().splitlines()]
    assert head["why"].startswith("the launcher ends by PeerLost: daemon (pid 102) ended with exit code 75")
    assert [(e["event"], e.get("child"), e.get("pid") or e.get("count") or e.get("how")) for e in events] == [
        ("started", "daemon", 100),
        ("started", "vllm", 101),
        ("ended", "daemon", "daemon (pid 100) was killed by SIGKILL"),
        ("restart", "daemon", 1),
        ("started", "daemon", 102),
        ("ended", "daemon", "daemon (pid 102) ended with exit code 75"),
        ("ends", None, None),
    ]
