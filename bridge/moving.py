"""Letting this trainer rank's bytes travel: every lane's buckets in the plan's order, digests at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Lane, Plan
from bridge.wire.rendezvous import Group
from bridge.wire.transport import SLOWEST_BYTES_PER_S, DataLink, GlooSource, PullSource, SendBuffers, Source


class Mover:
    """One trainer rank's end of the data group."""

    def __init__(
        self,
        group: Group,
        links: Sequence[str],
        mapping: Mapping,
        *,
        rank: int,
        world_size: int,
        deadline_s: float,
    ) -> None:
        """``links`` has the transport of each inference rank: "pull" or "gloo"."""
        self._group = group
        self._links = links
        self._mapping = mapping
        self._rank = rank
        self._world_size = world_size
        self._deadline_s = deadline_s
        self._buffers = SendBuffers()

    def move(self, plan: Plan, tensors: Sequence[torch.Tensor], *, before: Callable[[int], None]) -> None:
        """Send this rank's part of ``plan``; ``before`` is called with each bucket's index.

        Raises:
            PeerLost: an updater is gone, or silent for longer than the deadline.
        """
        lanes = [lane for lane in plan.lanes if lane.trainer == self._rank]
        sources = [self._source(lane, tensors, plan.total_bytes) for lane in lanes]
        digests: list[list[bytes]] = [[] for _ in lanes]
        for source in sources:
            source.open()
        for index in range(plan.num_buckets):
            before(index)
            for lane, source, sent in zip(lanes, sources, digests, strict=True):
                if index < len(lane.buckets):
                    sent.append(source.move(lane.buckets[index]))
        for source, sent in zip(sources, digests, strict=True):
            source.close(sent)

    def _source(self, lane: Lane, tensors: Sequence[torch.Tensor], total_bytes: int) -> Source:
        link = DataLink(
            self._group,
            self._world_size + lane.inference,
            who=f"the updater of inference rank {lane.inference}",
            timeout_s=self._deadline_s + total_bytes / SLOWEST_BYTES_PER_S,
        )
        if self._links[lane.inference] == "pull":
            return PullSource(link, tensors)
        targets = self._mapping.ranks[lane.inference].targets
        return GlooSource(link, tensors, [getattr(torch, target.dtype) for target in targets], self._buffers)
