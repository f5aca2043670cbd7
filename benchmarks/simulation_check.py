"""Rounds between real trainer ranks and real updaters on one machine, beside what the simulation predicts.

Each end is a process that keeps to one core, as in a job, on a host of its own: a network namespace whose
rates out and in are shaped by tc (it needs root). What the prediction knows is measured apart from the
rounds, right before them: plain TCP through each rate, a bare Gloo pair, and what one thread packs, unpacks,
sums and reads from another process. The plan is the planner's, of a small model of Qwen3's shape.

    python -m benchmarks.simulation_check --out benchmarks/results/simulation-check.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fluid import Link, Transfer, simulate
from benchmarks.machine import machine
from benchmarks.model_shapes import Model, Server, Trainer, layouts_of, mapping_of, model_bytes
from benchmarks.shaped_hosts import Host, shaped_hosts
from benchmarks.simulation_ends import BareEnd, TrainerEnd, UpdaterEnd, follow
from bridge.protocol import mapping as mappings
from bridge.protocol.plan import Bucket, Copy, Plan, build_plan
from bridge.wire.copy_jobs import rows_of

SMALL = Model(
    "small",
    hidden=512,
    intermediate=1536,
    layers=8,
    heads=8,
    kv_heads=4,
    vocab=16384,
    head_dim=64,
    qk_norm=True,
)
LARGER = dataclasses.replace(SMALL, name="larger", hidden=1024, intermediate=3072, layers=16, vocab=65536)
BUCKET_BYTES = 2 << 20
ITEMSIZE = 2
BARE_BYTES, BARE_RUNS, LINK_RUNS = 32 << 20, 9, 5
SMALL_COPIES, SMALL_BYTES = 512, 4 << 10
MEMORY_BYTES = 128 << 20  # more than caches hold
ANSWER_S = 180.0
# Forked from a process that has imported torch and does nothing else.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.simulation_ends"])
FAST, SLOW = "300mbit", "100mbit"


@dataclasses.dataclass(frozen=True)
class Case:
    """Rates (out, in) of each trainer rank's host and of each server's, "" for no limit."""

    name: str
    trainers: tuple[tuple[str, str], ...]
    servers: tuple[tuple[str, str], ...]
    tp: int = 1
    transport: str = "gloo"
    model: Model = SMALL


FREE = ("", "")
CASES = (
    Case("1 trainer, 1 server", ((FAST, ""),), (FREE,)),
    Case("1 trainer, 1 server, slow", ((SLOW, ""),), (FREE,)),
    Case("1 trainer, TP 2", ((SLOW, ""),), (FREE,), tp=2),
    Case("2 trainers, TP 2", ((SLOW, ""), (SLOW, "")), (FREE,), tp=2),
    Case("2 trainers, one slow, TP 2", ((SLOW, ""), (FAST, "")), (FREE,), tp=2),
    Case("2 trainers, 1 slow server", ((FAST, ""), (FAST, "")), (("", SLOW),)),
    Case("4 trainers, TP 4", ((SLOW, ""),) * 4, (FREE,), tp=4),
    Case("1 trainer, 2 servers", ((SLOW, ""),), (FREE, FREE)),
    Case("2 trainers, 2 servers, one slow", ((FAST, ""), (FAST, "")), (("", SLOW), FREE)),
    Case("1 trainer, 1 server, no limit", (FREE,), (FREE,), model=LARGER),
    Case("1 trainer, 1 server, pull", (FREE,), (FREE,), transport="pull", model=LARGER),
    Case("2 trainers, TP 2, pull", (FREE, FREE), (FREE,), tp=2, transport="pull", model=LARGER),
)


# --- processes ------------------------------------------------------------------------------------------


def core_of(role: str, number: int) -> int:
    """A trainer rank and the updater of its number are on two."""
    return number + (role == "updater")


class End:
    """A process that ``simulation_ends.follow`` leads."""

    def __init__(self, host: Host, core: int, kind: Callable[[dict[str, Any]], Any], **spec: Any) -> None:
        """``core`` counts on from the last one to the first."""
        self.host = host
        self._orders, theirs = _context.Pipe()
        arguments = (kind, {**spec, "core": core, "address": host.address}, host.namespace, theirs)
        self._process = _context.Process(target=follow, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def order(self, what: str, **arguments: Any) -> None:
        """Tell it to begin."""
        self._orders.send((what, arguments))

    def answer(self) -> Any:
        """Wait for what it says.

        Raises:
            TimeoutError: it says nothing.
            EOFError: it is gone; its traceback is on stderr.
        """
        if not self._orders.poll(ANSWER_S):
            raise TimeoutError(f"an end (pid {self._process.pid}) said nothing for {ANSWER_S:g} s")
        return self._orders.recv()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Order and wait."""
        self.order(what, **arguments)
        return self.answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        self._orders.close()


