"""Trainer ranks that should hold the same weights, and do not: nothing of it is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge import Bridge
from bridge.config import BridgeConfig, Comparison
from bridge.errors import BridgeError
from tests.support.node import Node, node, state_of
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

NAME = "norm"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), deadline_s=6.0) as made:
        yield made


def went_apart(seed: int) -> dict[str, torch.Tensor]:
    """The same on every rank but for one element of one tensor."""
    state = state_of(seed)
    state[NAME].view(-1)[1] += dist.get_rank()
    return state


def config(path: Path, when: Comparison) -> BridgeConfig:
    return BridgeConfig(logdir=(path / "server").resolve(), compare_replicas=when)


def by_default(path: Path) -> None:
    with Bridge(config(path, "first")) as trainer:
        with pytest.raises(BridgeError) as caught:
            trainer.broadcast_weights(went_apart(1))
        said = str(caught.value)
        assert "1 part(s) of the model differ between trainer ranks that hold the same one:" in said
        assert f"{NAME}: trainer rank 0 differs from trainer rank 1" in said
        receipt = trainer.broadcast_weights(state_of(2))
        assert receipt.version == 1
        assert trainer.broadcast_weights(state_of(3)).version == 2, "ranks are in step"
        trainer._fleet.servers[0].close()  # as by a connection that was lost
        assert trainer.broadcast_weights(went_apart(3)).version == 3, "what went apart meanwhile is a warning"
        assert trainer.broadcast_weights(state_of(3)).version == 4


def always(path: Path) -> None:
    with Bridge(config(path, "always")) as trainer:
        version = trainer.broadcast_weights(state_of(4)).version
        assert trainer.broadcast_weights(state_of(5)).version == version + 1
        with pytest.raises(BridgeError, match="differ between trainer ranks"):
            trainer.broadcast_weights(went_apart(6))
        assert trainer.broadcast_weights(state_of(7)).version == version + 2


def never(path: Path) -> None:
    with Bridge(config(path, "never")) as trainer:
        trainer.broadcast_weights(went_apart(8))


def one_rank_only(path: Path) -> None:
    when: Comparison = "never" if dist.get_rank() else "first"
    with (
        Bridge(config(path, when)) as trainer,
        pytest.raises(BridgeError, match=r"replicas compared: (never|first)"),
    ):
        trainer.broadcast_weights(state_of(9))


def run(scenario, server: Node, path: Path) -> None:  # type: ignore[no-untyped-def]
    (path / "server").symlink_to(server.logdir)
    run_ranks(scenario, 2, path)


def newest(server: Node) -> list[str]:
    """What the newest batch has read, by rank."""
    server.await_batch()
    return [digest for _, digest in server.served()[-1]]


def test_the_first_round_compares_them(server: Node, tmp_path: Path) -> None:
    run(by_default, server, tmp_path)
    assert newest(server) == server.serves(3)


def test_every_round_does_if_it_is_asked_to(server: Node, tmp_path: Path) -> None:
    run(always, server, tmp_path)
    assert newest(server) == server.serves(7)


def test_ranks_that_are_told_different_things_say_so(server: Node, tmp_path: Path) -> None:
    run(one_rank_only, server, tmp_path)


def test_none_does_if_it_is_asked_not_to(server: Node, tmp_path: Path) -> None:
    run(never, server, tmp_path)
