"""Servers whose ranks hold different experts, or that have several engines, follow the trainer alike."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import Mapping
from tests.support.checks import Streams, assert_equal, assert_labels_in_order, flips
from tests.support.fresh_load import arena_bytes, broadcast_each, differing, fresh_loads, live_digests
from tests.support.full import only_in_full
from tests.support.serving import (
    COMPLETED,
    RETURN_MEMORY,
    UNBOUND,
    Server,
    serving,
    serving_together,
    training,
)

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

F32 = ["--dtype=float32"]


def expert_owners(mapping: Mapping) -> dict[int, set[int]]:
    """Of which experts each inference rank holds anything, by rank."""
    experts = {
        index: int(source.name.partition(".experts.")[2].partition(".")[0])
        for index, source in enumerate(mapping.vocabulary("checkpoint").sources)
        if ".experts." in source.name
    }
    return {
        rank.rank: {experts[w.source] for w in rank.writes["checkpoint"] if w.source in experts}
        for rank in mapping.ranks
    }


def test_every_byte_of_every_rank_is_that_of_a_fresh_load(checkpoint, tmp_path):
    """Uneven shards of three ranks into divided experts; benchmarks/matrix.py has the other combinations.

    No request is made: vLLM's CPU kernel looks local experts up by their global number, and dies of it.
    """
    sets = [checkpoint("qwen3_moe", "float32", seed) for seed in (0, 1)]
    flags = [*F32, "--tensor-parallel-size=2", "--enable-expert-parallel"]
    fresh = fresh_loads(sets, flags=flags, tp=2)
    assert differing(*fresh) == sorted(fresh[0]), "nothing may pass by being the same in both"
    env = {**UNBOUND, "VLLM_SERVER_DEV_MODE": "1"}
    with serving(sets[0], tmp_path / "live", flags=flags, env=env) as server:
        assert expert_owners(mapping_file.load(server.config)) == {0: {0, 1}, 1: {2, 3}}
        assert arena_bytes(server, fresh[0])
        assert differing(live_digests(server), fresh[0]) == []
        options = {"logdir": server.logdir, "dtype": "float32", "ranks": 3, "env": RETURN_MEMORY}
        with training("fsdp2", sets[0], **options) as trainers:
            found = list(broadcast_each(server, trainers, [sets[1], sets[0]], [fresh[1], fresh[0]]))
        assert [made["differing"] for made in found] == [[], []]
        assert flips(server, 0) == flips(server, 1)
        assert [version for _, version in flips(server, 0)] == [1, 2]


@only_in_full("serving")  # engines that take steps together, and pipelines, are tested always
def test_two_engines_of_a_dense_model(fresh_qwen3, tmp_path):
    sets, fresh = fresh_qwen3.sets, fresh_qwen3.answers[1]["greedy"][:4]
    options: dict[str, Any] = {
        "flags": [*F32, "--data-parallel-size=2"], "bridge_flags": ["--max-server-restarts=0"],
        "env": UNBOUND,
    }  # fmt: skip

    def ask(server: Server, engine: int) -> list[dict[str, Any]]:
        return server.api.greedy(4, headers={"X-data-parallel-rank": str(engine)})

    with (
        serving(sets[0], tmp_path / "live", **options) as server,
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        status = server.status()
        assert (status["world_size"], len(set(status["pids"]["engines"]))) == (2, 2)
        first = ask(server, 0)
        assert [a["tokens"] for a in first] != [a["tokens"] for a in fresh]
        for index, expected in ((1, fresh), (0, first), (1, fresh)):
            trainers.must("load", path=str(sets[index]))
            version = trainers.must("broadcast")[0]["version"]
            assert [row["version"] for row in server.status()["ranks"]] == [version, version]
            for engine in (0, 1):
                assert_equal(ask(server, engine), expected, tolerance=1e-5)
        for width in (1, 4):  # one engine idle, and both at work
            streams = Streams(server.api, width=width, tokens=400)
            for seed in range(5):
                trainers.must("perturb", seed=seed)
                trainers.must("broadcast")
            assert any(streams.alive())
            streams.stop()
            assert streams.failures == []
        trainers.must("load", path=str(sets[0]))
        assert trainers.must("broadcast")[0]["version"] == 14
        for engine in (0, 1):
            assert_equal(ask(server, engine), first, tolerance=1e-5)
            assert [version for _, version in flips(server, engine)] == list(range(1, 15))
        os.kill(server.status()["pids"]["engines"][1], signal.SIGKILL)
        assert server.process.wait(180) == 75, "a server is whole or ends"


def test_the_stages_of_a_pipeline_flip_before_the_same_batch(fresh_qwen3, tmp_path):
    sets, fresh = fresh_qwen3.sets, fresh_qwen3.answers[1]["greedy"]
    flags = [*F32, "--pipeline-parallel-size=2"]
    options: dict[str, Any] = {"flags": flags, "bridge_flags": ["--http"], "env": COMPLETED}
    with (
        serving(sets[0], tmp_path / "live", **options) as server,
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        first = server.api.greedy()
        assert [a["tokens"] for a in first] != [a["tokens"] for a in fresh]
        for index, expected in ((1, fresh), (0, first), (1, fresh)):
            trainers.must("load", path=str(sets[index]))
            trainers.must("broadcast")
            assert_equal(server.api.greedy(), expected, tolerance=1e-5)
        streams = Streams(server.api, width=8, tokens=300)
        for seed in range(10):
            trainers.must("perturb", seed=seed)
            trainers.must("broadcast")
        assert all(streams.alive())
        streams.stop()
        assert streams.failures == []
        assert assert_labels_in_order(server, streams.finished) >= 8
        batches, versions = zip(*flips(server, 0), strict=True)
        assert list(versions) == list(range(1, 14))
        # Two may come before one batch, on a busy machine.
        assert len(set(batches[3:])) > 5, "flips happened between batches of running requests"
        assert flips(server, 1) == flips(server, 0)


def test_engines_of_a_mixture_of_experts_flip_before_the_same_step(checkpoint, tmp_path):
    # Without --enable-expert-parallel, as above: the engines' ranks share each expert, and step together too.
    sets = [checkpoint("qwen3_moe", "float32", seed) for seed in (0, 1)]
    flags = [*F32, "--data-parallel-size=2"]

    def ask(server: Server, engine: int) -> list[dict[str, Any]]:
        return server.api.greedy(4, headers={"X-data-parallel-rank": str(engine)})

    options: dict[str, Any] = {
        "flags": flags, "bridge_flags": ["--http", "--max-server-restarts=0"], "env": COMPLETED
    }  # fmt: skip
    alone: dict[str, Any] = {"flags": F32, "bridge": False, "env": UNBOUND}
    with (
        serving_together((sets[0], tmp_path / "live", options), (sets[1], tmp_path / "fresh", alone)) as (
            server,
            other,
        ),
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        fresh, first = other.api.greedy(4), ask(server, 0)
        other.stop()
        assert [a["tokens"] for a in first] != [a["tokens"] for a in fresh]
        for index, expected in ((1, fresh), (0, first), (1, fresh)):
            trainers.must("load", path=str(sets[index]))
            trainers.must("broadcast")
            for engine in (0, 1):
                # One engine alone sums what experts say in another order than two that exchange it.
                assert_equal(ask(server, engine), expected, tolerance=1e-4)
        for width, tokens in ((1, 200), (8, 200), (2, 1), (2, 5), (2, 33)):
            streams = Streams(server.api, width=width, tokens=tokens)
            for seed in range(4):
                trainers.must("perturb", seed=seed)
                trainers.must("broadcast")
            streams.stop()
            assert streams.failures == []
            assert_labels_in_order(server, streams.finished)
        trainers.must("load", path=str(sets[0]))
        assert trainers.must("broadcast")[0]["version"] == 24
        for engine in (0, 1):
            assert_equal(ask(server, engine), first, tolerance=1e-5)
        assert [version for _, version in flips(server, 0)] == list(range(1, 25))
        assert flips(server, 1) == flips(server, 0)
        os.kill(server.status()["pids"]["engines"][1], signal.SIGKILL)
        assert server.process.wait(180) == 75, "a server is whole or ends"
