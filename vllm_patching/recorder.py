"""The dispatch mode under which a loader runs: it follows source elements and intercepts live writes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from vllm_patching import affine
from vllm_patching.affine import CONSTANT, KEEP, Layout, Piece
from vllm_patching.provenance import (
    FACTORIES,
    FILLS,
    MOVEMENTS_IN_PLACE,
    Provenance,
    Shadow,
    Taint,
    cast_fault,
    replace_tensors,
    tensors_in,
)
from vllm_patching.tracing import LiveTensor, Refusal, TracedFill, TracedWrite, dtype_name, storage_key

_aten = torch.ops.aten
_STRUCTURAL = {_aten.set_, _aten.resize_, _aten.resize_as_}
_READERS = {
    _aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero, _aten.masked_select,
    _aten.unique_dim, _aten._unique2,
}  # fmt: skip
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_READING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.item}


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation only ever returns views; those written in terms of others may return copies."""
    schema = func._schema
    if schema.is_mutable or func.overloadpacket is _aten.lift_fresh or not schema.returns:
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return not composite and all(r.alias_info is not None for r in schema.returns)


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _constant(dst: torch.Tensor) -> Piece:
    return Piece(tuple(dst.shape), CONSTANT, (0,) * dst.ndim, int(dst.storage_offset()), dst.stride())


