"""Which part of a write a shard can serve: affine views cut by boxes, without looking at single elements.

A mapping ``Write`` reads an affine view of a flat, row-major source. A trainer rank holds a box of it.
``box_write`` ties every dimension of the view to one dimension of the source, so that ``intersect`` can clip
dimension by dimension. Both are exact for any view; views that walk across the source's dimensions (a
reshape that does not divide them) come apart into several boxes.

All offsets, strides, sizes and steps are counted in elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bridge.errors import MappingError
from bridge.protocol.mapping import Source, Write

MAX_BOXES = 16384  # a write in more pieces than this is no slice of a tensor but a gather
BROADCAST = -1  # the source dim of an axis that rereads the same elements


class Axis(NamedTuple):
    """One dimension of a view: ``length`` indices of source dim ``dim``, ``step`` apart."""

    dim: int
    step: int
    length: int
    dst_stride: int


class Box(NamedTuple):
    """A view whose every index stays within the source dim it is tied to.

    ``start`` is the source index of the first element. Several axes may be tied to one dim.
    """

    start: tuple[int, ...]
    axes: tuple[Axis, ...]
    dst_offset: int


class Piece(NamedTuple):
    """The part of a write that one shard serves; ``src_*`` within the shard's contiguous memory."""

    size: tuple[int, ...]
    src_offset: int
    src_stride: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return math.prod(self.size)


class Dim(NamedTuple):
    """One dimension of a strided copy: count, source stride, target stride."""

    length: int
    src: int
    dst: int


class _View(NamedTuple):
    src_offset: int
    dst_offset: int
    dims: tuple[Dim, ...]


