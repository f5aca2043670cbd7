"""A server without a model: the real launcher, daemon and updaters, and in vLLM's place a small process.

It holds the weights of a ``parallel_mapping`` in a real arena, introduces itself as engine core and worker of
every rank, flips when it is woken, and answers /health. What it serves it writes down: ``served`` reads it.

Run as a script: ``small_server.py {launch,vllm} --logdir D --tp N ...``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.serving import wait_until, whole_lines

ROOT = Path(__file__).parents[2]
SERVED = "served.json"
HOST = "127.0.0.1"


class Clients:
    """One request after another, each through the gate that is in front of vLLM's API."""

    def __init__(self, version: Callable[[], int], write_down: Callable[[], None]) -> None:
        self._version, self._write_down = version, write_down
        self.answered: list[int] = []  # under which versions
        self.asked = self.refused = 0

    def run(self) -> None:
        """Ask, for as long as this process lives."""
        asyncio.run(self._ask_all())

    async def _ask_all(self) -> None:
        from vllm_patching.gate import GateMiddleware

        while True:
            gate = GateMiddleware(self._api)  # a new one each time, which has not seen it open
            await gate(
                {"type": "http", "method": "POST", "path": "/v1/completions"}, self._receive, self._send
            )
            self.asked += 1
            if self.asked % 20 == 0:
                self._write_down()
            await asyncio.sleep(0.005)

    async def _api(self, _scope: Any, _receive: Any, _send: Any) -> None:
        if (now := self._version()) not in self.answered:
            self.answered.append(now)
            self._write_down()

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":  # the gate's own: the API above sends nothing
            assert message["status"] == 503
            self.refused += 1


def vllm(args: argparse.Namespace) -> int:
    """Publish, flip, answer; until killed."""
    import blake3
    import msgspec
    import torch

    from tests.support.mappings import parallel_mapping
    from vllm_patching.arena import allocate
    from vllm_patching.channel import socket_path
    from vllm_patching.registration import Registration

    torch.set_num_threads(1)
    document = parallel_mapping(args.tp)
    arenas = [
        allocate(r.arena_bytes, torch.device("cpu"), staging="double", flip=args.flip) for r in document.ranks
    ]
    for arena in arenas:
        arena.open_second_half()
        arena.live(0, arena.nbytes).zero_()  # the checkpoint
        arena.warm()
    version = 0
    writing = threading.Lock()

    def write_down() -> None:
        with writing:
            digests = [blake3.blake3(a.live(0, a.nbytes).numpy().tobytes()).hexdigest() for a in arenas]
            found = {
                "pid": os.getpid(), "version": version, "digests": digests, "answered": clients.answered,
                "asked": clients.asked, "refused": clients.refused,
            }  # fmt: skip
            path = args.logdir / f".{SERVED}.{os.getpid()}"
            path.write_text(json.dumps(found))
            path.replace(args.logdir / SERVED)

    clients = Clients(lambda: version, write_down)
    write_down()
    socket_file = socket_path(Path(os.environ["BRIDGE_RUN_DIR"]))
    wait_until("the daemon to listen", socket_file.exists, timeout_s=120)
    pages = []
    for rank, (arena, rank_map) in enumerate(zip(arenas, document.ranks, strict=True)):
        fds = arena.export()
        hello = {
            "type": "worker", "rank": rank, "world_size": args.tp, "tp_degree": args.tp,
            "model": document.model, "dtype": document.dtype, "vllm_version": document.vllm_version,
            "gpu": "", "arena": arena.kind, "handles": (), "descriptors": len(fds), "hooks": {},
            "rank_map": msgspec.to_builtins(rank_map),
            "vocabularies": msgspec.to_builtins(document.vocabularies), "omitted_vocabularies": {},
        }  # fmt: skip
        registration = Registration(hello, fds=fds, who=f"small worker {rank}")
        pages.append(registration.connect())
        registration.watch()
    engine = Registration(
        {"type": "engine", "index": 0, "world_size": args.tp, "hooks": {}}, who="small engine"
    )
    page = engine.connect()

    def flip() -> None:
        nonlocal version
        if (wanted := page.requested) <= version:
            return
        version = wanted
        for arena in arenas:
            arena.flip(1 - arena.active)
        write_down()
        for rank, arena in enumerate(arenas):
            pages[rank].slot(rank).record(version=version, batch=1, flip_ns=1, active=arena.active)

    engine.on_wake = flip
    engine.watch()
    threading.Thread(target=clients.run, daemon=True).start()

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer((HOST, args.port), Health).serve_forever()
    return 0


