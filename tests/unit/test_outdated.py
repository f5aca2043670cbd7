"""When requests are let in to a vLLM; the daemon's own decisions."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_patching.arguments import parse_args
from vllm_patching.control_page import ControlPage
from vllm_patching.daemon import Daemon
from vllm_patching.events import Learned, LookAgain, Lost, PeersAsked
from vllm_patching.gate import FILE_NAME, Gate, Word

BEHIND = "version 3 is newer"
UNPUBLISHED = {"published": False, "_unpublished": "the mapping cannot be written"}
FRESH = {"version": 0, "_behind": "", "outdated": ""}


def daemon(run_dir: Path, **changes: Any) -> Any:
    """What the decisions look at: a vLLM that was started again behind version 3."""
    page = SimpleNamespace(requested=0)
    looks = list[None]()
    here = SimpleNamespace(
        registry=SimpleNamespace(control=page), args=SimpleNamespace(serve_checkpoint="first"),
        borrowing=SimpleNamespace(asking=False, has_peers=False), published=True, _unpublished="",
        _known_page=page, _dead_page=None,
        version=3, live_version=0, _behind=BEHIND, outdated=BEHIND, last_error=None, gate=Gate(run_dir),
        _look_again=lambda: looks.append(None), looks=looks,
    )  # fmt: skip
    here._word = lambda page: Daemon._word(here, page)
    for name, value in changes.items():
        *owners, attribute = name.split("__")
        setattr(functools.reduce(getattr, owners, here), attribute, page if value == "its own" else value)
    here.gate.close(here.registry.control)
    return here


@pytest.mark.parametrize(
    ("changes", "open_"),
    [
        ({}, False),
        ({"live_version": 3}, True),
        ({"live_version": 2, "registry__control__requested": 3}, False),  # and not on every rank yet
        ({"live_version": 3, "borrowing__asking": True}, False),  # a peer may know of a newer one
        ({"args__serve_checkpoint": "always"}, True),
        ({"args__serve_checkpoint": "always", "borrowing__asking": True}, False),  # it may come any moment
        ({"args__serve_checkpoint": "never"}, False),
        ({"args__serve_checkpoint": "never", "live_version": 3}, True),
        (FRESH, True),
        ({**FRESH, "borrowing__asking": True}, False),
        ({**FRESH, "args__serve_checkpoint": "never"}, False),
        ({**FRESH, **UNPUBLISHED}, True),
        ({**UNPUBLISHED, "args__serve_checkpoint": "always"}, True),
        ({**FRESH, **UNPUBLISHED, "borrowing__has_peers": True}, False),  # once it is written, they are asked
        (UNPUBLISHED, False),
        ({**FRESH, "_known_page": None}, False),  # another's: this vLLM is not complete yet
        ({**FRESH, "registry__control": None}, False),
        ({**FRESH, "_dead_page": "its own"}, False),  # a part of it is gone, and the rest will be
    ],
)  # fmt: skip
def test_who_is_let_in(tmp_path: Path, changes: dict[str, Any], open_: bool) -> None:
    here = daemon(tmp_path, **changes)
    Daemon._mind_the_gate(here)
    assert here.gate.word.open is open_
    assert Gate(tmp_path).word.open is open_, "as another process reads it"


def test_why_not_is_said_and_whether_it_ends_by_itself(tmp_path: Path) -> None:
    here = daemon(tmp_path)
    Daemon._mind_the_gate(here)
    why = "has version 0 (the checkpoint), but the newest version is 3; it comes with the trainer's next"
    assert why in here.gate.word.why
    assert not here.gate.word.soon
    here._unpublished = "the mapping cannot be written to /home/somebody: No space left on device"
    Daemon._mind_the_gate(here)
    assert "the mapping file cannot be written, so nobody can bring a version" in here.gate.word.why
    assert "/home" not in here.gate.word.why, "anybody may hear it"
    here._unpublished, here.borrowing.asking = "", True
    Daemon._mind_the_gate(here)
    assert here.gate.word == Word(open=False, why="its peers are asked for a newer version", soon=True)
    here.borrowing.asking, here.registry.control.requested = False, 3
    assert not here.looks
    Daemon._mind_the_gate(here)
    assert here.gate.word == Word(open=False, why="version 3 is about to be live", soon=True)
    assert here.looks, "no rank says that it has flipped behind its time"
    here.live_version, here.outdated = 3, ""
    Daemon._mind_the_gate(here)
    assert here.gate.word == Word(open=True)
    here.version, here.outdated = 4, BEHIND  # it was left out of a round, and serves on meanwhile
    Daemon._mind_the_gate(here)
    assert here.gate.word == Word(open=True)
    never = daemon(tmp_path, **FRESH, args__serve_checkpoint="never")
    Daemon._mind_the_gate(never)
    assert "no version was broadcast yet" in never.gate.word.why


def test_a_disk_that_is_full_keeps_out_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = daemon(tmp_path, live_version=3)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vllm_patching.gate.write_atomically", full)
        Daemon._mind_the_gate(here)
        Daemon._mind_the_gate(here)
    assert not here.gate.word.open
    assert not Gate(tmp_path).word.open
    assert len(here.looks) == 2
    assert sum("No space left on device" in line for line in caplog.messages) == 1
    Daemon._mind_the_gate(here)
    assert here.gate.word.open
    (tmp_path / FILE_NAME).unlink()  # as a cleaner of old files does
    Daemon._mind_the_gate(here)
    assert Gate(tmp_path).word.open


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose vLLM is complete, with the checkpoint, and whose peers are asked."""
    args = parse_args(
        [
            "--run-dir",
            str(tmp_path),
            "--logdir",
            str(tmp_path / "logs"),
            f"--peers={tmp_path}",
            "--launcher-pid=1",
        ]
    )
    here = Daemon(args)
    page = ControlPage.create(1)
    here.registry.control = here._known_page = page
    here.published, here.mapping = True, SimpleNamespace()  # type: ignore[assignment]
    here.gate.close(page)
    yield here
    here.newest.close()
    os.close(page.fd)


def test_what_a_peer_has_keeps_out_though_it_cannot_be_noted(
    whole: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = whole.borrowing._question = threading.Event()
    monkeypatch.setattr(whole.newest, "_write", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    for event in (Learned(7), PeersAsked(question)):
        whole._take(event)
        whole._mind_the_gate()
        assert not whole.gate.word.open
    assert "the newest version is 7" in whole.gate.word.why


def test_a_vllm_of_which_a_part_has_died_is_let_nobody_in_to(whole: Daemon) -> None:
    whole._take(Lost("worker rank 0"))
    whole._mind_the_gate()
    assert not whole.gate.word.open
    whole.published = True  # as of another one, whole
    whole._dead_page = None
    whole._mind_the_gate()
    assert whole.gate.word.open


def test_it_looks_again_once_however_often_that_was_asked_for(
    whole: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_patching.daemon.PUBLISH_RETRY_S", 0.05)
    for _ in range(2):
        whole._look_again()
        whole._look_again()
        event = whole.events.get(timeout=10)
        assert isinstance(event, LookAgain)
        with pytest.raises(queue.Empty):
            whole.events.get(timeout=0.2)
        whole._take(event)
