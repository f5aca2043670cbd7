"""The module-level functions: methods of one ``Bridge``, made from the environment by the first call."""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager
from typing import Literal, Unpack, overload

import torch
from torch import nn

from bridge import environment
from bridge.config import BridgeConfig
from bridge.job import PendingBroadcast, Receipt
from bridge.joining import any_rank
from bridge.parts import Round
from bridge.patches import SparsePatch
from bridge.trainer import Bridge, Options, SingleOptions, Weights

_default: Bridge | None = None


def connect(config: BridgeConfig | None = None) -> Bridge:
    """``Bridge.connect``."""
    return Bridge.connect(config)


def _default_bridge() -> Bridge:
    global _default  # the one connection behind the module-level functions
    if _default is None:
        _default = Bridge(environment.bridge_config())
        atexit.register(close)
    return _default


@overload
def broadcast_weights(
    model: Weights, *, blocking: Literal[True] = True, **options: Unpack[Options]
) -> Receipt: ...


@overload
def broadcast_weights(
    model: Weights, *, blocking: bool, **options: Unpack[Options]
) -> Receipt | PendingBroadcast: ...


def broadcast_weights(
    model: Weights, *, blocking: bool = True, **options: Unpack[Options]
) -> Receipt | PendingBroadcast:
    """``Bridge.broadcast_weights`` on a connection made by the first call, from the environment."""
    return _default_bridge().broadcast_weights(model, blocking=blocking, **options)


@overload
def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: Literal[True] = True, **options: Unpack[SingleOptions]
) -> Receipt: ...


@overload
def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: bool, **options: Unpack[SingleOptions]
) -> Receipt | PendingBroadcast: ...


def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: bool = True, **options: Unpack[SingleOptions]
) -> Receipt | PendingBroadcast:
    """``Bridge.broadcast_single_param`` on the default connection."""
    return _default_bridge().broadcast_single_param(name, tensor, blocking=blocking, **options)


def round(*, version: int | None = None, blocking: bool = True) -> AbstractContextManager[Round]:
    """``Bridge.round`` on the default connection."""
    return _default_bridge().round(version=version, blocking=blocking)


@overload
def update_weight(name: str, tensor: torch.Tensor) -> None: ...


@overload
def update_weight(name: SparsePatch) -> None: ...


def update_weight(name: str | SparsePatch, tensor: torch.Tensor | None = None) -> None:
    """``Bridge.update_weight`` on the default connection."""
    _default_bridge().update_weight(name, tensor)  # type: ignore[arg-type]  # told apart there


def rollback(*, to: int | None = None) -> Receipt:
    """``Bridge.rollback`` on the default connection."""
    return _default_bridge().rollback(to=to)


def send_heartbeat() -> None:
    """``Bridge.send_heartbeat`` on the default connection."""
    _default_bridge().send_heartbeat()


def notify_update(model: nn.Module | dict[str, torch.Tensor], *, version: int | None = None) -> Receipt:
    """``Bridge.notify_update`` on the default connection."""
    return _default_bridge().notify_update(model, version=version)


def should_stop() -> bool:
    """Whether this job has been asked to end; every trainer rank calls it, between two rounds.

    Asked by the file ``BRIDGE_STOP_FILE``, which batch scripts make ahead of the time limit. All ranks get
    the same answer, over a group of the trainer's ranks: what one of them sees, the others may see later.

    Raises:
        TopologyError: a launcher started several processes, but they have not met.
        PeerLost: another rank is gone, or has not called this within ``BRIDGE_RANKS_TIMEOUT_S``.
    """
    timeout_s = environment.bridge_config().ranks_timeout_s
    return any_rank(environment.stop_requested(), environment.ranks(), timeout_s=timeout_s)


def close() -> None:
    """Close the default connection, if there is one."""
    global _default  # see _default_bridge
    if _default is not None:
        bridge, _default = _default, None
        bridge.close()
