"""The number of the newest version outlives the processes that know it, and no launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import ConfigError
from launch.commands import make_run_dir
from launch.options import ServeOptions
from vllm_patching import newest, residue
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


def test_a_damaged_number_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / newest.FILE_NAME).write_text("7x")
    with pytest.raises(ConfigError, match="'7x', which is no version"):
        Newest(tmp_path)
