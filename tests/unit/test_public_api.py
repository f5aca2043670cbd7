"""The names that trainers import: frozen, lazy, and the earlier bridge's among them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bridge
import bridge.trainer
from bridge.errors import BridgeError, ConfigError, MappingError

ROOT = Path(bridge.__file__).parent.parent
NAMES = [
    "PROTOCOL_VERSION", "Bridge", "BridgeConfig", "BridgeError", "ChecksumMismatch", "ConfigError",
    "DeclaredLayout", "DeviceError", "MappingError", "PeerLost", "PendingBroadcast", "ProtocolError",
    "Receipt", "RendezvousError", "RendezvousRefused", "Round", "RoundAborted", "SparsePatch",
    "TopologyError", "TransferError", "UnsupportedVersion",
    "VLLMWeightBridge", "__version__", "broadcast_single_param", "broadcast_weights", "close", "connect",
    "create_bridge_from_training_config", "export_param_mappings", "load_param_mappings", "notify_update",
    "rollback", "round", "send_heartbeat", "should_stop", "update_weight",
]  # fmt: skip


def test_the_names_are_frozen() -> None:
    """A change here is a change of the public interface: say so in the changelog."""
    assert bridge.__all__ == NAMES
    for name in NAMES:
        assert getattr(bridge, name) is not None
        assert name in dir(bridge)


def test_every_error_is_public() -> None:
    found = {BridgeError}
    while more := {c for e in found for c in e.__subclasses__() if c.__module__ == "bridge.errors"} - found:
        found |= more
    assert {error.__name__ for error in found} <= set(NAMES)


def test_errors_and_receipts_travel_between_processes() -> None:
    """As Ray brings them from an actor to its driver."""
    receipt = bridge.Receipt(
        version=3, bytes=8208, transfer_s=0.0123, stage_s=0.02, flip_s=0.00011, transport="pull", total_s=0.03
    )
    assert pickle.loads(pickle.dumps(receipt)) == receipt
    for name in NAMES:
        kind = getattr(bridge, name)
        if isinstance(kind, type) and issubclass(kind, BridgeError):
            error = pickle.loads(pickle.dumps(kind("version 3 is served on")))
            assert (type(error), str(error)) == (kind, "version 3 is served on")


def test_a_receipt_is_printed_for_people() -> None:
    receipt = bridge.Receipt(
        version=3, bytes=8208, transfer_s=0.0123, stage_s=0.02, flip_s=0.00011, transport="pull", total_s=0.03
    )
    said = "version 3 live after 30.0 ms: 8,208 bytes by pull in 12.3 ms, stood still for 0.11 ms"
    assert str(receipt) == said


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'brodcast'; it has: .*broadcast_weights"):
        _ = bridge.brodcast


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert bridge.__version__ == project["version"]


def test_types_are_shipped() -> None:
    assert (ROOT / "bridge/py.typed").exists()


@pytest.mark.parametrize(
    "use", ["", "bridge.BridgeConfig(logdir='x')", "bridge.MappingError", "bridge.PROTOCOL_VERSION",
            "bridge.VLLMWeightBridge", "import bridge.environment; bridge.environment.bridge_config()"]
)  # fmt: skip
def test_importing_loads_neither_torch_nor_vllm(use: str) -> None:
    code = f"import sys, bridge; {use}\nassert not {{'torch', 'vllm', 'numpy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# --- the earlier bridge's class --------------------------------------------------------------------------


class Recorder:
    """Stands where ``Bridge`` is, and writes down how it is called: delegation is all there is to test."""

    calls: list[tuple[Any, ...]]

    def __init__(self, config: bridge.BridgeConfig) -> None:
        self.calls.append(("new", config.logdir))

    @classmethod
    def connect(cls, config: bridge.BridgeConfig) -> Recorder:
        cls.calls.append(("connect", config.logdir))
        made = cls.__new__(cls)
        made.config = config
        return made

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args)) or name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    for name in ("VLLM_ENABLE_SHARED_WEIGHTS", "NUM_INFERENCE_NODES", "BRIDGE_CONFIG", "BRIDGE_LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGDIR", "/logs")
    monkeypatch.setattr(bridge.trainer, "Bridge", Recorder)
    Recorder.calls = []
    return Recorder.calls


def test_the_earlier_class_delegates_and_warns(calls: list[tuple[Any, ...]]) -> None:
    model = nn.Linear(2, 2)
    with pytest.warns(DeprecationWarning, match="use bridge.Bridge, or bridge.broadcast_weights") as caught:
        old = bridge.VLLMWeightBridge(bridge.BridgeConfig())
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"use bridge\.Bridge\.connect"):
        old.initialize()
    with pytest.warns(DeprecationWarning, match="initialize"):
        old.initialize()
    with pytest.warns(DeprecationWarning, match="broadcast_weights"):
        assert old.broadcast_weights(model) == "broadcast_weights"
    with pytest.warns(DeprecationWarning, match="broadcast_single_param"):
        old.broadcast_single_param(model, "bias")
    with pytest.warns(DeprecationWarning, match="send_heartbeat"):
        old.send_heartbeat()
    with pytest.warns(DeprecationWarning, match="notify_update"):
        assert old.notify_update() is None
    with pytest.warns(DeprecationWarning, match="notify_update"):
        old.notify_update(model)
    with pytest.warns(DeprecationWarning, match="cleanup"):
        old.cleanup()
    with pytest.warns(DeprecationWarning, match="cleanup"):
        old.cleanup()
    assert calls == [
        ("connect", "/logs"), ("broadcast_weights", model), ("broadcast_single_param", "bias", model.bias),
        ("send_heartbeat",), ("notify_update", model), ("close",),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_earlier_class_refuses_what_it_cannot_do(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bridge.VLLMWeightBridge(bridge.BridgeConfig())
    with pytest.raises(ConfigError, match="nothing was broadcast yet"):
        old.notify_update()
    with pytest.raises(MappingError, match="no parameter 'biass'; it has bias"):
        old.broadcast_single_param(nn.Linear(2, 2), "biass")
    monkeypatch.setenv("VLLM_ENABLE_SHARED_WEIGHTS", "0")
    for attempt in (old.initialize, lambda: old.broadcast_weights(nn.Linear(2, 2))):
        with pytest.raises(ConfigError, match="switches weight broadcasts off"):
            attempt()
    assert calls == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_http_needs_no_connection(calls: list[tuple[Any, ...]]) -> None:
    old = bridge.VLLMWeightBridge(bridge.BridgeConfig(vllm_api_url="http://h:1"))
    state = {"a": torch.ones(1)}
    old.notify_update(state)
    assert calls == [("new", "/logs"), ("notify_update", state)]


def test_the_earlier_factory_connects(calls: list[tuple[Any, ...]]) -> None:
    training = SimpleNamespace(model_name="m", device="cpu", vllm_port=9001)
    with pytest.warns(DeprecationWarning, match="create_bridge_from_training_config"):
        old = bridge.create_bridge_from_training_config(training)
    assert old.config.http_url == "http://localhost:9001"
    assert calls == [("connect", "/logs")]
