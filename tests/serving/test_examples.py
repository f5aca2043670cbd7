"""The examples do what they say, started as their first lines say, on models small enough for a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.serving import REPO, UNBOUND, Server, environment, serving_together

F32 = ["--dtype=float32"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
EXAMPLE_TIMEOUT_S = 120

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900, method="signal")]


@pytest.fixture(scope="module")
def servers(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A mixture of experts on two ranks, from dummy weights; a dense model that takes changes."""
    root = tmp_path_factory.mktemp("examples")
    # Not --enable-expert-parallel: vLLM's CPU kernel dies of it at the first request (test_layouts).
    dummy = {"flags": [*F32, "--load-format=dummy", "--tensor-parallel-size=2"], "env": UNBOUND}
    changes = {"flags": F32, "bridge_flags": ["--transport=gloo"], "env": UNBOUND}
    with serving_together(
        (checkpoint("qwen3_moe", "float32", 0), root / "moe", dummy),
        (checkpoint("qwen3", "float32", 0), root / "dense", changes),
    ) as (moe, dense):
        yield SimpleNamespace(moe=moe, dense=dense)


def run_example(server: Server, name: str, *words: str, launcher: list[str], **env: str) -> str:
    """What it printed; it must end by itself, and well."""
    # SIGTERM to a launcher ends its ranks too.
    command = ["timeout", "--kill-after=10", str(EXAMPLE_TIMEOUT_S), *launcher, str(REPO / "examples" / name)]
    done = subprocess.run(
        [*command, str(server.model), *words],
        env=environment(OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def torchrun(server: Server, name: str, *words: str) -> str:
    return run_example(server, name, *words, launcher=TORCHRUN, BRIDGE_LOGDIR=str(server.logdir))


def says(server: Server, prompt: str, length: int) -> str:
    (choice,) = server.api.complete(prompt, max_tokens=length, temperature=0.0, ignore_eos=True)
    return str(choice["text"])


def versions_of(output: str) -> list[int]:
    return [int(version) for version in re.findall(r"version=(\d+)", output)]


def test_a_mixture_of_experts_learns_to_speak(servers):
    prompt, text = "One, two:", " buckle my shoe."
    before = says(servers.moe, prompt, len(text))
    output = torchrun(
        servers.moe, "moe_fsdp2.py", "--url", servers.moe.api.url, "--prompt", prompt, "--text", text
    )
    assert f"before: {before!r}" in output
    assert f"after:  {text!r}" in output
    assert before != text == says(servers.moe, prompt, len(text))


def test_changed_rows_give_the_tokens_that_all_weights_give(servers):
    words = ["--url", servers.dense.api.url, "--rows", "16"]
    output = torchrun(servers.dense, "sparse_rows.py", *words)
    sent = {name: int(count) for name, count in re.findall(r"^(\w+): (\d+) bytes sent in", output, re.M)}
    assert "equal tokens" in output
    assert sent["dense"] >= (servers.dense.model / "model.safetensors").stat().st_size * 0.9
    assert sent["delta"] < sent["dense"] / 10
    assert servers.dense.status()["weight_version"] == 4


@pytest.mark.parametrize("case", ["fsdp2 moe", "zero3 dense"])
def test_one_parameter_at_a_time(servers, case):
    kind, name = case.split()
    server, prompt, text = getattr(servers, name), "Three, four:", " knock at the door."
    words = ["--text", prompt + text, "--steps", "40"] + ["--zero3"] * (kind == "zero3")
    output = torchrun(server, "per_parameter.py", *words)
    numbers = versions_of(output)
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert says(server, prompt, len(text)) == text


def test_ranks_that_are_ray_actors(servers):
    prompt, text = "Five, six:", " pick up sticks."
    words = ["--logdir", str(servers.moe.logdir), "--text", prompt + text, "--steps", "40"]
    # Ray keeps sockets and logs of a session: their paths must be short, and they are to be gone afterwards.
    with tempfile.TemporaryDirectory(prefix="ray-") as tmp:
        output = run_example(
            servers.moe,
            "ray_actors.py",
            *words,
            launcher=[sys.executable],
            RAY_TMPDIR=tmp,
            RAY_USAGE_STATS_ENABLED="0",
        )
    numbers = versions_of(output)
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert says(servers.moe, prompt, len(text)) == text
