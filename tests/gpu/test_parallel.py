"""Layouts that take two GPUs: the stages of a pipeline, and a mixture of experts' engines in lockstep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_serving import ON_GPU, SHAPE
from tests.gpu.test_two_gpus import TOGETHER
from tests.support.checks import Streams, assert_equal, assert_labels_in_order, flips
from tests.support.models import build_checkpoint
from tests.support.serving import Server, Trainers, serving_together, training
from vllm_patching.compat import installed_version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="one GPU here, these tests need two"),
]

EXPERTS = {"moe_intermediate_size": 256, "num_experts": 8}
LAYOUTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {  # name -> kind, shape, vLLM's flags
    "pipeline": ("qwen3", SHAPE | {"tie_word_embeddings": True}, ("--pipeline-parallel-size=2",)),
    "lockstep": ("qwen3_moe", SHAPE | EXPERTS, ("--data-parallel-size=2", "--enable-expert-parallel")),
}
LABELS = tuple(int(part) for part in installed_version().split(".")[:2]) >= (0, 32)
Answers = list[list[dict[str, Any]]]  # of each engine


@dataclass
class Served:
    """A live server of one layout, its two sets of weights, and what a fresh vLLM answers from the second."""

    server: Server
    sets: list[Path]
    fresh: Answers
    engines: int
    first: Answers

    def must_answer(self, expected: Answers) -> None:
        for answers, others in zip(ask(self.server, self.engines), expected, strict=True):
            assert_equal(answers, others, tolerance=0.0)

    def publish(self, trainers: Trainers, index: int) -> int:
        """Both trainer ranks' shards of set ``index`` become live; the version."""
        trainers.must("load", path=str(self.sets[index]))
        receipts = trainers.must("broadcast")
        assert [receipt["transport"] for receipt in receipts] == ["pull-gpu"] * 2
        return int(receipts[0]["version"])


def ask(server: Server, engines: int) -> Answers:
    return [server.api.greedy(4, 48, headers={"X-data-parallel-rank": str(e)}) for e in range(engines)]


@pytest.fixture(scope="module")
def all_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Fresh servers from the second sets and live ones from the first, of both layouts, started at once."""
    sets = {
        name: [build_checkpoint(kind, tmp_path_factory.mktemp(name), seed=seed, **shape) for seed in range(2)]
        for name, (kind, shape, _) in LAYOUTS.items()
    }
    wanted = [
        (
            sets[name][0 if bridge else 1],
            tmp_path_factory.mktemp(f"{name}-log"),
            {"bridge": bridge, "flags": (*TOGETHER, *flags)}
            | ({"bridge_flags": ["--http"]} if bridge else {}),
        )
        for bridge in (False, True)
        for name, (_, _, flags) in LAYOUTS.items()
    ]
    with serving_together(*wanted) as servers:
        found = {}
        for name, fresh, live in zip(LAYOUTS, servers[:2], servers[2:], strict=True):
            engines = len(live.status()["pids"]["engines"])
            found[name] = Served(live, sets[name], ask(fresh, engines), engines, ask(live, engines))
            fresh.stop()
        yield found


@pytest.fixture(scope="module", params=list(LAYOUTS))
def served(request: pytest.FixtureRequest, all_served: dict[str, Served]) -> Served:
    return all_served[request.param]


@pytest.fixture(scope="module")
def trainers(served: Served) -> Iterator[Trainers]:
    """Two ranks that shard the model, on the server's own two GPUs."""
    with training("fsdp2", served.sets[0], logdir=served.server.logdir, env=ON_GPU, ranks=2) as ranks:
        yield ranks


def test_versions_of_sharded_weights_with_requests_in_flight(served: Served, trainers: Trainers) -> None:
    """Also: the ranks flip before the same forward each time, whatever the engines were doing."""
    server = served.server
    assert server.status()["world_size"] == 2
    assert [a["tokens"] for a in served.first[0]] != [a["tokens"] for a in served.fresh[0]]
    versions = [served.publish(trainers, 1)]
    served.must_answer(served.fresh)
    streams = Streams(server.api, width=16, tokens=400)
    versions += [served.publish(trainers, number % 2) for number in range(10)]
    in_flight = sum(streams.alive())
    streams.stop()
    assert streams.failures == []
    assert in_flight == 16
    for index, expected in ((0, served.first), (1, served.fresh)):
        versions.append(served.publish(trainers, index))
        served.must_answer(expected)
    assert versions == list(range(versions[0], versions[0] + 13))
    assert [row["version"] for row in server.status()["ranks"]] == versions[-1:] * 2
    assert [version for _, version in flips(server, 0)] == list(range(1, versions[-1] + 1))
    assert flips(server, 1) == flips(server, 0)
    if LABELS:
        assert assert_labels_in_order(server, streams.finished) > 0


@pytest.mark.parametrize("served", ["lockstep"], indirect=True)
def test_engines_in_lockstep_while_load_comes_and_goes(served: Served, trainers: Trainers) -> None:
    """Commits with both engines idle, with one at work, and while waves of requests begin and end."""
    server = served.server
    assert served.engines == 2

    def commit(times: int) -> None:
        for _ in range(times):
            trainers.must("broadcast")

    commit(3)
    for width in (1, 3):
        streams = Streams(server.api, width=width, tokens=400)
        commit(8)
        assert any(streams.alive())
        streams.stop()
        assert streams.failures == []
    for tokens in (1, 2, 5, 20, 33, 60):
        streams = Streams(server.api, width=2, tokens=tokens)
        commit(3)
        streams.stop()
        assert streams.failures == []
    for index, expected in ((1, served.fresh), (0, served.first)):
        served.publish(trainers, index)
        served.must_answer(expected)
    committed = flips(server, 0)
    assert [version for _, version in committed] == list(range(1, len(committed) + 1))
    assert flips(server, 1) == committed
