"""The ends of real rounds without a vLLM: updaters and trainer ranks, each a process on a host of its own.

``simulation_check.py`` starts them and tells them what to do.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bridge.moving import Mover
from bridge.protocol import mapping as mappings
from bridge.protocol.plan import Bucket, Copy, Layout, Shard
from bridge.sharding import LocalShards
from bridge.wire import rendezvous
from bridge.wire.checksum import checksum_of
from bridge.wire.meeting import Meeting
from bridge.wire.peer_memory import Nonce
from bridge.wire.transport import PullSink, PullSource, pack, unpack
from vllm_patching.channel import Channel
from vllm_patching.intake import Join
from vllm_patching.updater import Updater

EPOCH = 1
DEADLINE_S = 60.0
REPEATS = 5
_CLONE_NEWNET = 0x40000000


class UpdaterEnd:
    """One inference rank; rank 0 of a server has its store."""

    def __init__(self, spec: dict[str, Any]) -> None:
        document = mappings.load(Path(spec["mapping"]))
        self._spec, nbytes = spec, document.ranks[spec["rank"]].arena_bytes
        halves: Any = SimpleNamespace(
            nbytes=nbytes,
            device=torch.device("cpu"),
            halves=tuple(torch.ones(nbytes, dtype=torch.uint8) for _ in range(2)),
            synchronize=lambda: None,
        )
        self._pair = socket.socketpair(socket.AF_UNIX)
        self._updater = Updater(spec["rank"], document, halves, Channel(self._pair[0]), arena="remap")
        self._store: Any = None

    def serve(self) -> int:
        """Open the server's store; its port."""
        self._store = rendezvous.serve_store(self._spec["address"], 0)
        return int(self._store.port)

    def join(self, *, store: str, port: int, trainers: int, ranks: int, transport: str) -> dict[str, Any]:
        """Meet the trainers."""
        return self._updater.join(
            Join(
                epoch=EPOCH, host=store, port=port, address=self._spec["address"], num_trainers=trainers,
                group_rank=trainers + self._spec["rank"], group_size=trainers + ranks,
                transport=transport, checksum="first", deadline_s=DEADLINE_S,
            )
        )  # fmt: skip

    def stage(self, *, joint: str, plan_digest: str, half: int) -> dict[str, Any]:
        """Take one version."""
        return self._updater.stage(joint=joint, plan_digest=plan_digest, half=half)


class TrainerEnd:
    """One trainer rank, with a thread for each server."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._documents = [mappings.load(Path(path)) for path in spec["mappings"]]
        self._layout: Layout = spec["layout"]
        tensors = [
            torch.randint(0, 255, (2 * math.prod(s.shape),), dtype=torch.uint8)
            .view(torch.bfloat16)
            .view(s.shape)
            for s in self._layout.shards
        ]
        self._shards = LocalShards(self._layout, tensors, (True,) * len(tensors))
        self._threads = ThreadPoolExecutor(len(self._documents))
        self._meetings: list[Meeting] = []
        self._movers: list[Mover] = []
        self._nonces: list[Nonce] = []

    def join(self, *, stores: list[tuple[str, int]], trainers: int) -> int:
        """Meet all servers' updaters."""
        made = list(self._threads.map(lambda pair: self._meet(*pair, trainers), enumerate(stores)))
        self._movers = [mover for mover, _, _ in made]
        self._meetings = [meeting for _, meeting, _ in made]
        self._nonces = [nonce for _, _, nonce in made]
        return len(made)

    def _meet(self, index: int, where: tuple[str, int], trainers: int) -> tuple[Mover, Meeting, Nonce]:
        rank, document = self._spec["rank"], self._documents[index]
        ranks = len(document.ranks)
        store = rendezvous.reach_store(*where, timeout_s=DEADLINE_S)
        meeting = Meeting(store, document, epoch=EPOCH, timeout_s=DEADLINE_S)
        nonce = Nonce()
        meeting.publish_whereabouts(rank, nonce.whereabouts(f"host {rank}", on_gpu=False, gpu=None))
        group = rendezvous.make_group(
            store, f"e{EPOCH}/data", rank=rank, size=trainers + ranks, address=self._spec["address"],
            timeout_s=DEADLINE_S,
        )  # fmt: skip
        links = [meeting.links(inference)[rank] for inference in range(ranks)]
        mover = Mover(
            group, links, document, rank=rank, world_size=trainers, deadline_s=DEADLINE_S, device=None,
            checksum="first",
        )  # fmt: skip
        return mover, meeting, nonce

    def layouts(self) -> list[str]:
        """Publish what this rank holds; a digest for each server."""
        return [meeting.publish_layout(self._layout).hex() for meeting in self._meetings]

    def begin(self, *, layouts: list[list[str]], bucket_bytes: int) -> list[tuple[str, str]]:
        """Rank 0: publish the round; the joint layout's key and the plan's digest, for each server."""
        found = []
        for server, meeting in enumerate(self._meetings):
            digests = [bytes.fromhex(digests[server]) for digests in layouts]
            joint = meeting.publish_round(digests, partial=False, encoding="dense", bucket_bytes=bucket_bytes)
            found.append((joint, meeting.plan(joint)[0].digest.hex()))
        return found

    def prepare(self, *, joints: list[str]) -> int:
        """Plan, so that the round need not."""
        return sum(len(m.plan(joint)[0].lanes) for m, joint in zip(self._meetings, joints, strict=True))

    def move(self, *, joints: list[str]) -> float:
        """Send one version to every server; seconds."""
        start = time.perf_counter()

        def send(server: int) -> None:
            plan, _, _ = self._meetings[server].plan(joints[server])
            self._movers[server].move(
                plan, self._shards, joint=joints[server], encoding="dense", before=lambda _: None
            )

        list(self._threads.map(send, range(len(joints))))
        return time.perf_counter() - start


