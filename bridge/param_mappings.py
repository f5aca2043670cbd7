"""The trainer's own layout as the earlier bridge's JSON, for tools that still read it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bridge import environment, zero3
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names
from bridge.protocol.mapping import CONFIG_NAME, ParamMapping, write_atomically
from bridge.sharding import local_tensor


class TrainerLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The earlier document. The server's mapping file is a superset, so it can be read as one too."""

    model: str
    tp_degree: int = 1
    dp_shard_degree: int = 1
    param_mappings: dict[str, ParamMapping]


def export_param_mappings(
    model: nn.Module,
    model_name: str,
    tp_degree: int = 1,
    dp_shard_degree: int = 1,
    log_dir: str | os.PathLike[str] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    tp_shard_dim: Mapping[str, int] | None = None,
    needs_permute: Collection[str] = (),
) -> Path:
    """Write what this rank holds of each parameter; the first five arguments are the earlier bridge's.

    The server does not need this file: it makes its own mapping. Rank 0 writes, the others only check.

    Args:
        model: plain, DDP, FSDP2 or tensor parallel.
        model_name: what the document calls it.
        tp_degree: tensor-parallel ranks of the trainer.
        dp_shard_degree: ranks over which parameters are sharded besides.
        log_dir: where to write ``vllm_bridge_config.json``; default LOGDIR.
        path: the file itself, instead of ``log_dir``.
        tp_shard_dim: by parameter name, the dimension that tensor parallelism splits. DTensors on a mesh
            with a dimension called "tp" say so themselves.
        needs_permute: names of parameters whose rotary halves the reader must interleave.

    Returns:
        Where the document is.

    Raises:
        ConfigError: a name, a dimension or a degree does not fit the model; or the file is a server's.
    """
    place = _place(path, log_dir)
    named = canonical_names(model)
    dims = {name: dim for name, tensor in named.items() if (dim := _tp_dim(tensor)) is not None}
    dims |= tp_shard_dim or {}
    if faults := _faults(named, model_name, tp_degree, dp_shard_degree, dims, needs_permute):
        listing = "\n  ".join(faults)
        raise ConfigError(f"cannot export the layout of {model_name!r}, {len(faults)} fault(s):\n  {listing}")
    rows = {
        name: ParamMapping(
            vllm_name=name,
            shape=zero3.full_shape(tensor),
            local_shape=tuple(local_tensor(tensor).shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            tp_shard_dim=dims.get(name),
            needs_permute=name in needs_permute,
        )
        for name, tensor in named.items()
    }
    layout = TrainerLayout(
        model=model_name, tp_degree=tp_degree, dp_shard_degree=dp_shard_degree, param_mappings=rows
    )
    if (environment.initialised_ranks() or environment.declared_ranks()).rank == 0:
        _refuse_servers_file(place)
        write_atomically(place, msgspec.json.format(msgspec.json.encode(layout)) + b"\n")
    return place


def load_param_mappings(path: str | os.PathLike[str]) -> TrainerLayout:
    """Read such a document, or the same part of a server's.

    Raises:
        MappingError: it is missing, truncated or of another shape.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=TrainerLayout)
    except OSError as err:
        raise MappingError(f"cannot read the exported layout {path}: {err.strerror}") from err
    except msgspec.DecodeError as err:
        raise MappingError(f"{path} is not an exported layout: {err}; export it again") from err


def _place(path: str | os.PathLike[str] | None, log_dir: str | os.PathLike[str] | None) -> Path:
    if path is not None and log_dir is not None:
        raise ConfigError(f"path={os.fspath(path)!r} and log_dir={os.fspath(log_dir)!r} exclude each other")
    if path is not None:
        place = Path(path)
    else:
        folder = log_dir if log_dir is not None else environment.bridge_config().logdir
        if folder is None:
            raise ConfigError("nowhere to write: pass path or log_dir, or set BRIDGE_LOGDIR or LOGDIR")
        place = Path(folder) / CONFIG_NAME
    if not place.parent.is_dir():
        raise ConfigError(f"cannot write {place}: {place.parent} is not a directory")
    return place


def _refuse_servers_file(place: Path) -> None:
    """A server's mapping carries its rendezvous; replacing it would cut every trainer off."""
    if not place.exists():
        return
    try:
        found = msgspec.json.decode(place.read_bytes())
    except msgspec.DecodeError:
        return  # not a mapping, so nobody's to protect
    if isinstance(found, dict) and "rendezvous" in found:
        raise ConfigError(f"{place} is a server's mapping, which trainers need; pass another path")


def _tp_dim(tensor: torch.Tensor) -> int | None:
    if not isinstance(tensor, DTensor):
        return None
    names = tensor.device_mesh.mesh_dim_names or ()
    if "tp" not in names:
        return None
    placement = tensor.placements[names.index("tp")]
    return placement.dim if hasattr(placement, "dim") else None


def _faults(
    named: Mapping[str, torch.Tensor],
    model_name: str,
    tp_degree: int,
    dp_shard_degree: int,
    dims: Mapping[str, int],
    needs_permute: Collection[str],
) -> list[str]:
    faults = []
    if not isinstance(model_name, str) or not model_name:
        faults.append(f"model_name is {model_name!r}, it must be a name; the file goes into path=")
    for what, degree in (("tp_degree", tp_degree), ("dp_shard_degree", dp_shard_degree)):
        if degree < 1:
            faults.append(f"{what} is {degree}, the least is 1")
    faults += [f"{n}: not a parameter of the model" for n in [*dims, *needs_permute] if n not in named]
    faults += [
        f"{name}: tp_shard_dim is {dim}, but its shape is {tuple(named[name].shape)}"
        for name, dim in dims.items()
        if name in named and not 0 <= dim < named[name].ndim
    ]
    return faults
