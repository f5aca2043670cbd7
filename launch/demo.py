"""``python -m bridge.launch demo``: a reinforcement-learning loop on a laptop's CPU, with proof at the end.

Builds a small random language model that babbles syllables, serves it with the real vLLM under the bridge,
and trains it with two FSDP2 ranks on completions that vLLM generated: a syllable with the vowel "a" is worth
one point. Streaming requests stay in flight across every swap. At the end a fresh, unpatched vLLM is started
from the trained checkpoint, and must give the very tokens and logprobs that the live server gave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.demo_client import Client, free_port

STEPS = 24
TRAINERS = 2
START_TIMEOUT_S = 240.0
TRAIN_TIMEOUT_S = 300.0
POLL_S = 0.1
LOGPROB_TOLERANCE = 0.0  # bfloat16 against bfloat16, same kernels: identical or wrong
REWARD_RISE = 0.3
CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
SERVER_FLAGS = (
    "--dtype=bfloat16", "--max-model-len=512", "--max-num-seqs=48", "--enforce-eager", "--disable-log-stats",
    "--disable-uvicorn-access-log",
)  # fmt: skip
TABLE = (
    "{step:>4}  {reward:>6}  {version:>7}  {mib:>7}  {transfer_ms:>11}  {flip_ms:>7}  {gap_ms:>10}  "
    "{tokens_per_s:>8}"
)
HEADER = {
    "step": "step", "reward": "reward", "version": "version", "mib": "MiB", "transfer_ms": "transfer ms",
    "flip_ms": "flip ms", "gap_ms": "max gap ms", "tokens_per_s": "tokens/s",
}  # fmt: skip


def say(text: str) -> None:
    """To the person at the terminal."""
    print(text, flush=True)


def syllables() -> list[str]:
    """The model's vocabulary, after four special tokens."""
    return ["<pad>", "<bos>", "<eos>", "<unk>"] + [c + v for c in CONSONANTS for v in VOWELS]


def build_model(path: Path) -> None:
    """A two-layer Qwen3 with random weights (fixed seed) and a word-level tokenizer of syllables."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = syllables()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)


def child_environment(workdir: Path) -> dict[str, str]:
    """What every process of the demo needs on a machine without a network.

    The compiler's cache is the demo's own: a process that was killed while compiling (anybody's) leaves a
    truncated file in the shared one, and every later server that wants that kernel dies of it (seen).
    """
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(workdir / "inductor"),
    }
    return {**defaults, **os.environ}


@contextmanager
def running(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with its output in ``log``; end it with SIGTERM, and SIGKILL if it does not listen."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow(path: Path, process: subprocess.Popen[bytes], show: Callable[[dict[str, Any]], None]) -> int:
    """Show each JSON line of ``path`` as it is written, until ``process`` ends; returns its exit code."""
    deadline = time.monotonic() + START_TIMEOUT_S + TRAIN_TIMEOUT_S
    position = 0
    while True:
        code = process.poll()
        if path.exists():
            text = path.read_text()
            # While the process lives, its last line may be half written.
            lines = (text if code is not None else text[: text.rfind("\n") + 1]).splitlines()
            for line in lines[position:]:
                show(json.loads(line))
            position = len(lines)
        if code is not None:
            return code
        if time.monotonic() > deadline:
            raise TimeoutError(f"the training did not end within {START_TIMEOUT_S + TRAIN_TIMEOUT_S:g} s")
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue


def train(workdir: Path, steps: int) -> int:
    """Serve and train; the launcher starts the trainer and ends with its exit code."""
    port = free_port()
    trainer = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TRAINERS}",
        "-m", "launch.demo_trainer", str(workdir), f"http://127.0.0.1:{port}", str(steps),
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "bridge.launch", "serve", "--logdir", str(workdir / "logs"),
        "--", str(workdir / "model"), f"--port={port}", *SERVER_FLAGS, "--", *trainer,
    ]  # fmt: skip

    def show(row: dict[str, Any]) -> None:
        say(TABLE.format(**row))

    say(TABLE.format(**HEADER))
    with running(command, workdir / "serve.log", child_environment(workdir)) as process:
        return follow(workdir / "steps.jsonl", process, show)


def fresh_answers(workdir: Path) -> list[dict[str, Any]]:
    """Ask an unpatched vLLM, started from the trained checkpoint, what the live server was asked."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(workdir / "trained"),
        f"--port={port}", *SERVER_FLAGS,
    ]  # fmt: skip
    env = {k: v for k, v in child_environment(workdir).items() if not k.startswith("BRIDGE_")}
    with running(command, workdir / "fresh.log", env) as process:
        client = Client(f"http://127.0.0.1:{port}", str(workdir / "trained"))
        client.wait_healthy(START_TIMEOUT_S, process)
        return client.greedy_answers()


