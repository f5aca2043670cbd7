"""Where elements came from: addresses of source elements, and their affine pieces.

Every source tensor owns a range of *addresses*, one per element. A storage that was filled from sources is
described either by a ``Layout`` (one closed formula; costs nothing) or by a table of int64 addresses (one per
element; for what no formula describes, such as ``cat`` of two sources). Nothing here knows of models.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from bridge.errors import MappingError
from bridge.protocol.region import Dim, merge_dims

CONSTANT = -(1 << 61)  # address of an element that holds a constant, not a source's value
KEEP = -(1 << 60)  # address of an element that the operation leaves as it is
MAX_PIECES = 65536  # per copy; beyond it the mapping would cost more than the weights


@dataclasses.dataclass(frozen=True)
class Piece:
    """One affine copy: ``size`` elements from ``address`` on, to ``offset`` on; strides in elements."""

    size: tuple[int, ...]
    address: int
    src_stride: tuple[int, ...]
    offset: int
    dst_stride: tuple[int, ...]

    @property
    def last_address(self) -> int:
        return self.address + last_index(self.size, self.src_stride)


def last_index(size: Sequence[int], stride: Sequence[int]) -> int:
    """Offset of the last element relative to the first; strides are not negative."""
    return sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def coalesce(piece: Piece) -> Piece:
    """The same copy with its dimensions in destination order and mergeable ones merged: a normal form."""
    dims = sorted(
        (Dim(*dim) for dim in zip(piece.size, piece.src_stride, piece.dst_stride, strict=True)),
        key=lambda dim: (dim.dst, dim.src),
        reverse=True,
    )
    sizes, srcs, dsts = zip(*(merge_dims(dims) or [Dim(1, 1, 1)]), strict=True)
    return Piece(sizes, piece.address, srcs, piece.offset, dsts)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A dense storage whose position, read in a mixed radix, gives the address.

    ``digits`` are (count, place, step), most significant first: position = sum(d * place), address =
    base + sum(d * step). A fresh source is one digit (numel, 1, 1).
    """

    base: int
    digits: tuple[tuple[int, int, int], ...]

    @classmethod
    def identity(cls, base: int, numel: int) -> Layout:
        return cls(base, ((numel, 1, 1),))

    def resolve(
        self, size: Sequence[int], stride: Sequence[int], offset: int
    ) -> tuple[int, list[tuple[int, int, int, int]]] | None:
        """Describe a view of this storage by addresses.

        Returns:
            The first address, and parts (dim, count, multiplier, step): index i of ``dim`` is the sum of
            multiplier * j over that dim's parts, and moves the address by step * j. None if the view is
            not affine in that sense.
        """
        base, used, rest = self.base, [], offset
        for _, place, step in self.digits:
            digit, rest = divmod(rest, place)
            used.append(digit)
            base += digit * step
        parts: list[tuple[int, int, int, int]] = []
        for dim, (count, jump) in enumerate(zip(size, stride, strict=True)):
            split = self._split(dim, count, jump, used)
            if split is None:
                return None
            parts += split
        return base, parts

    def _split(
        self, dim: int, count: int, jump: int, used: list[int]
    ) -> list[tuple[int, int, int, int]] | None:
        """Distribute one view dimension over the digits, carrying where it outgrows one."""
        if jump == 0:
            return [(dim, count, 1, 0)] if count > 1 else []
        parts, multiplier = [], 1
        while count > 1:
            level = next((i for i, (_, place, _) in enumerate(self.digits) if place <= jump), None)
            if level is None:
                return None
            radix, place, step = self.digits[level]
            skip, odd = divmod(jump, place)
            if odd or skip >= radix:
                return None
            fits = (radix - 1 - used[level]) // skip + 1
            if count > fits:
                wrap = radix // skip
                if radix % skip or used[level] >= skip or count % wrap or level == 0:
                    return None
                fits = wrap
            taken = min(count, fits)
            parts.append((dim, taken, multiplier, skip * step))
            used[level] += skip * (taken - 1)
            count, multiplier, jump = count // taken, multiplier * taken, radix * place
        return parts

    def pieces(self, view: torch.Tensor, dst: torch.Tensor) -> list[Piece] | None:
        """The copy of ``view`` (of this storage) to ``dst`` of equal shape; None if it is not affine."""
        found = self.resolve(view.shape, view.stride(), int(view.storage_offset()))
        if found is None:
            return None
        address, parts = found
        return [
            Piece(
                tuple(count for _, count, _, _ in parts),
                address,
                tuple(step for *_, step in parts),
                int(dst.storage_offset()),
                tuple(multiplier * dst.stride(dim) for dim, _, multiplier, _ in parts),
            )
        ]

    def copied(self, view: torch.Tensor, copy: torch.Tensor) -> Layout | None:
        """The layout of ``copy``'s new storage after ``copy = view.clone()``; None if there is none."""
        found = self.resolve(view.shape, view.stride(), int(view.storage_offset()))
        if found is None or copy.storage_offset() != 0:
            return None
        base, parts = found
        digits = [(count, multiplier * copy.stride(dim), step) for dim, count, multiplier, step in parts]
        digits.sort(key=lambda digit: digit[1], reverse=True)
        merged: list[tuple[int, int, int]] = []
        for count, place, step in digits:
            if merged and merged[-1][1] != count * place:
                return None  # the copy is not dense, so its positions are no mixed radix
            if merged and merged[-1][2] == count * step:
                merged[-1] = (merged[-1][0] * count, place, step)
            else:
                merged.append((count, place, step))
        if merged and merged[-1][1] != 1:
            return None
        return Layout(base, tuple(merged or [(1, 1, 1)]))

    def table(self) -> torch.Tensor:
        """All addresses, flat int64, one per element of the storage."""
        addresses = torch.tensor(self.base, dtype=torch.int64, device="cpu")
        for count, _, step in self.digits:
            addresses = addresses[..., None] + torch.arange(count, dtype=torch.int64, device="cpu") * step
        return addresses.flatten()


