"""Arenas on a CPU: what a flip does in each kind, what another process is shown, and which kind is taken."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from bridge.errors import ConfigError
from vllm_patching import arena as arenas
from vllm_patching import cpu_arena

NBYTES = (1 << 20) + 77
CPU = torch.device("cpu")


def made(staging: str, flip: str) -> arenas.Arena:
    arena = arenas.allocate(NBYTES, CPU, staging=staging, flip=flip)
    arena.live(0, NBYTES).fill_(3)
    arena.open_second_half()
    arena.warm()
    return arena


def shown(arena: arenas.Arena) -> arenas.Halves:
    """The halves as an updater maps them."""
    fds = tuple(os.dup(fd) for fd in arena.export())
    return arenas.adopt(fds, NBYTES, "", arena.handles(), arena.kind)


@pytest.mark.parametrize("flip", ["remap", "copy"])
def test_what_was_filled_is_live_after_the_flip_and_not_before(flip: str) -> None:
    arena = made("double", flip)
    live = arena.live(0, NBYTES)
    halves = shown(arena).halves
    assert len(halves) == 2
    assert all(half.eq(3).all() for half in halves), "both halves start with what was loaded"
    for value in (4, 5, 6):
        to = 1 - arena.active
        halves[to].fill_(value)
        assert live.eq(value - 1).all()
        arena.flip(to)
        assert live.eq(value).all()
        assert live.data_ptr() == arena.live(0, NBYTES).data_ptr()
        assert halves[1 - arena.active].eq(value if flip == "copy" else value - 1).all()
    arena.close()


def test_in_place_there_is_one_half_and_it_is_live() -> None:
    arena = made("in-place", "auto")
    (half,) = shown(arena).halves
    live = arena.live(0, NBYTES)
    half.fill_(4)
    assert live.eq(4).all()
    arena.flip(1 - arena.active)
    assert live.eq(4).all()
    assert arena.active == 0
    arena.close()


def test_closed_memory_is_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    for staging, flip in (("double", "remap"), ("double", "copy"), ("in-place", "auto")):
        made(staging, flip).close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_remapping_was_tried_not_guessed() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    why_not = cpu_arena.why_no_remap()
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    assert (why_not == "") == (release >= (5, 13)), why_not
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_auto_falls_back_with_the_reason_and_the_cost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert arenas._choose("double", "auto", lambda: "the kernel is from 2019", 5 << 20) == "copy"
    (record,) = caplog.records
    assert "the kernel is from 2019" in record.message
    assert "copies 5 MiB" in record.message
    assert arenas._choose("double", "auto", lambda: "", NBYTES) == "remap"
    assert arenas._choose("in-place", "auto", lambda: "never asked", NBYTES) == "in-place"
    with pytest.raises(ConfigError, match="the kernel is from 2019; use --flip auto or --flip copy"):
        arenas._choose("double", "remap", lambda: "the kernel is from 2019", NBYTES)
