"""The trainer's own layout as the earlier bridge's JSON, for its tools and for broadcasts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bridge import declared, environment, zero3
from bridge.declared import DeclaredLayout
from bridge.errors import ConfigError, MappingError
from bridge.names import canonical_names
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import CONFIG_NAME, ParamMapping, write_atomically
from bridge.sharding import local_tensor


class TrainerLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The earlier document, and the rows of a head. The server's mapping file can be read as one too."""

    model: str
    tp_degree: int = 1
    dp_shard_degree: int = 1
    head_dim: int | None = None
    param_mappings: dict[str, ParamMapping]

    def declared(self) -> DeclaredLayout:
        """What a broadcast takes as ``layout``.

        Raises:
            ConfigError: somebody edited the document, and no trainer can have this layout.
        """
        rows = self.param_mappings.items()
        return DeclaredLayout(
            tp_degree=self.tp_degree,
            dp_shard_degree=self.dp_shard_degree,
            tp_shard_dim={name: row.tp_shard_dim for name, row in rows if row.tp_shard_dim is not None},
            needs_permute=[name for name, row in rows if row.needs_permute],
            head_dim=self.head_dim,
        )


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
    head_dim: int | None = None,
) -> Path:
    """Write what this rank holds of each parameter; the first five arguments are the earlier bridge's.

    The server does not need this file: it makes its own mapping. A trainer that shards by hand may read it
    again, ``layout=load_param_mappings(path).declared()``. Rank 0 writes, the others only check.

    ``shape`` is the whole tensor's, as far as one rank can know: of a plain tensor that is split by hand,
    equal tensor-parallel parts are counted together, and the rows that ``dp_shard`` gave others are not.

    Args:
        model: plain, DDP, FSDP2, ZeRO-3 or tensor parallel; or split by hand, as a ``DeclaredLayout`` says.
        model_name: what the document calls it.
        tp_degree: tensor-parallel ranks of the trainer.
        dp_shard_degree: ranks over which parameters are sharded besides.
        log_dir: where to write ``vllm_bridge_config.json``; default LOGDIR.
        path: the file itself, instead of ``log_dir``.
        tp_shard_dim: by parameter name, the dimension that tensor parallelism splits. DTensors on a mesh
            with a dimension called "tp" say so themselves.
        needs_permute: names of parameters in Meta's rotary order; see ``DeclaredLayout``.
        head_dim: rows of a head, for ``needs_permute``.

    Returns:
        Where the document is.

    Raises:
        ConfigError: a name, a dimension or a degree does not fit the model; or the file is a server's.
    """
    place = _place(path, log_dir)
    named = canonical_names(model)
    dims = {name: dim for name, tensor in named.items() if (dim := _tp_dim(tensor)) is not None}
    dims |= tp_shard_dim or {}
    faults = _faults(named, model_name, dims, needs_permute)
    faults += declared.find_faults(
        tp_degree=tp_degree,
        dp_shard_degree=dp_shard_degree,
        tp_shard_dim=dims,
        needs_permute=needs_permute,
        head_dim=head_dim,
    )
    if faults:
        listing = "\n  ".join(faults)
        raise ConfigError(f"cannot export the layout of {model_name!r}, {len(faults)} fault(s):\n  {listing}")
    rows = {
        name: ParamMapping(
            vllm_name=name,
            shape=_whole_shape(tensor, dims.get(name), tp_degree),
            local_shape=tuple(local_tensor(tensor).shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            tp_shard_dim=dims.get(name),
            needs_permute=name in needs_permute,
        )
        for name, tensor in named.items()
    }
    layout = TrainerLayout(
        model=model_name,
        tp_degree=tp_degree,
        dp_shard_degree=dp_shard_degree,
        head_dim=head_dim,
        param_mappings=rows,
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
    except UNREADABLE as err:
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
    except UNREADABLE:
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
    dims: Mapping[str, int],
    needs_permute: Collection[str],
) -> list[str]:
    faults = []
    if not isinstance(model_name, str) or not model_name:
        faults.append(f"model_name is {model_name!r}, it must be a name; the file goes into path=")
    faults += [f"{n}: not a parameter of the model" for n in [*dims, *needs_permute] if n not in named]
    shapes = {name: zero3.full_shape(tensor) for name, tensor in named.items()}
    faults += [
        f"{name}: tp_shard_dim is {dim}, but its shape is {shapes[name]}"
        for name, dim in dims.items()
        if name in named and dim >= len(shapes[name])
    ]
    faults += [
        f"{name}: needs_permute is for one or two dimensions, but its shape is {shapes[name]}"
        for name in needs_permute
        if name in named and len(shapes[name]) not in (1, 2)
    ]
    return faults


def _whole_shape(tensor: torch.Tensor, dim: int | None, tp_degree: int) -> tuple[int, ...]:
    """A tensor's own, unless it is a plain one that is a part of equal parts."""
    shape = list(zero3.full_shape(tensor))
    if dim is not None and not isinstance(tensor, DTensor) and not zero3.is_partitioned(tensor):
        shape[dim] *= tp_degree
    return tuple(shape)
