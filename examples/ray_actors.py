"""Trainer ranks that are Ray actors: FSDP2 inside them, and every step is served.

    python -m bridge.launch serve --logdir runs/a -- MODEL
    python examples/ray_actors.py MODEL --logdir runs/a

Actors need no environment of torchrun: their ranks are those of the process group that they make.
"""

import argparse
import socket
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridge


@ray.remote
class Trainer:
    """One rank."""

    def free_address(self) -> str:
        """Where the ranks may meet: this actor's host, and a port that nobody listens on."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join(self, rank: int, args: argparse.Namespace, address: str) -> None:
        """Meet the other ranks and the server; the model is sharded over them."""
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=args.actors)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
        for layer in model.model.layers:
            fully_shard(layer)
        self.model = fully_shard(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        tokens = AutoTokenizer.from_pretrained(args.model)(args.text, return_tensors="pt")["input_ids"]
        self.tokens = tokens.to(device)  # your data goes here
        # Not from the environment: actors on other nodes do not have the driver's.
        self.bridge = bridge.connect(bridge.BridgeConfig(logdir=args.logdir))

    def step(self) -> tuple[float, bridge.Receipt]:
        """Train, and serve what was learnt; the loss, and what the broadcast did."""
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), self.bridge.broadcast_weights(self.model)

    def leave(self) -> None:
        """Say goodbye to the server, then to the other ranks."""
        self.bridge.close()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a Hugging Face name or folder, the one that is served")
    parser.add_argument("--logdir", type=Path, required=True, help="the server's")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--text", default="A fox and a dog: the quick brown fox jumps over the lazy dog.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    args.logdir = args.logdir.absolute()  # an actor's working directory may be another

    ray.init()
    num_gpus = 1 if torch.cuda.is_available() else 0
    trainers = [Trainer.options(num_gpus=num_gpus).remote() for _ in range(args.actors)]
    address = ray.get(trainers[0].free_address.remote())
    ray.get([trainer.join.remote(rank, args, address) for rank, trainer in enumerate(trainers)])
    for number in range(1, args.steps + 1):
        results = ray.get([trainer.step.remote() for trainer in trainers])  # all of them, or all would wait
        loss, receipt = results[0]
        print(f"step {number}: loss {loss:.3f}, {receipt}", flush=True)
    ray.get([trainer.leave.remote() for trainer in trainers])
    ray.shutdown()


if __name__ == "__main__":
    main()
