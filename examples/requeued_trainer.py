"""Train and serve in a batch job that may end and start again at any time, and go on from where it was.

BRIDGE_LOGDIR=LOGDIR torchrun --nproc-per-node=2 examples/requeued_trainer.py MODEL STATE STEPS
MODEL=... sbatch slurm/train_and_serve.sbatch examples/requeued_trainer.py MODEL STATE STEPS

STATE is a directory that all ranks see. Exits with 75 if it was asked to stop before the last step.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import bridge

path, state_dir, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(model.config.vocab_size, (4, 32))  # your data goes here


def save(step: int) -> None:
    """Beside the last one, then instead of it: a job may be killed at any moment."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=state_dir / str(step))
    if dist.get_rank() == 0:
        (state_dir / "latest.new").write_text(str(step))
        (state_dir / "latest.new").replace(state_dir / "latest")
        shutil.rmtree(state_dir / str(step - 1), ignore_errors=True)
    dist.barrier()  # who exits with 75 before the others are done ends them: the step has failed


def restore() -> int:
    """The number of steps that were done before."""
    if not (state_dir / "latest").exists():
        return 0
    step = int((state_dir / "latest").read_text())
    weights, moments = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": moments}
    dcp.load(found, checkpoint_id=state_dir / str(step))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return step


def serve(step: int) -> None:
    """Under a number above all that were served before, which BRIDGE_VERSIONS_AFTER says."""
    try:
        receipt = bridge.broadcast_weights(model)
    except (bridge.TransferError, bridge.ProtocolError) as err:  # on every rank
        print(f"step {step} is sent again: {err}", flush=True)
        receipt = bridge.broadcast_weights(model)  # waits for it to be there again
    if dist.get_rank() == 0:
        print(f"step {step}: {receipt}", flush=True)


done = restore()
if done:
    serve(done)  # servers that were started again hold the checkpoint's weights
code = 0
while done < steps:
    if bridge.should_stop():
        code = 75
        break
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    done += 1
    serve(done)
    save(done)  # a large model, now and then; in any case before it ends

bridge.close()
dist.destroy_process_group()
sys.exit(code)
