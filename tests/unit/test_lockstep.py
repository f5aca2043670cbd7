"""Engines that step together run every forward under one version, whatever comes in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from bridge.errors import BridgeError
from tests.support.lockstep import LockstepServer
from vllm_patching import compat
from vllm_patching.control_page import ControlPage
from vllm_patching.engine import EngineBridge
from vllm_patching.lockstep import AGREE_EVERY, LockstepBridge

VERSIONS = 6


@contextmanager
def lockstep(
    seed: int, *, engines: int = 2, batches: int = 2, kind: type[EngineBridge] = LockstepBridge
) -> Iterator[LockstepServer]:
    with pytest.MonkeyPatch.context() as patch:
        server = LockstepServer(seed, engines=engines, batches=batches, kind=kind)
        patch.setattr(dist, "all_reduce", server.all_reduce)
        try:
            yield server
        finally:
            server.end()


def serve_and_commit(server: LockstepServer, *, pauses: bool = False) -> None:
    """Requests at any time on any engine, while the daemon asks for one version after the other."""
    choose = server.random
    paused = False
    while server.page.requested < VERSIONS or not server.committed:
        if server.committed and choose.random() < 0.3:
            server.page.requested += 1
        for index in range(len(server.engines)):
            if choose.random() < 0.2:
                server.request(index, steps=choose.choice((1, 2, 5, 40)))
            if choose.random() < 0.2:
                server.wake(index)
        if pauses and choose.random() < 0.1:  # a client pauses and resumes all, and waits for the answers
            server.settle()
            server.utility(*(("resume_scheduler",) if paused else ("pause_scheduler", "keep", False)))
            server.settle()
            paused = not paused
        server.happen(choose.choice((0, 1, 5, 50)))
    server.settle()
    if paused:
        server.utility("resume_scheduler")
        server.settle()
    assert server.committed
    assert not any(engine.core.scheduler.left for engine in server.engines)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), engines=st.integers(2, 4), batches=st.integers(1, 3), pauses=st.booleans())
def test_every_forward_runs_under_one_version_and_every_version_is_adopted(
    seed: int, engines: int, batches: int, pauses: bool
) -> None:
    with lockstep(seed, engines=engines, batches=batches) as server:
        serve_and_commit(server, pauses=pauses)
        versions = [forward[0] for forward in server.forwards]
        assert all(forward == forward[:1] * engines for forward in server.forwards)
        assert versions == sorted(versions)


class WithoutTheFirstStep(LockstepBridge):
    """Agrees within a wave, but not before its first forward."""

    def before_step(self) -> None:
        if self.idle or compat.enter_wave(self.engine):
            super().before_step()


class WithoutDummies(LockstepBridge):
    """Leaves out that an engine without work has no batch to stamp."""

    def before_dummy_batch(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("kind", [EngineBridge, WithoutTheFirstStep, WithoutDummies])
def test_each_part_of_the_rule_is_needed(kind: type[EngineBridge]) -> None:
    """Also says that what the test above looks for can be found."""
    mixed = 0
    for seed in range(12):
        with lockstep(seed, kind=kind) as server:
            try:
                serve_and_commit(server)
            except AssertionError as err:
                assert "ran under versions" in str(err)  # noqa: PT017 - which assertion failed is the point
                mixed += 1
    assert mixed


def test_all_take_up_what_one_sees_before_the_first_forward() -> None:
    with lockstep(0, engines=3) as server:
        server.happen(200)
        server.page.requested = 1
        server.wake(0)
        server.settle()
        assert [engine.served for engine in server.engines] == [1, 0, 0]  # alone, as it rests
        server.request(1, steps=3)
        server.settle()
        assert server.forwards[0] == [1, 1, 1]


def test_within_a_wave_an_engine_waits_for_the_next_agreement() -> None:
    with lockstep(1) as server:
        server.request(0, steps=40)
        while not server.forwards:
            server.happen(1)
        server.page.requested = 1
        server.wake(0)
        server.settle()
        before = [forward for forward in server.forwards if forward == [0, 0]]
        assert 1 <= len(before) <= AGREE_EVERY
        assert server.forwards[len(before)] == [1, 1]
        assert server.committed


def test_resting_engines_commit_without_a_forward() -> None:
    with lockstep(2) as server:
        server.page.requested = 1
        for index in (0, 1):
            server.wake(index)
        server.settle()
        assert server.committed
        assert server.forwards == []


def test_an_answer_nobody_could_have_given_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another collective of the engines was met instead: their steps have come apart."""
    core = SimpleNamespace(engines_running=True, step_counter=AGREE_EVERY, dp_group=None)
    bridge = LockstepBridge(core, salted=False)
    bridge.connect(ControlPage.create(2, 2))
    monkeypatch.setattr(compat, "highest", lambda _engine, value: value + 7)
    with pytest.raises(BridgeError, match="version 7, but only 0 was requested"):
        bridge.before_step()
    assert bridge.version == 0


def test_the_hooks_of_lockstep_are_checked_when_an_engine_registers() -> None:
    with lockstep(3) as server:
        hooks: dict[str, Any] = server.engines[0].bridge.hooks()
        assert all(hooks.values())
        assert {"_process_engine_step", "execute_dummy_batch", "schedule"} <= set(hooks)
