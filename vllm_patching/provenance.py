"""Which source elements a storage holds, followed through whatever a loader does outside the model.

A view needs no bookkeeping: it shares its storage, so only operations that make or fill a storage appear
here. Movements are followed exactly; anything that computes taints what it makes.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bridge.protocol.mapping import Source
from vllm_patching.affine import CONSTANT, Layout
from vllm_patching.tracing import dtype_name, storage_key

_aten = torch.ops.aten
# New tensors that take shape and dtype from an argument, never its values.
FACTORIES = {
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like,
    _aten.randn_like, _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full,
    _aten.new_empty_strided,
}  # fmt: skip
COPIES = {_aten.clone, _aten._to_copy}
# Each output element is one input element or a constant: these can be run on addresses instead.
MOVEMENTS = {
    _aten.cat, _aten.stack, _aten.flip, _aten.roll, _aten.repeat, _aten.index_select, _aten.index,
    _aten.gather, _aten.constant_pad_nd, _aten.slice_scatter, _aten.select_scatter, _aten.index_put,
    _aten.index_copy, _aten.view_copy, _aten.permute_copy, _aten.transpose_copy, _aten.slice_copy,
    _aten.expand_copy, _aten.unsqueeze_copy, _aten.pixel_shuffle, _aten.channel_shuffle, _aten._unsafe_index,
    _aten._reshape_copy, _aten.copy,
}  # fmt: skip
FILLS = {_aten.fill_, _aten.zero_}
MOVEMENTS_IN_PLACE = {_aten.copy_, _aten.index_put_, _aten.index_copy_, _aten._index_put_impl_}
SWEEP_AFTER = 16  # storages learnt before dead ones are looked for
_NOT_FOR_ADDRESSES = ("dtype", "device", "layout", "memory_format", "non_blocking", "pin_memory")


@dataclasses.dataclass(frozen=True)
class Taint:
    """The values were computed, or come from a live parameter: no copy of ``sources`` reproduces them."""

    op: str
    sources: tuple[str, ...]
    reason: str


@dataclasses.dataclass
class Shadow:
    """What is known of one storage; its elements are counted in ``dtype``.

    ``content`` is a formula, a flat int64 table of addresses, or a taint. ``casts`` are the dtypes the values
    went through since they left their sources.
    """

    ref: StorageWeakRef
    dtype: torch.dtype
    content: Layout | torch.Tensor | Taint
    casts: tuple[torch.dtype, ...] = ()

    def table(self) -> torch.Tensor:
        """The address of every element of the storage; computed once.

        Raises:
            TypeError: the storage is tainted, so its elements have no addresses.
        """
        if isinstance(self.content, Taint):
            raise TypeError(f"elements made by {self.content.op} have no addresses")
        if isinstance(self.content, Layout):
            self.content = self.content.table()
        return self.content

    def is_reinterpreted_by(self, view: torch.Tensor) -> bool:
        """Whether a view reads the storage's bytes as something else than its elements."""
        return view.dtype != self.dtype or view.is_neg() or view.is_conj()


def tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    """All tensors among arguments, as they come; lists and dicts are searched."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def replace_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments with ``change`` applied to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(replace_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: replace_tensors(item, change) for key, item in value.items()}
    return value


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is a value of ``wide``."""
    if wide == narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    w, n = torch.finfo(wide), torch.finfo(narrow)
    return w.eps <= n.eps and w.max >= n.max and w.smallest_normal <= n.smallest_normal


def cast_fault(source: torch.dtype, casts: Iterable[torch.dtype], final: torch.dtype) -> str:
    """Why a chain of casts differs from one cast of ``source`` to ``final``; "" if it does not."""
    values = source  # the dtype whose values are left
    for step in (*casts, final):
        if step.is_floating_point != source.is_floating_point:
            return f"a cast from {dtype_name(source)} to {dtype_name(step)} changes values"
        if _holds(step, values):
            continue
        if step != final:
            return (
                f"rounded to {dtype_name(step)} on the way from {dtype_name(source)} to {dtype_name(final)}"
            )
        values = step
    return ""