class BareEnd:
    """One end of what is measured by itself: a link, a Gloo pair, memory."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._listener: socket.socket | None = None
        self._store: Any = None
        self._group: Any = None

    def listen(self) -> int:
        """Wait for a plain TCP connection; the port."""
        self._listener = socket.create_server((self._spec["address"], 0))
        return int(self._listener.getsockname()[1])

    def take(self, *, nbytes: int) -> float:
        """Accept and read; bytes per second from the first byte to the last."""
        assert self._listener is not None
        self._listener.settimeout(DEADLINE_S)
        sock, _ = self._listener.accept()
        with sock:
            sock.settimeout(DEADLINE_S)
            buffer = memoryview(bytearray(1 << 20))
            got = first = sock.recv_into(buffer)
            start = time.perf_counter()
            while got < nbytes:
                if not (count := sock.recv_into(buffer)):
                    raise EOFError(f"the link ended after {got} of {nbytes} bytes")
                got += count
            return (got - first) / (time.perf_counter() - start)

    def give(self, *, host: str, port: int, nbytes: int) -> int:
        """Connect and write."""
        with socket.create_connection((host, port), timeout=DEADLINE_S) as sock:
            data = bytes(1 << 20)
            for _ in range(nbytes >> 20):
                sock.sendall(data)
        return nbytes

    def store(self) -> int:
        """Open a store for a pair of Gloo ranks; the port."""
        self._store = rendezvous.serve_store(self._spec["address"], 0)
        return int(self._store.port)

    def pair(self, *, host: str, port: int, rank: int) -> int:
        """Form the pair."""
        store = rendezvous.reach_store(host, port, timeout_s=DEADLINE_S)
        self._group = rendezvous.make_group(
            store, "bare", rank=rank, size=2, address=self._spec["address"], timeout_s=DEADLINE_S
        )
        return rank

    def gloo(self, *, sends: bool, nbytes: int, bucket_bytes: int) -> tuple[float, float]:
        """Send or receive, two buckets under way at a time; bytes, and a core's seconds, in a second."""
        buffers = [torch.ones(bucket_bytes, dtype=torch.uint8) for _ in range(2)]
        pending: list[Any] = []
        start, spent = time.perf_counter(), time.process_time()
        for index in range(nbytes // bucket_bytes):
            post = self._group.send if sends else self._group.recv
            pending.append(post([buffers[index % 2]], 0 if not sends else 1, index))
            if len(pending) == 2:
                pending.pop(0).wait()
        for work in pending:
            work.wait()
        seconds = time.perf_counter() - start
        return nbytes / seconds, (time.process_time() - spent) / seconds

    def hold(self, *, nbytes: int) -> tuple[int, int]:
        """Keep a trainer's memory for another process to read; pid and address."""
        self._held = torch.ones(nbytes // 2, dtype=torch.bfloat16)
        return os.getpid(), self._held.data_ptr()

    def packing(self, *, nbytes: int, bucket_bytes: int, width: int) -> float:
        """Seconds in which one thread packs a bucket: rows of ``width`` bytes, as far apart (0: no rows)."""
        source, buffer = torch.ones(nbytes // 2, dtype=torch.bfloat16), _empty(bucket_bytes)
        return _each(
            _buckets(nbytes, bucket_bytes, width), lambda b: pack(b, [source], [torch.bfloat16], buffer)
        )

    def unpacking(self, *, nbytes: int, bucket_bytes: int, width: int) -> float:
        """Seconds in which one thread puts a bucket in place."""
        landing, buffer = _Landing(nbytes), _empty(bucket_bytes)
        return _each(_buckets(nbytes, bucket_bytes, width), lambda b: unpack(b, buffer, landing))

    def summing(self, *, nbytes: int, bucket_bytes: int, width: int) -> float:
        """Seconds of the checksum over a buffer that was just written."""
        buffer = _empty(bucket_bytes)
        return _each(_buckets(nbytes, bucket_bytes, width), lambda _: checksum_of(buffer))

    def showing(self, *, nbytes: int, bucket_bytes: int, width: int) -> float:
        """Seconds in which a trainer sums a bucket where it lies, to be pulled."""
        link: Any = None
        source = PullSource(link, [torch.ones(nbytes // 2, dtype=torch.bfloat16)])
        return _each(_buckets(nbytes, bucket_bytes, width), source.move)

    def pulling(self, *, pid: int, address: int, nbytes: int, bucket_bytes: int, width: int) -> float:
        """Seconds in which an updater reads a bucket from that process, and sums it."""
        link: Any = SimpleNamespace(who=f"pid {pid}")
        shard = Shard(source=0, offset=(0,), shape=(nbytes // 2,), dtype="bfloat16")
        sink = PullSink(link, pid, Layout(rank=0, vocabulary="", shards=(shard,)))
        landing = _Landing(nbytes)
        sink._addresses = [address]
        return _each(_buckets(nbytes, bucket_bytes, width), lambda bucket: sink.move(bucket, landing))


class _Landing:
    """A half of one target."""

    def __init__(self, nbytes: int) -> None:
        self._half = torch.ones(nbytes // 2, dtype=torch.bfloat16)

    def view(self, target: int, size: tuple[int, ...], offset: int, stride: tuple[int, ...]) -> torch.Tensor:  # noqa: ARG002
        return self._half.as_strided(size, stride, offset)

    def address(self, target: int) -> int:  # noqa: ARG002
        return self._half.data_ptr()

    def landed(self, target: int, count: int) -> None:
        pass


def _empty(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


def _buckets(nbytes: int, bucket_bytes: int, width: int) -> list[Bucket]:
    """As many as fit into ``nbytes`` of a trainer's memory, a copy each."""
    numel, row = bucket_bytes // 2, width // 2
    size = (numel // row, row) if row else (numel,)
    apart = (2 * row, 1) if row else (1,)
    together = (row, 1) if row else (1,)
    span = 2 * numel if row else numel
    return [
        Bucket(
            index=index,
            copies=(
                Copy(
                    shard=0, target=0, size=size, src_offset=index * span, src_stride=apart,
                    dst_offset=index * numel, dst_stride=together,
                ),
            ),
            nbytes=bucket_bytes,
        )
        for index in range(nbytes // 2 // span)
    ]  # fmt: skip


def _each(buckets: list[Bucket], work: Callable[[Bucket], object]) -> float:
    """Seconds for each bucket of a walk over memory that no cache holds."""
    seconds = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        for bucket in buckets:
            work(bucket)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / len(buckets)


def follow(
    kind: Callable[[dict[str, Any]], Any], spec: dict[str, Any], namespace: str, orders: Connection
) -> None:
    """A process's whole life: enter its host, keep to its core, then follow orders until there are none."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[spec["core"] % len(cores)]})
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    end = kind(spec)
    while (order := orders.recv()) is not None:
        method, arguments = order
        orders.send(getattr(end, method)(**arguments))
