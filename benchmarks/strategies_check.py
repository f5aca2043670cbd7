"""Every strategy of the simulation carried out over shaped links, beside what ``strategies.py`` predicts.

Each rank is a process; hosts are network namespaces with one card each, shaped by tc (it needs root), and
ranks of all hosts are one Gloo group. What travels are buckets and chunks of a small model's tensors, as the
planner packs them; afterwards each receiver compares its bytes. The prediction is that of a ``Cluster`` whose
rates were measured apart, right before: plain TCP between two such hosts, a bare Gloo pair, a word.

    python -m benchmarks.strategies_check --out benchmarks/results/simulation-strategies.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.model_shapes import Server, Trainer, layouts_of, mapping_of, model_bytes
from benchmarks.shaped_hosts import shaped_hosts
from benchmarks.simulation_check import (
    BUCKET_BYTES,
    SMALL,
    End,
    ends,
    measure_gloo,
    measure_link,
)
from benchmarks.simulation_ends import DEADLINE_S
from benchmarks.strategies import STRATEGIES, Cluster, plan_lanes, plan_of
from bridge.wire import rendezvous
from bridge.wire.transport import pack

CHUNK = 512 << 10
WORDS, EMPTY_ROUNDS = 101, 9
AHEAD = 8  # calls of a receiver that wait in its stream
CARD, DISK = "100mbit", "200mbit"
ALL = "all"


@dataclass(frozen=True)
class Case:
    """``trainers`` ranks give to ``servers`` of ``tp`` ranks; so many ranks of a kind share a host's card."""

    name: str
    trainers: int
    tp: int
    servers: int
    ranks_per_host: int = 1

    @property
    def disk(self) -> int:
        """The rank of the host that stands for a shared disk; the last one."""
        return self.trainers + self.tp * self.servers

    def updater(self, server: int, inference: int) -> int:
        """The rank of an inference rank."""
        return self.trainers + server * self.tp + inference

    @property
    def updaters(self) -> range:
        """The ranks of all servers, in order."""
        return range(self.trainers, self.disk)

    def hosts(self) -> list[range]:
        """The ranks on each host of servers."""
        firsts = range(0, len(self.updaters), self.ranks_per_host)
        return [self.updaters[first : first + self.ranks_per_host] for first in firsts]


CASES = (
    Case("2 trainers, 1 server in TP 2", 2, 2, 1),
    Case("2 trainers, 4 servers", 2, 1, 4),
    Case("4 trainers, 3 servers in TP 2, two ranks on a host", 4, 2, 3, ranks_per_host=2),
)


# --- what is moved ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Bytes of one of the files of ``Contents``."""

    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.end - self.start


class Contents:
    """Files that all ranks map: a model's tensors, what each trainer rank holds of them, its buckets."""

    def __init__(self, case: Case, directory: Path) -> None:
        document, layouts = mapping_of(SMALL, Server(case.tp)), layouts_of(SMALL, Trainer(case.trainers))
        tensors = [
            torch.randint(0, 255, (2 * math.prod(source.shape),), dtype=torch.uint8)
            .view(torch.bfloat16)
            .view(source.shape)
            for source in document.vocabularies[0].sources
        ]
        held = [
            [tensors[s.source][s.offset[0] : s.offset[0] + s.shape[0]] for s in layout.shards]
            for layout in layouts
        ]
        self.directory = directory
        self.tensors = self._write("model", tensors)
        flat = self._write("shards", [shard for shards in held for shard in shards])
        self.shards = [[flat.pop(0) for _ in shards] for shards in held]
        plan = plan_of(SMALL, Trainer(case.trainers), Server(case.tp), BUCKET_BYTES)
        dtypes = [torch.bfloat16] * max(len(rank.targets) for rank in document.ranks)
        order = sorted(
            (b.index, lane.trainer, lane.inference, b) for lane in plan.lanes for b in lane.buckets
        )
        packed = []
        for _, trainer, _, bucket in order:
            packed.append(torch.empty(bucket.nbytes, dtype=torch.uint8))
            pack(bucket, held[trainer], dtypes, packed[-1])
        pieces = self._write("buckets", packed)
        # In the order that both ends of each lane keep.
        self.buckets = [(t, i, piece) for (_, t, i, _), piece in zip(order, pieces, strict=True)]

    def _write(self, name: str, tensors: list[torch.Tensor]) -> list[Piece]:
        pieces, at = [], 0
        with open(self.directory / name, "wb") as file:
            for tensor in tensors:
                data = tensor.contiguous().view(-1).view(torch.uint8)
                file.write(memoryview(data.numpy()))
                pieces.append(Piece(name, at, at := at + len(data)))
        return pieces


