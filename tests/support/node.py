"""A whole server without vLLM: the real launcher's supervisor, daemon, updaters and arenas.

``python -m tests.support.node launch|api ...``. In vLLM's place a process answers /health. Its child, the
engine, stamps batches as the real one does, and its workers, which flip real arenas, answer each with the
digest of all that they hold. What was served stands in ``served.jsonl``, a line whenever it changes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blake3
import msgspec
import psutil
import torch
import torch.distributed as dist

from bridge.errors import BridgeError
from bridge.rounds import ROOT_CAUSE_TIMEOUT_S
from bridge.wire.transport import SLOWEST_BYTES_PER_S
from tests.support import faults, left, link
from tests.support.faults import Armed, Fault
from tests.support.left import LeftBehind
from tests.support.link import Link
from tests.support.mappings import SOURCES, half_of, parallel_mapping
from tests.support.serving import alive, environment, free_port, wait_until, whole_lines
from vllm_patching import gate

BATCH_S = 0.01
BUCKET_BYTES = 4096
ENDS_THE_SERVER = ("launcher", "api", "engine", "worker")  # if they are killed
SLACK = 2  # descriptors: a connection that is being answered
SLACK_S = 3.0  # beyond what the product promises: a machine of two cores, both of them busy
HITS_WITHIN_S = 90.0  # rounds over a link that loses packets, until one of them has lost one
REPO = Path(__file__).parents[2]

OWN_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["bridge.rounds", "tests.support.node"])


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """The trainer's weights number ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype, *_) in SOURCES.items()
    }


def digest_of(half: torch.Tensor) -> str:
    return blake3.blake3(half.numpy()).hexdigest(8)


def digests_of(seed: int, ranks: int) -> list[str]:
    """What each rank answers while it serves weights number ``seed``."""
    return [digest_of(half_of(rank_map, state_of(seed))) for rank_map in parallel_mapping(ranks).ranks]


# --- in vLLM's place ----------------------------------------------------------------------------------------


def worker(rank: int, ranks: int, pipes: Sequence[tuple[Any, Any]]) -> None:
    """A worker: its weights in an arena, flipped as a stamp says."""
    batches = pipes[rank][1]
    for end in {end for pipe in pipes for end in pipe} - {batches}:
        end.close()  # or nobody's death would be seen
    from vllm_patching.cpu_arena import CpuArena
    from vllm_patching.registration import Registration
    from vllm_patching.worker import WorkerBridge

    document = parallel_mapping(ranks)
    rank_map = document.ranks[rank]
    arena = CpuArena(rank_map.arena_bytes)
    arena.live(0, rank_map.arena_bytes).copy_(half_of(rank_map, state_of(0)))
    arena.warm()
    hello = {
        "type": "worker", "rank": rank, "world_size": ranks, "tp_degree": ranks, "model": "tests/tiny",
        "dtype": "bfloat16", "vllm_version": "0.32.0", "gpu": "", "arena": arena.kind, "handles": [],
        "descriptors": 2, "hooks": {"execute_model": True},
        "rank_map": msgspec.to_builtins(rank_map),
        "vocabularies": msgspec.to_builtins(document.vocabularies), "omitted_vocabularies": {},
    }  # fmt: skip
    bridge = WorkerBridge(
        rank=rank, arena=arena, log_path=Path(os.environ["BRIDGE_LOGDIR"], f"flips-rank{rank}.jsonl")
    )
    registration = Registration(hello, fds=arena.export(), who=f"vLLM worker rank {rank}")
    bridge.slot = registration.connect().slot(rank)
    registration.watch()
    while True:
        try:
            stamp = batches.recv()
            bridge.before_batch(stamp, 1)
            digest = digest_of(arena.live(0, rank_map.arena_bytes))
            bridge.after_batch()
            batches.send((bridge.version, digest))
        except (EOFError, OSError):
            return  # the engine has ended


def api(args: argparse.Namespace) -> int:
    """The API server: /health, and the engine as its child."""
    from vllm_patching.channel import socket_path

    torch.set_num_threads(1)
    listening = socket_path(Path(os.environ["BRIDGE_RUN_DIR"]))  # vLLM takes longer to load than this to come
    wait_until("the daemon to listen", listening.exists, timeout_s=120)
    child = multiprocessing.get_context("fork").Process(target=engine, args=(args.ranks,))
    child.start()

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", args.port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def end(*_: object) -> None:
        child.terminate()
        child.join()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    child.join()
    return 1