class Recorder(TorchDispatchMode):
    """Follows every element that comes from a source; records live writes instead of executing them.

    Attributes:
        writes, fills: the records in the loader's order, keyed for deduplication.
        refused: live writes that are no copies.
        current: the source that the loader was given last.
        error: the first ``MappingError`` raised inside, in case the loader swallows it.
    """

    def __init__(
        self, live: Sequence[LiveTensor], storages: dict[int, int], sources: Sequence[Source]
    ) -> None:
        """``storages`` maps ``storage_key`` to ``LiveTensor.storage``."""
        super().__init__()
        self.writes: dict[tuple[Any, ...], TracedWrite] = {}
        self.fills: dict[tuple[Any, ...], TracedFill] = {}
        self.refused: list[Refusal] = []
        self.current = "(none yet)"
        self.error: MappingError | None = None
        self.known = Provenance(sources)
        self._sources = sources
        self._dtypes: list[torch.dtype] = [getattr(torch, source.dtype) for source in sources]
        self._own: set[int] = set()  # storages made by the loader: scratch that it may write to
        self._order = 0
        keys = {number: key for key, number in storages.items()}
        self._live: dict[int, list[LiveTensor]] = defaultdict(list)
        for tensor in sorted(live, key=lambda t: not t.is_parameter):
            self._live[keys[tensor.storage]].append(tensor)

    def feed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The iterator that the loader consumes: meta tensors, each with a storage of its own."""
        for index, source in enumerate(self._sources):
            self.known.forget_dead()
            self.current = source.name
            tensor = torch.empty(source.shape, dtype=self._dtypes[index], device="meta")
            self.known.learn(tensor, Layout.identity(self.known.bases[index], max(source.numel, 1)))
            yield source.name, tensor

    def announce(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass on what was made of the sources, noting where in it the loader is."""
        for name, tensor in weights:
            self.known.forget_dead()
            origin = ", ".join(self.known.names(tensor)) or "no source"
            self.current = name if origin == name else f"{name} (made of {origin})"
            yield name, tensor

    def is_live(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor) in self._live

    def describe(self, tensor: torch.Tensor) -> str:
        """A name for an error message."""
        if self.is_live(tensor):
            return self._live[storage_key(tensor)][0].name
        return (
            f"a tensor of shape {tuple(tensor.shape)}, {dtype_name(tensor.dtype)}, outside the model's state"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._handle(func, args, kwargs or {})
        except MappingError as err:
            self.error = self.error or err
            raise

    def _handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if _is_view(func):  # its output shares the storage of its input, so there is nothing to learn
            return func(*args, **kwargs)
        packet = func.overloadpacket
        inputs = list(tensors_in(args, kwargs))
        tracked = [tensor for tensor in inputs if self.known.shadow(tensor)]
        if func._schema.is_mutable:
            written = _written_arguments(func, args, kwargs)
            live = any(map(self.is_live, written))
            if packet in _STRUCTURAL and (live or tracked):
                raise MappingError(
                    f"{func} on {self.describe(written[0])}, at source {self.current!r}: a loader that "
                    "re-points storages cannot be mapped"
                )
            if torch.Tag.inplace_view not in func.tags and (live or tracked):
                write = self._write_live if live else self._write_scratch
                return write(func, args, kwargs, written)
        if packet in _READERS and tracked:
            raise MappingError(
                f"the loader reads values of {', '.join(self.known.names(*tracked))} ({func}), so what it "
                "copies may depend on them; such a load cannot be mapped"
            )
        out = self._run(func, args, kwargs, tracked)
        given = {storage_key(tensor) for tensor in inputs}
        fresh = [tensor for tensor in tensors_in(out) if storage_key(tensor) not in given]
        self._own.update(map(storage_key, fresh))
        if not inputs or packet is _aten.lift_fresh:  # torch.tensor, which is made out of our sight
            self._own.update(map(storage_key, tensors_in(out)))
        reads_live = next((tensor for tensor in inputs if self.is_live(tensor)), None)
        if fresh and packet not in FACTORIES and (tracked or reads_live is not None):
            taint = None
            if reads_live is not None:
                reason = f"computed from the live {self.describe(reads_live)}"
                taint = Taint(str(func), self.known.names(*inputs), reason)
            self.known.derive(func, args, kwargs, fresh, taint)
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], tracked: list[torch.Tensor]) -> Any:
        """Execute ``func``, on meta tensors if any source is one: only shapes and views matter then."""
        if any(tensor.is_meta for tensor in tracked):
            args, kwargs = replace_tensors((args, kwargs), _to_meta)
            if "device" in kwargs and func.overloadpacket not in FACTORIES:
                kwargs["device"] = torch.device("meta")
            kwargs.pop("non_blocking", None)
            kwargs.pop("pin_memory", None)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as err:
            if not tracked:
                raise
            names = ", ".join(self.known.names(*tracked))
            raise MappingError(f"{func} on source {names} cannot be followed: {err}") from err

    # --- writes --------------------------------------------------------------------------------------

    def _refuse(self, op: Any, inputs: Sequence[torch.Tensor], target: str, reason: str) -> None:
        self._add_refusal(Refusal(str(op), self.known.names(*inputs), target, reason))

    def _add_refusal(self, refusal: Refusal) -> None:
        if refusal not in self.refused:
            self.refused.append(refusal)

    def _write_scratch(
        self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """An in-place operation outside the model's state: only what it moves where is kept."""
        inputs = list(tensors_in(args, kwargs))
        for dst in written:
            if storage_key(dst) not in self._own and not self.known.shadow(dst):
                self._refuse(func, inputs, self.describe(dst), "nobody would keep it in step")
            elif dst is not args[0]:
                reason = "the loader computes with the source instead of copying it"
                self.known.learn(dst, Taint(str(func), self.known.names(*inputs), reason))
            else:
                self.known.overwrite(func, args, kwargs, dst)
        return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else None

    def _write_live(self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
        """A write to a parameter or buffer: recorded, never executed."""
        packet = func.overloadpacket
        others = [tensor for tensor in tensors_in(args, kwargs) if all(tensor is not w for w in written)]
        if packet is _aten._foreach_copy_:
            for dst, src in zip(args[0], args[1], strict=True):
                self._copy_live(func, dst, src)
        elif packet is _aten.copy_ or (packet in FILLS and others):
            self._copy_live(func, args[0], args[1])
        elif packet in FILLS:
            self._emit(func, args[0], [_constant(args[0])], ())
        elif packet in MOVEMENTS_IN_PLACE and args[0] is written[0]:
            self._scatter_live(func, args, kwargs, others)
        else:
            for tensor in written:
                self._refuse(func, others, self.describe(tensor), "it changes the live tensor in place")
        return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else None

    def _is_refused(self, func: Any, dst: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether any input is more than moved source elements; records the refusal."""
        name = self.describe(dst)
        for tensor in inputs:
            if self.is_live(tensor):
                self._refuse(
                    func, [tensor], name, f"copied from the live {self.describe(tensor)}, not a source"
                )
                return True
        if taint := self.known.taint_of(func, inputs):
            self._add_refusal(Refusal(taint.op, taint.sources, name, taint.reason))
            return True
        return False

    def _copy_live(self, func: Any, dst: torch.Tensor, src: torch.Tensor) -> None:
        if dst.numel() == 0 or self._is_refused(func, dst, [src]):
            return
        src = src.expand(dst.shape)
        shadow = self.known.shadow(src)
        if shadow is None:
            self._emit(func, dst, [_constant(dst)], ())
            return
        pieces = shadow.content.pieces(src, dst) if isinstance(shadow.content, Layout) else None
        if pieces is None:
            pieces = affine.table_pieces(self.known.addresses(src), dst)
        self._emit(func, dst, pieces, [src])

    def assign(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Account for a parameter that the loader replaced by another tensor, as if it had been copied."""
        if self.is_live(new):
            self._refuse("assignment", [], name, f"it becomes {self.describe(new)}")
        else:
            self._copy_live("assignment", old, new)

    def _scatter_live(
        self, func: Any, args: Any, kwargs: dict[str, Any], others: Sequence[torch.Tensor]
    ) -> None:
        dst = args[0]
        if not self._is_refused(func, dst, others):
            table = torch.full(dst.shape, KEEP, dtype=torch.int64, device="cpu")
            self.known.write_addresses(func, args, kwargs, table)
            self._emit(func, dst, affine.table_pieces(table, dst), others)

    def _emit(
        self, func: Any, dst: torch.Tensor, pieces: Iterable[Piece], inputs: Sequence[torch.Tensor]
    ) -> None:
        """Turn pieces into records, relative to the live tensor that ``dst`` is a view of."""
        target = self._target(func, dst, inputs) if dst.numel() else None
        if target is None:
            return
        shadows: list[Shadow] = [s for tensor in inputs if (s := self.known.shadow(tensor))]
        casts = [cast for shadow in shadows for cast in shadow.casts]
        for piece in map(affine.coalesce, self._by_source(pieces)):
            self._order += 1
            where = (target.name, piece.size, piece.offset - target.offset, piece.dst_stride)
            if piece.address == CONSTANT:
                self.fills[where] = TracedFill(*where, order=self._order)
                continue
            index = self.known.source_at(piece.address)
            if fault := cast_fault(self._dtypes[index], casts, dst.dtype):
                self._add_refusal(Refusal(str(func), (self._sources[index].name,), target.name, fault))
                continue
            start = piece.address - self.known.bases[index]
            self.writes[(index, start, piece.src_stride, *where)] = TracedWrite(
                index, *where[:2], start, piece.src_stride, *where[2:], order=self._order
            )

    def _by_source(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Split pieces whose regular steps happen to lead from one source into another."""
        for piece in pieces:
            first, last = (self.known.source_at(a) for a in (piece.address, piece.last_address))
            if piece.address < 0 or first == last:
                yield piece
                continue
            dim = max(range(len(piece.size)), key=lambda d: (piece.size[d] > 1, piece.src_stride[d]))
            size = (*piece.size[:dim], 1, *piece.size[dim + 1 :])
            yield from self._by_source(
                Piece(
                    size,
                    piece.address + i * piece.src_stride[dim],
                    piece.src_stride,
                    piece.offset + i * piece.dst_stride[dim],
                    piece.dst_stride,
                )
                for i in range(piece.size[dim])
            )

    def _target(self, func: Any, dst: torch.Tensor, inputs: Sequence[torch.Tensor]) -> LiveTensor | None:
        """The live tensor that holds all of ``dst``, or None after recording why there is none."""
        first, end = affine.extent(dst.shape, dst.stride(), int(dst.storage_offset()))
        candidates, dtype = self._live[storage_key(dst)], dtype_name(dst.dtype)
        for tensor in candidates:
            if tensor.dtype == dtype and tensor.contains(first, end):
                return tensor
        listing = ", ".join(f"{t.name} ({t.dtype})" for t in candidates)
        reason = f"the write of {dtype} elements {first}..{end} fits none of: {listing}"
        self._refuse(func, inputs, candidates[0].name, reason)
        return None


class ValueGuard(TorchFunctionMode):
    """Catches what never reaches the dispatcher: reading a source's values, assigning ``.data``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = self._recorder
        if func in _READING_METHODS and (names := recorder.known.names(args[0])):
            self._fail(
                f"the loader reads values of {', '.join(names)} ({func.__name__}), so what it copies may "
                "depend on them; such a load cannot be mapped"
            )
        if func == _SET_DATA and recorder.is_live(args[0]):
            origin = ", ".join(recorder.known.names(args[1])) or "no source"
            self._fail(
                f"the loader assigns the .data of {recorder.describe(args[0])} (from {origin}) instead of "
                "copying into it; such a load cannot be mapped"
            )
        return func(*args, **(kwargs or {}))

    def _fail(self, message: str) -> None:
        error = MappingError(message)
        self._recorder.error = self._recorder.error or error
        raise error