# --- how it is moved --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """A piece goes from one rank to another; at both, the moves of a stream are made one by one, in order.

    ``whole``: the sender first has all that it is to receive.
    """

    piece: Piece
    sender: int
    receiver: int
    out: Hashable
    into: Hashable
    whole: bool = False


@dataclass(frozen=True)
class Gather:
    """All trainer ranks gather a bucket of whole tensors; rank 0 then has ``pieces`` of them.

    ``held`` is what each of them gives; ``rows`` are (trainer rank, start in what it gives, bytes), one
    behind the other in the whole tensors.
    """

    held: tuple[Piece, ...]
    rows: tuple[tuple[int, int, int], ...]
    pieces: tuple[Piece, ...]


Program = list[Move | Gather]


def _along(piece: Piece, sender: int, receiver: int, stream: Hashable = ALL) -> Move:
    """A move for which both ends have a stream of its own for the other one."""
    return Move(piece, sender, receiver, ("to", receiver, stream), ("from", sender, stream))


def _direct(case: Case, contents: Contents, server: int) -> Program:
    """A trainer rank has a stream for each server, an updater one for all trainer ranks."""
    return [
        Move(piece, trainer, case.updater(server, inference), ("server", server), ALL)
        for trainer, inference, piece in contents.buckets
    ]


def direct(case: Case, contents: Contents) -> Program:
    """Server by server, as they do not know of each other."""
    return [move for server in range(case.servers) for move in _direct(case, contents, server)]


def at_once(case: Case, contents: Contents) -> Program:
    """Each lane is a stream at both ends."""
    return [
        _along(piece, trainer, case.updater(server, inference))
        for server in range(case.servers)
        for trainer, inference, piece in contents.buckets
    ]


def relay(case: Case, contents: Contents, giver: Callable[[int], int], *, whole: bool = False) -> Program:
    """Server 0 gets everything from the trainers, each other one from its ``giver``."""
    return _direct(case, contents, 0) + [
        Move(
            piece, case.updater(giver(server), inference), case.updater(server, inference),
            ALL if whole else ("to", server), ALL, whole,
        )
        for server in range(1, case.servers)
        for _, inference, piece in contents.buckets
    ]  # fmt: skip


def chunks(piece: Piece) -> list[Piece]:
    """What a ring or tree passes on at a time."""
    return [
        Piece(piece.file, start, min(start + CHUNK, piece.end))
        for start in range(piece.start, piece.end, CHUNK)
    ]


def gather_broadcast(case: Case, contents: Contents) -> Program:
    """Bucket by bucket: gathered, then sent by rank 0 along a ring of all inference ranks."""
    program: Program = []
    for first, last in _whole_tensors(contents.tensors):
        held = tuple(Piece("shards", shards[first].start, shards[last - 1].end) for shards in contents.shards)
        rows = tuple(
            (trainer, shards[i].start - held[trainer].start, shards[i].end - shards[i].start)
            for i in range(first, last)
            for trainer, shards in enumerate(contents.shards)
        )
        bucket = Piece("model", contents.tensors[first].start, contents.tensors[last - 1].end)
        program.append(Gather(held, rows, tuple(chunks(bucket))))
        for piece in chunks(bucket):
            program.append(Move(piece, 0, case.updaters[0], ALL, "before"))
            for rank in case.updaters[1:]:
                program.append(Move(piece, rank - 1, rank, "behind", "before"))
    return program


def _whole_tensors(tensors: list[Piece]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of as many as fit into a bucket, or of one that is larger."""
    first = 0
    for i in range(1, len(tensors) + 1):
        if i == len(tensors) or tensors[i].end - tensors[first].start > BUCKET_BYTES:
            yield first, i
            first = i


