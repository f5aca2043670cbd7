"""Letting this trainer rank's bytes travel: every lane's buckets in the plan's order, digests at the end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bridge.config import Snapshot
from bridge.job import Encoding
from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Lane, Plan
from bridge.sharding import LocalShards
from bridge.wire import cuda
from bridge.wire.delta_transport import Chains, Crossing, DeltaSource
from bridge.wire.device_transport import DevicePullSource, Showcase, Shown, SummedRounds
from bridge.wire.nccl import Pair, store_of
from bridge.wire.nccl_transport import NcclSource, Workspace
from bridge.wire.rendezvous import Answer, Group, Store
from bridge.wire.transport import (
    GPU_PULL,
    NCCL,
    PULL,
    SLOWEST_BYTES_PER_S,
    DataLink,
    GlooSource,
    PullSource,
    SendBuffers,
    Source,
)

logger = logging.getLogger(__name__)

COMPARING = min(4, len(os.sched_getaffinity(0)))  # threads that look for changes; memory is soon the limit


class Mover:
    """One trainer rank's end of the data group. Used by one thread."""

    def __init__(
        self,
        group: Group,
        links: Sequence[str],
        mapping: Mapping,
        *,
        rank: int,
        world_size: int,
        deadline_s: float,
        device: torch.device | None,
        checksum: str,
        snapshot: Snapshot = "host",
    ) -> None:
        """``links`` has the transport of each inference rank; ``device`` is the weights' GPU, if any.

        ``checksum`` says in which rounds device memory is summed (``SummedRounds``), ``snapshot`` where the
        weights are compared with those sent last.
        """
        self._group = group
        self._links = links
        self._mapping = mapping
        self._rank = rank
        self._world_size = world_size
        self._deadline_s = deadline_s
        self._device = device
        self._summed = SummedRounds(checksum)
        self._pairs: dict[int, Pair] = {}
        self._workspace: Workspace | None = None
        self._interrupted = threading.Event()
        self._buffers = SendBuffers()
        self._showcase: Showcase | None = None
        self._wanted: tuple[bytes, list[torch.dtype]] = (b"", [])
        self._chains = Chains()
        self._snapshot = device if device is not None and snapshot == "gpu" else torch.device("cpu")
        self._crossing = Crossing() if device is not None and snapshot == "host" else None
        self._said_what_it_takes = False
        self._workers = ThreadPoolExecutor(COMPARING, thread_name_prefix="bridge-compare")

    def join_pairs(self, store: Store, answer: Answer) -> None:
        """Join the updaters that chose NCCL, in the order in which they join the trainers.

        Raises:
            PeerLost: one of them did not come in time, or the epoch ended meanwhile.
        """
        if NCCL not in self._links:
            return
        assert self._device is not None, "an updater chose NCCL for a trainer that has no GPU"
        self._workspace = Workspace(self._device, self._interrupted)
        for inference, link in enumerate(self._links):
            if link == NCCL:
                self._pairs[inference] = Pair(
                    store_of(store, answer.epoch, self._rank, inference),
                    device=self._device,
                    is_trainer=True,
                    who=f"the updater of inference rank {inference}",
                    timeout_s=answer.deadline_s * (self._world_size + answer.num_inference_ranks),
                    interrupted=self._interrupted,
                )

    def interrupt(self) -> None:
        """The epoch is over: whoever waits for the GPU is to stop. Called by any thread."""
        self._interrupted.set()

    def forget(self) -> None:
        """What is served is no longer what was last sent: the next round goes whole."""
        self._chains.forget()

    def move(
        self,
        plan: Plan,
        shards: LocalShards,
        *,
        joint: str,
        encoding: Encoding,
        before: Callable[[int], None],
    ) -> None:
        """Send this rank's part of ``plan``; ``before`` is called with each bucket's index.

        ``joint`` names the round's layouts and encoding: the second of two alike may carry changes only.

        Raises:
            PeerLost: an updater is gone, or silent for longer than the deadline.
            DeviceError: CUDA refused to show or to snapshot a shard.
        """
        try:
            with self._chains.round(joint):
                self._move(plan, shards, encoding, before)
        except BaseException:
            self._abort_pairs()  # or a kernel would wait for ever on this GPU
            raise

    def _move(
        self, plan: Plan, shards: LocalShards, encoding: Encoding, before: Callable[[int], None]
    ) -> None:
        if self._device is not None:
            cuda.use(self._device)
        lanes = [lane for lane in plan.lanes if lane.trainer == self._rank]
        shown = self._show(plan, lanes, shards.tensors)
        checked = self._summed.includes(plan.digest)
        timeout_s = self._deadline_s + plan.total_bytes / SLOWEST_BYTES_PER_S
        sources = [
            self._source(lane, shards.tensors, shown, timeout_s, encoding, checked=checked) for lane in lanes
        ]
        comparing = [source for source in sources if isinstance(source, DeltaSource)]
        try:
            for source in sources:
                source.open()
            self._walk(plan, lanes, sources, before)
            # What follows are the checksums, without which nothing that came by host memory is staged.
            shards.check_unwritten(self._mapping, "the round was given up")
            for source in sources:
                source.close()
        finally:
            for source in comparing:
                source.drop()
        if comparing and not self._said_what_it_takes:
            self._said_what_it_takes = True
            logger.info(
                "trainer rank %d keeps %.0f MiB of what it sent on %s, to find what changes",
                self._rank,
                self._chains.nbytes / 2**20,
                self._snapshot,
            )
        if self._workspace is not None:
            self._workspace.let_go()

    def _walk(
        self, plan: Plan, lanes: Sequence[Lane], sources: Sequence[Source], before: Callable[[int], None]
    ) -> None:
        """Bucket by bucket through all lanes; while one is encoded and sent, the next one is compared."""
        steps = [
            [(s, lane.buckets[i]) for s, lane in zip(sources, lanes, strict=True) if i < len(lane.buckets)]
            for i in range(plan.num_buckets)
        ]
        compared = [(s, bucket) for row in steps for s, bucket in row if isinstance(s, DeltaSource)]
        ahead = iter(compared[1:])
        for index, row in enumerate(steps):
            before(index)
            for source, bucket in row:
                if isinstance(source, DeltaSource):
                    source.prepare(bucket)
                    if (following := next(ahead, None)) is not None:
                        following[0].prepare(following[1])
                source.move(bucket)

    def close(self) -> None:
        """Give back the memory that was taken beside the weights, and leave NCCL."""
        self._chains.forget()
        self._workers.shutdown()
        self._crossing = None
        self._abort_pairs()
        self._workspace = None
        if self._showcase is not None:
            self._showcase.close()
            self._showcase = None

    def _abort_pairs(self) -> None:
        for pair in self._pairs.values():
            pair.abort()

    def _show(self, plan: Plan, lanes: Sequence[Lane], tensors: Sequence[torch.Tensor]) -> Shown | None:
        if not any(self._links[lane.inference] == GPU_PULL for lane in lanes):
            return None
        if self._showcase is None:
            assert self._device is not None, "an updater chose to pull from a GPU that nobody told it of"
            self._showcase = Showcase(self._device)
        if self._wanted[0] != plan.digest:
            self._wanted = (plan.digest, self._wanted_dtypes(lanes, tensors))
        return self._showcase.prepare(tensors, self._wanted[1])

    def _wanted_dtypes(self, lanes: Sequence[Lane], tensors: Sequence[torch.Tensor]) -> list[torch.dtype]:
        """Per shard the one dtype it is written as; its own where targets differ, and sinks cast."""
        found: list[set[str]] = [set() for _ in tensors]
        for lane in lanes:
            targets = self._mapping.ranks[lane.inference].targets
            for bucket in lane.buckets:
                for copy in bucket.copies:
                    found[copy.shard].add(targets[copy.target].dtype)
        return [
            getattr(torch, next(iter(names))) if len(names) == 1 else tensor.dtype
            for names, tensor in zip(found, tensors, strict=True)
        ]

    def _source(
        self,
        lane: Lane,
        tensors: Sequence[torch.Tensor],
        shown: Shown | None,
        timeout_s: float,
        encoding: Encoding,
        *,
        checked: bool,
    ) -> Source:
        link = DataLink(
            self._group,
            self._world_size + lane.inference,
            who=f"the updater of inference rank {lane.inference}",
            timeout_s=timeout_s,
        )
        transport = self._links[lane.inference]
        if transport == GPU_PULL:
            assert shown is not None
            assert self._showcase is not None
            return DevicePullSource(link, shown, lane, self._showcase, checked=checked)
        if transport == PULL:
            return PullSource(link, tensors)
        targets = self._mapping.ranks[lane.inference].targets
        wire_dtypes = [getattr(torch, target.dtype) for target in targets]
        if transport == NCCL:
            assert self._workspace is not None
            pair = self._pairs[lane.inference]
            return NcclSource(link, pair, tensors, wire_dtypes, lane, self._workspace, checked=checked)
        if encoding == "dense":
            return GlooSource(link, tensors, wire_dtypes, self._buffers)
        chain = self._chains.of(lane.inference, lane)
        whole = {index for index, target in enumerate(targets) if target.transform}
        return DeltaSource(
            link,
            tensors,
            wire_dtypes,
            self._buffers,
            chain,
            whole=whole,
            workers=self._workers,
            snapshot=self._snapshot,
            crossing=self._crossing,
        )
