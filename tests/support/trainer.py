"""A trainer rank for tests: takes JSON commands on stdin, answers in JSON lines on stdout.

    python -m support.trainer KIND CHECKPOINT DTYPE      (RANK, WORLD_SIZE, MASTER_*, LOGDIR are set)

KIND is plain, ddp, fsdp2, hsdp, tp, tp_fsdp2, zero3, declared or lora. Commands: load, broadcast, wait, step,
single, notify, heartbeat, close, memory and others: the methods of ``Trainer``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

_MADV_POPULATE_READ = 22  # Linux 5.14


def build(kind: str, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    device = os.environ.get("TRAINER_DEVICE", "cpu")
    if device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind in ("fsdp2", "hsdp", "tp", "tp_fsdp2"):
        return distributed(model, kind, device)
    if kind == "zero3":
        return partitioned(model)
    if kind == "lora":
        return adapted(model)
    return model


def distributed(model: nn.Module, kind: str, device: str) -> nn.Module:
    """The model with DTensor parameters; of "hsdp" and "tp_fsdp2" the inner mesh dimension has two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    if kind == "fsdp2":
        mesh = init_device_mesh(device, (ranks,))
    elif kind == "hsdp":
        mesh = init_device_mesh(device, (ranks // 2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        tensor = ranks if kind == "tp" else 2
        both = init_device_mesh(device, (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))
        cut_for_tensor_parallel(model, both["tensor"])
        mesh = both["data"]
    if kind != "tp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def cut_for_tensor_parallel(model: nn.Module, mesh: Any) -> None:
    """Linears by rows or columns, the vocabulary by rows, fused experts one after the other."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    styles = dict.fromkeys(rows, ColwiseParallel)
    styles |= dict.fromkeys(("o_proj", "down_proj", "embed_tokens"), RowwiseParallel)
    for path, module in list(model.named_modules()):
        if (style := styles.get(path.rpartition(".")[2])) is not None:
            parallelize_module(module, mesh, style())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                module.register_parameter(
                    name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
                )


def adapted(model: nn.Module) -> nn.Module:
    """The model with LoRA adapters that change what it computes."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def with_adapter(checkpoint: Path, dtype: torch.dtype, *, seed: int, **config: Any) -> Any:
    """A model with one LoRA adapter, seeded, its B not zero; ``config`` is peft's LoraConfig's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.to(os.environ.get("TRAINER_DEVICE", "cpu"))


def partitioned(model: nn.Module) -> nn.Module:
    """The model under DeepSpeed's ZeRO-3, small parameters whole on every rank."""
    os.environ.setdefault("DS_ACCELERATOR", os.environ.get("TRAINER_DEVICE", "cpu"))
    import deepspeed

    # Else it compiles a collective of its own first, under a lock that a killed process leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": dist.get_world_size(),
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 200},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    return engine.module


def megatron_layout(model: nn.Module) -> Any:
    """Llama's and Qwen's layers cut over all ranks as Megatron does, queries and keys in Meta's order."""
    from bridge import DeclaredLayout

    rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    dims = dict.fromkeys(rows, 0) | {"o_proj": 1, "down_proj": 1}
    modules = {name: name.split(".")[-2] for name, _ in model.named_parameters()}
    return DeclaredLayout(
        tp_degree=dist.get_world_size(),
        tp_shard_dim={name: dims[module] for name, module in modules.items() if module in dims},
        needs_permute=[
            n for n, module in modules.items() if module in ("q_proj", "k_proj", "q_norm", "k_norm")
        ],
        head_dim=model.config.head_dim,
    )


def megatron_part(name: str, full: torch.Tensor, layout: Any) -> torch.Tensor:
    """What this rank holds of a checkpoint's tensor."""
    from tests.support.mappings import interleaved

    mine = interleaved(full, layout.head_dim) if name in layout.needs_permute else full
    if name in layout.tp_shard_dim:
        mine = mine.chunk(layout.tp_degree, layout.tp_shard_dim[name])[dist.get_rank()]
    return mine.clone(memory_format=torch.contiguous_format)


@contextmanager
def whole(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter that may be written; ZeRO-3 gathers it for that, and partitions it again."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield parameter


class Trainer:
    def __init__(self, kind: str, checkpoint: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model = build(kind, checkpoint, dtype)
        self.layout = megatron_layout(self.model) if kind == "declared" else None
        if self.layout is not None:
            for name, parameter in self.model.named_parameters():
                parameter.data = megatron_part(name, parameter.data, self.layout)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.pending: Any = None
        self.adapted: Any = None

    def adapt(self, path: str, seed: int, **config: Any) -> dict[str, Any]:
        """From here on adapters sent alone are of this checkpoint with a seeded one; several ranks: FSDP2."""
        from torch.distributed.fsdp import fully_shard

        self.adapted = with_adapter(Path(path), self.dtype, seed=seed, **config)
        if dist.is_initialized():
            for module in self.adapted.modules():
                if type(module).__name__.endswith("DecoderLayer"):
                    fully_shard(module)
            fully_shard(self.adapted)
        return {}

    def load(self, path: str) -> dict[str, Any]:
        """Take over another checkpoint's weights, in place."""
        from transformers import AutoModelForCausalLM

        other = dict(AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).named_parameters())
        with torch.no_grad():
            for name, mine in self.model.named_parameters():
                full = other[name.removeprefix("module.")].to(mine.device)
                if self.layout is not None:
                    full = megatron_part(name, full, self.layout)
                if isinstance(mine, DTensor):
                    full = distribute_tensor(full, mine.device_mesh, mine.placements)
                with whole(mine) as parameter:
                    parameter.copy_(full)
        return {}

    def environ(self, **variables: str) -> dict[str, Any]:
        """From the next connection on."""
        os.environ.update(variables)
        return {}

    def declare(self, tp_degree: int) -> dict[str, Any]:
        """Say from now on that so many ranks are tensor parallel."""
        import msgspec

        self.layout = msgspec.structs.replace(self.layout, tp_degree=tp_degree)
        return {}

    def perturb(self, seed: int) -> dict[str, Any]:
        """Change every weight by a seeded amount (cheap, for large models; plain models only)."""
        with torch.no_grad():
            for index, mine in enumerate(self.model.parameters()):
                generator = torch.Generator().manual_seed(seed * 100003 + index)
                mine.flatten()[:64].add_(
                    (torch.rand(min(64, mine.numel()), generator=generator) * 1e-3).to(mine.device)
                )
        return {}

    def change(self, share: float, seed: int) -> dict[str, Any]:
        """Change the lowest bit of a share of each weight's elements (plain models, of two-byte dtypes)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for mine in self.model.parameters():
                bits = mine.view(torch.int16).flatten()
                count = round(share * bits.numel())
                bits[torch.randint(bits.numel(), (count,), generator=generator)] ^= 1
        return {}

    def broadcast(self, blocking: bool = True, **options: Any) -> dict[str, Any]:
        """``options`` are those of ``bridge.broadcast_weights``."""
        import bridge

        start = time.perf_counter()
        options = {"layout": self.layout, **options}
        model = self.adapted if options.get("adapters_only") else self.model
        result = bridge.broadcast_weights(model, blocking=blocking, **options)
        seconds = time.perf_counter() - start
        if not blocking:
            self.pending = result
            return {"seconds": seconds}
        import msgspec

        return {"seconds": seconds, **msgspec.to_builtins(result)}

    def unload(self) -> dict[str, Any]:
        """From here on the model is what peft makes of it and its adapters."""
        self.model = self.model.merge_and_unload()
        return {}

    def until_it_fails(self) -> dict[str, Any]:
        """Broadcast again and again; the error is the answer."""
        while True:
            self.broadcast()

    def synchronize(self) -> dict[str, Any]:
        """Wait for everything on this rank's GPU."""
        torch.cuda.synchronize()
        return {}

    def wait(self) -> dict[str, Any]:
        import msgspec

        return dict(msgspec.to_builtins(self.pending.wait()))

    def step(self, fill: float | None = None, begun: str = "") -> dict[str, Any]:
        """One optimizer step, which must wait for a broadcast under way; then overwrite the weights.

        ``begun`` is a file that says that it has begun.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        start = time.perf_counter()
        if begun:
            Path(begun).touch()
        self.optimizer.step()
        seconds = time.perf_counter() - start
        if fill is not None:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.fill_(fill)
        return {"seconds": seconds}

    def single(self, name: str, value: float) -> dict[str, Any]:
        import msgspec

        import bridge

        parameter = dict(self.model.named_parameters())[name]
        with torch.no_grad():
            parameter.fill_(value)
        receipt = bridge.broadcast_single_param(name, parameter, layout=self.layout)
        return dict(msgspec.to_builtins(receipt))

    def round(
        self, only: str = "", fail_on: int | None = None, short_on: int | None = None
    ) -> dict[str, Any]:
        """Parameters gathered and handed over one at a time, the buffer overwritten behind each.

        ``only`` is a name; rank ``fail_on`` raises in the block, rank ``short_on`` leaves the last one out.
        """
        import msgspec

        import bridge

        rank = int(os.environ.get("RANK", "0"))
        named = [(n, p) for n, p in self.model.named_parameters() if only in ("", n)]
        last = named[-1][0]
        with bridge.round() as made:
            for name, parameter in named:
                with whole(parameter) as full, torch.no_grad():
                    buffer = (full.full_tensor() if isinstance(full, DTensor) else full).clone()
                if (rank, name) != (short_on, last):
                    bridge.update_weight(name, buffer)
                buffer.fill_(float("nan"))
            if rank == fail_on:
                raise ArithmeticError("the loss is not finite")
        return dict(msgspec.to_builtins(made.receipt))

    def rollback(self) -> dict[str, Any]:
        import msgspec

        import bridge

        return dict(msgspec.to_builtins(bridge.rollback()))

    def patch(self, rows: str, whole: str, every: int) -> dict[str, Any]:
        """Turn the sign of every so many rows of one parameter, halve another: a round of just these."""
        import msgspec

        import bridge

        named = dict(self.model.named_parameters())
        with torch.no_grad():
            indices = torch.arange(0, len(named[rows]), every).flip(0)
            named[rows][indices] *= -1
            named[whole] *= 0.5
            with bridge.round() as made:
                bridge.update_weight(bridge.SparsePatch(rows, indices, named[rows][indices]))
                bridge.update_weight(whole, named[whole])
        numel = indices.numel() * named[rows].shape[1] + named[whole].numel()
        return {"numel": numel, **msgspec.to_builtins(made.receipt)}

    def notify(self) -> dict[str, Any]:
        import msgspec

        import bridge

        return dict(msgspec.to_builtins(bridge.notify_update(self.model)))

    def drift(self, rank: int) -> dict[str, Any]:
        """One element of one parameter is another on this rank: a replica that has gone astray."""
        if rank == dist.get_rank():
            with torch.no_grad():
                next(self.model.parameters()).flatten()[7] += 1
        return {}

    def break_moves(self, rank: int) -> dict[str, Any]:
        """From now on no bytes can be moved on this rank, as if its GPU had no memory left; -1 mends all."""
        from bridge.errors import DeviceError
        from bridge.moving import Mover

        def broken(*_: Any, **__: Any) -> None:
            raise DeviceError("there is no memory for a snapshot")

        self._move = getattr(self, "_move", Mover.move)
        mine = rank == int(os.environ.get("RANK", "0"))
        Mover.move = broken if mine else self._move  # type: ignore[method-assign]
        return {}

    def heartbeat(self) -> dict[str, Any]:
        import bridge

        bridge.send_heartbeat()
        return {}

    def close(self) -> dict[str, Any]:
        import bridge

        bridge.close()
        return {}

    def follow(self, logdir: str) -> dict[str, Any]:
        """Turn to another server, and meet it."""
        import bridge

        bridge.close()
        os.environ["BRIDGE_LOGDIR"] = logdir
        bridge.send_heartbeat()
        return {}

    def measured_broadcast(self) -> dict[str, Any]:
        """One blocking broadcast; how far resident memory rose above what it was before it, and what stayed.

        Start the trainer with ``serving.RETURN_MEMORY``, or memory that was freed before hides what rises.
        """
        import bridge
        from bridge.sharding import local_tensor

        for parameter in self.model.parameters():  # files are mapped lazily, and the model is not overhead
            local_tensor(parameter.detach()).flatten()[::1024].sum()
        _populate_code()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        receipt = bridge.broadcast_weights(self.model)
        return {
            "version": receipt.version,
            "transport": receipt.transport,
            "peak_above_bytes": max(0, _status_bytes("VmHWM") - before),
            "kept_bytes": _status_bytes("VmRSS") - before,
        }

    def held(self) -> dict[str, Any]:
        """Bytes of this rank's part of the model, and of the largest parameter that it holds a part of."""
        from bridge import zero3
        from bridge.sharding import local_tensor

        mine = largest = 0
        for parameter in self.model.parameters():
            shard = parameter.ds_tensor if zero3.is_partitioned(parameter) else local_tensor(parameter)
            numel = math.prod(zero3.full_shape(parameter))
            mine += shard.numel() * shard.element_size()
            if shard.numel() < numel:
                largest = max(largest, numel * shard.element_size())
        return {"bytes": mine, "largest_in_part_bytes": largest}

    def memory(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_bytes": peak}


def _populate_code() -> None:
    """Have all pages of libraries resident: code that runs for the first time is not what a round takes."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, inode, *path = line.split(maxsplit=5)
        if inode == "0" or "w" in permissions or "r" not in permissions or ".so" not in "".join(path):
            continue
        first, last = (int(end, 16) for end in span.split("-"))
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_POPULATE_READ):
            raise OSError(ctypes.get_errno(), f"cannot map the pages of {''.join(path)}")


def _status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def take_stdout() -> TextIO:
    """What is left of stdout for answers: whatever libraries print must not look like one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    kind, checkpoint, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    answers = take_stdout()
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if os.environ.get("TRAINER_DEVICE") else "gloo")
    obey(Trainer(kind, checkpoint, dtype), answers)


def obey(trainer: Any, answers: TextIO) -> None:
    """Answer one JSON line for each command on stdin, by the trainer's method of that name."""
    answers.write(json.dumps({"ready": True, "pid": os.getpid()}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(trainer, command.pop("op"))(**command)
        except Exception as err:  # noqa: BLE001 - the test decides what an error means
            answer = {"error": str(err), "type": type(err).__name__}
        answers.write(json.dumps(answer) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
