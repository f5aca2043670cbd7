"""The trainer's half of vLLM's weight-transfer backend ``bridge``; importing it registers it with vLLM.

For trainers that drive vLLM's endpoints (init, start, update, finish), through vLLM's
``WeightTransferTrainerFactory`` or by themselves. Full tensors are sent by rank 0 alone; a ``ModuleSource``
by all ranks, each its own shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ModuleSource, TrainerInitInfo, TrainerWeightTransferEngine

from bridge.config import BridgeConfig
from bridge.environment import Ranks, ranks
from bridge.errors import ConfigError, TopologyError
from bridge.job import Receipt
from bridge.protocol import mapping as mapping_file
from bridge.trainer import Bridge
from vllm_patching import compat
from vllm_patching.compat import BACKEND

Named = Iterable[tuple[str, torch.Tensor]]


def connect(config: BridgeConfig | None = None) -> Bridge:
    """Connect rank 0 of a trainer, which sends alone.

    Args:
        config: default is what the environment says (``BRIDGE_CONFIG``, ``BRIDGE_LOGDIR``).

    Raises:
        ConfigError: no mapping can be found, or it is damaged.
        RendezvousError: the daemon cannot be reached, or refuses.
    """
    return Bridge.connect(config, ranks=Ranks())


def send(named: Named, bridge: Bridge, version: int | None = None) -> Receipt:
    """Send what ``named`` yields as one version, from rank 0, and wait until it is live.

    Before, during or after ``/update_weights``: that call only waits for the round's end.

    Args:
        named: (name, tensor) pairs: the whole model, each tensor full, under the checkpoint's names. A
            parameter is read where it is. Anything else is copied first, on its own device, since an
            iterator may write over what it yielded: the copies are held until they have been read.
        bridge: from ``connect``.
        version: as for ``broadcast_weights``.

    Returns:
        The receipt; ``update_info`` may name its ``version``.

    Raises:
        ConfigError: a name comes without a tensor, or twice.
        MappingError: names or shapes differ from the server's; lists every fault. Nothing was sent.
        TransferError: the round failed on the way. The old version is still served, whole.
    """
    return bridge.broadcast_weights(_snapshot(_pairs(named)), version=version)


def _pairs(source: Any) -> Named:
    """What a source yields full, as (name, tensor) pairs; since vLLM 0.33 it is not iterable itself."""
    pairs: Named = source.iter_full() if hasattr(source, "iter_full") else source
    return pairs


def _snapshot(named: Named) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    parameters: set[tuple[torch.device, int]] = set()  # by their memory: objects may be made anew around it
    fault: str = ""
    for name, tensor in named:
        if fault:
            continue  # other ranks may be in the source's next gather, which is collective
        where = (tensor.device, tensor.data_ptr()) if tensor is not None and tensor.numel() else None
        fault = _fault(name, tensor, name in kept, where in parameters)
        if fault:
            kept.clear()
        elif isinstance(tensor, nn.Parameter):
            kept[name] = tensor
            if where is not None:
                parameters.add(where)
        else:
            kept[name] = tensor.detach().clone()
    if fault:
        raise ConfigError(fault)
    return kept


def _fault(name: str, tensor: torch.Tensor | None, known: bool, again: bool) -> str:
    if tensor is None:
        return (
            f"{name}: the source yields no tensor on rank 0, which has to hold the whole model; where "
            "ranks hold parts of it, call bridge.broadcast_weights on all of them"
        )
    if known:
        return f"{name}: the source yields it twice"
    if again:
        return (
            f"{name}: the source yields a parameter that it has yielded under another name; one that is "
            "filled anew each time must be yielded as a tensor (parameter.detach()), which is copied"
        )
    return ""


@dataclass
class BridgeTrainerInitInfo(TrainerInitInfo):
    """What vLLM's trainer factory dispatches on. ``rank`` is this process's among the trainer's.

    ``config`` is by default what the environment says (``BRIDGE_CONFIG``, ``BRIDGE_LOGDIR``).
    """

    backend: ClassVar[str] = BACKEND
    config: BridgeConfig | None = None


class BridgeTrainerWeightTransferEngine(TrainerWeightTransferEngine):
    """A trainer rank's sender, made by ``trainer_init`` on every rank."""

    init_info_cls = BridgeTrainerInitInfo
    config_cls = object  # 0.26 has one; ours comes with the init info

    def __init__(self, *, bridge: Bridge | None, client: Any, source: Any, is_sender: bool) -> None:
        """``bridge`` is None on ranks that send nothing. Not super's: 0.26's takes a config."""
        self.client, self.source, self.is_sender = client, source, is_sender
        self._bridge = bridge
        self._module = _module_of(source)

    @classmethod
    def trainer_init(
        cls,
        init_info: BridgeTrainerInitInfo,
        *,
        client: Any,
        source: Any = None,
        config: Any = None,  # noqa: ARG003 - 0.26 passes its own
    ) -> Self:
        """Meet the server; called on every trainer rank.

        Args:
            init_info: this rank, and how to find the server.
            client: a ``VLLMWeightSyncClient``; only rank 0 uses it.
            source: a ``WeightSource``. Of a ``ModuleSource`` every rank sends the shards it holds, and
                nothing is gathered or copied; what any other yields is sent by rank 0, as by ``send``.

        Raises:
            ConfigError: no source, or one that yields no full tensors; no mapping can be found, or it is
                damaged.
            TopologyError: ``init_info.rank`` is not this process's rank.
            RendezvousError: the daemon cannot be reached, or refuses.
        """
        if source is None:
            raise ConfigError(f"the backend {BACKEND!r} sends what a WeightSource yields; source is None")
        if not getattr(source, "implements_iter_full", lambda: True)():
            raise ConfigError(
                f"{type(source).__name__} has no iter_full, and the backend {BACKEND!r} sends full tensors: "
                "implement it, or pass a ModuleSource, of which every rank sends its own shards"
            )
        joint = ranks() if _module_of(source) is not None else Ranks()
        if joint.world_size > 1 and joint.rank != init_info.rank:
            raise TopologyError(
                f"init_info.rank is {init_info.rank}, but this is rank {joint.rank} of {joint.world_size} in "
                "torch.distributed's default group, whose ranks send a ModuleSource together"
            )
        sends = init_info.is_sender or joint.world_size > 1
        bridge = Bridge.connect(init_info.config, ranks=joint) if sends else None
        if init_info.is_sender and bridge is not None:
            run_dir = mapping_file.load(bridge.config.mapping_path()).run_dir
            client.init_weight_transfer_engine({"run": Path(run_dir).name})
        return cls(bridge=bridge, client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> Receipt | None:
        """Send the source's weights and return when they are live; every rank calls it.

        Generation need not be paused, and may be.

        Returns:
            The receipt; None on ranks that sent nothing.

        Raises:
            MappingError: the weights do not fit the server's. Nothing was sent.
            TransferError: the round failed on the way. The old version is still served, whole.
            Exception: the client's own, where it cannot tell the server. The other ranks' rounds fail then.
        """
        if self.is_sender:
            try:
                self.client.start_weight_update()
            except BaseException as err:
                self._miss(f"the server could not be told of it: {type(err).__name__}: {err}")
                raise
        try:
            receipt = self._send()
        except BaseException:
            if self.is_sender:
                self.client.finish_weight_update()  # nothing is to be undone there
            raise
        if self.is_sender and receipt is not None:
            self.client.update_weights({"version": receipt.version})
            self.client.finish_weight_update()
        return receipt

    def _send(self) -> Receipt | None:
        if self._bridge is None:
            self._only_gather()
            return None
        if self._module is not None:
            return self._bridge.broadcast_weights(self._module)
        return send(self.source, self._bridge)

    def _miss(self, reason: str) -> None:
        """Take no part in a round that the other ranks have begun, and let none of them wait for this one."""
        if self._module is not None and self._bridge is not None:
            self._bridge.miss(reason)
        else:
            self._only_gather()

    def _only_gather(self) -> None:
        """Go through the source and send nothing: gathering is collective."""
        for _ in _pairs(self.source):
            pass

    def shutdown(self) -> None:
        """Leave in order; the server goes on serving."""
        if self._bridge is not None:
            self._bridge.close()


def _module_of(source: Any) -> nn.Module | None:
    """The module behind vLLM's own ``ModuleSource``; a subclass may yield something else."""
    return compat.module_of(source) if type(source) is ModuleSource else None


WeightTransferTrainerFactory.register_engine(BACKEND, BridgeTrainerWeightTransferEngine)
