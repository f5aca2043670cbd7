"""Run a model's own ``load_weights`` under a recorder and keep what it would have copied where.

Call ``trace`` between vLLM's ``load_weights`` and its ``process_weights_after_loading``: later, parameters
may have been freed (MLA) or repacked. The loader is given meta tensors, and every write to a live parameter
or buffer is recorded and not executed, so live weights stay as they are, bit for bit. The mapping therefore
comes from vLLM itself, for every architecture it can load; no table of names exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from vllm_patching.affine import extent

if TYPE_CHECKING:
    from vllm_patching.recorder import Recorder

Prepare = Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class LiveTensor:
    """A parameter or buffer of the model, and its place in its storage (all in elements).

    ``storage`` numbers the storages of one model; ``aliases`` are further names of the very same view.
    """

    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    storage: int
    offset: int
    aliases: tuple[str, ...] = ()

    def contains(self, first: int, end: int) -> bool:
        """Whether elements [first, end) of the storage lie within this tensor's extent."""
        begin, stop = extent(self.shape, self.stride, self.offset)
        return begin <= first and end <= stop


@dataclasses.dataclass(frozen=True)
class TracedWrite:
    """One copy of the loader: views of equal ``size`` into a flat source and into a live tensor.

    ``source`` indexes the traced sources; ``dst_offset`` counts from ``target``'s first element. ``order``
    numbers all writes and fills of a trace in the loader's order. Dimensions are coalesced.
    """

    source: int
    target: str
    size: tuple[int, ...]
    src_offset: int
    src_stride: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]
    order: int


