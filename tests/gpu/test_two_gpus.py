"""What takes two GPUs: tensor parallelism fed by sharded trainers, and NCCL instead of copy engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_serving import FLAGS, ON_GPU, SHAPE, decoding
from tests.support.models import build_checkpoint
from tests.support.serving import Server, serving_together, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="one GPU here, these tests need two"),
]

# Several servers start on a GPU at once: none may measure the others' memory as its own.
TOGETHER = (*FLAGS, "--kv-cache-memory-bytes=1G")
TP2 = (*TOGETHER, "--tensor-parallel-size=2")
ON_FIRST = {"env": {"CUDA_VISIBLE_DEVICES": "0"}}
ON_SECOND = {**ON_GPU, "CUDA_VISIBLE_DEVICES": "1"}
Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one shape."""
    root = tmp_path_factory.mktemp("sets")
    return [build_checkpoint("qwen3", root / str(seed), seed=seed, **SHAPE) for seed in range(2)]


@pytest.fixture(scope="module")
def fresh(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """What unpatched servers answer from the second checkpoint, on one GPU and on two."""
    with serving_together(
        (sets[1], tmp_path_factory.mktemp("one"), {"bridge": False, "flags": TOGETHER, **ON_FIRST}),
        (sets[1], tmp_path_factory.mktemp("two"), {"bridge": False, "flags": TP2}),
    ) as servers:
        return {"one": servers[0].api.greedy(), "two": servers[1].api.greedy()}


@pytest.fixture(scope="module")
def live(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The same two with the bridge, from the first checkpoint; the one on one GPU must use NCCL."""
    nccl = {"flags": TOGETHER, "bridge_flags": ("--transport=nccl",), **ON_FIRST}
    with serving_together(
        (sets[0], tmp_path_factory.mktemp("nccl"), nccl),
        (sets[0], tmp_path_factory.mktemp("tp2"), {"flags": TP2}),
    ) as servers:
        yield {"nccl": servers[0], "tp2": servers[1]}


def answers_from(server: Server, checkpoint: Path, env: dict[str, str]) -> Answers:
    """What a live server says once a trainer has brought it a checkpoint."""
    with training("plain", checkpoint, logdir=server.logdir, env=env) as trainers:
        trainers.must("broadcast")
    return server.api.greedy()


def test_twenty_versions_of_sharded_weights_at_tp_2(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers]
) -> None:
    server = live["tp2"]
    expected = [server.api.greedy(), fresh["two"]]
    assert expected[0] != expected[1]
    with training("fsdp2", sets[0], logdir=server.logdir, env=ON_GPU, ranks=2) as trainers:
        for version in range(1, 21):
            trainers.must("load", path=str(sets[version % 2]))
            receipts = trainers.must("broadcast")
            assert [r["transport"] for r in receipts] == ["pull-gpu"] * 2
            assert server.api.greedy() == expected[version % 2]


def test_replicas_are_compared_on_their_gpus(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers]
) -> None:
    server = live["tp2"]
    with training("ddp", sets[1], logdir=server.logdir, env=ON_GPU, ranks=2) as trainers:
        trainers.must("drift", rank=1)
        answers = trainers.command("broadcast")
        assert all("differ between trainer ranks" in answer.get("error", "") for answer in answers), answers
        trainers.must("load", path=str(sets[1]))
        receipts = trainers.must("broadcast")
        assert [r["transport"] for r in receipts] == ["pull-gpu"] * 2
    assert server.api.greedy() == fresh["two"]


@pytest.mark.parametrize("op", ["broadcast", "round"])
def test_partitions_of_zero_3(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers], op: str
) -> None:
    """As they are, and gathered one parameter at a time."""
    pytest.importorskip("deepspeed")
    server = live["tp2"]
    expected = [answers_from(server, sets[0], ON_GPU), fresh["two"]]
    assert expected[0] != expected[1]
    with training("zero3", sets[0], logdir=server.logdir, env=ON_GPU, ranks=2) as trainers:
        for index in (1, 0, 1):
            trainers.must("load", path=str(sets[index]))
            receipts = trainers.must(op)
            assert [r["transport"] for r in receipts] == ["pull-gpu"] * 2
            assert server.api.greedy() == expected[index]


def test_several_trainers_by_nccl(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers]
) -> None:
    """Two ranks that hold halves, on one GPU: each has a communicator with the updater only."""
    server = live["nccl"]
    expected = [answers_from(server, sets[0], ON_SECOND), fresh["one"]]
    assert expected[0] != expected[1]
    with training("declared", sets[0], logdir=server.logdir, env=ON_SECOND, ranks=2) as trainers:
        with decoding(server.api, 4):
            for version in range(20):
                trainers.must("load", path=str(sets[version % 2]))
                assert [r["transport"] for r in trainers.must("broadcast")] == ["nccl"] * 2
        for index in (0, 1):
            trainers.must("load", path=str(sets[index]))
            trainers.must("broadcast")
            assert server.api.greedy() == expected[index]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_versions_that_nccl_brought(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers], dtype: str
) -> None:
    server = live["nccl"]
    with training("plain", sets[0], logdir=server.logdir, env=ON_SECOND, dtype=dtype) as trainers:
        trainers.must("broadcast")
        expected = [server.api.greedy(), fresh["one"]]
        assert expected[0] != expected[1]
        with decoding(server.api, 4):
            for _ in range(20):
                trainers.must("perturb", seed=1)
                assert trainers.must("broadcast")[0]["transport"] == "nccl"
        for version in range(6):
            trainers.must("load", path=str(sets[version % 2]))
            assert trainers.must("broadcast")[0]["transport"] == "nccl"
            assert server.api.greedy() == expected[version % 2]


def test_a_trainer_killed_while_nccl_sends_leaves_a_whole_version(
    live: dict[str, Server], sets: list[Path], fresh: dict[str, Answers]
) -> None:
    server = live["nccl"]
    with training("plain", sets[1], logdir=server.logdir, env=ON_SECOND) as trainers:
        trainers.must("broadcast")
        for _ in range(20):
            trainers.send("broadcast")
        trainers.answers()  # the first has arrived: one of the others is under way
        for process in trainers.processes:
            process.kill()
    assert server.api.greedy() == fresh["one"]
    with training("plain", sets[1], logdir=server.logdir, env=ON_SECOND) as trainers:
        trainers.must("broadcast")
    assert server.api.greedy() == fresh["one"]


def test_a_server_killed_while_nccl_sends_leaves_the_trainer_alive(
    live: dict[str, Server], sets: list[Path]
) -> None:
    """The last test of the module: it ends the server."""
    server = live["nccl"]
    with training("plain", sets[1], logdir=server.logdir, env=ON_SECOND) as trainers:
        trainers.must("broadcast")
        trainers.send("until_it_fails")
        server.process.kill()
        (answer,) = trainers.answers()
        assert "error" in answer, answer
        trainers.must("step")  # the GPU is free: nothing of the broken round is left on it
        trainers.must("synchronize")
