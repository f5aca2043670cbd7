"""Hot-swap the weights of a running vLLM from a trainer.

::

    import bridge
    ...
    optimizer.step()
    bridge.broadcast_weights(model)  # every trainer rank calls it; returns a receipt

Names are resolved when they are first used (PEP 562), so importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.config import BridgeConfig
    from bridge.declared import DeclaredLayout
    from bridge.default import (
        broadcast_single_param,
        broadcast_weights,
        close,
        connect,
        notify_update,
        rollback,
        round,
        send_heartbeat,
        should_stop,
        update_weight,
    )
    from bridge.errors import (
        BridgeError,
        ChecksumMismatch,
        ConfigError,
        DeviceError,
        MappingError,
        PeerLost,
        ProtocolError,
        RendezvousError,
        RendezvousRefused,
        RoundAborted,
        TopologyError,
        TransferError,
        UnsupportedVersion,
    )
    from bridge.legacy import VLLMWeightBridge, create_bridge_from_training_config
    from bridge.param_mappings import export_param_mappings, load_param_mappings
    from bridge.patches import SparsePatch
    from bridge.protocol.messages import PROTOCOL_VERSION
    from bridge.trainer import Bridge, PendingBroadcast, Receipt, Round

__version__ = "0.1.0"

__all__ = [
    "PROTOCOL_VERSION",
    "Bridge",
    "BridgeConfig",
    "BridgeError",
    "ChecksumMismatch",
    "ConfigError",
    "DeclaredLayout",
    "DeviceError",
    "MappingError",
    "PeerLost",
    "PendingBroadcast",
    "ProtocolError",
    "Receipt",
    "RendezvousError",
    "RendezvousRefused",
    "Round",
    "RoundAborted",
    "SparsePatch",
    "TopologyError",
    "TransferError",
    "UnsupportedVersion",
    "VLLMWeightBridge",
    "__version__",
    "broadcast_single_param",
    "broadcast_weights",
    "close",
    "connect",
    "create_bridge_from_training_config",
    "export_param_mappings",
    "load_param_mappings",
    "notify_update",
    "rollback",
    "round",
    "send_heartbeat",
    "should_stop",
    "update_weight",
]

_HOMES = {
    "bridge.config": ("BridgeConfig",),
    "bridge.declared": ("DeclaredLayout",),
    "bridge.errors": (
        "BridgeError",
        "ChecksumMismatch",
        "ConfigError",
        "DeviceError",
        "MappingError",
        "PeerLost",
        "ProtocolError",
        "RendezvousError",
        "RendezvousRefused",
        "RoundAborted",
        "TopologyError",
        "TransferError",
        "UnsupportedVersion",
    ),
    "bridge.legacy": ("VLLMWeightBridge", "create_bridge_from_training_config"),
    "bridge.param_mappings": ("export_param_mappings", "load_param_mappings"),
    "bridge.patches": ("SparsePatch",),
    "bridge.protocol.messages": ("PROTOCOL_VERSION",),
    "bridge.trainer": ("Bridge", "PendingBroadcast", "Receipt", "Round"),
    "bridge.default": (
        "broadcast_single_param",
        "broadcast_weights",
        "close",
        "connect",
        "notify_update",
        "rollback",
        "round",
        "send_heartbeat",
        "should_stop",
        "update_weight",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
