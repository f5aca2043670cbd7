"""What a daemon answers to ``status``: one word for how the server is, and the same fields at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest

from launch.display import show_status
from vllm_patching import status
from vllm_patching.control_page import ControlPage
from vllm_patching.gate import Word
from vllm_patching.status import LastRound, Status

UNPUBLISHED = {"mapping": None, "published": False}
TORN = SimpleNamespace(torn="the weights are torn")
MOMENTS: dict[str, list[dict[str, Any]]] = {
    "failed": [{"failed": "rank 1 was refused"}, {"failed": "it runs other code", "in_round": True}],
    "waiting": [UNPUBLISHED],
    "torn": [{"swap": TORN}, {"swap": TORN, "outdated": "vLLM was started again"}],
    "recovering": [
        {"outdated": "vLLM is gone", "published": False, "swap": TORN},
        {"outdated": "vLLM was started again", "in_round": True},
    ],
    "round": [{"in_round": True}, {"in_round": True, "swap": TORN}],
    "ready": [{}],
}


@pytest.fixture
def page() -> Iterator[ControlPage]:
    page = ControlPage.create(2)
    yield page
    os.close(page.fd)


def daemon(page: ControlPage, **moment: Any) -> Any:
    """A daemon of two ranks that serves version 3; what is not so in this moment is given."""
    for rank in (0, 1):
        page.slot(rank).record(version=3, batch=4, flip_ns=5, active=1)
    page.requested = 3
    registry = SimpleNamespace(
        control=page, world_size=2, num_engines=1, workers={0: "a", 1: "b"}, engines={0: "c"}, complete=True,
        pids=lambda: {"engines": [11], "workers": [12, 13]},
    )  # fmt: skip
    made = {
        "failed": "", "mapping": SimpleNamespace(model="m", num_inference_ranks=2), "published": True,
        "registry": registry, "in_round": False, "swap": None, "outdated": "", "epoch": None, "nodes": None,
        "borrowing": SimpleNamespace(asking=False), "version": 3, "admission": SimpleNamespace(epochs=2),
        "gate": SimpleNamespace(word=Word(open=True)),
        "crew": None, "args": SimpleNamespace(rendezvous_host="h"), "store": SimpleNamespace(port=7),
        "committed": 3, "aborted": 1, "last_error": None, "given_up": "", "filing": False,
        "last_round": LastRound(
            version=3, bytes=8, transfer_s=0.1, stage_s=0.2, flip_s=0.3, transport="pull"
        ),
    }  # fmt: skip
    return SimpleNamespace(**{**made, **moment})


def test_every_state_is_tried_here() -> None:
    assert MOMENTS.keys() == set(get_args(status.StateName))


@pytest.mark.parametrize("state", MOMENTS)
def test_one_word_says_how_the_server_is(
    page: ControlPage, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for moment in MOMENTS[state]:
        answer = msgspec.to_builtins(status.describe(daemon(page, **moment)))
        assert answer["state"] == state
        assert set(answer) == {"type", *Status.__struct_fields__}
        assert msgspec.convert(answer, Status).ranks == status.describe(daemon(page, **moment)).ranks
        show_status(answer, as_json=True)
        assert json.loads(capsys.readouterr().out) == answer
        show_status(answer, as_json=False)
        assert f"state: {state} ({answer['detail']})" in capsys.readouterr().out


def test_ranks_say_what_they_serve(page: ControlPage) -> None:
    made = daemon(page)
    page.slot(1).record(version=2, batch=9, flip_ns=5, active=0)
    answer = status.describe(made)
    assert answer.weight_version == 2, "of the rank that is behind"
    assert [(r.rank, r.version, r.batch, r.active_half) for r in answer.ranks] == [(0, 3, 4, 1), (1, 2, 9, 0)]
    assert status.describe(daemon(page, **UNPUBLISHED)).ranks == []
