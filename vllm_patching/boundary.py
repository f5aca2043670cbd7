"""The daemon's hand on the engines: ask for a commit or a stand-still by a word, and wait for the answers.

Engines and workers answer by words in shared memory, in the middle of their step: there is nothing to wait on
but the word, for about one step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from bridge import flight
from bridge.errors import TransferError
from vllm_patching.channel import ChannelClosed
from vllm_patching.control_page import ControlPage, RankSlot
from vllm_patching.registry import Member, Registry

logger = logging.getLogger(__name__)

WAKE_INTERVAL_S = 0.05
POLL_S = 0.0002


class Boundary:
    """Where batches of each engine can be told apart; used by the daemon's one thread.

    There are several engines where a dense model is served data parallel. They share no batch, so each comes
    to its own boundary, and a word is answered when all of them have.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        timeout_s: float,
        first_death: Callable[[], str],
        before_commit: Callable[[int], None] = lambda _: None,
        after_commit: Callable[[], None] = lambda: None,
        watch: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """``timeout_s`` bounds each wait; ``first_death`` names whose death ended vLLM, "" if nobody's.

        ``before_commit`` is told each version right before it is asked for, ``after_commit`` once it is live,
        before anybody else hears so. ``watch`` is told before and after a wait: words of other nodes' ranks
        come by message.
        """
        assert registry.control is not None
        self.page: ControlPage = registry.control
        self.timeout_s = timeout_s
        self._registry = registry
        self._first_death = first_death
        self._watch = watch
        self._before_commit = before_commit
        self._after_commit = after_commit

    @property
    def num_ranks(self) -> int:
        return self.page.num_ranks

    def commit(self, version: int, *, if_late: str) -> list[int]:
        """Ask every engine to make ``version`` live and wait until every rank has; returns flip times in ns.

        ``if_late`` says what happens to the version if a rank does not in time.

        Raises:
            TransferError: somebody of vLLM died, a rank failed to flip (the engine is ended then), or the
                deadline passed.
        """
        staged = f"version {version} was staged"
        self._check_alive(staged)
        slots = self._slots()

        def late() -> str:
            behind = [rank for rank, slot in enumerate(slots) if slot.version != version]
            ahead = [rank for rank in range(len(slots)) if rank not in behind]
            served = f" (ranks {ahead} serve it already)" if ahead else ""
            return (
                f"{staged}{served}, but ranks {behind} did not commit within {self.timeout_s:g} s; {if_late}"
            )

        self._before_commit(version)
        self._ask(
            lambda: setattr(self.page, "requested", version),
            lambda: all(slot.version == version for slot in slots),
            before=staged,
            failure=f"a rank could not flip to version {version}",
            late=late,
        )
        self._after_commit()
        return [slot.flip_ns for slot in slots]

    def hold(self) -> None:
        """Let every engine stand still, requests kept, and wait until nothing runs on any rank.

        Raises:
            TransferError: somebody of vLLM died, or the deadline passed; the engine goes on then.
        """
        self._check_alive("the engine was asked to stand still")
        ticket = time.monotonic_ns()  # no other hold ever had it, also none of an earlier daemon
        try:
            self._ask(
                lambda: setattr(self.page, "hold", ticket),
                lambda: all(engine.held == ticket for engine in self.page.engines()),
                before="the engine was asked to stand still",
                failure="a rank's device did not come to rest",
                late=lambda: (
                    f"the engine did not come to a stand-still within {self.timeout_s:g} s, so nothing was "
                    "written; is it stuck in a batch? --commit-timeout bounds the wait"
                ),
            )
        except TransferError:
            self.let_go()
            raise

    def release(self) -> int:
        """Let every engine go on; returns how long the slowest stood still, in ns.

        Raises:
            TransferError: somebody of vLLM died, or the engine did not answer within the deadline.
        """
        self._ask(
            lambda: setattr(self.page, "hold", 0),
            lambda: all(engine.held == 0 for engine in self.page.engines()),
            before="the engine was told to go on",
            failure="a rank failed while the engine was told to go on",
            late=lambda: f"the engine was told to go on, and did not within {self.timeout_s:g} s",
        )
        return max(engine.stood_ns for engine in self.page.engines())

    def let_go(self) -> None:
        """Let every engine go on, without waiting; nothing happens to one that does not stand still."""
        self.page.hold = 0
        self._wake(self._engines())

    def _engines(self) -> list[Member]:
        return list(self._registry.engines.values())

    def _slots(self) -> list[RankSlot]:
        return [self.page.slot(rank) for rank in range(self.num_ranks)]

    def _check_alive(self, before: str) -> None:
        if not self._registry.complete or self._registry.control is not self.page:
            gone = self._first_death() or "vLLM is not complete any more"
            raise TransferError(f"{before}, but {gone}")

    def _ask(
        self,
        ask: Callable[[], None],
        done: Callable[[], bool],
        *,
        before: str,
        failure: str,
        late: Callable[[], str],
    ) -> None:
        with self._watching():
            engines, members = self._engines(), self._registry.members()
            self._check_alive(before)  # only now: who was lost before this list was made is in no list
            slots = self._slots()
            failures = [slot.failures for slot in slots]
            flight.note("vLLM asked", behind=before)
            ask()
            self._wake(engines)
            deadline = time.monotonic() + self.timeout_s
            next_wake = time.monotonic() + WAKE_INTERVAL_S
            pause = threading.Event()
            while not done():
                now = time.monotonic()
                if any(s.failures != f for s, f in zip(slots, failures, strict=True)):
                    end_engines(self._registry, f"{failure}; ranks would differ")
                    raise TransferError(f"{failure}; the server was ended")
                if lost := [m.who for m in members if m not in self._registry.members()]:
                    raise TransferError(f"{before}, but {', '.join(lost)} is gone")
                if now > deadline:
                    raise TransferError(late())
                if now >= next_wake:
                    self._wake(engines)
                    next_wake = now + WAKE_INTERVAL_S
                pause.wait(POLL_S)
            flight.note("vLLM answered", behind=before)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self._watch(True)
        try:
            yield
        finally:
            self._watch(False)

    def _wake(self, engines: Sequence[Member]) -> None:
        """Let engine cores look at the control page, also those that have nothing to do."""
        for engine in engines:
            try:
                engine.channel.nudge({"type": "wake"})
            except ChannelClosed:
                logger.debug("the connection of %s ended; its reader reports it", engine.who)


def end_engines(registry: Registry, why: str) -> None:
    """End every engine core, and with them the server, by force."""
    logger.critical("%s; ending the engine", why)
    for engine in list(registry.engines.values()):
        with contextlib.suppress(ProcessLookupError):  # vLLM ends the others when one has died
            os.kill(engine.hello["pid"], signal.SIGKILL)


def behind(page: ControlPage, ranks: Sequence[int]) -> str:
    """Which of ``ranks`` the last commit has not reached, as a sentence; "" if none."""
    late = [rank for rank in ranks if page.slot(rank).version != page.requested]
    if not late:
        return ""
    return (
        f"rank {late[0]} still serves version {page.slot(late[0]).version} while version {page.requested} "
        "waits to be committed; is the engine stuck in a batch?"
    )
