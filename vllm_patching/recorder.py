"""The dispatch mode under which a loader runs: it follows source elements and intercepts live writes."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from vllm_patching import affine
from vllm_patching.affine import CONSTANT, KEEP, Layout, Piece
from vllm_patching.tracing import LiveTensor, Refusal, TracedFill, TracedWrite, dtype_name, storage_key

_aten = torch.ops.aten
# New tensors that take shape and dtype from an argument, never its values.
_FACTORIES = {
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like,
    _aten.randn_like, _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full,
    _aten.new_empty_strided,
}  # fmt: skip
_COPIES = {_aten.clone, _aten._to_copy}
# Each output element is one input element (or a constant): the operation can be run on addresses instead.
_MOVEMENTS = {
    _aten.cat, _aten.stack, _aten.flip, _aten.roll, _aten.repeat, _aten.index_select, _aten.index,
    _aten.gather, _aten.take_along_dim, _aten.constant_pad_nd, _aten.slice_scatter,
    _aten.select_scatter, _aten.index_put, _aten.index_copy, _aten.view_copy, _aten.permute_copy,
    _aten.transpose_copy, _aten.slice_copy, _aten.expand_copy, _aten.unsqueeze_copy, _aten.hstack,
    _aten.vstack, _aten.block_diag, _aten.rot90, _aten.repeat_interleave, _aten.pixel_shuffle,
    _aten.channel_shuffle, _aten.new_empty_strided, _aten._unsafe_index, _aten._reshape_copy, _aten.copy,
}  # fmt: skip
_MOVEMENTS_IN_PLACE = {_aten.index_put_, _aten.index_copy_, _aten.scatter_, _aten._index_put_impl_}
_FILLS = {_aten.fill_, _aten.zero_}
_STRUCTURAL = {_aten.set_, _aten.resize_, _aten.resize_as_}
_READERS = {_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero, _aten.masked_select,
            _aten.unique_dim, _aten._unique2, _aten.nonzero_numpy}  # fmt: skip
_READING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.item}


@dataclasses.dataclass(frozen=True)
class _Taint:
    """The values were computed, or come from a live parameter: no copy can reproduce them."""

    op: str
    sources: tuple[str, ...]
    reason: str


@dataclasses.dataclass
class _Shadow:
    """What is known of one storage's elements; ``dtype`` is the one its offsets are counted in."""

    ref: StorageWeakRef
    dtype: torch.dtype
    content: Layout | torch.Tensor | _Taint
    casts: tuple[torch.dtype, ...] = ()

    def table(self) -> torch.Tensor:
        assert not isinstance(self.content, _Taint)
        if isinstance(self.content, Layout):
            self.content = self.content.table()
        return self.content


