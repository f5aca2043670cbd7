"""Faults drawn at random, one round after the other, on whole servers without vLLM (``tests.support.node``).

    python -m tests.faults.campaign --cases 200 --seed 1 --out faults.json
    python -m tests.faults.campaign --links 50 --cases 0       the network between trainer and server
    python -m tests.faults.campaign --restarts 50 --cases 0    what stands for vLLM, which is started again
    python -m tests.faults.campaign --seed 1 --case 17         that one case again
    python -m tests.faults.campaign --seed 1 --what drop --keep --out faults.json    all of these again

Case ``k`` of a seed is the same in every run, down to which of several ranks it strikes and to the seed of
the packets that a link loses. A case that fails is reported with its traceback, its logs stay, and the next
one begins on a fresh server. ``left`` in the summary names what a case, or all of them, left on this host.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from tests.support import left
from tests.support.faults import FRAMES, LINKS, PLANS, POINTS, SEVERAL, Fault
from tests.support.left import LeftBehind
from tests.support.link import Link
from tests.support.node import ENDS_THE_SERVER, Node, suffer
from tests.support.serving import end_in_order_on_sigterm
from vllm_patching.residue import SHM_DIR

WHO = ("trainer", "updater", "daemon", "engine", "worker", "api", "launcher")
TRANSPORTS = ("gloo", "pull")
LINK = "gloo over a link"
FIRST_LINK = 1_000_000  # cases from here on are the link's
FIRST_RESTART = 2_000_000  # and from here on those of a server that its launcher starts again
RESTARTED, RESTARTS = " restarted", 4  # of one launch; pauses double
NODE_DEATH_SHARE = 0.3  # of kills that end the server: each needs a fresh one
RANKS = 2  # of servers, and of trainers but for those behind a link
SIGNALLED = {"kill": "kills", "stop": "stalls", "term": "asked_to_end"}  # as the summary counts them


def draw(seed: int, case: int) -> tuple[Fault, str]:
    """The fault of one case, and the transport it meets."""
    chance = random.Random(f"{seed}/{case}")
    if case >= FIRST_RESTART:
        transport, who = chance.choice(TRANSPORTS), chance.choice(("engine", "worker", "api"))
        at = chance.choice([*POINTS, "idle"])
        bucket, which = chance.randrange(4), chance.randrange(RANKS) if who in SEVERAL else 0
        return Fault("kill", who, at, bucket, which=which), transport + RESTARTED
    if case >= FIRST_LINK:
        return Fault(chance.choice(list(LINKS)), at="before_begin"), LINK
    transport = chance.choice(TRANSPORTS)
    at, bucket = chance.choice(list(POINTS)), chance.randrange(4)
    if chance.random() < 0.6:
        what, who = chance.choice(["kill", "kill", "stop", "term"]), chance.choice(WHO)
        if what != "stop" and who in ENDS_THE_SERVER and chance.random() > NODE_DEATH_SHARE:
            who = "updater"
        if chance.random() < 0.1 and what != "stop" and who in ("updater", "daemon"):
            at = "idle"
        which = chance.randrange(RANKS) if who in SEVERAL else 0
        return Fault(what, who, at, bucket, which=which), transport
    if transport == "gloo" and chance.random() < 0.2:
        return Fault("corrupt_bucket", at="mid_bucket", bucket=bucket), transport
    if chance.random() < 0.05:
        return Fault(chance.choice(PLANS), at="before_begin"), transport
    sent = [name for name, (_, way, _) in POINTS.items() if way == "send"]
    return Fault(chance.choice(FRAMES), at=chance.choice(sent), bucket=bucket), transport


class Campaign:
    """Servers that are kept from case to case, one for each transport."""

    def __init__(self, directory: Path, deadline_s: float) -> None:
        self._directory, self._deadline_s = directory, deadline_s
        self._nodes: dict[str, Node] = {}
        self._link: Link | None = None
        self.made = 0

    def node(self, transport: str) -> Node:
        known = self._nodes.get(transport)
        if known is not None and transport.endswith(RESTARTED) and not known.restarts_left:
            self._end(transport)
        if transport not in self._nodes:
            for other in list(self._nodes):  # one at a time: a second one would only share the cores
                self._nodes.pop(other).stop()
            self.made += 1
            flags = ["--transport=pull" if transport.startswith("pull") else "--transport=gloo"]
            if transport == LINK:
                self._link = self._link or Link(self._directory)
                flags.append(f"--rendezvous-host={self._link.here}")
            self._nodes[transport] = Node(
                self._directory / f"node{self.made}", ranks=RANKS,
                trainers=1 if transport == LINK else RANKS, deadline_s=self._deadline_s, flags=flags,
                link=self._link if transport == LINK else None,
                restarts=RESTARTS if transport.endswith(RESTARTED) else 0,
            )  # fmt: skip
        return self._nodes[transport]

    def run(self, seed: int, case: int) -> dict[str, Any]:
        """One case, and what it led to."""
        fault, transport = draw(seed, case)
        row: dict[str, Any] = {"case": case, "fault": str(fault), "transport": transport}
        started = time.monotonic()
        try:
            outcome = suffer(self.node(transport), fault, seed=1000 + 1000 * case)
            row |= {
                "answer": "died" if "died" in outcome.answers else outcome.answers[0],
                "answers": outcome.answers,
                "noticed_s": round(outcome.noticed_s, 3),
                "bound_s": outcome.bound_s,
                "recovered_s": round(outcome.recovered_s, 3),
                "descriptors": outcome.descriptors,
            }
            if outcome.lost is not None:
                row |= {"lost_packets": outcome.lost, "rounds": outcome.rounds}
        except Exception as err:  # noqa: BLE001 - the campaign goes on, and counts it
            row["failure"] = traceback.format_exc()
            if isinstance(err, LeftBehind):
                row["left"] = err.left
            if (broken := self._nodes.pop(transport, None)) is not None:
                broken.stop()
        row["took_s"] = round(time.monotonic() - started, 1)
        return row

    def _end(self, transport: str) -> None:
        code = self._nodes.pop(transport).stop()
        assert code == 0, f"a launcher ended with {code}"

    def end(self) -> None:
        for transport in list(self._nodes):
            self._end(transport)
        if self._link is not None:
            self._link.__exit__()


def summary(rows: list[dict[str, Any]], left_at_end: list[str]) -> dict[str, Any]:
    """Counts, of signals by role too, what was left, and times to notice and to recover, in seconds."""
    good = [row for row in rows if "failure" not in row]
    times = {
        key: {
            "median": round(statistics.median(row[key] for row in good), 3),
            "worst": max(row[key] for row in good),
        }
        for key in ("noticed_s", "recovered_s")
        if good
    }
    faults = [row["fault"].split() for row in rows]
    of_processes = [(what, who) for what, who, *_ in faults if what in SIGNALLED]
    signals = Counter(what for what, _ in of_processes)
    links = Counter(row["fault"].partition(" at ")[0] for row in rows if row["transport"] == LINK)
    return {
        "cases": len(rows),
        "failures": len(rows) - len(good),
        "left": sorted({thing for row in rows for thing in row.get("left", [])} | set(left_at_end)),
        **{name: signals[what] for what, name in SIGNALLED.items()},
        "of_the_link": links.total(),
        "by_link": dict(sorted(links.items())),
        "restarts_in_a_launch": sum(row["transport"].endswith(RESTARTED) for row in rows),
        "by_role": dict(sorted(Counter(" ".join(fault) for fault in of_processes).items())),
        "answers": dict(Counter(row["answer"] for row in good)),
        **times,
    }


def _write(path: Path, rows: list[dict[str, Any]], commands: list[str], left_at_end: list[str]) -> None:
    document = {
        "commands": commands,
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "summary": summary(rows, left_at_end),
        "cases": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _left(runtime: Path, before: set[str]) -> list[str]:
    """What is here once all servers have ended, and was not ``before`` them."""
    alive = left.offspring()
    found = [f"process {pid}: {what}" for pid, what in alive.items()]
    found += [f"TCP port {port} of process {pid}" for pid in alive for port in left.listeners(pid)]
    return sorted({*found, *left.files(runtime, SHM_DIR) - before})


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults.campaign")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--links", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--what", default="", help="only faults of this name")
    parser.add_argument("--keep", action="store_true", help="what --out has of other cases")
    parser.add_argument("--resume", action="store_true", help="only the cases that --out lacks")
    parser.add_argument("--deadline", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further case after so many")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end_in_order_on_sigterm()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    commands = [" ".join(["python -m tests.faults.campaign", *sys.argv[1:]])]
    directory = Path(tempfile.mkdtemp(prefix="campaign-"))
    runtime = Path(os.environ.setdefault("XDG_RUNTIME_DIR", str(directory)))
    left.move_apart()
    files = left.files(runtime, SHM_DIR)
    campaign = Campaign(directory, args.deadline)
    wanted = [*range(args.cases), *range(FIRST_LINK, FIRST_LINK + args.links)]
    wanted += range(FIRST_RESTART, FIRST_RESTART + args.restarts)
    if args.case is not None:
        wanted = [args.case]
    if args.what:
        wanted = [case for case in wanted if draw(args.seed, case)[0].what == args.what]
    if args.keep or args.resume:
        known = json.loads(args.out.read_text())
        if args.resume:
            done = {row["case"] for row in known["cases"]}
            wanted = [case for case in wanted if case not in done]
        rows += [row for row in known["cases"] if row["case"] not in wanted]
        commands = [*known.get("commands", [known.get("command")]), *commands]
    # By transport, as each change of it costs a fresh server; a case is the same in any order.
    try:
        for case in sorted(wanted, key=lambda case: (draw(args.seed, case)[1], case)):
            if time.monotonic() - began > 60 * args.minutes:
                break
            row = campaign.run(args.seed, case)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "failure"}), flush=True)
            if "failure" in row:
                print(row["failure"], flush=True)
            if args.out:
                _write(args.out, rows, commands, [])
    finally:
        campaign.end()
    left_at_end = _left(runtime, files)
    if args.out:
        _write(args.out, rows, commands, left_at_end)
    print(json.dumps(summary(rows, left_at_end), indent=1), f"logs in {directory}")
    return int(bool(left_at_end) or any("failure" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
