"""A trainer rank's background thread: what a round that failed leaves behind, which must be nothing."""

from __future__ import annotations

import gc
import queue
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.config import BridgeConfig
from bridge.errors import PeerLost, RoundAborted
from bridge.job import Job
from bridge.protocol.messages import Frame, Opcode
from bridge.protocol.session import Coordinator
from bridge.rounds import Session, _GiveUp


class Deaf:
    """In the place of a control group: nobody is at the other end."""

    doing = ""

    def send(self, *_: Any, **__: Any) -> None:
        pass


def session_without_a_server() -> Session:
    """As far as its thread's own work goes: no group, no store, no thread."""
    session = object.__new__(Session)
    session.config = BridgeConfig()
    session.rank, session.world_size, session.closed = 0, 1, ""
    session._inbox, session._early, session._verdict_at = queue.Queue(), [], 0.0
    session._expired = False
    session._answer = SimpleNamespace(epoch=1, deadline_s=1.0, commit_timeout_s=1.0)  # type: ignore[assignment]
    session._coordinator = Coordinator(epoch=1, version=0, trainers=1, daemons=1)
    session._control = Deaf()  # type: ignore[assignment]
    session._mover = SimpleNamespace(forget=lambda: None)  # type: ignore[assignment]
    return session


def test_a_loss_that_was_said_twice_keeps_no_session() -> None:
    """Lost while bytes move, it is told to the thread as an event and as the end of the round."""
    session = session_without_a_server()
    gone = weakref.ref(session)
    job = Job(None, version=1, call=1, encoding="dense")
    session._inbox.put((1, PeerLost("the daemon is gone")))
    session._inbox.put(_GiveUp("the daemon is gone, and the round with it"))
    gc.disable()
    try:
        session._run_job(job)
        with pytest.raises(RoundAborted, match="and the round with it") as caught:
            job.wait()
        del session, caught
        assert gone() is None, "only the collector would find it, and its sockets"
    finally:
        gc.enable()


FAILED = Frame(opcode=Opcode.FAILED, epoch=1, version=1, text="version 5 offered, version 7 is served")
GOODBYE = Frame(opcode=Opcode.SHUTDOWN, epoch=1, version=1)


@pytest.fixture
def meeting_a_failure(tmp_path: Path) -> Session:
    session = session_without_a_server()
    session.config = BridgeConfig(logdir=tmp_path)
    session._ending, session._moving, session._under_way = None, False, None
    session._joined = SimpleNamespace(peers={1: "the daemon"})  # type: ignore[assignment]
    session._mover = SimpleNamespace(interrupt=lambda: None)  # type: ignore[assignment]
    session.in_place, session.version = False, 1
    return session


def test_a_goodbye_hides_no_reason_that_came_while_begin_was_on_its_way(meeting_a_failure: Session) -> None:
    """The reason came before the bytes began to move, the goodbye behind it."""
    session = meeting_a_failure
    session._under_way = job = Job(None, version=1, call=1, encoding="dense")
    session._deliver(1, FAILED)
    session._moving = True
    session._deliver(1, GOODBYE)
    assert FAILED.text in session.closed
    with pytest.raises(RoundAborted, match="version 5 offered, version 7 is served"):
        job.wait()


def test_no_byte_moves_once_the_round_is_known_to_have_failed(meeting_a_failure: Session) -> None:
    session = meeting_a_failure
    moved: list[object] = []
    session._mover = SimpleNamespace(interrupt=lambda: None, move=lambda *_, **__: moved.append(1))  # type: ignore[assignment]
    session._meeting = SimpleNamespace(plan=lambda _: (SimpleNamespace(digest=b"d"), None, None))  # type: ignore[assignment]
    session._deliver(1, FAILED)
    job: Any = SimpleNamespace(shards=object(), version=1, encoding="dense")
    with pytest.raises(RoundAborted, match="version 5 offered, version 7 is served"):
        session._move(job, "joint", b"d")
    assert moved == []
    assert not session._moving
