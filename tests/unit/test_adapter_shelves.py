"""Where a sent adapter arrives, and when vLLM's slots take it over. Layers and manager are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from bridge.errors import ConfigError, UnsupportedVersion
from bridge.protocol.mapping import RankMap, Source
from vllm_patching import adapters, lora_compat
from vllm_patching.adapters import Shelves, Shelving, shelving
from vllm_patching.cpu_arena import CpuArena
from vllm_patching.updater import Updater

RANK, SLOTS = 4, 2
MODEL = {
    "l.q.weight": (6, 8), "l.k.weight": (2, 8), "l.o.weight": (8, 6), "l.norm.weight": (8,),
    "l.odd.weight": (5, 3), "embed.weight": (10, 8), "l.experts.0.up.weight": (4, 8),
}  # fmt: skip


class Linear:
    """Slots as vLLM's linear layers have them; ``parts`` are the outputs that are packed into it."""

    def __init__(self, inputs: int, *parts: int, tp: int = 1, broken: bool = False) -> None:
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, inputs) for _ in parts)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, rows // tp, RANK) for rows in parts)
        self._rows = [rows // tp for rows in parts]
        self._rank = tp - 1
        self._broken = broken

    def reset_lora(self, index: int) -> None:
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        if self._broken:
            raise RuntimeError("this layer has the model's weight transposed")
        self.reset_lora(index)
        a, b = ([x] if torch.is_tensor(x) else x for x in (lora_a, lora_b))
        for i, rows in enumerate(self._rows):
            if a[i] is not None:
                mine = b[i][rows * self._rank : rows * (self._rank + 1)]
                self.lora_a_stacked[i][index, 0, : a[i].shape[0], : a[i].shape[1]].copy_(a[i])
                self.lora_b_stacked[i][index, 0, : mine.shape[0], : mine.shape[1]].copy_(mine)


class Logits:
    def __init__(self) -> None:
        self.reset: list[int] = []

    def reset_lora(self, index: int) -> None:
        self.reset.append(index)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    layers: dict[str, Any] = {
        "l.qk": Linear(8, 6, 2, tp=2),
        "l.o": Linear(6, 8),
        "l.odd": Linear(3, 5, broken=True),
        "logits": Logits(),
    }
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, Linear)}
    monkeypatch.setattr(lora_compat, "linear_layers", lambda _: linear)
    monkeypatch.setattr(lora_compat, "other_layers", lambda _: [layers["logits"]])
    monkeypatch.setattr(lora_compat, "layer_of", lambda _, module: module)
    files: list[tuple[int, int]] = []
    monkeypatch.setattr(
        lora_compat, "fill_from_files", lambda _, index, lora_id: files.append((index, lora_id))
    )
    config = SimpleNamespace(max_lora_rank=RANK, lora_dtype=torch.float32)
    packed = {"l.qk": ["l.q", "l.k"]}
    return SimpleNamespace(
        lora_config=config, packed_modules=packed, layers=layers, files=files, lora_index_to_id=[None, None]
    )


def laid_out(manager: SimpleNamespace, *names: str) -> Shelving:
    model = [Source(name=name, shape=shape, dtype="float32") for name, shape in MODEL.items()]
    return shelving(manager, names, {"checkpoint": model})


def test_the_shelf_follows_from_what_set_lora_does(manager: SimpleNamespace) -> None:
    made = laid_out(manager, "policy")
    assert not manager.layers["l.o"].lora_a_stacked[0].any(), "nothing was executed"
    (vocabulary,) = made.vocabularies()
    names = {source.name: source.shape for source in vocabulary.sources}
    assert (names["l.q.lora_A.weight"], names["l.q.lora_B.weight"]) == ((RANK, 8), (6, RANK))
    assert not any("norm" in name or "experts" in name for name in names)
    # The layer that cannot be followed, and what is no layer of LoRA's, are known, and not taken.
    assert set(vocabulary.unused) == {
        f"{module}.lora_{which}.weight" for module in ("l.odd", "embed") for which in "AB"
    }
    (targets,), end = made.lay_out(512)
    assert targets[0].offset == 512
    writes = made.writes_from(7)
    assert {write.target for write in writes} == set(range(7, 7 + len(targets)))
    (cut,) = (w for w in writes if vocabulary.sources[w.source].name == "l.q.lora_B.weight")
    assert (cut.numel, cut.src_offset) == (3 * RANK, 3 * RANK), "this rank's half of the rows"
    assert end <= 512 + len(targets) * 256