def launch(args: argparse.Namespace) -> int:
    """The real supervisor over the real daemon and a small server."""
    from bridge import telemetry
    from launch.commands import Command, daemon_command
    from launch.options import ServeOptions, ServerView
    from launch.supervisor import Launch, Limits, Supervisor

    telemetry.configure(role="launcher")
    run_dir: Path = args.run_dir
    run_dir.mkdir(mode=0o700)
    options = ServeOptions(
        model="tests/parallel", logdir=args.logdir, heartbeat_interval_s=0.5, deadline_s=5.0,
        peers=tuple(Path(peer) for peer in args.peers.split(os.pathsep) if peer), transport=args.transport,
        serve_checkpoint=args.checkpoint,
    )  # fmt: skip
    argv = [sys.executable, __file__, "vllm", "--logdir", str(args.logdir), "--tp", str(args.tp)]
    argv += ["--port", str(args.port), "--flip", args.flip]
    env = {"BRIDGE_RUN_DIR": str(run_dir), "PYTHONUNBUFFERED": "1"}
    return Supervisor(
        Launch(
            vllm=Command(name="vllm", argv=tuple(argv), env=env),
            daemon=daemon_command(options, run_dir, launcher_pid=os.getpid()),
            trainer=None,
            server=ServerView(bind_host=HOST, connect_host=HOST, port=args.port),
            public_url=f"http://{HOST}:{args.port}",
            run_dir=run_dir,
            logdir=args.logdir,
            limits=Limits(
                start_timeout_s=180.0, shutdown_timeout_s=5.0, max_daemon_restarts=1, max_server_restarts=3
            ),
        )
    ).run()


class Small:
    """One such server, from the outside."""

    def __init__(self, logdir: Path, run_dir: Path, port: int, *, tp: int, **flags: str) -> None:
        """``flags`` are the script's, such as ``peers``, ``transport``, ``checkpoint`` and ``flip``."""
        logdir.mkdir(exist_ok=True)
        self.logdir, self.run_dir, self.tp = logdir, run_dir, tp
        argv = [sys.executable, __file__, "launch", "--logdir", str(logdir), "--run-dir", str(run_dir)]
        argv += ["--port", str(port), "--tp", str(tp)]
        argv += [word for name, value in flags.items() for word in (f"--{name}", value)]
        self._log = logdir / "console.log"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )

    @property
    def text(self) -> str:
        """The launcher's console. What the daemon logs comes there a little later."""
        return "\n".join(whole_lines(self._log))

    def status(self) -> dict[str, Any]:
        """The daemon's; of state "absent" without a daemon."""
        from launch.probe import daemon_status

        return daemon_status(self.run_dir) or {"state": "absent", "detail": self.text[-2000:], "pids": {}}

    def served(self) -> dict[str, Any]:
        """Process, version, a digest of each rank's live half, and which versions it answered under."""
        served: dict[str, Any] = json.loads((self.logdir / SERVED).read_text())
        return served

    def stop(self) -> int:
        """End it in order; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("launch", "vllm"))
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--peers", default="")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--checkpoint", default="first")
    parser.add_argument("--flip", default="auto")
    args = parser.parse_args()
    return {"launch": launch, "vllm": vllm}[args.role](args)


if __name__ == "__main__":
    raise SystemExit(main())