class _Grid(NamedTuple):
    """The source's dims longer than 1, outermost first: their indices, strides and extents."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    extents: tuple[int, ...]
    ndim: int


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides, stride = [], 1
    for extent in reversed(shape):
        strides.append(stride)
        stride *= extent
    return tuple(reversed(strides))


def merge_dims(dims: Iterable[Dim]) -> list[Dim]:
    """Drop dims of 1, and join neighbours that both sides walk without a break."""
    merged: list[Dim] = []
    for count, src, dst in dims:
        if count == 1:
            continue
        outer = 1
        if merged and merged[-1].src == count * src and merged[-1].dst == count * dst:
            outer = merged.pop().length
        merged.append(Dim(outer * count, src, dst))
    return merged


# --- tying a view to the source's dimensions ----------------------------------------------------------


def box_write(write: Write, source: Source, *, target: str, head_dim: int = 0) -> tuple[Box, ...]:
    """Bring a write into boxed form; the boxes hold each of its elements exactly once.

    Args:
        write: the affine views.
        source: the tensor it reads.
        target: name of the tensor it fills, for the error message.
        head_dim: if not 0, the boxes are of the source with the two halves of every ``head_dim`` rows
            interleaved, which is how the trainer holds it.

    Raises:
        MappingError: it reads outside the source, or it is too irregular to be cut into boxes.
    """
    if write.numel == 0:
        return ()
    last = write.src_offset + sum((n - 1) * s for n, s in zip(write.size, write.src_stride, strict=True))
    if write.src_offset < 0 or min(write.src_stride, default=0) < 0 or last >= source.numel:
        raise MappingError(
            f"{source.name}: the write to {target} reads elements {write.src_offset} to {last} of "
            f"{source.numel} (size {write.size}, strides {write.src_stride}, shape {source.shape})"
        )
    heads = (source.shape[0] // head_dim, 2, head_dim // 2, *source.shape[1:]) if head_dim else source.shape
    grid = _grid(heads)
    dims = merge_dims([Dim(*dim) for dim in zip(write.size, write.src_stride, write.dst_stride, strict=True)])
    pending = [_View(write.src_offset, write.dst_offset, tuple(dims))]
    boxes: list[Box] = []
    while pending:
        tied = _tie(pending.pop(), grid)
        if isinstance(tied, Box):
            boxes.append(tied)
        elif len(boxes) + len(pending) + len(tied) <= MAX_BOXES:
            pending += reversed(tied)
        else:
            raise MappingError(
                f"{source.name}: the write to {target} cannot be cut into {MAX_BOXES} or fewer boxes of "
                f"shape {source.shape} (size {write.size}, offset {write.src_offset}, strides "
                f"{write.src_stride})"
            )
    return tuple(_interleave(box, head_dim) for box in boxes) if head_dim else tuple(boxes)


def _interleave(box: Box, head_dim: int) -> Box:
    """A box over (head, half, row of the half, ..) as one over rows in which the halves alternate."""
    head, half, index, *rest = box.start
    steps = (head_dim, 1, 2, *(1 for _ in rest))
    axes = tuple(
        axis
        if axis.dim == BROADCAST
        else axis._replace(dim=max(axis.dim - 2, 0), step=axis.step * steps[axis.dim])
        for axis in box.axes
    )
    return Box((head * head_dim + 2 * index + half, *rest), axes, box.dst_offset)


def _grid(shape: tuple[int, ...]) -> _Grid:
    strides = row_major(shape)
    kept = tuple(k for k, extent in enumerate(shape) if extent > 1)
    return _Grid(kept, tuple(strides[k] for k in kept), tuple(shape[k] for k in kept), len(shape))


def _tie(view: _View, grid: _Grid) -> Box | Sequence[_View]:
    """The box of a view, or smaller views with the same elements, to be tied in turn."""
    tied: dict[int, list[int]] = {}
    axes: list[Axis] = []
    for j, dim in enumerate(view.dims):
        if dim.src == 0:
            axes.append(Axis(BROADCAST, 0, dim.length, dim.dst))
            continue
        g = next(i for i, stride in enumerate(grid.strides) if stride <= dim.src)
        if dim.src % grid.strides[g]:
            return _enumerate(view, j)  # a diagonal walk: each of its steps changes several indices
        axes.append(Axis(grid.dims[g], dim.src // grid.strides[g], dim.length, dim.dst))
        tied.setdefault(g, []).append(j)
    start = [0] * grid.ndim
    for g, k in enumerate(grid.dims):
        start[k] = first = view.src_offset // grid.strides[g] % grid.extents[g]
        reach = sum((axes[j].length - 1) * axes[j].step for j in tied.get(g, ()))
        if first + reach >= grid.extents[g]:
            outer = max(tied[g], key=lambda j: (axes[j].step, -j))
            rest = reach - (axes[outer].length - 1) * axes[outer].step
            return _split(view, outer, step=axes[outer].step, extent=grid.extents[g], first=first, rest=rest)
    return Box(tuple(start), tuple(axes), view.dst_offset)


def _split(view: _View, j: int, *, step: int, extent: int, first: int, rest: int) -> Sequence[_View]:
    """Cut dim ``j`` where it walks over the end of its source dim (``extent``) into the next outer one.

    ``first`` is the index it starts at; ``rest`` how far the other dims tied to the same source dim reach.
    """
    count, src, dst = view.dims[j]
    if extent % step == 0 and first % step + rest < step:
        # Every pass over the source dim looks the same: a rest of one, whole ones, a part of one.
        period = extent // step
        head = min(count, period - first // step) if first >= step else 0
        passes, tail = divmod(count - head, period)
        whole = (Dim(passes, period * src, period * dst), Dim(period, src, dst))
        after = head + passes * period
        parts = [
            _part(view, j, 0, (Dim(head, src, dst),)),
            _part(view, j, head, whole),
            _part(view, j, after, (Dim(tail, src, dst),)),
        ]
        return [part for part in parts if part is not None]
    if rest == 0:
        head = (extent - 1 - first) // step + 1
        parts = [
            _part(view, j, 0, (Dim(head, src, dst),)),
            _part(view, j, head, (Dim(count - head, src, dst),)),
        ]
        return [part for part in parts if part is not None]
    return _enumerate(view, j)


def _part(view: _View, j: int, first: int, dims: tuple[Dim, ...]) -> _View | None:
    """``view`` from index ``first`` of dim ``j`` on, with that dim replaced; None if it is empty."""
    if not all(dim.length for dim in dims):
        return None
    src_offset = view.src_offset + first * view.dims[j].src
    dst_offset = view.dst_offset + first * view.dims[j].dst
    # No merging here: it would undo the cut.
    kept = tuple(dim for dim in (*view.dims[:j], *dims, *view.dims[j + 1 :]) if dim.length > 1)
    return _View(src_offset, dst_offset, kept)


class _Unrolled(Sequence[_View]):
    """The views of a dim taken index by index; lazy, so that a hopeless one costs no memory."""

    def __init__(self, view: _View, j: int) -> None:
        self._view, self._j = view, j

    def __len__(self) -> int:
        return self._view.dims[self._j].length

    def __getitem__(self, i: int) -> _View:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = _part(self._view, self._j, i, ())
        assert part is not None  # nothing was put in the dim's place
        return part


def _enumerate(view: _View, j: int) -> Sequence[_View]:
    return _Unrolled(view, j)


# --- cutting a box by a shard ------------------------------------------------------------------------


def intersect(boxes: Sequence[Box], offset: Sequence[int], shape: Sequence[int]) -> list[Piece]:
    """The parts of a boxed write whose source elements lie in the shard at ``offset`` of ``shape``.

    Adjacent dims are merged where both sides are contiguous, so one run of memory is one 1-D piece.
    """
    if 0 in shape:
        return []
    strides = row_major(shape)
    ends = [lo + extent for lo, extent in zip(offset, shape, strict=True)]
    return [_localise(part, offset, strides) for box in boxes for part in _clip(box, 0, offset, ends)]


def _clip(box: Box, first: int, offset: Sequence[int], ends: Sequence[int]) -> Iterator[Box]:
    """The parts of ``box`` inside [offset, ends) in source dims ``first`` and further in."""
    for k in range(first, len(ends)):
        low = high = box.start[k]
        for dim, step, length, _ in box.axes:
            if dim == k:
                high += (length - 1) * step
        if high < offset[k] or low >= ends[k]:
            return
        if low < offset[k] or high >= ends[k]:
            for part in _cut(box, k, offset[k], ends[k], high - low):
                yield from _clip(part, k, offset, ends)
            return
    yield box


def _cut(box: Box, k: int, low: int, end: int, reach: int) -> Iterator[Box]:
    """Cut the outermost axis tied to source dim ``k`` into what lies inside [low, end) and its edges.

    Where other axes are tied to the same dim, an index of this one may lie partly inside: it is taken alone
    and the caller cuts it further. Between those edges all indices lie wholly inside, as one part.
    """
    j = -1
    step = count = 0
    for i, axis in enumerate(box.axes):
        if axis.dim == k and axis.step > step:
            j, step, count = i, axis.step, axis.length
    start, rest = box.start[k], reach - (count - 1) * step
    touched = max(0, -((start + rest - low) // step))
    touched_end = min(count, (end - 1 - start) // step + 1)
    inside = max(0, -((start - low) // step))
    inside_end = min(count, (end - 1 - rest - start) // step + 1)
    if inside >= inside_end:
        inside = inside_end = touched_end
    for i in range(touched, inside):
        yield _take(box, k, j, i, 1)
    if inside < inside_end:
        yield _take(box, k, j, inside, inside_end - inside)
    for i in range(inside_end, touched_end):
        yield _take(box, k, j, i, 1)


def _take(box: Box, k: int, j: int, first: int, count: int) -> Box:
    """``box`` with axis ``j`` narrowed to ``count`` indices from ``first`` on; a single one needs no axis."""
    axis = box.axes[j]
    start = (*box.start[:k], box.start[k] + first * axis.step, *box.start[k + 1 :])
    kept = (Axis(k, axis.step, count, axis.dst_stride),) if count > 1 else ()
    axes = (*box.axes[:j], *kept, *box.axes[j + 1 :])
    return Box(start, axes, box.dst_offset + first * axis.dst_stride)


def _localise(box: Box, offset: Sequence[int], strides: Sequence[int]) -> Piece:
    src_offset = 0
    for start, low, stride in zip(box.start, offset, strides, strict=True):
        src_offset += (start - low) * stride
    # A broadcast axis has step 0, whatever stride BROADCAST picks here.
    dims = [Dim(n, step * strides[k] if step else 0, dst) for k, step, n, dst in box.axes]
    if len(dims) > 1:
        # The order in which elements travel is free; the target's memory order leaves the longest runs.
        dims.sort(key=_memory_order)
        dims = merge_dims(dims)
    if not dims:
        return Piece((), src_offset, (), box.dst_offset, ())
    size, src, dst = zip(*dims, strict=True)
    return Piece(size, src_offset, src, box.dst_offset, dst)


def _memory_order(dim: Dim) -> tuple[int, int]:
    return -dim.dst, -dim.src
