"""``check`` against real surroundings: ports, file systems, installations, all found at once."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from launch import footprint, preflight
from launch.options import ServeOptions, read_server_args
from tests.support.serving import free_port

pytestmark = pytest.mark.processes

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def write_safetensors(path: Path, shape: list[int], dtype: str, itemsize: int) -> None:
    size = itemsize
    for n in shape:
        size *= n
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def faults(options: ServeOptions, around: preflight.Surroundings | None = None) -> dict[str, str]:
    found = preflight.inspect(options, around)
    return {f.topic: f.text for f in found if f.level == "fault" and f.topic != "plugin"}


def make_options(tmp_path: Path, model: Path | str, *vllm_args: str, **changes: object) -> ServeOptions:
    args = ("--port", str(free_port()), *vllm_args)
    return ServeOptions(model=str(model), vllm_args=args, logdir=tmp_path / "logs", **changes)


def test_a_good_configuration_has_no_fault(tmp_path, model):
    assert faults(make_options(tmp_path, model)) == {}
    assert not (tmp_path / "logs").exists()  # check changes nothing


def test_everything_wrong_is_said_at_once(tmp_path):
    (tmp_path / "logs").write_text("a file, not a directory")
    open_to_all = tmp_path / "run"
    open_to_all.mkdir(mode=0o755)
    with socket.socket() as http, socket.socket() as rendezvous:
        http.bind(("127.0.0.1", 0))
        http.listen()
        rendezvous.bind(("127.0.0.1", 0))
        rendezvous.listen()
        port = http.getsockname()[1]
        options = ServeOptions(
            model=str(tmp_path / "no-model"),
            vllm_args=("--host", "127.0.0.1", f"--port={port}", "--nnodes", "2"),
            logdir=tmp_path / "logs",
            run_dir=open_to_all,
            rendezvous_port=rendezvous.getsockname()[1],
            deadline_s=1.0,
        )
        around = preflight.Surroundings(environ={"VLLM_ENABLE_SHARED_WEIGHTS": "0"})
        found = preflight.inspect(options, around)
    topics = {f.topic for f in found if f.level == "fault"}
    assert topics >= {"options", "topology", "model", "logdir", "run-dir", "http", "rendezvous"}
    texts = "\n".join(f.text for f in found if f.level == "fault")
    assert f"127.0.0.1:{port}: Address already in use, pid {os.getpid()}" in texts
    assert "VLLM_ENABLE_SHARED_WEIGHTS is 0" in texts
    assert "mode 0755" in texts
    with pytest.raises(ConfigError, match="fault\\(s\\) found before the start"):
        preflight.refuse(found)


def test_socket_path_too_long(tmp_path, model):
    options = make_options(tmp_path, model, run_dir=tmp_path / ("d" * 90))
    assert "Unix sockets allow 99" in faults(options)["run-dir"]


def test_memory_must_hold_the_weights_twice(tmp_path, model):
    write_safetensors(model / "model.safetensors", [1024, 1024], "F32", 4)
    size = footprint.estimate(model, dtype="auto", load_format="auto")
    assert size.weight_bytes == 2 << 20  # the config loads float32 files as bfloat16
    assert footprint.estimate(model, dtype="float32", load_format="auto").weight_bytes == 4 << 20

    limit = 3 << 20
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("0\n")
    (tmp_path / "memory.stat").write_text("anon 0\ninactive_file 0\n")
    around = preflight.Surroundings(cgroup_root=tmp_path, environ={})
    text = faults(make_options(tmp_path, model), around)["memory"]
    assert "2 x 2 MiB of weights (1 safetensors file(s)) = 4 MiB needed, 3 MiB left of the" in text
    assert "--staging in-place" in text
    replicas = make_options(tmp_path, model, "--data-parallel-size=3")
    assert ", for each of 3 engines = 12 MiB needed" in faults(replicas, around)["memory"]
    in_place = preflight.check_model(
        make_options(tmp_path, model, staging="in-place"), read_server_args(()), around
    )
    assert [(f.level, "1 x 2 MiB of weights" in f.text) for f in in_place if f.topic == "memory"] == [
        ("note", True)
    ]


def test_how_halves_change_places_is_not_asked_where_there_is_one(tmp_path, model):
    options = make_options(tmp_path, model, staging="in-place", flip="copy", repair_timeout_s=0.0)
    text = "\n".join(options.faults())
    assert "--flip copy says how two halves change places, and --staging in-place has one" in text
    assert "--repair-timeout is 0, it must be above 0 seconds" in text


def test_damaged_weight_file(tmp_path, model):
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "not a whole safetensors file" in faults(make_options(tmp_path, model))["model"]


def test_parameters_from_the_config_are_about_right():
    # 151936 x 1024 tied, 28 layers of 16 x 128 heads over 1024: Qwen3-0.6B has 596 million.
    shapes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936}
    heads = {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    assert footprint._parameters({**shapes, **heads}) == pytest.approx(596e6, rel=0.01)


def test_shared_memory_too_small(tmp_path, model):
    tiny = tmp_path / "shm"
    tiny.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tiny)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        around = preflight.Surroundings(shm_dir=tiny)
        text = faults(make_options(tmp_path, model, "-tp", "2"), around)["shm"]
    finally:
        subprocess.run(["umount", str(tiny)], check=True)
    # 240 MiB: one queue of answers. 160 of broadcast + 2 x 240 of answers + 24 of the tensor-parallel group.
    assert text.startswith(f"1 MiB free in {tiny}")
    assert "2 rank(s) need 240 MiB to start and up to 664 MiB" in text


def test_message_queue_figures_are_those_of_the_installed_vllm(model):
    """The constants are vLLM's defaults; when vLLM changes them, this fails."""
    import inspect

    from vllm import envs
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    defaults = inspect.signature(MessageQueue.__init__).parameters
    assert defaults["max_chunks"].default == preflight.MQ_CHUNKS
    assert defaults["max_chunk_bytes"].default * preflight.MQ_CHUNKS == preflight.MQ_ANSWER_MIB << 20
    assert envs.VLLM_MQ_MAX_CHUNK_BYTES_MB == preflight.MQ_DEFAULT_CHUNK_MIB
    assert read_server_args(("-tp", "2")).world_size == 2


