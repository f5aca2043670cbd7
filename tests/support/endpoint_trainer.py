"""A trainer rank that knows vLLM's weight-transfer interface only; commands as in ``support.trainer``.

python -m support.endpoint_trainer KIND CHECKPOINT DTYPE      (SERVER_URL is set besides)
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from support.trainer import Trainer, obey, take_stdout
from vllm.distributed.weight_transfer import (
    HTTPVLLMWeightSyncClient,
    ModuleSource,
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import materialize_full_tensor

from vllm_patching.backend import BridgeWeightTransferEngine
from vllm_patching.trainer_half import BridgeTrainerInitInfo


class OneBuffer(WeightSource):
    """Yields every tensor in the same memory, as an exporter that saves some would."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = dict(module.named_parameters())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in self._parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        first = next(iter(self._parameters.values()))
        size = max(p.numel() for p in self._parameters.values())
        buffer = torch.empty(size, dtype=first.dtype, device=first.device)
        for name, parameter in self._parameters.items():
            part = buffer[: parameter.numel()].view(parameter.shape)
            part.copy_(materialize_full_tensor(parameter.detach()))
            yield name, part


class EndpointTrainer(Trainer):
    def __init__(self, kind: str, checkpoint: Path, dtype: torch.dtype) -> None:
        super().__init__(kind, checkpoint, dtype)
        self.client = HTTPVLLMWeightSyncClient(os.environ["SERVER_URL"])
        self.sender: Any = None
        self.own: Any = None

    def init(self, source: str) -> dict[str, Any]:
        """Meet the server through vLLM's factory."""
        made = {"module": ModuleSource, "one_buffer": OneBuffer}[source](self.model)
        init = WeightTransferTrainerFactory.trainer_init
        named = ("bridge", None) if "backend" in inspect.signature(init).parameters else ()  # vLLM 0.26
        info = BridgeTrainerInitInfo(rank=int(os.environ["RANK"]))
        self.sender = init(*named, info, client=self.client, source=made)
        return {}

    def send(self) -> dict[str, Any]:
        receipt = self.sender.send_weights()
        return {} if receipt is None else dict(msgspec.to_builtins(receipt))

    def leave(self) -> dict[str, Any]:
        self.sender.shutdown()
        return {}

    def close(self) -> dict[str, Any]:
        if self.own is not None:
            self.own.close()
        return {}

    def init_by_hand(self) -> dict[str, Any]:
        self.client.init_weight_transfer_engine({})
        self.own = BridgeWeightTransferEngine.trainer_init()
        return {}

    def send_by_hand(self, shorten: str = "") -> dict[str, Any]:
        """One update as loops written for NCCL do it: the server receives while this side sends."""
        failures: list[Exception] = []

        def receive() -> None:
            try:
                self.client.update_weights({})
            except Exception as err:  # noqa: BLE001 - the test decides what an error means
                failures.append(err)

        named = [(n, p[:-1] if n == shorten else p) for n, p in self.model.named_parameters()]
        self.client.start_weight_update()
        receiving = threading.Thread(target=receive)
        receiving.start()
        try:
            receipt = BridgeWeightTransferEngine.trainer_send_weights(iter(named), {"bridge": self.own})
        except Exception as err:  # noqa: BLE001 - as above
            receiving.join(60)
            response = getattr(failures[0], "response", None)
            return {"sender": str(err), "code": response.status_code, "server": response.text}
        receiving.join(60)
        if failures:
            raise failures[0]
        self.client.finish_weight_update()
        return dict(msgspec.to_builtins(receipt))


def main() -> None:
    kind, checkpoint, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    answers = take_stdout()
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    obey(EndpointTrainer(kind, checkpoint, dtype), answers)


if __name__ == "__main__":
    main()
