"""Cutting writes by shards, against torch's own views and copies as the oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import MappingError
from bridge.protocol import region
from bridge.protocol.mapping import Source, Write
from bridge.protocol.region import BROADCAST, Axis, Box, Piece, box_write, intersect, row_major

Shards = list[tuple[tuple[int, ...], tuple[int, ...]]]


def make_write(view: torch.Tensor, dst: torch.Tensor) -> Write:
    return Write(
        source=0,
        target=0,
        size=tuple(view.shape),
        src_offset=int(view.storage_offset()),
        src_stride=view.stride(),
        dst_offset=int(dst.storage_offset()),
        dst_stride=dst.stride(),
    )


def make_source(shape: tuple[int, ...]) -> Source:
    return Source(name="layers.0.w", shape=shape, dtype="int64")


def boxes_of(view: torch.Tensor, shape: tuple[int, ...], dst: torch.Tensor | None = None) -> tuple[Box, ...]:
    dst = torch.empty(view.shape, device="meta") if dst is None else dst
    return box_write(make_write(view, dst), make_source(shape), target="fused.weight")


def run_pieces(full: torch.Tensor, boxes: tuple[Box, ...], shards: Shards, out: torch.Tensor) -> None:
    """Do what the pieces say, from contiguous local shards, and count every element that is written."""
    written = torch.zeros_like(out)
    for offset, shape in shards:
        slices = tuple(slice(lo, lo + n) for lo, n in zip(offset, shape, strict=True))
        local = full[slices].clone(memory_format=torch.contiguous_format)
        for piece in intersect(boxes, offset, shape):
            assert not {0, 1} & set(piece.size)
            picked = local.as_strided(piece.size, piece.src_stride, piece.src_offset)
            out.as_strided(piece.size, piece.dst_stride, piece.dst_offset).copy_(picked)
            written.as_strided(piece.size, piece.dst_stride, piece.dst_offset).add_(1)
    assert int(written.max()) <= 1, "an element was written twice"


# --- random views and shardings ----------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """What loaders do: narrow, transpose, split, slice, flatten and expand, in any order."""
    view = torch.arange(math.prod(shape)).view(shape)
    for _ in range(draw(st.integers(0, 5))):
        view = draw(st.sampled_from([_narrow, _transpose, _unflatten, _step, _flatten, _expand, _select]))(
            draw, view
        )
    return view


def _dim(draw: st.DrawFn, view: torch.Tensor) -> int:
    return draw(st.integers(0, view.dim() - 1))


def _narrow(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    if not view.dim():
        return view
    dim = _dim(draw, view)
    start = draw(st.integers(0, max(0, view.shape[dim] - 1)))
    room = view.shape[dim] - start
    length = draw(st.integers(min(1, room), room)) if draw(st.integers(0, 19)) < 19 else 0
    return view.narrow(dim, start, length)


def _transpose(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    return view.permute(draw(st.permutations(range(view.dim()))))


def _unflatten(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    if not view.dim():
        return view.view(1)
    dim = _dim(draw, view)
    divisors = [n for n in range(1, view.shape[dim] + 1) if view.shape[dim] % n == 0]
    outer = draw(st.sampled_from(divisors)) if divisors else 0
    return torch.unflatten(view, dim, (outer, view.shape[dim] // outer)) if outer else view


def _step(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    if not view.dim():
        return view
    dim, step = _dim(draw, view), draw(st.integers(1, 3))
    return view.movedim(dim, 0)[draw(st.integers(0, step - 1)) :: step].movedim(0, dim)


def _flatten(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    for first in range(view.dim() - 1):
        try:
            return view.view(*view.shape[:first], -1)
        except RuntimeError:  # these dims cannot be one
            continue
    return view


def _expand(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    if view.dim() > 4:
        return view
    dim = draw(st.integers(0, view.dim()))
    size = [-1] * dim + [draw(st.integers(1, 3))] + [-1] * (view.dim() - dim)
    return view.unsqueeze(dim).expand(size)


def _select(draw: st.DrawFn, view: torch.Tensor) -> torch.Tensor:
    if not view.dim() or 0 in view.shape:
        return view
    dim = _dim(draw, view)
    return view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> Shards:
    """Boxes that make up the whole: cuts along any dims, with empty parts among them."""
    shards: Shards = [((), ())]
    for extent in shape:
        cuts = sorted(draw(st.lists(st.integers(0, extent), max_size=3)))
        edges = [0, *cuts, extent]
        spans = [(lo, hi - lo) for lo, hi in itertools.pairwise(edges)]
        shards = [((*o, lo), (*s, n)) for o, s in shards for lo, n in spans]
    return shards


shapes = st.lists(st.integers(1, 8), max_size=4).map(tuple)


@given(st.data(), shapes)
@settings(max_examples=250)
def test_pieces_of_any_partition_equal_the_write(data: st.DataObject, shape: tuple[int, ...]) -> None:
    full = torch.arange(math.prod(shape)).view(shape)
    view = data.draw(views(shape))
    order = data.draw(st.permutations(range(view.dim())))
    room = view.numel() + 6
    # The target: any memory order, with a gap behind each innermost row in some cases.
    padded = [view.shape[i] for i in order]
    pad = data.draw(st.integers(0, 1)) if padded else 0
    if padded:
        padded[-1] += pad
        room += math.prod(padded)
    flat = torch.full((room,), -1)
    memory = flat.as_strided(padded, row_major(padded), 3)
    back = sorted(range(view.dim()), key=lambda i: order[i])
    dst = memory[..., : padded[-1] - pad].permute(back) if padded else memory
    expected = flat.clone()
    expected.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(view)
    run_pieces(full, boxes_of(view, shape, dst), data.draw(partitions(shape)), flat)
    assert torch.equal(flat, expected)


@given(st.data(), shapes)
@settings(max_examples=120)
def test_any_affine_view_is_cut_or_refused(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """Strides that no torch view of the source has: diagonals, overlaps, walks across rows."""
    numel = math.prod(shape)
    size, stride, room = [], [], numel - 1
    for _ in range(data.draw(st.integers(0, 3))):
        size.append(data.draw(st.integers(1, 6)))
        stride.append(data.draw(st.integers(0, room // max(1, size[-1] - 1))) if size[-1] > 1 else 1)
        room -= (size[-1] - 1) * stride[-1]
    full = torch.arange(numel).view(shape)
    view = full.flatten().as_strided(size, stride, data.draw(st.integers(0, room)))
    out = torch.full((view.numel(),), -1)
    run_pieces(full, boxes_of(view, shape), data.draw(partitions(shape)), out)
    assert torch.equal(out, view.flatten())


# --- the forms that real loaders leave ---------------------------------------------------------------


def test_a_whole_tensor_recorded_as_one_run_is_split_and_joined_again() -> None:
    full = torch.empty(64, 3, 16, device="meta")
    boxes = boxes_of(full.flatten(), (64, 3, 16))
    assert boxes == (Box((0, 0, 0), (Axis(0, 1, 64, 48), Axis(1, 1, 3, 16), Axis(2, 1, 16, 1)), 0),)
    assert intersect(boxes, (16, 0, 0), (8, 3, 16)) == [Piece((8 * 48,), 0, (1,), 16 * 48, (1,))]
    assert intersect(boxes, (0, 0, 0), (64, 3, 16)) == [Piece((64 * 48,), 0, (1,), 0, (1,))]
    assert intersect(boxes, (0, 1, 0), (64, 1, 16)) == [Piece((64, 16), 0, (16, 1), 16, (48, 1))]


def test_a_run_from_the_middle_of_a_row_is_head_rows_and_tail() -> None:
    view = torch.empty(10, 6, device="meta").flatten()[4:33]
    boxes = boxes_of(view, (10, 6))
    assert [(box.start, tuple(axis.length for axis in box.axes)) for box in boxes] == [
        ((0, 4), (2,)),
        ((1, 0), (4, 6)),
        ((5, 0), (3,)),
    ]


def test_bloom_ties_two_axes_to_one_dim() -> None:
    heads, dim, hidden = 32, 128, 4096
    full = torch.empty(heads * 3 * dim, hidden, device="meta")
    view = full.view(heads, 3, dim, hidden)[:, 1]
    (box,) = boxes_of(view, (heads * 3 * dim, hidden))
    assert box.start == (dim, 0)
    assert [axis[:3] for axis in box.axes] == [(0, 3 * dim, heads), (0, 1, dim), (1, 1, hidden)]
    # A shard's edges fall inside one head each: two partial heads, and all between them as one piece.
    pieces = intersect((box,), (dim + 100, 0), (3 * dim * 10, hidden))
    assert [piece.size for piece in pieces] == [(28 * hidden,), (9, dim * hidden), (100 * hidden,)]


def test_interleaved_slices_stay_analytic() -> None:
    full = torch.empty(4, 5760, 2880, device="meta")
    boxes = boxes_of(full[:, 1::2], (4, 5760, 2880))
    assert [axis[:3] for axis in boxes[0].axes] == [(0, 1, 4), (1, 2, 2880), (2, 1, 2880)]
    pieces = intersect(boxes, (0, 1000, 0), (4, 1001, 2880))
    assert pieces == [Piece((4, 500, 2880), 2880, (1001 * 2880, 5760, 1), 500 * 2880, (2880 * 2880, 2880, 1))]


def test_transposes_permute_and_broadcasts_are_tied_to_nothing() -> None:
    full = torch.empty(6, 8, device="meta")
    (box,) = boxes_of(full.t().unsqueeze(0).expand(3, -1, -1), (6, 8))
    assert box.axes == (Axis(BROADCAST, 0, 3, 48), Axis(1, 1, 8, 6), Axis(0, 1, 6, 1))
    assert intersect((box,), (2, 0), (2, 8)) == [Piece((3, 8, 2), 0, (0, 1, 8), 2, (48, 6, 1))]


def test_scalars_dims_of_one_and_nothing_at_all() -> None:
    scalar = boxes_of(torch.empty((), device="meta"), ())
    assert scalar == (Box((), (), 0),)
    assert intersect(scalar, (), ()) == [Piece((), 0, (), 0, ())]
    one = boxes_of(torch.empty(1, 1, device="meta")[0], (1, 1))
    assert intersect(one, (0, 0), (1, 1)) == [Piece((), 0, (), 0, ())]
    assert intersect(one, (1, 0), (0, 1)) == []
    assert boxes_of(torch.empty(0, 4, device="meta"), (0, 4)) == ()
    column = boxes_of(torch.empty(4, 1, 3, device="meta")[:, 0, 1], (4, 1, 3))
    assert intersect(column, (1, 0, 0), (2, 1, 2)) == [Piece((2,), 1, (2,), 1, (1,))]


def test_a_reshape_that_does_not_divide_the_rows_comes_apart() -> None:
    full = torch.arange(24).view(4, 6)
    view = full.view(3, 8)
    out = torch.full((24,), -1)
    run_pieces(full, boxes_of(view, (4, 6)), [((0, 0), (4, 5)), ((0, 5), (4, 1))], out)
    assert out.tolist() == list(range(24))


# --- refusals ----------------------------------------------------------------------------------------


def test_reading_outside_the_source_names_both_ends() -> None:
    write = make_write(torch.empty(2, 5, device="meta"), torch.empty(2, 5, device="meta"))
    expected = "layers.0.w: the write to fused.weight reads elements 0 to 9 of 6 "
    with pytest.raises(MappingError, match=expected):
        box_write(write, make_source((2, 3)), target="fused.weight")
    outside = Write(
        source=0, target=0, size=(10,), src_offset=-1, src_stride=(1,), dst_offset=0, dst_stride=(1,)
    )
    with pytest.raises(MappingError, match="reads elements -1 to 8 of 24"):
        box_write(outside, make_source((4, 6)), target="fused.weight")


def test_a_gather_is_refused_instead_of_enumerated() -> None:
    n = region.MAX_BOXES + 1
    diagonal = torch.empty(n, n, device="meta").diagonal()
    with pytest.raises(MappingError, match=r"layers\.0\.w: the write to fused\.weight cannot be cut into"):
        boxes_of(diagonal, (n, n))