def test_cuda_build_of_torchvision_beside_a_cpu_torch(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "torchvision").mkdir(parents=True)
    raises = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (site / "torchvision" / "__init__.py").write_text(raises)
    install_metadata(site, "torchvision", "0.28.0")
    install_metadata(site, "torch", "2.13.0+cpu")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    (finding,) = preflight.check_companions()
    assert finding.level == "fault"
    assert "operator torchvision::nms does not exist" in finding.text
    assert 'run "pip uninstall torchvision"' in finding.text


def test_unsupported_vllm(tmp_path, monkeypatch):
    install_metadata(tmp_path, "vllm", "0.99.1")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = preflight.check_vllm()
    assert finding.level == "fault"
    assert "vLLM 0.99.1 is installed; this bridge supports 0.26 to 0.33" in finding.text


@pytest.mark.parametrize(
    ("value", "level", "said"),
    [
        ("vllm_patching.plugin:register", "ok", str(Path(preflight.__file__).parents[1])),
        ("old_bridge.plugin:register", "fault", "remove the stale installation"),
    ],
)
def test_plugin_entry_point(tmp_path, monkeypatch, value, level, said):
    install_metadata(tmp_path, "some-bridge", "0.1")
    (tmp_path / "some-bridge-0.1.dist-info" / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nweight_bridge = {value}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = preflight.check_plugin()
    assert finding.level == level
    assert said in finding.text


def install_metadata(site: Path, name: str, version: str) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
