"""From a freshly loaded model to published memory: trace, compare, move into the arena, verify.

Between vLLM's own ``load_weights`` and its post-processing the model's loader is run once more under a
recorder (``before_processing``). After post-processing every traced tensor is found again (``finish``): still
where it was, in another layout that has a named transform, or not at all, which is an error. Then storages
move into the arena (``rehome``), and the checkpoint is applied through the mapping to the second half and
compared with what vLLM serves, bit by bit: the mapping proves itself before the first update.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from bridge.errors import BridgeError, ConfigError, MappingError
from bridge.protocol.mapping import RankMap, Source, Target, Vocabulary, Write
from vllm_patching import arena as arenas
from vllm_patching import compat, coverage, kept, sources, tracing, verification
from vllm_patching.adapters import Shelving
from vllm_patching.arena import SEGMENT_ALIGNMENT, Arena
from vllm_patching.kept import Held, named_tensors, private_tensors, storage_key
from vllm_patching.verification import digest

logger = logging.getLogger(__name__)

_loaders: list[Any] = []
_pending: list[Loaded] = []


@dataclass
class Place:
    """A traced tensor before post-processing; ``tensor`` keeps its storage alive and its address taken."""

    tensor: torch.Tensor
    digest: bytes


@dataclass
class Loaded:
    """One model between its load and its publication."""

    model: nn.Module
    model_config: Any
    loader: Any
    vocabularies: dict[str, list[Source]] = field(default_factory=dict)
    traces: dict[str, tracing.Trace] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # as transformers ties them; see ``InMemory``
    places: dict[str, Place] = field(default_factory=dict)
    untraced: dict[str, torch.Tensor] = field(default_factory=dict)  # as they were, by name
    private: dict[str, Held] = field(default_factory=dict)  # before the loader ran again, by path


@dataclass(frozen=True)
class Home:
    """Where a traced tensor lives after post-processing, and the transform that leads there, if any."""

    name: str
    live: torch.Tensor
    raw: torch.Tensor
    transform: str


@contextmanager
def remembering(loader: Any) -> Iterator[None]:
    """Note which loader is at work, for ``before_processing``."""
    _loaders.append(loader)
    try:
        yield
    finally:
        _loaders.pop()


def before_processing(model: nn.Module, model_config: Any) -> None:
    """Trace the model's loader under each vocabulary; called before vLLM's post-processing.

    Raises:
        MappingError: no vocabulary could be traced, or one covers the model only in part.
    """
    loaded = Loaded(model=model, model_config=model_config, loader=_loaders[-1] if _loaders else None)
    loaded.private = private_tensors(model)
    start = time.perf_counter()
    lists: dict[str, Callable[[], sources.InMemory]] = {
        "checkpoint": lambda: sources.InMemory(
            tuple(sources.checkpoint_sources(loaded.loader, model_config, model)), as_saved=iter
        ),
        "transformers": lambda: sources.transformers_names(model_config),
    }
    own_load: tracing.Trace | None = None
    for name, list_sources in lists.items():
        try:
            listed = list_sources()
            loaded.tied.update(listed.tied)
            trace = tracing.trace(model, listed.sources, prepare=listed.as_saved)
            own_load = trace if name == "checkpoint" else own_load
            coverage.find_gaps(trace, tracing.live_tensors(model), own_load=own_load).check(name)
        except (BridgeError, OSError, ImportError, ValueError, AttributeError, TypeError) as err:
            loaded.omitted[name] = f"{type(err).__name__}: {err}"
            continue
        loaded.vocabularies[name], loaded.traces[name] = list(listed.sources), trace
    if not loaded.traces:
        listing = "\n  ".join(f"{name}: {why}" for name, why in loaded.omitted.items())
        raise MappingError(f"no set of parameter names of {model_config.model} could be traced:\n  {listing}")
    for name, other in _aliases(model):  # what transformers does not know, or cannot build
        loaded.tied.setdefault(name, other)
    tensors = named_tensors(model)
    for trace in loaded.traces.values():
        for name in {write.target for write in trace.writes} - loaded.places.keys():
            loaded.places[name] = Place(tensors[name].detach(), digest(tensors[name]))
    traced = {storage_key(place.tensor) for place in loaded.places.values()}
    loaded.untraced = {n: t.detach() for n, t in tensors.items() if storage_key(t) not in traced}
    _pending.append(loaded)
    logger.info(
        "traced %s in %.2f s: %s",
        model_config.model,
        time.perf_counter() - start,
        ", ".join(f"{len(t.writes)} writes by {n} names" for n, t in loaded.traces.items()),
    )


def _aliases(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of vLLM's own that are one tensor, either way round."""
    for live in tracing.live_tensors(model):
        yield from itertools.permutations((live.name, *live.aliases), 2)


