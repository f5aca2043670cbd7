"""The relay of logs: it follows what is done to log files, and its own output may fail."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.output import Relay

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "vllm.log"
    path.write_text("of an earlier run\n")
    return path


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def relay(log: Path, output: io.StringIO) -> Iterator[Relay]:
    made = Relay(output)
    made.follow("vllm", log)
    yield made
    made.close()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def told(relay: Relay, output: io.StringIO) -> list[str]:
    """What is new on the output."""
    output.seek(0)
    output.truncate()
    relay.pump()
    return output.getvalue().splitlines()


def test_a_log_that_is_truncated_is_told_from_its_beginning(
    relay: Relay, log: Path, output: io.StringIO
) -> None:
    with log.open("a") as writer:  # as a child's, for appending
        writer.write("a long line before\nhalf a ")
        writer.flush()
        assert told(relay, output) == ["[vllm] a long line before"]
        os.truncate(log, 0)
        writer.write("line\nmore\n")
        writer.flush()
        assert told(relay, output) == ["[vllm] half a line", "[vllm] more"]


def test_a_log_that_is_made_anew_is_gone_over_to(relay: Relay, log: Path, output: io.StringIO) -> None:
    with log.open("a") as writer:
        old = log.rename(log.with_suffix(".1"))
        writer.write("renamed\n")
        writer.flush()
        assert told(relay, output) == ["[vllm] renamed"]
        log.touch()  # the child still has the old one
        writer.write("still here\nand its last w")
        writer.flush()
        assert told(relay, output) == ["[vllm] still here"]
        append(log, "another child\n")
        writer.write("ords")
        writer.flush()
        assert told(relay, output) == ["[vllm] and its last words", "[vllm] another child"]
    append(old, "nobody's\n")
    append(log, "more\n")
    assert told(relay, output) == ["[vllm] more"]


def test_a_log_that_cannot_be_read_is_told_again_when_it_can(
    relay: Relay,
    log: Path,
    output: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    append(log, "before\n")
    assert told(relay, output) == ["[vllm] before"]
    caplog.set_level(logging.WARNING, "launch.output")

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as away:
        away.setattr(os, "fstat", stale)
        away.setattr(Path, "open", stale)
        append_to = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.write(append_to, b"meanwhile\n")
        os.close(append_to)
        assert told(relay, output) == told(relay, output) == []
        relay.follow("daemon", log.with_name("daemon.log"))
        assert told(relay, output) == []
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"{log} cannot be read",
        f"{log.with_name('daemon.log')} cannot be read",
    ]
    assert told(relay, output) == ["[vllm] meanwhile"]
    append(log.with_name("daemon.log"), "here\n")
    assert told(relay, output) == ["[daemon] here"]


class Full(io.StringIO):
    """An output on a file system without room, for now."""

    full = True

    def flush(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_that_fails_is_tried_again(log: Path) -> None:
    output = Full()
    relay = Relay(output)
    relay.follow("vllm", log)
    append(log, "lost\n")
    relay.pump()
    output.full = False
    append(log, "told\n")
    assert told(relay, output) == ["[vllm] told"]
    relay.close()


LOSES_ALL = """
import sys
from bridge import telemetry
from launch.output import Relay, drop_unwritten
telemetry.configure(role="launcher")
relay = Relay()
relay.follow("vllm", __import__("pathlib").Path(sys.argv[1]))
open(sys.argv[1], "a").write("a line\\n")
relay.pump()
relay.close()
drop_unwritten()
sys.exit(75)
"""


def test_an_output_that_fails_does_not_cost_the_exit_code(log: Path) -> None:
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", LOSES_ALL, log],
            stdout=full,
            stderr=full,
            cwd=ROOT,
            env=buffered,
            timeout=120,
            check=False,
        )
    assert done.returncode == 75
