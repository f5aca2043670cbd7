"""Hand the weights over one parameter at a time, as loops do that gather each of them whole.

    python -m bridge.launch serve --logdir runs/a -- MODEL
    BRIDGE_LOGDIR=runs/a torchrun --nproc-per-node=2 examples/per_parameter.py MODEL
    BRIDGE_LOGDIR=runs/a torchrun --nproc-per-node=2 examples/per_parameter.py MODEL --zero3

The first trains under FSDP2, the second under DeepSpeed's ZeRO-3. Where the model is at hand as a whole,
``bridge.broadcast_weights(model)`` is simpler, and gathers nothing.
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridge

Step = Callable[[torch.Tensor], None]  # from a loss to changed weights


def with_fsdp2(model: nn.Module, lr: float) -> tuple[nn.Module, Step]:
    """The model in FSDP2's shards, and its optimizer's step."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, step


def send_fsdp2(model: nn.Module) -> bridge.Receipt:
    """One version, each parameter gathered as a whole and freed again."""
    with bridge.round() as made:  # every rank: the same names in the same order
        for name, parameter in model.named_parameters():
            bridge.update_weight(name, parameter.full_tensor())
    return made.receipt


def with_zero3(model: nn.Module, lr: float) -> tuple[nn.Module, Step]:
    """The model in ZeRO-3's partitions, and its engine's step."""
    import deepspeed

    # On a CPU it would compile a collective of its own first, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0, "torch_adam": True}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine.module, step


def send_zero3(model: nn.Module) -> bridge.Receipt:
    """One version, each parameter gathered as a whole and partitioned again."""
    import deepspeed

    with bridge.round() as made:
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter):
                bridge.update_weight(name, parameter)
    return made.receipt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a Hugging Face name or folder, the one that is served")
    parser.add_argument("--zero3", action="store_true", help="train under DeepSpeed's ZeRO-3")
    parser.add_argument("--text", default="A fox and a dog: the quick brown fox jumps over the lazy dog.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    dtype = torch.bfloat16 if args.zero3 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    model, step = (with_zero3 if args.zero3 else with_fsdp2)(model, args.lr)
    send = send_zero3 if args.zero3 else send_fsdp2

    tokens = AutoTokenizer.from_pretrained(args.model)(args.text, return_tensors="pt")["input_ids"]
    tokens = tokens.to(device)  # your data goes here
    for number in range(1, args.steps + 1):
        loss = model(input_ids=tokens, labels=tokens).loss
        step(loss)
        receipt = send(model)
        if dist.get_rank() == 0:
            print(f"step {number}: loss {loss.item():.3f}, {receipt}", flush=True)
    bridge.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