def table_pieces(addresses: torch.Tensor, dst: torch.Tensor) -> list[Piece]:
    """Decompose a copy given by an address per element into affine pieces.

    Args:
        addresses: int64, of ``dst``'s shape; may hold ``CONSTANT`` and ``KEEP`` (``KEEP`` yields nothing).
        dst: the destination view.

    Raises:
        MappingError: more than ``MAX_PIECES`` would be needed.
    """
    found = list(
        itertools.islice(_decompose(addresses, int(dst.storage_offset()), dst.stride()), MAX_PIECES + 1)
    )
    if len(found) > MAX_PIECES:
        raise MappingError(
            f"the copy of {addresses.numel()} elements is not made of at most {MAX_PIECES} affine pieces"
        )
    return [piece for piece in found if piece.address != KEEP]


def _decompose(addresses: torch.Tensor, offset: int, strides: Sequence[int]) -> Iterator[Piece]:
    """Factor out the regular dimensions; cut the first irregular one into runs and go on within them."""
    if addresses.numel() == 0:
        return
    factored: list[tuple[int, int, int]] = []
    free = list(strides)
    dim = 0
    while dim < addresses.ndim:
        step = _uniform_step(addresses, dim)
        if step is None:
            dim += 1
            continue
        if addresses.shape[dim] > 1:
            factored.append((addresses.shape[dim], step, free[dim]))
        addresses = addresses.select(dim, 0)
        del free[dim]
    if addresses.ndim:
        for piece in _cut(addresses, offset, free):
            yield _extend(piece, factored)
        return
    yield _extend(Piece((), int(addresses), (), offset, ()), factored)


def _extend(piece: Piece, dims: list[tuple[int, int, int]]) -> Piece:
    sizes, srcs, dsts = zip(*dims, strict=True) if dims else ((), (), ())
    return Piece(
        sizes + piece.size, piece.address, srcs + piece.src_stride, piece.offset, dsts + piece.dst_stride
    )


def _uniform_step(addresses: torch.Tensor, dim: int) -> int | None:
    """The one step between neighbours along ``dim``, or None if it varies or mixes kinds of address."""
    count = addresses.shape[dim]
    if count == 1:
        return 0
    first, rest = addresses.narrow(dim, 0, count - 1), addresses.narrow(dim, 1, count - 1)
    difference = rest - first
    step = int(difference.flatten()[0])
    if step < 0 or step >= -KEEP // 2 or not bool((difference == step).all()):
        return None  # as_strided knows no negative strides; giant steps lead from a constant to a source
    return step


def _cut(addresses: torch.Tensor, offset: int, strides: Sequence[int]) -> Iterator[Piece]:
    """Cut dimension 0, which is irregular: into equal runs if it has them (one more dimension), else runs."""
    count = addresses.shape[0]
    steps = (addresses[1:] - addresses[:-1]).reshape(count - 1, -1)
    regular = (steps == steps[:, :1]).all(dim=1) & (steps[:, 0] >= 0) & (steps[:, 0] < -KEEP // 2)
    values = [step if ok else None for step, ok in zip(steps[:, 0].tolist(), regular.tolist(), strict=True)]
    starts = [0]
    for index in range(1, count):
        step = values[index - 1]
        begun = index - starts[-1]
        if step is None or (begun > 1 and step != values[index - 2]):
            starts.append(index)
    run = starts[1] if len(starts) > 1 else count
    if 1 < run < count and count % run == 0 and starts == list(range(0, count, run)):
        yield from _decompose(
            addresses.unflatten(0, (count // run, run)), offset, (run * strides[0], *strides)
        )
        return
    for start, end in itertools.pairwise([*starts, count]):
        yield from _decompose(addresses[start:end], offset + start * strides[0], strides)


def extent(size: Sequence[int], stride: Sequence[int], offset: int) -> tuple[int, int]:
    """First element and one past the last that a view touches; empty views touch nothing."""
    if math.prod(size) == 0:
        return offset, offset
    return offset, offset + last_index(size, stride) + 1
