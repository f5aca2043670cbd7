"""The number of the newest version outlives the processes that know it, and no launch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from bridge import telemetry
from bridge.errors import ConfigError
from bridge.protocol.messages import MAX_VERSION
from launch.commands import make_run_dir
from launch.options import ServeOptions
from vllm_patching import daemon, follower, newest, residue
from vllm_patching.newest import Newest


def test_the_next_daemon_goes_on_from_it(tmp_path: Path) -> None:
    first = Newest(tmp_path)
    assert first.version == 0
    first.raise_to(7)
    first.raise_to(3)
    assert first.version == Newest(tmp_path).version == 7


def test_the_next_launch_does_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    notes = (run_dir / newest.FILE_NAME, run_dir / residue.LAUNCH_FILE)
    for note in notes:
        note.write_text("7")
    make_run_dir(ServeOptions(model="m", run_dir=run_dir))
    assert Newest(run_dir).version == 0
    assert not any(note.exists() for note in notes)
    for note in notes:
        note.write_text("8")
    residue.remove_run_dir(run_dir)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "data", [b"7x", b"", b"\xff", "\u0663".encode(), b"9" * 5000, b"9223372036854775808"]
)
def test_a_damaged_number_is_not_taken_for_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / newest.FILE_NAME).write_bytes(data)
    with pytest.raises(ConfigError, match=r"newest-version holds .*, which is no version"):
        Newest(tmp_path)


def test_the_highest_number_is_one(tmp_path: Path) -> None:
    (tmp_path / newest.FILE_NAME).write_text(str(MAX_VERSION))
    assert Newest(tmp_path).version == MAX_VERSION


@pytest.mark.parametrize("module", [daemon, follower])
def test_a_daemon_that_finds_a_damaged_file_says_so_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: ModuleType
) -> None:
    """So that it is not started again: the next one would find the same."""
    for name in (newest.FILE_NAME, residue.LAUNCH_FILE):
        (tmp_path / name).write_bytes(b"\xff")
    argv = ["daemon", f"--run-dir={tmp_path}", f"--logdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(telemetry, "configure", lambda **_: None)
    assert module.main() == ConfigError.exit_code
    assert str(tmp_path) in caplog.text
    assert "b'\\xff'" in caplog.text
