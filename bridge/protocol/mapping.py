"""The exported parameter mapping: which byte of a checkpoint lands where on which inference rank.

One JSON document, ``vllm_bridge_config.json``, written once by the daemon when every vLLM worker has
published its memory, and read by every trainer rank. It is the whole contract between the two sides: a
trainer needs neither vLLM nor the checkpoint to know what to send.

All offsets and strides are counted in elements, except ``Target.offset`` and ``RankMap.arena_bytes``,
which are bytes. dtypes are torch's names without the prefix ("bfloat16").
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypeVar

import blake3
import msgspec

from bridge.errors import MappingError
from bridge.protocol.decoding import UNREADABLE

T = TypeVar("T")

FORMAT_VERSION = 1
CONFIG_NAME = "vllm_bridge_config.json"
ADAPTER = "adapter:"  # begins the name of a vocabulary that is one served LoRA adapter's
ADAPTER_FLAG = "sent"  # the source in it whose one element is 1 once an adapter has been sent

ITEMSIZE = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A whole tensor under the name the trainer knows it by: contiguous, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A live tensor of one inference rank, at a fixed place in that rank's arena.

    ``shape`` and ``stride`` describe the tensor that the loader writes to. Where ``transform`` is set,
    vLLM reads another layout: bytes are gathered in a scratch tensor of this shape, and the named
    transform writes the ``nbytes`` at ``offset``.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    transform: str = ""
    aliases: tuple[str, ...] = ()


class Write(msgspec.Struct, frozen=True, kw_only=True):
    """One copy that the model's own loader performed, as a pair of affine views of equal ``size``.

    ``src_*`` address the flat source tensor, ``dst_*`` the target relative to its first element.
    """

    source: int
    target: int
    size: tuple[int, ...]
    src_offset: int
    src_stride: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """One set of names a trainer may use, and what vLLM's loader does with it.

    ``checkpoint`` holds the names in the checkpoint's files; ``transformers`` those of the model in
    memory, which differ where transformers fuses tensors (experts, since version 5). ``adapter:NAME`` holds
    the matrices of the LoRA adapter that is served as NAME, at the highest rank that the server takes.
    ``unused`` are names vLLM's loader accepts and drops. ``tied`` says of some of them which source they are
    another name of: a trainer must not hold two different tensors there.
    """

    name: str
    sources: tuple[Source, ...]
    unused: tuple[str, ...] = ()
    tied: dict[str, str] = {}

    @property
    def adapter(self) -> str:
        """The served adapter whose matrices these are; "" for names of the model itself."""
        return self.name.removeprefix(ADAPTER) if self.name.startswith(ADAPTER) else ""


class RankMap(msgspec.Struct, frozen=True, kw_only=True):
    """What one inference rank holds, and the writes that fill it, per vocabulary name."""

    rank: int
    arena_bytes: int
    targets: tuple[Target, ...]
    writes: dict[str, tuple[Write, ...]]


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """Where trainers find the daemon's TCPStore, and the secret that admits them.

    ``launch`` is new with each launch of the server: a version's number means nothing in another.
    """

    host: str
    port: int
    secret: str
    launch: str = ""


class ParamMapping(msgspec.Struct, frozen=True, kw_only=True):
    """The older bridge's row for one parameter; kept readable and written for its users."""

    vllm_name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: str
    tp_shard_dim: int | None = None
    needs_permute: bool = False


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """The document. ``digest`` covers everything but ``rendezvous``, ``run_dir`` and itself."""

    format_version: int = FORMAT_VERSION
    model: str
    vllm_version: str
    dtype: str
    tp_degree: int
    dp_shard_degree: int = 1
    num_inference_ranks: int
    vocabularies: tuple[Vocabulary, ...]
    ranks: tuple[RankMap, ...]
    param_mappings: dict[str, ParamMapping]
    omitted_vocabularies: dict[str, str] = {}
    digest: str = ""
    rendezvous: Rendezvous | None = None
    run_dir: str = ""

    @property
    def of_the_model(self) -> tuple[Vocabulary, ...]:
        """The vocabularies that a model's own weights may be sent by."""
        return tuple(vocabulary for vocabulary in self.vocabularies if not vocabulary.adapter)

    @property
    def adapters(self) -> dict[str, Vocabulary]:
        """By the served name, the adapters that may be sent."""
        return {vocabulary.adapter: vocabulary for vocabulary in self.vocabularies if vocabulary.adapter}

    def vocabulary(self, name: str) -> Vocabulary:
        for vocabulary in self.vocabularies:
            if vocabulary.name == name:
                return vocabulary
        known = ", ".join(v.name for v in self.vocabularies)
        raise MappingError(f"mapping of {self.model!r} has no vocabulary {name!r}; it has: {known}")


