"""Log lines say who and about what; flight records say what came before, and no more than they may."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bridge import flight, telemetry
from bridge.errors import ConfigError, TransferError
from bridge.protocol.messages import Frame, Opcode
from bridge.protocol.session import InferenceSession
from launch.display import show_status
from vllm_patching import arguments, plugin, updater, waiting
from vllm_patching.channel import Channel, ChannelClosed
from vllm_patching.control_page import ControlPage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    hooks, who = (sys.excepthook, threading.excepthook), flight._who
    loggers = {name: logging.getLogger(name) for name in telemetry.ROOTS}
    before = {name: (x.handlers[:], x.level, x.propagate) for name, x in loggers.items()}
    flight._events.clear()
    yield
    sys.excepthook, threading.excepthook = hooks
    flight._who = who
    for name, (handlers, level, propagate) in before.items():
        loggers[name].handlers[:], loggers[name].propagate = handlers, propagate
        loggers[name].setLevel(level)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_line_says_who_and_about_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRIDGE_LOG_FORMAT", raising=False)
    telemetry.configure(role="updater", rank=1)
    logging.getLogger("bridge.x").info("%d bytes", 3)
    level, _, rest = said(capsys).partition(" ")
    when, _, rest = rest.partition(" [")
    assert (level, rest) == ("INFO", f"bridge updater rank 1 pid {os.getpid()}] 3 bytes\n")
    assert abs(datetime.now() - datetime.strptime(when, "%Y-%m-%d %H:%M:%S")) < timedelta(minutes=1)
    telemetry.stand(epoch=3, version=7)
    logging.getLogger("bridge.x").info("more")
    assert f"[bridge updater rank 1 pid {os.getpid()} epoch 3 version 7] more" in said(capsys)


def in_a_thread(target: Callable[[], object]) -> None:
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def test_what_a_process_serves_stands_in_lines_of_all_its_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_LOG_FORMAT", "json")
    telemetry.configure(role="daemon")
    in_a_thread(lambda: telemetry.stand(epoch=3, version=7))
    logging.getLogger("vllm_patching.x").info("ours")
    in_a_thread(lambda: logging.getLogger("vllm_patching.x").info("another's"))
    telemetry.stand(epoch=None, version=8)
    in_a_thread(lambda: logging.getLogger("vllm_patching.x").info("later"))
    lines = [json.loads(line) for line in said(capsys).splitlines()]
    assert [(line["epoch"], line["version"]) for line in lines] == [(3, 7), (3, 7), (None, 8)]


@pytest.mark.parametrize("form", telemetry.FORMATS)
def test_a_process_that_learns_what_it_is_says_so_from_then_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("BRIDGE_LOG_FORMAT", form)
    telemetry.configure(role="vllm")
    logging.getLogger("vllm_patching.x").info("before")
    flight.name_process("worker", 3)
    logging.getLogger("vllm_patching.x").info("after")
    before, after = said(capsys).splitlines()
    if form == "text":
        assert before.endswith(f"[bridge vllm pid {os.getpid()}] before")
        assert after.endswith(f"[bridge worker rank 3 pid {os.getpid()}] after")
    else:
        assert [(line["role"], line["rank"]) for line in map(json.loads, (before, after))] == [
            ("vllm", None),
            ("worker", 3),
        ]


def test_a_forked_process_has_its_own_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_LOG_FORMAT", "json")
    telemetry.configure(role="vllm")
    monkeypatch.setattr("os.getpid", lambda: 77)
    logging.getLogger("vllm_patching.x").info("in the child")
    assert json.loads(said(capsys))["pid"] == 77


def test_a_line_is_about_what_its_own_thread_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_LOG_FORMAT", "json")
    telemetry.configure(role="trainer", rank=0)
    telemetry.stand(epoch=1, version=1)

    def other() -> None:
        telemetry.stand_in_thread(epoch=2, version=5)
        logging.getLogger("bridge.x").info("theirs")

    in_a_thread(other)
    try:
        raise ValueError("this")
    except ValueError:
        logging.getLogger("bridge.x").exception("ours\n")
    theirs, ours = map(json.loads, said(capsys).splitlines())
    assert (theirs["epoch"], theirs["version"], theirs["message"]) == (2, 5, "theirs")
    assert (ours["epoch"], ours["version"], ours["message"]) == (1, 1, "ours\n")
    assert (ours["role"], ours["rank"], ours["pid"], ours["level"]) == ("trainer", 0, os.getpid(), "ERROR")
    assert "ValueError: this" in ours["exception"]
    assert "exception" not in theirs


@pytest.mark.parametrize(
    ("module", "name", "role"),
    [
        ("vllm.entrypoints.openai.api_server", "__main__", "api"),
        ("vllm_patching.headless", "__main__", "headless"),
        ("vllm.entrypoints.openai.api_server", "__mp_main__", "vllm"),
        ("pytest.__main__", "__main__", "vllm"),
        (None, "__main__", "vllm"),
    ],
)
def test_what_a_process_of_vllm_is_called_at_first(
    monkeypatch: pytest.MonkeyPatch, module: str | None, name: str, role: str
) -> None:
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec, __name__=name))
    assert plugin._role() == role


def test_a_child_of_the_api_server_is_not_taken_for_it(tmp_path: Path) -> None:
    """However it is started; a spawned one runs its parent's main module again."""
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for package in (folder, *list(folder.parents)[:2]):
        (package / "__init__.py").touch()
    (tmp_path / "ask.py").write_text("""
from vllm_patching import plugin
def ask():
    print(plugin._role(), flush=True)
""")
    (folder / "api_server.py").write_text("""
import multiprocessing
from ask import ask
if __name__ == "__main__":
    ask()
    for method in ("spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=ask)
        child.start()
        child.join()
""")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["api", "vllm", "vllm"], done.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the plugin asks for vLLM's version")
def test_a_child_that_is_forked_off_is_not_taken_for_its_parent(tmp_path: Path) -> None:
    """As vLLM makes its engine cores and workers, if it is told to fork; each names itself later."""
    code = """
import os
from bridge import flight
from vllm_patching import plugin
plugin.register()
flight.name_process("engine", 3)
if child := os.fork():
    os.waitpid(child, 0)
print(*flight.who(), flush=True)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BRIDGE_RUN_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["vllm None", "engine 3"], done.stderr


@pytest.mark.parametrize(("nnodes", "rank"), [(1, None), (2, 1)])
def test_a_daemon_of_several_nodes_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, nnodes: int, rank: int | None
) -> None:
    flags = ["--run-dir", "r", "--logdir", "l", "--nnodes", str(nnodes), "--node-rank", str(nnodes - 1)]
    monkeypatch.setattr("sys.argv", ["daemon", *flags])
    assert arguments.main(lambda _: SimpleNamespace(run=lambda: 7)) == 7
    assert flight.who() == ("daemon", rank)


def test_an_updater_says_which_version_it_was_told_to_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BRIDGE_LOG_FORMAT", "BRIDGE_LOGDIR", "LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    telemetry.configure(role="updater", rank=2)

    def stage(**order: Any) -> None:
        raise TransferError(f"was told {order}")

    ours, theirs = map(Channel, socket.socketpair())
    theirs.send({"type": "stage", "version": 8, "half": 1})
    theirs.sock.shutdown(socket.SHUT_WR)
    made: Any = SimpleNamespace(rank=2, epoch=3, stage=stage)
    with pytest.raises(ChannelClosed):
        updater._serve(ours, made)
    assert theirs.receive()[0] == {"type": "failed", "error": "was told {'half': 1}"}
    for end in (ours, theirs):
        end.close()
    assert f"[bridge updater rank 2 pid {os.getpid()} epoch 3 version 8] rank 2: stage failed" in said(capsys)


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="BRIDGE_LOG_FORMAT is 'xml'; it is one of text, json"):
        telemetry.configure(role="daemon")


def test_the_last_events_are_kept_in_order_and_short(tmp_path: Path) -> None:
    flight.name_process("updater", 3)
    for index in range(flight.KEPT + 9):
        flight.note("bucket", index=index)
    flight.note("received", frame="FAILED", text="x" * 5000, digest=b"\1\2")
    path = flight.write("it broke", tmp_path)
    assert path == tmp_path / "flight-updater-3.jsonl"
    head, *events = map(json.loads, path.read_text().splitlines())
    assert (head["role"], head["rank"], head["why"]) == ("updater", 3, "it broke")
    assert len(events) == flight.KEPT
    assert [e["index"] for e in events[:-1]] == list(range(10, flight.KEPT + 9))
    assert len(events[-1]["text"]) < 210
    assert events[-1]["digest"] == "0102"
    assert [e["monotonic_s"] for e in events] == sorted(e["monotonic_s"] for e in events)
    assert flight.write("again", tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_trainers_of_several_hosts_write_records_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flight.name_process("trainer", None)
    paths = set()
    for host, rank in (("a", "0"), ("b", "1")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setenv("RANK", rank)
        paths.add(flight.write("it broke", tmp_path))
    pid = os.getpid()
    assert paths == {tmp_path / f"flight-trainer-{who}-{pid}.jsonl" for who in ("0-a", "1-b")}


def test_lenders_of_one_host_leave_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flight.name_process("lender", None)
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    for pid in (11, 12):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        flight.write(f"loan of {pid} failed", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "flight-lender-a.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["why"] == "loan of 12 failed"


def test_a_record_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("BRIDGE_LOGDIR", "LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    assert flight.write("nowhere to go") is None
    assert flight.write("it broke", tmp_path / "absent") is None
    assert "the flight record could not be written" in caplog.text


@pytest.mark.parametrize("place", ["main", "thread"])
def test_an_exception_that_ends_a_process_leaves_its_record(tmp_path: Path, place: str) -> None:
    script = f"""
