"""One broadcast on a trainer rank: what was asked for, when the weights are free, and how it ended."""

from __future__ import annotations

import functools
import threading
import time
from typing import Literal, Protocol

import msgspec

from bridge.errors import BridgeError, ProtocolError
from bridge.guard import Reader, StepGuard
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.messages import ROLLBACK
from bridge.sharding import LocalShards

Encoding = Literal["dense", "auto", "delta"]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What one broadcast did. Seconds are wall-clock; ``flip_s`` is the longest stand-still of a rank, which
    with ``serve --staging in-place`` spans the transfer.

    ``bytes`` counts what travelled to the inference ranks; ``transfer_s`` moving it, ``stage_s`` from the
    start of the round to every rank holding it, ``total_s`` the whole broadcast as this rank saw it.
    ``restores`` is the older version whose weights this one has, after a rollback.

    Where several servers are configured, ``bytes`` is the sum and the times are the longest of those that
    have the version live: ``servers``, by their log directories. ``absent`` says why the others have not.
    """

    version: int
    bytes: int
    transfer_s: float
    stage_s: float
    flip_s: float
    transport: str
    total_s: float = 0.0
    restores: int | None = None
    servers: tuple[str, ...] = ()
    absent: dict[str, str] = {}

    def __str__(self) -> str:
        """For people: milliseconds, and the bytes in full."""
        return (
            f"version {self.version} live after {self.total_s * 1e3:.1f} ms: {self.bytes:,} bytes by "
            f"{self.transport} in {self.transfer_s * 1e3:.1f} ms, stood still for {self.flip_s * 1e3:.2f} ms"
        )


def read_receipt(text: str, *, version: int) -> Receipt:
    """The receipt in the text of the frame by which the other side says that ``version`` is live.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return msgspec.json.decode(text, type=Receipt)
    except UNREADABLE as err:
        raise ProtocolError(
            f"version {version} is live, but this is no receipt ({err}): {text[:80]!r}"
        ) from err


class Vote(Protocol):
    """One server's say, on trainer rank 0, in whether the version is committed; see ``bridge.fleet``."""

    @property
    def stage_timeout_s(self) -> float:
        """How long to wait for a verdict before ``expired``."""

    def staged(self) -> None:
        """The server holds the whole version."""

    def expired(self) -> None:
        """It has waited long enough for the others."""

    def failed(self, error: BridgeError) -> None:
        """It will not take the version."""


def forget_frames(error: BaseException | None) -> None:
    """An error lives as long as its caller keeps it, and must not keep the background thread's frames.

    They and those that called them hold an epoch's groups, sockets and snapshots. What the caller is to know
    is in the message; the log has the rest.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def again(error: BridgeError) -> BridgeError:
    """The same error for somebody to raise, where another one keeps it.

    One that is raised keeps the frames it comes through, and what they hold. Were it the one that is kept,
    they would be kept too; and where one of them holds whoever keeps it, as the caller's does, for ever.
    """
    made = type(error)(str(error))
    vars(made).update(vars(error))
    return made


class Job:
    """One broadcast, between the caller and the background thread."""

    def __init__(
        self,
        shards: LocalShards | None,
        *,
        version: int,
        call: int,
        encoding: Encoding,
        vote: Vote | None = None,
        to: int | None = None,
    ) -> None:
        """Without ``shards`` nothing is sent: the version before the served one, ``to``, comes back.

        ``vote``: who decides whether to commit; None where there is nobody to ask, and on other ranks.
        """
        self.shards = shards
        self.to = to
        self.vote = vote
        self.version = version
        self.call = call
        self.encoding = encoding
        self.started = time.monotonic()
        self.released = threading.Event()
        self.finished = threading.Event()
        self.receipt: Receipt | None = None
        self.error: BridgeError | None = None
        self.seen = False  # whether the caller was given the outcome
        self._concluding = threading.Lock()

    @property
    def manner(self) -> str:
        """What all ranks must want alike."""
        if self.shards is not None:
            return self.encoding
        return ROLLBACK if self.to is None else f"{ROLLBACK} {self.to}"

    @functools.cached_property
    def nbytes(self) -> int:
        """Of this rank's shards. Worked out in the background, while they are held."""
        return sum(part.numel() * part.element_size() for part in self.shards.tensors) if self.shards else 0

    def finish(self, receipt: Receipt | None, error: BridgeError | None) -> None:
        """Record the outcome; the weights are free either way, and nothing of them is held."""
        if self.shards is not None:
            self.shards.release()
        self._conclude(receipt, error)

    def forsake(self, error: BridgeError) -> None:
        """Record that the round is lost, while the background thread may still be held up in it.

        The weights are free: whatever is still read of them will never be served.
        """
        self._conclude(None, error)

    def _conclude(self, receipt: Receipt | None, error: BridgeError | None) -> None:
        with self._concluding:
            if self.finished.is_set():
                forget_frames(error)
                return
            self.receipt, self.error = receipt, error
            forget_frames(error)
            self.released.set()
            self.finished.set()
        if error is not None and self.vote is not None:
            self.vote.failed(error)

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self.finished.is_set()

    @property
    def free(self) -> bool:
        """Whether the weights may change."""
        return self.released.is_set()

    # Both waits end by the deadlines of the background thread, which always calls finish().

    def wait_released(self) -> None:
        """Wait until the weights may change; raises the round's error if it failed before."""
        self.released.wait()
        if self.error is not None and self.receipt is None:
            self.seen = True
            raise again(self.error)

    def wait(self) -> Receipt:
        """Wait for the outcome."""
        self.finished.wait()
        self.seen = True
        if self.error is not None:
            raise again(self.error)
        assert self.receipt is not None
        return self.receipt


class Outcome(Reader, Protocol):
    """What a caller waits for: a ``Job``, or those of several servers."""

    seen: bool

    @property
    def done(self) -> bool: ...

    def wait(self) -> Receipt: ...


class PendingBroadcast:
    """A broadcast under way. The weights are protected until every byte has been read."""

    def __init__(self, job: Outcome, guard: StepGuard) -> None:
        self._job = job
        self._guard = guard

    @property
    def done(self) -> bool:
        """Whether the version is live, or the round has failed."""
        return self._job.done

    def wait_released(self) -> None:
        """Wait until the weights may be changed; the next optimizer step does this by itself.

        Raises:
            BridgeError: the round failed before that.
        """
        self._job.wait_released()

    def wait(self) -> Receipt:
        """Wait until the version is live.

        Returns:
            What was sent, and how long it took.

        Raises:
            BridgeError: the round failed; the old version is still served.
        """
        try:
            return self._job.wait()
        finally:
            self.unguard()

    def unguard(self) -> None:
        """End the protection, unless the weights are still read: a signal may have cut a wait short."""
        if self._job.free:
            self._guard.remove()
