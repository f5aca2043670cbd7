"""How a round's bytes meet the running engine: beside it (two halves) or in its place (one).

``DoubleStaging`` is the design: updaters fill the half that nobody reads, and a commit flips.
``InPlaceStaging`` is for weights that do not fit twice: the engine stands still, from right before the first
byte is written until the version is committed. What was written in part only is torn: nothing is served from
it until a complete round has come.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from bridge.errors import TransferError
from vllm_patching.boundary import Boundary, behind

logger = logging.getLogger(__name__)

# Updaters wait for leave longer than the daemon waits for the engine: the daemon knows why it does not come.
LEAVE_MARGIN_S = 30.0
Orders = dict[int, dict[str, Any]]


class Swap(Protocol):
    """What a round needs, whoever carries its bytes."""

    def orders(self) -> Orders:
        """What to tell each rank's updater with the order to stage.

        Raises:
            TransferError: nothing may be written now.
        """

    def restore(self, wanted: int | None) -> int:
        """The version that a flip would bring back, as no byte of it has been overwritten.

        Raises:
            TransferError: there is none, or it is not ``wanted``.
        """

    def hold(self) -> None:
        """Every updater has checked all it can and asks for leave to write: see to it that it may be given.

        Raises:
            TransferError: it cannot be; nothing was written.
        """

    def begin(self, version: int) -> None:
        """Leave is about to be given: from now on ``version`` is written."""

    def commit(self, version: int) -> list[int]:
        """Make the version live that every updater has staged; returns each rank's stand-still in ns.

        Raises:
            TransferError: somebody died, a rank failed, or a deadline passed.
        """

    def abandon(self, why: str) -> None:
        """A round has ended without a commit, and no updater writes any more."""

    def let_go(self) -> None:
        """The daemon ends: an engine that stands still for it with whole weights goes on."""

    @property
    def keeps_what_is_staged(self) -> bool:
        """Whether a version that every rank has staged is the only whole one left, and so is committed."""

    @property
    def torn(self) -> str:
        """Why nothing can be served and what to do, "" while the weights are whole."""

    @property
    def repair_due(self) -> float | None:
        """When, by the monotonic clock, torn weights must have been repaired; None while they are whole."""


class DoubleStaging:
    """Two halves: a round disturbs nobody, and one that fails leaves nothing behind."""

    torn = ""
    repair_due: float | None = None
    keeps_what_is_staged = False

    def __init__(
        self,
        boundary: Boundary,
        *,
        copies: bool,
        outdated: Callable[[], str] = lambda: "",
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """``copies``: a flip copies one half over the other, so that none keeps the version before.

        ``outdated`` says why what is served is not the newest version, "" if it is. ``before_write`` is
        called before any rank may be written.
        """
        self._before_write = before_write
        self._boundary = boundary
        self._outdated = outdated
        self._page = boundary.page
        self._copies = copies

    def orders(self) -> Orders:
        ranks = range(self._boundary.num_ranks)
        if late := behind(self._page, ranks):
            raise TransferError(late)
        self._before_write()
        self._page.restorable = None  # before the first byte is written over it
        return {
            rank: {"half": 1 - self._page.slot(rank).active, "refuse_parts": self._outdated()}
            for rank in ranks
        }

    def restore(self, wanted: int | None) -> int:
        if late := behind(self._page, range(self._boundary.num_ranks)):
            raise TransferError(late)
        if self._copies:
            raise TransferError("with --flip copy both halves are the served version, none is the one before")
        if (version := self._page.restorable) is None:
            raise TransferError(
                f"version {self._page.requested} is served, and the one before it is not there any more: a "
                "later round has begun to write over it, or there was none; broadcast those weights again"
            )
        if wanted not in (None, version):
            raise TransferError(
                f"version {wanted} was to be served again, but the one before version {self._page.requested} "
                f"is version {version}"
            )
        return version

    def hold(self) -> None:
        raise AssertionError("no leave is needed to write a half that nobody reads")

    def begin(self, version: int) -> None:
        raise AssertionError(f"version {version}: no leave is needed to write a half that nobody reads")

    def commit(self, version: int) -> list[int]:
        # Before a version that an outdated server gets there is none: the checkpoint is no earlier version.
        keeps = not self._copies and not self._outdated()
        before, self._page.restorable = self._page.requested, None  # a rank may flip after we gave up waiting
        flips = self._boundary.commit(version, if_late="it becomes live with their next batch")
        self._page.restorable = before if keeps else None
        return flips

    def abandon(self, why: str) -> None:
        """Nothing: the half that was written is not read, and the next round writes all of it."""

    def let_go(self) -> None:
        """Nothing: the engine never stands still."""


class InPlaceStaging:
    """One half: the engine stands still while it is written."""

    keeps_what_is_staged = True

    def __init__(
        self,
        boundary: Boundary,
        *,
        repair_timeout_s: float,
        outdated: Callable[[], str] = lambda: "",
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over what an earlier daemon has left, if one has; the callbacks are as for two halves."""
        self._before_write = before_write
        self._boundary = boundary
        self._outdated = outdated
        self._page = boundary.page
        self._repair_timeout_s = repair_timeout_s
        self._why = ""
        logger.warning(
            "--staging in-place: there is no second half, so generation stands still for the length of every "
            "transfer, and after a round that fails midway nothing is served until a complete one has come "
            "(within --repair-timeout %g s, or vLLM is ended)",
            repair_timeout_s,
        )
        self.abandon("the daemon that wrote it ended")

    def orders(self) -> Orders:
        self._before_write()
        leave_s = self._boundary.timeout_s + LEAVE_MARGIN_S
        order = {"half": 0, "leave_s": leave_s, "refuse_parts": self.torn or self._outdated()}
        return {rank: dict(order) for rank in range(self._boundary.num_ranks)}

    def restore(self, wanted: int | None) -> int:  # noqa: ARG002 - none is kept, whichever is wanted
        raise TransferError("with --staging in-place the version before is not kept")

    def hold(self) -> None:
        if not self._page.writing:
            self._boundary.hold()

    def begin(self, version: int) -> None:
        if not self._page.writing:
            self._page.writing_since_ns = time.monotonic_ns()
        self._why = ""
        self._page.writing = version
        logger.info("the engine stands still; version %d is written over the live weights", version)

    def commit(self, version: int) -> list[int]:
        flips = self._boundary.commit(version, if_late="the engine goes on standing still")
        self._page.writing = 0  # whole again, on every rank
        try:
            stood = self._boundary.release()
        except TransferError:
            # The word is set and the version live: whoever died or is late, nothing of it is taken back.
            logger.exception("version %d is live, but the engine did not say that it goes on", version)
            return flips
        logger.info("version %d: generation stood still for %.3f s", version, stood / 1e9)
        return [max(stood, flip) for flip in flips]

    def abandon(self, why: str) -> None:
        if self._page.writing and self._page.writing == self._page.requested and self._finish(why):
            return
        if self._page.writing:
            self._why = self._why or why
            logger.critical("%s", self.torn)
        elif self._page.hold:
            self._release_unwritten(why)

    def _finish(self, why: str) -> bool:
        """A commit is asked for only when every rank holds the version: it is whole, and must become live."""
        version = self._page.writing
        try:
            self.commit(version)
        except TransferError:
            logger.exception("version %d was staged whole, and is still not live (%s)", version, why)
            return False
        logger.warning("version %d had been staged whole and is live (%s)", version, why)
        return True

    def let_go(self) -> None:
        if not self._page.writing:
            self._boundary.let_go()

    def _release_unwritten(self, why: str) -> None:
        try:
            stood = self._boundary.release()
        except TransferError:
            logger.exception("after a round that was given up before its first byte (%s)", why)
            return  # the word is set: the engine goes on as soon as it looks
        logger.info("nothing was written (%s); generation stood still for %.3f s", why, stood / 1e9)

    @property
    def torn(self) -> str:
        if not self._page.writing:
            return ""
        cause = f" ({self._why})" if self._why else ""
        return (
            f"the weights are torn: version {self._page.writing} was written over them in part{cause}. The "
            "engine stands still and keeps its requests. Broadcast the whole model again (broadcast_weights "
            f"or notify_update); after --repair-timeout {self._repair_timeout_s:g} s without vLLM is ended"
        )

    @property
    def repair_due(self) -> float | None:
        if not self._page.writing:
            return None
        return self._page.writing_since_ns / 1e9 + self._repair_timeout_s
