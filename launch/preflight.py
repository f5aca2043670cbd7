"""``check``: everything that can be known to be wrong before anything is started, all at once.

``serve`` runs the same checks first. Each one returns findings and raises nothing; a fault says what is
wrong, with values, and what to do.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import bridge
from bridge.errors import ConfigError, MappingError
from bridge.protocol import mapping as mapping_file
from bridge.wire import sockets
from launch import commands, footprint, probe
from launch.options import ServeOptions, ServerView, node_faults, read_server_args, split_faults
from vllm_patching import linux
from vllm_patching.channel import socket_path

MIB = 1 << 20
OLDEST_PYTHON = (3, 11)
PLUGIN_VALUE = "vllm_patching.plugin:register"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
IMPORT_TIMEOUT_S = 120.0

# vLLM's message queues (shm_broadcast.py, multiproc_executor.py): ten chunks each of
# VLLM_MQ_MAX_CHUNK_BYTES_MB for the broadcast to the workers, of 24 MiB for each worker's answers, and six of
# 4 MiB for each tensor-parallel group's broadcast.
MQ_CHUNKS = 10
MQ_DEFAULT_CHUNK_MIB = 16
MQ_ANSWER_MIB = 24 * MQ_CHUNKS
MQ_GROUP_MIB = 4 * 6


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``level`` is ok, note or fault."""

    topic: str
    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the checks look at beside the options; tests put something else in place."""

    shm_dir: Path = Path("/dev/shm")
    cgroup_root: Path = footprint.CGROUP_ROOT
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def inspect(options: ServeOptions, around: Surroundings | None = None) -> list[Finding]:
    """Run every check, whatever the others found."""
    around = around or Surroundings()
    findings = [Finding("options", "fault", text) for text in options.faults()]
    try:
        findings += [Finding("topology", "fault", t) for t in node_faults(options.vllm_args, around.environ)]
        findings += [Finding("topology", "fault", text) for text in split_faults(options)]
        server = read_server_args(options.vllm_args, around.environ)
    except ConfigError as err:
        findings.append(Finding("topology", "fault", str(err)))
        server = read_server_args(())
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        check_linux,
        check_vllm,
        check_plugin,
        check_companions,
        lambda: check_model(options, server, around),
        lambda: check_logdir(options),
        lambda: check_run_dir(options, around),
        lambda: check_ports(options, server) if options.node_rank == 0 else [],
        lambda: check_shm(server, around),
        check_amx,
    ]
    for check in checks:
        findings += check()
    return findings


def refuse(findings: list[Finding]) -> None:
    """Raise if there is any fault.

    Raises:
        ConfigError: lists all of them.
    """
    faults = [f"{f.topic}: {f.text}" for f in findings if f.level == "fault"]
    if faults:
        listing = "\n  ".join(faults)
        raise ConfigError(f"{len(faults)} fault(s) found before the start:\n  {listing}")


def check_python() -> list[Finding]:
    """Python's own version, and which installation of the bridge runs."""
    where = f"bridge from {next(iter(bridge.__path__))}"
    text = f"{platform.python_version()} at {sys.executable}, {where}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [Finding("python", "fault", f"{text}; at least {oldest} is needed, by vLLM too")]
    return [Finding("python", "ok", text)]


def check_linux() -> list[Finding]:
    """Processes can be waited for that are not our children."""
    try:
        os.close(linux.pidfd_open(os.getpid()))
    except OSError as err:
        text = f"Linux {platform.release()} has no pidfd_open ({err.strerror}); at least 5.3 is needed"
        return [Finding("linux", "fault", text)]
    return [Finding("linux", "ok", platform.release())]


def check_vllm() -> list[Finding]:
    """vLLM is installed, in a version whose hooks were compared."""
    from vllm_patching import compat  # imports torch; --help must not

    try:
        version = compat.installed_version()
        compat.check_version(version)
    except ConfigError as err:
        return [Finding("vllm", "fault", str(err))]
    return [Finding("vllm", "ok", f"{version}, torch {importlib.metadata.version('torch')}")]


def check_plugin() -> list[Finding]:
    """vLLM's processes will find the plugin, and it is this installation's."""
    found = importlib.metadata.entry_points(group=commands.PLUGIN_GROUP, name=commands.PLUGIN_NAME)
    name = f"the entry point {commands.PLUGIN_NAME} in group {commands.PLUGIN_GROUP}"
    if not found:
        text = f'{name} is not registered in {sys.prefix}; install the bridge here ("pip install -e .")'
        return [Finding("plugin", "fault", text)]
    wrong = sorted({entry.value for entry in found} - {PLUGIN_VALUE})
    if wrong:
        text = f"{name} is {', '.join(wrong)}, not {PLUGIN_VALUE}; remove the stale installation"
        return [Finding("plugin", "fault", text)]
    spec = importlib.util.find_spec("vllm_patching")
    home = Path(spec.origin).parent.parent if spec and spec.origin else None
    here = Path(__file__).parent.parent
    if home != here:
        text = f"{name} leads to {home}, but this launcher runs from {here}; two bridges are installed"
        return [Finding("plugin", "fault", text)]
    return [Finding("plugin", "ok", f"{PLUGIN_VALUE} from {home}")]