@contextlib.contextmanager
def ends() -> Iterator[list[End]]:
    """A list whose members are ended."""
    made: list[End] = []
    try:
        yield made
    finally:
        for end in made:
            end.close()


# --- what is measured apart -------------------------------------------------------------------------------


@functools.cache
def measure_link(out: str, into: str) -> float:
    """Payload bytes per second that one TCP connection gets out of a host and into another."""
    with shaped_hosts({"a": (out, ""), "b": ("", into)}) as hosts, ends() as made:
        giver, taker = End(hosts["a"], 0, kind=BareEnd), End(hosts["b"], 1, kind=BareEnd)
        made += (giver, taker)
        runs = []
        for _ in range(LINK_RUNS):
            port = taker.ask("listen")
            taker.order("take", nbytes=BARE_BYTES)
            giver.ask("give", host=hosts["b"].address, port=port, nbytes=BARE_BYTES)
            runs.append(float(taker.answer()))
        return statistics.median(runs)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one thread needs for a kind of work: a copy, however small, and a byte, by the width of rows."""

    copy_s: float
    byte_s: dict[int, float]

    def of(self, copies: Sequence[Copy]) -> float:
        """Seconds."""
        sizes = [(ITEMSIZE * math.prod(copy.size), width_of(copy)) for copy in copies]
        return sum(self.copy_s + nbytes * self.byte_s[width] for nbytes, width in sizes)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine was measured to do."""

    gloo: float  # bytes per second of a pair
    sending: float  # of its core, at this rate
    receiving: float
    costs: dict[str, Cost]


def width_of(copy: Copy) -> int:
    """Bytes of the rows that a copy has at the trainer's; 0 if it is contiguous there."""
    jobs = list(rows_of(copy))
    return 0 if len(jobs) == jobs[0].rows == 1 else jobs[0].width * ITEMSIZE


