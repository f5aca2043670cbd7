"""How one updater takes the trainers' buckets: a transport for each trainer rank, and a sink for each lane.

Made with the updater, joined to the trainers of one epoch. The updater says what is staged and where; this
knows by which way the bytes come.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from bridge.errors import TransferError
from bridge.protocol.mapping import Mapping, RankMap
from bridge.protocol.plan import Lane, Plan
from bridge.wire import cuda, device_memory, nccl, peer_memory, rendezvous
from bridge.wire.copy_jobs import LaneSteps
from bridge.wire.delta_transport import Chains, DeltaSink
from bridge.wire.device_checksum import DeviceChecksums
from bridge.wire.device_memory import PeerAllocations
from bridge.wire.device_transport import DevicePullSink, Engines, SummedRounds
from bridge.wire.meeting import KEPT_PLANS, Meeting, Round
from bridge.wire.nccl_transport import NcclSink, Workspace
from bridge.wire.transport import (
    GLOO,
    GPU_PULL,
    NCCL,
    PULL,
    SLOWEST_BYTES_PER_S,
    DataLink,
    GlooSink,
    Landing,
    PullSink,
    Sink,
)
from bridge.wire.turns import Turns
from vllm_patching.staging import torch_dtype

logger = logging.getLogger(__name__)


class Join(msgspec.Struct, kw_only=True):
    """The daemon's order to meet the trainers of a new epoch."""

    epoch: int
    host: str
    port: int
    address: str
    num_trainers: int
    group_rank: int
    group_size: int
    transport: str
    checksum: str
    deadline_s: float


