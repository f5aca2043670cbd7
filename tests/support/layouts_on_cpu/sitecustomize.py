"""On PYTHONPATH, adds what vLLM lacks on a CPU to serve in a pipeline, or a mixture of experts data parallel.

The second stage of a pipeline has no buffer to receive in, as vLLM allocates it in a dummy run that its CPU
worker skips. And the CPU's communicator has no collectives of uneven sizes, by which engines exchange tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm_patching import compat


def _allocate_when_needed(module: ModuleType) -> None:
    def make(original: Any) -> Any:
        def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.intermediate_tensors is None:
                self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                    batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
                )
            return original(self, *args, **kwargs)

        return sync_and_gather_intermediate_tensors

    compat.wrap(module.GPUModelRunner, "sync_and_gather_intermediate_tensors", make)


def _exchange_by_gloo(module: ModuleType) -> None:
    import torch
    import torch.distributed as dist

    def sizes_of(self: Any, length: int, sizes: list[int] | None) -> list[int]:
        return sizes if sizes is not None else [length] * self.world_size

    def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        assert dim == 0
        if not isinstance(input_, torch.Tensor):
            return [all_gatherv(self, one, dim, sizes) for one in input_]
        each = sizes_of(self, len(input_), sizes)
        padded = input_.new_zeros(max(each), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in each]
        dist.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:size] for part, size in zip(parts, each, strict=True)])

    def reduce_scatterv(
        self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        assert dim == 0
        each = sizes_of(self, len(input_) // self.world_size, sizes)
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        return total.split(each)[self.rank_in_group].contiguous()

    module.CpuCommunicator.all_gatherv = all_gatherv  # type: ignore[attr-defined]
    module.CpuCommunicator.reduce_scatterv = reduce_scatterv  # type: ignore[attr-defined]


compat.when_imported("vllm.v1.worker.gpu_model_runner", _allocate_when_needed)
compat.when_imported("vllm.distributed.device_communicators.cpu_communicator", _exchange_by_gloo)
