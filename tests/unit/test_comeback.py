"""How often what died is started again, and after which pause."""

from __future__ import annotations

import time

import pytest

from launch import comeback
from launch.comeback import Restarts


def test_the_pause_grows_until_the_cause_is_gone() -> None:
    restarts = Restarts("the daemon", 9)
    assert [restarts.take() for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    restarts.ready()
    assert restarts.take() == 30, "it may be ready and die again"
    assert restarts.used_up
    restarts.ready(cured=True)
    assert restarts.used_up, "a pause less, no restart more"
    assert [restarts.take(), restarts.take()] == [0, 1]


@pytest.mark.parametrize(("ready_s", "pauses"), [(59, [2, 4]), (61, [0, 1])])
def test_what_has_been_ready_for_a_while_is_back_without_a_pause(
    monkeypatch: pytest.MonkeyPatch, ready_s: float, pauses: list[float]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    restarts = Restarts("vLLM", 9)
    assert [restarts.take(), restarts.take()] == [0, 1]
    restarts.ready()
    now += ready_s
    first = restarts.take()
    now += 1000  # of a start, in which it dies
    assert [first, restarts.take()] == pauses
    assert restarts.count == 4, "a pause less, no restart more"


def test_a_long_life_is_a_new_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts = Restarts("vLLM", 2)
    assert [restarts.take(), restarts.take()] == [0, 1]
    restarts.ready()
    restarts.forgive()
    assert restarts.used_up
    later = time.monotonic() + comeback.FORGIVEN_AFTER_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    restarts.forgive()
    assert not restarts.used_up
    assert restarts.take() == 0
