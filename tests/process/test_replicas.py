"""Fifty versions sent whole, as changes, in part, as patches, or rolled back, to servers that miss some.

All of them are bit-equal at every version. Each server has its own updaters, real ones in processes of their
own, and its own epochs; the trainer's two ranks are threads here. A server that was left out goes on from
what it last got; one whose updater was killed in the middle of a round, or whose trainer left, gets a new
epoch with new updaters, and whole buckets in it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.errors import BridgeError, PeerLost
from bridge.job import Encoding
from bridge.moving import Mover
from bridge.parts import Round
from bridge.patches import SparsePatch
from bridge.protocol.mapping import ITEMSIZE, Mapping
from bridge.protocol.plan import Layout, Shard
from bridge.sharding import LocalShards
from bridge.wire import rendezvous
from bridge.wire.meeting import Meeting
from bridge.wire.peer_memory import Nonce
from bridge.wire.transport import GLOO
from tests.support.mappings import SOURCES, dtype_name, half_of, parallel_mapping
from tests.support.ranks import _context
from vllm_patching.channel import Channel
from vllm_patching.intake import Join
from vllm_patching.updater import Updater

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

VERSIONS = 50
TRAINERS = 2
BUCKET_BYTES = 1 << 14
DEADLINE_S = 20.0
HERE = "127.0.0.1"

# --- an updater in a process of its own ---------------------------------------------------------------


def open_halves(files: Sequence[Path], nbytes: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_file(str(f), shared=True, size=nbytes, dtype=torch.uint8) for f in files)


def updater(rank: int, document: Mapping, files: Sequence[Path], orders: Connection) -> None:
    """What the daemon's child does, with orders from the test in place of the daemon's."""
    torch.set_num_threads(1)
    nbytes = document.ranks[rank].arena_bytes
    halves: Any = SimpleNamespace(
        nbytes=nbytes, device=torch.device("cpu"), halves=open_halves(files, nbytes), synchronize=lambda: None
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        made = Updater(rank, document, halves, Channel(ours), arena="remap")
        while (order := orders.recv()) is not None:
            name, arguments = order
            try:
                orders.send(getattr(made, name)(**arguments))
            except BridgeError as err:
                orders.send({"type": "failed", "error": str(err)})


# --- one server, and the trainer's ranks as it knows them ----------------------------------------------


class Server:
    """Updaters, halves and epochs of one server; ``state`` is what it must serve."""

    def __init__(self, tp: int, path: Path) -> None:
        path.mkdir()
        self.mapping = parallel_mapping(tp)
        self.store = rendezvous.serve_store(HERE, 0)
        self.files = [[path / f"half{which}.{rank}" for which in range(2)] for rank in range(tp)]
        self.halves = []
        for files, rank_map in zip(self.files, self.mapping.ranks, strict=True):
            for file in files:
                file.write_bytes(bytes(rank_map.arena_bytes))
            self.halves.append(open_halves(files, rank_map.arena_bytes))
        self.live, self.epoch, self.absent_until = 0, 0, 0
        self.state: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] | None = None  # what the other half holds, if anything whole
        self.behind = True
        self.movers: list[Mover] = []
        self.meetings: list[Meeting] = []
        self.nonces = [Nonce() for _ in range(TRAINERS)]
        self.updaters: list[tuple[Any, Connection]] = []

    def _start(self, rank: int) -> tuple[Any, Connection]:
        ours, theirs = _context.Pipe()
        arguments = (rank, self.mapping, self.files[rank], theirs)
        process = _context.Process(target=updater, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def end_crew(self) -> None:
        """As the daemon does at the end of each epoch."""
        for process, _ in self.updaters:
            process.kill()

    def end_epoch(self) -> None:
        self.end_crew()
        while self.movers:
            self.movers.pop().close()
        for process, orders in self.updaters:
            process.join()
            orders.close()
        self.updaters.clear()

    def _answer(self, rank: int) -> dict[str, Any]:
        orders = self.updaters[rank][1]
        assert orders.poll(2 * DEADLINE_S), f"updater {rank} is silent"
        return dict(orders.recv())

    def _tell(self, name: str, **arguments: Any) -> None:
        for _, orders in self.updaters:
            orders.send((name, arguments))

    def join(self, threads: ThreadPoolExecutor) -> None:
        """A new epoch, with new updaters on the same halves."""
        self.epoch += 1
        ranks = len(self.mapping.ranks)
        self.updaters += (self._start(rank) for rank in range(ranks))
        for rank, (_, orders) in enumerate(self.updaters):
            order = Join(
                epoch=self.epoch, host=HERE, port=self.store.port, address=HERE, num_trainers=TRAINERS,
                group_rank=TRAINERS + rank, group_size=TRAINERS + ranks, transport=GLOO, checksum="off",
                deadline_s=DEADLINE_S,
            )  # fmt: skip
            orders.send(("join", {"order": order}))

        def meet(trainer: int) -> tuple[Mover, Meeting]:
            store = rendezvous.reach_store(HERE, self.store.port, timeout_s=DEADLINE_S)
            meeting = Meeting(store, self.mapping, epoch=self.epoch, timeout_s=DEADLINE_S)
            meeting.publish_whereabouts(
                trainer, self.nonces[trainer].whereabouts("here", on_gpu=False, gpu=None)
            )
            group = rendezvous.make_group(
                store, f"e{self.epoch}/data", rank=trainer, size=TRAINERS + ranks, address=HERE,
                timeout_s=DEADLINE_S,
            )  # fmt: skip
            links = [meeting.links(rank)[trainer] for rank in range(ranks)]
            mover = Mover(
                group, links, self.mapping, rank=trainer, world_size=TRAINERS, deadline_s=DEADLINE_S,
                device=None, checksum="off",
            )  # fmt: skip
            return mover, meeting

        made = list(threads.map(meet, range(TRAINERS)))
        self.movers, self.meetings = [mover for mover, _ in made], [meeting for _, meeting in made]
        assert [self._answer(rank)["type"] for rank in range(ranks)] == ["joined"] * ranks

    def round(
        self, shards: Sequence[LocalShards], encoding: Encoding, threads: ThreadPoolExecutor, *, kill: bool
    ) -> int | None:
        """One round into the half that is not live, which is flipped; the bytes it took.

        With ``kill`` an updater dies in the middle of it: then nothing is flipped, and there are none.
        """
        digests = [m.publish_layout(s.layout) for m, s in zip(self.meetings, shards, strict=True)]
        joint = self.meetings[0].publish_round(
            digests, partial=shards[0].partial, encoding=encoding, bucket_bytes=BUCKET_BYTES
        )
        plan, _, _ = self.meetings[0].plan(joint)
        victim = self.updaters[-1][0]
        self.before = None

        def before(trainer: int) -> Callable[[int], None]:
            return lambda index: (
                os.kill(victim.pid, signal.SIGKILL) if kill and (trainer, index) == (0, 1) else None
            )

        def move(trainer: int) -> str:
            mine, _, _ = self.meetings[trainer].plan(joint)
            try:
                self.movers[trainer].move(
                    mine, shards[trainer], joint=joint, encoding=encoding, before=before(trainer)
                )
            except PeerLost as err:
                self.end_crew()  # or others would wait for whoever failed first
                return str(err)
            return ""

        self._tell("stage", joint=joint, plan_digest=plan.digest.hex(), half=1 - self.live)
        errors = list(threads.map(move, range(TRAINERS)))
        if kill:
            assert plan.num_buckets > 1, "it died in the middle; who had sent all by then sees no error"
            self.end_epoch()
            return None
        assert errors == [""] * TRAINERS
        answers = [self._answer(rank) for rank in range(len(self.updaters))]
        assert [answer.get("error", "") for answer in answers] == [""] * len(answers)
        self.live = 1 - self.live
        self.before = {name: tensor.clone() for name, tensor in self.state.items()}
        return sum(int(answer["bytes"]) for answer in answers)

    def roll_back(self) -> None:
        """The other half is flipped in as it is."""
        assert self.before is not None
        for mover in self.movers:
            mover.forget()
        self._tell("restore")
        assert [self._answer(rank)["bytes"] for rank in range(len(self.updaters))] == [0] * len(self.updaters)
        self.live, self.state, self.before, self.behind = 1 - self.live, self.before, self.state, True

    def wrong(self) -> list[str]:
        """Which ranks serve another thing than they must, and where it begins."""
        found = []
        for rank_map, halves in zip(self.mapping.ranks, self.halves, strict=True):
            differ = (halves[self.live] != half_of(rank_map, self.state)).nonzero()
            if len(differ):
                found.append(f"rank {rank_map.rank}: {len(differ)} bytes, from {int(differ[0])} on")
        return found


# --- the trainer ------------------------------------------------------------------------------------------


def change(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    """Other bits in a random share of the elements: any bits in bfloat16, else numbers and both zeros."""
    share = draw.choice([0.0, 0.001, 0.01, 0.1, 1.0])
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    for tensor in tensors.values():
        mask = torch.rand(tensor.shape, generator=generator) < share
        count = int(mask.sum())
        if tensor.dtype is torch.bfloat16:
            bits = torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator).to(torch.int16)
            tensor.view(torch.int16)[mask] = bits
        else:
            values = torch.randn(count, generator=generator)
            tensor[mask] = values * (values.abs() > 0.3)


def shards_of(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> list[LocalShards]:
    """The named tensors, their rows halved between the trainer's ranks."""
    found = []
    for trainer in range(TRAINERS):
        shards, parts = [], []
        for name in names:
            rows = len(tensors[name])
            first, last = (rows * at // TRAINERS for at in (trainer, trainer + 1))
            part = tensors[name][first:last]
            offset = (first, *(0 for _ in part.shape[1:]))
            shards.append(
                Shard(
                    source=list(SOURCES).index(name), offset=offset, shape=tuple(part.shape),
                    dtype=dtype_name(part.dtype),
                )
            )  # fmt: skip
            parts.append(part)
        layout = Layout(rank=trainer, vocabulary="checkpoint", shards=tuple(shards))
        partial = len(names) < len(SOURCES)
        found.append(LocalShards(layout, parts, (True,) * len(parts), partial=partial))
    return found


def patched(mapping: Mapping, patch: SparsePatch) -> list[LocalShards]:
    """A round of one patch, which every trainer rank hands over."""
    found = []
    for trainer in range(TRAINERS):
        made = Round(rank=trainer, world_size=TRAINERS)
        made.update_weight(patch)
        found.append(made.collect(mapping))
    return found


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    made: list[Server] = []
    try:
        made += (Server(tp, tmp_path / f"tp{tp}") for tp in (2, 1))
        yield made
    finally:
        for server in made:
            server.end_epoch()


@pytest.mark.parametrize("seed", [1, 2])
def test_servers_that_miss_versions_end_bit_equal(servers: list[Server], seed: int) -> None:
    draw = random.Random(seed)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype, *_) in SOURCES.items()}
    seen: Counter[str] = Counter()
    encodings: list[Encoding] = ["dense", "auto", "auto", "delta"]
    encoding = encodings[0]
    with ThreadPoolExecutor(TRAINERS) as threads:
        for version in range(1, VERSIONS + 1):
            last = version == VERSIONS
            change(tensors, draw)
            if draw.random() < 0.5:
                encoding = draw.choice(encodings)
            names = draw.sample(list(SOURCES), 2) if draw.random() < 0.2 and not last else list(SOURCES)
            for server in servers:
                if not last and (version < server.absent_until or draw.random() < 0.1):
                    server.behind = True
                    seen["missed"] += 1
                    continue
                if server.before and server.movers and not last and draw.random() < 0.1:
                    server.roll_back()
                    seen["rolled back"] += 1
                    assert not server.wrong(), f"seed {seed}, version {version}, rolled back"
                whole = server.behind or len(names) == len(SOURCES)
                sent = list(SOURCES) if whole else names  # a part may only be laid over the version before it
                if draw.random() < 0.05:
                    server.end_epoch()
                kill = whole and not last and draw.random() < 0.07
                if begins := not server.movers:
                    server.join(threads)
                rows = draw.sample(range(len(tensors["embed"])), 9)
                patch = SparsePatch("embed", torch.tensor(rows), tensors["embed"][rows])
                patches = not whole and draw.random() < 0.5
                shards = shards_of(tensors, sent) if not patches else patched(server.mapping, patch)
                nbytes = server.round(shards, encoding, threads, kill=kill)
                if nbytes is None:
                    server.behind, server.absent_until = True, version + draw.randint(1, 3)
                    seen["killed"] += 1
                elif patches:
                    server.state["embed"][patch.indices] = patch.values
                    assert nbytes == patch.values.nbytes
                    seen["patched"] += 1
                    server.behind = True
                else:
                    server.state |= {name: tensors[name].clone() for name in sent}
                    carried = sum(
                        w.numel * ITEMSIZE[r.targets[w.target].dtype]
                        for r in server.mapping.ranks
                        for w in r.writes["checkpoint"]
                        if list(SOURCES)[w.source] in sent
                    )
                    assert nbytes == carried or (encoding != "dense" and not begins and nbytes < carried)
                    seen["in part"] += not whole
                    seen["changes only"] += nbytes < carried
                    seen["begun anew"] += begins and server.epoch > 1
                    server.behind = not whole
                assert not server.wrong(), f"seed {seed}, version {version}, {encoding} of {sent}"
    wanted = ("missed", "killed", "in part", "patched", "begun anew", "rolled back")
    assert all(seen[what] >= 1 for what in wanted), seen
    assert seen["changes only"] >= 10, seen
    assert not any(server.behind for server in servers), "the last version went whole to every server"
