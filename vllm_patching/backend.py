"""The server's half of vLLM's weight-transfer backend ``bridge``. The trainer's half: ``trainer_half``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from vllm_patching.compat import BACKEND


class BridgeWeightTransferEngine(WeightTransferEngine):
    """What vLLM's workers hold. It moves nothing: updaters do, and the engine core answers vLLM's calls.

    So ``start_weight_update`` and ``finish_weight_update`` never get here, and neither does the layerwise
    reload that other backends do in them: it would replace the tensors that the bridge keeps in step.
    """

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:  # noqa: ARG002 - vLLM's
        _refuse("init_weight_transfer_engine")

    def start_weight_update(self) -> None:
        _refuse("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:  # noqa: ARG002 - vLLM's
        _refuse("update_weights")

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:  # noqa: ARG002 - vLLM's
        _refuse("update_weights")

    def finish_weight_update(self) -> None:
        _refuse("finish_weight_update")

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_init(init_info: Mapping[str, Any] | None = None) -> Any:
        """``trainer_half.connect``, of rank 0 of a trainer that posts to the endpoints itself."""
        from vllm_patching import trainer_half

        return trainer_half.connect(**(init_info or {}))

    @staticmethod
    def trainer_send_weights(
        iterator: Iterable[tuple[str, torch.Tensor]], trainer_args: Mapping[str, Any]
    ) -> Any:
        """``trainer_half.send``; ``trainer_args`` are ``{"bridge": Bridge}`` and maybe a ``version``."""
        from vllm_patching import trainer_half

        return trainer_half.send(iterator, **trainer_args)


def _refuse(call: str) -> NoReturn:
    raise AssertionError(
        f"{call} reached a worker: with the backend {BACKEND!r} the engine core answers it, so the bridge's "
        "hooks are not in place there; start the server by python -m bridge.launch"
    )
