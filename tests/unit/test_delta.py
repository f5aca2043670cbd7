"""What changed in a bucket, found, written down in each form, read again and put in place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bridge.errors import ProtocolError
from bridge.wire import delta
from bridge.wire.delta import Form

UNITS = [1, 2, 4, 8]


@pytest.fixture(params=["in host memory", "by torch"])
def finder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of comparing; that of GPUs works on a CPU too."""
    if request.param == "by torch":
        monkeypatch.setattr(delta, "_in_host_memory", delta._by_torch)


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is looked into, however much has changed."""
    monkeypatch.setattr(delta, "_MOST", 1.0)


def two_states(nbytes: int, unit: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes, and the same with ``count`` units changed."""
    before = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    now = before.clone()
    delta.units(now, unit)[torch.randperm(nbytes // unit)[:count]] ^= 1
    return before, now


def find_changes(now: torch.Tensor, before: torch.Tensor, unit: int) -> delta.Changes | None:
    """The changes of a state in three pieces at odd places; ``before`` stays as it is."""
    remembered, third = before.clone(), now.numel() // unit // 3 * unit
    cuts = [third, third, now.numel() - 2 * third]
    with ThreadPoolExecutor(2) as workers:
        pieces = list(zip(now.split(cuts), remembered.split(cuts), strict=True))
        found = delta.Search(pieces, unit, workers).result()
    assert found is None or torch.equal(remembered, now)
    return found


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("num_units", [1, 3, 8, 13, 65536, 65537, 1_200_001, 5_000_003])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.99, 1.0])
@pytest.mark.usefixtures("finder", "to_the_end")
def test_a_payload_says_exactly_what_changed(unit: int, num_units: int, share: float) -> None:
    nbytes, count = num_units * unit, int(num_units * share)
    before, now = two_states(nbytes, unit, count)
    changes = find_changes(now, before, unit)
    assert changes is not None
    assert changes.places.numel() == count
    form, payload = delta.encode(changes, nbytes, unit)
    shortest = min(delta.payload_bytes(f, count, nbytes, unit) for f in Form)
    assert delta.payload_bytes(form, count, nbytes, unit) == shortest
    if form is Form.DENSE or not count:
        assert payload.numel() == 0
        return
    assert payload.numel() == shortest
    for part in delta.decode(form, payload, count, nbytes, unit):
        delta.scatter(delta.units(before, unit), part, unit)
    assert torch.equal(before, now)


def test_each_form_has_its_use() -> None:
    nbytes = 1 << 18
    found = {}
    for share in (0.01, 0.15, 0.5):
        before, now = two_states(nbytes, 2, int(share * nbytes / 2))
        changes = find_changes(now, before, 2)
        found[share] = delta.encode(changes, nbytes, 2)[0] if changes else None
    assert found == {0.01: Form.INDEX, 0.15: Form.BITMAP, 0.5: None}


def test_one_percent_of_bfloat16_costs_less_than_three_percent() -> None:
    count = (1 << 24) // 100
    assert delta.payload_bytes(Form.INDEX, count, 1 << 25, 2) < 0.03 * (1 << 25)


@pytest.mark.usefixtures("finder", "to_the_end")
def test_bits_decide_not_values() -> None:
    before = torch.tensor([0.0, float("nan"), 1.0, float("nan")], dtype=torch.bfloat16)
    now = torch.tensor([-0.0, float("nan"), 1.0, 2.0], dtype=torch.bfloat16)
    changes = find_changes(now.view(torch.uint8), before.view(torch.uint8), 2)
    assert changes is not None
    assert changes.places.tolist() == [0, 3]


@pytest.mark.usefixtures("finder", "to_the_end")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1, 2])
def test_changes_land_where_strides_say(dtype: torch.dtype, unit: int) -> None:
    home = torch.zeros(4, 6, 10, dtype=dtype)
    place = home[1:3, ::2, 3:8].permute(2, 0, 1)
    want = torch.randn(place.shape, dtype=torch.float64).to(dtype)
    bytes_of = [t.contiguous().flatten().view(torch.uint8) for t in (want, place)]
    changes = find_changes(*bytes_of, unit)
    assert changes is not None
    positions = changes.places.long() & 0xFFFF
    delta.scatter(place, delta.Part(positions, changes.values), unit)
    assert torch.equal(place, want)
    place.zero_()
    assert not home.any(), "nothing landed outside"


def index_payload(counts: list[int], places: list[int], values: int) -> torch.Tensor:
    parts = [
        torch.zeros(values, dtype=torch.int16),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(places, dtype=torch.int16),
    ]
    return torch.cat([part.view(torch.uint8) for part in parts])


@pytest.mark.parametrize(
    ("counts", "places"),
    [([3], [1, 2]), ([-1], [1, 2]), ([2], [5, 5]), ([2], [6, 5]), ([2], [5, 1000])],
    ids=["too many", "negative", "twice", "backwards", "outside"],
)
def test_an_index_from_outside_is_checked(counts: list[int], places: list[int]) -> None:
    with pytest.raises(ProtocolError):
        list(delta.decode(Form.INDEX, index_payload(counts, places, 2), 2, 2000, 2))


@pytest.mark.parametrize("bits", [[0b11, 0], [0b111, 0], [0, 0b100001]], ids=["fewer", "more", "outside"])
def test_a_bitmap_from_outside_is_checked(bits: list[int]) -> None:
    count = 3 if bits == [0b11, 0] else 2
    payload = torch.cat([torch.zeros(2 * count, dtype=torch.uint8), torch.tensor(bits, dtype=torch.uint8)])
    with pytest.raises(ProtocolError):
        list(delta.decode(Form.BITMAP, payload, count, 24, 2))
