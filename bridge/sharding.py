"""What this trainer rank holds of each tensor the server wants: model in, boxes out. Nothing is gathered.

A box is (offset, shape) in the whole tensor. A DTensor (FSDP2, HSDP, tensor parallel, any mesh) is the box
its placements give; ZeRO-3's runs are several (``zero3``); plain tensors are whole, unless a layout is
declared (``declared``). What cannot be said so is refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.distributed.tensor.placement_types import Shard as ShardPlacement
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bridge import unsharded, zero3
from bridge.declared import DeclaredLayout
from bridge.errors import MappingError, TransferError
from bridge.guard import WriteCounts
from bridge.names import canonical_names, without_wrappers
from bridge.patches import PatchShare
from bridge.protocol.holders import CASTS
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.mapping import Source, Vocabulary, matching, worked_out
from bridge.protocol.plan import Layout, Shard
from bridge.wire.transport import mark_enqueued

_EXAMPLES = 3
_EVENT_POLL_S = 0.0002
_MOST_PIECES = 64  # of one DTensor on one rank
_MOST_PARTS = 1024  # of a piece with gaps; one with more is copied

Box = tuple[tuple[int, ...], tuple[int, ...]]
Named = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class LocalShards:
    """This rank's part of one broadcast.

    ``tensors`` are contiguous and aligned with ``layout.shards``; whoever reads them switches gradients off.
    They share the parameters' memory, except where ``contiguous`` is False: there the parameter was not
    contiguous, and the tensor is a copy taken when the shards were collected. ``owners`` are the parameters.
    ``computed`` are events on the collecting streams, one for each GPU: the values are there once they have
    passed. ``lasting`` is False where an owner's memory is no guide to a later broadcast's (ZeRO-3, DTensors
    in pieces).
    ``partial`` is True where the server needs more, which stays as it is. ``counts`` are of writes in place
    to the owners; None if copies are sent. ``comparable`` is False where each rank has worked the values out
    for this round, and may have rounded them in its own way.
    """

    layout: Layout
    tensors: list[torch.Tensor] = field(repr=False)
    contiguous: tuple[bool, ...] = field(repr=False)
    owners: list[torch.Tensor] = field(default_factory=list, repr=False)
    computed: tuple[torch.cuda.Event, ...] = field(default=(), repr=False)
    lasting: bool = True
    partial: bool = False
    comparable: bool = True
    counts: WriteCounts | None = field(default=None, repr=False)

    def check_unwritten(self, mapping: MappingDocument, what: str) -> None:
        """See that nobody has written to the weights since they were collected.

        Raises:
            TransferError: somebody has; says to which, and ``what`` that means.
        """
        if self.counts is None:
            return
        sources = mapping.vocabulary(self.layout.vocabulary).sources
        written = {
            sources[self.layout.shards[at].source].name
            for at in self.counts.written()
            if self.contiguous[at]  # else it is a copy that is read
        }
        if written:
            names = ", ".join(sorted(written)[:_EXAMPLES]) + (", .." if len(written) > _EXAMPLES else "")
            raise TransferError(
                f"{len(written)} weight(s) were written in place while they were read ({names}), so {what}. "
                "Only optimizer steps and load_state_dict wait by themselves: call wait_released() before "
                "other writes (averages, copies from masters), or pass blocking=True; then send again"
            )

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
        if self.counts is not None:
            self.counts.forget()

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
    """Pieces of DTensors by their geometry: layers repeat, so few are ever worked out."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[_Piece] | str] = {}

    def of(self, tensor: torch.Tensor, local: torch.Tensor) -> list[_Piece] | str:
        """What ``local`` is of ``tensor``; a string is why that cannot be said."""
        if not isinstance(tensor, DTensor):
            box = (0,) * tensor.ndim, tuple(tensor.shape)
            return [_Piece(box, box)]
        key = (tuple(tensor.shape), id(tensor.device_mesh), tensor.placements)
        if key not in self._known:
            mesh, placements = tensor.device_mesh, tensor.placements
            self._known[key] = _mesh_fault(mesh, placements) or _pieces(
                tuple(tensor.shape), placements, tuple(mesh.shape), _place_in(mesh)
            )
        pieces = self._known[key]
        if isinstance(pieces, str):
            return pieces
        if not pieces and local.numel():
            return f"holds {local.numel()} elements, although its placements give this rank none"
        if pieces and (extent := tuple(map(sum, zip(*pieces[-1].within, strict=True)))) != tuple(local.shape):
            return f"holds a local shard of shape {tuple(local.shape)}, but its placements give {extent}"
        return pieces


