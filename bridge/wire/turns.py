"""Copies within one GPU, in turns with the forward that is served there.

Between two GPUs a copy engine does the work. Within one GPU the driver takes a kernel on all multiprocessors,
and kernels of two processes do not run side by side: the GPU goes from one process to the other, and the
forward stands still for as long as the copy takes and half a millisecond more. So the copy is made in parts,
and each batch is held up by one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

PART_S = 0.0014  # that a part takes; with the change of places a batch is held up by two milliseconds
COPY_S = 5e-6  # to enqueue a copy: small ones take as long as that
COPY_SHARE = 0.85  # of the memory's rate, for reading and writing together, that a copy comes to
LATE_S = 0.0005  # a part that ends so much later than alone had to wait for somebody
LONGEST_PAUSE_S = 0.02
POLL_S = 0.0002


class Turns:
    """One round's copies within a GPU, from the first to the last of a lane."""

    def __init__(
        self, memory_bytes_per_s: float, streams: Sequence[torch.cuda.Stream], batches: Callable[[], int]
    ) -> None:
        """``streams`` are those of the copies; ``batches`` says how many have begun on their device."""
        self._streams = streams
        self._batches = batches
        self._bytes_per_s = COPY_SHARE * memory_bytes_per_s / 2
        self._seconds = 0.0  # that the part will have taken, alone
        self._began = 0.0
        self._shared = False
        self._idle_since = -1

    def take(self, nbytes: int) -> None:
        """Before ``nbytes`` are enqueued: end the part that they no longer fit into."""
        seconds = max(nbytes / self._bytes_per_s, COPY_S)
        if self._seconds and self._seconds + seconds > PART_S:
            self._end()
        if not self._seconds:
            self._began = time.monotonic()
        self._seconds += seconds

    def _end(self) -> None:
        enqueued = time.monotonic() - self._began  # other lanes' copies too
        for stream in self._streams:
            stream.synchronize()
        late = time.monotonic() - self._began - max(enqueued, self._seconds)
        # By chance a part may find the GPU free between two batches: the next one comes all the same.
        self._shared = self._shared or late > LATE_S
        if self._shared:
            self._await_batch()
        self._seconds = 0.0

    def _await_batch(self) -> None:
        """Until the next one has begun; not if none has since one did not come: somebody else computes."""
        before = self._batches()
        if before == self._idle_since:
            return
        deadline = time.monotonic() + LONGEST_PAUSE_S
        while self._batches() == before:
            if time.monotonic() > deadline:
                self._idle_since = before
                return
            time.sleep(POLL_S)