def worked_out(mapping: Mapping, what: tuple[str, ...], work_out: Callable[[], T]) -> T:
    """``what`` follows from a mapping's contents alone: worked out once, and kept with the last few.

    A mapping without a digest is not told from others, so nothing of it is kept.
    """
    if not mapping.digest:
        return work_out()
    key = (mapping.digest, *what)
    if key not in _worked_out:
        if len(_worked_out) >= _MOST_KEPT:
            del _worked_out[next(iter(_worked_out))]
        _worked_out[key] = work_out()
    found: T = _worked_out[key]
    return found


_worked_out: dict[tuple[str, ...], Any] = {}
_MOST_KEPT = 32  # a few for each server of a fleet


def matching(
    mapping: Mapping, names: Container[str], fits: Callable[[Source], bool]
) -> tuple[Vocabulary, list[str]]:
    """The vocabulary that tensors of the model are sent by.

    Args:
        mapping: of the server.
        names: of the tensors.
        fits: whether the tensor of a source's name has its shape.

    Returns:
        The one that knows most of the names, of several the one that knows most of those by shape; and a
        fault for each name that another fits as well, and sends elsewhere.
    """
    scores = []
    for contested in _contested(mapping):
        known = [source for source in contested if source.name in names]
        scores.append((len(known), sum(map(fits, known))))
    best = max(scores)
    first, *others = (v for v, score in zip(mapping.of_the_model, scores, strict=True) if score == best)
    return first, [
        f"{name}: the server takes it by its {first.name} and by its {other.name} names, in one shape and in "
        "different order, so nobody can tell which is meant; hand more of the model over with it, of which "
        "they differ in names or shapes"
        for other in others
        for name in _differing(mapping, first, other)
        if name in names
    ]


def _contested(mapping: Mapping) -> list[list[Source]]:
    """By vocabulary of the model, the sources that some other does not have in their shape."""

    def find() -> list[list[Source]]:
        listed = [{(source.name, source.shape) for source in v.sources} for v in mapping.of_the_model]
        common = set.intersection(*listed)
        return [[s for s in v.sources if (s.name, s.shape) not in common] for v in mapping.of_the_model]

    return worked_out(mapping, ("contested",), find)


def _differing(mapping: Mapping, one: Vocabulary, other: Vocabulary) -> tuple[str, ...]:
    """Sources of one name and shape that two vocabularies write to different places."""

    def find() -> tuple[str, ...]:
        shapes = {source.name: source.shape for source in other.sources}
        ours, theirs = _places(mapping, one), _places(mapping, other)
        return tuple(
            source.name
            for source in one.sources
            if shapes.get(source.name) == source.shape and ours.get(source.name) != theirs.get(source.name)
        )

    return worked_out(mapping, ("differing", one.name, other.name), find)


def _places(mapping: Mapping, vocabulary: Vocabulary) -> dict[str, set[tuple[int, Write]]]:
    """Where each source goes: its writes by inference rank, without its number."""
    places: dict[str, set[tuple[int, Write]]] = {}
    for rank in mapping.ranks:
        for write in rank.writes.get(vocabulary.name, ()):
            place = rank.rank, msgspec.structs.replace(write, source=0)
            places.setdefault(vocabulary.sources[write.source].name, set()).add(place)
    return places


def compute_digest(mapping: Mapping) -> str:
    """blake3 (hex, 256 bits) over the canonical encoding of what must agree on both sides."""
    body = msgspec.structs.replace(mapping, digest="", rendezvous=None, run_dir="")
    return blake3.blake3(msgspec.msgpack.encode(body)).hexdigest()


def find_faults(mapping: Mapping) -> list[str]:
    """All internal contradictions of a decoded document, each as a sentence."""
    faults: list[str] = []
    if mapping.format_version != FORMAT_VERSION:
        faults.append(f"format_version is {mapping.format_version}, this bridge reads {FORMAT_VERSION}")
    if not mapping.of_the_model:
        faults.append("there is no vocabulary, so no parameter could ever be sent")
    if sorted(r.rank for r in mapping.ranks) != list(range(mapping.num_inference_ranks)):
        faults.append(
            f"num_inference_ranks is {mapping.num_inference_ranks}, but the ranks listed are "
            f"{sorted(r.rank for r in mapping.ranks)}"
        )
    sources = {v.name: v.sources for v in mapping.vocabularies}
    for vocabulary in mapping.vocabularies:
        faults += [
            f"{vocabulary.name}: source {source.name} has shape {source.shape} and dtype {source.dtype!r}"
            for source in vocabulary.sources
            if min(source.shape, default=0) < 0 or source.dtype not in ITEMSIZE
        ]
    for rank in mapping.ranks:
        faults += rank_faults(rank, sources)
    if mapping.digest and mapping.digest != (actual := compute_digest(mapping)):
        faults.append(f"digest is {mapping.digest[:16]}.., but the content hashes to {actual[:16]}..")
    return faults


