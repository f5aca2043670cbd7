"""One broadcast on a trainer rank: what was asked for, when the weights are free, and how it ended."""

from __future__ import annotations

import functools
import threading
import time
from typing import Literal

import msgspec

from bridge.errors import BridgeError
from bridge.guard import StepGuard
from bridge.sharding import LocalShards

Encoding = Literal["dense", "auto", "delta"]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What one broadcast did. Seconds are wall-clock; ``flip_s`` is the longest stand-still of a rank, which
    with ``serve --staging in-place`` spans the transfer.

    ``bytes`` counts what travelled to the inference ranks; ``transfer_s`` moving it, ``stage_s`` from the
    start of the round to every rank holding it, ``total_s`` the whole broadcast as this rank saw it.
    """

    version: int
    bytes: int
    transfer_s: float
    stage_s: float
    flip_s: float
    transport: str
    total_s: float = 0.0

    def __str__(self) -> str:
        """For people: milliseconds, and the bytes in full."""
        return (
            f"version {self.version} live after {self.total_s * 1e3:.1f} ms: {self.bytes:,} bytes by "
            f"{self.transport} in {self.transfer_s * 1e3:.1f} ms, stood still for {self.flip_s * 1e3:.2f} ms"
        )


class Job:
    """One broadcast, between the caller and the background thread."""

    def __init__(self, shards: LocalShards, *, version: int, call: int, encoding: Encoding) -> None:
        self.shards = shards
        self.version = version
        self.call = call
        self.encoding = encoding
        self.started = time.monotonic()
        self.released = threading.Event()
        self.finished = threading.Event()
        self.receipt: Receipt | None = None
        self.error: BridgeError | None = None
        self.seen = False  # whether the caller was given the outcome

    @functools.cached_property
    def nbytes(self) -> int:
        """Of this rank's shards. Worked out in the background, while they are held."""
        return sum(part.numel() * part.element_size() for part in self.shards.tensors)

    def finish(self, receipt: Receipt | None, error: BridgeError | None) -> None:
        """Record the outcome; the weights are free either way, and nothing of them is held."""
        self.receipt, self.error = receipt, error
        self.shards.release()
        self.released.set()
        self.finished.set()

    # Both waits end by the deadlines of the background thread, which always calls finish().

    def wait_released(self) -> None:
        """Wait until the weights may change; raises the round's error if it failed before."""
        self.released.wait()
        if self.error is not None and self.receipt is None:
            self.seen = True
            raise self.error

    def wait(self) -> Receipt:
        """Wait for the outcome."""
        self.finished.wait()
        self.seen = True
        if self.error is not None:
            raise self.error
        assert self.receipt is not None
        return self.receipt


class PendingBroadcast:
    """A broadcast under way. The weights are protected until every byte has been read."""

    def __init__(self, job: Job, guard: StepGuard) -> None:
        self._job = job
        self._guard = guard

    @property
    def done(self) -> bool:
        """Whether the version is live, or the round has failed."""
        return self._job.finished.is_set()

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
            self._guard.remove()
