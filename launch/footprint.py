"""How much memory a model's weights will take, from its files alone; no torch, nothing is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bridge.errors import ConfigError
from bridge.protocol.mapping import ITEMSIZE

_SAFETENSORS_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # vLLM's short forms
_MAX_HEADER_BYTES = 100 << 20
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Footprint:
    """One copy of the weights, in bytes, and where the figure comes from."""

    weight_bytes: int
    origin: str


def find_model(model: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The model's directory on this host, or None if vLLM will have to download it.

    Raises:
        ConfigError: it looks like a path, and nothing is there.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"the model {model!r} is a path, but there is no such directory")
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = sorted(
        (hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json"),
        key=lambda config: config.stat().st_mtime,
    )
    return snapshots[-1].parent if snapshots else None


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror}; is this a model's directory?") from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{path} is not JSON: {err}") from err
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def estimate(directory: Path, *, dtype: str, load_format: str) -> Footprint:
    """One copy of the weights as vLLM will hold them.

    Args:
        directory: the model's files.
        dtype: vLLM's --dtype; "auto" means the config's.
        load_format: vLLM's --load-format; "dummy" reads no file.

    Raises:
        ConfigError: config.json or a weight file cannot be read.
    """
    config = read_config(directory)
    wanted = config.get("dtype") or config.get("torch_dtype") if dtype == "auto" else dtype
    itemsize = ITEMSIZE.get(_DTYPE_ALIASES.get(str(wanted), str(wanted)))
    files = [] if load_format == "dummy" else sorted(directory.glob("*.safetensors"))
    if files:
        total = sum(_tensor_bytes(path, itemsize) for path in files)
        return Footprint(total, f"{len(files)} safetensors file(s)")
    others = [] if load_format == "dummy" else [*directory.glob("*.bin"), *directory.glob("*.pt")]
    if others:
        return Footprint(sum(path.stat().st_size for path in others), f"{len(others)} weight file(s)")
    try:
        parameters = _parameters(config)
    except (AttributeError, TypeError, ValueError, OverflowError) as err:
        raise ConfigError(f"{directory / 'config.json'} has shapes that are no numbers: {err}") from err
    return Footprint(parameters * (itemsize or 2), "the shapes in config.json, roughly")


def _tensor_bytes(path: Path, itemsize: int | None) -> int:
    """Bytes of a safetensors file's tensors, floats counted in the dtype they are loaded as."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total = 0
        for entry in header.values():
            size = (
                itemsize if itemsize and entry["dtype"] in _FLOATS else _SAFETENSORS_ITEMSIZE[entry["dtype"]]
            )
            total += math.prod(entry["shape"]) * size
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as err:
        raise ConfigError(f"{path} is not a whole safetensors file: {err}") from err
    return total


def _parameters(config: dict[str, Any]) -> int:
    """Number of parameters of a transformer of these shapes: attention, MLP or experts, embeddings."""
    text = config.get("text_config", config)
    hidden, vocab = int(text.get("hidden_size", 0)), int(text.get("vocab_size", 0))
    layers = int(text.get("num_hidden_layers", 0))
    heads = int(text.get("num_attention_heads", 1))
    head_dim = int(text.get("head_dim") or hidden // max(heads, 1))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    experts = int(
        text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 0
    )
    inner = int(
        (text.get("moe_intermediate_size") if experts else None) or text.get("intermediate_size") or 0
    )
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * inner * max(experts, 1))


def available_memory(cgroup_root: Path = CGROUP_ROOT) -> tuple[int, str]:
    """Bytes this process's tree can still use, and which limit says so: the host's memory or a cgroup's."""
    best, origin = psutil.virtual_memory().available, "free on this host"
    for group in _cgroups(cgroup_root):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no memory controller at this level
        if limit == "max":
            continue
        # The page cache is given back under pressure, so it is not really used.
        free = max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
        if free < best:
            best, origin = free, f"left of the {int(limit):,} bytes of cgroup {group}"
    return best, origin


def _cgroups(root: Path) -> list[Path]:
    """This process's cgroup and its parents; each of them may carry a limit (cgroup v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    leaf = root / path.lstrip("/")
    return [group for group in (leaf, *leaf.parents) if group == root or root in group.parents]