def hosts_broadcast(case: Case, contents: Contents, giver: Callable[[int], int]) -> Program:
    """Each trainer rank's shards go from host to host; a host's ranks take turns, and give to each other.

    A call for each bucket would change nothing: nobody waits for the end of one before the next.
    """
    held = [Piece("shards", shards[0].start, shards[-1].end) for shards in contents.shards]
    program: Program = []
    for trainer, piece in enumerate(held):
        for number, chunk in enumerate(chunks(piece)):
            for index, host in enumerate(case.hosts()):
                turn = number % len(host)
                sender = case.hosts()[giver(index)][turn] if index else trainer
                program.append(_along(chunk, sender, host[turn], trainer))
                program += [
                    _along(chunk, host[turn], other, trainer) for other in host if other != host[turn]
                ]
    return program


def disk(case: Case, contents: Contents) -> Program:
    """Once the disk has everything, every inference rank reads what it needs."""
    writes = [_along(piece, trainer, case.disk) for trainer, _, piece in contents.buckets]
    reads = [
        Move(piece, case.disk, case.updater(server, inference), ("to", server, inference), ALL, whole=True)
        for server in range(case.servers)
        for _, inference, piece in contents.buckets
    ]
    return [*writes, *reads]


def _half(index: int) -> int:
    """Who is above it in a binary tree."""
    return (index - 1) // 2


def _doubled(index: int) -> int:
    """Who gives to it when the number of those that have something doubles each time."""
    return index - (1 << index.bit_length() - 1)


PROGRAMS: dict[str, Callable[[Case, Contents], Program]] = {
    "direct": direct,
    "direct, all lanes at once": at_once,
    "relay, a chain": lambda case, contents: relay(case, contents, lambda server: server - 1),
    "relay, a tree": lambda case, contents: relay(case, contents, _half),
    "relay, doubling": lambda case, contents: relay(case, contents, _doubled, whole=True),
    "gather on rank 0, broadcast": gather_broadcast,
    "ring of hosts": lambda case, contents: hosts_broadcast(case, contents, lambda host: host - 1),
    "tree of hosts": lambda case, contents: hosts_broadcast(case, contents, _half),
    "shared disk": disk,
}