def finish(model: nn.Module) -> Loaded:
    """The load record of the worker's own model.

    Raises:
        ConfigError: the model was loaded by a path that the bridge has not seen.
    """
    records = [record for record in _pending if record.model is model]
    _pending.clear()
    if not records:
        raise ConfigError(
            "this model was loaded without BaseModelLoader.load_model, so its loader could not be traced; "
            "use --load-format auto, safetensors or dummy"
        )
    return records[-1]


def find_homes(loaded: Loaded) -> list[Home]:
    """Find every traced tensor again after post-processing.

    Raises:
        MappingError: lists every tensor that was repacked, freed or changed in a way nobody can repeat, and
            every one that was derived from weights and has memory of its own.
    """
    tensors = named_tensors(loaded.model)
    alive = {storage_key(t): t for t in tensors.values() if t.numel()}
    homes, faults = [], []
    for name, place in loaded.places.items():
        home = _find_home(loaded.model, name, place, tensors.get(name), alive)
        if isinstance(home, Home):
            homes.append(home)
        else:
            faults.append(home)
    faults += _remade(loaded, tensors, homes)
    faults += _kept_sinks(loaded.model, alive)
    faults += _derived(loaded, alive)
    merged: dict[int, Home] = {}
    for home in homes:
        other = merged.setdefault(home.live.data_ptr(), home)
        if storage_key(other.raw) != storage_key(home.raw):
            faults.append(f"{other.name} and {home.name} were merged into one memory after loading")
    if faults:
        listing = "\n  ".join(faults)
        raise MappingError(
            f"vLLM's post-processing of {loaded.model_config.model} cannot be followed "
            f"({len(faults)} tensor(s)):\n  {listing}"
        )
    return homes


def _remade(loaded: Loaded, tensors: Mapping[str, torch.Tensor], homes: Sequence[Home]) -> list[str]:
    """Parameters and buffers in memory that was not there before post-processing, and that no update reaches.

    A name that was tied to another may have got a copy of its own. What no trace writes may have been cast.
    """
    reached = {storage_key(home.live) for home in homes}
    reached |= {storage_key(place.tensor) for place in loaded.places.values()}
    reached |= {storage_key(tensor) for tensor in loaded.untraced.values()}
    judged = loaded.places.keys() - {home.name for home in homes}
    parameters = {id(parameter) for parameter in loaded.model.parameters()}
    faults = []
    for name, tensor in tensors.items():
        if tensor.numel() < 2 or storage_key(tensor) in reached or name in judged:
            continue
        if id(tensor) not in parameters and (not kept.is_looked_at(tensor) or kept.is_constant(tensor)):
            continue
        before = loaded.untraced.get(name)
        if before is not None and kept.same_values(before, tensor):
            continue
        faults.append(f"{name} {tuple(tensor.shape)} was derived from weights after loading")
    return faults


def _derived(loaded: Loaded, alive: Mapping[int, torch.Tensor]) -> list[str]:
    """What loading made of weights and kept where no update reaches, as openPangu's sinks.

    The loader has run twice, and makes it anew each time; what processing makes is new in any case. A view of
    a parameter follows it, as those of MLA do. Kernels deep in a layer make tables and workspaces of their
    own, which only a copy of a weight can be told from.
    """
    known = {storage_key(one.tensor) for one in loaded.private.values()} | alive.keys()
    weights = named_tensors(loaded.model)
    faults = []
    for path, one in private_tensors(loaded.model).items():
        if not kept.is_looked_at(one.tensor) or storage_key(one.tensor) in known:
            continue
        if not one.near and kept.is_constant(one.tensor):  # as the empty slots of adapters for experts
            continue
        made = f"{path} {tuple(one.tensor.shape)} was made while the model was loaded, and would not follow"
        if one.near or kept.origin_of(one.tensor, weights):
            faults.append(f"{made} its weights")
        else:
            logger.warning("%s its weights, if it is made of them", made)
    return faults