def _tensors(*values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _replace(value: Any, change: Any) -> Any:
    """The same arguments with ``change`` applied to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _replace(item, change) for key, item in value.items()}
    return value


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is a value of ``wide``."""
    if wide == narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    w, n = torch.finfo(wide), torch.finfo(narrow)
    return w.eps <= n.eps and w.max >= n.max and w.smallest_normal <= n.smallest_normal


def _cast_fault(source: torch.dtype, casts: Iterable[torch.dtype], final: torch.dtype) -> str:
    """Why a chain of casts differs from one cast of ``source`` to ``final``; "" if it does not."""
    current = source
    for step in (*casts, final):
        if step.is_floating_point != source.is_floating_point:
            return f"cast from {dtype_name(source)} to {dtype_name(step)} changes values"
        if not _holds(step, current) and step != final:
            return f"rounded to {dtype_name(step)} on the way from {dtype_name(source)} to {dtype_name(final)}"
        current = step
    return ""


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


class Recorder(TorchDispatchMode):
    """Follows every element that comes from a source; records live writes instead of executing them.

    Attributes:
        writes, fills: the records, keyed for deduplication, in the loader's order.
        refused: live writes that are no copies.
        current: the source the loader was given last.
        error: the first ``MappingError`` raised inside, in case the loader swallows it.
    """

    def __init__(
        self, live: Sequence[LiveTensor], storages: dict[int, int], sources: Sequence[Source]
    ) -> None:
        super().__init__()
        self.writes: dict[tuple[Any, ...], TracedWrite] = {}
        self.fills: dict[tuple[Any, ...], TracedFill] = {}
        self.refused: list[Refusal] = []
        self.current = "(none yet)"
        self.error: MappingError | None = None
        self._sources = sources
        self._dtypes = [getattr(torch, source.dtype) for source in sources]
        self._bases: list[int] = []
        self._live: dict[int, list[LiveTensor]] = defaultdict(list)
        by_number = {number: key for key, number in storages.items()}
        for tensor in sorted(live, key=lambda t: not t.is_parameter):
            self._live[by_number[tensor.storage]].append(tensor)
        self._shadows: dict[int, _Shadow] = {}
        self._own: set[int] = set()  # storages made by the loader: scratch it may write to
        self._order = 0
        base = 0
        for source in sources:
            self._bases.append(base)
            base += source.numel + 1  # the gap keeps neighbours from looking like one source

    def feed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The iterator that the loader consumes: meta tensors, each with a storage of its own."""
        for index, source in enumerate(self._sources):
            self._forget_dead(everything=index % 256 == 0)
            self.current = source.name
            tensor = torch.empty(source.shape, dtype=self._dtypes[index], device="meta")
            self._learn(tensor, Layout.identity(self._bases[index], max(source.numel, 1)))
            yield source.name, tensor

    def provenance(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Names of the sources whose values this tensor holds."""
        shadow = self._shadows.get(storage_key(tensor))
        if shadow is None:
            return ()
        if isinstance(shadow.content, _Taint):
            return shadow.content.sources
        if isinstance(shadow.content, Layout):
            return (self._sources[self._source_at(shadow.content.base)].name,)
        addresses = shadow.content[shadow.content >= 0]
        bases = torch.tensor(self._bases, dtype=torch.int64, device="cpu")
        indices = torch.searchsorted(bases, addresses, right=True).unique().tolist()
        return tuple(self._sources[int(i) - 1].name for i in indices)

    def is_live(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor) in self._live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._handle(func, args, kwargs or {})
        except MappingError as err:
            self.error = self.error or err
            raise

    # --- bookkeeping ---------------------------------------------------------------------------------

    def _learn(
        self,
        tensor: torch.Tensor,
        content: Layout | torch.Tensor | _Taint,
        casts: tuple[torch.dtype, ...] = (),
    ) -> None:
        storage = tensor.untyped_storage()
        # The weak reference keeps the storage's identity from being reused, not its memory.
        self._shadows[storage._cdata] = _Shadow(StorageWeakRef(storage), tensor.dtype, content, casts)

    def _forget_dead(self, *, everything: bool) -> None:
        """Drop what is known of dead storages; tables at once, since they are large."""
        for key, shadow in list(self._shadows.items()):
            if (everything or isinstance(shadow.content, torch.Tensor)) and shadow.ref.expired():
                del self._shadows[key]

    def _source_at(self, address: int) -> int:
        return bisect.bisect_right(self._bases, address) - 1

    def _shadow(self, tensor: torch.Tensor) -> _Shadow | None:
        return self._shadows.get(storage_key(tensor))

    def _describe(self, tensor: torch.Tensor) -> str:
        live = self._live.get(storage_key(tensor))
        if live:
            return live[0].name
        return f"a tensor of shape {tuple(tensor.shape)}, {dtype_name(tensor.dtype)}, outside the model's state"

    def _refuse(self, op: Any, inputs: Iterable[torch.Tensor], target: str, reason: str) -> None:
        names = dict.fromkeys(name for tensor in inputs for name in self.provenance(tensor))
        refusal = Refusal(str(op), tuple(names), target, reason)
        if refusal not in self.refused:
            self.refused.append(refusal)

    # --- dispatch ------------------------------------------------------------------------------------

    def _handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        inputs = list(_tensors(args, kwargs))
        if func._schema.is_mutable:
            written = _written_arguments(func, args, kwargs)
            live = [tensor for tensor in written if self.is_live(tensor)]
            if packet in _STRUCTURAL and (live or any(self._shadow(t) for t in inputs)):
                raise MappingError(f"{func} on {self._describe(written[0])} (source {self.current!r}): "
                                   "a loader that re-points storages cannot be traced")  # fmt: skip
            if torch.Tag.inplace_view not in func.tags:
                if live:
                    return self._write_live(func, args, kwargs, written)
                if any(self._shadow(tensor) for tensor in inputs):
                    return self._write_scratch(func, args, kwargs, written)
        tracked = [tensor for tensor in inputs if self._shadow(tensor)]
        if packet in _READERS and tracked:
            names = ", ".join(name for tensor in tracked for name in self.provenance(tensor))
            raise MappingError(f"the loader reads values of {names} ({func}), so what it copies may depend "
                               "on them; such a load cannot be mapped")  # fmt: skip
        out = self._run(func, args, kwargs, tracked)
        fresh = [t for t in _tensors(out) if not self.is_live(t) and not self._shadow(t)]
        if packet not in _FACTORIES and fresh:
            given = {storage_key(tensor) for tensor in inputs}
            fresh = [tensor for tensor in fresh if storage_key(tensor) not in given]
            self._derive(func, args, kwargs, inputs, fresh)
        if not inputs or packet in _FACTORIES or tracked or packet is _aten.lift_fresh:
            self._own.update(storage_key(tensor) for tensor in _tensors(out))
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], tracked: list[torch.Tensor]) -> Any:
        """Execute ``func``, on meta tensors if any source is one: only shapes and views matter then."""
        if any(tensor.is_meta for tensor in tracked):
            args, kwargs = _replace((args, kwargs), _to_meta)
            if "device" in kwargs and func.overloadpacket not in _FACTORIES:
                kwargs["device"] = torch.device("meta")
            kwargs.pop("non_blocking", None)
            kwargs.pop("pin_memory", None)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as err:
            if not tracked:
                raise
            names = ", ".join(name for tensor in tracked for name in self.provenance(tensor))
            raise MappingError(f"{func} on source {names} cannot be followed: {err}") from err

    def _derive(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        inputs: list[torch.Tensor],
        fresh: list[torch.Tensor],
    ) -> None:
        """Describe new storages by where their elements came from."""
        shadows = [shadow for tensor in inputs if (shadow := self._shadow(tensor))]
        live = [tensor for tensor in inputs if self.is_live(tensor)]
        if not fresh or not (shadows or live):
            self._own.update(storage_key(tensor) for tensor in fresh)
            return
        names = tuple(dict.fromkeys(name for tensor in inputs for name in self.provenance(tensor)))
        packet = func.overloadpacket
        taint = next((s.content for s in shadows if isinstance(s.content, _Taint)), None)
        if live:
            taint = taint or _Taint(str(func), names, f"computed from the live {self._describe(live[0])}")
        if taint is None and packet not in _COPIES and packet not in _MOVEMENTS:
            taint = _Taint(str(func), names, "the loader computes with the source instead of copying it")
        if taint is None and (odd := [t for t in inputs if (s := self._shadow(t)) and _reinterprets(t, s)]):
            taint = _Taint(str(func), names, f"the source's bytes are reinterpreted as {odd[0].dtype}")
        for tensor in fresh:
            if taint is not None:
                self._learn(tensor, taint)
                continue
            casts = tuple(cast for shadow in shadows for cast in shadow.casts)
            if any(shadow.dtype != tensor.dtype for shadow in shadows):
                casts += (tensor.dtype,)
            content = self._layout_of_copy(inputs[0], tensor) if packet in _COPIES else None
            self._learn(tensor, self._move(func, args, kwargs, tensor) if content is None else content, casts)

    def _layout_of_copy(self, original: torch.Tensor, copy: torch.Tensor) -> Layout | None:
        shadow = self._shadow(original)
        if shadow is None or not isinstance(shadow.content, Layout) or original.numel() == 0:
            return None
        return shadow.content.copied(original, copy)

    def _addresses(self, tensor: torch.Tensor) -> torch.Tensor:
        """The address of each element: int64, of the tensor's shape."""
        shadow = self._shadow(tensor)
        if shadow is None:
            return torch.full(tensor.shape, CONSTANT, dtype=torch.int64, device="cpu")
        return shadow.table().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _on_addresses(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a movement on addresses; untracked integer tensors are indices and stay."""

        def change(tensor: torch.Tensor) -> torch.Tensor:
            is_index = not tensor.is_floating_point() and not self._shadow(tensor)
            return tensor.cpu() if is_index else self._addresses(tensor)

        args, kwargs = _replace((args, kwargs), change)
        for name in ("dtype", "device", "layout", "memory_format", "non_blocking", "pin_memory"):
            kwargs.pop(name, None)
        packet = func.overloadpacket
        if packet in _COPIES:
            return args[0]
        if packet is _aten.constant_pad_nd:
            args, kwargs = (args[0], args[1], CONSTANT), {}
        return func(*args, **kwargs)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
        itemsize = max(out.element_size(), 1)
        table = torch.full(
            (out.untyped_storage().nbytes() // itemsize,), CONSTANT, dtype=torch.int64, device="cpu"
        )
        moved = self._on_addresses(func, args, kwargs)
        table.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(moved)
        return table

    # --- writes --------------------------------------------------------------------------------------

    def _write_scratch(
        self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """An in-place operation on a tensor outside the model's state; nothing is executed."""
        dst, packet = written[0], func.overloadpacket
        others = [tensor for tensor in _tensors(args, kwargs) if tensor is not dst]
        if storage_key(dst) not in self._own and not self._shadow(dst):
            self._refuse(func, others, self._describe(dst), "it is neither parameter nor buffer")
            return dst
        shadows = [shadow for tensor in (dst, *others) if (shadow := self._shadow(tensor))]
        taint = next((s.content for s in shadows if isinstance(s.content, _Taint)), None)
        known = {_aten.copy_} | _MOVEMENTS_IN_PLACE | _FILLS
        value_is_source = packet in _FILLS and any(self._shadow(tensor) for tensor in others)
        if packet not in known or len(written) > 1 or value_is_source:
            names = tuple(dict.fromkeys(n for t in (dst, *others) for n in self.provenance(t)))
            taint = taint or _Taint(str(func), names, "the loader computes with the source")
        for tensor in written:
            if taint is not None:
                self._learn(tensor, taint)
                continue
            shadow = self._shadow(tensor)
            size = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
            empty = torch.full((size,), CONSTANT, dtype=torch.int64, device="cpu")
            table = shadow.table() if shadow else empty
            casts = tuple(cast for s in shadows for cast in s.casts) + (tensor.dtype,)
            self._learn(tensor, table, casts)
            self._write_addresses(func, args, kwargs, self._addresses(tensor))
        return dst

    def _write_addresses(self, func: Any, args: Any, kwargs: dict[str, Any], into: torch.Tensor) -> None:
        """Apply an in-place movement to ``into``, a table that stands for the first argument."""
        packet = func.overloadpacket
        if packet in _FILLS:
            into.fill_(CONSTANT)
        elif packet is _aten.copy_:
            into.copy_(self._addresses(args[1]))
        else:
            rest, named = _replace((args[1:], kwargs), lambda t: t)
            rest = [
                _replace(value, lambda t: t.cpu() if _is_index(t, self._shadow(t)) else self._addresses(t))
                for value in rest
            ]
            func(into, *rest, **named)

    def _write_live(
        self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """A write to a parameter or buffer: recorded, never executed."""
        packet = func.overloadpacket
        others = [t for t in _tensors(args, kwargs) if all(t is not w for w in written)]
        if packet is _aten._foreach_copy_:
            for dst, src in zip(args[0], args[1], strict=True):
                self._copy_live(func, dst, src)
        elif packet is _aten.copy_:
            self._copy_live(func, args[0], args[1])
        elif packet in _FILLS:
            value = others[0] if others else None
            if value is not None and (self._shadow(value) or self.is_live(value)):
                self._copy_live(func, args[0], value)
            else:
                self._emit(func, args[0], [Piece(tuple(args[0].shape), CONSTANT, (0,) * args[0].ndim,
                                                 args[0].storage_offset(), args[0].stride())], None)  # fmt: skip
        elif packet in _MOVEMENTS_IN_PLACE and not any(
            self.is_live(t) or ((s := self._shadow(t)) and isinstance(s.content, _Taint)) for t in others
        ):
            table = torch.full(args[0].shape, KEEP, dtype=torch.int64, device="cpu")
            self._write_addresses(func, args, kwargs, table)
            shadow = next((s for t in others if (s := self._shadow(t))), None)
            self._emit(func, args[0], affine.table_pieces(table, args[0]), shadow)
        else:
            for tensor in written:
                self._refuse(func, others, self._describe(tensor), "it changes the live tensor in place")
        return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else None

    def _copy_live(self, func: Any, dst: torch.Tensor, src: torch.Tensor) -> None:
        shadow, name = self._shadow(src), self._describe(dst)
        if dst.numel() == 0:
            return
        if self.is_live(src):
            self._refuse(func, [src], name, f"copied from the live {self._describe(src)}, not from a source")
            return
        src = src.expand(dst.shape)
        if shadow is None:
            constant = Piece(tuple(dst.shape), CONSTANT, (0,) * dst.ndim, dst.storage_offset(), dst.stride())
            self._emit(func, dst, [constant], None)
            return
        if isinstance(shadow.content, _Taint):
            self._refuse(shadow.content.op, [src], name, shadow.content.reason)
            return
        if _reinterprets(src, shadow):
            self._refuse(func, [src], name, f"bytes reinterpreted as {dtype_name(src.dtype)}")
            return
        pieces = shadow.content.pieces(src, dst) if isinstance(shadow.content, Layout) else None
        if pieces is None:
            pieces = affine.table_pieces(self._addresses(src), dst)
        self._emit(func, dst, pieces, shadow)

    def _emit(self, func: Any, dst: torch.Tensor, pieces: Iterable[Piece], shadow: _Shadow | None) -> None:
        """Turn pieces into records, relative to the live tensor that ``dst`` is a view of."""
        target = self._target(func, dst)
        if target is None:
            return
        for whole in pieces:
            for piece in map(affine.coalesce, self._by_source(whole)):
                self._order += 1
                where = (target.name, piece.size, piece.offset - target.offset, piece.dst_stride)
                if piece.address == CONSTANT:
                    self.fills[where] = TracedFill(*where, order=self._order)
                    continue
                index = self._source_at(piece.address)
                casts = shadow.casts if shadow else ()
                if fault := _cast_fault(self._dtypes[index], casts, dst.dtype):
                    refusal = Refusal(str(func), (self._sources[index].name,), target.name, fault)
                    if refusal not in self.refused:
                        self.refused.append(refusal)
                    continue
                start = piece.address - self._bases[index]
                key = (index, start, piece.src_stride, *where)
                self.writes[key] = TracedWrite(
                    index, where[0], where[1], start, piece.src_stride, *where[2:], self._order
                )

    def _by_source(self, piece: Piece) -> Iterator[Piece]:
        """Split a piece whose regular steps happen to lead from one source into another."""
        if piece.address < 0 or self._source_at(piece.address) == self._source_at(piece.last_address):
            yield piece
            return
        dim = max(range(len(piece.size)), key=lambda d: (piece.size[d] > 1, piece.src_stride[d]))
        size = (*piece.size[:dim], 1, *piece.size[dim + 1 :])
        for i in range(piece.size[dim]):
            address, offset = piece.address + i * piece.src_stride[dim], piece.offset + i * piece.dst_stride[dim]
            yield from self._by_source(Piece(size, address, piece.src_stride, offset, piece.dst_stride))

    def _target(self, func: Any, dst: torch.Tensor) -> LiveTensor | None:
        """The live tensor that holds all of ``dst``, or None after recording why there is none."""
        first, end = affine.extent(dst.shape, dst.stride(), dst.storage_offset())
        candidates = self._live[storage_key(dst)]
        dtype = dtype_name(dst.dtype)
        for tensor in candidates:
            if tensor.dtype == dtype and tensor.contains(first, end):
                return tensor
        known = ", ".join(f"{t.name} ({t.dtype})" for t in candidates)
        reason = f"the write of {dtype} elements {first}..{end} fits none of: {known}"
        self._refuse(func, [], candidates[0].name, reason)
        return None


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _reinterprets(tensor: torch.Tensor, shadow: _Shadow) -> bool:
    """Whether a view reads the storage's bytes as something else than its elements."""
    return tensor.dtype != shadow.dtype or tensor.is_neg() or tensor.is_conj()


def _is_index(tensor: torch.Tensor, shadow: _Shadow | None) -> bool:
    return shadow is None and not tensor.is_floating_point()


class ValueGuard(TorchFunctionMode):
    """Catches what never reaches the dispatcher: reading a source's values, assigning ``.data``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READING_METHODS and (names := self._recorder.provenance(args[0])):
            self._fail(f"the loader reads values of {', '.join(names)} ({func.__name__}), so what it copies "
                       "may depend on them; such a load cannot be mapped")  # fmt: skip
        if func == torch.Tensor.data.__set__ and self._recorder.is_live(args[0]):  # type: ignore[attr-defined]
            names = self._recorder.provenance(args[1])
            self._fail(f"the loader assigns the .data of {self._recorder._describe(args[0])} instead of copying "
                       f"into it (from {', '.join(names) or 'no source'}); such a load cannot be mapped")  # fmt: skip
        return func(*args, **(kwargs or {}))

    def _fail(self, message: str) -> None:
        error = MappingError(message)
        self._recorder.error = self._recorder.error or error
        raise error