import threading
from bridge import flight, telemetry
telemetry.configure(role="daemon")
flight.note("order", order="stage")
def end():
    raise ArithmeticError("no such bucket")
if {place!r} == "main":
    end()
thread = threading.Thread(target=end, name="bridge-doorman")
thread.start()
thread.join()
"""
    env = {**os.environ, "BRIDGE_LOGDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ArithmeticError: no such bucket" in done.stderr, "told as always"
    (path,) = tmp_path.glob("flight-daemon-*.jsonl")
    head, order, last = map(json.loads, path.read_text().splitlines())
    assert "ended by ArithmeticError: no such bucket" in head["why"]
    assert order["event"] == "order"
    assert "ArithmeticError" in last["error"]


# --- who waits for what -------------------------------------------------------------------------------------


def waits(daemon: Any) -> dict[str, str]:
    return {wait.who: wait.waits_for for wait in waiting.describe(daemon)}


def test_status_says_what_everybody_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    page = ControlPage.create(2)
    registry = SimpleNamespace(world_size=None, num_engines=1, workers={}, engines={}, control=page)
    daemon: Any = SimpleNamespace(mapping=None, epoch=None, filing=False, registry=registry, nodes=None)
    assert waits(daemon) == {"daemon": "vLLM to publish its memory"}
    registry.world_size, registry.workers = 2, {0: "a worker"}
    assert waits(daemon) == {"daemon": "worker ranks [1] and engine cores [0] to register"}
    daemon.mapping = "a mapping"
    assert waits(daemon) == {"daemon": "a trainer"}

    machine = InferenceSession(epoch=1, version=0, ranks=range(2))
    epoch = daemon.epoch = SimpleNamespace(
        machine=machine, round=SimpleNamespace(version=1, reports={}), crew=SimpleNamespace(num_ranks=2),
        request=SimpleNamespace(pid=7, host="h"), changed_at=0.0, heard_at={}, poised=set(), joined={0},
        trainer_says="",
    )  # fmt: skip
    assert waits(daemon)["rank 1"] == "the trainer's ranks to join"
    assert waits(daemon)["trainer (pid 7 on h)"] == "its own next broadcast"
    epoch.trainer_says = "trainer rank(s) 3 to call broadcast_weights"
    assert waits(daemon)["trainer (pid 7 on h)"] == "trainer rank(s) 3 to call broadcast_weights"
    machine.on_frame(Frame(opcode=Opcode.BEGIN, epoch=1, version=1))
    machine.on_frame(Frame(opcode=Opcode.BUCKET, epoch=1, version=1, index=4))
    assert waits(daemon) == {
        "daemon": "ranks [0, 1] to hold version 1",
        "trainer (pid 7 on h)": "bucket 4 to be taken",
        "rank 0": "the bytes of version 1",
        "rank 1": "the bytes of version 1",
    }
    machine.on_staged(0)
    epoch.round.reports[0] = {}
    assert waits(daemon)["daemon"] == "ranks [1] to hold version 1"
    assert waits(daemon)["rank 0"] == "the commit of version 1"
    machine.on_staged(1)
    assert waits(daemon)["daemon"] == "the trainer's word to commit"
    machine.on_frame(Frame(opcode=Opcode.COMMIT, epoch=1, version=1))
    page.requested = 1
    page.slot(0).record(version=1, batch=9, flip_ns=1, active=1)
    assert waits(daemon)["rank 1"] == "its next batch, to flip to version 1"
    assert "rank 0" not in waits(daemon)
    status = {
        "state": "round", "detail": "", "model": "m", "world_size": 2, "weight_version": 0, "epoch": 1,
        "trainer": "t", "rounds": {"committed": 0, "aborted": 0}, "rendezvous": "r", "last_round": None,
        "pids": {"daemon": 1}, "last_error": None, "ranks": [],
    }  # fmt: skip
    status["waits"] = msgspec.to_builtins(waiting.describe(daemon))
    show_status(status, as_json=False)
    assert "waits: daemon for every rank to flip to version 1, since " in capsys.readouterr().out
    os.close(page.fd)
