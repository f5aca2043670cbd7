"""What an engine core does at both ends of a batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge import flight, telemetry
from bridge.errors import TransferError
from vllm_patching.control_page import ControlPage
from vllm_patching.engine import EngineBridge


def hooked() -> tuple[Any, ControlPage]:
    scheduler = SimpleNamespace(
        schedule=SimpleNamespace, update_from_output=lambda _: "tokens", set_pause_state=lambda _: None
    )
    engine = SimpleNamespace(
        scheduler=scheduler, _handle_client_request=lambda *_: None, add_request=lambda request: request,
        _pause_complete=lambda: True, _notify_idle_state_callbacks=lambda: None,
    )  # fmt: skip
    bridge, page = EngineBridge(engine, salted=False), ControlPage.create(3)
    bridge.hook()
    bridge.connect(page)
    return engine, page


def test_a_batch_carries_the_version_that_is_asked_for() -> None:
    engine, page = hooked()
    assert engine.scheduler.schedule().bridge_commit == 0
    page.requested = 4
    batch = engine.scheduler.schedule()
    assert batch.bridge_commit == 4
    assert engine.scheduler.update_from_output(batch) == "tokens"
    assert engine._weight_version == "4"


def test_no_token_of_a_batch_whose_ranks_differ_leaves_and_no_other_is_begun() -> None:
    engine, page = hooked()
    page.requested = 1
    batch = engine.scheduler.schedule()
    page.slot(0).record(version=1, batch=1, flip_ns=1, active=1)
    page.slot(2).fail()
    for step in (lambda: engine.scheduler.update_from_output(batch), engine.scheduler.schedule):
        with pytest.raises(TransferError, match=r"rank\(s\) \[2\] could not flip to version 1"):
            step()
    assert page.failed_ranks() == [2]


def test_a_commit_is_kept_among_the_last_events_and_a_batch_without_one_is_not() -> None:
    engine, page = hooked()
    flight._events.clear()
    telemetry.stand(epoch=None, version=0)  # as an engine core does when it is hooked
    for version in (0, 0, 4, 4, 5):
        page.requested = version
        engine.scheduler.update_from_output(engine.scheduler.schedule())
        assert telemetry._standing() == (None, version), "what lines of the log say"
    kept = [(event["event"], event["version"]) for event in flight.events()]
    assert kept == [("commit asked", 4), ("commit done", 4), ("commit asked", 5), ("commit done", 5)]


def test_an_engine_that_ends_for_a_rank_leaves_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_LOGDIR", str(tmp_path))
    monkeypatch.setattr(flight, "_who", ("engine", 0))
    engine, page = hooked()
    flight._events.clear()
    page.requested = 1
    batch = engine.scheduler.schedule()
    page.slot(2).fail()
    with pytest.raises(TransferError) as caught:
        engine.scheduler.update_from_output(batch)
    record = tmp_path / f"flight-engine-0-{os.getpid()}.jsonl"
    head, *events = [json.loads(line) for line in record.read_text().splitlines()]
    assert head["why"] == str(caught.value)
    assert [event["event"] for event in events] == ["commit asked"]
