"""The checksum that both ends of a lane compare."""

from __future__ import annotations

import pytest
import torch

from bridge.wire.checksum import checksum_of

SIZES = [0, 1, 7, 8, 4095, 4096, 4097, (1 << 20) + 13, 3 * (1 << 20)]


def _bytes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", SIZES)
def test_it_depends_on_content_not_on_place(count: int) -> None:
    data = _bytes(count)
    shifted = torch.empty(count + 8, dtype=torch.uint8)
    for offset in range(8):
        shifted[offset : offset + count] = data
        assert checksum_of(shifted[offset : offset + count]) == checksum_of(data)


@pytest.mark.parametrize("count", SIZES[1:])
def test_every_flipped_bit_shows(count: int) -> None:
    data = _bytes(count)
    whole = checksum_of(data)
    for position in {0, count // 3, count // 2, count - 1}:
        changed = data.clone()
        changed[position] ^= 1 << (position % 8)
        assert checksum_of(changed) != whole


def test_exchanged_words_rows_and_blocks_show() -> None:
    data = _bytes(3 << 20)
    whole = checksum_of(data)
    words = data.view(torch.int64)
    for first, second, count in (
        (0, 1, 1),
        (0, 512, 1),
        (5, 512 * 7 + 9, 1),
        (0, 512, 512),
        (0, 1 << 17, 1 << 17),
    ):
        changed = words.clone()
        changed[first : first + count] = words[second : second + count]
        changed[second : second + count] = words[first : first + count]
        assert checksum_of(changed) != whole, (first, second, count)


def test_a_strided_view_counts_in_row_major_order() -> None:
    table = torch.randn(64, 48)
    assert checksum_of(table.t()) == checksum_of(table.t().contiguous())
    assert checksum_of(table.t()) != checksum_of(table)