class Rank:
    """A process that carries out its part of programs."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._rank, self._address = int(spec["rank"]), str(spec["address"])
        self._files = {
            path.name: torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            for path in Path(spec["directory"]).iterdir()
        }
        self._store: Any = None
        self._group: Any = None
        self._trainers: Any = None
        self._streams: dict[Hashable, Program] = {}
        self._tags: dict[Piece, int] = {}
        self._expected: set[Piece] = set()
        self._here: dict[Piece, Future[torch.Tensor]] = {}

    def store(self) -> int:
        """Open the store at which the groups form; its port."""
        self._store = rendezvous.serve_store(self._address, 0)
        return int(self._store.port)

    def join(self, *, host: str, port: int, size: int, trainers: int) -> None:
        """Form a group of all ranks, and one of the trainer ranks."""
        store = rendezvous.reach_store(host, port, timeout_s=DEADLINE_S)

        def group(name: str, members: int) -> Any:
            return rendezvous.make_group(
                store, name, rank=self._rank, size=members, address=self._address, timeout_s=DEADLINE_S
            )

        self._group = group("all", size)
        self._trainers = group("trainers", trainers) if self._rank < trainers else None

    def word(self, *, peer: int) -> float:
        """Seconds that a byte takes to a peer: half of what it takes there and back."""
        byte, seconds = torch.zeros(1, dtype=torch.uint8), []
        for _ in range(WORDS):
            start = time.perf_counter()
            for call in ("send", "recv") if self._rank < peer else ("recv", "send"):
                getattr(self._group, call)([byte], peer, 0).wait()
            seconds.append((time.perf_counter() - start) / 2)
        return statistics.median(seconds)

    def prepare(self, *, program: Program) -> None:
        """Sort this rank's steps by stream, and have at hand what it holds itself."""
        self._streams, self._here, gathered = defaultdict(list), {}, set()
        moves = [step for step in program if isinstance(step, Move)]
        self._tags = {move.piece: tag for tag, move in enumerate(moves)}
        self._expected = {move.piece for move in moves if move.receiver == self._rank}
        for step in program:
            if isinstance(step, Gather):
                if self._trainers:
                    self._streams[ALL].append(step)
                    gathered |= set(step.pieces)
                continue
            if step.sender == self._rank:
                self._streams[step.out].append(step)
            if step.receiver == self._rank:
                self._streams[step.into].append(step)
            if self._rank in (step.sender, step.receiver):
                self._here.setdefault(step.piece, Future())
        for piece in self._here.keys() - self._expected - gathered:
            self._here[piece].set_result(self._held(piece))

    def carry_out(self) -> None:
        """Make all steps, each stream in a thread of its own."""
        with ThreadPoolExecutor(len(self._streams) or 1) as threads:
            list(threads.map(self._follow, self._streams.values()))

    def check(self) -> int:
        """Compare all that was received with what was to be; bytes."""
        for piece in self._expected:
            if not torch.equal(self._here[piece].result(0), self._held(piece)):
                raise AssertionError(f"rank {self._rank} received other bytes than those of {piece}")
        return sum(piece.nbytes for piece in self._expected)

    def _held(self, piece: Piece) -> torch.Tensor:
        return self._files[piece.file][piece.start : piece.end]

    def _follow(self, stream: Program) -> None:
        posted: deque[tuple[torch.Tensor, Any]] = deque()
        for index, step in enumerate(stream):
            if isinstance(step, Gather):
                self._gather(step)
            elif step.sender == self._rank:
                self._give(step)
            else:
                # Calls of one stream to one peer follow on each other without a word in between.
                for move in stream[index + len(posted) : index + AHEAD]:
                    if not isinstance(move, Move) or move.sender != step.sender:
                        break
                    posted.append(self._post(move))
                buffer, work = posted.popleft()
                work.wait()
                self._here[step.piece].set_result(buffer)

    def _post(self, move: Move) -> tuple[torch.Tensor, Any]:
        buffer = torch.empty(move.piece.nbytes, dtype=torch.uint8)
        return buffer, self._group.recv([buffer], move.sender, self._tags[move.piece])

    def _give(self, move: Move) -> None:
        for piece in self._expected if move.whole else ():
            self._here[piece].result(DEADLINE_S)
        piece = self._here[move.piece].result(DEADLINE_S)
        self._group.send([piece], move.receiver, self._tags[move.piece]).wait()

    def _gather(self, gather: Gather) -> None:
        mine = torch.zeros(max(held.nbytes for held in gather.held), dtype=torch.uint8)
        mine[: gather.held[self._rank].nbytes] = self._held(gather.held[self._rank])
        gathered = [torch.empty_like(mine) for _ in gather.held]
        self._trainers.allgather(gathered, mine).wait()
        if self._rank == 0:
            whole = torch.cat([gathered[t][start : start + nbytes] for t, start, nbytes in gather.rows])
            parts = whole.split([piece.nbytes for piece in gather.pieces])
            for piece, part in zip(gather.pieces, parts, strict=True):
                self._here[piece].set_result(part)


# --- what is measured -------------------------------------------------------------------------------------


def hosts_of(case: Case) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Rates by host, and each rank's host."""
    shared = case.ranks_per_host
    names = [f"trainers {rank // shared}" for rank in range(case.trainers)]
    names += [f"servers {rank // shared}" for rank in range(case.tp * case.servers)]
    return dict.fromkeys(names, (CARD, CARD)) | {"disk": (DISK, DISK)}, [*names, "disk"]