def _place_in(mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Which shard is this rank's, along each dimension of the mesh; None if it is not in it.

    As collectives count, by which shards are made and gathered. torch sorts a group's ranks, so where those
    of a mesh do not ascend its coordinates are others.
    """
    if mesh.get_coordinate() is None:
        return None
    return tuple(mesh.get_local_rank(dim) for dim in range(mesh.ndim))


def _mesh_fault(mesh: DeviceMesh, placements: Sequence[Placement]) -> str:
    """Why shards that are cut along several dimensions of the mesh are in no one order, or ""."""
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    for dim in cut if len(cut) > 1 else ():
        places = mesh.mesh.argsort(dim).argsort(dim).movedim(dim, 0).flatten(1)  # a column for each group
        if not places.eq(places[:, :1]).all():  # torch then scatters it otherwise than FSDP2 cuts it
            return (
                f"is cut along several dimensions of the mesh {mesh.mesh.tolist()}, whose groups along "
                f"dimension {dim} sort their ranks differently; make the mesh of ascending ranks"
            )
    return ""


@dataclass(frozen=True)
class _Piece:
    """A box of the whole tensor, and the box of the local shard that holds it."""

    box: Box
    within: Box


def _pieces(
    shape: tuple[int, ...],
    placements: Sequence[Placement],
    mesh_sizes: Sequence[int],
    place: Sequence[int] | None,
) -> list[_Piece] | str:
    """Cut index ranges by torch's own rules, and see which runs of them are left at ``place`` in the mesh.

    As a rule one; where several tensors are packed in one and each is cut (transformers' packed_colwise), one
    run of each.
    """
    if place is None:  # this rank is not in the mesh
        return []
    ranges: dict[int, torch.Tensor] = {}
    strided: set[int] = set()
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not isinstance(placement, (ShardPlacement, _StridedShard)):
            return f"is placed as {placement}, which leaves no rank with its values; redistribute it first"
        dim = placement.dim % len(shape)  # torch leaves a strided one's negative
        if isinstance(placement, _StridedShard):
            if dim in strided:  # as FSDP2 over packed rows; torch's own full_tensor() mixes them then
                return (
                    f"is placed as {tuple(placements)}, which cuts dimension {dim} twice in strides and does "
                    "not say in which order; cut another one (shard_placement_fn of fully_shard)"
                )
            strided.add(dim)
        alone = [-1 if d == dim else 1 for d in range(len(shape))]
        whole = ranges.get(dim, torch.arange(shape[dim], device="cpu").reshape(alone))
        parts, _ = placement._split_tensor(whole, mesh_sizes[mesh_dim], with_padding=False, contiguous=False)
        ranges[dim] = parts[place[mesh_dim]]
    runs = [[(0, 0, extent)] for extent in shape]
    for dim, kept in ranges.items():
        runs[dim] = _runs(kept.flatten().tolist())
    if (count := math.prod(map(len, runs))) > _MOST_PIECES:
        return f"is placed as {tuple(placements)}, here {count} pieces; redistribute it first"
    return [
        _Piece(
            (tuple(start for start, _, _ in one), tuple(extent for *_, extent in one)),
            (tuple(at for _, at, _ in one), tuple(extent for *_, extent in one)),
        )
        for one in itertools.product(*runs)
    ]


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive ones: where each run starts, at which place among ``indices``, and how long it is."""
    starts = [at for at, index in enumerate(indices) if at == 0 or index != indices[at - 1] + 1]
    ends = [*starts[1:], len(indices)] if starts else []
    return [(indices[at], at, end - at) for at, end in zip(starts, ends, strict=True)]


def _parts(piece: _Piece, local: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """The piece as memory without gaps: as few boxes as that needs; one with gaps if too many."""
    view = local[tuple(slice(at, at + extent) for at, extent in zip(*piece.within, strict=True))]
    rows = 0  # leading dimensions that are taken one by one
    while rows < view.ndim and not view[(0,) * rows].is_contiguous():
        rows += 1
    if (count := math.prod(view.shape[:rows])) == 1 or count > _MOST_PARTS:
        yield piece.box, view
        return
    offset, extent = piece.box
    for index in itertools.product(*map(range, view.shape[:rows])):
        first = tuple(start + i for start, i in zip(offset, index, strict=False))
        box = (*first, *offset[rows:]), (*(1,) * rows, *extent[rows:])
        yield box, view[tuple(slice(i, i + 1) for i in index)]


def _tensor_fault(tensor: torch.Tensor, local: torch.Tensor) -> str:
    """Why the memory of a tensor is not that of its values, or ""."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return "is not initialised yet; run a forward pass first"
    if hasattr(local, "__tensor_flatten__"):
        return f"is a {type(local).__name__}, which wraps other tensors; dequantise or wait for it first"
    if local.is_meta:
        return "is on the meta device and has no values; materialise the model first"
    if isinstance(local, FakeTensor):
        return "is a FakeTensor and has no values; make the model outside FakeTensorMode"
    if local.layout is not torch.strided:
        return f"is stored as {local.layout}; make it dense first"
    if local.device.type not in ("cpu", "cuda"):
        return f"is on {local.device}; the bridge sends from host memory and from CUDA devices"
    if local.is_neg():  # what copies negate, and what reads memory does not
        return "is a view whose memory holds the opposite of its values; hand its resolve_neg() over"
    if local._is_zerotensor():
        return "is a zero tensor of autograd's, which has no memory; hand its clone() over"
    last = local.storage_offset() + sum((n - 1) * s for n, s in zip(local.shape, local.stride(), strict=True))
    if local.numel() and (last + 1) * local.element_size() > local.untyped_storage().nbytes():
        return "has no memory any more; whoever gathered it has let it go"
    return ""


@dataclass(frozen=True)
class Part:
    """What this rank holds of one tensor: boxes, each with the memory it lies in.

    ``shape`` is the whole tensor's, ``fault`` is why the rest cannot be said, or "". ``owner`` is the tensor
    itself, None where the memory is a copy. Of a ``patch`` shape and boxes are known once it has a place.
    """

    shape: tuple[int, ...] = ()
    dtype: str = ""
    boxes: Sequence[tuple[Box, torch.Tensor]] = ()
    fault: str = ""
    owner: torch.Tensor | None = None
    patch: PatchShare | None = None


def part_of(
    tensor: torch.Tensor, boxes: _Boxes | None = None, *, copies: frozenset[int] = frozenset()
) -> Part:
    """What this rank holds of ``tensor``; ``boxes`` remembers geometries from one call to the next.

    ``copies`` is where memory starts that does not hold the parameters themselves (``unsharded``).
    """
    if unsharded.is_copy(tensor, copies):
        return Part(fault=unsharded.FAULT)
    partitioned = zero3.is_partitioned(tensor)
    held = zero3.parts(tensor) if partitioned else _held(tensor, boxes or _Boxes())
    if isinstance(held, str):
        return Part(fault=held)
    return Part(zero3.full_shape(tensor), _dtype_name(tensor), held, owner=tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` does not say which part of a parameter it is."""
    return not isinstance(tensor, DTensor) and not zero3.is_partitioned(tensor)


def place(part: Part, source: Source, layout: DeclaredLayout | None, *, rank: int) -> Part:
    """``part`` with its boxes of ``source``: plain tensors need ``layout`` for that, others know them."""
    if part.patch is not None:
        boxes = part.patch.boxes(source.shape)
        return (
            Part(fault=boxes)
            if isinstance(boxes, str)
            else dataclasses.replace(part, shape=source.shape, boxes=boxes)
        )
    if layout is None or part.owner is None or not is_plain(part.owner):
        return part
    box = layout.box(source.name, source.shape, part.shape, rank=rank)
    if isinstance(box, str):
        return Part(fault=box)
    return dataclasses.replace(part, shape=source.shape, boxes=[(box, local) for _, local in part.boxes])


def _held(tensor: torch.Tensor, boxes: _Boxes) -> list[tuple[Box, torch.Tensor]] | str:
    local = local_tensor(tensor)
    pieces = _tensor_fault(tensor, local) or boxes.of(tensor, local)
    if isinstance(pieces, str):
        return pieces
    if len(pieces) == 1:
        return [] if 0 in pieces[0].box[1] else [(pieces[0].box, local)]
    return [part for piece in pieces if 0 not in piece.box[1] for part in _parts(piece, local)]


# --- collecting --------------------------------------------------------------------------------------------


def _by_name(named: Named) -> dict[str, torch.Tensor]:
    if isinstance(named, nn.Module):
        return canonical_names(named)
    items = list(named.items() if isinstance(named, Mapping) else named)
    names = without_wrappers(name for name, _ in items)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise MappingError(
            f"several tensors have one name without wrappers: {', '.join(twice)}; which is meant?"
        )
    return {name: tensor for name, (_, tensor) in zip(names, items, strict=True)}


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
        The shards under the vocabulary that fits the model best; sources of which this rank holds nothing
        are left out.

    Raises:
        MappingError: the model does not fit; lists every fault found on this rank.
    """
    try:
        tensors = _by_name(named)
    except MappingError as err:
        raise faulty([str(err)], mapping, rank) from err
    boxes = _Boxes()
    copies = frozenset[int]() if isinstance(named, nn.Module) else unsharded.memory()
    theirs = {source.name for v in mapping.of_the_model for source in v.sources}
    parts = {name: part_of(tensors[name], boxes, copies=copies) for name in tensors if name in theirs}
    vocabulary, faults = match(parts, mapping, layout, rank=rank)
    known = {source.name for source in vocabulary.sources}
    if not known & tensors.keys():
        raise faulty([_strangers(tensors, vocabulary)], mapping, rank)
    unused = frozenset(vocabulary.unused)
    wanted = [(i, s) for i, s in enumerate(vocabulary.sources) if s.name not in unused]
    faults += [
        f"{s.name}: the server needs it, the model {_lacks(s.name, tensors)}"
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
    # Of a model the same shards are sent round after round, whatever becomes of the values.
    faults += untied(tensors, vocabulary, by_value=not isinstance(named, nn.Module))
    faults += layout.strangers(tensors) if layout else []
    present = [(i, s, parts[s.name]) for i, s in wanted if s.name in parts]
    return make_shards(present, mapping, vocabulary, rank, faults, layout)


def match(
    parts: Mapping[str, Part], mapping: MappingDocument, layout: DeclaredLayout | None, *, rank: int
) -> tuple[Vocabulary, list[str]]:
    """The vocabulary that the parts fit best, and a fault for each that fits another as well."""

    def fits(source: Source) -> bool:
        part = parts[source.name]
        if layout is not None or part.patch is not None:  # else it is placed already
            part = place(part, source, layout, rank=rank)
        return part.shape == source.shape

    return matching(mapping, parts, fits)


def untied(tensors: Mapping[str, torch.Tensor], vocabulary: Vocabulary, *, by_value: bool) -> list[str]:
    """Faults of tensors that are two here and one on the server, which would drop one of them.

    ``by_value``: two of equal values are one too, as copies of tied ones are.
    """
    return [
        f"{name}: the server has no weights of its own there, it is tied to {kept}; here they are two tensors"
        for name, kept in vocabulary.tied.items()
        if name in tensors
        and kept in tensors
        and not _is_one(tensors[name], tensors[kept])
        and not (by_value and _are_equal(tensors[name], tensors[kept]))
    ]


def _held_memory(tensor: torch.Tensor) -> torch.Tensor:
    return zero3.partition(tensor) if zero3.is_partitioned(tensor) else local_tensor(tensor)


def _is_one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors, perhaps of a state dict, are one as far as this rank's memory can tell."""
    nothing = all(_held_memory(tensor).numel() == 0 for tensor in (a, b))
    return nothing or memory_of(a) == memory_of(b)


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether this rank holds the same part of both, with the same values."""
    ours, theirs = _held_memory(a), _held_memory(b)
    return (
        type(a) is type(b)
        and a.shape == b.shape
        and getattr(a, "placements", None) == getattr(b, "placements", None)
        and (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        and torch.equal(ours, theirs)
    )


def memory_of(tensor: torch.Tensor) -> object:
    """Equal for tied tensors: the object, or the memory where a state dict made objects of its own."""
    held = _held_memory(tensor)
    if held.numel() == 0 or held.is_meta:
        return id(tensor)
    return held.data_ptr(), tensor.shape, held.shape, held.stride(), held.dtype


def make_shards(
    present: Sequence[tuple[int, Source, Part]],
    mapping: MappingDocument,
    vocabulary: Vocabulary,
    rank: int,
    faults: list[str],
    declared: DeclaredLayout | None = None,
) -> LocalShards:
    """Shards of the sources that are there, by index in the vocabulary; plain ones as ``declared`` says.

    Raises:
        MappingError: there are ``faults`` already, or a part does not fit; lists them all.
    """
    targets = _target_dtypes(mapping, vocabulary.name)
    shards, locals_, contiguous, owners, lasting = [], [], [], [], True
    for index, source, part in present:
        part = place(part, source, declared, rank=rank)
        head_dim = declared.permuted(source.name, source.shape) if declared else 0
        fit = part.fault or _fit_fault(source, part, targets.get(index, {}))
        if fit or isinstance(head_dim, str):
            found = (fault for fault in (fit, head_dim) if fault and isinstance(fault, str))
            faults += [f"{source.name}: {fault}" for fault in found]
            continue
        lasting = lasting and part.owner is not None and not zero3.is_partitioned(part.owner)
        lasting = lasting and len(part.boxes) < 2
        for box, local in part.boxes:
            shards.append(
                Shard(source=index, offset=box[0], shape=box[1], dtype=part.dtype, head_dim=head_dim)
            )
            contiguous.append(local.is_contiguous())
            locals_.append(local.detach().contiguous())
            if part.owner is not None:
                owners.append(part.owner)
    if faults:
        raise faulty(faults, mapping, rank, vocabulary)
    layout = Layout(rank=rank, vocabulary=vocabulary.name, shards=tuple(shards))
    counts = WriteCounts(owners, locals_) if owners and len(owners) == len(locals_) else None
    computed = mark_enqueued(locals_)
    return LocalShards(layout, locals_, tuple(contiguous), owners, computed, lasting, counts=counts)


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The GPU that this rank's part of ``tensors`` is on; None if all of it is in host memory."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # then none is: no walk to wait for
        return None
    return next((held.device for held in map(_held_memory, tensors) if held.is_cuda), None)


def current_gpu() -> torch.device | None:
    """The current GPU of a process that has begun to use one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device())
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fit_fault(source: Source, part: Part, targets: Mapping[str, str]) -> str:
    """How a tensor differs from its source in shape, or from its targets in dtype; or ""."""
    if part.shape != source.shape:
        return f"the model's has shape {part.shape}, the server's {source.shape}"
    for target, name in targets.items():
        if target != part.dtype and (part.dtype, target) not in CASTS:
            return f"the model's is {part.dtype}, which is not cast to the server's {target} ({name})"
    return ""


def _target_dtypes(mapping: MappingDocument, vocabulary: str) -> dict[int, dict[str, str]]:
    """Per source the dtypes it is written to, each with the name of a target that has it."""

    def find() -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {}
        for rank_map in mapping.ranks:
            for write in rank_map.writes.get(vocabulary, ()):
                target = rank_map.targets[write.target]
                found.setdefault(write.source, {}).setdefault(target.dtype, target.name)
        return found

    return worked_out(mapping, ("dtypes", vocabulary), find)


def _strangers(tensors: Mapping[str, torch.Tensor], vocabulary: Vocabulary) -> str:
    theirs = ", ".join(source.name for source in vocabulary.sources[:_EXAMPLES])
    ours = ", ".join(list(tensors)[:_EXAMPLES]) or "none at all"
    known = f"no parameter of the model has a name the server knows: it has {ours}, .. and not {theirs}, .."
    if "n_averaged" in tensors:
        return f"{known}; it is an AveragedModel around the model: pass its .module"
    computed = [s.name for s in vocabulary.sources if _is_computed(s.name, tensors)]
    return known + "".join(f"\n  {name}: the model {_lacks(name, tensors)}" for name in computed[:_EXAMPLES])


def _is_computed(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether ``torch.nn.utils.parametrize`` works the parameter out of others."""
    layer, _, leaf = name.rpartition(".")
    originals = f"{layer}.parametrizations.{leaf}.original".removeprefix(".")
    return originals in tensors or f"{originals}0" in tensors


def _lacks(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    if not _is_computed(name, tensors):
        return "has no such parameter"
    leaf = name.rpartition(".")[2]
    return (
        "computes it of others (torch.nn.utils.parametrize); pass a copy.deepcopy of the model after "
        f"remove_parametrizations(layer, {leaf!r})"
    )


def faulty(
    faults: Sequence[str], mapping: MappingDocument, rank: int, vocabulary: Vocabulary | None = None
) -> MappingError:
    """The error that lists ``faults`` of this rank's model."""
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
