"""Real servers and real trainers for tests and benchmarks: started, talked to and ended with deadlines."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 480.0  # several at once, on two busy cores
ANSWER_TIMEOUT_S = 180.0
PORTS = range(20000, 29000)  # below what kernels give out, and what vLLM takes by default
# vLLM would bind every server to the same core; tests run several side by side.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# What vLLM lacks on a CPU for pipelines and for mixtures of experts data parallel is added there; see it.
PATHS = (REPO / "tests" / "support" / "layouts_on_cpu", REPO, REPO / "tests")
COMPLETED = {**UNBOUND, "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
# glibc raises its threshold with every large piece that is freed, and keeps what lies below it.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
FLAGS = ("--max-model-len=512", "--enforce-eager", "--disable-uvicorn-access-log", "--max-num-seqs=32")


def environment(**extra: str) -> dict[str, str]:
    """What every child of a test needs."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_") and k != "LOGDIR"}
    path = os.pathsep.join([str(REPO), str(REPO / "tests"), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path}
    return {**env, **defaults, **extra}


def end_in_order_on_sigterm() -> None:
    """SIGTERM ends this program by way of its ``finally`` clauses, which end what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port() -> int:
    """A port that nobody has at this moment, and that nobody is given who asks for any.

    It is bound much later, by a process that has to start first. Meanwhile everything that others open takes
    ports from the kernel's own range, which begins higher.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as err:
                if err.errno != errno.EADDRINUSE:
                    raise
                continue
        return port


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that another process appends to, but for one that it is writing; none of no file.

    What goes over the end of a page can be read when only its first part is there.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def wait_until(what: str, check: Callable[[], bool], *, timeout_s: float, interval_s: float = 0.05) -> None:
    """Wait for a condition outside of our control; fails with its name."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        select.select([], [], [], interval_s)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return state_of(Path(f"/proc/{pid}")) not in ("Z", "")


def stop(pid: int, *, timeout_s: float = 10.0) -> None:
    """SIGSTOP a process, and wait until none of its threads runs.

    The signal takes effect when one thread meets it; on a busy machine the others run on until then, for
    long enough to end what was to be held.
    """
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    wait_until(
        f"the threads of pid {pid} to stop",
        lambda: all(state_of(thread) in ("T", "") for thread in threads.iterdir()),
        timeout_s=timeout_s,
        interval_s=0.001,
    )


def state_of(directory: Path) -> str:
    """A process' or thread's state, one letter, from its folder in ``/proc``; "" if it is gone."""
    try:
        return (directory / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def prompts(count: int) -> list[list[int]]:
    """Fixed prompts, as token ids."""
    return [[1] + [3 + (seed * 29 + i * 11) % 90 for i in range(20)] for seed in range(count)]


class Api:
    """A server's OpenAI API and the bridge's endpoints."""

    def __init__(self, port: int, model: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.model = model

    def open(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 120.0
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json", **(headers or {})}
        )
        return urllib.request.urlopen(request, timeout=timeout_s)

    def healthy(self) -> bool:
        try:
            self.open("/health", timeout_s=5).close()
        except OSError:
            return False
        return True

    def complete(
        self, prompt: Any, *, headers: dict[str, str] | None = None, **sampling: Any
    ) -> list[dict[str, Any]]:
        body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **sampling}
        with self.open("/v1/completions", body, headers) as response:
            choices: list[dict[str, Any]] = json.load(response)["choices"]
        return sorted(choices, key=lambda c: int(c["index"]))

    def stream(
        self, prompt: list[int], *, headers: dict[str, str] | None = None, **sampling: Any
    ) -> Iterator[tuple[float, dict[str, Any]]]:
        body = {"model": self.model, "prompt": prompt, "stream": True, "return_token_ids": True, **sampling}
        with self.open("/v1/completions", body, headers) as response:
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise OSError(str(chunk))
                    yield time.monotonic(), chunk["choices"][0] if chunk["choices"] else {}

    def greedy(self, num_prompts: int = 8, tokens: int = 64, **extra: Any) -> list[dict[str, Any]]:
        """Greedy tokens and logprobs of fixed prompts, one request at a time so that batches are alike."""
        answers = []
        for prompt in prompts(num_prompts):
            (choice,) = self.complete(
                prompt, max_tokens=tokens, temperature=0.0, logprobs=0, ignore_eos=True, **extra
            )
            answers.append({"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]})
        return answers


def api_servers(server: Server) -> list[int]:
    """The launcher's children that are vLLM's API server: one, or none while vLLM starts again."""
    import psutil

    found = []
    for child in psutil.Process(server.process.pid).children():
        try:
            if any("api_server" in word for word in child.cmdline()):
                found.append(child.pid)
        except psutil.NoSuchProcess:  # an orphan that the launcher has yet to reap
            continue
    return found


class Server:
    """``python -m bridge.launch serve`` (or a plain vLLM), in a process of its own."""

    def __init__(self, model: Path, logdir: Path, *, flags: Sequence[str] = (), bridge: bool = True,
                 bridge_flags: Sequence[str] = (), env: dict[str, str] | None = None,
                 prefix: Sequence[str] = (), console: str = "console.log") -> None:  # fmt: skip
        self.model, self.logdir, self.bridge = model, logdir, bridge
        logdir.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.api = Api(self.port, str(model))
        common = [f"--port={self.port}", *FLAGS, *flags]
        if bridge:
            command = [sys.executable, "-m", "bridge.launch", "serve", "--logdir", str(logdir), *bridge_flags,
                       "--", str(model), *common]  # fmt: skip
        else:
            command = [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(model),
                *common,
            ]
        self.command = command = [*prefix, *command]
        self.log = logdir / console
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment(**(env or {})), cwd=logdir
            )

    @property
    def config(self) -> Path:
        return self.logdir / "vllm_bridge_config.json"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def secret(self) -> str:
        """What opens ``/bridge/*`` on a server without API keys."""
        return str(json.loads(self.config.read_text())["rendezvous"]["secret"])

    def call(self, path: str, body: Any = None, *, key: str | None = None) -> tuple[int, str]:
        """Status code and text of ``path``, with the job's secret unless ``key`` is given ("" for none)."""
        key = self.secret if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with self.api.open(path, body, headers) as response:
                return int(response.status), response.read().decode()
        except urllib.error.HTTPError as err:
            with err:
                return err.code, err.read().decode()

    def wait_ready(self, *, bridge: bool = True, timeout_s: float = START_TIMEOUT_S) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.text()[-6000:]}")
            return self.api.healthy() and (not bridge or self.status()["state"] == "ready")

        wait_until(f"the server of {self.model} (log {self.log})", ready, timeout_s=timeout_s, interval_s=0.3)

    def status(self) -> dict[str, Any]:
        """The daemon's status over its socket; {"state": "absent"} when there is none."""
        from bridge.errors import BridgeError
        from vllm_patching.channel import Channel

        try:
            run_dir = json.loads(self.config.read_text())["run_dir"]
            channel = Channel.connect(Path(run_dir), timeout_s=5)
        except (OSError, ValueError):
            return {"state": "absent", "pids": {}}
        try:
            channel.send({"type": "status"})
            return channel.receive()[0]
        except (BridgeError, TimeoutError):
            return {"state": "absent", "pids": {}}
        finally:
            channel.close()

    def pids(self) -> list[int]:
        import psutil

        return [p.pid for p in psutil.Process(self.process.pid).children(recursive=True)]

    def stop(self, *, timeout_s: float = 60.0) -> int:
        from vllm_patching import residue

        mapped: set[Path] = set()
        if self.process.poll() is None:
            # A plain vLLM whose workers are slow to end kills them, and nobody unlinks what they shared.
            mapped = set() if self.bridge else residue.snapshot(self.pids())
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            residue.sweep(mapped)


@contextmanager
def serving_together(*wanted: tuple[Path, Path, dict[str, Any]]) -> Iterator[list[Server]]:
    """Several servers, started side by side because a start is mostly one thread importing Python.

    Args:
        wanted: (model, logdir, options of ``Server``) of each.
    """
    servers: list[Server] = []
    try:
        for model, logdir, options in wanted:
            servers.append(Server(model, logdir, **options))
        for server, (_, _, options) in zip(servers, wanted, strict=True):
            server.wait_ready(bridge=options.get("bridge", True))
        yield servers
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.stop()


@contextmanager
def serving(
    model: Path, logdir: Path, *, bridge: bool = True, timeout_s: float = START_TIMEOUT_S, **options: Any
) -> Iterator[Server]:
    """A server that is ready, and ended afterwards."""
    server = Server(model, logdir, bridge=bridge, **options)
    try:
        server.wait_ready(bridge=bridge, timeout_s=timeout_s)
        yield server
    finally:
        server.stop()


class Trainers:
    """Trainer ranks (``support.trainer``), all given the same commands."""

    def __init__(self, kind: str, checkpoint: Path, *, logdir: Path, dtype: str = "bfloat16", ranks: int = 1,
                 env: dict[str, str] | None = None, module: str = "support.trainer",
                 prefix: Sequence[str] = ()) -> None:  # fmt: skip
        self.logdir = logdir
        port = free_port()
        self.processes = []
        for rank in range(ranks):
            extra = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOGDIR": str(logdir),
                     **(env or {})}  # fmt: skip
            log = (logdir / f"trainer{rank}-{port}.log").open("wb")
            command = [*prefix, sys.executable, "-m", module, kind, str(checkpoint), dtype]
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(**extra),
                )
            )
            log.close()
        try:
            self.ready = self.answers()
        except BaseException:
            self.stop()
            raise

    def send(self, op: str, **fields: Any) -> None:
        line = json.dumps({"op": op, **fields}).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def answers(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[dict[str, Any]]:
        """One answer per living rank; a dead rank answers {"died": exit code}."""
        return [self._answer(process, timeout_s) for process in self.processes]

    def _answer(self, process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], timeout_s)
        if not readable:
            raise TimeoutError(f"trainer pid {process.pid} did not answer within {timeout_s:g} s")
        line = process.stdout.readline()
        return json.loads(line) if line else {"died": process.wait(10)}

    def command(self, op: str, *, timeout_s: float = ANSWER_TIMEOUT_S, **fields: Any) -> list[dict[str, Any]]:
        self.send(op, **fields)
        return self.answers(timeout_s=timeout_s)

    def must(self, op: str, **fields: Any) -> list[dict[str, Any]]:
        """A command that has to succeed on every rank."""
        answers = self.command(op, **fields)
        assert not any("error" in a or "died" in a for a in answers), answers
        return answers

    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # it was killed with a command unread
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def training(kind: str, checkpoint: Path, **options: Any) -> Iterator[Trainers]:
    """Trainer ranks that are ready, and ended afterwards."""
    trainers = Trainers(kind, checkpoint, **options)
    try:
        yield trainers
    finally:
        trainers.stop()
