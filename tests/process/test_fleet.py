"""Trainer ranks agree on which of several servers take part, whatever each of them has seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import bridge
from bridge import fleet
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import RendezvousError, RoundAborted
from bridge.fleet import Fleet
from bridge.protocol.ballot import Policy
from bridge.rounds import Session
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.processes


class Met:
    """Sessions that a rank opened, and servers that it cannot join."""

    def __init__(self, policy: Policy, unreachable: set[str]) -> None:
        self.opened: list[str] = []
        self.unreachable = unreachable
        Session.open = self._open  # type: ignore[method-assign, assignment]  # a process of its own
        fleet.FIRST_S = 0.0
        ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
        self.fleet = Fleet(BridgeConfig(logdirs=("a", "b"), commit=policy), lambda: ranks)

    def _open(self, config: BridgeConfig, _: Ranks, **__: object) -> SimpleNamespace:
        assert config.logdir is not None
        self.opened.append(config.logdir)
        if config.logdir in self.unreachable:
            raise RendezvousError("no route")
        return SimpleNamespace(
            closed="", device=None, in_place=False, outdated=False, version=0, close=lambda: None
        )

    def ready(self) -> list[str]:
        return [server.name for server in self.fleet.ready(None)]


def one_rank_cannot_join_a_server(_: Path) -> None:
    met = Met("available", {"b"} if dist.get_rank() == 1 else set())
    assert met.ready() == ["a"], "on every rank"
    met.unreachable.clear()
    assert met.ready() == ["a", "b"]
    assert met.opened == ["a", "b", "b"]


def one_rank_cannot_join_and_all_are_needed(_: Path) -> None:
    met = Met("all", {"b"} if dist.get_rank() == 1 else set())
    with pytest.raises(
        RendezvousError, match="1 of 2 servers cannot be met, and commit='all' needs all: b: "
    ):
        met.ready()


def one_rank_has_heard_that_an_epoch_is_over(_: Path) -> None:
    met = Met("all", set())
    met.ready()
    if dist.get_rank() == 1:
        met.fleet.servers[0].session.closed = "the daemon is gone"
    assert met.ready() == ["a", "b"]
    assert met.opened == ["a", "b", "a"]


def one_rank_cannot_take_part(_: Path) -> None:
    met = Met("all", set())
    if dist.get_rank() == 1:
        met.fleet.refuse("its adapters are damaged")
    else:
        with pytest.raises(RoundAborted, match="another trainer rank cannot take part"):
            met.ready()
    assert met.ready() == ["a", "b"]


def one_rank_has_seen_that_it_is_to_stop(_: Path) -> None:
    os.environ["BRIDGE_STOP_FILE"] = __file__ if dist.get_rank() == 1 else "no such file"
    assert bridge.should_stop(), "on every rank"
    os.environ["BRIDGE_STOP_FILE"] = ""
    assert not bridge.should_stop()


@pytest.mark.parametrize(
    "scenario",
    [
        one_rank_has_seen_that_it_is_to_stop,
        one_rank_cannot_join_a_server,
        one_rank_cannot_join_and_all_are_needed,
        one_rank_has_heard_that_an_epoch_is_over,
        one_rank_cannot_take_part,
    ],
)
def test_ranks_agree(scenario: Callable[[Path], None], tmp_path: Path) -> None:
    run_ranks(scenario, 2, tmp_path)