def compare(live: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> tuple[int, float]:
    """How many prompts got the same tokens, and the largest difference of logprobs."""
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(live, fresh, strict=True))
    worst = max(
        abs(x - y)
        for a, b in zip(live, fresh, strict=True)
        for x, y in zip(a["logprobs"], b["logprobs"], strict=False)
    )
    return same, worst


def judge(workdir: Path, fresh: list[dict[str, Any]]) -> list[str]:
    """Everything that must hold, as sentences about what does not."""
    result = json.loads((workdir / "result.json").read_text())
    live = result["answers"]
    same, worst = compare(live, fresh)
    rows = [json.loads(line) for line in (workdir / "steps.jsonl").read_text().splitlines()]
    rewards = [float(row["reward"]) for row in rows]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    say(f"reward             {first:.2f} -> {last:.2f} (mean of the first and last three steps)")
    say(f"streamed requests  {result['streams_finished']} finished, {result['streams_failed']} failed")
    say(
        f"live against fresh {same} of {len(live)} prompts with identical tokens, logprobs differ by "
        f"{worst:g}"
    )
    faults = []
    if last - first < REWARD_RISE:
        faults.append(f"the reward rose by {last - first:.2f}, less than {REWARD_RISE}")
    if result["streams_failed"] or not result["streams_finished"]:
        faults.append("a request in flight failed, or none ever finished")
    if same != len(live):
        faults.append(f"{len(live) - same} prompt(s) got other tokens than from a fresh vLLM")
    if worst > LOGPROB_TOLERANCE:
        faults.append(f"logprobs differ by {worst:g}, more than {LOGPROB_TOLERANCE:g}")
    if result["version"] != len(rows):
        faults.append(f"{len(rows)} steps ended at version {result['version']}")
    return faults


def run(*, workdir: Path | None = None, steps: int = STEPS) -> int:
    """The whole demo; returns 0 only if everything it claims was seen to hold."""
    start = time.monotonic()
    workdir = workdir or Path(tempfile.mkdtemp(prefix="bridge-demo-"))
    workdir.mkdir(parents=True, exist_ok=True)
    say(f"demo in {workdir}: a small model, a real vLLM, {TRAINERS} FSDP2 trainer ranks, {steps} steps")
    build_model(workdir / "model")
    say("starting the server (about half a minute) ...")
    if code := train(workdir, steps):
        log = (workdir / "serve.log").read_text(errors="replace").splitlines()
        told = [line for line in log if line.startswith("[trainer]") or "[bridge" in line]
        say("\n".join(told[-40:] or log[-40:]))
        say(f"FAILED: training ended with exit code {code}; logs in {workdir}")
        return code
    say("starting a fresh vLLM from the trained checkpoint, to compare ...")
    faults = judge(workdir, fresh_answers(workdir))
    for fault in faults:
        say(f"FAILED: {fault}")
    verdict = "FAILED" if faults else "PROVED: the served tokens come from the trained weights"
    say(f"{verdict} ({time.monotonic() - start:.0f} s; logs in {workdir})")
    return 1 if faults else 0
