"""Configuration: keywords, variables, and what the earlier bridge called them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from bridge import environment
from bridge.config import SERVER_DECIDES, BridgeConfig
from bridge.errors import ConfigError, TopologyError
from bridge.protocol.mapping import CONFIG_NAME

OTHERS = (
    "LOGDIR", "VLLM_API_KEY", "VLLM_ENABLE_SHARED_WEIGHTS", "NUM_INFERENCE_NODES", "RANK", "WORLD_SIZE",
    "LOCAL_RANK",
)  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("BRIDGE_", "SLURM_")) or name in OTHERS:
            monkeypatch.delenv(name)
    environment._mentioned.clear()


# --- keywords ----------------------------------------------------------------------------------------------


def test_where_things_are(tmp_path: Path) -> None:
    config = BridgeConfig(logdir=tmp_path)
    assert config.mapping_path() == tmp_path / CONFIG_NAME
    assert config.update_path() == tmp_path / "updates"
    config = BridgeConfig(config_path=str(tmp_path / "m.json"), logdir="elsewhere", update_dir="/shared")
    assert config.mapping_path() == tmp_path / "m.json"
    assert config.update_path() == Path("/shared")
    assert BridgeConfig(config_path="/a/m.json").update_path() == Path("/a/updates")


def test_no_server_lists_what_was_looked_at() -> None:
    with pytest.raises(ConfigError, match=r"BRIDGE_CONFIG.*BRIDGE_LOGDIR and LOGDIR.*config_path, logdir"):
        environment.bridge_config().mapping_path()
    with pytest.raises(ConfigError, match="BRIDGE_UPDATE_DIR"):
        environment.bridge_config().update_path()


def test_fewer_than_fifteen_fields() -> None:
    assert len(BridgeConfig.__struct_fields__) < 15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"connect_timeout_s": 0}, r"connect_timeout_s is 0; it must be a finite number of seconds above 0"),
        ({"commit_timeout_s": float("inf")}, "commit_timeout_s is inf"),
        ({"commit_timeout_s": "9"}, "commit_timeout_s is '9'"),
        ({"connect_timeout_s": True}, "connect_timeout_s is True"),
        ({"logdir": ""}, "logdir is ''; it must be absent or not empty"),
        ({"logdir": 3}, "logdir is 3; it must be a path"),
        ({"logdirs": "a"}, "logdirs is 'a'; it must be a list of different paths"),
        ({"logdirs": ["a", "a"]}, "it must be a list of different paths"),
        ({"logdirs": ["a", ""]}, "it must be a list of different paths"),
        ({"logdirs": ["a"], "logdir": "b"}, "names a server too"),
        ({"commit": "some"}, "commit is 'some'; it must be one of all, available"),
        ({"snapshot": "cpu"}, "snapshot is 'cpu'; it must be one of host, gpu"),
        (
            {"compare_replicas": "off"},
            "compare_replicas is 'off'; it must be one of first, always, never",
        ),
        ({"http_url": "host:8000"}, "http_url is 'host:8000'; it must be a URL"),
        ({"conect_timeout_s": 1}, r"no conect_timeout_s \(did you mean connect_timeout_s\?\)"),
        ({"checksums": False}, "every bucket is always compared"),
    ],
)
def test_a_value_that_cannot_be_is_named(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BridgeConfig(**values)


@pytest.mark.parametrize("name", SERVER_DECIDES)
def test_what_the_server_decides_is_not_pretended(name: str) -> None:
    with pytest.raises(ConfigError, match=f"pass {SERVER_DECIDES[name]} to python -m bridge.launch serve"):
        BridgeConfig(**{name: 1})


def test_secrets_stay_out_of_logs() -> None:
    config = BridgeConfig(api_key="hunter2")
    assert "hunter2" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        BridgeConfig(api_key=["hunter2"])
    assert "hunter2" not in str(caught.value)


def test_a_config_is_frozen_and_decodes_strictly() -> None:
    with pytest.raises(AttributeError):
        BridgeConfig().logdir = "x"
    with pytest.raises(ConfigError, match="keywords only"):
        BridgeConfig("x")
    assert msgspec.convert({"logdir": "x"}, BridgeConfig) == BridgeConfig(logdir="x")
    with pytest.raises(msgspec.ValidationError, match="nope"):
        msgspec.convert({"nope": 1}, BridgeConfig)


# --- the earlier bridge's keywords -----------------------------------------------------------------------


def test_earlier_keywords_say_what_they_are_now(caplog: pytest.LogCaptureFixture) -> None:
    config = BridgeConfig(
        trainer_rank=0, world_size=2, init_method="env://", num_inference_nodes=0, model_name="m",
        device="cuda", timeout_seconds=300.0, log_dir="logs", vllm_api_url="http://localhost:9001",
        num_gpus_per_node=8,
    )  # fmt: skip
    assert config == BridgeConfig(logdir="logs", connect_timeout_s=300.0, http_url="http://localhost:9001")
    said = " ".join(record.message for record in caplog.records)
    for part in ("log_dir", "timeout_seconds", "vllm_api_url", "device: each parameter says where it is"):
        assert part in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_method": "tcp://h:1"}, "init_method is 'tcp://h:1'"),
        ({"num_inference_nodes": -1}, r"call notify_update\(model\)"),
        ({"log_dir": "a", "logdir": "b"}, "the same setting"),
        ({"log_dir": "a", "nope": 1}, "no nope"),
    ],
)
def test_earlier_keywords_that_cannot_be_honoured(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BridgeConfig(**values)


def test_from_a_training_config(monkeypatch: pytest.MonkeyPatch) -> None:
    training = SimpleNamespace(model_name="m", device="cuda", vllm_port=9001, lr=1e-5)
    assert BridgeConfig.from_training_config(training) == BridgeConfig(http_url="http://localhost:9001")


# --- variables -------------------------------------------------------------------------------------------


def test_every_field_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.VARIABLES.keys() == set(BridgeConfig.__struct_fields__)
    for names in environment.VARIABLES.values():
        monkeypatch.setenv(names[0], "7" if names[0].endswith("_S") else "http://x")
    monkeypatch.delenv("BRIDGE_LOGDIRS")
    monkeypatch.setenv("BRIDGE_COMMIT", "available")
    monkeypatch.setenv("BRIDGE_SNAPSHOT", "gpu")
    monkeypatch.setenv("BRIDGE_COMPARE_REPLICAS", "always")
    monkeypatch.setenv("BRIDGE_VERSIONS_AFTER", "12")
    config = environment.bridge_config()
    assert config.versions_after == 12
    assert config.connect_timeout_s == config.stage_timeout_s == 7.0
    assert (config.commit, config.snapshot, config.compare_replicas) == ("available", "gpu", "always")
    assert config.api_key == config.http_url == config.config_path == "http://x"


def test_several_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = BridgeConfig(logdirs=[tmp_path, "b:1"], commit="available")
    assert config.logdirs == (str(tmp_path), "b:1")
    first, second = config.servers()
    assert (first.mapping_path(), second.mapping_path()) == (
        tmp_path / CONFIG_NAME,
        Path("b:1") / CONFIG_NAME,
    )
    assert first.commit == "available"
    with pytest.raises(ConfigError, match="one server at a time, and logdirs names 2"):
        config.mapping_path()
    one = BridgeConfig(logdir="a")
    assert one.servers() == (one,)
    assert BridgeConfig(logdirs=["a"]).mapping_path() == one.mapping_path()
    assert BridgeConfig(logdirs=["a"]).update_path() == one.update_path()
    monkeypatch.setenv("LOGDIR", "/runs/own")
    monkeypatch.setenv("BRIDGE_LOGDIRS", os.pathsep.join(("/runs/a", "/runs/b")))
    assert [c.logdir for c in environment.bridge_config().servers()] == ["/runs/a", "/runs/b"]
    assert environment.bridge_config(BridgeConfig(logdir="/mine")).logdirs == ()


def test_the_earlier_logdir_is_mentioned_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGDIR", "/runs/a")
    for _ in range(2):
        assert environment.bridge_config().mapping_path() == Path("/runs/a") / CONFIG_NAME
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "LOGDIR is the earlier bridge's variable; use BRIDGE_LOGDIR"
    ]
    monkeypatch.setenv("BRIDGE_LOGDIR", "/runs/b")
    assert environment.bridge_config().logdir == "/runs/b"


def test_what_was_configured_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_CONFIG", "/env.json")
    monkeypatch.setenv("BRIDGE_COMMIT_TIMEOUT_S", "9")
    config = environment.bridge_config(BridgeConfig(logdir="/mine"))
    assert config.mapping_path() == Path("/mine") / CONFIG_NAME
    assert config.commit_timeout_s == 9.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BRIDGE_CONNECT_TIMEOUT_S", "soon", "BRIDGE_CONNECT_TIMEOUT_S is 'soon'; it must be a number"),
        ("BRIDGE_CONNECT_TIMEOUT_S", "-1", "connect_timeout_s from BRIDGE_CONNECT_TIMEOUT_S"),
        ("BRIDGE_HTTP_URL", "host", "http_url from BRIDGE_HTTP_URL"),
        ("NUM_INFERENCE_NODES", "many", "NUM_INFERENCE_NODES is 'many'; it must be a whole number"),
    ],
)
def test_a_variable_that_cannot_be_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        environment.bridge_config()


def test_broadcasts_switched_off_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.check_enabled()
    monkeypatch.setenv("VLLM_ENABLE_SHARED_WEIGHTS", "1")
    environment.check_enabled()
    monkeypatch.setenv("VLLM_ENABLE_SHARED_WEIGHTS", "0")
    with pytest.raises(ConfigError, match="VLLM_ENABLE_SHARED_WEIGHTS=0 switches weight broadcasts off"):
        environment.check_enabled()
    monkeypatch.delenv("VLLM_ENABLE_SHARED_WEIGHTS")
    monkeypatch.setenv("NUM_INFERENCE_NODES", "-1")
    with pytest.raises(ConfigError, match="notify_update"):
        environment.check_enabled()


# --- ranks and nodes -------------------------------------------------------------------------------------


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.ranks() == environment.Ranks(rank=0, world_size=1, local_rank=0)
    # In a batch script, without srun, the job's size is not this process's.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert environment.ranks().world_size == 1


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_several_processes_must_have_met(monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]) -> None:
    monkeypatch.setenv(names[0], "1")
    monkeypatch.setenv(names[1], "2")
    assert environment.declared_ranks().rank == 1
    with pytest.raises(TopologyError, match=r"rank 1 of 2 .*init_process_group"):
        environment.ranks()
    monkeypatch.setenv(names[0], "2")
    with pytest.raises(TopologyError, match=f"{names[0]} is 2, but {names[1]} is 2"):
        environment.declared_ranks()


def test_an_initialised_group_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert environment.ranks() == environment.Ranks(rank=0, world_size=1, local_rank=3)
        with pytest.raises(ConfigError, match=r"trainer_rank is 4, but torch.distributed calls .* rank 0"):
            BridgeConfig(trainer_rank=4)
    finally:
        dist.destroy_process_group()


def test_the_last_nodes_run_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.inference_hosts() == ()
    monkeypatch.setenv("NUM_INFERENCE_NODES", "0")
    assert environment.bridge_config().http_url == "http://localhost:8000"
    monkeypatch.setenv("NUM_INFERENCE_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-4]")
    assert environment.inference_hosts() == ("gpu3", "gpu4")
    assert environment.bridge_config().http_url == "http://gpu3:8000"
    monkeypatch.setenv("BRIDGE_HTTP_URL", "https://other")
    assert environment.bridge_config().http_url == "https://other"
    monkeypatch.setenv("NUM_INFERENCE_NODES", "4")
    with pytest.raises(TopologyError, match=r"has 4 node\(s\), and the trainer needs one"):
        environment.inference_hosts()
