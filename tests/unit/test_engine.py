"""What an engine core does at both ends of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
