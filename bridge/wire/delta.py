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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.errors import ProtocolError
from bridge.wire.checksum import as_bytes

_WORD = 8
_CHUNK_BYTES = 2 << 20  # compared at once: positions take many times the memory of what they point to
_DEVICE_CHUNK_BYTES = 16 << 20  # the same on a GPU, where each chunk is a wait for the device
_MOST = 0.6  # changed words beyond this are not looked into; 20% of bfloat16 units, spread evenly
_BLOCK = 1 << 16  # units whose places fit in two bytes
_BLOCKS_AT_ONCE = 64  # put in place at once: what takes part then fits in a core's cache
_DEVICE_BLOCKS_AT_ONCE = 1 << 14  # the same on a GPU, where each part is a kernel that a forward waits for
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


_Bytes = NDArray[Any]
Piece = tuple[torch.Tensor, torch.Tensor]  # uint8 [n] as it is now, and as it is remembered


class Form(enum.IntEnum):
    """How a bucket travels."""

    DENSE = 0
    INDEX = 1
    BITMAP = 2


class Changes(NamedTuple):
    """What changed in a bucket, nearly as it travels; on the device that it was found on.

    ``counts`` int32 [blocks] of 65,536 units each; ``places`` int16 [k], the lowest 16 bits of each changed
    unit's position, ascending within a block; ``values`` int [k], the bits that are there now.
    """

    counts: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor


class Part(NamedTuple):
    """``positions`` int64 [k], ascending, in units from the bucket's first; ``values`` int [k]."""

    positions: torch.Tensor
    values: torch.Tensor


class _Found(NamedTuple):
    """``Changes`` of one chunk, ``counts`` from block ``first`` on; ``nbytes`` had to be looked into."""

    first: int
    counts: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor
    nbytes: int


def unit_of(itemsizes: Sequence[int]) -> int:
    """The unit of a bucket, in bytes: what every element of it is made of."""
    return math.gcd(*itemsizes)


def units(data: torch.Tensor, unit: int) -> torch.Tensor:
    """uint8 [n] as integers of ``unit`` bytes each."""
    return data.view(_INTEGERS[unit])


class Search:
    """Where two states of a bucket differ; the remembered one is brought up to the other.

    In host memory it begins at once, in ``workers``; on a GPU, when the result is asked for. Nobody may write
    either state before ``result`` or ``drop`` has returned.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        unit: int,
        workers: Executor,
        *,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """``pieces`` are the bucket, in order, on one device; their lengths are multiples of ``unit`` bytes.

        ``workers`` look at several chunks at a time, once ``ready`` has returned.
        """
        self._nbytes = sum(now.numel() for now, _ in pieces)
        self._unit = unit
        self._device = pieces[0][0].device
        self._pending: list[Future[_Found]] = []
        self._waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        if self._device.type != "cpu":
            self._waiting = list(_chunks(pieces, _DEVICE_CHUNK_BYTES))
            return
        for chunk in _chunks(pieces, _CHUNK_BYTES):
            self._pending.append(workers.submit(_when, ready, *chunk, unit))

    def result(self) -> Changes | None:
        """Wait; None if too much changed to say where: then the remembered state is left in between."""
        blocks = -(-self._nbytes // (self._unit * _BLOCK))
        counts = torch.zeros(blocks, dtype=torch.int32, device=self._device)
        places, values, looked_into = [], [], 0
        try:
            for found in self._each():
                looked_into += found.nbytes
                if looked_into > _MOST * self._nbytes:
                    return None
                counts[found.first : found.first + len(found.counts)] += found.counts
                places.append(found.places)
                values.append(found.values)
        finally:
            self.drop()
        return Changes(counts, torch.cat(places), torch.cat(values))

    def _each(self) -> Iterator[_Found]:
        for task in self._pending:
            yield task.result()
        for chunk in self._waiting:
            yield _by_torch(*chunk, self._unit)

    def drop(self) -> None:
        """Look no further; on return nobody reads the weights or writes the remembered state any more."""
        for task in self._pending:
            task.cancel()
        wait(self._pending)
        self._pending, self._waiting = [], []


def _chunks(pieces: Sequence[Piece], nbytes: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The pieces cut where multiples of ``nbytes`` lie in the bucket, each with its first byte's place."""
    at = 0
    for now, before in pieces:
        start, end = 0, now.numel()
        while start < end:
            stop = min(end, start + nbytes - (at + start) % nbytes)
            yield at + start, now[start:stop], before[start:stop]
            start = stop
        at += end


