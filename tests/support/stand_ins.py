"""Small real programs in place of vLLM and the daemon, and a launcher that supervises them.

Run as a script: ``stand_ins.py {vllm,engine,daemon,launch} ...``. They open the same sockets, map /dev/shm
and start processes of their own as the real ones do, in a second rather than thirty.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHM_BYTES = 1 << 20


def vllm(args: argparse.Namespace) -> int:
    """Answers /health; keeps an engine process, and a socket that only its killer's heirs remove."""
    print(f"stand-in vLLM pid {os.getpid()}", flush=True)
    if args.mode == "die" or (args.mode == "once" and Path(args.pids).exists()):
        return 9
    if args.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine = [sys.executable, __file__, "engine", "--shm-file", args.shm_file, "--mode", args.mode]
    with subprocess.Popen(engine, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it has mapped its memory
        socket.socket(socket.AF_UNIX).bind(f"{os.environ['BRIDGE_RUN_DIR']}/{os.getpid():u>36}")
        Path(args.pids).write_text(f"{os.getpid()} {child.pid}")

        class Health(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/health" and args.mode != "sick" else 503)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", args.port), Health)
        if args.mode == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if args.mode not in ("outlive", "deaf"):
            threading.Thread(target=lambda: (child.wait(), server.shutdown()), daemon=True).start()
        server.serve_forever()
    return 0


def engine(args: argparse.Namespace) -> int:
    """Maps a file in /dev/shm that it never removes, as a killed vLLM worker would."""
    if args.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(args.shm_file, "wb+") as file:
        file.truncate(SHM_BYTES)
        memory = mmap.mmap(file.fileno(), SHM_BYTES)
    print("mapped", flush=True)
    signal.sigwait([signal.SIGUSR1])
    memory.close()
    return 0


def daemon(args: argparse.Namespace) -> int:
    """Answers status and shutdown; cleans up behind vLLM when the launcher is gone, like the real one."""
    from vllm_patching import residue
    from vllm_patching.channel import Channel, listen

    print(f"stand-in daemon pid {os.getpid()}", flush=True)
    if args.mode == "refuse":
        return 2
    run_dir = Path(args.run_dir)
    listener = listen(run_dir)
    shm: set[Path] = set()

    def pids() -> list[int]:
        path = Path(args.pids)
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    def lives(pid: int) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def end(*_: object) -> None:
        if os.getppid() != args.launcher_pid:
            residue.end_processes(pids(), timeout_s=5)
            residue.sweep(shm)
            residue.remove_run_dir(run_dir)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        sock, _ = listener.accept()
        channel = Channel(sock)
        request, _ = channel.receive()
        lost = Path(f"{args.pids}.lost").exists()
        here = [pid for pid in pids() if lives(pid)] if args.mode == "ready" and not lost else []
        shm |= residue.snapshot(here)
        channel.send(
            {
                "type": "status",
                "state": "ready" if here else "waiting",
                "detail": f"{len(here)} of 1 worker(s)",
                "model": "stand-in",
                "world_size": 1,
                "pids": {"daemon": os.getpid(), "engines": [], "workers": here},
                "rendezvous": "127.0.0.1:1",
                "complete": len(here) == 2,
                "kept_out": "",
                "weight_version": 0,
                "last_error": None,
            }
        )
        channel.close()
        if request["type"] == "shutdown":
            return 0


def launch(args: argparse.Namespace) -> int:
    """The real supervisor over the stand-ins."""
    from bridge import telemetry
    from launch.commands import Command
    from launch.options import ServerView
    from launch.supervisor import Launch, Limits, Supervisor

    telemetry.configure(role="launcher")
    run_dir, logdir = Path(args.run_dir), Path(args.logdir)
    run_dir.mkdir(mode=0o700)
    env = {"BRIDGE_RUN_DIR": str(run_dir), "PYTHONUNBUFFERED": "1"}
    me = (sys.executable, __file__)
    shared = ("--pids", args.pids)
    vllm_argv = (*me, "vllm", *shared, "--port", str(args.port), "--shm-file", args.shm_file)
    daemon_argv = (*me, "daemon", *shared, "--run-dir", str(run_dir), "--launcher-pid", str(os.getpid()))
    trainer = Command(name="trainer", argv=(sys.executable, "-c", args.trainer)) if args.trainer else None
    return Supervisor(
        Launch(
            vllm=Command(name="vllm", argv=(*vllm_argv, "--mode", args.vllm_mode), env=env),
            daemon=Command(name="daemon", argv=(*daemon_argv, "--mode", args.daemon_mode), env=env),
            trainer=trainer,
            server=ServerView(bind_host="127.0.0.1", connect_host="127.0.0.1", port=args.port),
            public_url=f"http://127.0.0.1:{args.port}",
            run_dir=run_dir,
            logdir=logdir,
            limits=Limits(
                start_timeout_s=args.start_timeout,
                shutdown_timeout_s=args.shutdown_timeout,
                max_daemon_restarts=1,
                max_server_restarts=args.server_restarts,
                publish_grace_s=1.0,
                outlive_s=args.outlive,
                silent_s=3.0,
            ),
        )
    ).run()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("vllm", "engine", "daemon", "launch"))
    for name in ("--run-dir", "--logdir", "--shm-file", "--pids", "--trainer"):
        parser.add_argument(name, default="")
    for name in ("--port", "--launcher-pid"):
        parser.add_argument(name, type=int, default=0)
    for name in ("--mode", "--vllm-mode", "--daemon-mode"):
        parser.add_argument(name, default="ready")
    parser.add_argument("--server-restarts", type=int, default=0)
    parser.add_argument("--start-timeout", type=float, default=60.0)
    parser.add_argument("--outlive", type=float, default=60.0)
    parser.add_argument("--shutdown-timeout", type=float, default=10.0)
    args = parser.parse_args()
    roles = {"vllm": vllm, "engine": engine, "daemon": daemon, "launch": launch}
    return roles[args.role](args)


if __name__ == "__main__":
    raise SystemExit(main())
