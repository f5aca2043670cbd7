"""The earlier bridge's names, as thin delegates. What they cannot honour any more they refuse.

================================  ==========================================================================
earlier                           now
================================  ==========================================================================
VLLMWeightBridge(config)          Bridge(config)
.initialize()                     Bridge.connect(config)
.broadcast_single_param(m, name)  Bridge.broadcast_single_param(name, tensor)
.notify_update()                  nothing to do after a broadcast; Bridge.notify_update(model) over HTTP
.cleanup()                        Bridge.close()
================================  ==========================================================================
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from bridge import environment
from bridge.config import BridgeConfig
from bridge.errors import ConfigError, MappingError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bridge.job import PendingBroadcast, Receipt
    from bridge.trainer import Bridge

logger = logging.getLogger(__name__)

_RENAMED = {"log_dir": "logdir", "timeout_seconds": "connect_timeout_s", "vllm_api_url": "http_url"}
_MEANINGLESS = {
    "trainer_rank": "torch.distributed says it",
    "world_size": "torch.distributed says it",
    "init_method": "the mapping file says where to meet",
    "num_inference_nodes": "the mapping file says where the server is",
    "model_name": "the mapping file says which model is served",
    "device": "each parameter says where it is",
    "num_gpus_per_node": "every rank sends its own shards, however many there are",
}


def _deprecated(earlier: str, now: str) -> None:
    # 3: this function, the earlier name, its caller
    warnings.warn(f"{earlier} is the earlier bridge's; use {now}", DeprecationWarning, stacklevel=3)


# --- configuration -----------------------------------------------------------------------------------------


def translate_keywords(values: Mapping[str, Any], *, known: Collection[str]) -> dict[str, Any]:
    """The earlier BridgeConfig's keywords as today's; those that are neither stay as they are.

    Args:
        values: what the constructor was given.
        known: today's keywords.

    Raises:
        ConfigError: an earlier keyword asks for something that cannot be done, or says the same as a new one.
    """
    kept = {
        name: value for name, value in values.items() if name not in _RENAMED and name not in _MEANINGLESS
    }
    for earlier in values.keys() & _RENAMED.keys():
        now = _RENAMED[earlier]
        if now in kept:
            raise ConfigError(
                f"{earlier}={values[earlier]!r} and {now}={kept[now]!r} are the same setting; give one"
            )
        kept[now] = values[earlier]
        logger.warning("BridgeConfig(%s=...) is the earlier bridge's; use %s", earlier, now)
    dropped = {name: value for name, value in values.items() if name in _MEANINGLESS and name not in known}
    _check_dropped(dropped)
    if dropped:
        reasons = "; ".join(f"{name}: {_MEANINGLESS[name]}" for name in dropped)
        logger.warning("BridgeConfig needs these of the earlier bridge's keywords no more: %s", reasons)
    return kept


def _check_dropped(dropped: Mapping[str, Any]) -> None:
    """Dropping a keyword is fine as long as what it asked for is what happens."""
    rank, ranks = dropped.get("trainer_rank"), environment.initialised_ranks()
    if rank is not None and ranks is not None and rank != ranks.rank:
        raise ConfigError(
            f"trainer_rank is {rank}, but torch.distributed calls this process rank {ranks.rank}; leave it "
            "out"
        )
    init_method = dropped.get("init_method", "env://")
    if init_method != "env://":
        raise ConfigError(
            f"init_method is {init_method!r}; the bridge builds its own groups at the address in the mapping "
            "file, which the server's --rendezvous-host and --rendezvous-port set; leave it out"
        )
    nodes = dropped.get("num_inference_nodes", 0)
    if nodes < 0:
        raise ConfigError(
            f"num_inference_nodes is {nodes}, which selected the earlier HTTP mode; call "
            "notify_update(model) with http_url set instead, and leave it out"
        )


def training_keywords(config: Any) -> dict[str, Any]:
    """Keywords for ``BridgeConfig`` from the earlier trainer's configuration object."""
    names = ("trainer_rank", "world_size", "init_method", "num_inference_nodes", "model_name", "device")
    found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if (port := getattr(config, "vllm_port", None)) is not None:
        found["vllm_api_url"] = f"http://localhost:{port}"
    return found


