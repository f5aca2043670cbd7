"""What cannot work is refused by name: a typed error for a trainer, a non-zero exit of the launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from torch import nn

import bridge
from bridge.errors import MappingError, RendezvousError, RendezvousRefused, TopologyError
from bridge.protocol import mapping as mapping_file
from tests.support.serving import UNBOUND, environment, free_port, serving, wait_until
from vllm_patching.channel import socket_path

pytestmark = [pytest.mark.faults, pytest.mark.serving, pytest.mark.timeout(400)]

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
NOBODY = 65534
SOON_S = 10.0


@pytest.fixture(scope="module")
def node(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A bfloat16 server that must come through all of this unharmed."""
    from safetensors.torch import load_file

    model = checkpoint("qwen3", "bfloat16", 0)
    options = {"flags": ["--dtype=bfloat16"], "env": UNBOUND}
    with serving(model, tmp_path_factory.mktemp("node"), **options) as server:
        tensors = load_file(model / "model.safetensors")
        yield SimpleNamespace(server=server, tensors=tensors, served=server.api.greedy(2), model=model)


@pytest.fixture(autouse=True)
def unharmed(node: SimpleNamespace) -> Iterator[None]:
    """Whatever was tried, the server serves the version it had."""
    yield
    status = node.server.status()
    assert status["state"] == "ready"
    assert status["weight_version"] == 0
    assert node.server.api.greedy(2) == node.served


def module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose parameters have these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()))
    return root


def connect(path: Path) -> bridge.Bridge:
    return bridge.Bridge.connect(bridge.BridgeConfig(config_path=str(path), connect_timeout_s=20.0))


# --- the mapping ---------------------------------------------------------------------------------------


def daemon_says(node: SimpleNamespace, words: str) -> None:
    """Within seconds: whoever is refused may know it before the daemon has said so."""
    log = node.server.logdir / "daemon.log"
    wait_until(f"{words!r} in {log}", lambda: words in log.read_text(), timeout_s=SOON_S)


def test_missing_mapping(tmp_path):
    path = tmp_path / "vllm_bridge_config.json"
    with pytest.raises(RendezvousError, match="there is no mapping at") as caught:
        bridge.Bridge.connect(bridge.BridgeConfig(config_path=str(path), connect_timeout_s=2.0))
    assert str(tmp_path) in str(caught.value)


def test_truncated_mapping(node, tmp_path):
    path = tmp_path / "mapping.json"
    path.write_bytes(node.server.config.read_bytes()[:-100])
    with pytest.raises(MappingError, match=str(path)):
        connect(path)


def test_edited_mapping(node, tmp_path):
    path = tmp_path / "mapping.json"
    document = json.loads(node.server.config.read_text())
    document["ranks"][0]["targets"][0]["offset"] += 64
    path.write_text(json.dumps(document))
    with pytest.raises(MappingError, match="digest"):
        connect(path)


def test_mapping_of_another_model(node, tmp_path):
    mine = mapping_file.load(node.server.config)
    path = tmp_path / "mapping.json"
    path.write_bytes(mapping_file.encode(msgspec.structs.replace(mine, model="another/model")))
    other = mapping_file.load(path)
    assert other.digest != mine.digest
    with pytest.raises(RendezvousRefused) as caught:
        connect(path)
    assert other.digest[:16] in str(caught.value)
    assert mine.digest[:16] in str(caught.value)
    assert str(node.server.config) in str(caught.value)


def test_mapping_of_an_earlier_run(node, tmp_path):
    mine = mapping_file.load(node.server.config)
    assert mine.rendezvous is not None
    path = tmp_path / "mapping.json"
    forged = msgspec.structs.replace(mine.rendezvous, secret="0" * 32)
    path.write_bytes(mapping_file.encode(msgspec.structs.replace(mine, rendezvous=forged)))
    with pytest.raises(bridge.BridgeError):
        bridge.Bridge.connect(bridge.BridgeConfig(config_path=str(path), connect_timeout_s=3.0))
    daemon_says(node, "signed with another job's secret")


def test_a_script_without_a_server_ends_with_a_message(tmp_path):
    script = "import bridge, torch\nbridge.broadcast_weights(torch.nn.Linear(2, 2))\n"
    done = run([sys.executable, "-c", script], LOGDIR=str(tmp_path), BRIDGE_CONNECT_TIMEOUT_S="2")
    assert done.returncode != 0
    assert f"there is no mapping at {tmp_path}/vllm_bridge_config.json: the server is not" in done.stderr


# --- the model -------------------------------------------------------------------------------------------


def test_every_unfit_parameter_is_listed_at_once(node):
    tensors = dict(node.tensors)
    del tensors[NORM]
    tensors[UP] = tensors[UP][:-1]
    tensors[DOWN] = torch.zeros(tensors[DOWN].shape, dtype=torch.int32)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    with connect(node.server.config) as trainer, pytest.raises(MappingError) as caught:
        trainer.broadcast_weights(module_of(tensors))
    said = str(caught.value)
    assert f"{NORM}: the server needs it, the model has no such parameter" in said
    assert f"{UP}: the model's has shape" in said
    assert f"{DOWN}: the model's is int32, which is not cast to the server's bfloat16" in said
    assert "model.layers.7.mlp.up_proj.weight: the model has it, the server knows no such parameter" in said


