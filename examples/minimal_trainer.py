"""Train a causal language model, and serve every step: the shortest real loop.

BRIDGE_LOGDIR=LOGDIR torchrun --nproc-per-node=2 examples/minimal_trainer.py MODEL [STEPS]
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import bridge

path, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
dist.init_process_group("gloo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(model.config.vocab_size, (4, 32))  # your data goes here

stop = False
for step in range(steps):
    if stop := bridge.should_stop():  # the job's time is up: end here, between two rounds
        break
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    receipt = bridge.broadcast_weights(model)  # every rank calls it
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}, {receipt}", flush=True)

bridge.close()
dist.destroy_process_group()
sys.exit(75 if stop else 0)  # "may run again"
