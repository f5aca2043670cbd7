"""The mapping proves itself before the first update: the checkpoint, applied by it, gives the live bits."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import blake3
import torch

from bridge.errors import MappingError
from bridge.protocol.mapping import RankMap, Target
from bridge.wire.device_checksum import DeviceChecksums
from vllm_patching import compat
from vllm_patching.arena import Arena
from vllm_patching.fixed_arena import IN_PLACE
from vllm_patching.staging import Staging, writes_by_source

if TYPE_CHECKING:
    from vllm_patching.loading import Loaded

logger = logging.getLogger(__name__)

_POISON = -77  # no layer of weights has it everywhere


def digest(tensor: torch.Tensor) -> bytes:
    """Of a tensor's elements, to see whether they change; on a GPU without bringing them to the host."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_cuda:
        sums = DeviceChecksums(1, flat.device, torch.cuda.current_stream(flat.device))
        sums.add(0, flat)
        return sums.digests()[0]
    return blake3.blake3(flat.view(torch.uint8).numpy().data).digest()


def verify(loaded: Loaded, rank_map: RankMap, arena: Arena) -> None:
    """Apply the checkpoint through the mapping to the second half; it must equal the live one.

    Without a second half it is applied over the live one, whose digests were taken before.

    Raises:
        MappingError: lists the tensors that differ.
    """
    skipped = "BRIDGE_VERIFY_MAPPING is 0" if os.environ.get("BRIDGE_VERIFY_MAPPING", "1") == "0" else ""
    if "checkpoint" not in loaded.traces:
        skipped = loaded.omitted.get("checkpoint", "its names were not traced")
    if skipped:
        logger.warning("the mapping was not compared with a checkpoint (%s)", skipped)
        return
    start = time.perf_counter()
    live = arena.half(arena.active)
    in_place = arena.kind == IN_PLACE
    before = [digest(_span(live, target)) for target in rank_map.targets] if in_place else []
    fills = _filled(loaded, rank_map, live, keep=in_place)
    other = live if in_place else arena.half(1 - arena.active)
    if not in_place:
        other.copy_(live)
    for target in rank_map.targets:  # what the mapping does not write must not pass by being equal
        _span(other, target).fill_(0xA5)
    to = Staging(other, rank_map.targets)
    for where, values in fills:
        to.view(*where).copy_(values)
    staging = Staging(other, rank_map.targets)
    for write in rank_map.writes["checkpoint"]:  # nor what the loader fills first and writes later
        if staging.is_direct(write.target):
            staging.view(write.target, write.size, write.dst_offset, write.dst_stride).fill_(_POISON)
    listed = {s.name: i for i, s in enumerate(loaded.vocabularies["checkpoint"])}
    grouped = writes_by_source(rank_map.writes["checkpoint"])
    with torch.no_grad():
        for name, tensor in compat.loader_weights(loaded.loader, loaded.model_config, loaded.model):
            staging.apply(grouped.pop(listed[name], ()), tensor)
    staging.finish()
    differing = [
        target.name
        for index, target in enumerate(rank_map.targets)
        if not (
            digest(_span(other, target)) == before[index]
            if in_place
            else torch.equal(_span(live, target), _span(other, target))
        )
    ]
    if differing:
        listing = "\n  ".join(differing)
        raise MappingError(
            f"the checkpoint of {loaded.model_config.model}, applied through the traced mapping, differs "
            f"from what vLLM loaded, in {len(differing)} tensor(s); the loader does arithmetic the trace "
            f"cannot see:\n  {listing}"
        )
    how = "by digests" if in_place else "bitwise"
    logger.info("mapping verified %s against the checkpoint in %.1f s", how, time.perf_counter() - start)


def _span(half: torch.Tensor, target: Target) -> torch.Tensor:
    return half[target.offset : target.offset + target.nbytes]


_Where = tuple[int, tuple[int, ...], int, tuple[int, ...]]


def _filled(
    loaded: Loaded, rank_map: RankMap, live: torch.Tensor, *, keep: bool
) -> list[tuple[_Where, torch.Tensor]]:
    """Pads come from no checkpoint: the places that the loader filled, and the live half's values there.

    ``keep`` copies the values, for when the live half is about to be written over.
    """
    names = {t.name: i for i, t in enumerate(rank_map.targets)}
    since = Staging(live, rank_map.targets)
    found = []
    for fill in loaded.traces["checkpoint"].fills:
        if (index := names.get(fill.target)) is None or not since.is_direct(index):
            continue
        where = (index, fill.size, fill.dst_offset, fill.dst_stride)
        values = since.view(*where)
        found.append((where, values.clone() if keep else values))
    return found