def rank_faults(rank: RankMap, sources: dict[str, tuple[Source, ...]]) -> list[str]:
    """Contradictions of one rank's part, each as a sentence; ``sources`` by vocabulary."""
    faults: list[str] = []
    where = f"rank {rank.rank}"
    for target in rank.targets:
        if target.dtype not in ITEMSIZE:
            faults.append(f"{where}: {target.name} has unknown dtype {target.dtype!r}")
        if min(*target.shape, *target.stride, target.nbytes, 0) < 0:
            faults.append(f"{where}: {target.name} has a negative size or stride")
        if target.offset < 0 or target.offset + target.nbytes > rank.arena_bytes:
            faults.append(f"{where}: {target.name} ends beyond the arena of {rank.arena_bytes} bytes")
    for vocabulary, writes in rank.writes.items():
        if vocabulary not in sources:
            faults.append(f"{where}: has writes for the unknown vocabulary {vocabulary!r}")
            continue
        for write in writes:
            faults += _write_faults(f"{where}, {vocabulary}", write, sources[vocabulary], rank)
    return faults


def _write_faults(where: str, write: Write, sources: tuple[Source, ...], rank: RankMap) -> list[str]:
    targets = rank.targets
    if not 0 <= write.source < len(sources):
        return [f"{where}: a write names source {write.source} of {len(sources)}"]
    if not 0 <= write.target < len(targets):
        return [f"{where}: a write names target {write.target} of {len(targets)}"]
    if not len(write.size) == len(write.src_stride) == len(write.dst_stride):
        return [f"{where}: a write to {targets[write.target].name} has strides of another rank than its size"]
    if min(*write.size, *write.src_stride, *write.dst_stride, 0) < 0:
        return [f"{where}: a write to {targets[write.target].name} has a negative size or stride"]
    last = write.src_offset + sum((n - 1) * s for n, s in zip(write.size, write.src_stride, strict=True))
    source = sources[write.source]
    if write.numel and not 0 <= write.src_offset <= last < source.numel:
        return [f"{where}: a write reads element {last} of {source.name}, which has {source.numel}"]
    return _landing_faults(where, write, targets[write.target], rank.arena_bytes)


def _landing_faults(where: str, write: Write, target: Target, arena_bytes: int) -> list[str]:
    """Targets may be views of one storage, so the arena's end is the only bound; scratch has its own."""
    if not write.numel or target.dtype not in ITEMSIZE:
        return []
    room = (arena_bytes - target.offset) // ITEMSIZE[target.dtype]
    if target.transform:
        room = math.prod(target.shape)
    last = write.dst_offset + sum((n - 1) * s for n, s in zip(write.size, write.dst_stride, strict=True))
    if not 0 <= write.dst_offset <= last < room or write.numel > room:
        return [f"{where}: a write of {write.numel} elements to {target.name} ends at {last} of {room}"]
    return []


def encode(mapping: Mapping) -> bytes:
    """The document as JSON, with its digest filled in."""
    return msgspec.json.encode(msgspec.structs.replace(mapping, digest=compute_digest(mapping)))


def decode(data: bytes, *, origin: str) -> Mapping:
    """Parse and check a document.

    Args:
        data: the JSON bytes.
        origin: where they came from, for the error message.

    Raises:
        MappingError: truncated, of another schema, or contradicting itself; lists every fault.
    """
    try:
        mapping = msgspec.json.decode(data, type=Mapping)
    except UNREADABLE as err:
        raise MappingError(
            f"{origin} is not a bridge mapping: {err} ({len(data)} bytes); it may be truncated or from "
            'another version; restart the server, or run "python -m bridge.launch export-mapping"'
        ) from err
    if not mapping.digest:
        raise MappingError(f"{origin} carries no digest, so nobody can tell whether it is whole")
    if faults := find_faults(mapping):
        listing = "\n  ".join(faults)
        raise MappingError(f"{origin} contradicts itself in {len(faults)} place(s):\n  {listing}")
    return mapping


def load(path: Path) -> Mapping:
    """Read and check a mapping file.

    Raises:
        MappingError: the file is missing, unreadable, truncated or contradicts itself.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise MappingError(
            f"cannot read the mapping {path}: {err.strerror}; is the server ready, and is its --logdir "
            "visible on this host? (LOGDIR or BRIDGE_CONFIG name it)"
        ) from err
    return decode(data, origin=str(path))


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace ``path`` by ``data`` so that a reader sees the old file or the new, never a part.

    Unless ``durable`` that holds while this host runs, whoever dies on it, and nobody waits for a disk.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(fd, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def schema() -> dict[str, Any]:
    """JSON schema of the document, for docs and other readers."""
    return msgspec.json.schema(Mapping)
