"""What this trainer rank holds of each tensor the server wants: model in, boxes out. Nothing is gathered.

A box is (offset, shape) in the whole tensor. A DTensor (FSDP2, HSDP, tensor parallel, any mesh) is the box
its placements give; ZeRO-3's runs are several (``zero3``); plain tensors are whole, unless a layout is
declared (``declared``). What cannot be said so is refused by name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.distributed.tensor.placement_types import Shard as ShardPlacement
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bridge import zero3
from bridge.declared import DeclaredLayout
from bridge.errors import MappingError, TransferError
from bridge.names import Named, by_name
from bridge.protocol.holders import CASTS
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.mapping import Source, Vocabulary
from bridge.protocol.plan import Layout, Shard

_EXAMPLES = 3
_EVENT_POLL_S = 0.0002

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LocalShards:
    """This rank's part of one broadcast.

    ``tensors`` are contiguous and aligned with ``layout.shards``; whoever reads them switches gradients off.
    They share the parameters' memory, except where ``contiguous`` is False: there the parameter was not
    contiguous, and the tensor is a copy taken when the shards were collected. ``owners`` are the parameters.
    ``computed`` are events on the collecting streams, one for each GPU: the values are there once they have
    passed. ``lasting`` is False where an owner's memory is no guide to a later broadcast's (ZeRO-3).
    """

    layout: Layout
    tensors: list[torch.Tensor] = field(repr=False)
    contiguous: tuple[bool, ...] = field(repr=False)
    owners: list[torch.Tensor] = field(default_factory=list, repr=False)
    computed: tuple[torch.cuda.Event, ...] = field(default=(), repr=False)
    lasting: bool = True

    def wait_computed(self, *, timeout_s: float) -> None:
        """Wait until the GPU has computed the values, as of when the shards were collected.

        Raises:
            TransferError: it has not within ``timeout_s``.
        """
        deadline, pause = time.monotonic() + timeout_s, threading.Event()
        while not all(event.query() for event in self.computed):  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise TransferError(
                    f"the GPU has not computed the weights within {timeout_s:g} s of the broadcast: what was "
                    "queued before it is stuck (a collective that waits for another rank?)"
                )
            pause.wait(_EVENT_POLL_S)

    def release(self) -> None:
        """Let go of the memory."""
        self.tensors.clear()
        self.owners.clear()

    def fingerprint(self) -> list[tuple[int, int]]:
        """Address and bytes of each tensor; it changes when a shard has moved."""
        return [(t.data_ptr(), t.numel() * t.element_size()) for t in self.tensors]


# --- boxes -------------------------------------------------------------------------------------------------


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part: the shard of a DTensor, else the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # else to_local would record a redistribution of gradients
        return tensor.to_local()


class _Boxes:
    """Boxes of tensors, those of DTensors by their geometry: layers repeat, so few are ever worked out."""

    def __init__(self, layout: DeclaredLayout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._known: dict[tuple[object, ...], Box | str | None] = {}

    def of(self, source: Source, tensor: torch.Tensor, local: torch.Tensor) -> Box | str | None:
        """The box that ``local`` is; None if this rank holds nothing; a string is why it is not one box."""
        if not isinstance(tensor, DTensor):
            return self._layout.box(source.name, source.shape, local.shape, rank=self._rank)
        key = (tuple(tensor.shape), id(tensor.device_mesh), tensor.placements)
        if key not in self._known:
            coordinate = tensor.device_mesh.get_coordinate()
            sizes = tuple(tensor.device_mesh.shape)
            self._known[key] = _box(tuple(tensor.shape), tensor.placements, sizes, coordinate)
        box = self._known[key]
        if isinstance(box, tuple) and box[1] != tuple(local.shape):
            return f"holds a local shard of shape {tuple(local.shape)}, but its placements give {box[1]}"
        if box is None and local.numel():
            return f"holds {local.numel()} elements, although its placements give this rank none"
        return box

    def shape_fault(self, source: Source, tensor: torch.Tensor) -> str:
        """How the shape of a tensor, or of a declared part, differs from its source's; or ""."""
        shape = zero3.full_shape(tensor)
        if isinstance(tensor, DTensor) or zero3.is_partitioned(tensor):
            fault = f"the model's has shape {shape}, the server's {source.shape}"
            return "" if shape == source.shape else fault
        box = self._layout.box(source.name, source.shape, shape, rank=self._rank)
        return box if isinstance(box, str) else ""


