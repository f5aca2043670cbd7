"""A rank of the trainer's own that stands still: the others say so, and do not wait for it for long."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import PeerLost
from bridge.fleet import Fleet
from bridge.rounds import Session
from tests.support import left
from tests.support.node import node
from tests.support.ranks import run_ranks
from tests.support.serving import stop, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

WAIT_S = 4.0
SLACK_S = 10.0  # of a busy machine; torch's own groups wait for 1800


class Said:
    """A session, and all that its heartbeats could have asked for what they say."""

    def __init__(self) -> None:
        self.closed, self.device, self.version = "", None, 3
        self.asked: list[Callable[[], str]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "waits_for":
            self.asked.append(value)
        super().__setattr__(name, value)


def one_is_stopped(path: Path) -> None:
    """Rank 1 is stopped between two rounds, and goes on later."""
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    session = Said()
    Session.open = lambda *_, **__: session  # type: ignore[method-assign, assignment]
    (path / "logs").mkdir(exist_ok=True)
    fleet = Fleet(BridgeConfig(logdir=path / "logs", ranks_timeout_s=WAIT_S), lambda: ranks)
    fleet.ready(None)
    pids: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(pids, os.getpid())
    stopped, held = path / "stopped", len(left.descriptors(os.getpid()))
    if ranks.rank == 1:
        wait_until("to have been stopped", (path / "goes-on").exists, timeout_s=60)
    elif ranks.rank == 0:
        stop(pids[1])
        stopped.touch()
    else:  # or it may have waited for long enough before rank 0 comes
        wait_until("rank 1 to be stopped", stopped.exists, timeout_s=60)
    began = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        fleet.ready(None)
    assert time.monotonic() - began < WAIT_S + SLACK_S
    said = str(caught.value)
    assert f"the {ranks.world_size} trainer ranks could not agree" in said
    assert f"(rank {ranks.rank} on " in said
    assert "BRIDGE_RANKS_TIMEOUT_S" in said
    if ranks.rank == 0:
        assert "trainer rank(s) [1] did not come within 4 s" in said
        heard = [waits_for() for waits_for in session.asked[-3:]]
        assert heard == [
            "its own ranks to come to the next broadcast",
            "trainer rank(s) 1 to come to the next broadcast",
            "",
        ]
        (record,) = (path / "logs").glob(f"flight-*-{os.getpid()}.jsonl")
        head, *events = map(json.loads, record.read_text().splitlines())
        assert head["why"] == said
        assert any(e["event"] == "waits" and e["what"] == "the trainer's own ranks" for e in events)
        (path / "goes-on").touch()
        os.kill(pids[1], signal.SIGCONT)
    else:
        assert re.search(r"rank 0 did not answer: it, or a rank that its own error names", said)
    # The trainer's own group is whole, and the next call begins anew, on all ranks alike.
    dist.barrier()
    assert fleet.ready(None)[0].session is session  # type: ignore[comparison-overlap]
    del caught  # its frames hold what was under way
    what = f"no more than {held} descriptors, and another's socket or two: a group has five and more"
    wait_until(what, lambda: len(left.descriptors(os.getpid())) < held + 4, timeout_s=10)


def test_status_names_the_ranks_that_have_not_come(tmp_path: Path) -> None:
    def says() -> list[str]:
        waits = made.status().get("waits", ())
        return [wait["waits_for"] for wait in waits if wait["who"].startswith("trainer")]

    with node(tmp_path / "log", trainers=4, deadline_s=6) as made:
        made.begin(1)
        trainers = made.train()
        wait_until("the ranks to compute", lambda: says() == ["its own next broadcast"], timeout_s=60)
        for rank, missing in ((0, "1, 2, 3"), (3, "1, 2"), (1, "2")):
            trainers.one(rank).send("broadcast", seed=2)
            wanted = f"trainer rank(s) {missing} to come to the next broadcast"
            wait_until(f"{wanted!r} in the status", lambda wanted=wanted: says() == [wanted], timeout_s=60)
        trainers.one(2).send("broadcast", seed=2)
        assert [answer.get("version") for answer in trainers.answers(made.patience_s)] == [2] * 4
        wait_until("the ranks to compute", lambda: says() == ["its own next broadcast"], timeout_s=60)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_is_stopped_is_named(world_size: int, tmp_path: Path) -> None:
    run_ranks(one_is_stopped, world_size, tmp_path)