def test_a_model_of_other_names(node):
    with connect(node.server.config) as trainer, pytest.raises(MappingError, match=r"transformer\.wte"):
        trainer.broadcast_weights(module_of({"transformer.wte.weight": torch.zeros(4, 4)}))


def test_a_single_parameter_that_does_not_fit(node):
    with connect(node.server.config) as trainer:
        with pytest.raises(MappingError, match="knows no such parameter"):
            trainer.broadcast_single_param("no.such.weight", torch.zeros(2))
        with pytest.raises(MappingError, match="has shape"):
            trainer.broadcast_single_param(NORM, torch.zeros(2))


def test_a_version_that_is_served_already(node):
    with connect(node.server.config) as trainer, pytest.raises(bridge.BridgeError, match="version 0"):
        trainer.broadcast_weights(module_of(node.tensors), version=0)


def test_wrong_world_size(node, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TopologyError, match="2"):
        connect(node.server.config)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(TopologyError, match="RANK is 2, but WORLD_SIZE is 2"):
        connect(node.server.config)


# --- the launcher ------------------------------------------------------------------------------------------


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**env), timeout=120, check=False
    )


def serve(
    model: Path, logdir: Path, *flags: str, port: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridge.launch", "serve", "--logdir", str(logdir), *flags]
    return run([*command, "--", str(model), f"--port={port or free_port()}"], **env)


def test_ports_in_use(node, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rendezvous = taken.getsockname()[1]
        done = serve(node.model, tmp_path, f"--rendezvous-port={rendezvous}", port=node.server.port)
    assert done.returncode == 2
    assert f"rendezvous: cannot listen on 127.0.0.1:{rendezvous}: Address already in use" in done.stderr
    assert f"http: cannot listen on 0.0.0.0:{node.server.port}: Address already in use" in done.stderr


def test_a_logdir_in_use(node):
    done = serve(node.model, node.server.logdir)
    assert done.returncode == 2
    assert f"belongs to a running bridge (daemon pid {node.server.status()['pids']['daemon']}" in done.stderr


def test_unsupported_vllm(node, tmp_path):
    metadata = tmp_path / "site" / "vllm-0.99.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.1\n")
    path = os.pathsep.join([str(metadata.parent), environment()["PYTHONPATH"]])
    done = serve(node.model, tmp_path / "logs", PYTHONPATH=path)
    assert done.returncode == 2
    assert "vLLM 0.99.1 is installed; this bridge supports 0.26 to 0.33" in done.stderr


def test_shared_memory_too_small(node, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("a /dev/shm of one's own needs root")
    inner = [sys.executable, "-m", "bridge.launch", "serve", "--logdir", str(tmp_path / "logs"), "--"]
    inner += [str(node.model), f"--port={free_port()}", "--tensor-parallel-size=2"]
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"'
    if run(["unshare", "--mount", "sh", "-c", script, "true"]).returncode != 0:
        pytest.skip("no mount namespaces here")
    done = run(["unshare", "--mount", "sh", "-c", script, *inner])
    assert done.returncode == 2
    assert "shm: 1 MiB free in /dev/shm" in done.stderr


# --- a stranger on the socket -----------------------------------------------------------------------

KNOCK = textwrap.dedent("""
    import os, socket, struct, sys
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # only now: nobody may not read root's Python
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    try:
        sock.connect(sys.argv[1])
    except OSError as err:
        sys.exit(f"connect: {type(err).__name__}")
    body = b'{"type": "status"}'
    try:
        sock.sendall(struct.pack("!I", len(body)) + body)
        answer = sock.recv(1)
    except OSError as err:
        sys.exit(f"talk: {type(err).__name__}")
    sys.exit("talk: closed" if not answer else "talk: answered")
""")


def test_an_unprivileged_stranger_on_the_socket(node, runtime_dir):
    if os.geteuid() != 0:
        pytest.skip("becoming somebody else needs root")
    run_dir = Path(json.loads(node.server.config.read_text())["run_dir"])
    path = socket_path(run_dir)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert node.server.config.stat().st_mode & 0o777 == 0o600  # it has the secret

    def knock() -> str:
        done = run([sys.executable, "-c", KNOCK, str(path)])
        assert done.returncode == 1, done
        return done.stderr.strip()

    assert knock() == "connect: PermissionError"
    modes = {directory: directory.stat().st_mode & 0o777 for directory in (runtime_dir, run_dir, path)}
    try:
        for place in modes:  # somebody was careless: the daemon still asks the kernel who is calling
            place.chmod(0o777)
        assert knock() in ("talk: closed", "talk: ConnectionResetError", "talk: BrokenPipeError")
    finally:
        for place, mode in modes.items():
            place.chmod(mode)
    daemon_says(node, f"of uid {NOBODY} is at the other end")
