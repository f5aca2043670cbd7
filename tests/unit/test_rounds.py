"""A trainer rank's background thread: what a round that failed leaves behind, which must be nothing."""

from __future__ import annotations

import gc
import queue
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.config import BridgeConfig
from bridge.errors import PeerLost, RoundAborted
from bridge.job import Job
from bridge.protocol.session import Coordinator
from bridge.rounds import Session, _GiveUp


class Deaf:
    """In the place of a control group: nobody is at the other end."""

    doing = ""

    def send(self, *_: Any) -> None:
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
