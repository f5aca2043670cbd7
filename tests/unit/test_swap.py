"""The daemon's side of both stagings: what a round leaves behind, and one that ends early.

The control page, the boundary and the swap are the real ones; the engine's and the workers' answers come from
a thread, as they would from other processes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bridge import flight
from bridge.errors import TransferError
from tests.support.serving import wait_until
from vllm_patching.boundary import Boundary
from vllm_patching.channel import Channel
from vllm_patching.control_page import ControlPage
from vllm_patching.swap import DoubleStaging, InPlaceStaging

RANKS = 2
ENGINES = 2
SOON_S = 20.0  # within which a thread has answered, on a machine that does much else
LATE_S = 0.2  # where none answers


class Server:
    """Answers holds and commits until told to stop.

    ``commits`` says whether ranks still flip, ``stuck`` which engines do not answer a hold.
    """

    def __init__(self) -> None:
        self.page = ControlPage.create(RANKS, ENGINES)
        self.commits = True
        self.stuck: set[int] = set()
        channel = SimpleNamespace(nudge=lambda _message: True)
        self.engines = {i: SimpleNamespace(hello={"pid": 0}, channel=channel) for i in range(ENGINES)}
        self.control = self.page
        self.complete = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def held(self) -> list[bool]:
        return [bool(engine.held) for engine in self.page.engines()]

    def members(self) -> list[SimpleNamespace]:
        return list(self.engines.values())

    def _run(self) -> None:
        since = [0] * ENGINES
        while not self._stop.wait(0.001):
            for index, engine in enumerate(self.page.engines()):
                if engine.held == self.page.hold or index in self.stuck:
                    continue
                if self.page.hold:
                    since[index] = time.monotonic_ns()
                else:
                    engine.stood_ns = time.monotonic_ns() - since[index]
                engine.held = self.page.hold
            for rank in range(RANKS) if self.commits else ():
                slot, version = self.page.slot(rank), self.page.requested
                if slot.version < version:
                    slot.record(version=version, batch=1, flip_ns=5, active=0)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def test_an_engine_that_reads_nothing_holds_a_commit_no_longer_than_its_deadline(server: Server) -> None:
    """A stopped engine core: each wake is one more message in a buffer that is full some day."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    channel = Channel(ours)
    while channel.nudge({"type": "wake"}):
        pass
    server.commits = False
    server.engines[0].channel = channel
    start = time.monotonic()
    with pytest.raises(TransferError, match="did not commit within"):
        double(server, timeout_s=LATE_S).commit(1)
    assert time.monotonic() - start < SOON_S
    channel.close()
    theirs.close()


def test_an_engine_that_dies_right_before_it_is_asked_is_not_waited_for(server: Server) -> None:
    """The version is noted on disk first, which takes its time, and the engine is killed meanwhile."""

    def dies(_: int) -> None:
        server.commits, server.complete = False, False
        del server.engines[1]

    boundary = Boundary(
        server,  # type: ignore[arg-type]
        timeout_s=SOON_S,
        first_death=lambda: "vLLM engine core 1 (pid 7) is gone",
        before_commit=dies,
    )
    start = time.monotonic()
    with pytest.raises(
        TransferError, match=r"version 1 was staged, but vLLM engine core 1 \(pid 7\) is gone"
    ):
        boundary.commit(1, if_late="")
    assert time.monotonic() - start < SOON_S / 2
    assert server.page.requested == 0


def test_a_vllm_that_was_started_again_is_not_asked_for_what_another_one_staged(server: Server) -> None:
    boundary = Boundary(server, timeout_s=SOON_S, first_death=lambda: "")  # type: ignore[arg-type]
    server.control = ControlPage.create(RANKS, ENGINES)
    with pytest.raises(TransferError, match="vLLM is not complete any more"):
        boundary.commit(1, if_late="")
    assert (server.page.requested, server.control.requested) == (0, 0)


# --- two halves: which version the inactive one holds ------------------------------------------------------


def double(
    server: Server, *, copies: bool = False, timeout_s: float = SOON_S, **callbacks: Any
) -> DoubleStaging:
    boundary = Boundary(server, timeout_s=timeout_s, first_death=lambda: "")  # type: ignore[arg-type]
    return DoubleStaging(boundary, copies=copies, **callbacks)


def publish(swap: DoubleStaging, version: int) -> None:
    swap.orders()
    swap.commit(version)


def test_the_first_version_has_the_checkpoint_before_it(server: Server) -> None:
    swap = double(server)
    with pytest.raises(TransferError, match=r"version 0 is served.*there was none"):
        swap.restore(None)
    publish(swap, 1)
    assert swap.restore(None) == 0


def test_what_vllm_was_asked_and_did_not_answer_is_kept_among_the_last_events(server: Server) -> None:
    boundary = Boundary(server, timeout_s=SOON_S, first_death=lambda: "")  # type: ignore[arg-type]
    flight._events.clear()
    boundary.commit(1, if_late="")
    server.commits, boundary.timeout_s = False, LATE_S
    with pytest.raises(TransferError, match="did not commit"):
        boundary.commit(2, if_late="")
    kept = [(event["event"], event["behind"]) for event in flight.events()]
    one, two = "version 1 was staged", "version 2 was staged"
    assert kept == [("vLLM asked", one), ("vLLM answered", one), ("vLLM asked", two)]


def test_a_rollback_can_be_rolled_back(server: Server) -> None:
    swap = double(server)
    publish(swap, 4)
    publish(swap, 7)
    assert swap.restore(None) == 4
    swap.commit(8)
    assert swap.restore(None) == 7


