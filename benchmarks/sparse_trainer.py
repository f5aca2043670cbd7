"""The trainer for ``sparse.py``: turns the sign of some elements, and sends those, by either system.

python -m benchmarks.sparse_trainer plain CONFIG_DIR DTYPE      (JSON commands on stdin)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import swap_trainer
from benchmarks.swap_trainer import device, synchronize

# What vLLM 0.26 patches is a parameter as vLLM has it: these of the checkpoint lie in one, by rows.
FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}


class Trainer(swap_trainer.Trainer):
    """The commands of ``sparse.py``; ``self.changed`` has the elements that the last change touched."""

    def __init__(self, kind: str, directory: Path, dtype: torch.dtype) -> None:
        super().__init__(kind, directory, dtype)
        self.named = dict(self.model.named_parameters())
        self.changed: dict[str, torch.Tensor] = {}  # int64 [n], flat and ascending, by parameter
        self.rows: torch.Tensor | None = None  # of the embedding, if they are what was changed
        self.engine: Any = None
        self.patches: list[Any] = []

    @property
    def embedding(self) -> str:
        return next(name for name in self.named if name.endswith("embed_tokens.weight"))

    def change(self, what: str, share: float, seed: int) -> dict[str, Any]:
        """Turn the sign of a share of all matrices' elements, or of the embedding's rows; twice: none."""
        generator = torch.Generator(device()).manual_seed(seed)
        with torch.no_grad():
            if what == "rows":
                weight = self.named[self.embedding]
                count = max(1, round(share * len(weight)))
                order = torch.randperm(len(weight), generator=generator, device=weight.device)
                self.rows = order[:count].sort().values
                columns = torch.arange(weight.shape[1], device=weight.device)
                flat = (self.rows[:, None] * weight.shape[1] + columns).flatten()
                self.changed = {self.embedding: flat}
            else:
                self.rows, self.changed = None, {}
                for name, weight in self.named.items():
                    if weight.ndim > 1:
                        count = max(1, round(share * weight.numel()))
                        drawn = torch.randint(
                            weight.numel(), (count,), generator=generator, device=weight.device
                        )
                        self.changed[name] = drawn.unique()
            for name, flat in self.changed.items():
                self.named[name].view(-1)[flat] *= -1
        synchronize()
        return {"elements": sum(flat.numel() for flat in self.changed.values())}

    def broadcast(self, **options: Any) -> dict[str, Any]:
        import msgspec

        import bridge

        start = time.monotonic()
        receipt = bridge.broadcast_weights(self.model, **options)
        return {"start": start, "end": time.monotonic(), **msgspec.to_builtins(receipt)}

    def patch(self) -> dict[str, Any]:
        """Send the changed rows as a ``SparsePatch``."""
        import msgspec

        import bridge

        assert self.rows is not None, "patches are of rows here"
        start = time.monotonic()
        with torch.no_grad(), bridge.round() as made:
            values = self.named[self.embedding][self.rows]
            bridge.update_weight(bridge.SparsePatch(self.embedding, self.rows, values))
        return {"start": start, "end": time.monotonic(), **msgspec.to_builtins(made.receipt)}

    def sparse_init(self, port: int, world_size: int) -> dict[str, Any]:
        """Join the group of vLLM's sparse engine (0.26)."""
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLWeightTransferEngine

        self.engine = SparseNCCLWeightTransferEngine
        self.group = self.engine.trainer_init(
            {"master_address": "127.0.0.1", "master_port": port, "world_size": world_size}
        )
        return {}

    def sparse_info(self) -> dict[str, Any]:
        """Make patches of the last change: what vLLM is to be told of them, and the bytes they will send."""
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

        self.patches = []
        for name, flat in self.changed.items():
            served, first = self._as_served(name)
            values = self.named[name].detach().view(-1)[flat]
            indices = (flat + first).to(torch.int32)
            self.patches.append(SparseWeightPatch(name=served, indices=indices, values=values))
        synchronize()
        info = {
            "names": [patch.name for patch in self.patches],
            "dtype_names": [str(patch.values.dtype).removeprefix("torch.") for patch in self.patches],
            "shapes": [list(self.named[name].shape) for name in self.changed],
            "num_updates_list": [patch.indices.numel() for patch in self.patches],
        }
        return {"info": info, "bytes": sum(p.indices.nbytes + p.values.nbytes for p in self.patches)}

    def sparse_send(self) -> dict[str, Any]:
        """Send them."""
        self.engine.trainer_send_weights(iter(self.patches), {"group": self.group})
        synchronize()
        return {}

    def _as_served(self, name: str) -> tuple[str, int]:
        """The parameter of an unquantised vLLM at TP 1 that holds ``name``, and where in it that begins."""
        path, _, leaf = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        if module not in FUSED:
            return name, 0
        fused, members = FUSED[module]
        before = members[: members.index(module)]
        first = sum(self.named[f"{parent}.{member}.{leaf}"].numel() for member in before)
        return f"{parent}.{fused}.{leaf}", first


if __name__ == "__main__":
    swap_trainer.main(Trainer)