def _kept_sinks(model: nn.Module, alive: Mapping[int, torch.Tensor]) -> list[str]:
    """Attention sinks that a backend has in memory of its own, or will have: updates would not reach them.

    No parameter and no buffer holds such a copy, so nothing else would notice. FlashInfer and b12x make
    theirs after loading, where they need float32; vLLM's CPU backend in the first forward.
    """
    faults = []
    for name, module in model.named_modules():
        sinks = getattr(getattr(module, "impl", None), "sinks", None)
        if not isinstance(sinks, torch.Tensor):
            continue
        what = f"{name}.impl.sinks {tuple(sinks.shape)} {sinks.dtype}"
        if storage_key(sinks) not in alive:
            faults.append(f"{what} is a copy in the attention backend's own memory; choose another backend")
        elif sinks.device.type == "cpu" and sinks.dtype not in (torch.bfloat16, torch.float32):
            faults.append(f"{what} would be copied by the first forward; use --dtype bfloat16 or float32")
    return faults


def _find_home(
    model: nn.Module, name: str, place: Place, now: torch.Tensor | None, alive: dict[int, torch.Tensor]
) -> Home | str:
    old = place.tensor
    if storage_key(old) in alive:
        if digest(old) != place.digest:
            return f"{name} {tuple(old.shape)} was changed in place after loading"
        return Home(name, old, old, "")
    if now is None or not now.numel():
        return f"{name} {tuple(old.shape)} was freed after loading; its kernel reads a private copy"
    owner, _, leaf = name.rpartition(".")
    if transform := compat.moe_transform(model.get_submodule(owner), leaf):
        packed = torch.empty_like(now).flatten()
        compat.run_transform(transform, old, packed)
        if torch.equal(packed.view(torch.uint8), now.detach().contiguous().flatten().view(torch.uint8)):
            return Home(name, now.detach(), old, transform)
        return f"{name}: transform {transform} does not reproduce what vLLM made of it"
    same_layout = now.shape == old.shape and now.stride() == old.stride() and now.dtype == old.dtype
    if same_layout and torch.equal(now, old):
        return Home(name, now.detach(), old, "")
    return f"{name} {tuple(old.shape)} {old.dtype} was repacked to {tuple(now.shape)} {now.dtype}"


def rehome(
    loaded: Loaded, *, rank: int, shelving: Shelving | None = None
) -> tuple[Arena, dict[str, Any], list[list[Target]]]:
    """Move the model's storages into a new arena, verify the mapping, and describe both.

    Args:
        loaded: the model between its load and its publication.
        rank: of this worker among all engines'.
        shelving: of the adapters that may be sent, if there are any.

    Returns:
        The arena; the ``rank_map``, ``vocabularies`` and ``omitted_vocabularies`` as plain data; and the
        targets of each adapter.

    Raises:
        MappingError: see ``find_homes``; or the checkpoint applied through the mapping differs from
            what vLLM loaded.
    """
    homes = find_homes(loaded)
    offsets, end = _lay_out(homes)
    shelves, nbytes = shelving.lay_out(end) if shelving else ([], end)
    arena = arenas.allocate(
        nbytes,
        _device_of(homes),
        staging=arenas.staging(),
        flip=os.environ.get("BRIDGE_FLIP", "auto"),
    )
    targets = [_target(home, offsets) for home in homes]
    _move(homes, offsets, arena)
    names = {home.name: index for index, home in enumerate(homes)}
    rank_map = RankMap(
        rank=rank,
        arena_bytes=nbytes,
        targets=tuple(targets),
        writes={v: _writes(trace, names) for v, trace in loaded.traces.items()},
    )
    loaded.places.clear()
    loaded.untraced.clear()
    loaded.private.clear()
    homes.clear()  # the last holders of what moved
    arena.open_second_half()
    verification.verify(loaded, rank_map, arena)
    if shelving:
        arena.live(end, nbytes - end).zero_()  # nothing was sent yet
        rank_map = _with_shelves(rank_map, shelving, shelves)
    seconds = arena.warm()
    logger.info("rank %d: memory (%s) warm in %.1f s", rank, arena.kind, seconds)
    vocabularies = [
        Vocabulary(
            name=n,
            sources=tuple(s),
            unused=tuple(loaded.traces[n].unused),
            tied=_tied(loaded.tied, s, loaded.traces[n].unused),
        )
        for n, s in loaded.vocabularies.items()
    ]
    vocabularies += shelving.vocabularies() if shelving else []
    description = {
        "rank_map": msgspec.to_builtins(rank_map),
        "vocabularies": msgspec.to_builtins(vocabularies),
        "omitted_vocabularies": loaded.omitted,
    }
    return arena, description, shelves


