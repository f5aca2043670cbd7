"""On PYTHONPATH, lets vLLM serve pipeline parallel on a CPU: its second stage has no buffer to receive in.

vLLM allocates it in a dummy run, which its CPU worker skips.
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


compat.when_imported("vllm.v1.worker.gpu_model_runner", _allocate_when_needed)
