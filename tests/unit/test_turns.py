"""Copies within one GPU: alone they do not wait, beside a forward one part of them goes to a batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from bridge.wire import cuda, turns
from bridge.wire.turns import Turns

PART = 1 << 20  # bytes


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Turns]:
    """``paced(batches)``: parts of ``PART`` bytes and a millisecond."""
    monkeypatch.setattr(turns, "PART_S", 1e-3)
    monkeypatch.setattr(turns, "COPY_S", 1e-5)
    monkeypatch.setattr(turns, "COPY_SHARE", 1.0)
    monkeypatch.setattr(cuda, "memory_bytes_per_s", lambda _: 2 * PART / turns.PART_S)
    return lambda batches: Turns(torch.device("cuda", 0), [], batches)


def held_up(seconds: float) -> None:
    """Somebody else computes: the part takes so much longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def never() -> int:
    raise AssertionError("nobody was in the way, and it waits for a batch")


def test_alone_it_waits_for_nobody(paced: Callable[..., Turns]) -> None:
    alone = paced(never)
    for _ in range(100):
        alone.take(PART)


def test_beside_a_forward_each_batch_has_one_part(paced: Callable[..., Turns]) -> None:
    asked = itertools.count()
    begun: list[int] = []

    def batches() -> int:
        begun.append(next(asked) // 3)  # the next one begins while it waits
        return begun[-1]

    shared = paced(batches)
    parts = 5
    for part in range(parts):
        shared.take(PART // 2)
        shared.take(PART // 2)
        if part == 0:  # those behind it find the GPU free by chance
            held_up(3e-3)
    assert begun[-1] == parts - 1, "the last part is not ended by another one"


def test_small_copies_count_by_what_it_takes_to_enqueue_them(paced: Callable[..., Turns]) -> None:
    waited: list[int] = []

    def batches() -> int:
        waited.append(len(waited))
        return len(waited) // 2

    shared = paced(batches)
    for _ in range(90):  # of a hundredth of a part's time each
        shared.take(1)
    held_up(3e-3)
    assert not waited
    for _ in range(20):
        shared.take(1)
    assert waited


def test_where_no_batch_comes_it_goes_on(
    paced: Callable[..., Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONGEST_PAUSE_S", 0.01)
    asked: list[float] = []

    def idle() -> int:
        asked.append(time.monotonic())
        return 7

    beside_a_trainer = paced(idle)
    beside_a_trainer.take(PART)
    held_up(3e-3)
    beside_a_trainer.take(PART)
    waited = len(asked)
    assert waited > 1
    beside_a_trainer.take(PART)
    assert len(asked) == waited, "what is not decoding is not waited for again"