def check_companions() -> list[Finding]:
    """CUDA builds of torchvision and the like beside a CPU torch: they break ``import transformers``."""
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []  # check_vllm says so
    if not torch_version.endswith("+cpu"):
        return []
    findings = []
    for name in COMPANIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.endswith("+cpu"):
            continue
        error = _import_error(name)
        if error:
            text = (
                f"{name} {version} cannot be imported beside torch {torch_version} ({error}): it was "
                f'built for another torch, and vLLM will fail on it; run "pip uninstall {name}"'
            )
            findings.append(Finding("companions", "fault", text))
    return findings


def _import_error(module: str) -> str:
    """Import a module in a process of its own; its last words if it fails."""
    argv = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def check_model(options: ServeOptions, server: ServerView, around: Surroundings) -> list[Finding]:
    """The model can be read, and its weights fit into memory twice, or once if staged in place."""
    try:
        directory = footprint.find_model(options.model, around.environ)
        if directory is None:
            if around.environ.get("HF_HUB_OFFLINE") == "1":
                text = f"{options.model} is not in the Hugging Face cache, and HF_HUB_OFFLINE is 1"
                return [Finding("model", "fault", text)]
            text = f"{options.model} is not on this host; vLLM will download it, so its size is not checked"
            return [Finding("model", "note", text)]
        size = footprint.estimate(directory, dtype=server.dtype, load_format=server.load_format)
    except ConfigError as err:
        return [Finding("model", "fault", str(err))]
    copies = 1 if options.staging == "in-place" else 2
    memory = _memory_finding(size, copies, server.data_parallel_size, around)
    return [Finding("model", "ok", str(directory)), memory]


def _memory_finding(size: footprint.Footprint, copies: int, engines: int, around: Surroundings) -> Finding:
    one = f"{size.weight_bytes / MIB:,.0f} MiB of weights ({size.origin})"
    if _on_gpu():
        times = "twice" if copies == 2 else "once"
        return Finding(
            "memory", "note", f"{one}; the GPUs must hold them {times}, which vLLM's start will tell"
        )
    kv_gib = around.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    kv_bytes = int(kv_gib) << 30 if kv_gib.isdecimal() else 0
    need = engines * (copies * size.weight_bytes + kv_bytes)
    available, limit = footprint.available_memory(around.cgroup_root)
    text = f"{copies} x {one}"
    if kv_bytes:
        text += f" + {kv_bytes / MIB:,.0f} MiB of VLLM_CPU_KVCACHE_SPACE"
    if engines > 1:
        text += f", for each of {engines} engines"
    text += f" = {need / MIB:,.0f} MiB needed, {available / MIB:,.0f} MiB {limit}"
    if need > available:
        if copies == 2:
            text += (
                "; the live weights and the arriving ones need a copy each: take a smaller model or more "
                "memory, or --staging in-place, with which generation stands still for every transfer"
            )
        else:
            text += "; take a smaller model or more memory"
        return Finding("memory", "fault", text)
    if not kv_gib:
        text += (
            "; VLLM_CPU_KVCACHE_SPACE is not set, so vLLM's KV cache takes all that --gpu-memory-utilization "
            "allows, whatever the bridge needs beside it: set it (GiB), or lower --gpu-memory-utilization"
        )
        return Finding("memory", "note", text)
    return Finding("memory", "ok", text)


def _on_gpu() -> bool:
    """Whether the installed vLLM is the GPU's distribution."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return not importlib.metadata.version("torch").endswith("+cpu")


def check_logdir(options: ServeOptions) -> list[Finding]:
    """The log directory can be written to, and no living bridge publishes there."""
    logdir = options.logdir.absolute()
    fault = _write_fault(logdir)
    if fault:
        return [Finding("logdir", "fault", f"{fault}; choose another --logdir")]
    if options.node_rank:
        return [Finding("logdir", "ok", f"{logdir}, shared with node 0")]
    try:
        published = mapping_file.load(logdir / mapping_file.CONFIG_NAME)
    except MappingError:
        return [Finding("logdir", "ok", str(logdir))]  # none yet, or one that this launch replaces
    status = probe.daemon_status(Path(published.run_dir)) if published.run_dir else None
    if status is not None:
        text = (
            f"{logdir} belongs to a running bridge (daemon pid {status['pids']['daemon']}, model "
            f"{status['model']}); choose another --logdir, or stop that one"
        )
        return [Finding("logdir", "fault", text)]
    return [Finding("logdir", "ok", f"{logdir} (the mapping of an earlier run will be replaced)")]


def _write_fault(directory: Path) -> str:
    """Why ``directory`` cannot be created or written to; nothing is created."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if not existing.is_dir():
        return f"{existing} is not a directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable for uid {os.geteuid()}"
    return ""


