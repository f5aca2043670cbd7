"""Rounds that carry only what changed, beside whole ones, over a link of 1 Gbit/s; and how much does change.

The server is a real one, on this host's CPU. The trainer runs in a network namespace of its own, whose only
way out is shaped by tc; it needs root for that. A given share of all elements changes before each round.

Then, without a server: the share of bfloat16 elements that an AdamW step changes, step by step, when a small
model with float32 masters is trained by GRPO on its own answers, at the learning rates of RL.

    PYTHONPATH=tests python benchmarks/delta.py --out benchmarks/results/delta.json
    PYTHONPATH=tests python benchmarks/delta.py --shares --out ..natural.json    (only how much changes)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import machine
from stall import FLAGS, build_model
from support.serving import Server, Trainers, serving, training, wait_until

IDLE_S = 0.3  # so long hardly anything may be done
SERVER, TRAINER = "10.213.0.1", "10.213.0.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def shaped_link(rate: str) -> Iterator[Sequence[str]]:
    """A namespace that reaches this host through ``rate``; yields the command prefix that enters it."""
    name, near, far = f"delta{os.getpid()}", f"dn{os.getpid()}", f"df{os.getpid()}"
    enter = ["ip", "netns", "exec", name]
    ip("netns", "add", name)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{SERVER}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{TRAINER}/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ip("-n", name, "link", "set", "lo", "up")
        shape = ["tc", "qdisc", "add", "dev", far, "root", "tbf", "rate", rate]
        subprocess.run([*enter, *shape, "burst", "1mb", "latency", "50ms"], check=True)
        yield enter
    finally:
        ip("netns", "del", name)


def processor_seconds(pids: Sequence[int]) -> float:
    """What these processes have used of the processors so far."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def wait_idle(pids: Sequence[int]) -> None:
    """vLLM's workers go on polling for a second behind a commit, on a core that the trainer here needs."""

    def idle() -> bool:
        before = processor_seconds(pids)
        threading.Event().wait(IDLE_S)
        return processor_seconds(pids) - before < IDLE_S / 5

    wait_until("the server to be idle", idle, timeout_s=30)


def rounds(server: Server, trainers: Trainers, share: float, repeats: int, seed: int) -> dict[str, Any]:
    """Rounds of either kind, behind one that they may be compared with; the bytes and seconds of each.

    Also how long each end kept a processor busy: here the two share what would else be two hosts' processors.
    """
    found: dict[str, list[dict[str, Any]]] = {"dense": [], "auto": []}
    for encoding, kept in found.items():
        trainers.must("broadcast", encoding=encoding)
        for repeat in range(repeats):
            trainers.must("change", share=share, seed=seed + repeat)
            updaters = server.status()["pids"]["updaters"]
            others = sorted({*server.pids()} - {*updaters})
            ends = {"trainer": trainers.pids(), "updaters": updaters, "rest of the server": others}
            wait_idle(others)
            before = {end: processor_seconds(pids) for end, pids in ends.items()}
            (receipt,) = trainers.must("broadcast", encoding=encoding)
            kept.append({key: receipt[key] for key in ("bytes", "stage_s", "total_s", "transport")})
            kept[-1]["processor_s"] = {
                end: round(processor_seconds(pids) - before[end], 2) for end, pids in ends.items()
            }
    seconds = {what: statistics.median(r["total_s"] for r in kept) for what, kept in found.items()}
    nbytes = {what: statistics.median(r["bytes"] for r in kept) for what, kept in found.items()}
    return {
        "share": share,
        "load_average": [round(load, 2) for load in os.getloadavg()[:2]],
        "bytes_kept": nbytes["auto"] / nbytes["dense"],
        "speedup": seconds["dense"] / seconds["auto"],
        "seconds": seconds,
        "rounds": found,
    }


def small_model() -> Any:
    """A Qwen3 of 5 million parameters with random float32 weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def sampled(model: Any, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's answers to prompts of eight tokens, int64 [sequences, 8 + tokens], and their rewards."""
    prompts = torch.randint(2, 4096, (sequences, 8))
    with torch.no_grad():
        answers = model.generate(prompts, do_sample=True, min_new_tokens=tokens, max_new_tokens=tokens)
    return answers, (answers[:, 8:] % 2).float().mean(1)


def policy_loss(model: Any, answers: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's, on policy and without a reference: advantages are the rewards, normalised within the group."""
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    logits = model(input_ids=answers[:, :-1]).logits[:, 7:]
    taken = logits.log_softmax(-1).gather(-1, answers[:, 8:, None]).squeeze(-1)
    return -(advantages[:, None] * taken).mean()


def natural_shares(lr: float, warm: int, steps: int) -> list[float]:
    """Per AdamW step on float32 masters, the share of elements whose bfloat16 differs afterwards.

    The steps are those of a small GRPO run: answers that the model sampled, rewarded for their odd tokens,
    gradients clipped to a norm of 1, another group in each step, ``warm`` steps before.
    """
    model = small_model()
    answers, rewards = sampled(model, 64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
    total = sum(p.numel() for p in model.parameters())
    shares = []
    for step in range(warm + steps):
        group = torch.randperm(len(answers))[:8]
        policy_loss(model, answers[group], rewards[group]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().to(torch.bfloat16) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        after = [p.detach().to(torch.bfloat16) for p in model.parameters()]
        if step >= warm:
            shares.append(sum(int((a != b).sum()) for a, b in zip(after, before, strict=True)) / total)
    return shares


def over_the_link(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds, between a server here and a trainer behind the link."""
    with tempfile.TemporaryDirectory(prefix="delta-") as directory, shaped_link(args.rate) as enter:
        model = Path(directory) / "model"
        nbytes = build_model(model, args.vocab)
        bridge_flags = ["--transport=gloo", f"--rendezvous-host={SERVER}"]
        options: dict[str, Any] = {"flags": FLAGS, "bridge_flags": bridge_flags, "timeout_s": 600}
        with (
            serving(model, Path(directory) / "log", **options) as server,
            training("plain", model, logdir=server.logdir, prefix=enter) as trainers,
        ):
            trainers.must("broadcast")
            found = [
                rounds(server, trainers, share, args.repeats, 1000 * i) for i, share in enumerate(args.shares)
            ]
    return {"rate": args.rate, "model_bytes": nbytes, "rounds": found}


def main() -> int:
    """Run all and write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.001, 0.01, 0.1])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": machine(),
    }
    if args.shares:
        document |= over_the_link(args)
    document["natural"] = {str(lr): natural_shares(lr, args.warm, args.steps) for lr in (1e-6, 1e-5)}
    for found in document.get("rounds", []):
        shown = {key: found[key] for key in ("share", "bytes_kept", "speedup", "seconds")}
        sys.stdout.write(json.dumps(shown) + "\n")
    for lr, shares in document["natural"].items():
        sys.stdout.write(f"AdamW at {lr}: {statistics.median(shares):.4f} of the elements change in a step\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
