"""The Triton kernel behind ``device_checksum``; imports Triton, so it is imported where there is a GPU."""

# ruff: noqa: ANN001, N803 - Triton reads the annotations, and names its constants so
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def sums(  # type: ignore[no-untyped-def]
    base,
    out,
    numel,
    cols,
    row_stride,
    start,
    FLAT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Add to ``out`` [2] the sum of the elements, and of each times its place (from ``start + 1``).

    ``base`` points to [numel / cols, cols] integers of ``BITS`` bits, rows ``row_stride`` elements apart.
    """
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros((BLOCK,), tl.int64)
    weighted = tl.zeros((BLOCK,), tl.int64)
    for index in range(BLOCKS):
        place = first + index * BLOCK + tl.arange(0, BLOCK)
        inside = place < numel
        if FLAT:  # noqa: SIM108 - a constexpr branch, of which one side is compiled
            where = place
        else:
            where = (place // cols) * row_stride + place % cols
        element = tl.load(base + where, mask=inside, other=0).to(tl.int64)
        if BITS < 64:
            element = element & ((1 << BITS) - 1)
        total += element
        weighted += element * (start + place + 1)
    tl.atomic_add(out, tl.sum(total, 0))
    tl.atomic_add(out + 1, tl.sum(weighted, 0))