def measure_gloo() -> tuple[float, float, float]:
    """Bytes per second of a bare pair without a limit, and what that is of either end's core."""
    with shaped_hosts({"a": FREE, "b": FREE}) as hosts, ends() as made:
        one, other = End(hosts["a"], 0, kind=BareEnd), End(hosts["b"], 1, kind=BareEnd)
        made += (one, other)
        port = one.ask("store")
        for rank, end in enumerate((one, other)):
            end.order("pair", host=hosts["a"].address, port=port, rank=rank)
        for end in (one, other):
            end.answer()
        runs = []
        for _ in range(BARE_RUNS + 1):
            one.order("gloo", sends=True, nbytes=8 * BARE_BYTES, bucket_bytes=BUCKET_BYTES)
            gloo, receiving = other.ask("gloo", sends=False, nbytes=8 * BARE_BYTES, bucket_bytes=BUCKET_BYTES)
            runs.append((gloo, one.answer()[1], receiving))
        return sorted(runs[1:])[BARE_RUNS // 2]  # the first one warms up


def measure_machine(widths: Sequence[int]) -> Machine:
    """A bare Gloo pair, and what one thread does with rows of these widths."""
    pair = measure_gloo()
    with shaped_hosts({"a": FREE, "b": FREE}) as hosts, ends() as made:
        one, other = End(hosts["a"], 0, kind=BareEnd), End(hosts["b"], 1, kind=BareEnd)
        made += (one, other)
        pid, address = one.ask("hold", nbytes=MEMORY_BYTES)
        holding = {"pulling": {"pid": pid, "address": address}}

        def cost(doing: str) -> Cost:
            def each(nbytes: int, bucket_bytes: int, width: int) -> float:
                more = holding.get(doing, {})
                return other.ask(doing, nbytes=nbytes, bucket_bytes=bucket_bytes, width=width, **more)  # type: ignore[no-any-return]

            copy_s = each(SMALL_COPIES * SMALL_BYTES, SMALL_BYTES, 0)
            whole = {width: each(MEMORY_BYTES, BUCKET_BYTES, width) for width in widths}
            return Cost(copy_s, {width: (s - copy_s) / BUCKET_BYTES for width, s in whole.items()})

        costs = {doing: cost(doing) for doing in ("packing", "unpacking", "summing", "showing", "pulling")}
        return Machine(*pair, costs)


# --- what is predicted ------------------------------------------------------------------------------------


class _Model:
    """The transfers of one round, in the order in which the ends go through them."""

    def __init__(self, case: Case, plan: Plan, links: dict[str, float], machine: Machine) -> None:
        self.case, self.plan, self.rates, self.machine = case, plan, links, machine
        self.links: dict[Link, float] = {}
        self.transfers: list[Transfer] = []

    def _add(self, transfer: Transfer) -> int:
        self.transfers.append(transfer)
        return len(self.transfers) - 1

    def _core(self, role: str, number: int) -> Link:
        core = "core", core_of(role, number) % len(os.sched_getaffinity(0))
        self.links[core] = 1.0
        return core

    def _work(self, core: Link, doing: Sequence[str], bucket: Bucket, after: Sequence[int]) -> int:
        """What a thread does with a bucket."""
        seconds = sum(self.machine.costs[what].of(bucket.copies) for what in doing)
        share = ((core, seconds / bucket.nbytes),)  # by the byte, as what is sent: a core is shared fairly
        return self._add(Transfer(bucket.nbytes, share, tuple(after), limit=bucket.nbytes / seconds))

    def _link(self, side: str, name: str, index: int, rate: str) -> list[tuple[Link, float]]:
        if not rate:
            return []
        link = (side, name, index)
        self.links[link] = self.rates[rate]
        return [(link, 1.0)]

    def seconds(self) -> float:
        """The prediction."""
        for server in range(len(self.case.servers)):
            self._pull() if self.case.transport == "pull" else self._gloo(server)
        return simulate(self.links, self.transfers).seconds

    def _gloo(self, server: int) -> None:
        """Trainers pack into two buffers by turns; updaters wait for their buckets in the plan's order.

        An updater lets a trainer send a bucket once it has unpacked the one two before it on that lane.
        """
        lanes = self.plan.lanes
        reserved: dict[tuple[int, int, int], int] = {}  # (trainer, inference, bucket)
        order = [(i, lane) for i in range(self.plan.num_buckets) for lane in lanes if i < len(lane.buckets)]
        # Numbers are given first, as the ends wait for each other: pack, sum, send and unpack of a bucket.
        for number, (index, lane) in enumerate(order):
            reserved[lane.trainer, lane.inference, index] = len(self.transfers) + 4 * number
        by_trainer: defaultdict[int, list[int]] = defaultdict(list)
        by_updater: defaultdict[int, list[int]] = defaultdict(list)
        for index, lane in order:
            trainer, inference, bucket = lane.trainer, lane.inference, lane.buckets[index]
            base = reserved[trainer, inference, index]
            before = by_trainer[trainer]
            after = [before[-1] + 1] if before else []  # the thread packs, posts, sums
            after += [before[-2] + 2] if len(before) > 1 else []  # the buffer's last content has left
            sender = self._core("trainer", trainer)
            receiver = self._core("updater", server * self.case.tp + inference)
            assert self._work(sender, ["packing"], bucket, after) == base
            self._work(sender, ["summing"], bucket, [base])
            out, _ = self.case.trainers[trainer]
            _, into = self.case.servers[server]
            uses = self._link("tx", "trainer", trainer, out) + self._link("rx", "server", server, into)
            pair = "pair", server, trainer, inference
            self.links[pair] = self.machine.gloo
            uses += [
                (pair, 1.0),
                (sender, self.machine.sending / self.machine.gloo),
                (receiver, self.machine.receiving / self.machine.gloo),
            ]
            taken = [reserved[trainer, inference, index - 2] + 3] if index > 1 else []
            self._add(Transfer(bucket.nbytes, tuple(uses), (base, *taken)))
            earlier = by_updater[inference]
            after = [base + 2, *([earlier[-1] + 3] if earlier else [])]
            self._work(receiver, ["unpacking", "summing"], bucket, after)
            by_trainer[trainer].append(base)
            by_updater[inference].append(base)

    def _pull(self) -> None:
        """Updaters read and sum, trainers sum, each bucket by bucket in a thread of its own."""
        last: dict[tuple[str, int], int] = {}
        for index in range(self.plan.num_buckets):
            for lane in (lane for lane in self.plan.lanes if index < len(lane.buckets)):
                for role, number, doing in (
                    ("trainer", lane.trainer, "showing"),
                    ("updater", lane.inference, "pulling"),
                ):
                    after = [last[role, number]] if (role, number) in last else []
                    core, bucket = self._core(role, number), lane.buckets[index]
                    last[role, number] = self._work(core, [doing], bucket, after)


# --- what is measured -------------------------------------------------------------------------------------


def run(case: Case, directory: Path, rounds: int) -> tuple[Plan, list[float], list[str]]:
    """The plan, the seconds of each round, and the transports that were chosen."""
    document = mapping_of(case.model, Server(case.tp))
    path = directory / "mapping.json"
    path.write_bytes(mappings.encode(document))
    layouts = layouts_of(case.model, Trainer(len(case.trainers)))
    plan = build_plan(document, layouts, bucket_bytes=BUCKET_BYTES)
    rates = {f"trainer {i}": r for i, r in enumerate(case.trainers)}
    rates |= {f"server {i}": r for i, r in enumerate(case.servers)}
    with shaped_hosts(rates) as hosts, ends() as made:
        trainers = [
            End(
                hosts[f"trainer {rank}"], core_of("trainer", rank), kind=TrainerEnd, rank=rank,
                mappings=[str(path)] * len(case.servers), layout=layouts[rank],
            )
            for rank in range(len(case.trainers))
        ]  # fmt: skip
        made += trainers
        servers = [
            [
                End(
                    hosts[f"server {i}"],
                    core_of("updater", i * case.tp + rank),
                    kind=UpdaterEnd,
                    rank=rank,
                    mapping=str(path),
                )
                for rank in range(case.tp)
            ]
            for i in range(len(case.servers))
        ]
        updaters = [end for server in servers for end in server]
        made += updaters
        stores = [(server[0].host.address, server[0].ask("serve")) for server in servers]
        for (store, port), server in zip(stores, servers, strict=True):
            for end in server:
                end.order(
                    "join", store=store, port=port, trainers=len(trainers), ranks=case.tp,
                    transport=case.transport,
                )  # fmt: skip
        for end in trainers:
            end.order("join", stores=stores, trainers=len(trainers))
        links = [link for end in updaters for link in end.answer()["links"]]
        for end in trainers:
            end.answer()
        begun = trainers[0]
        published = [end.ask("layouts") for end in trainers]
        agreed = begun.ask("begin", layouts=published, bucket_bytes=BUCKET_BYTES)
        joints = [joint for joint, _ in agreed]
        for end in trainers:
            end.ask("prepare", joints=joints)
        seconds = []
        for number in range(rounds + 1):  # the first one warms up
            start = time.perf_counter()
            for end in trainers:
                end.order("move", joints=joints)
            for (joint, digest), server in zip(agreed, servers, strict=True):
                for end in server:
                    end.order("stage", joint=joint, plan_digest=digest, half=number % 2)
            for end in updaters:
                end.answer()
            seconds.append(time.perf_counter() - start)
            for end in trainers:
                end.answer()
        return plan, seconds[1:], sorted(set(links))


def check(case: Case, rounds: int) -> dict[str, Any]:
    """Measure the parts, predict, then measure the whole."""
    wanted = {(rate, into) for hosts in (case.trainers, case.servers) for pair in hosts
              for into, rate in enumerate(pair) if rate}  # fmt: skip
    links = {rate: measure_link(*(("", rate) if into else (rate, ""))) for rate, into in wanted}
    with tempfile.TemporaryDirectory(prefix="check-") as directory:
        plan, seconds, transports = run(case, Path(directory), rounds)
    copies = [copy for lane in plan.lanes for bucket in lane.buckets for copy in bucket.copies]
    machine = measure_machine(sorted({width_of(copy) for copy in copies}))
    expected = _Model(case, plan, links, machine).seconds()
    taken = statistics.median(seconds)
    return {
        "case": dataclasses.asdict(case) | {"model": case.model.name},
        "model_bytes": model_bytes(case.model),
        "bytes_sent": plan.total_bytes * len(case.servers),
        "lanes": len(plan.lanes),
        "buckets": sum(len(lane.buckets) for lane in plan.lanes),
        "transports": transports,
        "links_bytes_per_s": links,
        "machine": dataclasses.asdict(machine),
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
        "measured_s": taken,
        "predicted_s": expected,
        "ratio": expected / taken,
    }


def main() -> int:
    """Run all cases and write one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", action="store_true", help="what --out has of the other cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and ends are taken down on the way out
    kept = json.loads(args.out.read_text())["cases"] if args.keep else []
    kept = [found for found in kept if found["case"]["name"] not in args.cases]
    document: dict[str, Any] = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": ["python", "-m", "benchmarks.simulation_check", *sys.argv[1:]],
        "bucket_bytes": BUCKET_BYTES,
        "machine": machine(),
        "cases": kept,
    }
    for case in (c for c in CASES if c.name in args.cases):
        found = check(case, args.rounds)
        document["cases"].append(found)
        shown = {key: found[key] for key in ("measured_s", "predicted_s", "ratio", "load_average", "seconds")}
        sys.stdout.write(f"{case.name}: {json.dumps(shown)}\n")
        sys.stdout.flush()
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
