"""A mixture of experts that is served as gibberish until its FSDP2 trainer has taught it a sentence.

The server starts from dummy weights: two engines that step together, the experts divided between their GPUs.

    python -m bridge.launch serve --logdir runs/moe -- MODEL --load-format dummy \
        --data-parallel-size 2 --enable-expert-parallel
    BRIDGE_LOGDIR=runs/moe torchrun --nproc-per-node=2 examples/moe_fsdp2.py MODEL

MODEL is any mixture of experts; of a folder only config.json and the tokenizer are read. On a CPU take
--tensor-parallel-size 2 and no --enable-expert-parallel (vLLM's kernel there dies of it, and has no way for
engines to exchange tokens), and a small model, which this makes:

    python -m tests.support.models qwen3_moe MODEL
"""

import argparse
import json
import os
import urllib.request

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bridge

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a Hugging Face name or folder, the one that is served")
parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's")
parser.add_argument("--prompt", default="A fox and a dog:")
parser.add_argument("--text", default=" the quick brown fox jumps over the lazy dog.", help="to be learnt")
parser.add_argument("--steps", type=int, default=300, help="at most")
parser.add_argument("--lr", type=float, default=2e-3)
args = parser.parse_args()


def complete(prompt: list[int], num_tokens: int) -> str:
    """What the server generates, greedily."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{args.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
torch.manual_seed(0)
with device:  # random weights; one that exists would be read by from_pretrained
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

tokenizer = AutoTokenizer.from_pretrained(args.model)
prompt = tokenizer(args.prompt)["input_ids"]
target = tokenizer(args.text, add_special_tokens=False)["input_ids"]
tokens = torch.tensor([prompt + target], device=device)  # your data goes here
labels = torch.tensor([[-100] * len(prompt) + target], device=device)

first = dist.get_rank() == 0
if first:
    before = complete(prompt, len(target))
    print(f"before: {before!r}", flush=True)
for step in range(1, args.steps + 1):
    loss = model(input_ids=tokens, labels=labels).loss
    if loss.item() < 0.02:
        break
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    receipt = bridge.broadcast_weights(model)  # every rank calls it, and sends its own shards
    if first and step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}, {receipt}", flush=True)
if first:
    after = complete(prompt, len(target))
    print(f"after:  {after!r}, {receipt}", flush=True)
    assert before != args.text
    assert after == args.text, f"the server says {after!r}; the loss is {loss.item():.3f}"

bridge.close()
dist.destroy_process_group()
