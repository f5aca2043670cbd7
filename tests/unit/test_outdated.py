"""Which vLLM stands still for the newest version, and when it goes on without; the daemon's own decisions."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_patching.daemon import Daemon

HELLO = {"type": "worker", "arena": "remap", "lockstep": False}
UNPUBLISHED = {"published": False, "_unpublished": "the mapping cannot be written"}


def daemon(**changes: Any) -> Any:
    """What the decisions look at: a vLLM that stands still, 5 s ago, and is to do so for 60."""
    woken: list[str] = []
    engine = SimpleNamespace(
        who="an engine", channel=SimpleNamespace(nudge=lambda message: woken.append(message))
    )
    page = SimpleNamespace(hold=time.monotonic_ns() - 5 * 10**9)
    here = SimpleNamespace(
        registry=SimpleNamespace(control=page, engines={0: engine}, arenas={HELLO["arena"]}),
        args=SimpleNamespace(hold_outdated=60.0), newest=SimpleNamespace(version=3), nodes=None,
        borrowing=SimpleNamespace(asking=False, has_peers=False), published=True, in_round=False,
        _unpublished="",
        outdated="version 3 is newer", live_version=0, page=page, woken=woken,
    )  # fmt: skip
    here._held_for_s = lambda page: Daemon._held_for_s(here, page)
    for name, value in changes.items():
        owner, _, attribute = name.rpartition("__")
        setattr(getattr(here, owner) if owner else here, attribute, value)
    return here


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({}, False),
        ({"args__hold_outdated": 4.0}, True),  # its time was over a second ago
        ({"args__hold_outdated": 4.0, "in_round": True}, False),  # it may come any moment
        ({"args__hold_outdated": 0.0, "borrowing__asking": True}, False),
        ({"args__hold_outdated": 0.0}, True),  # its peers have nothing
        ({"args__hold_outdated": float("inf")}, False),
        ({"outdated": ""}, True),
        ({"outdated": "", "borrowing__asking": True}, False),  # a peer may know of a newer one
        ({"outdated": "", "in_round": True}, True),  # the newest one is there, the round is the next one's
        ({"published": False, "args__hold_outdated": 0.0}, False),  # it is about to be
        (UNPUBLISHED, False),
        ({**UNPUBLISHED, "args__hold_outdated": 4.0}, True),
        ({**UNPUBLISHED, "args__hold_outdated": 0.0, "borrowing__asking": True}, True),
    ],
)  # fmt: skip
def test_when_it_goes_on(changes: dict[str, Any], goes_on: bool) -> None:
    here = daemon(**changes)
    Daemon._let_go_on(here)
    assert (here.page.hold == 0) is goes_on
    assert bool(here.woken) is goes_on


def test_what_is_written_in_place_is_not_let_go() -> None:
    here = daemon(args__hold_outdated=0.0, registry__arenas={"in-place"})
    Daemon._let_go_on(here)
    assert here.page.hold


@pytest.mark.parametrize(
    ("changes", "hello", "held"),
    [
        ({}, {}, True),
        ({"newest__version": 0}, {}, False),  # nothing but the checkpoint was ever served
        ({"newest__version": 0, "borrowing__has_peers": True}, {}, True),
        ({"args__hold_outdated": 0.0}, {}, False),
        ({"args__hold_outdated": 0.0, "borrowing__has_peers": True}, {}, True),
        ({"nodes": object()}, {}, False),
        ({}, {"arena": "in-place"}, False),
        ({"borrowing__has_peers": True}, {"lockstep": True}, False),  # another engine would wait for its step
    ],
)
def test_who_stands_still_from_the_start(changes: dict[str, Any], hello: dict[str, Any], held: bool) -> None:
    assert Daemon._begins_held(daemon(**changes), {**HELLO, **hello}) is held