def test_orders_to_write_end_it_and_so_does_a_commit_that_is_late(server: Server) -> None:
    swap = double(server)
    publish(swap, 1)
    swap.orders()
    with pytest.raises(TransferError, match="begun to write over it"):
        swap.restore(None)
    server.commits, swap._boundary.timeout_s = False, LATE_S
    with pytest.raises(TransferError, match="did not commit within"):
        swap.commit(2)
    with pytest.raises(TransferError, match="still serves version 1 while version 2 waits"):
        swap.restore(None)


def test_what_a_restarted_vllm_serves_is_no_version_before(server: Server) -> None:
    reasons = ["vLLM was started again"]
    swap = double(server, outdated=lambda: reasons[0])
    orders = swap.orders()
    assert {order["refuse_parts"] for order in orders.values()} == {"vLLM was started again"}
    swap.commit(7)
    with pytest.raises(TransferError, match=r"version 7 is served.*there was none"):
        swap.restore(None)
    reasons[0] = ""
    publish(swap, 8)
    assert swap.restore(None) == 7


def test_a_reader_is_told_before_anything_is_written(server: Server) -> None:
    told: list[int | None] = []
    swap = double(server, before_write=lambda: told.append(server.page.restorable))
    publish(swap, 1)
    swap.orders()
    assert told == [None, 0], "while the half is what it was"


def test_only_the_wanted_version_comes_back(server: Server) -> None:
    swap = double(server)
    publish(swap, 4)
    publish(swap, 7)
    assert swap.restore(4) == 4
    with pytest.raises(
        TransferError, match=r"version 3 was to be served again, but the one before .* is version 4"
    ):
        swap.restore(3)


def test_a_rollback_that_is_late_leaves_nothing_to_come_back_to(server: Server) -> None:
    swap = double(server)
    publish(swap, 1)
    publish(swap, 2)
    assert swap.restore(None) == 1
    server.commits, swap._boundary.timeout_s = False, LATE_S
    with pytest.raises(TransferError, match="did not commit within"):
        swap.commit(3)
    server.commits = True
    wait_until(
        "the late flip",
        lambda: server.page.slot(0).version == 3 == server.page.slot(1).version,
        timeout_s=SOON_S,
    )
    with pytest.raises(TransferError, match="not there any more"):
        swap.restore(None)


def test_another_daemon_knows_it_too(server: Server) -> None:
    swap = double(server)
    publish(swap, 1)
    publish(swap, 2)
    assert double(server).restore(None) == 1


def test_a_flip_that_copies_keeps_nothing(server: Server) -> None:
    swap = double(server, copies=True)
    publish(swap, 1)
    with pytest.raises(TransferError, match="--flip copy"):
        swap.restore(None)


# --- one half ------------------------------------------------------------------------------------------


def staging(server: Server, *, timeout_s: float = SOON_S) -> InPlaceStaging:
    boundary = Boundary(server, timeout_s=timeout_s, first_death=lambda: "")  # type: ignore[arg-type]
    return InPlaceStaging(boundary, repair_timeout_s=60.0)


def test_a_round_that_fails_before_its_first_byte_lets_the_engine_go_on(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    assert server.held() == [True, True]
    swap.abandon("the trainer died")
    assert not swap.torn
    assert (server.page.hold, server.held()) == (0, [False, False])


def test_a_round_that_fails_midway_leaves_the_engine_standing(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    swap.begin(3)
    swap.abandon("the trainer died")
    assert "version 3" in swap.torn
    assert "the trainer died" in swap.torn
    assert server.held() == [True, True]
    swap.let_go()
    assert server.page.hold, "torn weights are never let go"
    assert swap.repair_due is not None
    swap.hold()  # the repair
    swap.begin(4)
    assert swap.commit(4)[0] > 0
    assert not swap.torn
    assert server.held() == [False, False]


def test_a_daemon_that_died_while_it_committed_left_a_whole_version(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    swap.begin(3)
    server.page.requested = 3  # as ``commit`` does, once every rank has staged it
    heir = staging(server)
    assert not heir.torn
    assert [server.page.slot(rank).version for rank in range(RANKS)] == [3, 3]
    assert (server.page.writing, server.held()) == (0, [False, False])


def test_a_commit_that_is_late_is_finished_when_the_ranks_follow(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    swap.begin(3)
    server.commits, swap._boundary.timeout_s = False, LATE_S
    with pytest.raises(TransferError, match="goes on standing still"):
        swap.commit(3)
    assert swap.torn
    server.commits, swap._boundary.timeout_s = True, SOON_S
    swap.abandon("the commit was late")
    assert not swap.torn
    assert server.held() == [False, False]


def test_a_live_version_is_not_reported_failed_because_the_engine_is_late_to_go_on(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    swap.begin(3)
    server.stop()
    swap._boundary.timeout_s = LATE_S
    for rank in range(RANKS):
        server.page.slot(rank).record(version=3, batch=1, flip_ns=7, active=0)
    assert swap.commit(3) == [7, 7]
    assert not swap.torn


def test_an_engine_that_does_not_stand_still_is_let_go(server: Server) -> None:
    swap = staging(server, timeout_s=LATE_S)
    server.stop()
    with pytest.raises(TransferError, match="nothing was written"):
        swap.hold()
    assert server.page.hold == 0


def test_nothing_is_written_while_one_of_two_engines_still_runs(server: Server) -> None:
    swap = staging(server, timeout_s=LATE_S)
    server.stuck = {1}
    with pytest.raises(TransferError, match="nothing was written"):
        swap.hold()
    assert server.page.hold == 0


def test_a_daemon_that_ends_lets_an_unwritten_engine_go(server: Server) -> None:
    swap = staging(server)
    swap.hold()
    swap.let_go()
    assert server.page.hold == 0
