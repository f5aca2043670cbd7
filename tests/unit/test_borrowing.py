"""Whose version a server may believe to be its own."""

from __future__ import annotations

import itertools
import queue
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bridge.environment import job_attempt
from bridge.errors import PeerLost
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import CONFIG_NAME, Rendezvous
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire.rendezvous import Answer, Loan, Offer, Request, unseal
from tests.support.mappings import identity_mapping
from vllm_patching.admission import Admission
from vllm_patching.arena import REMAP
from vllm_patching.borrowing import Borrowing, differs
from vllm_patching.events import Learned, PeersAsked
from vllm_patching.lending import Lending

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
    borrowing._question = threading.Event()
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
    runs: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
    go_on = threading.Event()

    def borrow(stopping: threading.Event) -> bool:
        runs.put(stopping)
        return go_on.wait(10)

    monkeypatch.setattr(borrowing, "_borrow", borrow)
    borrowing.expect()
    first = runs.get(timeout=10)
    borrowing.expect()
    borrowing.begin()  # it has published, and the same question goes on
    assert runs.empty()
    go_on.set()
    asked = daemon.events.get(timeout=10)
    assert isinstance(asked, PeersAsked)
    assert borrowing.asking, "until the daemon has heard what lies before it in its queue"
    borrowing.heard(threading.Event())
    assert borrowing.asking, "another question's end"
    borrowing.begin()  # nobody is asked any more, so it asks anew
    assert runs.get(timeout=10)
    borrowing.heard(asked.question)
    assert borrowing.asking, "an earlier question's end"
    later = daemon.events.get(timeout=10)
    assert isinstance(later, PeersAsked)
    borrowing.heard(later.question)
    assert not borrowing.asking
    borrowing.expect()
    assert runs.empty(), "one that found nothing is not begun again by the next event"
    borrowing.begin()
    assert runs.get(timeout=10)
    borrowing.close()
    borrowing.expect()
    assert runs.get(timeout=10) is not first
    borrowing.close()


class Peer:
    """Stands where a peer's daemon answers; each loan that is begun is live at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, served: int) -> None:
        self.version, self.in_round = 5, False
        self.page = SimpleNamespace(requested=served)
        self.daemon: Any = SimpleNamespace(
            args=SimpleNamespace(logdir=tmp_path / "own"), mapping=OURS, published=True, version=served,
            live_version=served, aborted=0, epoch=None, events=queue.SimpleQueue(),
            registry=SimpleNamespace(control=self.page),
        )  # fmt: skip
        self.borrowing = Borrowing(self.daemon, [tmp_path / "other"])
        self.borrowing._question = threading.Event()
        self.lent: list[int] = []
        self.then: list[int] = []  # what it serves behind the first loan, the second, ..
        monkeypatch.setattr(self.borrowing, "_ask", self._answer)

    def _answer(self, _: Path, *, start: bool) -> Offer:
        offer = Offer(session="", version=self.version, in_round=self.in_round, borrower="own")
        if start:
            self.lent.append(self.version)
            self.daemon.version = self.daemon.live_version = self.page.requested = self.version
            self.version = self.then.pop(0) if self.then else self.version
        return offer


def test_a_version_that_the_peer_has_left_meanwhile_is_not_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(monkeypatch, tmp_path, served=0)
    peer.then = [6, 8]
    assert peer.borrowing._borrow(threading.Event())
    assert peer.lent == [5, 6, 8]
    assert peer.daemon.events.get_nowait() == Learned(5)


def test_a_round_under_way_at_the_peer_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(monkeypatch, tmp_path, served=5)
    peer.in_round = True
    assert not peer.borrowing._borrow(threading.Event())
    peer.in_round = False
    assert peer.borrowing._borrow(threading.Event())
    assert peer.lent == []


def test_a_loan_that_nobody_wants_any_more_is_known_to_our_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(monkeypatch, tmp_path, served=0)
    peer.version = 7
    monkeypatch.setattr("vllm_patching.borrowing.POLL_S", 0.01)
    monkeypatch.setattr("vllm_patching.borrowing.LOOK_S", 0.0)
    stopping, own = threading.Event(), peer.borrowing._own
    offers = [Offer(session="", version=7, borrower=own), Offer(session="", version=7)]
    monkeypatch.setattr(peer.borrowing, "_ask", lambda *_, **__: offers.pop(0))
    assert not peer.borrowing._await(5, tmp_path / "other", 0, stopping)
    assert peer.daemon.events.get_nowait() == Learned(7)


def test_a_server_that_is_left_out_says_so_once_a_peer_has_been_ahead_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(monkeypatch, tmp_path, served=5)
    monkeypatch.setattr("vllm_patching.borrowing.WATCH_S", 0.01)
    stopping = threading.Event()
    # It is behind, but has the version when it looks again; then only what it lacks at two looks counts.
    seen = iter([(5, 6), (6, 6), (6, 7), (7, 8), (7, 8)])

    def ask(_: Path, *, start: bool) -> Offer:
        assert not start
        own, version = next(seen)
        peer.daemon.version = peer.page.requested = own
        return Offer(session="", version=version)

    monkeypatch.setattr(peer.borrowing, "_ask", ask)
    assert peer.borrowing._falls_behind(stopping)
    assert list(seen) == []
    assert peer.daemon.events.get_nowait() == Learned(8)
    stopping.set()
    assert not peer.borrowing._falls_behind(stopping)


class Door:
    """A daemon at whose door trainers and helpers knock; ``opened`` lists who was let in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **state: Any) -> None:
        self.told: dict[str, bytes] = {}
        self.opened: list[Request] = []
        self.daemon: Any = SimpleNamespace(
            mapping=OURS, version=5, published=True, secret="s", registry=SimpleNamespace(complete=True),
            crew=SimpleNamespace(wait_all=lambda: None), last_error="",
            store=SimpleNamespace(
                set=self.told.__setitem__,
                check=lambda _: False,
                delete_key=lambda key: self.told.pop(key, None),
            ),
            **state,
        )  # fmt: skip
        self.admission = Admission(self.daemon)
        monkeypatch.setattr(self.admission, "_open", self.opened.append)

    def knock(self, session: str, **request: Any) -> str:
        """Why one who knocks is refused; "" if it is let in."""
        self.admission.consider(who_knocks(session=session, **request))
        answer = self.told.get(f"answer/{session}")
        return "" if answer is None else unseal(answer, "s", Answer).refusal


