"""The examples do what they say, on models small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.examples import ray, says, sent_by, torchrun, versions_of
from tests.support.models import HIDDEN
from tests.support.serving import COMPLETED, UNBOUND, serving_together

F32 = ["--dtype=float32"]

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def servers(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A mixture of experts on two engines that step together, from dummy weights; a dense one for changes."""
    root = tmp_path_factory.mktemp("examples")
    # Not --enable-expert-parallel: vLLM's CPU kernel dies of it at the first request (test_layouts).
    dummy = {"flags": [*F32, "--load-format=dummy", "--data-parallel-size=2"], "env": COMPLETED}
    changes = {"flags": F32, "bridge_flags": ["--transport=gloo"], "env": UNBOUND}
    with serving_together(
        (checkpoint("qwen3_moe", "float32", 0), root / "moe", dummy),
        (checkpoint("qwen3", "float32", 0), root / "dense", changes),
    ) as (moe, dense):
        yield SimpleNamespace(moe=moe, dense=dense)


def test_a_mixture_of_experts_learns_to_speak(servers):
    prompt, text = "One, two:", " buckle my shoe."
    before = says(servers.moe, prompt, len(text))
    words = ["--url", servers.moe.api.url, "--prompt", prompt, "--text", text]
    output = torchrun(servers.moe, "moe_fsdp2.py", *words)
    assert f"before: {before!r}" in output
    assert f"after:  {text!r}" in output
    assert before != text == says(servers.moe, prompt, len(text))


def test_changed_rows_give_the_tokens_that_all_weights_give(servers):
    output = torchrun(servers.dense, "sparse_rows.py", "--url", servers.dense.api.url, "--rows", "16")
    assert "equal tokens" in output
    sent = sent_by(output)
    assert sent["dense"] > (servers.dense.model / "model.safetensors").stat().st_size * 0.9
    assert sent["delta"] < sent["dense"] / 10
    assert sent["patch"] == 16 * HIDDEN * 4


@pytest.mark.parametrize("case", ["fsdp2 moe", "zero3 dense"])
def test_one_parameter_at_a_time(servers, case):
    kind, name = case.split()
    server, prompt, text = getattr(servers, name), "Three, four:", " knock at the door."
    words = ["--text", prompt + text, "--steps", "40"] + ["--zero3"] * (kind == "zero3")
    numbers = versions_of(torchrun(server, "per_parameter.py", *words))
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert says(server, prompt, len(text)) == text


def test_ranks_that_are_ray_actors(servers):
    prompt, text = "Five, six:", " pick up sticks."
    words = ["--text", prompt + text, "--steps", "40"]
    numbers = versions_of(ray(servers.moe, "ray_actors.py", *words))
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert says(servers.moe, prompt, len(text)) == text