def _box(
    shape: tuple[int, ...],
    placements: Sequence[Placement],
    mesh_sizes: Sequence[int],
    coordinate: Sequence[int] | None,
) -> Box | str | None:
    """Cut index ranges by torch's own rules and see what is left at ``coordinate``."""
    if coordinate is None:  # this rank is not in the mesh
        return None
    ranges: dict[int, torch.Tensor] = {}
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not isinstance(placement, (ShardPlacement, _StridedShard)):
            return f"is placed as {placement}, which leaves no rank with its values; redistribute it first"
        dim = placement.dim
        whole = ranges.get(dim, torch.arange(shape[dim]).reshape([1] * dim + [-1]))
        parts, _ = placement._split_tensor(whole, mesh_sizes[mesh_dim], with_padding=False, contiguous=False)
        ranges[dim] = parts[coordinate[mesh_dim]]
    offset, extent = [0] * len(shape), list(shape)
    for dim, kept in ranges.items():
        extent[dim] = kept.numel()
        if kept.numel() == 0:
            return None
        offset[dim] = int(kept.flatten()[0])
        if int(kept.flatten()[-1]) - offset[dim] + 1 != extent[dim]:
            return (
                f"is placed as {tuple(placements)}, which on this rank is not one box along dimension {dim}"
            )
    return tuple(offset), tuple(extent)


