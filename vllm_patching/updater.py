"""One inference rank's updater: receives a version into the inactive half, and never touches the live one.

With ``--staging in-place`` there is only the live one: then it checks all it can, asks the daemon for leave,
and writes while the engine stands still.

A child of the daemon, in a process of its own, so that a transfer that hangs can be ended without a trace:
the daemon kills it and starts another. It takes orders over the node's socket and meets the trainer ranks
in the data group.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from safetensors import safe_open

from bridge import telemetry
from bridge.errors import BridgeError, ProtocolError, TransferError
from bridge.protocol.mapping import Mapping, RankMap
from bridge.protocol.plan import Lane, Plan
from bridge.wire import device_memory, nccl, peer_memory, rendezvous
from bridge.wire.copy_jobs import LaneSteps
from bridge.wire.device_checksum import DeviceChecksums
from bridge.wire.device_memory import PeerAllocations
from bridge.wire.device_transport import DevicePullSink, Engines, SummedRounds
from bridge.wire.meeting import Meeting
from bridge.wire.nccl_transport import NcclSink, Workspace
from bridge.wire.transport import (
    GLOO,
    GPU_PULL,
    NCCL,
    PULL,
    SLOWEST_BYTES_PER_S,
    DataLink,
    GlooSink,
    PullSink,
    Sink,
)
from vllm_patching import compat, update_files
from vllm_patching.arena import Halves, adopt
from vllm_patching.channel import Channel, ChannelClosed
from vllm_patching.fixed_arena import COPY
from vllm_patching.staging import Staging, torch_dtype, writes_by_source

logger = logging.getLogger("vllm_patching.updater")  # __name__ is __main__ here

CONNECT_TIMEOUT_S = 30.0
KEPT_PLANS = 4  # copy jobs of so many plans are kept; a training run has one, or two
_PR_SET_PDEATHSIG = 1


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


class Updater:
    """State of one updater process."""

    def __init__(self, rank: int, mapping: Mapping, halves: Halves, channel: Channel, *, arena: str) -> None:
        """``arena`` is the kind that the halves belong to."""
        self.rank = rank
        self._channel = channel
        self._copies = arena == COPY
        self._in_step = False  # whether the half to be filled holds what is served
        self.mapping = mapping
        self.rank_map: RankMap = mapping.ranks[rank]
        self.halves = halves
        self.meeting: Meeting | None = None
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
        self._engines = Engines(halves.device) if halves.device.type == "cuda" else None

    def prepare(self) -> None:
        """Pay now what the first round would else wait for: importing vLLM's packing, compiling a kernel."""
        if any(target.transform for target in self.rank_map.targets):
            compat.import_transforms()
        if self._engines is not None:
            sums = DeviceChecksums(1, self.halves.device, self._engines.sums)
            sums.add(0, torch.zeros(1 << 10, dtype=torch.bfloat16, device=self.halves.device))
            sums.digests()

    def join(self, order: Join) -> dict[str, Any]:
        """Meet the trainers: choose a transport for each, then form the data group."""
        store = rendezvous.reach_store(order.host, order.port, timeout_s=order.deadline_s)
        self.meeting = Meeting(store, self.mapping, epoch=order.epoch, timeout_s=order.deadline_s)
        self._join = order
        self._summed = SummedRounds(order.checksum)
        self._where = [self.meeting.whereabouts(t) for t in range(order.num_trainers)]
        self._links = [self._choose(t, order.transport) for t in range(order.num_trainers)]
        self.meeting.publish_links(self.rank, self._links)
        self._group = rendezvous.make_group(
            store,
            f"e{order.epoch}/data",
            rank=order.group_rank,
            size=order.group_size,
            address=order.address,
            timeout_s=order.deadline_s,
        )
        self._pairs = self._join_pairs(order, store)
        return {"type": "joined", "links": self._links}

    def _join_pairs(self, order: Join, store: rendezvous.Store) -> dict[int, nccl.Pair]:
        pairs = {
            trainer: nccl.Pair(
                nccl.store_of(store, order.epoch, trainer, self.rank),
                device=self.halves.device,
                is_trainer=False,
                who=f"trainer rank {trainer} (pid {self._where[trainer].pid} on {self._where[trainer].host})",
                timeout_s=order.deadline_s,
            )
            for trainer, link in enumerate(self._links)
            if link == NCCL
        }
        if pairs:
            self._workspace = Workspace(self.halves.device)
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
        return nccl.why_not(where.gpu, self.halves.device)

    def _why_no_gpu_pull(self, where: peer_memory.Whereabouts) -> str:
        if where.gpu is None:
            place = "on a GPU that cannot be shown" if where.on_gpu else "in host memory"
            return f"its weights are {place}, this server's on a GPU"
        if where.boot_id != rendezvous.boot_id():
            return f"{where.host} is another host"
        return device_memory.can_pull(where.gpu, self.halves.device)

    def stage(
        self, *, joint: str, plan_digest: str, half: int, leave_s: float = 0.0, torn: str = ""
    ) -> dict[str, Any]:
        """Receive one whole version into half ``half``.

        Args:
            joint: key of the joint layout.
            plan_digest: trainer rank 0's, in hex.
            half: where to.
            leave_s: above 0 if the half is live: how long to wait for leave to write it.
            torn: why the live half holds no whole version, if so; a part would not repair it.

        Raises:
            TransferError: plan digests differ, a peer was lost, or a checksum does not match.
        """
        assert self.meeting is not None
        plan, _, description = self.meeting.plan(joint)
        if plan.digest.hex() != plan_digest:
            raise TransferError(
                f"plan digests differ: trainer rank 0 has {plan_digest}, updater {self.rank} has "
                f"{plan.digest.hex()}; both sides must read the same mapping file"
            )
        if torn and description.partial:
            raise TransferError(f"a part of the parameters cannot repair the weights: {torn}")
        self._ask_leave(leave_s)
        start = time.perf_counter()
        staging = self._staging(half, partial=description.partial)
        lanes = self._lanes(plan)
        self._receive(plan, lanes, joint, staging)
        staging.finish()
        self.halves.synchronize()
        self._in_step = self._copies  # by the time of the next order, the flip has made both halves equal
        seconds = time.perf_counter() - start
        nbytes = sum(bucket.nbytes for lane in lanes for bucket in lane.buckets)
        return {"bytes": nbytes, "seconds": seconds, "transport": "+".join(sorted(set(self._links)))}

    def _ask_leave(self, leave_s: float) -> None:
        """Nothing is left but to write: over live weights, wait until the engine stands still.

        Raises:
            TransferError: no leave came.
            ChannelClosed: the daemon died.
        """
        if not leave_s:
            return
        self._channel.send({"type": "poised"})
        self._channel.sock.settimeout(leave_s)
        try:
            message, _ = self._channel.receive()
        except TimeoutError:
            raise TransferError(
                f"updater {self.rank} got no leave to write within {leave_s:g} s from the daemon (pid "
                f"{self._channel.pid}); nothing was written"
            ) from None
        finally:
            self._channel.sock.settimeout(None)
        if message["type"] != "write":
            raise ProtocolError(
                f"updater {self.rank} waits for leave to write and was told {message['type']!r}"
            )

    def _staging(self, half: int, *, partial: bool) -> Staging:
        in_step, self._in_step = self._in_step, False  # until this round has ended well
        if partial and len(self.halves.halves) == 2 and not in_step:
            # The inactive half is a version old: bring it up to date before changing a part of it.
            self.halves.halves[half].copy_(self.halves.halves[1 - half])
            self.halves.synchronize()  # or it might overtake what arrives on other streams
        return Staging(self.halves.halves[half], self.rank_map.targets)

    def _lanes(self, plan: Plan) -> list[Lane]:
        lanes = [lane for lane in plan.lanes if lane.inference == self.rank]
        if all(self._links[lane.trainer] == GPU_PULL for lane in lanes):
            # Updaters that begin with different trainers share the trainers' links better.
            start = self.rank % max(len(lanes), 1)
            lanes = lanes[start:] + lanes[:start]
        return lanes

    def _receive(self, plan: Plan, lanes: Sequence[Lane], joint: str, staging: Staging) -> None:
        checked = self._summed.includes(plan.digest)
        sinks = [self._sink(lane, joint, plan, checked=checked) for lane in lanes]
        for sink in sinks:
            sink.open()
        for index in range(plan.num_buckets):
            for lane, sink in zip(lanes, sinks, strict=True):
                if index < len(lane.buckets):
                    sink.move(lane.buckets[index], staging)
        for sink in sinks:
            sink.close()

    def _sink(self, lane: Lane, joint: str, plan: Plan, *, checked: bool) -> Sink:
        assert self.meeting is not None
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
            streams = self._engines.share(lane.trainer, sum(one.inference == self.rank for one in plan.lanes))
            peer, steps = self._shown[lane.trainer], self._lane_steps(plan, lane)
            return DevicePullSink(link, lane, peer, steps, self._engines, streams, checked=checked)
        if self._links[lane.trainer] == PULL:
            _, layouts, _ = self.meeting.plan(joint)
            return PullSink(link, where.pid, layouts[lane.trainer])
        dtypes = [torch_dtype(target.dtype) for target in self.rank_map.targets]
        if self._links[lane.trainer] == NCCL:
            assert self._workspace is not None
            return NcclSink(link, self._pairs[lane.trainer], lane, dtypes, self._workspace, checked=checked)
        return GlooSink(link, lane, dtypes, self._buffers[lane.trainer])

    def _lane_steps(self, plan: Plan, lane: Lane) -> LaneSteps:
        """The lane's copy jobs; those of other plans but the last few are forgotten."""
        key = (plan.digest, lane.trainer)
        if key not in self._steps:
            while len(self._steps) >= KEPT_PLANS * max(len(self._links), 1):
                del self._steps[next(iter(self._steps))]
            self._steps[key] = LaneSteps([torch_dtype(target.dtype) for target in self.rank_map.targets])
        return self._steps[key]

    def stage_file(self, *, path: str, half: int, leave_s: float = 0.0, torn: str = "") -> dict[str, Any]:  # noqa: ARG002 - files hold all, and repair
        """Stage a whole version from safetensors files (a file, or a folder of them); see ``stage``.

        Raises:
            MappingError: lists every tensor missing, extra, or of another shape.
        """
        start = time.perf_counter()
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        found = update_files.index(files)
        name = update_files.match_vocabulary(self.mapping, self.rank_map, found)
        listed = self.mapping.vocabulary(name).sources
        grouped = writes_by_source(self.rank_map.writes[name])
        self._ask_leave(leave_s)
        staging = self._staging(half, partial=False)
        nbytes = 0
        with torch.no_grad():
            for index, source in enumerate(listed):
                if index not in grouped:
                    continue
                with safe_open(found[source.name], framework="pt") as file:
                    tensor = file.get_tensor(source.name)
                staging.apply(grouped[index], tensor)
                nbytes += tensor.numel() * tensor.element_size()
        staging.finish()
        self.halves.synchronize()
        self._in_step = self._copies
        return {"bytes": nbytes, "seconds": time.perf_counter() - start, "transport": "file"}


