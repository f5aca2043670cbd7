"""What changed in a bucket since it was last sent, in the shortest of three forms, without loss.

A bucket is compared by units, its smallest element: two bytes for bfloat16. Whether a unit changed is
a matter of its bits, so NaNs and signed zeros arrive as they are.

=======  =================================================================  ==================
form     payload                                                            bytes, k of n units
=======  =================================================================  ==================
dense    every unit                                                         n u
index    changed units; how many in each 65,536; their places in these      k u + 2 k + n / 16384
bitmap   changed units; one bit for each unit                               k u + n / 8
=======  =================================================================  ==================

In bfloat16 the index is shortest below 6% of change, the bitmap above. Where more than some 20% of the units
changed, finding and placing them takes longer than sending all: then the bucket is dense.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from concurrent.futures import Executor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.errors import ProtocolError
from bridge.wire.checksum import as_bytes

_WORD = 8
_CHUNK_BYTES = 2 << 20  # compared at once: positions take many times the memory of what they point to
_CHUNK_CHANGES = 1 << 20  # placed at once
_MOST_WORDS = 0.6  # changed words beyond this are not looked into; 20% of bfloat16 units, spread evenly
_BLOCK = 1 << 16  # units whose places fit in two bytes
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


_Bytes = NDArray[Any]
_Places = NDArray[np.int64]
Piece = tuple[torch.Tensor, torch.Tensor]  # uint8 [n] as it is now, and as it is remembered


class Form(enum.IntEnum):
    """How a bucket travels."""

    DENSE = 0
    INDEX = 1
    BITMAP = 2


class Changes(NamedTuple):
    """``positions`` int64 [k], ascending, in units; ``values`` int [k], the bits that are there now."""

    positions: torch.Tensor
    values: torch.Tensor


def unit_of(itemsizes: Sequence[int]) -> int:
    """The unit of a bucket, in bytes: what every element of it is made of."""
    return math.gcd(*itemsizes)


def units(data: torch.Tensor, unit: int) -> torch.Tensor:
    """uint8 [n] as integers of ``unit`` bytes each."""
    return data.view(_INTEGERS[unit])


def take_changes(pieces: Sequence[Piece], unit: int, workers: Executor) -> Changes | None:
    """Where two states of a bucket differ; the remembered one is brought up to the other.

    None if so much changed that it is not worth saying where: then it is left in between.

    Args:
        pieces: the bucket, in order.
        unit: bytes; divides the length of every piece.
        workers: look at several chunks at a time.
    """
    limit = _MOST_WORDS * sum(now.numel() for now, _ in pieces) / _WORD
    at, pending = 0, []
    for now, before in pieces:
        for start in range(0, now.numel(), _CHUNK_BYTES):
            chunk = slice(start, start + _CHUNK_BYTES)
            pending.append(
                workers.submit(_differences, at + start, now[chunk].numpy(), before[chunk].numpy(), unit)
            )
        at += now.numel()
    found, num_words = [], 0
    try:
        for task in pending:
            positions, values, in_words = task.result()
            num_words += in_words
            if num_words > limit:
                return None
            found.append((positions, values))
    finally:
        for task in pending:
            task.cancel()
        wait(pending)  # nobody may read the weights, or write the remembered state, any more
    return Changes(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)))


def _differences(first: int, now: _Bytes, before: _Bytes, unit: int) -> tuple[_Places, _Bytes, int]:
    """Positions and values of the units that differ, and how many words those lie in; ``before`` follows.

    Words first: four times fewer comparisons than by bfloat16 elements, and few words differ. numpy works in
    one thread, lets others run, and is fastest to find what is set. Shifts are faster than divisions.
    ``first`` is the byte at which the states begin.
    """
    whole = len(now) - len(now) % _WORD
    current, previous = (state[:whole].view(np.int64) for state in (now, before))
    words = np.flatnonzero(current != previous)
    there = current.take(words)
    differ = (there ^ previous.take(words)).view(_DTYPES[unit]) != 0
    previous[words] = there
    nth = np.flatnonzero(differ)
    per_word = _WORD // unit
    bits = per_word.bit_length() - 1
    positions = (words.take(nth >> bits) << bits) | (nth & (per_word - 1))
    values = there.view(_DTYPES[unit]).take(nth)
    if whole < len(now):
        current, previous = (state[whole:].view(_DTYPES[unit]) for state in (now, before))
        tail = np.flatnonzero(current != previous)
        positions = np.concatenate((positions, tail + whole // unit))
        values = np.concatenate((values, current[tail]))
        previous[tail] = current[tail]
    return positions + first // unit, values, len(words)


def encode(changes: Changes, nbytes: int, unit: int) -> tuple[Form, torch.Tensor]:
    """The shortest form that says ``changes`` of a bucket of ``nbytes``, and its payload, uint8 [m].

    The payload of the dense form is the bucket itself, and not returned; no change at all has none.
    """
    count, total = changes.positions.numel(), nbytes // unit
    sizes = {form: payload_bytes(form, count, nbytes, unit) for form in Form}
    form = min(sizes, key=lambda f: sizes[f])
    if form is Form.DENSE or not count:
        return form, torch.empty(0, dtype=torch.uint8)
    if form is Form.INDEX:
        ends = torch.arange(-(-total // _BLOCK) + 1) * _BLOCK
        counts = torch.searchsorted(changes.positions, ends).diff()
        places = changes.positions.to(torch.int16)  # which keeps the lowest 16 bits: the place in the block
        where = torch.cat((as_bytes(counts.to(torch.int32)), as_bytes(places)))
    else:
        mask = np.zeros(total, dtype=np.bool_)
        mask[changes.positions.numpy()] = True
        where = torch.from_numpy(np.packbits(mask, bitorder="little"))
    return form, torch.cat((as_bytes(changes.values), where))


def payload_bytes(form: Form, count: int, nbytes: int, unit: int) -> int:
    """Bytes of a payload that says ``count`` changed units of a bucket of ``nbytes``."""
    total = nbytes // unit
    if form is Form.DENSE:
        return nbytes
    if form is Form.INDEX:
        return count * (unit + 2) + 4 * -(-total // _BLOCK) if count else 0
    return count * unit + -(-total // 8)


def decode(form: Form, payload: torch.Tensor, count: int, nbytes: int, unit: int) -> Changes:
    """Read a payload of ``count`` changes, at least one, in the index or bitmap form; it comes from outside.

    Raises:
        ProtocolError: its places do not rise, lie outside the bucket, or are not ``count``.
    """
    total, split = nbytes // unit, count * unit
    # Slices lie at any offset; a copy of theirs is aligned.
    values, where = units(payload[:split].clone(), unit), payload[split:].clone()
    if form is Form.INDEX:
        blocks = -(-total // _BLOCK)
        counts = where[: 4 * blocks].clone().view(torch.int32).long()
        places = where[4 * blocks :].clone().view(torch.int16).long() & (_BLOCK - 1)
        if bool((counts < 0).any()) or int(counts.sum()) != count:
            raise ProtocolError(f"a bucket's index counts {int(counts.sum())} changes, its header {count}")
        positions = torch.repeat_interleave(torch.arange(blocks) * _BLOCK, counts) + places
    else:
        mask = np.unpackbits(where.numpy(), bitorder="little").view(np.bool_)
        positions = torch.from_numpy(np.flatnonzero(mask))
        if positions.numel() != count:
            raise ProtocolError(f"a bucket's bitmap has {positions.numel()} changes, its header {count}")
    if int(positions[-1]) >= total or bool((positions[1:] <= positions[:-1]).any()):
        raise ProtocolError(f"the places of {count} changes do not rise within a bucket of {total} units")
    return Changes(positions, values)


def scatter(place: torch.Tensor, changes: Changes, unit: int) -> None:
    """Write changes of one copy to where it lies; positions count from its first unit, in row-major order.

    Args:
        place: the copy's elements, any shape and strides, on any device.
        changes: its own, and no others'.
        unit: bytes; divides the element size of ``place``.
    """
    for start in range(0, changes.positions.numel(), _CHUNK_CHANGES):
        part = slice(start, start + _CHUNK_CHANGES)
        _scatter(place, Changes(changes.positions[part], changes.values[part]), unit)


def _scatter(place: torch.Tensor, changes: Changes, unit: int) -> None:
    ratio = place.element_size() // unit
    positions = changes.positions.to(place.device)
    if place.is_contiguous():
        units(as_bytes(place), unit).index_copy_(0, positions, changes.values.to(place.device))
        return
    rest, offset = positions // ratio, torch.zeros_like(positions)
    for size, stride in zip(reversed(place.shape), reversed(place.stride()), strict=True):
        offset += rest % size * stride
        rest = rest // size
    span = 1 + sum((n - 1) * s for n, s in zip(place.shape, place.stride(), strict=True))
    flat = place.as_strided((span,), (1,)).view(_INTEGERS[unit])
    flat[offset * ratio + positions % ratio] = changes.values.to(place.device)
