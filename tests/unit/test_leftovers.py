"""What a launch that was killed has left on its host, as the next one finds it named in a file."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from launch.leftovers import Leftovers
from vllm_patching import residue


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of /dev/shm."""
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(residue, "SHM_DIR", shm)
    return shm


def note_of(logdir: Path) -> Path:
    return logdir / f"leftovers-{socket.gethostname()}.json"


def test_what_is_left_is_removed_by_the_next(tmp_path: Path, shm: Path) -> None:
    left = shm / "psm_1"
    left.touch()
    Leftovers(tmp_path, tmp_path / "a").note([left])
    Leftovers(tmp_path, tmp_path / "b").sweep()
    assert not left.exists()


def test_a_file_further_down_is_not_taken_for_one_of_its_name(tmp_path: Path, shm: Path) -> None:
    (shm / "sub").mkdir()
    inner, outer = shm / "sub" / "x", shm / "x"
    for path in (inner, outer):
        path.touch()
    Leftovers(tmp_path, tmp_path / "a").note([inner])
    Leftovers(tmp_path, tmp_path / "b").sweep()
    assert inner.exists()
    assert outer.exists(), "it is somebody else's"


def note(*names: str, run_dir: str = "/nowhere") -> bytes:
    return msgspec.json.encode({"run_dir": run_dir, "shared_memory": names})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no list of leftovers"),
        (b"\xff", "no list of leftovers"),
        (b"{}", "no list of leftovers"),
        (note("."), "'.' names no file"),
        (note(".."), "'..' names no file"),
        (note(""), "'' names no file"),
        (note("../etc/x"), "'../etc/x' names no file"),
        (note("a\0b"), "names no file"),
        (note("x" * 256), "names no file"),
        (note(run_dir="."), "'.' is no absolute path"),
        (note(run_dir="/a\0b"), "is no absolute path"),
        (note(run_dir="/" + "x" * 256), "is no absolute path"),
    ],
)
def test_a_damaged_file_is_named_and_set_aside(
    tmp_path: Path, shm: Path, caplog: pytest.LogCaptureFixture, data: bytes, why: str
) -> None:
    path = note_of(tmp_path)
    path.write_bytes(data)
    leftovers = Leftovers(tmp_path, tmp_path / "b")
    leftovers.sweep()
    assert f"cannot be read from {path}" in caplog.text
    assert why in caplog.text
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == data
    assert shm.is_dir()


def test_a_directory_among_the_names_is_left_alone(tmp_path: Path, shm: Path) -> None:
    (shm / "sub").mkdir()
    note_of(tmp_path).write_bytes(note("sub"))
    Leftovers(tmp_path, tmp_path / "b").sweep()
    assert (shm / "sub").is_dir()