def test_what_cannot_be(manager: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\(policy\), but vLLM was started without --enable-lora"):
        shelving(None, ["policy"], {})
    monkeypatch.setenv("BRIDGE_STAGING", "in-place")
    with pytest.raises(ConfigError, match="would leave one torn"):
        laid_out(manager, "policy")


@pytest.fixture
def placed(manager: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Two shelves in an arena behind 512 bytes of weights."""
    made = laid_out(manager, "policy", "critic")
    shelves, end = made.lay_out(512)
    arena = CpuArena(end)
    arena.half(0).zero_()
    arena.half(1).zero_()
    yield SimpleNamespace(
        made=made, targets=shelves, arena=arena, end=end, shelves=Shelves(manager, made, shelves, arena)
    )
    arena.close()


def put(placed: SimpleNamespace, shelf: int, value: float) -> None:
    """An adapter of nothing but ``value`` becomes live, as if it had been staged."""
    placed.arena.half(1 - placed.arena.active).copy_(placed.arena.half(placed.arena.active))
    other = placed.arena.half(1 - placed.arena.active)
    flag, *parts = placed.targets[shelf]
    other[flag.offset : flag.offset + 8].view(torch.int64).fill_(int(value != 0))
    for target in parts:
        other[target.offset : target.offset + target.nbytes].view(torch.float32).fill_(value)
    placed.arena.flip(1 - placed.arena.active)
    placed.shelves.flipped()


def slot(manager: SimpleNamespace, index: int) -> set[float]:
    layers = [manager.layers[name] for name in ("l.qk", "l.o")]
    stacks = [s for layer in layers for s in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    return {float(x) for stack in stacks for x in stack[index].flatten()}


def fill(manager: SimpleNamespace, value: float, index: int) -> None:
    """As vLLM fills a slot from files."""
    for name in ("l.qk", "l.o", "l.odd"):
        layer = manager.layers[name]
        for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            stack[index] = value


def test_slots_follow_the_flip(manager: SimpleNamespace, placed: SimpleNamespace) -> None:
    placed.shelves.loading(5, "policy")
    placed.shelves.loading(6, "somebody else's")
    manager.lora_index_to_id[:] = [6, 5]
    fill(manager, 60.0, 0)
    fill(manager, 50.0, 1)
    placed.shelves.activated(5)
    assert (slot(manager, 0), slot(manager, 1)) == ({60.0}, {50.0}), "nothing was sent: the files count"
    put(placed, 0, 1.0)
    assert (slot(manager, 0), slot(manager, 1)) == ({60.0}, {1.0})
    odd = manager.layers["l.odd"].lora_a_stacked[0]
    assert float(odd[0].sum()) > 0
    assert not odd[1].any(), "what cannot be sent is none of the adapter's"
    assert manager.layers["logits"].reset == [1]
    put(placed, 1, 9.0)
    assert (slot(manager, 0), slot(manager, 1)) == ({60.0}, {1.0}), "another adapter was sent"


def test_a_slot_that_is_filled_again_gets_what_was_sent_last(
    manager: SimpleNamespace, placed: SimpleNamespace
) -> None:
    placed.shelves.loading(5, "policy")
    put(placed, 0, 2.0)
    assert slot(manager, 0) == {0.0}, "it is in no slot"
    manager.lora_index_to_id[0] = 5
    fill(manager, 50.0, 0)
    placed.shelves.activated(5)
    assert slot(manager, 0) == {2.0}
    manager.lora_index_to_id[0] = None
    put(placed, 0, 3.0)
    manager.lora_index_to_id[1] = 7  # loaded once more, under another id
    placed.shelves.loading(7, "policy")
    fill(manager, 50.0, 1)
    placed.shelves.activated(7)
    assert slot(manager, 1) == {3.0}


def test_rolled_back_to_before_the_first_the_files_count_again(
    manager: SimpleNamespace, placed: SimpleNamespace
) -> None:
    placed.shelves.loading(5, "policy")
    manager.lora_index_to_id[1] = 5
    put(placed, 0, 2.0)
    put(placed, 0, 0.0)
    assert manager.files == [(1, 5)]
    placed.shelves.flipped()
    assert manager.files == [(1, 5)]


# --- the updater's halves --------------------------------------------------------------------------------


class Halves:
    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.device = nbytes, torch.device("cpu")
        self.halves = (torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8))

    def synchronize(self) -> None:
        """Nothing: on a CPU all is done."""


def test_which_bytes_are_brought_up_to_date_before_a_round(placed: SimpleNamespace) -> None:
    writes: dict[str, Any] = {"checkpoint": ()}
    targets: list[Any] = []
    for vocabulary, shelf in zip(placed.made.vocabularies(), placed.targets, strict=True):
        writes[vocabulary.name] = placed.made.writes_from(len(targets))
        targets += shelf
    rank_map = RankMap(rank=0, arena_bytes=placed.end, targets=tuple(targets), writes=writes)
    mapping = SimpleNamespace(ranks=[rank_map], adapters={v.adapter: v for v in placed.made.vocabularies()})
    halves = Halves(placed.end)
    updater = Updater(0, mapping, halves, channel=None, arena="remap")  # type: ignore[arg-type]

    def stale() -> tuple[bool, bool]:
        """Of the model's bytes, and of the shelves': whether any was left as it was."""
        model, shelves = halves.halves[1][:512], halves.halves[1][512:]
        flags = bool(model.any()), any(bool(shelves[t.offset - 512]) for t in targets)
        halves.halves[1].fill_(1)
        return flags

    updater._staging(1, partial=False)
    assert stale() == (True, False), "a round of the model must not lose adapters"
    updater._staging(1, partial=True)
    assert stale() == (False, False)
    updater._model_in_step = True  # behind a round of an adapter
    updater._staging(1, partial=True)
    assert stale() == (True, False), "the halves' weights of the model are equal already"
    updater._staging(1, partial=True)
    assert stale() == (False, False), "that held for one round"


def test_names_reach_the_worker_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIDGE_ADAPTERS", raising=False)
    assert adapters.wanted() == ()
    monkeypatch.setenv("BRIDGE_ADAPTERS", msgspec.json.encode(["a", "b"]).decode())
    assert adapters.wanted() == ("a", "b")


class _Unstacked:
    """vLLM 0.26's mapper of names, whose method for adapters is called otherwise."""

    def __init__(self, mapper: Any) -> None:
        self._mapper = mapper

    def get_unstacked_mapper(self) -> Any:
        return self._mapper.get_rename_mapper()


def test_layers_are_named_before_they_are_packed() -> None:
    """As vLLM reads adapters: a mapper of weights would say qkv_proj for all three."""
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
        orig_to_new_prefix={"model.text.": "model.language_model."},
    )
    assert mapper._map_name("l.q_proj.weight") == "l.qkv_proj.weight"
    for one in (mapper, _Unstacked(mapper)):
        manager = SimpleNamespace(model=SimpleNamespace(hf_to_vllm_mapper=one))
        assert lora_compat.layer_of(manager, "model.text.0.q_proj") == "model.language_model.0.q_proj"
    assert lora_compat.layer_of(SimpleNamespace(model=SimpleNamespace()), "model.q_proj") == "model.q_proj"
    unknown = SimpleNamespace(model=SimpleNamespace(hf_to_vllm_mapper=object()))
    with pytest.raises(UnsupportedVersion, match=r'object has neither .* pass --adapters ""'):
        lora_compat.layer_of(unknown, "model.q_proj")
