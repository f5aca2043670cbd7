"""What replicas add up to, and who is named where they differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge import replicas
from bridge.errors import MappingError, ProtocolError
from bridge.protocol.mapping import Source
from bridge.protocol.plan import Layout, Shard

SOURCES = (
    Source(name="a", shape=(4, 6), dtype="bfloat16"),
    Source(name="b", shape=(3,), dtype="bfloat16"),
)


def layout(rank: int, *shards: Shard) -> Layout:
    return Layout(rank=rank, vocabulary="v", shards=shards)


def shard(source: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> Shard:
    return Shard(source=source, offset=offset, shape=shape, dtype="bfloat16")


WHOLE = (shard(0, (0, 0), (4, 6)), shard(1, (0,), (3,)))


@given(st.integers(1, 70), st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]))
def test_any_changed_element_shows_wherever_the_memory_lies(
    size: int, start: int, dtype: torch.dtype
) -> None:
    memory = torch.arange(100).to(dtype)
    tensor, elsewhere = memory[start : start + size], memory[start : start + size].clone()
    assert replicas.sums([tensor]) == replicas.sums([elsewhere])
    for index in (0, size // 2, size - 1):
        changed = elsewhere.clone()
        changed[index] += 1
        assert replicas.sums([changed]) != replicas.sums([tensor])


def test_a_large_tensor_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = replicas.sums([tensor])
    monkeypatch.setattr(replicas, "_PIECE_BYTES", 64)
    assert replicas.sums([tensor]) == whole
    assert replicas.sums([]) == []


def test_equal_replicas_are_counted_and_parts_of_one_holder_are_not() -> None:
    halves = [shard(0, (0, 0), (2, 6)), shard(0, (2, 0), (2, 6))]
    assert replicas.compare([layout(0, *WHOLE), layout(1, *WHOLE)], [[5, 6], [5, 6]], SOURCES) == 2
    layouts = [layout(0, halves[0], WHOLE[1]), layout(1, halves[1], WHOLE[1])]
    assert replicas.compare(layouts, [[1, 6], [2, 6]], SOURCES) == 1
    empty = shard(0, (4, 0), (0, 6))
    assert replicas.compare([layout(0, empty), layout(1, empty)], [[0], [0]], SOURCES) == 0


def test_all_that_differs_is_named_with_who_agrees() -> None:
    half = shard(0, (2, 0), (2, 6))
    layouts = [layout(rank, half, WHOLE[1]) for rank in range(4)]
    with pytest.raises(MappingError) as caught:
        replicas.compare(layouts, [[1, 6], [1, 6], [2, 6], [2, 7]], SOURCES)
    said = str(caught.value).splitlines()
    assert said[0] == "2 part(s) of the model differ between trainer ranks that hold the same one:"
    assert said[1:3] == [
        "  a[2:4, 0:6]: trainer ranks 0-1 differs from trainer ranks 2-3",
        "  b: trainer ranks 0-2 differs from trainer rank 3",
    ]
    assert "tp_shard_dim" in said[3]


def test_sums_of_something_else_are_refused() -> None:
    with pytest.raises(ProtocolError, match="trainer rank 1 holds 2 parts, and said what 1 add up to"):
        replicas.compare([layout(0, *WHOLE), layout(1, *WHOLE)], [[5, 6], [5]], SOURCES)
