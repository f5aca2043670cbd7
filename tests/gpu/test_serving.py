"""A live server on a GPU, CUDA graphs on, answers version after version as a fresh vLLM does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.support.models import build_checkpoint
from tests.support.serving import START_TIMEOUT_S, Api, Server, alive, serving, training, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 32]}'
FLAGS = (
    "--no-enforce-eager",
    f"--compilation-config={GRAPHS}",
    "--gpu-memory-utilization=0.1",
    "--dtype=bfloat16",
)
SERVER_ENV = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
SHAPE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
ON_GPU = {"TRAINER_DEVICE": "cuda"}
SOAK = int(os.environ.get("BRIDGE_TEST_SOAK", "1000"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one shape."""
    root = tmp_path_factory.mktemp("sets")
    return [build_checkpoint("qwen3", root / str(seed), seed=seed, **SHAPE) for seed in range(2)]


@pytest.fixture(scope="module")
def fresh(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What an unpatched vLLM answers from each."""
    answers = []
    for path in sets:
        logdir = tmp_path_factory.mktemp("fresh")
        with serving(path, logdir, bridge=False, flags=FLAGS, env=SERVER_ENV) as server:
            answers.append(server.api.greedy())
    assert answers[0] != answers[1]
    return answers


@pytest.fixture(scope="module")
def live(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(sets[0], tmp_path_factory.mktemp("live"), flags=FLAGS, env=SERVER_ENV) as server:
        yield server


@contextmanager
def decoding(api: Api, count: int) -> Iterator[None]:
    """Requests that decode all the while; none of them may fail."""
    stop, failures = threading.Event(), list[str]()

    def run(seed: int) -> None:
        while not stop.is_set():
            try:
                for _ in api.stream([1, 5 + seed], max_tokens=480, temperature=1.0, ignore_eos=True):
                    if stop.is_set():
                        return
            except OSError as err:
                failures.append(str(err))
                return

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures


def test_twenty_versions_answer_as_fresh_servers_do(
    live: Server, sets: list[Path], fresh: list[list[dict[str, Any]]]
) -> None:
    assert live.api.greedy() == fresh[0]
    with training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers:
        for version in range(1, 21):
            trainers.must("load", path=str(sets[version % 2]))
            receipt = trainers.must("broadcast")[0]
            assert receipt["transport"] == "pull-gpu"
            assert receipt["version"] == version
            assert live.api.greedy() == fresh[version % 2]


@pytest.mark.parametrize("case", ["fp32 masters", "expandable segments", "host memory", "not blocking"])
def test_weights_that_are_not_read_in_place(
    live: Server, sets: list[Path], fresh: list[list[dict[str, Any]]], case: str
) -> None:
    env = {} if case == "host memory" else dict(ON_GPU)
    if case == "expandable segments":
        env["PYTORCH_CUDA_ALLOC_CONF"] = env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    dtype = "float32" if case == "fp32 masters" else "bfloat16"
    with training("plain", sets[0], logdir=live.logdir, env=env, dtype=dtype) as trainers:
        for index in (1, 0):
            trainers.must("load", path=str(sets[index]))
            if case == "not blocking":
                trainers.must("broadcast", blocking=False)
                trainers.must("step", fill=0.5)  # waits until the weights have been read, then ruins them
                receipt = trainers.must("wait")[0]
            else:
                receipt = trainers.must("broadcast")[0]
            assert receipt["transport"] == ("gloo" if case == "host memory" else "pull-gpu")
            assert live.api.greedy() == fresh[index]


def test_one_parameter_is_laid_over_the_version_that_is_served(live: Server, sets: list[Path]) -> None:
    """The other half is a version old: it is brought up to date first, and what arrives comes after."""
    name = "model.layers.1.mlp.down_proj.weight"
    with training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers:
        trainers.must("load", path=str(sets[0]))
        trainers.must("broadcast")
        seen = [live.api.greedy()]
        for value in (0.01, -0.02, 0.03):
            receipt = trainers.must("single", name=name, value=value)[0]
            assert receipt["transport"] == "pull-gpu"
            by_part = live.api.greedy()
            trainers.must("broadcast")
            assert live.api.greedy() == by_part
            assert by_part not in seen
            seen.append(by_part)


def test_adapters_merged_on_the_gpu(
    live: Server, sets: list[Path], fresh: list[list[dict[str, Any]]]
) -> None:
    """In float32: of an embedding's bfloat16 sum peft rounds B @ A first, and the bridge does not."""
    pytest.importorskip("peft")
    with training("lora", sets[0], logdir=live.logdir, env=ON_GPU, dtype="float32") as lora:
        (receipt,) = lora.must("broadcast", adapters="merge")
        assert receipt["transport"] == "pull-gpu"
        served = live.api.greedy()
        assert served not in fresh
        lora.must("unload")
        lora.must("broadcast")
        assert live.api.greedy() == served


def test_a_soak_leaves_memory_and_descriptors_as_they_were(live: Server, sets: list[Path]) -> None:
    def state(pids: list[int]) -> SimpleNamespace:
        used = torch.cuda.mem_get_info(0)
        return SimpleNamespace(
            free=used[0],
            rss=sum(psutil.Process(p).memory_info().rss for p in pids),
            fds=sum(psutil.Process(p).num_fds() for p in pids),
        )

    with (
        decoding(live.api, 8),
        training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers,
    ):
        pids = [*live.pids(), *trainers.pids()]
        versions = [trainers.must("broadcast")[0]["version"] for _ in range(20)]
        before = state(pids)
        versions += [trainers.must("broadcast")[0]["version"] for _ in range(SOAK)]
        after = state(pids)
    assert versions == list(range(versions[0], versions[0] + len(versions)))
    assert after.fds <= before.fds + 4
    assert before.free - after.free < 32 << 20
    assert after.rss - before.rss < 64 << 20


def test_a_killed_trainer_leaves_a_whole_version(
    live: Server, sets: list[Path], fresh: list[list[dict[str, Any]]]
) -> None:
    with training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers:
        trainers.must("load", path=str(sets[1]))
        trainers.must("broadcast")
        trainers.must("load", path=str(sets[0]))
        trainers.send("broadcast")
        for process in trainers.processes:
            process.kill()
    answers = live.api.greedy()
    assert answers in fresh
    with training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers:
        trainers.must("broadcast")
    assert live.api.greedy() == fresh[0]


def test_a_vllm_that_is_started_again_answers_nothing_before_the_newest_version(
    sets: list[Path], fresh: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The GPU's memory comes back with it, and its API is closed until the trainer's next broadcast."""
    with (
        serving(sets[0], tmp_path, flags=FLAGS, env=SERVER_ENV) as server,
        training("plain", sets[0], logdir=server.logdir, env=ON_GPU) as trainers,
    ):
        trainers.must("load", path=str(sets[1]))
        trainers.must("broadcast")
        assert server.api.greedy() == fresh[1]
        free = torch.cuda.mem_get_info(0)[0]
        pids = server.status()["pids"]
        os.kill(pids["engines"][0], signal.SIGKILL)
        wait_until("vLLM", lambda: "vLLM is back" in server.text(), timeout_s=START_TIMEOUT_S)
        assert not any(map(alive, [*pids["engines"], *pids["workers"]]))
        body = {"model": str(sets[0]), "prompt": [1, 5], "max_tokens": 1}
        code, text = server.call("/v1/completions", body)
        assert (code, "the newest version is 1" in text) == (503, True), text
        (receipt,) = trainers.must("broadcast")
        assert (receipt["version"], receipt["transport"]) == (2, "pull-gpu")
        assert server.api.greedy() == fresh[1]
        assert abs(torch.cuda.mem_get_info(0)[0] - free) < 1 << 30


@pytest.mark.parametrize("flag", ["--staging=in-place", "--flip=copy"])
def test_memory_that_stays_where_it_is(
    sets: list[Path], fresh: list[list[dict[str, Any]]], tmp_path: Path, flag: str
) -> None:
    """The other two ways to bring a version in answer as fresh servers do, with requests in flight."""
    with (
        serving(sets[0], tmp_path, flags=FLAGS, env=SERVER_ENV, bridge_flags=[flag]) as server,
        training("plain", sets[0], logdir=server.logdir, env=ON_GPU) as trainers,
    ):
        assert server.api.greedy() == fresh[0]
        with decoding(server.api, 8):
            receipts = [trainers.must("broadcast")[0] for _ in range(20)]
        for index in (1, 0, 1):
            trainers.must("load", path=str(sets[index]))
            receipts.append(trainers.must("broadcast")[0])
            assert server.api.greedy() == fresh[index]
        trainers.must("single", name="model.layers.1.mlp.down_proj.weight", value=0.01)
        by_part = server.api.greedy()
        trainers.must("broadcast")
        assert server.api.greedy() == by_part
        assert by_part not in fresh
        if flag == "--staging=in-place":
            assert all(receipt["flip_s"] >= receipt["transfer_s"] for receipt in receipts)


def test_the_second_half_is_counted_before_the_kv_cache(live: Server) -> None:
    """With 0.1 of the GPU, weights, halves and KV cache stay within it (and the contexts' few GiB)."""
    total = torch.cuda.mem_get_info(0)[1]
    used = total - torch.cuda.mem_get_info(0)[0]
    assert live.status()["state"] == "ready"
    assert 0.08 * total < used < 0.1 * total + (4 << 30)