def engine(ranks: int) -> None:
    """The engine core and its workers."""
    from vllm_patching.engine import EngineBridge
    from vllm_patching.registration import Registration

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(ranks)]
    for rank in range(ranks):
        context.Process(target=worker, args=(rank, ranks, pipes), daemon=True).start()
    for _, theirs in pipes:
        theirs.close()
    hello = {"type": "engine", "index": 0, "world_size": ranks, "hooks": {"schedule": True}}
    registration = Registration({**hello}, who="vLLM engine core 0")
    bridge = EngineBridge(SimpleNamespace(), salted=False)
    bridge.connect(registration.connect())
    registration.exit_with_parent = True
    registration.watch()
    serve(bridge, [ours for ours, _ in pipes], Path(os.environ["BRIDGE_LOGDIR"]))


def serve(engine: Any, workers: Sequence[Any], logdir: Path) -> None:
    """Batch after batch, until a worker has died."""
    let_in = Path(os.environ["BRIDGE_RUN_DIR"]) / gate.FILE_NAME
    progress = logdir / "batches"
    progress.write_bytes(bytes(8))
    with progress.open("r+b") as file:
        count = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
    before: Any = None
    with (logdir / "served.jsonl").open("a", buffering=1) as log:
        while True:
            output = SimpleNamespace()
            asked = gate.read(let_in).open  # else there is no request: it flips by a call, and no batch runs
            engine.before_schedule()
            engine.stamp(output)
            try:
                for pipe in workers:
                    pipe.send(output.bridge_commit)
                answers = [pipe.recv() for pipe in workers]
            except (EOFError, OSError):
                return
            if not asked:
                time.sleep(BATCH_S)
                continue
            if answers != before:
                before = answers
                log.write(json.dumps({"at": time.monotonic(), "ranks": answers}) + "\n")
            count[0] += 1  # behind the line: what a batch that was counted has read can be looked up
            time.sleep(BATCH_S)


def launch(args: argparse.Namespace) -> int:
    """The real supervisor, over the real daemon and the engine above."""
    from bridge import telemetry
    from launch.commands import Command
    from launch.options import ServerView
    from launch.supervisor import Launch, Limits, Supervisor

    telemetry.configure(role="launcher")
    run_dir, logdir = Path(args.run_dir), Path(args.logdir)
    run_dir.mkdir(mode=0o700)
    env = {
        "BRIDGE_RUN_DIR": str(run_dir), "BRIDGE_LOGDIR": str(logdir), "PYTHONUNBUFFERED": "1",
        "BRIDGE_TEST_FAULTS": str(logdir),
    }  # fmt: skip
    daemon = [
        sys.executable, "-m", "tests.support.faults", "vllm_patching.daemon", "--run-dir", str(run_dir),
        "--logdir", str(logdir), "--launcher-pid", str(os.getpid()), "--launch-id", "one",
        "--bucket-bytes", str(BUCKET_BYTES), *args.daemon_flags.split(),
    ]  # fmt: skip
    engine = [
        sys.executable,
        "-m",
        "tests.support.node",
        "api",
        f"--ranks={args.ranks}",
        f"--port={args.port}",
    ]
    return Supervisor(
        Launch(
            vllm=Command(name="vllm", argv=tuple(engine), env=env),
            daemon=Command(name="daemon", argv=tuple(daemon), env=env),
            trainer=None,
            server=ServerView(bind_host="127.0.0.1", connect_host="127.0.0.1", port=args.port),
            public_url=f"http://127.0.0.1:{args.port}",
            run_dir=run_dir,
            logdir=logdir,
            limits=Limits(
                start_timeout_s=180,
                shutdown_timeout_s=20,
                max_daemon_restarts=10**6,
                publish_grace_s=120,
                max_server_restarts=args.restarts,
            ),
        )
    ).run()


