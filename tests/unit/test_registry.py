"""Who belongs to a server, and the mapping of ranks that hold different parts of the model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from bridge.errors import ConfigError, TransferError
from tests.support.mappings import identity_mapping
from vllm_patching.channel import Channel
from vllm_patching.control_page import ControlPage
from vllm_patching.registry import Member, Registry

SHAPES = {"embed": (8, 4), "layers.0": (4, 4), "layers.1": (4, 6), "norm": (4,)}


class Node:
    """A registry, and the vLLM processes that introduce themselves to it."""

    def __init__(self, *, engines: int, ranks_each: int) -> None:
        self.changes = 0
        self.registry = Registry(on_change=self._changed, num_engines=engines)
        self.ranks_each = ranks_each
        self._ends: list[Channel] = []

    def _changed(self) -> None:
        self.changes += 1

    def _admit(self, hello: dict[str, Any]) -> Member:
        ours, theirs = (Channel(end) for end in socket.socketpair())
        self._ends += [ours, theirs]
        common = {"world_size": self.ranks_each, "host": "here", "hooks": {}, "has_control": False}
        return self.registry.admit({**common, **hello}, ours, ())

    def engine(self, index: int, *, pid: int = 0) -> Member:
        return self._admit({"type": "engine", "index": index, "pid": pid or 100 + index})

    def worker(self, rank: int, *, pid: int = 0, holds: tuple[str, ...] = tuple(SHAPES)) -> Member:
        unused = [name for name in SHAPES if name not in holds]
        document = identity_mapping(("checkpoint", SHAPES), unused=unused)
        (rank_map,) = document.ranks
        hello = {
            "type": "worker",
            "rank": rank,
            "pid": pid or 200 + rank,
            "descriptors": 0,
            "model": "tests/tiny",
            "dtype": "bfloat16",
            "vllm_version": "0.32.0",
            "tp_degree": 1,
            "rank_map": msgspec.to_builtins(msgspec.structs.replace(rank_map, rank=rank)),
            "vocabularies": msgspec.to_builtins(document.vocabularies),
            "omitted_vocabularies": {},
        }
        return self._admit(hello)

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture
def node() -> Iterator[Node]:
    """Two engines with two ranks each."""
    node = Node(engines=2, ranks_each=2)
    yield node
    node.close()


def test_a_server_is_complete_with_every_worker_of_every_engine(node: Node) -> None:
    for rank in (0, 2, 3):
        node.worker(rank)
    node.engine(1)
    assert node.registry.world_size == 4
    node.engine(0)
    assert not node.registry.complete
    last = node.worker(1)
    assert node.registry.complete
    page = node.registry.control
    assert page is not None
    assert (page.num_ranks, page.num_engines) == (4, 2)
    page.slot(3).record(version=7, batch=1, flip_ns=1, active=1)
    page.engine(0).held, page.engine(1).held = 5, 6
    assert [page.slot(rank).version for rank in range(4)] == [0, 0, 0, 7]
    assert [engine.held for engine in page.engines()] == [5, 6]
    assert node.registry.pids() == {"engines": [100, 101], "workers": [200, 201, 202, 203]}
    node.registry.forget(last)
    assert not node.registry.complete


def test_the_loss_of_one_engine_of_two_leaves_the_other(node: Node) -> None:
    for index in (0, 1):
        node.engine(index)
    node.registry.forget(node.registry.engines[0])
    assert [member.who for member in node.registry.members()] == ["vLLM engine core 1 (pid 101 on here)"]


def test_nobody_takes_the_place_of_somebody_who_is_there(node: Node) -> None:
    node.worker(1, pid=11)
    node.worker(1, pid=11)  # it came back on another connection
    with pytest.raises(ConfigError, match=r"worker rank 1 \(pid 12 .* worker rank 1 \(pid 11 "):
        node.worker(1, pid=12)
    node.engine(0, pid=21)
    with pytest.raises(ConfigError, match="engine core 0"):
        node.engine(0, pid=22)


def test_more_engines_than_the_launcher_has_counted_are_refused() -> None:
    node = Node(engines=1, ranks_each=1)
    node.worker(0)
    with pytest.raises(ConfigError, match="--data-parallel-size"):
        node.worker(1)
    with pytest.raises(ConfigError, match=r"1 engine core\(s\) with 1 rank\(s\) each"):
        node.engine(1)
    node.close()


def test_a_new_vllm_is_told_of_before_its_first_process_is_answered() -> None:
    node = Node(engines=1, ranks_each=1)
    told: list[ControlPage] = []
    node.registry.on_new_vllm = told.append
    node.worker(0)
    node.engine(0)
    assert told == [node.registry.control]
    node.close()


def test_a_vllm_for_which_the_gate_cannot_be_closed_is_not_registered() -> None:
    node = Node(engines=1, ranks_each=1)

    def refuse(_: ControlPage) -> None:
        raise TransferError("the gate cannot be closed")

    node.registry.on_new_vllm = refuse
    with pytest.raises(TransferError, match="gate"):
        node.worker(0)
    assert (node.registry.members(), node.registry.control) == ([], None)
    node.close()


def test_ranks_that_hold_different_layers_make_one_mapping() -> None:
    """As the stages of a pipeline do, with an embedding that is tied: first and last stage hold it."""
    node = Node(engines=1, ranks_each=2)
    node.worker(0, holds=("embed", "layers.0"))
    node.worker(1, holds=("embed", "layers.1"))
    mapping = node.registry.mapping()
    node.close()
    (vocabulary,) = mapping.vocabularies
    assert vocabulary.unused == ("norm",)
    held = [
        {vocabulary.sources[write.source].name: rank.targets[write.target].name for write in writes}
        for rank in mapping.ranks
        for writes in [rank.writes["checkpoint"]]
    ]
    assert held == [
        {"embed": "live.embed", "layers.0": "live.layers.0"},
        {"embed": "live.embed", "layers.1": "live.layers.1"},
    ]
    rows = mapping.param_mappings
    assert {name: row.vllm_name for name, row in rows.items()} == {
        "embed": "live.embed",
        "layers.0": "live.layers.0",
        "layers.1": "live.layers.1",
    }
    assert rows["layers.1"].local_shape == (4, 6)