def _tensor_fault(tensor: torch.Tensor, local: torch.Tensor) -> str:
    """Why the memory of a tensor is not that of its values, or ""."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return "is not initialised yet; run a forward pass first"
    if hasattr(local, "__tensor_flatten__"):
        return f"is a {type(local).__name__}, which wraps other tensors; dequantise or wait for it first"
    if local.is_meta:
        return "is on the meta device and has no values; materialise the model first"
    if local.layout is not torch.strided:
        return f"is stored as {local.layout}; make it dense first"
    if local.device.type not in ("cpu", "cuda"):
        return f"is on {local.device}; the bridge sends from host memory and from CUDA devices"
    return ""


# --- collecting --------------------------------------------------------------------------------------------


def collect(
    named: Named, mapping: MappingDocument, *, rank: int, layout: DeclaredLayout | None = None
) -> LocalShards:
    """Find this rank's shard of every tensor the server wants.

    Args:
        named: the model, or its tensors by name (whole ones, DTensors, or the parts that ``layout`` says).
        mapping: what the server wants.
        rank: this trainer rank.
        layout: what plain tensors are parts of; None if they are whole.

    Returns:
        The shards under the vocabulary that knows most of the model's names; sources of which this rank holds
        nothing are left out.

    Raises:
        MappingError: the model does not fit; lists every fault found on this rank.
    """
    try:
        tensors = by_name(named)
    except MappingError as err:
        raise _faulty([str(err)], mapping, rank) from err
    vocabulary = max(mapping.vocabularies, key=lambda v: sum(s.name in tensors for s in v.sources))
    known = {source.name for source in vocabulary.sources}
    if not known & tensors.keys():
        raise _faulty([_strangers(tensors, vocabulary)], mapping, rank)
    unused = frozenset(vocabulary.unused)
    wanted = [(i, s) for i, s in enumerate(vocabulary.sources) if s.name not in unused]
    faults = [
        f"{s.name}: the server needs it, the model has no such parameter"
        for _, s in wanted
        if s.name not in tensors
    ]
    # A tied parameter's other name (a tied lm_head is in no checkpoint) is no stranger.
    sent = {id(tensors[s.name]) for _, s in wanted if s.name in tensors}
    faults += [
        f"{name}: the model has it, the server knows no such parameter"
        for name, tensor in tensors.items()
        if name not in known and name not in unused and id(tensor) not in sent
    ]
    layout = layout or DeclaredLayout()
    faults += layout.strangers(tensors)
    present = [(i, s, tensors[s.name]) for i, s in wanted if s.name in tensors]
    return _shards(present, mapping, vocabulary, rank, layout, faults)


def collect_single(
    name: str,
    tensor: torch.Tensor,
    mapping: MappingDocument,
    *,
    rank: int,
    layout: DeclaredLayout | None = None,
) -> LocalShards:
    """As ``collect``, for one tensor by its name in the mapping.

    Raises:
        MappingError: no vocabulary knows the name, or the tensor does not fit.
    """
    ((name, tensor),) = by_name({name: tensor}).items()
    homes = [(v, i, s) for v in mapping.vocabularies for i, s in enumerate(v.sources) if s.name == name]
    if not homes:
        sizes = ", ".join(f"{len(v.sources)} {v.name} names" for v in mapping.vocabularies)
        raise _faulty([f"{name}: the server knows no such parameter among {sizes}"], mapping, rank)
    # Both vocabularies may know the name, but for tensors of different shape.
    layout = layout or DeclaredLayout()
    boxes = _Boxes(layout, rank)
    fits = (home for home in homes if not boxes.shape_fault(home[2], tensor))
    vocabulary, index, source = next(fits, homes[0])
    faults = [f"{name}: the server's loader drops it, so sending it changes nothing"]
    dropped = name in vocabulary.unused
    present = [(index, source, tensor)]
    return _shards(present, mapping, vocabulary, rank, layout, faults if dropped else [])


def _shards(
    present: Sequence[tuple[int, Source, torch.Tensor]],
    mapping: MappingDocument,
    vocabulary: Vocabulary,
    rank: int,
    layout: DeclaredLayout,
    faults: list[str],
) -> LocalShards:
    targets = _target_dtypes(mapping, vocabulary.name)
    boxes, shards, locals_, contiguous, owners, lasting = _Boxes(layout, rank), [], [], [], [], True
    for index, source, tensor in present:
        lasting = lasting and not zero3.is_partitioned(tensor)
        held = _held(source, tensor, targets.get(index, {}), boxes)
        head_dim = layout.permuted(source.name, source.shape)
        faults += [f"{source.name}: {fault}" for fault in (held, head_dim) if isinstance(fault, str)]
        if isinstance(held, str) or isinstance(head_dim, str):
            continue
        for (offset, shape), local in held:
            dtype = _dtype_name(tensor)
            shards.append(Shard(source=index, offset=offset, shape=shape, dtype=dtype, head_dim=head_dim))
            contiguous.append(local.is_contiguous())
            locals_.append(local.detach().contiguous())
            owners.append(tensor)
    if faults:
        raise _faulty(faults, mapping, rank, vocabulary)
    found = Layout(rank=rank, vocabulary=vocabulary.name, shards=tuple(shards))
    return LocalShards(found, locals_, tuple(contiguous), owners, mark_computed(locals_), lasting)


def _held(
    source: Source, tensor: torch.Tensor, targets: Mapping[str, str], boxes: _Boxes
) -> list[tuple[Box, torch.Tensor]] | str:
    """What this rank holds of one tensor, box by box; a string is why that cannot be said."""
    if zero3.is_partitioned(tensor):
        return boxes.shape_fault(source, tensor) or _dtype_fault(tensor, targets) or zero3.parts(tensor)
    local = local_tensor(tensor)
    fault = _tensor_fault(tensor, local) or boxes.shape_fault(source, tensor) or _dtype_fault(tensor, targets)
    box = fault or boxes.of(source, tensor, local)
    if isinstance(box, str):
        return box
    return [] if box is None or 0 in box[1] else [(box, local)]


def mark_computed(tensors: Sequence[torch.Tensor]) -> tuple[torch.cuda.Event, ...]:
    """An event on the current stream of every GPU that holds a shard."""
    events = []
    for device in {tensor.get_device() for tensor in tensors} - {-1}:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return tuple(events)


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The GPU that this rank's part of ``tensors`` is on; None if all of it is in host memory."""
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def current_gpu() -> torch.device | None:
    """The current GPU of a process that has begun to use one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device())
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype_fault(tensor: torch.Tensor, targets: Mapping[str, str]) -> str:
    """How a tensor differs from its targets in dtype, or ""."""
    dtype = _dtype_name(tensor)
    for target, name in targets.items():
        if target != dtype and (dtype, target) not in CASTS:
            return f"the model's is {dtype}, which is not cast to the server's {target} ({name})"
    return ""


def _target_dtypes(mapping: MappingDocument, vocabulary: str) -> dict[int, dict[str, str]]:
    """Per source the dtypes it is written to, each with the name of a target that has it."""
    key = (mapping.digest, vocabulary)
    if mapping.digest and key in _dtypes_of:
        return _dtypes_of[key]
    found: dict[int, dict[str, str]] = {}
    for rank_map in mapping.ranks:
        for write in rank_map.writes.get(vocabulary, ()):
            target = rank_map.targets[write.target]
            found.setdefault(write.source, {}).setdefault(target.dtype, target.name)
    if mapping.digest:
        _dtypes_of.clear()  # one server at a time
        _dtypes_of[key] = found
    return found


_dtypes_of: dict[tuple[str, str], dict[int, dict[str, str]]] = {}


def _strangers(tensors: Mapping[str, torch.Tensor], vocabulary: Vocabulary) -> str:
    theirs = ", ".join(source.name for source in vocabulary.sources[:_EXAMPLES])
    ours = ", ".join(list(tensors)[:_EXAMPLES]) or "none at all"
    return f"no parameter of the model has a name the server knows: it has {ours}, .. and not {theirs}, .."


def _faulty(
    faults: Sequence[str], mapping: MappingDocument, rank: int, vocabulary: Vocabulary | None = None
) -> MappingError:
    names = "" if vocabulary is None else f" by its {vocabulary.name} names"
    omitted = "".join(
        f"\n  (the {name} names are not available: {reason})"
        for name, reason in mapping.omitted_vocabularies.items()
    )
    listing = "\n  ".join(faults)
    return MappingError(
        f"{len(faults)} fault(s) between trainer rank {rank}'s model and the server's {mapping.model!r}"
        f"{names}:\n  {listing}{omitted}\nNothing was sent, and the server keeps its weights. Train the "
        "model that is served (same architecture, sizes and tied embeddings), and pass the whole of it and "
        "no more, such as the policy without a value head."
    )