def measure(
    case: Case, strategies: Sequence[str], runs: int, directory: Path
) -> tuple[Cluster, dict[str, list[float]], dict[str, int]]:
    """The cluster's rates; by strategy the seconds of each run, and the bytes that receivers compared."""
    contents = Contents(case, directory)
    rates, names = hosts_of(case)
    card, disk_rate, gloo = measure_link(CARD, CARD), measure_link(DISK, DISK), measure_gloo()[0]
    with shaped_hosts(rates) as hosts, ends() as made:
        for rank, name in enumerate(names):
            made.append(End(hosts[name], rank, Rank, rank=rank, directory=str(directory)))

        def everybody(what: str, **arguments: Any) -> list[Any]:
            for end in made:
                end.order(what, **arguments)
            return [end.answer() for end in made]

        def seconds() -> float:
            start = time.perf_counter()
            everybody("carry_out")
            return time.perf_counter() - start

        store = {"host": made[0].host.address, "port": made[0].ask("store")}
        everybody("join", **store, size=len(names), trainers=case.trainers)
        made[0].order("word", peer=case.updaters[0])
        word = made[case.updaters[0]].ask("word", peer=0)
        made[0].answer()
        everybody("prepare", program=[])
        cluster = Cluster(
            f"{CARD} for each host", nccl=gloo, nccl_bucket_s=word, all_gather=gloo,
            round_s=statistics.median(seconds() for _ in range(EMPTY_ROUNDS)), nic=card, nics_per_node=1,
            gpus_per_node=case.ranks_per_host, message_s=word, hop_s=word, chunk=CHUNK,
            disk_write=disk_rate, disk_read=disk_rate, disk_node=card,
        )  # fmt: skip
        taken: dict[str, list[float]] = {name: [] for name in strategies}
        compared = {}
        for _ in range(runs):
            for name in strategies:
                everybody("prepare", program=PROGRAMS[name](case, contents))
                taken[name].append(seconds())
                compared[name] = sum(everybody("check"))
    return cluster, taken, compared


def check(case: Case, strategies: Sequence[str], runs: int) -> dict[str, Any]:
    """Measure a case's strategies, and predict them from its links."""
    lanes = plan_lanes(SMALL, Trainer(case.trainers), Server(case.tp), bucket_bytes=BUCKET_BYTES)
    with tempfile.TemporaryDirectory(prefix="check-") as directory:
        cluster, taken, compared = measure(case, strategies, runs, Path(directory))
    found = {}
    for name, seconds in taken.items():
        expected, measured = STRATEGIES[name](lanes, cluster, case.servers), statistics.median(seconds)
        found[name] = {
            "bytes_compared": compared[name],
            "seconds": seconds,
            "measured_s": measured,
            "predicted_s": expected,
            "ratio": expected / measured,
        }
    return {
        "case": dataclasses.asdict(case),
        "model_bytes": model_bytes(SMALL),
        "lanes": len(lanes.buckets),
        "buckets": sum(map(len, lanes.buckets.values())),
        "cluster": dataclasses.asdict(cluster),
        "load_average": os.getloadavg()[0],
        "strategies": found,
    }


def main() -> int:
    """Run all cases and write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--strategies", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="what --out has of the other cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and ends are taken down on the way out
    kept = json.loads(args.out.read_text())["cases"] if args.keep else []
    document: dict[str, Any] = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": ["python", "-m", "benchmarks.strategies_check", *sys.argv[1:]],
        "bucket_bytes": BUCKET_BYTES,
        "machine": machine(),
        "cases": [found for found in kept if found["case"]["name"] not in args.cases],
    }
    for case in (c for c in CASES if c.name in args.cases):
        found = check(case, args.strategies, args.runs)
        document["cases"].append(found)
        for name, row in found["strategies"].items():
            sys.stdout.write(f"{case.name}: {name}: {json.dumps(row)}\n")
        sys.stdout.flush()
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