def who_knocks(**request: Any) -> Request:
    usual: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION, "world_size": 1, "mapping_digest": OURS.digest, "host": "node",
        "pid": 7,
    }  # fmt: skip
    return Request(**(usual | request))


@pytest.mark.parametrize(
    ("asks", "again"),
    [
        ({}, True),
        ({"trainer": "b" * 32}, False),
        ({"trainer": ""}, False),
        ({"pid": 8}, False),  # a process that was forked off it
        ({"asked_ns": 4}, False),  # which the network has kept until now
    ],
)
def test_a_trainer_that_asks_anew_ends_its_own_epoch_and_nobody_elses(
    monkeypatch: pytest.MonkeyPatch, asks: dict[str, Any], again: bool
) -> None:
    told: list[PeerLost] = []
    # Of a release of the bridge that has no names, if who asks has none either.
    held = who_knocks(session="held", trainer=asks.get("trainer", "a") and "a" * 32, asked_ns=5)
    epoch: Any = SimpleNamespace(request=held, epoch=3, trainer="a trainer", on_control=told.append)
    door = Door(monkeypatch, outdated="", epoch=epoch)
    refusal = door.knock("anew", **({"trainer": "a" * 32, "asked_ns": 6} | asks))
    assert refusal == (
        "epoch 3, which it has given up, ends first"
        if again
        else "another trainer is connected (epoch 3): a trainer"
    )
    assert unseal(door.told["answer/anew"], "s", Answer).try_again == again
    assert list(map(str, told)) == ["the trainer has given this epoch up, and asks for the next"] * again


def test_a_trainer_that_met_a_loan_is_waited_for_until_its_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: list[str] = []
    loan: Any = SimpleNamespace(
        request=who_knocks(session="loan", restores=5),
        epoch=3,
        trainer="the helper of a peer",
        fail=failed.append,
    )
    door = Door(monkeypatch, outdated="vLLM was started again", epoch=loan)
    assert "another trainer is connected" in door.knock("trainer", restores=0)
    assert failed == ["a trainer came, and does not wait for a peer's loan"]
    door.daemon.epoch = None
    monkeypatch.setattr("vllm_patching.admission.TRAINER_FIRST_S", 0.0)
    assert door.knock("helper", restores=5) == "a trainer was here before"
    # Minutes later, or once a trainer was let in.
    door.admission._trainers_first_until = time.monotonic()
    monkeypatch.setattr("bridge.wire.rendezvous.ANSWERS_KEPT_S", 0.0)
    assert door.knock("helper again", restores=5) == ""
    assert [request.restores for request in door.opened] == [5]
    door.daemon.epoch = loan
    door.knock("another", restores=0)
    assert set(door.told) == {"answer/another"}, "what was answered long ago is still there"


def test_what_is_left_of_an_earlier_attempt_of_a_job_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was stopped on a node that was lost, and wakes behind the requeued job's rounds."""
    door = Door(monkeypatch, outdated="", epoch=None)
    sessions = map(str, itertools.count())

    def knock(job: str, attempt: str) -> str:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        job_of, attempt_of = job_attempt()
        return door.knock(next(sessions), job=job_of, attempt=attempt_of)

    for job, attempt in (("7", ""), ("7", "1"), ("7", "3"), ("7", "3"), ("8", ""), ("", "")):
        assert knock(job, attempt) == ""
    for attempt in ("", "1", "2"):
        number = int(attempt or 0)
        assert f"attempt {number} of job 7, of which attempt 3 was here" in knock("7", attempt)
    assert knock("7", "4") == ""
    came = [(request.job, request.attempt) for request in door.opened]
    assert came == [("7", 0), ("7", 1), ("7", 3), ("7", 3), ("8", 0), ("", 0), ("7", 4)]


def test_a_loan_ahead_gives_way_to_a_server_that_can_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon: Any = SimpleNamespace(
        nodes=None, published=True, mapping=OURS, swap=SimpleNamespace(torn=""), version=5, live_version=5,
        registry=SimpleNamespace(arenas={REMAP}), epoch=None,
        in_round=False, store={}, secret="s",
    )  # fmt: skip
    daemon.store = SimpleNamespace(set=lambda *_: None)
    lending = Lending(daemon)
    begun: list[str] = []

    def start(loan: Loan, _: int) -> None:
        begun.append(loan.borrower)
        lending._process, lending._ahead = subprocess.Popen(["sleep", "60"]), loan.ahead
        lending._borrower = loan.borrower

    monkeypatch.setattr(lending, "_start", start)
    for borrower, ahead in (("b", True), ("c", True), ("c", False), ("b", False)):
        lending.consider(Loan(session="1", borrower=borrower, start=True, ahead=ahead))
    assert begun == ["b", "c"]
    lending.reclaim("the test ends")
