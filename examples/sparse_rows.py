"""New values for a few rows of the embedding, sent in three ways: the same tokens.

As all weights; as what has changed since the last broadcast, which the bridge finds; and as a patch that
names the rows.

    python -m bridge.launch serve --logdir runs/a --transport gloo -- MODEL
    BRIDGE_LOGDIR=runs/a torchrun --nproc-per-node=2 examples/sparse_rows.py MODEL

Only Gloo carries changes (the other transports are fast enough to send everything); patches go by any.
"""

import argparse
import json
import os
import urllib.request

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM

import bridge


def patch_rows(model: nn.Module, rows: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Give ``rows`` of the embedding values that depend on the seed only, on however many ranks it lies."""
    weight = model.get_input_embeddings().weight
    values = torch.randn(len(rows), weight.shape[1], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = weight.full_tensor()
        whole[rows.to(whole.device)] = (values * whole.float().std().cpu()).to(whole)
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
    return whole[rows.to(whole.device)]


def complete(url: str, prompt: list[int]) -> list[int]:
    """The 32 tokens that the server likes best."""
    body = {"prompt": prompt, "max_tokens": 32, "temperature": 0.0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a Hugging Face name or folder, the one that is served")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's")
    parser.add_argument("--rows", type=int, default=16, help="how many rows get new values")
    parser.add_argument("--seed", type=int, default=0, help="which ones, and which values")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    embedding = model.get_input_embeddings().weight
    name = next(key for key, value in model.named_parameters() if value is embedding)
    original = embedding.detach().clone()
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(embedding.shape[0], generator=generator)[: args.rows]

    first = dist.get_rank() == 0
    answers, receipts = {}, {}
    for way in ("dense", "delta", "patch"):
        encoding = "delta" if way == "delta" else "dense"
        with torch.no_grad():
            embedding.copy_(original)
        # The checkpoint as it is. The first "delta" is as long as "dense": it is what changes are told from.
        bridge.broadcast_weights(model, encoding=encoding)
        before = complete(args.url, rows.tolist()) if first else []
        values = patch_rows(model, rows, seed=args.seed)
        if way == "patch":
            with bridge.round() as made:
                bridge.update_weight(bridge.SparsePatch(name, rows, values))
            receipts[way] = made.receipt
        else:
            receipts[way] = bridge.broadcast_weights(model, encoding=encoding)
        answers[way] = (before, complete(args.url, rows.tolist()) if first else [])

    if first:
        for way, receipt in receipts.items():
            print(f"{way}: {receipt}; tokens {answers[way][1][:8]}...", flush=True)
        assert answers["dense"] == answers["delta"] == answers["patch"], "the tokens differ"
        assert answers["dense"][0] != answers["dense"][1], "the patch changed no token"
        saved = {way: 1 - receipts[way].bytes / receipts["dense"].bytes for way in ("delta", "patch")}
        told = ", ".join(f"{share:.1%} of the bytes saved by {way}" for way, share in saved.items())
        print(f"equal tokens, {told}", flush=True)
    bridge.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
