"""The engine's hold beside vLLM's own pause: vLLM's real scheduler states, and the real control page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.interface import PauseState

from vllm_patching.control_page import ControlPage
from vllm_patching.engine import EngineBridge, _hook_pauses


class Engine:
    """The parts of an engine core that a hold touches, with two ranks of which one may be out of order."""

    def __init__(self, *, healthy: bool = True) -> None:
        self.scheduler = SimpleNamespace(pause_state=PauseState.UNPAUSED)
        self.scheduler.set_pause_state = lambda state: setattr(self.scheduler, "pause_state", state)
        self.notified = 0
        self.asked: list[str] = []
        self.model_executor = SimpleNamespace(collective_rpc=self._rpc)
        self._healthy = healthy

    def _rpc(self, name: str, timeout: float) -> list[bool]:
        assert timeout > 0
        self.asked.append(name)
        return [True, self._healthy]

    def _pause_complete(self) -> bool:
        return True

    def _notify_idle_state_callbacks(self) -> None:
        self.notified += 1


def held(engine: Any) -> tuple[EngineBridge, ControlPage]:
    bridge, page = EngineBridge(engine, salted=False), ControlPage.create(2)
    bridge.connect(page)
    _hook_pauses(engine, bridge.hold)
    return bridge, page


def test_a_hold_is_confirmed_only_when_nothing_runs() -> None:
    engine = Engine()
    bridge, page = held(engine)
    page.hold = 7
    bridge.hold.follow()
    assert engine.scheduler.pause_state is PauseState.PAUSED_ALL
    assert page.engine(0).held == 0, "batches may still be in flight"
    for _ in range(3):
        engine._notify_idle_state_callbacks()  # the loop has nothing left to run
    assert (page.engine(0).held, engine.asked, engine.notified) == (7, ["bridge_quiesce"], 0)
    assert not engine._pause_complete()
    page.hold = 0
    bridge.hold.follow()
    assert engine.scheduler.pause_state is PauseState.UNPAUSED
    assert page.engine(0).held == 0
    assert page.engine(0).stood_ns > 0
    engine._notify_idle_state_callbacks()
    assert engine.notified == 1
    assert engine._pause_complete()


def test_a_rank_that_does_not_come_to_rest_confirms_nothing() -> None:
    engine = Engine(healthy=False)
    bridge, page = held(engine)
    page.hold = 7
    bridge.hold.follow()
    engine._notify_idle_state_callbacks()
    assert page.engine(0).held == 0


@pytest.mark.parametrize("wish", list(PauseState))
def test_what_was_asked_for_meanwhile_takes_effect_afterwards(wish: PauseState) -> None:
    engine = Engine()
    engine.scheduler.pause_state = PauseState.PAUSED_NEW
    bridge, page = held(engine)
    page.hold = 7
    bridge.hold.follow()
    engine.scheduler.set_pause_state(wish)
    assert engine.scheduler.pause_state is PauseState.PAUSED_ALL, "nobody but the daemon ends a hold"
    page.hold = 0
    bridge.hold.follow()
    assert engine.scheduler.pause_state is wish


def test_a_pause_from_before_is_there_afterwards() -> None:
    engine = Engine()
    bridge, page = held(engine)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for ticket in (7, 8, 0):  # the second hold begins before the end of the first was seen
        page.hold = ticket
        bridge.hold.follow()
        engine._notify_idle_state_callbacks()
        assert page.engine(0).held == ticket
    assert engine.scheduler.pause_state is PauseState.PAUSED_ALL
