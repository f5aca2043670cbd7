"""Served LoRA adapters that a trainer may send: where their matrices arrive, and how they come into use.

vLLM reads adapters from slots, which it fills from files it has read, whenever a request wants an adapter
that is in none. So the slots are not what a trainer fills. Each adapter that may be sent has a **shelf** in
the arena, in the layout of a slot: updaters stage it like any weight, and a flip exchanges it. Behind the
flip, before the forward, the worker copies it into the slot; and again whenever vLLM fills a slot with that
adapter. Which element goes where comes from vLLM's own ``set_lora``, run once under the recorder.

A shelf that was never sent leaves what vLLM has read from the adapter's files.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bridge.errors import ConfigError, MappingError
from bridge.protocol.mapping import ADAPTER, ADAPTER_FLAG, ITEMSIZE, Source, Target, Vocabulary, Write
from vllm_patching import coverage, lora_compat
from vllm_patching.arena import SEGMENT_ALIGNMENT, Arena, staging
from vllm_patching.fixed_arena import IN_PLACE
from vllm_patching.recorder import Recorder, ValueGuard
from vllm_patching.tracing import LiveTensor, Trace, TracedWrite, dtype_name, storage_key

logger = logging.getLogger(__name__)

_FLAG_DTYPE = "int64"
_WEIGHT = ".weight"


def wanted() -> tuple[str, ...]:
    """The served names that may be sent, as the launcher has read them."""
    return tuple(json.loads(os.environ.get("BRIDGE_ADAPTERS", "[]")))


@dataclass(frozen=True)
class Shelving:
    """What an adapter's shelf looks like, alike for all, and for which adapters there is one."""

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    unused: tuple[str, ...]
    slots: tuple[LiveTensor, ...]
    writes: tuple[TracedWrite, ...]

    def vocabularies(self) -> list[Vocabulary]:
        """One for each adapter."""
        flag = Source(name=ADAPTER_FLAG, shape=(1,), dtype=_FLAG_DTYPE)
        return [
            Vocabulary(name=ADAPTER + name, sources=(*self.sources, flag), unused=self.unused)
            for name in self.names
        ]

    def lay_out(self, start: int) -> tuple[list[list[Target]], int]:
        """The targets of each adapter, its flag first, behind ``start`` bytes of arena; and the new end."""
        shelves = []
        end = start
        for name in self.names:
            shelf = []
            flag = LiveTensor("sent", is_parameter=False, shape=(1,), stride=(1,), dtype=_FLAG_DTYPE,
                              storage=0, offset=0)  # fmt: skip
            for slot in (flag, *self.slots):
                nbytes = math.prod(slot.shape) * ITEMSIZE[slot.dtype]
                shelf.append(
                    Target(
                        name=f"{ADAPTER}{name}.{slot.name}",
                        shape=slot.shape,
                        stride=slot.stride,
                        dtype=slot.dtype,
                        offset=end,
                        nbytes=nbytes,
                    )
                )
                end += -(-nbytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
            shelves.append(shelf)
        return shelves, end

    def writes_from(self, first: int) -> tuple[Write, ...]:
        """The writes of an adapter whose targets begin with number ``first``."""
        numbers = {slot.name: first + 1 + index for index, slot in enumerate(self.slots)}
        flag = Write(source=len(self.sources), target=first, size=(1,), src_offset=0, src_stride=(1,),
                     dst_offset=0, dst_stride=(1,))  # fmt: skip
        matrices = (
            Write(
                source=w.source,
                target=numbers[w.target],
                size=w.size,
                src_offset=w.src_offset,
                src_stride=w.src_stride,
                dst_offset=w.dst_offset,
                dst_stride=w.dst_stride,
            )
            for w in self.writes
        )
        return (*matrices, flag)


def shelving(manager: Any, names: Sequence[str], vocabularies: Mapping[str, Sequence[Source]]) -> Shelving:
    """Work out what shelves for the adapters ``names`` look like.

    Args:
        manager: vLLM's, of this worker.
        names: as they are served.
        vocabularies: the sources of the model itself, by the name of the vocabulary.

    Raises:
        ConfigError: vLLM was started without LoRA, or there is but one half, which a failed round would tear.
        MappingError: what ``set_lora`` does cannot be followed.
    """
    listing = ", ".join(names)
    if manager is None:
        raise ConfigError(f"adapters are to be sent ({listing}), but vLLM was started without --enable-lora")
    if staging() == IN_PLACE:
        raise ConfigError(
            f"adapters are to be sent ({listing}), and with --staging in-place a round that fails midway "
            'would leave one torn, which no broadcast of the model repairs; pass --adapters "" to serve them '
            "as their files are"
        )
    # peft names modules as they are in memory.
    base = vocabularies.get("transformers") or vocabularies["checkpoint"]
    modules = {
        source.name.removesuffix(_WEIGHT): source.shape
        for source in base
        if source.name.endswith(_WEIGHT) and len(source.shape) == 2 and ".experts." not in source.name
    }
    trace, slots = _trace(manager, modules)
    coverage.find_gaps(trace, slots, own_load=trace).check("adapters'")
    logger.info("adapters that may be sent: %s (%d matrices each)", listing, len(trace.sources))
    return Shelving(tuple(names), trace.sources, trace.unused, tuple(slots), trace.writes)


def _trace(manager: Any, modules: Mapping[str, tuple[int, ...]]) -> tuple[Trace, list[LiveTensor]]:
    layers = lora_compat.linear_layers(manager)
    rank = lora_compat.max_rank(manager)
    dtype = dtype_name(manager.lora_config.lora_dtype)
    sources: list[Source] = []
    for module, (outputs, inputs) in modules.items():
        sources += [
            Source(name=f"{module}.lora_A.weight", shape=(rank, inputs), dtype=dtype),
            Source(name=f"{module}.lora_B.weight", shape=(outputs, rank), dtype=dtype),
        ]
    live, storages = _slots_of(layers)
    recorder = Recorder(live, storages, sources)
    dropped: dict[str, str] = {}
    with torch.inference_mode(False), torch.no_grad(), ValueGuard(recorder), recorder:
        given = dict(recorder.feed())
        by_layer = {lora_compat.layer_of(manager, module): module for module in modules}
        for name, layer in layers.items():
            parts = lora_compat.packed_layers(manager).get(name, [name])
            matrices = [
                [given.get(f"{by_layer.get(part, '')}.lora_{which}.weight") for part in parts]
                for which in ("A", "B")
            ]
            if all(matrix is None for matrix in matrices[0]):
                dropped[name] = "no weight of the model has its name"
                continue
            packed = name in lora_compat.packed_layers(manager)
            try:
                layer.set_lora(0, *(matrices if packed else (found[0] for found in matrices)))
            except (RuntimeError, ValueError, IndexError, AttributeError, MappingError) as err:
                dropped[name] = f"{type(err).__name__}: {err}"
                recorder.error = None
    for name, why in dropped.items():
        logger.warning("no adapter can be sent for %s: %s", name, why)
    kept = [slot for slot in live if slot.name.rpartition(".lora_")[0] not in dropped]
    names = {slot.name for slot in kept}
    writes = tuple(write for write in recorder.writes.values() if write.target in names)
    refused = tuple(refusal for refusal in recorder.refused if refusal.target in names)
    written = {write.source for write in writes}
    unused = tuple(source.name for index, source in enumerate(sources) if index not in written)
    fills = tuple(fill for fill in recorder.fills.values() if fill.target in names)
    return Trace(tuple(sources), writes, fills, refused, unused), kept


def _slots_of(layers: Mapping[str, Any]) -> tuple[list[LiveTensor], dict[int, int]]:
    """The first slot of each stack, as a live tensor."""
    live: list[LiveTensor] = []
    storages: dict[int, int] = {}
    for name, layer in layers.items():
        for which, stack in lora_compat.stacks(layer):
            number = storages.setdefault(storage_key(stack), len(storages))
            slot = stack[0]
            live.append(
                LiveTensor(
                    name=f"{name}.{which}",
                    is_parameter=False,
                    shape=tuple(slot.shape),
                    stride=slot.stride(),
                    dtype=dtype_name(slot.dtype),
                    storage=number,
                    offset=int(slot.storage_offset()),
                )
            )
    return live, storages


@dataclass(frozen=True)
class _Shelf:
    sent: torch.Tensor  # int64 [1]
    parts: list[torch.Tensor]  # in the order of the stacks that have one


class Shelves:
    """One worker's shelves, and what brings them into vLLM's slots. Used by the worker's thread."""

    def __init__(
        self, manager: Any, shelving: Shelving, shelves: Sequence[Sequence[Target]], arena: Arena
    ) -> None:
        self._manager = manager
        self._served: dict[int, str] = {}
        self._filled: set[int] = set()  # the slots that were filled from a shelf
        kept = {slot.name for slot in shelving.slots}
        self._stacks: list[torch.Tensor] = []
        self._without: list[torch.Tensor] = []  # slots of linear layers that no adapter can be sent for
        for name, layer in lora_compat.linear_layers(manager).items():
            for which, stack in lora_compat.stacks(layer):
                (self._stacks if f"{name}.{which}" in kept else self._without).append(stack)
        self._shelves = {}
        for name, targets in zip(shelving.names, shelves, strict=True):
            sent, *parts = (_view(arena, target) for target in targets)
            self._shelves[name] = _Shelf(sent, parts)

    def loading(self, lora_id: int, name: str) -> None:
        """vLLM is about to read the files of the adapter that is served as ``name``."""
        self._served[lora_id] = name
        if (shelf := self._shelves.get(name)) is not None and int(shelf.sent):
            logger.info("adapter %s: its files are read, and what was sent last stays in use", name)

    def activated(self, lora_id: int) -> None:
        """vLLM has filled a slot from what it had read of files."""
        for index, held in lora_compat.slots(self._manager):
            if held == lora_id:
                self._filled.discard(index)
                self._follow(index, lora_id)

    def flipped(self) -> None:
        """Other shelves are live: the slots follow."""
        for index, lora_id in lora_compat.slots(self._manager):
            self._follow(index, lora_id)

    def _follow(self, index: int, lora_id: int) -> None:
        shelf = self._shelves.get(self._served.get(lora_id, ""))
        if shelf is None:
            return
        if int(shelf.sent):
            torch._foreach_copy_([stack[index] for stack in self._stacks], shelf.parts)
            for stack in self._without:
                stack[index].zero_()
            for layer in lora_compat.other_layers(self._manager):
                layer.reset_lora(index)
            self._filled.add(index)
        elif index in self._filled:  # rolled back to before the first one that was sent
            lora_compat.fill_from_files(self._manager, index, lora_id)
            self._filled.discard(index)


def _view(arena: Arena, target: Target) -> torch.Tensor:
    dtype = getattr(torch, target.dtype)
    return arena.live(target.offset, target.nbytes).view(dtype).view(target.shape)
