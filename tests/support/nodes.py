"""A server on two nodes without a vLLM: real daemons, updaters and arenas; its engine and workers stand in.

Each worker is a process with an arena of a ``parallel_mapping``'s rank; the engine, another, runs batches all
the time: each is stamped as vLLM's are and goes to the workers by a pipe of their own, rank 1's late.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from bridge.errors import RendezvousError
from launch.commands import Command, daemon_command
from launch.options import ServeOptions
from tests.support.link import Link
from tests.support.mappings import SOURCES, half_of, parallel_mapping
from tests.support.ranks import _context
from tests.support.serving import environment, wait_until
from vllm_patching.channel import ask
from vllm_patching.registration import Registration
from vllm_patching.worker import WorkerBridge

HERE = "127.0.0.1"
DOCUMENT = parallel_mapping(2)
LATE_S = 0.01
TURN_S = 0.002
WAIT_S = 180.0


def weights(seed: int) -> dict[str, torch.Tensor]:
    """A trainer's tensors."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, (shape, _, _, _) in SOURCES.items()}
    return {name: tensor.to(SOURCES[name][1]) for name, tensor in made.items()}


def digest(half: torch.Tensor, rank: int) -> str:
    """Of what a rank reads: its targets, without what lies between them."""
    found = hashlib.sha256()
    for target in DOCUMENT.ranks[rank].targets:
        found.update(half[target.offset : target.offset + target.nbytes].numpy().tobytes())
    return found.hexdigest()


def expected(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The digest of each rank that serves ``state``."""
    return [digest(half_of(rank_map, state), rank) for rank, rank_map in enumerate(DOCUMENT.ranks)]


def worker(rank: int, run_dir: str, logdir: str, batches: Connection) -> None:
    """A worker's process: until the engine's end of the pipe is closed. It logs into ``vllm.log``."""
    from bridge import telemetry
    from vllm_patching.cpu_arena import CpuArena
    from vllm_patching.worker import name_process

    os.environ.update(BRIDGE_RUN_DIR=run_dir, BRIDGE_LOGDIR=logdir)
    with Path(logdir, "vllm.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    telemetry.configure(role="vllm")
    parallel = SimpleNamespace(data_parallel_index=0, world_size=2)
    name_process(SimpleNamespace(rank=rank, vllm_config=SimpleNamespace(parallel_config=parallel)))
    torch.set_num_threads(1)
    rank_map = DOCUMENT.ranks[rank]
    arena = CpuArena(rank_map.arena_bytes)
    arena.live(0, rank_map.arena_bytes).copy_(half_of(rank_map, weights(0)))
    arena.open_second_half()
    arena.warm()
    bridge = WorkerBridge(rank=rank, arena=arena, log_path=Path(logdir) / f"flips-rank{rank}.jsonl")
    fds = arena.export()
    hello = {
        "type": "worker",
        "rank": rank,
        "world_size": 2,
        "tp_degree": 2,
        "model": DOCUMENT.model,
        "dtype": DOCUMENT.dtype,
        "vllm_version": DOCUMENT.vllm_version,
        "gpu": "",
        "arena": arena.kind,
        "handles": arena.handles(),
        "descriptors": len(fds),
        "hooks": {},
        "rank_map": msgspec.to_builtins(rank_map),
        "vocabularies": msgspec.to_builtins(DOCUMENT.vocabularies),
        "omitted_vocabularies": {},
    }
    registration = Registration(hello, fds=fds, who=f"worker rank {rank}")
    bridge.slot = registration.connect().slot(rank)
    registration.watch()
    while True:
        try:
            stamp = batches.recv()
        except EOFError:
            return
        if rank:
            time.sleep(LATE_S)
        bridge.before_batch(stamp, 3)
        bridge.before_forward()
        read = digest(arena.live(0, rank_map.arena_bytes), rank)
        bridge.after_batch()
        batches.send((bridge.version, read))


def engine(run_dir: str, workers: list[Connection], control: Connection) -> None:
    """The engine core's process: batch after batch; what the newest one read, whenever it is asked."""
    os.environ["BRIDGE_RUN_DIR"] = run_dir
    registration = Registration(
        {"type": "engine", "index": 0, "world_size": 2, "hooks": {}}, who="the engine core"
    )
    page = registration.connect()
    registration.watch()
    while True:
        asked = control.poll(TURN_S)
        if asked:
            try:
                control.recv()
            except EOFError:
                return
        stamp = page.requested
        try:
            for end in workers:
                end.send(stamp)
            read = [end.recv() for end in workers]
        except (EOFError, OSError):  # like an idle vLLM, it goes on when a remote worker is gone
            read = []
        if asked:
            control.send(read)


class Daemon:
    """One node's daemon, as its launcher would start it."""

    def __init__(
        self,
        node_rank: int,
        root: Path,
        *,
        nnodes: int = 2,
        launch_id: str = "one",
        logdir: Path | None = None,
        head: str = HERE,
        prefix: tuple[str, ...] = (),
    ) -> None:
        """``head`` is the first node's address; the daemon's command begins with ``prefix``.

        ``logdir`` is "log" in ``root``, unless another one is given.
        """
        self._prefix = prefix
        self.run_dir, self.log = root / f"{launch_id}{node_rank}", root / f"daemon{node_rank}.log"
        options = ServeOptions(
            model="tests/parallel", vllm_args=("--tensor-parallel-size", "2"), logdir=logdir or root / "log",
            nnodes=nnodes, node_rank=node_rank, master_addr=head, rendezvous_host=head,
            deadline_s=6.0, heartbeat_interval_s=0.5,
            commit_timeout_s=60.0, start_timeout_s=WAIT_S, transport="gloo",  # by the address it is told
        )  # fmt: skip
        options.logdir.mkdir(exist_ok=True)
        self.command: Command = daemon_command(
            options, self.run_dir, launcher_pid=os.getpid(), launch_id=launch_id
        )
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, *self.command.argv],
                env={**environment(), **self.command.env},
                stdout=log,
                stderr=log,
            )

    def status(self) -> dict[str, Any]:
        return ask(self.run_dir, {"type": "status"}, timeout_s=10)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """In order, with the server."""
        try:
            ask(self.run_dir, {"type": "shutdown", "why": ""}, timeout_s=10)
        except RendezvousError:
            self.process.terminate()  # it is ending, or does not listen yet
        return self.process.wait(WAIT_S)


