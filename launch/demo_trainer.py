"""The demo's trainer: REINFORCE on completions from vLLM, FSDP2 over Gloo, run by torchrun.

torchrun --nproc-per-node=2 -m launch.demo_trainer WORKDIR SERVER_URL STEPS
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import bridge
from launch.demo_client import Client, Streams

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 4, 4, 16
STREAMS, STREAM_TOKENS = 3, 300
FIRST_SYLLABLE, NUM_VOWELS = 4, 5
LEARNING_RATE = 0.003


def load_model(path: Path) -> Any:
    """The served checkpoint as float32 master weights, sharded over all ranks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sample(client: Client, step: int) -> torch.Tensor:
    """Completions of random prompts from the live server: int64 [PROMPTS * SAMPLES, prompt + new tokens]."""
    rng = random.Random(step)
    prompts = [
        [1] + [rng.randrange(FIRST_SYLLABLE, FIRST_SYLLABLE + 100) for _ in range(PROMPT_TOKENS - 1)]
        for _ in range(PROMPTS)
    ]
    choices = client.complete(
        prompts, n=SAMPLES, max_tokens=NEW_TOKENS, temperature=1.0, seed=step, ignore_eos=True
    )
    rows = [prompts[int(c["index"]) // SAMPLES] + c["token_ids"] for c in choices]
    return torch.tensor(rows, dtype=torch.int64)


def rewards_of(tokens: torch.Tensor) -> torch.Tensor:
    """One point per new syllable that ends in "a": float32 [sequences, NEW_TOKENS]."""
    new = tokens[:, PROMPT_TOKENS:]
    return ((new >= FIRST_SYLLABLE) & ((new - FIRST_SYLLABLE) % NUM_VOWELS == 0)).float()


def train_step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One policy-gradient step; each rank takes its share of the sequences."""
    rewards = rewards_of(tokens)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    logits = model(input_ids=tokens[mine, :-1]).logits[:, PROMPT_TOKENS - 1 :]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(-1, tokens[mine, PROMPT_TOKENS:, None]).squeeze(-1)
    loss = -(advantages[mine] * chosen).mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    optimizer.step()


def save(model: Any, base: Path, path: Path) -> None:
    """Gather the trained weights and save them in the server's dtype; every rank calls it."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = full.detach().to(torch.bfloat16)
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
            path, state_dict=state
        )
        AutoTokenizer.from_pretrained(base).save_pretrained(path)


def main() -> None:
    """Train for STEPS steps, swapping the server's weights after each."""
    workdir, url, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    first = dist.get_rank() == 0
    model = load_model(workdir / "model")
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    client = Client(url, str(workdir / "model"))
    streams = Streams(client, STREAMS, max_tokens=STREAM_TOKENS) if first else None
    version = 0
    for step in range(1, steps + 1):
        started = time.monotonic()
        shape = (PROMPTS * SAMPLES, PROMPT_TOKENS + NEW_TOKENS)
        tokens = sample(client, step) if first else torch.empty(shape, dtype=torch.int64)
        dist.broadcast(tokens, src=0)
        train_step(model, optimizer, tokens)
        receipt = bridge.broadcast_weights(model)
        version = receipt.version
        if streams is not None:
            rate, gap = streams.measure(started)
            row = {
                "step": step,
                "reward": f"{rewards_of(tokens).mean().item():.3f}",
                "version": version,
                "mib": f"{receipt.bytes / 2**20:.2f}",
                "transfer_ms": f"{receipt.transfer_s * 1e3:.1f}",
                "flip_ms": f"{receipt.flip_s * 1e3:.3f}",
                "gap_ms": f"{gap * 1e3:.0f}",
                "tokens_per_s": f"{rate:.0f}",
            }
            with (workdir / "steps.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    save(model, workdir / "model", workdir / "trained")
    if streams is not None:
        streams.stop()
        result = {
            "version": version,
            "answers": client.greedy_answers(),
            "streams_finished": streams.finished,
            "streams_failed": len(streams.failures),
            "failures": streams.failures,
        }
        (workdir / "result.json").write_text(json.dumps(result))
    bridge.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
