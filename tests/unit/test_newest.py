"""The number of the newest version outlives the processes that know it, and no launch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bridge import telemetry
from bridge.errors import ConfigError, TransferError
from bridge.protocol.mapping import write_atomically
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
    for version in (8, 10**18, MAX_VERSION):
        first.raise_to(version)
        assert first.version == Newest(tmp_path).version == version
    first.close()
    first.close()


def test_a_note_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    first = Newest(tmp_path)
    for version in (1, 2, 3):
        first.raise_to(version)
        newest.forget(tmp_path)
    first.raise_to(4)
    assert Newest(tmp_path).version == 4
    first.close()


def test_a_full_disk_holds_up_no_number_behind_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a block for it. Whatever it is that cannot be written is said, and not taken for written."""
    first = Newest(tmp_path)
    first.raise_to(1)
    monkeypatch.setattr(newest, "write_atomically", None)
    first.raise_to(2)
    assert Newest(tmp_path).version == 2
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(TransferError, match=r"version 3 could not be noted in .*: 3 of 19 bytes"):
        first.raise_to(3)
    assert first.version == 2
    first.close()


def test_nobody_waits_for_a_disk_between_staged_and_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(_: int) -> None:
        raise AssertionError("4 ms")

    monkeypatch.setattr(os, "fsync", sync)
    first = Newest(tmp_path)
    for version in (1, 2):
        first.raise_to(version)
    first.close()
    with pytest.raises(AssertionError):
        write_atomically(tmp_path / "other", b"")  # what must outlive the host does


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