def check_run_dir(options: ServeOptions, around: Surroundings) -> list[Finding]:
    """The run directory is private, its socket's path fits, and nobody lives in it."""
    chosen = options.run_dir
    # A fresh directory's name is as long as this one.
    run_dir = (chosen or commands.run_dir_parent(around.environ) / "vllm-bridge-xxxxxxxx").absolute()
    faults = []
    length = len(os.fsencode(socket_path(run_dir)))
    if length > commands.MAX_SOCKET_PATH:
        faults.append(
            f"{socket_path(run_dir)} has {length} bytes, Unix sockets allow {commands.MAX_SOCKET_PATH}; "
            "choose a shorter --run-dir"
        )
    if fault := _write_fault(run_dir):
        faults.append(fault)
    elif chosen is not None and chosen.exists():
        stat = chosen.stat()
        if stat.st_uid != os.geteuid():
            faults.append(f"{chosen} belongs to uid {stat.st_uid}, not to uid {os.geteuid()}")
        if stat.st_mode & 0o077:
            faults.append(f"{chosen} has mode {stat.st_mode & 0o777:04o}, others may look in; chmod 700 it")
        status = probe.daemon_status(chosen)
        if status is not None:
            faults.append(
                f"a daemon (pid {status['pids']['daemon']}) lives in {chosen}; choose another --run-dir"
            )
    if faults:
        return [Finding("run-dir", "fault", text) for text in faults]
    return [Finding("run-dir", "ok", str(run_dir) if chosen else f"fresh below {run_dir.parent}")]


def check_ports(options: ServeOptions, server: ServerView) -> list[Finding]:
    """Both servers can listen where they were told to."""
    findings = []
    if server.uds is not None:
        if fault := _write_fault(server.uds.absolute().parent):
            findings.append(Finding("http", "fault", f"--uds {server.uds}: {fault}"))
    else:
        findings.append(_port_finding("http", server.bind_host, server.port, "--port among vLLM's flags"))
    host, port = options.rendezvous_host, options.rendezvous_port
    findings.append(_port_finding("rendezvous", host, port, "--rendezvous-host or --rendezvous-port"))
    return findings


def _port_finding(topic: str, host: str, port: int, flag: str) -> Finding:
    try:
        with sockets.listen(host, port) as listener:
            found = str(listener.getsockname()[0])
    except OSError as err:
        owner = _port_owner(port) if err.errno == errno.EADDRINUSE else ""
        text = f"cannot listen on {host}:{port}: {err.strerror or err}{owner}; choose another with {flag}"
        return Finding(topic, "fault", text)
    if found == sockets.ALL_ADDRESSES and host not in ("", found):
        text = (
            f"{host} is loopback on this host (/etc/hosts?), so the port is open at all its addresses; {flag}"
        )
        return Finding(topic, "note", text)
    return Finding(topic, "ok", f"{host}:{port or 'any'}")


def _port_owner(port: int) -> str:
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                name = " ".join(psutil.Process(connection.pid).cmdline()[:4])
            except psutil.Error:
                name = "?"
            return f", pid {connection.pid} ({name}) listens there"
    return ", by a process of another user or container"


def check_shm(server: ServerView, around: Surroundings) -> list[Finding]:
    """The shared-memory file system holds vLLM's message queues.

    vLLM (0.27 and later) compares each queue with the free space when it creates it, but the pages are taken
    as messages arrive; so the largest queue is the least that lets it start, the sum what it may come to use.
    Neither has the 2 GiB of --enable-shm-tensor-arena (0.32 and later), which vLLM compares itself.
    """
    chunk = around.environ.get("VLLM_MQ_MAX_CHUNK_BYTES_MB", "")
    broadcast = MQ_CHUNKS * (int(chunk) if chunk.isdecimal() else MQ_DEFAULT_CHUNK_MIB)
    groups = MQ_GROUP_MIB * server.data_parallel_size if server.tensor_parallel_size > 1 else 0
    least = max(broadcast, MQ_ANSWER_MIB)
    most = broadcast * server.data_parallel_size + MQ_ANSWER_MIB * server.world_size + groups
    try:
        free = shutil.disk_usage(around.shm_dir).free / MIB
    except OSError as err:
        return [Finding("shm", "fault", f"cannot look at {around.shm_dir}: {err.strerror}; vLLM needs it")]
    text = (
        f"{free:,.0f} MiB free in {around.shm_dir}; vLLM's message queues for {server.world_size} rank(s) "
        f"need {least} MiB to start and up to {most} MiB"
    )
    grow = "; enlarge it (docker: --shm-size or --ipc=host; else: mount -o remount,size=1G /dev/shm)"
    if free < least:
        return [Finding("shm", "fault", text + grow)]
    return [Finding("shm", "note" if free < most else "ok", text + (grow if free < most else ""))]


def check_amx() -> list[Finding]:
    """A note on CPUs with AMX, where a stock vLLM died of SIGILL."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    if "amx_tile" not in flags:
        return []
    text = "this CPU has AMX; the plugin asks Linux for permission to use it in each vLLM process"
    return [Finding("amx", "note", text)]
