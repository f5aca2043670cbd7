"""What has a secret, or leads to one, is its owner's alone, also where the umask hides nothing."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridge import flight
from bridge.protocol.mapping import CONFIG_NAME, write_atomically
from launch import cli, commands
from launch.leftovers import Leftovers
from launch.options import ServeOptions
from vllm_patching import channel, nodes
from vllm_patching.newest import FILE_NAME, Newest


@pytest.fixture(autouse=True)
def nothing_hidden() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def a_mapping(place: Path) -> Path:
    write_atomically(place / CONFIG_NAME, b"{}")
    return place / CONFIG_NAME


def where_nodes_meet(place: Path) -> Path:
    args = SimpleNamespace(nnodes=2, master_addr="127.0.0.1", master_port=None, logdir=place)
    head = nodes.Nodes(SimpleNamespace(args=args, secret="s"))  # type: ignore[arg-type]
    head.listen()
    head.end(None)
    return place / nodes.FILE_NAME


def a_flight_record(place: Path) -> Path:
    path = flight.write("it broke", place)
    assert path is not None
    return path


def a_launchs_note(place: Path) -> Path:
    Leftovers(place, place).note([])
    (path,) = place.glob("leftovers-*.json")
    return path


def the_newest_version(place: Path) -> Path:
    newest = Newest(place)
    newest.raise_to(newest.version + 1)
    return place / FILE_NAME


@pytest.mark.parametrize(
    "write", [a_mapping, where_nodes_meet, a_flight_record, a_launchs_note, the_newest_version]
)
def test_a_file_is_its_owners_alone(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    assert mode(path) == 0o600
    path.chmod(0o666)
    assert write(tmp_path) == path
    assert mode(path) == 0o600, "each time anew"


def test_the_daemons_socket_is_its_owners_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with channel.listen(run_dir) as listener:
        assert listener.family is socket.AF_UNIX
        assert mode(run_dir) == 0o700
        assert mode(channel.socket_path(run_dir)) == 0o600
    assert os.umask(0) == 0, "as it was before"


@pytest.mark.parametrize("name", [None, "deep/run"])
def test_the_directories_of_a_launch_are_their_owners_alone(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "run_dir_parent", lambda: tmp_path)
    options = ServeOptions(
        model="m", logdir=tmp_path / "logs", run_dir=None if name is None else tmp_path / name
    )
    launch = cli.prepare(options).launch
    assert launch.run_dir.is_relative_to(tmp_path)
    assert mode(launch.run_dir) == 0o700
    assert mode(options.updates) == 0o700
