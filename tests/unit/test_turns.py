"""Copies within one GPU: alone they do not wait, beside a forward one part of them goes to a batch.

On a clock of the tests' own, by which copies take their time, and longer where somebody else has the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.wire import turns
from bridge.wire.turns import Turns

PART = 1 << 20  # bytes
RATE = PART / turns.PART_S
ENQUEUE_S = 1e-5


class Gpu:
    """A clock, and a stream on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.enqueued = 0  # bytes, since the stream was last waited for
        self.busy_until = 0.0
        self.other_s = 0.0  # that somebody else takes in between
        self.waits = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits += 1
        self.now += seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until) + self.other_s
        self.enqueued = 0

    def copy(self, pace: Turns, nbytes: int) -> None:
        pace.take(nbytes)
        self.now += ENQUEUE_S
        self.enqueued += nbytes
        self.busy_until = max(self.now, self.busy_until) + nbytes / RATE


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=made.monotonic, sleep=made.sleep))
    return made


def paced(gpu: Gpu, batches: Callable[[], int]) -> Turns:
    """Parts of ``PART`` bytes."""
    streams: list[Any] = [gpu]
    return Turns(2 * RATE / turns.COPY_SHARE, streams, batches)


def never() -> int:
    raise AssertionError("nobody was in the way, and it waits for a batch")


def test_alone_it_waits_for_nobody(gpu: Gpu) -> None:
    alone = paced(gpu, never)
    for _ in range(100):
        gpu.copy(alone, PART)
    assert gpu.enqueued == PART, "a part was not waited for before the next one"


def test_other_lanes_copies_in_between_are_nobody_in_the_way(gpu: Gpu) -> None:
    alone = paced(gpu, never)
    for _ in range(50):
        gpu.copy(alone, PART // 4)
        gpu.now += turns.PART_S


@pytest.mark.parametrize("copies", [1, 7])
def test_beside_a_forward_each_batch_has_one_part(gpu: Gpu, copies: int) -> None:
    step_s, began = 0.008, []
    shared = paced(gpu, lambda: int(gpu.now / step_s))
    gpu.other_s = 0.001
    for part in range(10):
        for _ in range(copies):
            gpu.copy(shared, PART // copies)
        began.append(int(gpu.now / step_s))
        if part == 4:
            gpu.other_s = 0.0  # by chance the GPU is free, and the next batch comes all the same
    assert [b - a for a, b in itertools.pairwise(began)] == [1] * 9


def test_small_copies_count_by_what_it_takes_to_enqueue_them(gpu: Gpu) -> None:
    alone = paced(gpu, never)
    fitting = int(turns.PART_S / turns.COPY_S * 0.99)
    for _ in range(fitting):
        gpu.copy(alone, 1)
    assert gpu.enqueued == fitting
    for _ in range(fitting):
        gpu.copy(alone, 1)
    assert gpu.enqueued < fitting


def test_what_does_not_decode_is_waited_for_once(gpu: Gpu) -> None:
    beside_a_trainer = paced(gpu, lambda: 7)
    gpu.other_s = 0.005
    gpu.copy(beside_a_trainer, PART)
    gpu.copy(beside_a_trainer, PART)
    waits = gpu.waits
    assert waits * turns.POLL_S >= turns.LONGEST_PAUSE_S * 0.99
    for _ in range(20):
        gpu.copy(beside_a_trainer, PART)
    assert gpu.waits == waits


def test_decoding_that_begins_again_is_waited_for_again(gpu: Gpu) -> None:
    begun = 7
    shared = paced(gpu, lambda: begun)
    gpu.other_s = 0.005
    for _ in range(3):
        gpu.copy(shared, PART)
    waits, begun = gpu.waits, 8
    gpu.copy(shared, PART)
    assert gpu.waits > waits
