"""A rank that cannot flip, while nobody waits for it any more: not one token may be of both versions."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checks import own_answers
from tests.support.serving import REPO, UNBOUND, prompts, serving, stop, training, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.serving, pytest.mark.timeout(900)]

TOKENS = 400
PATH = os.pathsep.join(map(str, (REPO / "tests" / "support" / "failing_flip", REPO, REPO / "tests")))
FLAGS = ["--dtype=float32", "--tensor-parallel-size=2"]
COMMIT_S = 5  # so long the first version may take on a busy machine; the late one takes as long as it is told
# The commit is late long before anybody is thought dead.
TIMES = [f"--commit-timeout={COMMIT_S}", "--deadline=30", "--heartbeat-interval=1", "--max-server-restarts=0"]


def test_a_flip_that_fails_late_ends_the_engine_before_a_token_leaves(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    sets = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    old, new = (
        own_answers(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), num_prompts=1, tokens=TOKENS
        )[0]
        for path in sets
    )
    assert old != new
    victim = tmp_path / "victim"
    env = {**UNBOUND, "PYTHONPATH": PATH, "BRIDGE_TEST_UNFLIPPABLE": str(victim)}
    with (
        serving(sets[1], tmp_path / "live", flags=FLAGS, bridge_flags=TIMES, env=env) as server,
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        assert trainers.must("broadcast")[0]["version"] == 1
        worker = server.status()["pids"]["workers"][1]
        got: list[int] = []
        ended = threading.Event()

        def ask() -> None:
            sampling = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
            try:
                for _, choice in server.api.stream(prompts(1)[0], **sampling):
                    got.extend(choice.get("token_ids") or ())
            except OSError:
                pass  # the server has ended, as it should
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        wait_until("the first tokens", lambda: len(got) > 3, timeout_s=60)
        stop(worker)
        trainers.must("load", path=str(sets[1]))
        (failed,) = trainers.command("broadcast")
        assert "version 2 was staged" in failed["error"]
        assert f"did not commit within {COMMIT_S} s" in failed["error"]
        victim.write_text(str(worker))
        before = len(got)
        os.kill(worker, signal.SIGCONT)
        assert server.process.wait(120) == 75
        assert ended.wait(30)
        assert "rank(s) [1] could not flip to version 2" in server.text()
        assert before <= len(got) < TOKENS
        assert got == old[: len(got)], "a token of the new version, or of both"