def _tied(tied: Mapping[str, str], listed: Sequence[Source], unused: Sequence[str]) -> dict[str, str]:
    """Those whose tensor is dropped in favour of the one that it is tied to."""
    names, dropped = {source.name for source in listed}, frozenset(unused)
    return {name: kept for name, kept in tied.items() if name in dropped and kept in names - dropped}


def _with_shelves(rank_map: RankMap, shelving: Shelving, shelves: list[list[Target]]) -> RankMap:
    targets, writes = [*rank_map.targets], dict(rank_map.writes)
    for vocabulary, shelf in zip(shelving.vocabularies(), shelves, strict=True):
        writes[vocabulary.name] = shelving.writes_from(len(targets))
        targets += shelf
    return msgspec.structs.replace(rank_map, targets=tuple(targets), writes=writes)


def _device_of(homes: list[Home]) -> torch.device:
    """The one device that all traced tensors are on.

    Raises:
        ConfigError: there are several (offloading).
    """
    devices = {home.live.device: home.name for home in homes}
    if len(devices) != 1:
        listing = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigError(f"the weights lie on several devices ({listing}); turn vLLM's offloading off")
    return next(iter(devices))


def _lay_out(homes: list[Home]) -> tuple[dict[int, int], int]:
    offsets: dict[int, int] = {}
    end = 0
    for home in homes:
        key = storage_key(home.live)
        if key not in offsets:
            offsets[key] = end
            size = home.live.untyped_storage().nbytes()
            end += -(-size // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    return offsets, end


def _target(home: Home, offsets: dict[int, int]) -> Target:
    live, raw = home.live, home.raw
    start = offsets[storage_key(live)] + live.data_ptr() - storage_key(live)
    return Target(
        name=home.name,
        shape=tuple(raw.shape),
        stride=tuple(raw.stride()),
        dtype=str(raw.dtype).removeprefix("torch."),
        offset=start,
        nbytes=live.numel() * live.element_size(),
        transform=home.transform,
    )


def _writes(trace: tracing.Trace, names: dict[str, int]) -> tuple[Write, ...]:
    return tuple(
        Write(
            source=w.source,
            target=names[w.target],
            size=w.size,
            src_offset=w.src_offset,
            src_stride=w.src_stride,
            dst_offset=w.dst_offset,
            dst_stride=w.dst_stride,
        )
        for w in trace.writes
    )


def _move(homes: list[Home], offsets: dict[int, int], arena: Arena) -> None:
    """Point every tensor over a moved storage at the arena, whoever holds it.

    One storage after the other, each freed when it has moved, so that host memory holds little twice.
    """
    # Parameters, buffers, plain attributes and views alike: whatever Python can still reach. All are found
    # before the first storage is freed, as a freed address may be given to another.
    holders: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for obj in gc.get_objects():
        if issubclass(type(obj), torch.Tensor) and kept.has_memory(obj) and obj.numel():
            holders[storage_key(obj)].append(obj)
    moving = {storage_key(home.live): home.live for home in homes}
    for key, one in moving.items():
        storage = one.untyped_storage()
        segment = arena.live(offsets[key], storage.nbytes())
        segment.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
        del storage
        for tensor in holders.pop(key):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                segment.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
            )