class Intake:
    """The receiving ends of one inference rank."""

    def __init__(
        self, rank: int, mapping: Mapping, device: torch.device, *, batches: Callable[[], int] | None = None
    ) -> None:
        """``device`` is where the halves are.

        ``batches`` says how many its worker has begun, where it decodes while a round is under way.
        """
        self._batches = batches
        self.rank = rank
        self._mapping = mapping
        self._rank_map: RankMap = mapping.ranks[rank]
        self._device = device
        self._meeting: Meeting | None = None
        self._links: list[str] = []
        self._group: Any = None
        self._join: Join | None = None
        self._summed = SummedRounds("off")
        self._where: list[peer_memory.Whereabouts] = []
        self._buffers: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._shown: defaultdict[int, PeerAllocations] = defaultdict(PeerAllocations)
        self._steps: dict[tuple[bytes, int], LaneSteps] = {}
        self._pairs: dict[int, nccl.Pair] = {}
        self._workspace: Workspace | None = None
        self._engines = Engines(device) if device.type == "cuda" else None
        self._chains = Chains()

    def prepare(self) -> None:
        """Pay now what the first round would else wait for: compiling a kernel."""
        if self._engines is not None:
            sums = DeviceChecksums(1, self._device, self._engines.sums)
            sums.add(0, torch.zeros(1 << 10, dtype=torch.bfloat16, device=self._device))
            sums.digests()

    def join(self, order: Join) -> list[str]:
        """Meet the trainers: choose a transport for each, then form the data group; returns the transports.

        Raises:
            BridgeError: a trainer rank did not come in time, or the transport that was asked for cannot be.
        """
        store = rendezvous.reach_store(order.host, order.port, timeout_s=order.deadline_s)
        self._meeting = Meeting(store, self._mapping, epoch=order.epoch, timeout_s=order.deadline_s)
        self._join = order
        self._chains = Chains()
        self._summed = SummedRounds(order.checksum)
        self._where = [self._meeting.whereabouts(t) for t in range(order.num_trainers)]
        self._links = [self._choose(t, order.transport) for t in range(order.num_trainers)]
        self._meeting.publish_links(self.rank, self._links)
        self._group = rendezvous.make_group(
            store,
            f"e{order.epoch}/data",
            rank=order.group_rank,
            size=order.group_size,
            address=order.address,
            timeout_s=order.deadline_s,
            named=rendezvous.members(order.num_trainers, "the updater of inference rank"),
        )
        self._pairs = self._join_pairs(order, store)
        return self._links

    def _join_pairs(self, order: Join, store: rendezvous.Store) -> dict[int, nccl.Pair]:
        pairs = {
            trainer: nccl.Pair(
                nccl.store_of(store, order.epoch, trainer, self.rank),
                device=self._device,
                is_trainer=False,
                who=f"trainer rank {trainer} (pid {self._where[trainer].pid} on {self._where[trainer].host})",
                timeout_s=order.deadline_s * (order.num_trainers + len(self._mapping.ranks)),
            )
            for trainer, link in enumerate(self._links)
            if link == NCCL
        }
        if pairs:
            self._workspace = Workspace(self._device)
        return pairs

    def _choose(self, trainer: int, transport: str) -> str:
        if transport == GLOO:
            return GLOO
        where = self._where[trainer]
        if transport == NCCL:
            return self._insist(transport, trainer, self._why_no_nccl(where))
        if self._engines is None:
            why_not = "its weights are on a GPU" if where.on_gpu else peer_memory.can_pull(where)
            if not why_not:
                return PULL
        else:
            why_not = self._why_no_gpu_pull(where)
            if not why_not:
                return GPU_PULL
        if transport == PULL:
            return self._insist(transport, trainer, why_not)
        why_no_nccl = self._why_no_nccl(where)
        chosen = GLOO if why_no_nccl else NCCL
        if self._engines is not None:
            why_not += f"; nor by nccl: {why_no_nccl}" if why_no_nccl else ""
        logger.info("rank %d takes trainer rank %d's buckets by %s: %s", self.rank, trainer, chosen, why_not)
        return chosen

    def _insist(self, transport: str, trainer: int, why_not: str) -> str:
        if why_not:
            raise TransferError(
                f"--transport {transport} was asked for, but updater {self.rank} cannot take trainer rank "
                f"{trainer}'s buckets so: {why_not}"
            )
        return transport

    def _why_no_nccl(self, where: peer_memory.Whereabouts) -> str:
        if self._engines is None:
            return "this server's weights are in host memory"
        return nccl.why_not(where.gpu, self._device)

    def _why_no_gpu_pull(self, where: peer_memory.Whereabouts) -> str:
        if where.gpu is None:
            place = "on a GPU that cannot be shown" if where.on_gpu else "in host memory"
            return f"its weights are {place}, this server's on a GPU"
        if where.boot_id != rendezvous.boot_id():
            return f"{where.host} is another host"
        return device_memory.can_pull(where.gpu, self._device)

    def plan(self, joint: str, digest: str) -> tuple[Plan, Round]:
        """The plan of a joint layout, and what the round is like.

        Raises:
            TransferError: ``digest`` (trainer rank 0's, in hex) is another plan's.
        """
        assert self._meeting is not None
        plan, _, description = self._meeting.plan(joint)
        if plan.digest.hex() != digest:
            raise TransferError(
                f"plan digests differ: trainer rank 0 has {digest}, updater {self.rank} has "
                f"{plan.digest.hex()}; both sides must read the same mapping file"
            )
        return plan, description

    def adapter(self, joint: str) -> str:
        """The vocabulary of the adapter that the round carries; "" if it carries weights of the model."""
        assert self._meeting is not None
        _, layouts, _ = self._meeting.plan(joint)
        name = layouts[0].vocabulary
        return name if self._mapping.vocabulary(name).adapter else ""

    def follows(self, joint: str) -> bool:
        """Whether the round carries only what has changed since the round before."""
        return self._chains.follow(joint)

    def forget(self) -> None:
        """What is served is no longer what the last round brought: the next one comes whole."""
        self._chains.forget()

    @property
    def transport(self) -> str:
        """The transports in use."""
        return "+".join(sorted(set(self._links)))

    def receive(self, plan: Plan, joint: str, landing: Landing, served: Landing | None) -> int:
        """Take all of this rank's lanes of ``plan``; returns the bytes that came. They are in place then.

        If the round ``follows``, what is served must lie there before, or else in ``served``.

        Raises:
            TransferError: a peer was lost, or a checksum does not match.
        """
        lanes, checked = self._lanes(plan), self._summed.includes(plan.digest)
        follows = self.follows(joint)
        with self._chains.round(joint):
            sinks = [
                self._sink(lane, len(lanes), joint, plan, checked=checked, follows=follows, served=served)
                for lane in lanes
            ]
            for sink in sinks:
                sink.open()
            for index in range(plan.num_buckets):
                for lane, sink in zip(lanes, sinks, strict=True):
                    if index < len(lane.buckets):
                        sink.move(lane.buckets[index], landing)
            for sink in sinks:
                sink.close()
        return sum(
            sink.received_bytes
            if isinstance(sink, GlooSink | DeltaSink)
            else sum(b.nbytes for b in lane.buckets)
            for lane, sink in zip(lanes, sinks, strict=True)
        )

    def _lanes(self, plan: Plan) -> list[Lane]:
        lanes = [lane for lane in plan.lanes if lane.inference == self.rank]
        if all(self._links[lane.trainer] == GPU_PULL for lane in lanes):
            # Updaters that begin with different trainers share the trainers' links better.
            start = self.rank % max(len(lanes), 1)
            lanes = lanes[start:] + lanes[:start]
        return lanes

    def _sink(
        self,
        lane: Lane,
        lanes: int,
        joint: str,
        plan: Plan,
        *,
        checked: bool,
        follows: bool,
        served: Landing | None,
    ) -> Sink:
        assert self._meeting is not None
        assert self._join is not None
        where = self._where[lane.trainer]
        link = DataLink(
            self._group,
            lane.trainer,
            who=f"trainer rank {lane.trainer} (pid {where.pid} on {where.host})",
            timeout_s=self._join.deadline_s + plan.total_bytes / SLOWEST_BYTES_PER_S,
        )
        if self._links[lane.trainer] == GPU_PULL:
            assert self._engines is not None
            streams = self._engines.share(lane.trainer, lanes)
            peer, steps = self._shown[lane.trainer], self._lane_steps(plan, lane)
            engines, turns = self._engines, self._turns(where, streams)
            return DevicePullSink(link, lane, peer, steps, engines, streams, checked=checked, turns=turns)
        if self._links[lane.trainer] == PULL:
            _, layouts, _ = self._meeting.plan(joint)
            return PullSink(link, where.pid, layouts[lane.trainer])
        dtypes = [torch_dtype(target.dtype) for target in self._rank_map.targets]
        if self._links[lane.trainer] == NCCL:
            assert self._workspace is not None
            return NcclSink(link, self._pairs[lane.trainer], lane, dtypes, self._workspace, checked=checked)
        _, _, description = self._meeting.plan(joint)
        if description.encoding == "dense":
            return GlooSink(link, lane, dtypes, self._buffers[lane.trainer])
        chain = self._chains.of(lane.trainer, lane)
        buffers = self._buffers[lane.trainer]
        return DeltaSink(link, lane, dtypes, buffers, chain, follows=follows, served=served)

    def _turns(self, where: peer_memory.Whereabouts, streams: Sequence[torch.cuda.Stream]) -> Turns | None:
        if where.gpu is None or where.gpu.uuid != cuda.uuid_of(self._device) or self._batches is None:
            return None
        rate = cuda.memory_bytes_per_s(self._device)
        return Turns(rate, streams, self._batches) if rate else None

    def _lane_steps(self, plan: Plan, lane: Lane) -> LaneSteps:
        """The lane's copy jobs; those of other plans but the last few are forgotten."""
        key = (plan.digest, lane.trainer)
        if key not in self._steps:
            while len(self._steps) >= KEPT_PLANS * max(len(self._links), 1):
                del self._steps[next(iter(self._steps))]
            self._steps[key] = LaneSteps([torch_dtype(target.dtype) for target in self._rank_map.targets])
        self._steps[key] = self._steps.pop(key)  # those that were not used for the longest time go first
        return self._steps[key]