# --- the bridge --------------------------------------------------------------------------------------------


class VLLMWeightBridge:
    """The earlier class. Every method warns with what to call instead, and raises what that raises."""

    def __init__(self, config: BridgeConfig) -> None:
        _deprecated("VLLMWeightBridge", "bridge.Bridge, or bridge.broadcast_weights")
        self.config = environment.bridge_config(config)
        self._bridge: Bridge | None = None
        self._has_sent = False

    def initialize(self, model: nn.Module | None = None) -> None:
        """Meet the server, and see whether ``model`` fits it, if one is given. Idempotent."""
        _deprecated("VLLMWeightBridge.initialize", "bridge.Bridge.connect")
        environment.check_enabled()
        self._connected()
        if model is not None:
            self._check(model)

    def _connected(self) -> Bridge:
        if self._bridge is None:
            from bridge.trainer import Bridge

            self._bridge = Bridge.connect(self.config)
        return self._bridge

    def _check(self, model: nn.Module) -> None:
        from bridge.protocol import mapping
        from bridge.sharding import collect

        collect(model, mapping.load(self.config.mapping_path()), rank=environment.ranks().rank)

    def broadcast_weights(self, model: nn.Module) -> Receipt | PendingBroadcast:
        """Send the model and wait until it is live."""
        _deprecated("VLLMWeightBridge.broadcast_weights", "bridge.Bridge.broadcast_weights")
        return self._send(lambda bridge: bridge.broadcast_weights(model))

    def broadcast_single_param(self, model: nn.Module, param_name: str) -> Receipt | PendingBroadcast:
        """Send one of the model's parameters.

        Raises:
            MappingError: the model has none of that name.
        """
        _deprecated("VLLMWeightBridge.broadcast_single_param", "bridge.Bridge.broadcast_single_param")
        tensor = _parameter(model, param_name)
        return self._send(lambda bridge: bridge.broadcast_single_param(param_name, tensor))

    def _send(self, send: Callable[[Bridge], Receipt | PendingBroadcast]) -> Receipt | PendingBroadcast:
        environment.check_enabled()
        receipt = send(self._connected())
        self._has_sent = True
        return receipt

    def send_heartbeat(self) -> None:
        """Send a heartbeat; they are sent by themselves too."""
        _deprecated("VLLMWeightBridge.send_heartbeat", "bridge.Bridge.send_heartbeat")
        self._connected().send_heartbeat()

    def notify_update(self, model: nn.Module | dict[str, torch.Tensor] | None = None) -> Receipt | None:
        """With a model: send it over HTTP. Without: nothing is left to do, as broadcasts return when live.

        Raises:
            ConfigError: there is no model, and nothing was broadcast that could be live.
        """
        _deprecated("VLLMWeightBridge.notify_update", "bridge.Bridge.notify_update(model)")
        if model is not None:
            from bridge.trainer import Bridge

            # Over HTTP no group is needed, so none is made.
            receipt = (self._bridge or Bridge(self.config)).notify_update(model)
            self._has_sent = True
            return receipt
        if not self._has_sent:
            raise ConfigError(
                "notify_update() without a model has nothing to announce: nothing was broadcast yet; call "
                "notify_update(model), or broadcast_weights(model)"
            )
        return None

    def cleanup(self) -> None:
        """Leave; the server goes on. Idempotent."""
        _deprecated("VLLMWeightBridge.cleanup", "bridge.Bridge.close")
        if self._bridge is not None:
            bridge, self._bridge = self._bridge, None
            bridge.close()


def _parameter(model: nn.Module, name: str) -> torch.Tensor:
    from bridge.names import canonical_names

    named = canonical_names(model)
    if name not in named:
        close = ", ".join(difflib.get_close_matches(name, named)) or "nothing alike"
        raise MappingError(f"the model has no parameter {name!r}; it has {close}")
    return named[name]


def create_bridge_from_training_config(config: Any) -> VLLMWeightBridge:
    """The earlier factory: read a training configuration's attributes, and connect."""
    _deprecated("create_bridge_from_training_config", "bridge.Bridge.connect")
    bridge = VLLMWeightBridge(BridgeConfig.from_training_config(config))
    bridge.initialize()
    return bridge