class Server:
    """Two nodes; of the second, daemon and updaters live at the other end of ``link``, if there is one."""

    def __init__(self, root: Path, *, launch_id: str = "one", link: Link | None = None) -> None:
        """``launch_id`` names this start: one in the same ``root`` as an earlier has another."""
        self.root, self.logdir = root, root / "log"
        head = link.here if link is not None else HERE
        self.head = Daemon(0, root, launch_id=launch_id, head=head)
        inside = link.inside() if link is not None else ()
        self.follower = Daemon(1, root, launch_id=launch_id, head=head, prefix=inside)
        for daemon in (self.head, self.follower):
            self._until(daemon, lambda daemon=daemon: bool(daemon.status()))  # type: ignore[misc]
        ends = [_context.Pipe() for _ in range(2)]
        self._control, control = _context.Pipe()
        self.workers = [
            _context.Process(
                target=worker, args=(rank, str(daemon.run_dir), str(self.logdir), ends[rank][1]), daemon=True
            )
            for rank, daemon in enumerate((self.head, self.follower))
        ]
        ours = [end for end, _ in ends]
        self.engine = _context.Process(
            target=engine, args=(str(self.head.run_dir), ours, control), daemon=True
        )
        for process in (*self.workers, self.engine):
            process.start()
        for end in (control, *ours, *(theirs for _, theirs in ends)):
            end.close()
        self.wait_whole()

    def _until(self, daemon: Daemon, done: Any) -> None:
        def check() -> bool:
            assert daemon.process.poll() is None, daemon.log.read_text()[-4000:]
            try:
                return bool(done())
            except RendezvousError:
                return False  # it does not listen yet

        wait_until(f"the daemon of {daemon.run_dir}", check, timeout_s=WAIT_S)

    def wait_whole(self) -> None:
        """Until every worker and every updater is there."""

        def whole() -> bool:
            status = self.head.status()
            here = len(status["pids"]["workers"]), len(status["pids"]["updaters"])
            return status["state"] == "ready" and here == (2, 2)

        self._until(self.head, whole)

    def read(self) -> list[tuple[int, str]]:
        """Version and digest that the newest batch had, by rank."""
        self._control.send(None)
        if not select.select([self._control], [], [], WAIT_S)[0]:
            raise TimeoutError("the engine does not answer")
        found: list[tuple[int, str]] = self._control.recv()
        return found

    def stop(self) -> None:
        for process in (self.engine, *self.workers):
            process.kill()
            process.join()
        for daemon in (self.head, self.follower):
            if daemon.process.poll() is None:
                daemon.stop()  # and its updaters; the second may have followed the first