@dataclasses.dataclass(frozen=True)
class TracedFill:
    """A region that the loader filled with constants (padding); it keeps the value it already has."""

    target: str
    size: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]
    order: int


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A value that reached ``target`` by more than movement and a plain cast: ``op`` says how."""

    op: str
    sources: tuple[str, ...]
    target: str
    reason: str

    def __str__(self) -> str:
        origin = ", ".join(self.sources) or "no source"
        return f"{self.target} <- {self.op}({origin}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one run of ``load_weights`` would have done. ``unused`` sources produced no write."""

    sources: tuple[Source, ...]
    writes: tuple[TracedWrite, ...]
    fills: tuple[TracedFill, ...]
    refused: tuple[Refusal, ...]
    unused: tuple[str, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without its prefix: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, False


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of the storage under a tensor, valid while that storage lives."""
    return int(tensor.untyped_storage()._cdata)


def live_tensors(model: nn.Module) -> list[LiveTensor]:
    """All parameters and buffers, one entry per distinct view; equal views become ``aliases``."""
    numbers: dict[int, int] = {}
    found: dict[tuple[Any, ...], LiveTensor] = {}
    for name, tensor, is_parameter in _named_tensors(model):
        number = numbers.setdefault(storage_key(tensor), len(numbers))
        shape, stride = tuple(tensor.shape), tensor.stride()
        view = (number, tensor.storage_offset(), shape, stride, tensor.dtype)
        if view in found:
            known = found[view]
            found[view] = dataclasses.replace(known, aliases=(*known.aliases, name))
        else:
            dtype = dtype_name(tensor.dtype)
            offset = int(tensor.storage_offset())
            found[view] = LiveTensor(name, is_parameter, shape, stride, dtype, number, offset)
    return list(found.values())


def storage_numbers(model: nn.Module) -> dict[int, int]:
    """``storage_key`` -> ``LiveTensor.storage`` for the storages the model holds now."""
    numbers: dict[int, int] = {}
    for _, tensor, _ in _named_tensors(model):
        numbers.setdefault(storage_key(tensor), len(numbers))
    return numbers


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


class _Snapshot:
    """Every parameter and buffer of a model as it is now: to see what a loader replaced, and to undo it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [
            (m, dict(m._parameters), dict(m._buffers)) for m in model.modules()
        ]
        named = {name: tensor for name, tensor, _ in _named_tensors(model)}
        self._aliases = {id(tensor): (tensor, tensor.data) for tensor in named.values()}
        self._before = {name: self._aliases[id(tensor)][1] for name, tensor in named.items()}

    def replaced(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, tensor before, tensor now) for everything that lies in other memory than before.

        Raises:
            MappingError: names each parameter or buffer that was added, removed or changed in shape.
        """
        now = {name: tensor for name, tensor, _ in _named_tensors(self._model)}
        odd = {*now.keys() ^ self._before.keys()}
        found = []
        for name in sorted(now.keys() & self._before.keys()):
            old, new = self._before[name], now[name]
            if old.shape != new.shape or old.dtype != new.dtype:
                odd.add(name)
            elif _place(old) != _place(new):
                found.append((name, old, new))
        if odd:
            raise MappingError(
                f"{type(self._model).__name__}.load_weights adds, removes or reshapes {len(odd)} tensor(s): "
                f"{', '.join(sorted(odd))}; such a load cannot be expressed as copies"
            )
        return found

    def restore(self) -> None:
        """Put every tensor back in its module, and every tensor back on its memory."""
        for module, parameters, buffers in self._modules:
            current: dict[str, Any]
            for current, saved in ((module._parameters, parameters), (module._buffers, buffers)):
                if [(n, id(t)) for n, t in current.items()] != [(n, id(t)) for n, t in saved.items()]:
                    current.clear()
                    current.update(saved)
        for tensor, alias in self._aliases.values():
            if _place(tensor) != _place(alias):
                tensor.data = alias


def trace(model: nn.Module, sources: Sequence[Source], *, prepare: Prepare | None = None) -> Trace:
    """Record what ``model.load_weights`` does with ``sources``; the model is left exactly as it was.

    Args:
        model: a loaded vLLM model (any module with ``load_weights(iterable of (name, tensor))``), before
            ``process_weights_after_loading``.
        sources: names must be unique; the loader sees them in this order.
        prepare: turns the named sources into the named tensors that the loader reads, itself followed by the
            recorder (see ``sources.InMemory.as_saved``); None if the loader reads the sources as they are.

    Returns:
        The trace. ``refused`` is not empty if the loader computes with a source (exp, scaling,
        quantisation): such a destination cannot be kept in step, and ``coverage.find_gaps`` reports it.

    Raises:
        MappingError: the loader reads values of a source, adds or reshapes parameters, or fails on these
            names.
    """
    from vllm_patching.recorder import Recorder

    duplicates = {s.name for s in sources} if len({s.name for s in sources}) != len(sources) else set()
    if duplicates:
        names = sorted(n for n in duplicates if sum(s.name == n for s in sources) > 1)
        raise MappingError(f"{len(names)} source name(s) occur twice: {', '.join(names)}")
    recorder = Recorder(live_tensors(model), storage_numbers(model), sources)
    snapshot = _Snapshot(model)
    try:
        # inference_mode would hide composite operations (reshape) from the recorder
        with torch.inference_mode(False), torch.no_grad():
            _load(model, recorder, prepare)
            for name, old, new in snapshot.replaced():
                recorder.assign(name, old, new)
    finally:
        snapshot.restore()
    written = {write.source for write in recorder.writes.values()}
    refused = {name for refusal in recorder.refused for name in refusal.sources}
    unused = tuple(s.name for i, s in enumerate(sources) if i not in written and s.name not in refused)
    return Trace(
        sources=tuple(sources),
        writes=tuple(recorder.writes.values()),
        fills=tuple(recorder.fills.values()),
        refused=tuple(recorder.refused),
        unused=unused,
    )


def _load(model: nn.Module, recorder: Recorder, prepare: Prepare | None) -> None:
    from vllm_patching.recorder import ValueGuard

    try:
        with ValueGuard(recorder), recorder:
            weights = recorder.feed()
            if prepare is not None:
                weights = recorder.announce(prepare(weights))
            model.load_weights(weights)  # type: ignore[operator]
    except MappingError:
        raise
    except Exception as err:
        if recorder.error is not None:
            raise recorder.error from err
        raise MappingError(
            f"{type(model).__name__}.load_weights fails on these names, at source "
            f"{recorder.current!r}: {type(err).__name__}: {err}"
        ) from err
    if recorder.error is not None:  # a loader may swallow what its copies raise
        raise recorder.error