def _serve(channel: Channel, updater: Updater) -> NoReturn:
    while True:
        message, _ = channel.receive()
        kind = message.pop("type")
        try:
            if kind == "join":
                answer = updater.join(msgspec.convert(message, Join))
            elif kind == "stage":
                answer = {"type": "staged", **updater.stage(**message)}
            elif kind == "stage_file":
                answer = {"type": "staged", **updater.stage_file(**message)}
            else:
                raise ProtocolError(f"updater {updater.rank} does not know the order {kind!r}")
        except BridgeError as err:
            logger.error("rank %d: %s failed: %s", updater.rank, kind, err)
            answer = {"type": "failed", "error": str(err)}
        except (
            RuntimeError,
            OSError,
        ) as err:  # torch's: out of memory, a lost device; this is the end
            logger.exception("rank %d: %s failed", updater.rank, kind)
            reason = f"{type(err).__name__}: {rendezvous.first_line(err)}"
            channel.send({"type": "failed", "error": f"updater {updater.rank} ended: {reason}"})
            raise SystemExit(1) from err
        channel.send(answer)


def _die_with(daemon_pid: int) -> None:
    """Ask Linux to kill this process when its daemon dies, wherever it stands.

    A transfer that outlived its daemon would go on writing a half that the next daemon may make live.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon_pid:
        raise SystemExit(f"the daemon (pid {daemon_pid}) died before this updater had started")


def main() -> int:
    """Entry point: ``python -m vllm_patching.updater --run-dir D --rank R``."""
    parser = argparse.ArgumentParser(prog="vllm_patching.updater")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--daemon-pid", type=int, required=True)
    args = parser.parse_args()
    _die_with(args.daemon_pid)
    telemetry.configure(role="updater", rank=args.rank)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when updaters end
    torch.set_num_threads(1)  # the cores belong to the decode
    try:
        return _run(args.run_dir, args.rank)
    except ChannelClosed as err:
        logger.info("rank %d: the daemon is gone, or done with this updater: %s", args.rank, err)
        return 0


def _run(run_dir: Path, rank: int) -> int:
    """Meet the daemon and follow its orders; returns the exit code.

    Raises:
        ChannelClosed: the daemon ended, which is how an updater's life ends too.
    """
    try:
        channel = Channel.connect(run_dir, timeout_s=CONNECT_TIMEOUT_S)
    except (FileNotFoundError, ConnectionRefusedError) as err:
        raise ChannelClosed(f"nobody listens in {run_dir}: {err}") from err
    hello = {"type": "updater", "rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
    channel.send(hello)
    welcome, fds = channel.receive()
    if welcome.get("type") != "welcome":
        logger.error("the daemon refused updater %d: %s", rank, welcome)
        return 1
    mapping = msgspec.convert(welcome["mapping"], Mapping)
    handles, kind = tuple(welcome["handles"]), welcome["arena"]
    halves = adopt(fds, mapping.ranks[rank].arena_bytes, welcome["gpu"], handles, kind)
    channel.sock.settimeout(None)
    updater = Updater(rank, mapping, halves, channel, arena=kind)
    updater.prepare()
    channel.send({"type": "ready"})
    _serve(channel, updater)


if __name__ == "__main__":
    raise SystemExit(main())