def _when(
    ready: Callable[[], None] | None, first: int, now: torch.Tensor, before: torch.Tensor, unit: int
) -> _Found:
    if ready is not None:
        ready()
    return _in_host_memory(first, now, before, unit)


def _in_host_memory(first: int, now: torch.Tensor, before: torch.Tensor, unit: int) -> _Found:
    """The changes of one chunk, which begins at byte ``first`` of the bucket; ``before`` follows.

    Words first: four times fewer comparisons than by bfloat16 elements, and few words differ. numpy works in
    one thread, lets others run, and is fastest to find what is set. Shifts are faster than divisions.
    """
    states = (now.numpy(), before.numpy())
    whole = now.numel() - now.numel() % _WORD
    current, previous = (state[:whole].view(np.int64) for state in states)
    words = np.flatnonzero(current != previous)
    there = current.take(words)
    differ = (there ^ previous.take(words)).view(_DTYPES[unit]) != 0
    previous[words] = there
    nth = np.flatnonzero(differ)
    per_word = _WORD // unit
    bits = per_word.bit_length() - 1
    positions = (words.take(nth >> bits) << bits) | (nth & (per_word - 1))
    values = there.view(_DTYPES[unit]).take(nth)
    if whole < now.numel():
        current, previous = (state[whole:].view(_DTYPES[unit]) for state in states)
        tail = np.flatnonzero(current != previous)
        positions = np.concatenate((positions, tail + whole // unit))
        values = np.concatenate((values, current[tail]))
        previous[tail] = current[tail]
    positions += first // unit
    low, high = _blocks_of(first, now.numel(), unit)
    counts = np.diff(np.searchsorted(positions, np.arange(low, high + 1) * _BLOCK)).astype(np.int32)
    places = positions.astype(np.int16)  # which keeps the lowest 16 bits: the place in the block
    counted, placed, valued = (torch.from_numpy(array) for array in (counts, places, values))
    return _Found(low, counted, placed, valued, len(words) * _WORD)


def _by_torch(first: int, now: torch.Tensor, before: torch.Tensor, unit: int) -> _Found:
    """The same on any device."""
    current, previous = units(now, unit), units(before, unit)
    where = (current != previous).nonzero().flatten()
    values = current[where]
    previous[where] = values
    positions = where + first // unit
    low, high = _blocks_of(first, now.numel(), unit)
    ends = torch.arange(low, high + 1, device=now.device) * _BLOCK
    counts = torch.searchsorted(positions, ends).diff().to(torch.int32)
    return _Found(low, counts, positions.to(torch.int16), values, nbytes=where.numel() * unit)


def _blocks_of(first: int, nbytes: int, unit: int) -> tuple[int, int]:
    return first // unit // _BLOCK, -(-(first + nbytes) // unit // _BLOCK)


def encode(changes: Changes, nbytes: int, unit: int) -> tuple[Form, torch.Tensor]:
    """The shortest form that says ``changes`` of a bucket of ``nbytes``, and its payload, uint8 [m].

    The payload of the dense form is the bucket itself, and not returned; no change at all has none.
    """
    count = changes.places.numel()
    sizes = {form: payload_bytes(form, count, nbytes, unit) for form in Form}
    form = min(sizes, key=lambda f: sizes[f])
    if form is Form.DENSE or not count:
        return form, torch.empty(0, dtype=torch.uint8)
    if form is Form.INDEX:
        where = torch.cat((as_bytes(changes.counts), as_bytes(changes.places)))
    else:
        where = _bits(changes, nbytes // unit)
    return form, torch.cat((as_bytes(changes.values), where)).cpu()


def _bits(changes: Changes, total: int) -> torch.Tensor:
    """One bit for each unit, uint8 [ceil(total / 8)], on the changes' device; the lowest bit comes first."""
    blocks = torch.arange(len(changes.counts), device=changes.counts.device) * _BLOCK
    positions = torch.repeat_interleave(blocks, changes.counts.long())
    positions += changes.places.long() & (_BLOCK - 1)
    mask = torch.zeros(-(-total // 8) * 8, dtype=torch.bool, device=positions.device)
    mask[positions] = True
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    eights = mask.view(torch.uint8).view(-1, 8)
    bits = eights[:, 0].clone()
    for place in range(1, 8):
        bits |= eights[:, place] << place
    return bits


def payload_bytes(form: Form, count: int, nbytes: int, unit: int) -> int:
    """Bytes of a payload that says ``count`` changed units of a bucket of ``nbytes``."""
    total = nbytes // unit
    if form is Form.DENSE:
        return nbytes
    if form is Form.INDEX:
        return count * (unit + 2) + 4 * -(-total // _BLOCK) if count else 0
    return count * unit + -(-total // 8)


def decode(
    form: Form, payload: torch.Tensor, count: int, nbytes: int, unit: int, *, onto_gpu: bool = False
) -> Iterator[Part]:
    """Read a payload of ``count`` changes, at least one, in the index or bitmap form; it comes from outside.

    In parts that are best for where they are put then.

    Raises:
        ProtocolError: its places do not rise, lie outside the bucket, or are not ``count``. Parts before the
            fault have been yielded by then.
    """
    total, split = nbytes // unit, count * unit
    data = payload.numpy()
    values, where = data[:split].view(_DTYPES[unit]), data[split:]
    read = _read_index if form is Form.INDEX else _read_bitmap
    at = 0
    for positions in read(where, total, count, _DEVICE_BLOCKS_AT_ONCE if onto_gpu else _BLOCKS_AT_ONCE):
        if not len(positions):
            continue
        end = at + len(positions)
        if end > count:
            raise ProtocolError(f"a bucket names {end} changes or more, its header {count}")
        if positions[-1] >= total or (positions[1:] <= positions[:-1]).any():
            raise ProtocolError(f"the places of {count} changes do not rise within a bucket of {total} units")
        yield Part(torch.from_numpy(positions), torch.from_numpy(values[at:end]))
        at = end
    if at != count:
        raise ProtocolError(f"a bucket names {at} changes, its header {count}")


def _read_index(where: _Bytes, total: int, count: int, at_once: int) -> Iterator[NDArray[np.int64]]:
    blocks = -(-total // _BLOCK)
    counts = where[: 4 * blocks].view(np.int32)
    places = where[4 * blocks :].view(np.uint16)
    if (counts < 0).any() or counts.sum(dtype=np.int64) != count:
        raise ProtocolError(
            f"a bucket's index counts {counts.sum(dtype=np.int64)} changes, its header {count}"
        )
    ends = np.concatenate(([0], counts.cumsum(dtype=np.int64)))
    firsts = np.arange(blocks, dtype=np.int64) * _BLOCK
    for low in range(0, blocks, at_once):
        high = min(low + at_once, blocks)
        positions = np.repeat(firsts[low:high], counts[low:high])
        positions += places[ends[low] : ends[high]]
        yield positions


def _read_bitmap(where: _Bytes, _total: int, _count: int, at_once: int) -> Iterator[NDArray[np.int64]]:
    step = at_once * _BLOCK // 8
    for low in range(0, len(where), step):
        mask = np.unpackbits(where[low : low + step], bitorder="little").view(np.bool_)
        yield np.flatnonzero(mask) + 8 * low


def scatter(place: torch.Tensor, changes: Part, unit: int) -> None:
    """Write changes of one copy to where it lies; positions count from its first unit, in row-major order.

    Args:
        place: the copy's elements, any shape and strides, on any device.
        changes: its own, and no others'.
        unit: bytes; divides the element size of ``place``.
    """
    if place.is_contiguous() and place.device.type == "cpu":  # numpy takes two thirds of torch's time
        units(as_bytes(place), unit).numpy()[changes.positions.numpy()] = changes.values.numpy()
        return
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
