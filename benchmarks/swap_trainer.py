"""A trainer rank for ``swap.py``: random weights on its GPU, sent by the bridge or by vLLM's own engine.

python -m benchmarks.swap_trainer KIND CONFIG_DIR DTYPE      (plain or fsdp2; JSON commands on stdin)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.trainer import obey, take_stdout
from torch import nn
from torch.distributed.tensor import DTensor


def build(kind: str, directory: Path, dtype: torch.dtype) -> nn.Module:
    """A model of ``directory``'s config with random weights, on the current device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta" if kind == "fsdp2" else device()), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device(), (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=device())
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.ndim == 1:
                local.fill_(1.0)
            else:
                local.normal_(0.0, 0.02)
    return model


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Trainer:
    """The commands of ``swap.py``."""

    def __init__(self, kind: str, directory: Path, dtype: torch.dtype) -> None:
        self.model = build(kind, directory, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.group: Any = None

    def describe(self) -> dict[str, Any]:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return {
            "bytes": sum(p.numel() * p.element_size() for p in local),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "names": [name for name, _ in self.model.named_parameters()],
            "shapes": [list(p.shape) for p in self.model.parameters()],
        }

    def redraw(self, seed: int) -> dict[str, Any]:
        """Draw every matrix anew; sharded ones differ from rank to rank, as they should."""
        torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    local.normal_(0.0, 0.02)
        synchronize()
        return {}

    def memory(self) -> dict[str, Any]:
        if not torch.cuda.is_available():
            return {"used_bytes": 0}
        free, total = torch.cuda.mem_get_info()
        return {"used_bytes": total - free, "torch_bytes": torch.cuda.memory_allocated()}

    def broadcast(self) -> dict[str, Any]:
        import msgspec

        import bridge

        start = time.monotonic()
        receipt = bridge.broadcast_weights(self.model)
        return {"start": start, "end": time.monotonic(), **msgspec.to_builtins(receipt)}

    def broadcast_at_once(self) -> dict[str, Any]:
        """``blocking=False``: how long the call takes, then the outcome."""
        import msgspec

        import bridge

        start = time.monotonic()
        pending = bridge.broadcast_weights(self.model, blocking=False)
        call_s = time.monotonic() - start
        receipt = pending.wait()
        return {"call_s": call_s, "start": start, "end": time.monotonic(), **msgspec.to_builtins(receipt)}

    def native_init(self, port: int, world_size: int) -> dict[str, Any]:
        """Join vLLM's own weight-transfer group; only rank 0 is in it."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        if int(os.environ.get("RANK", "0")) == 0:
            self.group = NCCLWeightTransferEngine.trainer_init(
                {"master_address": "127.0.0.1", "master_port": port, "world_size": world_size}
            )
        return {}

    def _full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            data = parameter.detach()
            yield name, data.full_tensor() if isinstance(data, DTensor) else data

    def native_send(self) -> dict[str, Any]:
        """Send everything, packed, by vLLM's own engine; sharded weights are gathered on the way."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerSendWeightsArgs,
            NCCLWeightTransferEngine,
        )

        start = time.monotonic()
        if self.group is not None:
            args = NCCLTrainerSendWeightsArgs(group=self.group, packed=True)
            NCCLWeightTransferEngine.trainer_send_weights(self._full(), args)
        else:
            for _ in self._full():
                pass
        synchronize()
        return {"start": start, "end": time.monotonic()}

    def close(self) -> dict[str, Any]:
        import bridge

        bridge.close()
        return {}


def main(trainer: type[Trainer] = Trainer) -> None:
    kind, directory, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    answers = take_stdout()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    obey(trainer(kind, directory, dtype), answers)


if __name__ == "__main__":
    main()