class Trainer:
    """The commands of a trainer rank; see ``support.trainer``."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def broadcast(self, seed: int, **options: Any) -> dict[str, Any]:
        """Send weights number ``seed``."""
        import bridge

        self.state = state_of(seed)
        receipt = bridge.broadcast_weights(self.state, **options)
        return dict(msgspec.to_builtins(receipt))

    def circles(self) -> dict[str, Any]:
        """What of ours lies about in circles, and the rounds' tensors: no collector comes for it here."""
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            kinds = [type(found) for found in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        own = [kind for kind in kinds if kind.__module__.startswith("bridge") or kind is torch.Tensor]
        return {"circles": sorted({kind.__qualname__ for kind in own})}

    def close(self) -> dict[str, Any]:
        import bridge

        bridge.close()
        return {}


def train(
    orders: Connection, logdir: Path, namespace: str, patience_s: float, rank: int, ranks: int, met: str
) -> None:
    """A trainer rank, in a process and perhaps a network namespace of its own.

    Several ranks meet by the file ``met``, and each has all weights. ``patience_s`` is how long it waits for
    a version to become live; the daemon may have been told less.
    """
    from bridge import telemetry

    if namespace:
        link.enter(namespace)
    with (logdir / "trainer.log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(BRIDGE_LOGDIR=str(logdir), BRIDGE_TEST_FAULTS=str(logdir))
    os.environ["BRIDGE_COMMIT_TIMEOUT_S"] = f"{patience_s:g}"
    torch.set_num_threads(1)
    gc.disable()  # as some trainers do: what is left must not be in circles
    telemetry.configure(role="trainer", rank=rank)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{met}", rank=rank, world_size=ranks)
    faults.install("trainer")
    made = Trainer()
    while True:
        try:
            name, arguments = orders.recv()
        except EOFError:
            return
        try:
            answer = getattr(made, name)(**arguments)
        except Exception as err:  # noqa: BLE001 - the test decides what an error means
            answer = {"error": str(err), "type": type(err).__name__, "typed": isinstance(err, BridgeError)}
        orders.send(answer)


class TrainerProcess:
    """What a test has of a rank; forked from a process that has imported torch, which is most of a start."""

    def __init__(self, *args: Any) -> None:
        """``args`` are those of ``train``, but for its orders."""
        self._orders, theirs = _context.Pipe()
        self._process = _context.Process(target=train, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send(self, name: str, **arguments: Any) -> None:
        self._orders.send((name, arguments))

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """{"died": exit code} of one that is dead."""
        if not self._orders.poll(timeout_s):
            raise TimeoutError(f"the trainer did not answer within {timeout_s:g} s")
        try:
            return dict(self._orders.recv())
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            return {"died": self._process.exitcode}

    def stop(self) -> None:
        """End it: in order if it lives."""
        if self._process.is_alive():
            with contextlib.suppress(OSError, TimeoutError):
                self.send("close")
                self.answer(30)
        self._orders.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()


class Trainers:
    """The ranks of one trainer, which do everything together."""

    def __init__(self, logdir: Path, namespace: str, patience_s: float, ranks: int) -> None:
        met = str(logdir / f"trainers-{time.monotonic_ns()}")
        self._ranks = [
            TrainerProcess(logdir, namespace, patience_s, rank, ranks, met) for rank in range(ranks)
        ]

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def one(self, rank: int) -> TrainerProcess:
        """One of them, to be told something by itself."""
        return self._ranks[rank]

    def send(self, name: str, **arguments: Any) -> None:
        for rank in self._ranks:
            rank.send(name, **arguments)

    def answers(self, timeout_s: float) -> list[dict[str, Any]]:
        """Of each rank, as in ``TrainerProcess.answer``."""
        until = time.monotonic() + timeout_s
        return [rank.answer(max(0.0, until - time.monotonic())) for rank in self._ranks]

    def command(self, name: str, **arguments: Any) -> list[dict[str, Any]]:
        self.send(name, **arguments)
        return self.answers(180)

    def stop(self) -> None:
        for rank in self._ranks:
            rank.stop()


# --- the test's side ----------------------------------------------------------------------------------------


class Node:
    """A running server of the above, what it serves, and one trainer."""

    def __init__(
        self,
        logdir: Path,
        *,
        ranks: int = 2,
        trainers: int = 1,
        deadline_s: float,
        flags: Sequence[str] = (),
        link: Link | None = None,
        own_shm: bool = False,
        restarts: int = 0,
        code: Path = REPO,
    ) -> None:
        """``link`` is what trainers live behind; ``own_shm``: a small /dev/shm of the server's own.

        ``trainers`` is how many ranks they have. ``restarts`` is how often the launcher starts what stands
        for vLLM again. The server runs ``code``, a checkout.
        """
        self._code = code
        self.logdir, self.ranks, self.trainers, self.deadline_s = logdir, ranks, trainers, deadline_s
        self._restarts = restarts
        self.run_dir = Path(
            os.environ.get("XDG_RUNTIME_DIR", logdir), f"node-{os.getpid()}-{time.monotonic_ns()}"
        )
        logdir.mkdir(parents=True, exist_ok=True)
        self._prefix = OWN_SHM if own_shm else ()
        self._flags = [
            f"--deadline={deadline_s:g}", f"--heartbeat-interval={deadline_s / 8:g}",
            f"--commit-timeout={2 * deadline_s:g}", *flags,
        ]  # fmt: skip
        self.seed = 0  # of the weights that are served
        self.version = 0
        self.link = link
        self._trainer: Trainers | None = None
        self._expected: dict[int, list[str]] = {0: digests_of(0, ranks)}
        self._read = 0
        self.start()

    def start(self) -> None:
        command = [
            *self._prefix, sys.executable, "-m", "tests.support.node", "launch", f"--run-dir={self.run_dir}",
            f"--logdir={self.logdir}", f"--ranks={self.ranks}", f"--port={free_port()}",
            f"--daemon-flags={' '.join(self._flags)}", f"--restarts={self._restarts}",
        ]  # fmt: skip
        (self.logdir / "served.jsonl").unlink(missing_ok=True)
        (self.logdir / "vllm_bridge_config.json").unlink(missing_ok=True)
        self._read = self.seed = self.version = 0
        self.restarts_left = self._restarts
        with (self.logdir / "launcher.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._code,
                env=environment(PYTHONPATH=f"{self._code}{os.pathsep}{self._code / 'tests'}"),
            )

        def ready() -> bool:
            assert self.process.poll() is None, (self.logdir / "launcher.log").read_text()[-3000:]
            return bool(self.status()["state"] == "ready")

        try:
            wait_until("the node to be ready", ready, timeout_s=150)
        except BaseException:
            self.stop()
            raise

    def status(self) -> dict[str, Any]:
        """The daemon's, or {"state": "absent"}."""
        from vllm_patching.channel import ask

        try:
            return ask(self.run_dir, {"type": "status"}, timeout_s=5)
        except BridgeError:
            if self.process.poll() is not None:
                return {"state": f"ended with {self.process.returncode}", "pids": {}}
            return {"state": "absent", "pids": {}}

    def train(self) -> Trainers:
        """The trainer; a fresh one if there is none."""
        if self._trainer is None:
            namespace = self.link.namespace if self.link else ""
            self._trainer = Trainers(self.logdir, namespace, 2 * self.deadline_s, self.trainers)
        return self._trainer

    @property
    def patience_s(self) -> float:
        """How long a test waits for what must come; the machine may be busy."""
        return 5 * self.deadline_s + 30

    @property
    def shm(self) -> Path:
        """The server's /dev/shm, as seen from here."""
        return Path(f"/proc/{self.process.pid}/root/dev/shm")

    def dismiss(self) -> None:
        """End the trainer."""
        if self._trainer is not None:
            self._trainer.stop()
            self._trainer = None

    def pid_of(self, who: str, which: int = 0) -> int:
        """A process by what it is called in faults; of several, number ``which``."""
        if who == "trainer":
            return self.train().pids[which]
        if who == "launcher":
            return self.process.pid
        pids = self.status()["pids"]
        if who == "api":
            return psutil.Process(pids["engines"][0]).ppid()
        return int(pids["daemon"] if who == "daemon" else pids[f"{who}s"][which])

    def begin(self, seed: int) -> None:
        """See to it that a round has been made, in an epoch that lives."""
        answers = self.train().command("broadcast", seed=seed)
        assert all("version" in answer for answer in answers), answers
        self.seed, self.version = seed, answers[0]["version"]
        self.await_batch()
        self.served()

    def await_batch(self) -> None:
        """Until what is live by now stands in ``served``: a receipt may come before the batch has ended."""
        before = self.batches()
        wait_until("a batch", lambda: self.batches() > before, timeout_s=30)

    def served(self) -> list[list[tuple[int, str]]]:
        """Version and digest of each rank, at every change since this was last asked."""
        lines = whole_lines(self.logdir / "served.jsonl")
        new, self._read = lines[self._read :], len(lines)
        return [[tuple(rank) for rank in json.loads(line)["ranks"]] for line in new]

    def flipped(self, version: int, *, killed: int | None = None) -> bool:
        """Whether all workers have noted that they flipped to it, but for one that had no time to."""
        logs = [self.logdir / f"flips-rank{rank}.jsonl" for rank in range(self.ranks) if rank != killed]
        return all(any(json.loads(line)["version"] == version for line in whole_lines(log)) for log in logs)

    def batches(self) -> int:
        return int.from_bytes((self.logdir / "batches").read_bytes(), "little")

    def serves(self, seed: int) -> list[str]:
        if seed not in self._expected:
            self._expected[seed] = digests_of(seed, self.ranks)
        return self._expected[seed]

    def lasting(self) -> dict[str, int]:
        """Process ids of what goes on from round to round."""
        pids = self.status()["pids"]
        servers = {"daemon": pids["daemon"], "engine": pids["engines"][0], "launcher": self.process.pid}
        ranks = {f"trainer {rank}".removesuffix(" 0"): pid for rank, pid in enumerate(self.train().pids)}
        return servers | ranks

    def descriptors(self) -> dict[str, dict[int, str]]:
        """What each lasting process has open: see ``left.descriptors``."""
        return {who: left.descriptors(pid) for who, pid in self.lasting().items()}

    def listeners(self) -> dict[str, int]:
        """On how many TCP ports each lasting process listens."""
        return {who: len(left.listeners(pid)) for who, pid in self.lasting().items()}

    def files(self) -> set[str]:
        """What this server and its trainer have named on this host: see ``left.files``."""
        own = [self.shm] if self._prefix else []
        return left.files(self.run_dir.parent, Path("/dev/shm"), *own)

    def in_vllms_place(self) -> list[int]:
        """Process ids of API server, engine and workers."""
        pids = self.status()["pids"]
        return [self.pid_of("api"), *pids["engines"], *pids["workers"]]

    def below(self) -> list[int]:
        """Process ids below the launcher."""
        return [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]

    def tree(self) -> list[str]:
        """What runs below the launcher."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found.append(" ".join(process.cmdline()[2:5]))
            except psutil.NoSuchProcess:
                continue
        return sorted(found)

    def stop(self) -> int:
        self.dismiss()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def node(logdir: Path, **options: Any) -> Iterator[Node]:
    made = Node(logdir, **options)
    try:
        yield made
    finally:
        made.stop()


# --- the oracle ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one fault led to. Seconds: until the trainer knew, and until the next version was live.

    ``answers`` are of each trainer rank; ``bound_s`` is within what they had to come. Of faults of a link,
    ``lost`` is how many packets it lost while the round was under way, the last of ``rounds``.
    """

    fault: str
    answers: list[str]
    noticed_s: float
    bound_s: float
    recovered_s: float
    descriptors: dict[str, int]
    lost: int | None
    rounds: int


def bound_s(made: Node, fault: Fault) -> float:
    """Seconds within which every trainer rank that lives has its answer."""
    deadline_s = made.deadline_s
    nbytes = sum(tensor.nbytes for tensor in state_of(0).values()) * made.trainers
    round_s = (
        2 * deadline_s + 2 * deadline_s + nbytes / SLOWEST_BYTES_PER_S
    )  # as in ``Session._next_actions``
    lost = fault.what == "drop"
    if (lost and fault.at == "committed") or fault.what == "slow link" or fault.what in faults.LOSSY:
        return round_s + SLACK_S  # nobody is silent, so only the round's own limit ends it
    silent = fault.what in ("stop", "cut", "corrupt") or (lost and fault.at == "before_begin")
    late_s = deadline_s if silent else fault.seconds if fault.what == "delay" else 0.0
    # Whose connection breaks or is silent is lost to the trainer itself, which looks for a cause; of all else
    # a frame tells it.
    searched = silent or fault.who in ("trainer", "daemon", "launcher")
    return late_s + (ROOT_CAUSE_TIMEOUT_S if searched else 0.0) + SLACK_S


@dataclass(frozen=True)
class _Before:
    """What there was before a fault: process ids, and what may not become more."""

    former: list[int]  # in vLLM's place
    below: list[int]  # the launcher
    tree: list[str]
    ports: set[int]
    descriptors: dict[str, dict[int, str]]
    listeners: dict[str, int]
    files: set[str]
    records: dict[Path, int]

    @classmethod
    def of(cls, made: Node) -> _Before:
        descriptors, listeners = made.descriptors(), made.listeners()
        below = made.below()
        ports = {port for pid in below for port in left.listeners(pid)}
        former, tree, files = made.in_vllms_place(), made.tree(), made.files()
        return cls(former, below, tree, ports, descriptors, listeners, files, _records(made))


@dataclass(frozen=True)
class _Round:
    """One round under a fault: weights ``old`` were served as version ``before``, and ``new`` was sent."""

    old: int
    before: int
    new: int
    answers: list[dict[str, Any]]
    began: float
    noticed_s: float
    lost: int | None

    @property
    def allowed(self) -> tuple[tuple[int, int], ...]:
        """What may be served: (weights, version)."""
        return (self.old, self.before), (self.new, self.before + 1)


def _records(made: Node) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in made.logdir.glob("flight-*.jsonl")}


def _round(made: Node, armed: Armed, old: int, before: int, pid: int) -> _Round:
    """Send further weights while ``armed`` waits, and let whoever was stopped go on."""
    fault, way, patience_s = armed.fault, made.link, made.patience_s
    lost = way.lost() if way is not None else 0
    began = time.monotonic()
    made.train().send("broadcast", seed=old + 1)
    if fault.what not in faults.LOSSY:
        wait_until(f"{fault} to happen", lambda: armed.fired, timeout_s=60, interval_s=0.01)
        began = time.monotonic()
    _let_go_on(made, fault, pid, patience_s)
    answers = made.train().answers(patience_s)
    noticed_s = time.monotonic() - began
    lost_now = way.lost() - lost if way is not None else None
    return _Round(old, before, old + 1, answers, began, noticed_s, lost_now)


def _struck(made: Node, fault: Fault, seed: int) -> tuple[_Round, int]:
    """The round that ``fault`` happens in, and how many were made for that: links lose packets by chance."""
    pid = made.pid_of(fault.who, fault.which) if fault.who else 0
    rounds, until = 1, time.monotonic() + HITS_WITHIN_S
    with Armed(fault, made.logdir, pid=pid, link=made.link, shm=made.shm, seed=seed) as armed:
        struck = _round(made, armed, made.seed, made.version, pid)
        while fault.what in faults.LOSSY and not struck.lost:
            assert all("version" in answer for answer in struck.answers), f"{fault}: {struck.answers}"
            assert time.monotonic() < until, f"{fault}: {rounds} rounds, and none of them lost a packet"
            _assert_whole(made, fault, *struck.allowed)
            rounds += 1
            struck = _round(made, armed, struck.new, struck.before + 1, pid)
    if fault.what == "stop" and fault.who == "daemon":
        os.kill(pid, signal.SIGCONT)
    if made.link is not None:
        made.link.set()
    return struck, rounds


def suffer(made: Node, fault: Fault, *, seed: int) -> Outcome:
    """Let ``fault`` happen in a round behind one of weights ``seed``, and see that nothing is lost by it.

    What is served is the version before or the new one, whole, on all ranks alike, and batches go on; every
    trainer rank gets a receipt or an error in time; the next round is made; nothing is left of what was
    before. Over a link that loses packets, rounds of further weights are made until one has lost some.

    Raises:
        LeftBehind: something is left.
    """
    made.begin(seed)
    before, within_s = _Before.of(made), bound_s(made, fault)
    struck, rounds = _struck(made, fault, seed)
    answers = struck.answers
    _assert_told(fault, answers, struck.before)
    assert struck.noticed_s <= within_s, (
        f"{fault}: {answers} came after {struck.noticed_s:.1f} s, not within {within_s:g} s"
    )
    written = set(_records(made).items()) - set(before.records.items())
    assert written or not any("error" in answer for answer in answers), f"{fault}: no flight record"
    assert not (unpickled := made.logdir / "unpickled.txt").exists(), unpickled.read_text()
    if any("died" in answer for answer in answers):
        made.dismiss()
    ends = fault.what in ("kill", "term") and fault.who in ENDS_THE_SERVER
    if ends and (fault.who == "launcher" or not made.restarts_left):
        _end_and_start_again(made, fault, struck, before)
        _recover(made, struck.new + 1)
        recovered_s = time.monotonic() - struck.began
    else:
        recovered_s = _go_on(made, fault, struck, before, restarted=ends)
    for rank, answer in enumerate(made.train().command("circles")):
        assert not answer["circles"], f"{fault}: trainer rank {rank} would keep {answer['circles']} for ever"
    return Outcome(
        str(fault), [_name(answer) for answer in answers], struck.noticed_s, round(within_s, 3), recovered_s,
        {who: len(held) for who, held in made.descriptors().items()}, struck.lost, rounds,
    )  # fmt: skip


def _end_and_start_again(made: Node, fault: Fault, struck: _Round, before: _Before) -> None:
    """The server ends as it should, and leaves nothing; start it again."""
    code, expected = made.process.wait(60), 75
    if fault.who == "launcher":  # one that was asked to end has done its work
        expected = -signal.SIGKILL if fault.what == "kill" else 0
    assert code == expected, f"{fault}: the launcher ended with {code}, not {expected}"
    wait_until(f"{fault}: the end of all", lambda: not any(map(alive, before.below)), timeout_s=60)
    _assert_whole(made, fault, *struck.allowed)
    made.dismiss()

    def found() -> set[str]:
        its_own = {path for path in made.files() if path.startswith(str(made.run_dir))}
        # Not whoever else on this host has got a port by now: orphans come below this process.
        ports = {port for pid in left.offspring() for port in left.listeners(pid)}
        return (made.files() - before.files) | its_own | {f"TCP port {port}" for port in before.ports & ports}

    # A process counts as ended with its first thread; what it has open goes with the last.
    _await_nothing(str(fault), found, timeout_s=15)
    made.start()


def _await_nothing(fault: str, found: Callable[[], Collection[str]], *, timeout_s: float) -> None:
    """Wait until nothing is ``found`` any more.

    Raises:
        LeftBehind: something stays.
    """
    try:
        wait_until(f"{fault}: nothing more than before", lambda: not found(), timeout_s=timeout_s)
    except TimeoutError as err:
        raise LeftBehind(fault, found()) from err


def _go_on(made: Node, fault: Fault, struck: _Round, before: _Before, *, restarted: bool) -> float:
    """The server lives, or its launcher has started it again; returns the seconds until the next version."""
    if restarted:  # what had belonged to the dead one goes with it
        made.restarts_left -= 1
        wait_until(
            f"{fault}: the end of the old one", lambda: not any(map(alive, before.former)), timeout_s=60
        )
    version = _recover(made, struck.new + 1)
    recovered_s = time.monotonic() - struck.began
    if fault.what == faults.FULL_SHM:
        faults.empty(made.shm)
    # A broadcast that ends in an error may be live all the same, and is then made again under a new number.
    again = [(struck.new + 1, later) for later in range(struck.before + 1, version + 1)]
    seen = _assert_whole(made, fault, *struck.allowed, *again)
    if any("version" in answer for answer in struck.answers):
        # An engine that was killed in the first batch under it had no time to note that.
        killed = fault.which if fault.who == "worker" else None
        flipped = restarted and made.flipped(struck.before + 1, killed=killed)
        assert struck.allowed[1] in seen or flipped, f"{fault}: a receipt for what was never served"
    wait_until("the processes to be as before", lambda: made.tree() == before.tree, timeout_s=30)
    replaced = {fault.who} if fault.what in faults.ENDS and fault.who in ("daemon", "trainer") else set()
    if restarted:
        replaced.add("engine")
    for who in before.descriptors:
        if who.split()[0] in replaced:
            before.descriptors[who], before.listeners[who] = made.descriptors()[who], made.listeners()[who]
    _assert_closed(made, fault, before)
    return recovered_s


def _assert_told(fault: Fault, answers: list[dict[str, Any]], before: int) -> None:
    """Every trainer rank that lives has a receipt, or a typed error that says what its fault is to say."""
    ends = fault.who == "trainer" and fault.what in faults.ENDS
    for rank, answer in enumerate(answers):
        who = f"{fault}: trainer rank {rank}"
        if "died" in answer:
            assert ends, f"{who} died, {answer}"
            assert rank == fault.which, f"{who} died, {answer}"
            assert answer["died"] == -faults.SIGNALS[fault.what], f"{who}: {answer}"
            continue
        assert "version" in answer or "error" in answer, f"{who}: silence, {answer}"
        assert answer.get("version", before + 1) == before + 1, f"{who}: {answer} behind version {before}"
        assert answer.get("typed", True), f"{who}: {answer}"
    if fault.what in faults.BOTH_VALUES:
        assert "error" in answers[0], f"{fault}: nobody noticed, {answers}"
        said = re.search(faults.BOTH_VALUES[fault.what], answers[0]["error"])
        assert said, f"{fault}: trainer rank 0 was not told both values: {answers[0]['error']}"
        theirs, right = (value for value in said.groups() if value is not None)
        if fault.what == "stale":
            assert int(theirs) == int(right) - 1, said
        elif fault.what == "other_version":
            assert (int(theirs), int(right)) in ((before - 1, before), (before - 1, before + 1)), said
        elif fault.what == "corrupt_bucket":
            assert theirs != right, said
        else:
            assert bytes.fromhex(theirs) == bytes(reversed(bytes.fromhex(right))), said


def _assert_closed(made: Node, fault: Fault, before: _Before) -> None:
    """No lasting process holds more than ``before``, and nothing more is named."""

    def grown() -> list[str]:
        more = [
            f"{len(held) - len(before.descriptors[who])} descriptor(s) of {who}, new are "
            + "; ".join(left.named(made.lasting()[who], dict(held.items() - before.descriptors[who].items())))
            for who, held in made.descriptors().items()
            if len(held) > len(before.descriptors[who]) + SLACK
        ]
        more += [
            f"{n - before.listeners[who]} TCP listener(s) of {who}"
            for who, n in made.listeners().items()
            if n > before.listeners[who]
        ]
        return more + sorted(made.files() - before.files)

    # What was closed over a link that was cut ends with the kernel's next try, which comes ever later.
    _await_nothing(str(fault), grown, timeout_s=90 if fault.what == "cut" else 15)


def _let_go_on(made: Node, fault: Fault, pid: int, patience_s: float) -> None:
    """Whoever was stopped goes on once the others have had the time to notice."""
    if fault.what != "stop" or fault.who in ("updater", "daemon"):
        return  # the daemon ends its updaters; whoever waits for a daemon learns of it before that goes on
    if fault.who == "trainer":
        wait_until("the daemon to notice", lambda: not made.status().get("trainer"), timeout_s=patience_s)
    else:
        threading.Event().wait(made.deadline_s)
    os.kill(pid, signal.SIGCONT)


def _name(answer: dict[str, Any]) -> str:
    return "receipt" if "version" in answer else str(answer.get("type", "died"))


def _recover(made: Node, seed: int) -> int:
    """The next round; a trainer that meets a server in the middle of its own recovery tries again."""
    deadline = time.monotonic() + made.patience_s
    while True:
        answers = made.train().command("broadcast", seed=seed)
        if all("version" in answer for answer in answers):
            break
        assert time.monotonic() < deadline, f"no round is made any more: {answers}"
    made.seed, made.version = seed, answers[0]["version"]
    made.await_batch()
    return made.version


def _assert_whole(made: Node, fault: Fault, *allowed: tuple[int, int]) -> set[tuple[int, int]]:
    """Every batch ran under one of these (weights, version), whole, on all ranks alike; which of them."""
    seen = set()
    for ranks in made.served():
        found = [
            (seed, version)
            for seed, version in allowed
            if [(version, digest) for digest in made.serves(seed)] == ranks
        ]
        assert found, f"{fault}: {ranks} was served, which is none of (weights, version) {allowed}"
        seen.add(found[0])
    return seen


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("api", "launch"))
    for name in ("--run-dir", "--logdir", "--daemon-flags"):
        parser.add_argument(name, default="")
    for name in ("--port", "--ranks", "--restarts"):
        parser.add_argument(name, type=int, default=0)
    args = parser.parse_args()
    return {"api": api, "launch": launch}[args.role](args)


if __name__ == "__main__":
    raise SystemExit(main())