class Provenance:
    """Addresses of all source elements, and what every storage seen so far holds of them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._names = [source.name for source in sources]
        self.bases: list[int] = []
        self._shadows: dict[int, Shadow] = {}
        self._unswept = 0
        base = 0
        for source in sources:
            self.bases.append(base)
            base += source.numel + 1  # a gap, so that a last element's successor belongs to nobody

    def learn(
        self,
        tensor: torch.Tensor,
        content: Layout | torch.Tensor | Taint,
        casts: tuple[torch.dtype, ...] = (),
    ) -> None:
        """Say what the storage under ``tensor`` holds from now on."""
        storage = tensor.untyped_storage()
        # The weak reference keeps the storage's identity from being reused, not its memory.
        self._shadows[storage._cdata] = Shadow(StorageWeakRef(storage), tensor.dtype, content, casts)
        self._unswept += 1 + (content.numel() >> 16 if isinstance(content, torch.Tensor) else 0)

    def forget_dead(self) -> None:
        """Drop what is known of freed storages: now and then, sooner if there are large tables."""
        if self._unswept > SWEEP_AFTER + len(self._shadows) // 2:
            self._unswept = 0
            for key in [key for key, shadow in self._shadows.items() if shadow.ref.expired()]:
                del self._shadows[key]

    def shadow(self, tensor: torch.Tensor) -> Shadow | None:
        """What is known of a tensor's storage; None if it holds nothing of any source."""
        return self._shadows.get(storage_key(tensor))

    def source_at(self, address: int) -> int:
        """Index of the source that owns an address."""
        return bisect.bisect_right(self.bases, address) - 1

    def names(self, *tensors: torch.Tensor) -> tuple[str, ...]:
        """The sources whose values these tensors' storages hold."""
        return tuple(dict.fromkeys(name for tensor in tensors for name in self._names_in(tensor)))

    def _names_in(self, tensor: torch.Tensor) -> Iterable[str]:
        shadow = self.shadow(tensor)
        if shadow is None:
            return ()
        if isinstance(shadow.content, Taint):
            return shadow.content.sources
        if isinstance(shadow.content, Layout):
            return (self._names[self.source_at(shadow.content.base)],)
        addresses = shadow.content[shadow.content >= 0]
        bases = torch.tensor(self.bases, dtype=torch.int64, device="cpu")
        owners = torch.searchsorted(bases, addresses, right=True).unique().tolist()
        return tuple(self._names[int(owner) - 1] for owner in owners)

    def taint_of(self, func: Any, tensors: Sequence[torch.Tensor]) -> Taint | None:
        """Why the values of ``tensors`` cannot be moved by ``func`` as addresses; None if they can."""
        for tensor in tensors:
            shadow = self.shadow(tensor)
            if shadow is None:
                continue
            if isinstance(shadow.content, Taint):
                return shadow.content
            if shadow.is_reinterpreted_by(tensor):
                reason = f"the bytes are reinterpreted as {dtype_name(tensor.dtype)}"
                return Taint(str(func), self.names(*tensors), reason)
        return None

    def addresses(self, tensor: torch.Tensor) -> torch.Tensor:
        """The address of each element: int64, of the tensor's shape; constants where no source is."""
        shadow = self.shadow(tensor)
        if shadow is None:
            return torch.full(tensor.shape, CONSTANT, dtype=torch.int64, device="cpu")
        return shadow.table().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def derive(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        outputs: Sequence[torch.Tensor],
        taint: Taint | None,
    ) -> None:
        """Describe the new storages that ``func`` made from tracked arguments."""
        inputs = list(tensors_in(args, kwargs))
        shadows = [shadow for tensor in inputs if (shadow := self.shadow(tensor))]
        packet = func.overloadpacket
        taint = taint or self.taint_of(func, inputs)
        if taint is None and packet not in COPIES and packet not in MOVEMENTS:
            reason = "the loader computes with the source instead of copying it"
            taint = Taint(str(func), self.names(*inputs), reason)
        for tensor in outputs:
            if taint is not None:
                self.learn(tensor, taint)
                continue
            casts = tuple(cast for shadow in shadows for cast in shadow.casts)
            if any(shadow.dtype != tensor.dtype for shadow in shadows):
                casts += (tensor.dtype,)
            content: Layout | torch.Tensor | None = None
            if packet in COPIES and isinstance(shadows[0].content, Layout) and inputs[0].numel():
                content = shadows[0].content.copied(inputs[0], tensor)
            if content is None:
                content = self._new_table(tensor)
                moved = self._moved(func, args, kwargs)
                content.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(moved)
            self.learn(tensor, content, casts)

    def overwrite(self, func: Any, args: Any, kwargs: dict[str, Any], dst: torch.Tensor) -> None:
        """Describe scratch memory after an in-place operation on ``dst``, the first argument."""
        others = [tensor for tensor in tensors_in(args, kwargs) if tensor is not dst]
        packet = func.overloadpacket
        taint = self.taint_of(func, [dst, *others])
        filled_from_source = packet in FILLS and any(self.shadow(tensor) for tensor in others)
        if packet not in MOVEMENTS_IN_PLACE | FILLS or filled_from_source:
            reason = "the loader computes with the source instead of copying it"
            taint = taint or Taint(str(func), self.names(dst, *others), reason)
        if taint is not None:
            self.learn(dst, taint)
            return
        shadows = [shadow for tensor in (dst, *others) if (shadow := self.shadow(tensor))]
        known = self.shadow(dst)
        table = known.table() if known else self._new_table(dst)
        self.learn(dst, table, (*(cast for shadow in shadows for cast in shadow.casts), dst.dtype))
        self.write_addresses(func, args, kwargs, self.addresses(dst))

    def write_addresses(self, func: Any, args: Any, kwargs: dict[str, Any], into: torch.Tensor) -> None:
        """Apply an in-place movement or fill to ``into``, addresses that stand for the first argument."""
        if func.overloadpacket in FILLS:
            into.fill_(CONSTANT)
        elif func.overloadpacket is _aten.copy_:
            into.copy_(self.addresses(args[1]))
        else:
            func(into, *replace_tensors(args[1:], self._stand_in), **kwargs)

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Addresses in place of values; an untracked integer tensor is an index and stays."""
        is_index = not tensor.is_floating_point() and not self.shadow(tensor)
        return tensor.cpu() if is_index else self.addresses(tensor)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        if func.overloadpacket in COPIES:
            return self.addresses(args[0])
        args, kwargs = replace_tensors((args, kwargs), self._stand_in)
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_ADDRESSES}
        if func.overloadpacket is _aten.constant_pad_nd:
            args, kwargs = (*args[:2], CONSTANT), {}
        moved: torch.Tensor = func(*args, **kwargs)
        return moved

    def _new_table(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
        return torch.full((count,), CONSTANT, dtype=torch.int64, device="cpu")
