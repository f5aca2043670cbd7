"""Whose version a server may believe to be its own."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import CONFIG_NAME, Rendezvous
from tests.support.mappings import identity_mapping
from vllm_patching.borrowing import Borrowing, differs

OURS = identity_mapping(("checkpoint", {"a": (4, 2), "b": (3,)}))


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        (OURS, ""),
        (identity_mapping(("checkpoint", {"b": (3,), "a": (4, 2)})), ""),
        (
            identity_mapping(("checkpoint", {"a": (4, 2), "c": (3,)})),
            "2 tensor(s) are in one of the two only",
        ),
        (identity_mapping(("checkpoint", {"a": (4, 3), "b": (3,)})), "1 shape(s) differ, a: (4, 2) here"),
        (identity_mapping(("transformers", {"a": (4, 2), "b": (3,)})), "no vocabulary in common"),
    ],
)
def test_servers_of_one_model_have_the_same_tensors(theirs: Any, difference: str) -> None:
    found = differs(OURS, theirs)
    assert (found == "") == (difference == "")
    assert difference in found


def test_a_server_of_another_model_is_no_peer_and_its_version_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = identity_mapping(("checkpoint", {"x": (1,)}))
    place = Rendezvous(host="127.0.0.1", port=1, secret="s")  # whoever asked there would wait in vain
    data = mapping_file.encode(msgspec.structs.replace(stranger, rendezvous=place))
    peer = tmp_path / "other"
    peer.mkdir()
    mapping_file.write_atomically(peer / CONFIG_NAME, data)
    daemon: Any = SimpleNamespace(
        args=SimpleNamespace(logdir=tmp_path / "own"), mapping=OURS, version=0, events=queue.SimpleQueue(),
        registry=SimpleNamespace(control=None),
    )  # fmt: skip
    borrowing = Borrowing(daemon, [peer])
    borrowing.asking = True
    assert borrowing._borrow(threading.Event())
    assert daemon.events.empty()
    assert f"{peer} is of another model, and no peer" in caplog.text
    assert borrowing._borrow(threading.Event())
    assert caplog.text.count("is of another model") == 1


def test_peers_are_asked_once_when_the_workers_are_back_and_again_behind_the_next_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon: Any = SimpleNamespace(
        args=SimpleNamespace(logdir=tmp_path / "own"), mapping=OURS, swap=None, published=False,
        events=queue.SimpleQueue(),
    )  # fmt: skip
    borrowing = Borrowing(daemon, [tmp_path / "other"])
    runs: queue.SimpleQueue[int] = queue.SimpleQueue()
    go_on = threading.Event()

    def borrow(stopping: threading.Event) -> bool:
        runs.put(id(stopping))
        return go_on.wait(10)

    monkeypatch.setattr(borrowing, "_borrow", borrow)
    borrowing.expect()
    first = runs.get(timeout=10)
    borrowing.expect()
    borrowing.begin()  # it has published, and the same question goes on
    assert runs.empty()
    go_on.set()
    assert daemon.events.get(timeout=10) is None
    assert not borrowing.asking
    borrowing.expect()
    assert runs.empty(), "one that found nothing is not begun again by the next event"
    borrowing.begin()
    assert runs.get(timeout=10)
    borrowing.close()
    borrowing.expect()
    assert runs.get(timeout=10) != first
    borrowing.close()
