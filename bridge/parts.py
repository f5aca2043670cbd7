"""Tensors handed over by name: one of them, or a round of them, one after the other.

Whoever gathers a model parameter by parameter cannot keep it: what is handed over in a round may be freed or
overwritten at once. So each rank copies what it will send, which of a whole tensor is its even share.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import overload

import msgspec
import torch

from bridge import unsharded, zero3
from bridge.declared import DeclaredLayout
from bridge.errors import ConfigError
from bridge.job import PendingBroadcast, Receipt
from bridge.names import without_wrappers
from bridge.patches import SparsePatch, share_of
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.protocol.mapping import Source, Vocabulary
from bridge.protocol.plan import Patch
from bridge.sharding import Box, LocalShards, Part, is_plain, make_shards, match, part_of

_ROWS_PER_RANK = 8  # shares of whole rows then differ by an eighth at most


def share(shape: Sequence[int], *, rank: int, world_size: int) -> list[Box]:
    """The boxes of a tensor that are ``rank``'s even share; those of all ranks are disjoint and make it up.

    A share is a run of the flattened elements: of whole rows, which is one box, where that is even enough.
    """
    leading = [math.prod(shape[:dims]) for dims in range(1, len(shape) + 1)]
    numel = leading[-1] if leading else 1
    count = next((rows for rows in leading if rows >= _ROWS_PER_RANK * world_size), numel)
    start, end = (numel // max(count, 1) * (count * at // world_size) for at in (rank, rank + 1))
    return list(zero3.boxes_of_run(tuple(shape), start, end))


@torch.no_grad()
def snapshot(tensor: torch.Tensor, *, rank: int, world_size: int) -> Part:
    """Copies, where ``tensor`` is, of what this rank sends of it.

    Args:
        tensor: a whole tensor, equal on all ranks, of which the copy is this rank's share; or a DTensor or a
            parameter that ZeRO-3 has partitioned, of which it is the local part.
        rank: this trainer rank.
        world_size: trainer ranks.
    """
    part = part_of(tensor, copies=unsharded.memory())
    held = part.boxes
    if held and is_plain(tensor):
        boxes = share(part.shape, rank=rank, world_size=world_size)
        held = [(box, tensor[_slices(box)]) for box in boxes]
    copies = [(box, local.clone(memory_format=torch.contiguous_format)) for box, local in held]
    return dataclasses.replace(part, boxes=copies, owner=None)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(*box, strict=True))


def collect_single(
    name: str,
    tensor: torch.Tensor,
    mapping: MappingDocument,
    *,
    rank: int,
    layout: DeclaredLayout | None = None,
) -> LocalShards:
    """``collect_parts`` for one tensor, which is not copied."""
    part = part_of(tensor, copies=unsharded.memory())
    return collect_parts([(name, part)], mapping, rank=rank, declared=layout)


def collect_parts(
    named: Sequence[tuple[str, Part]],
    mapping: MappingDocument,
    *,
    rank: int,
    declared: DeclaredLayout | None = None,
) -> LocalShards:
    """This rank's shards of tensors that were handed over by name; all that the server needs, or a part.

    Args:
        named: names, in the mapping or as in a wrapped model's state dict, and what this rank holds of each.
        mapping: what the server wants.
        rank: this trainer rank.
        declared: what plain tensors that were not copied are parts of; None if they are whole.

    Raises:
        MappingError: a name twice or unknown, or a tensor that does not fit; lists every fault found.
    """
    names = without_wrappers(name for name, _ in named)
    parts = {name: part for name, (_, part) in zip(names, named, strict=True)}
    vocabulary, ambiguous = match(parts, mapping, declared, rank=rank)
    known = {source.name: (index, source) for index, source in enumerate(vocabulary.sources)}
    unused = frozenset(vocabulary.unused)
    sizes = ", ".join(f"{len(v.sources)} {v.name} names" for v in mapping.of_the_model)
    faults = [f"{name}: handed over {n} times in one round" for name, n in Counter(names).items() if n > 1]
    faults += [
        f"{name}: the server knows no such parameter among {sizes}"
        for name in parts
        if name not in known and name not in unused
    ]
    faults += ambiguous
    faults += _untied(parts, vocabulary)
    faults += declared.misnamed(parts) if declared else []
    present = [(*known[name], part) for name, part in parts.items() if name in known and name not in unused]
    faults += _packed(present, mapping, vocabulary)
    if not present and not faults:
        faults = [f"{name}: the server's loader drops it, so sending it changes nothing" for name in parts]
    shards = make_shards(present, mapping, vocabulary, rank, faults, declared)
    order = tuple(index for index, _, _ in present)
    patches = tuple(Patch(source=i, digest=p.patch.digest) for i, _, p in present if p.patch is not None)
    layout = msgspec.structs.replace(shards.layout, order=order, patches=patches)
    partial = bool(patches) or len(present) < len(known.keys() - unused)
    return dataclasses.replace(shards, layout=layout, partial=partial)


def _untied(parts: Mapping[str, Part], vocabulary: Vocabulary) -> list[str]:
    """Faults of tied tensors that are handed over without the one that the server takes, or unlike it."""
    return [
        f"{name}: the server has no weights of its own there, it is tied to {kept}; hand {kept} over instead"
        for name, kept in vocabulary.tied.items()
        if name in parts and not (kept in parts and _alike(parts[name], parts[kept]))
    ]


def _alike(a: Part, b: Part) -> bool:
    if a.patch is not None or b.patch is not None or len(a.boxes) != len(b.boxes):
        return False
    return all(
        box == other and torch.equal(ours, theirs)
        for (box, ours), (other, theirs) in zip(a.boxes, b.boxes, strict=True)
    )


def _packed(
    present: Sequence[tuple[int, Source, Part]], mapping: MappingDocument, vocabulary: Vocabulary
) -> list[str]:
    """Faults of patches whose elements are nowhere by themselves, as vLLM packs the whole tensor."""
    patched = {index: source.name for index, source, part in present if part.patch is not None}
    packed = {
        patched[write.source]: rank.targets[write.target].transform
        for rank in (mapping.ranks if patched else ())
        for write in rank.writes.get(vocabulary.name, ())
        if write.source in patched and rank.targets[write.target].transform
    }
    return [
        f"{name}: vLLM keeps it in another layout ({transform}), in which no element can be patched; hand "
        "the whole tensor over"
        for name, transform in packed.items()
    ]


class Round:
    """One version, handed over parameter by parameter; made by ``Bridge.round``, and over with its block."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._named: list[tuple[str, Part]] | None = []
        self._streams: set[torch.cuda.Stream] = set()
        self._outcome: Receipt | PendingBroadcast | None = None

    @overload
    def update_weight(self, name: str, tensor: torch.Tensor) -> None: ...

    @overload
    def update_weight(self, name: SparsePatch) -> None: ...

    def update_weight(self, name: str | SparsePatch, tensor: torch.Tensor | None = None) -> None:
        """``Bridge.update_weight`` in this round."""
        called = f"update_weight({name.name if isinstance(name, SparsePatch) else name!r})"
        if self._named is None:
            raise ConfigError(f"{called} came after its round; open another with bridge.round()")
        ours = {"rank": self._rank, "world_size": self._world_size}
        if isinstance(name, SparsePatch):
            patch = share_of(name, **ours)
            part = Part(dtype=str(patch.values.dtype).removeprefix("torch."), patch=patch)
            copies, name = [patch.values], name.name
        elif tensor is None:
            raise ConfigError(f"{called} needs a tensor, or a bridge.SparsePatch in place of the name")
        else:
            part = snapshot(tensor, **ours)
            copies = [copy for _, copy in part.boxes]
        gpus = {copy.device for copy in copies if copy.is_cuda}
        self._streams |= {torch.cuda.current_stream(gpu) for gpu in gpus}
        self._named.append((name, part))

    @property
    def receipt(self) -> Receipt:
        """What was sent, and how long it took; with ``blocking=False`` this waits until the version is live.

        Raises:
            ConfigError: the block has not ended, or its round was abandoned.
            BridgeError: the round failed; the old version is still served.
        """
        if self._outcome is None:
            raise ConfigError("a round has a receipt when its block has ended without an exception")
        return self._outcome if isinstance(self._outcome, Receipt) else self._outcome.wait()

    def collect(self, mapping: MappingDocument) -> LocalShards:
        """This rank's shards of all that was handed over.

        Raises:
            ConfigError: nothing was.
            MappingError: it does not fit; lists every fault found.
        """
        if not self._named:
            raise ConfigError("the round names no parameter; call update_weight in it for each one to send")
        for stream in self._streams:  # the copies may have been made on several
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        return collect_parts(self._named, mapping, rank=self._rank)

    def end(self, outcome: Receipt | PendingBroadcast | None = None) -> None:
        """Let go of the copies, which belong to the broadcast now; ``outcome`` is the broadcast's."""
        self._named = None
        self._outcome = outcome
