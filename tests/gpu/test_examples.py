"""The examples at size: experts divided between two engines' GPUs, from dummy weights, and a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.gpu.test_two_gpus import ON_FIRST, TOGETHER
from tests.support.examples import ray, says, sent_by, torchrun, versions_of
from tests.support.models import build_checkpoint
from tests.support.serving import serving_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="one GPU here, these tests need two"),
]

DENSE = {"hidden_size": 1024, "head_dim": 128, "intermediate_size": 3072, "num_hidden_layers": 16}
MOE = {**DENSE, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
VOCAB = {"vocab_size": 32768, "initializer_range": 0.02}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("examples")
    experts = {
        "flags": (*TOGETHER, "--load-format=dummy", "--data-parallel-size=2", "--enable-expert-parallel")
    }
    changes = {"flags": TOGETHER, "bridge_flags": ["--transport=gloo"], **ON_FIRST}
    with serving_together(
        (build_checkpoint("qwen3_moe", root / "qwen3_moe", **MOE, **VOCAB), root / "moe", experts),
        (build_checkpoint("qwen3", root / "qwen3", **DENSE, **VOCAB), root / "dense", changes),
    ) as (moe, dense):
        yield SimpleNamespace(moe=moe, dense=dense)


def test_experts_on_two_gpus_learn_to_speak(servers: SimpleNamespace) -> None:
    prompt, text = "One, two:", " buckle my shoe."
    before = says(servers.moe, prompt, len(text))
    words = ["--url", servers.moe.api.url, "--prompt", prompt, "--text", text, "--lr", "5e-4"]
    output = torchrun(servers.moe, "moe_fsdp2.py", *words)
    assert before != text == says(servers.moe, prompt, len(text))
    assert "by pull-gpu in" in output


def test_changed_rows_give_the_tokens_that_all_weights_give(servers: SimpleNamespace) -> None:
    output = torchrun(servers.dense, "sparse_rows.py", "--url", servers.dense.api.url, "--rows", "64")
    assert "equal tokens" in output
    sent = sent_by(output)
    assert sent["delta"] < sent["dense"] / 100


def test_one_parameter_at_a_time(servers: SimpleNamespace) -> None:
    prompt, text = "Three, four:", " knock at the door."
    words = ["--text", prompt + text, "--steps", "60", "--lr", "5e-4"]
    numbers = versions_of(torchrun(servers.moe, "per_parameter.py", *words))
    assert numbers == list(range(numbers[0], numbers[0] + 60))
    assert says(servers.moe, prompt, len(text)) == text


def test_ranks_that_are_ray_actors(servers: SimpleNamespace) -> None:
    """Each actor sees one GPU, as number 0."""
    pytest.importorskip("ray")
    prompt, text = "Five, six:", " pick up sticks."
    words = ["--text", prompt + text, "--steps", "60", "--lr", "5e-4"]
    numbers = versions_of(ray(servers.moe, "ray_actors.py", *words))
    assert numbers == list(range(numbers[0], numbers[0] + 60))
    assert says(servers.moe, prompt, len(text)) == text
