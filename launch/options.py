"""What ``serve`` was asked for: the bridge's own options, and a read-only view of vLLM's.

vLLM's arguments are passed on untouched. A few are read here, so that the launcher knows where the server
will answer and how large it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError

TRANSPORTS = ("auto", "pull", "nccl", "gloo")
PREFIX_CACHE = ("salt", "keep")
CHECKSUM = ("first", "always", "off")
STAGING = ("double", "in-place")
FLIP = ("auto", "remap", "copy")
SERVE_CHECKPOINT = ("first", "never", "always")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MAX_DIGITS = 18  # of a number among vLLM's flags; Python reads some thousands and then raises ValueError

# vLLM's spellings; the last one given wins, as in argparse.
_TENSOR = ("--tensor-parallel-size", "-tp")
_PIPELINE = ("--pipeline-parallel-size", "-pp")
_PREFILL = ("--prefill-context-parallel-size", "-pcp")
_DATA = ("--data-parallel-size", "-dp")
_NODES = ("--nnodes", "-n")
_ANOTHER_NODE = {
    "--node-rank": "-r",
    "--headless": "",
    "--master-addr": "",
    "--master-port": "",
}
_ANOTHER_ENGINE = {
    "--data-parallel-size-local": "-dpl",
    "--data-parallel-start-rank": "-dpr",
    "--data-parallel-address": "-dpa",
    "--data-parallel-rank": "-dpn",
    "--data-parallel-hybrid-lb": "-dph",
    "--data-parallel-external-lb": "-dpe",
    "--data-parallel-multi-port-external-lb": "-dpm",
}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Everything ``serve`` needs to know; times in seconds, sizes in bytes."""

    model: str
    vllm_args: tuple[str, ...] = ()
    trainer: tuple[str, ...] = ()
    logdir: Path = Path("logs")
    run_dir: Path | None = None  # None: a fresh one per launch
    rendezvous_host: str = "127.0.0.1"
    rendezvous_port: int = 0
    heartbeat_interval_s: float = 2.0
    deadline_s: float = 15.0
    commit_timeout_s: float = 120.0
    repair_timeout_s: float = 600.0
    bucket_bytes: int = 0  # by device
    transport: str = "auto"
    checksum: str = "first"
    staging: str = "double"
    flip: str = "auto"
    prefix_cache: str = "salt"
    serve_checkpoint: str = "first"
    adapters: str | None = None  # None: those that vLLM is to load at the start
    peers: tuple[Path, ...] = ()
    update_dir: Path | None = None  # None: <logdir>/updates
    http: bool = False
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    place_origin: str = "alone"
    start_timeout_s: float = 1800.0
    shutdown_timeout_s: float = 30.0
    max_daemon_restarts: int = 5  # with their pauses they outlast a disk that is full for ten seconds
    max_server_restarts: int = 3
    log_level: str = "INFO"

    @property
    def updates(self) -> Path:
        """Where update files must lie for the HTTP fallback."""
        return self.update_dir or self.logdir / "updates"

    @property
    def logs(self) -> Path:
        """Where this node's own logs go; ``logdir`` is shared by all nodes."""
        return self.logdir if self.node_rank == 0 else self.logdir / f"node{self.node_rank}"

    def _node_faults(self) -> list[str]:
        faults = []
        if self.nnodes < 1:
            faults.append(f"--nnodes is {self.nnodes}, the least is 1")
        elif not 0 <= self.node_rank < self.nnodes:
            faults.append(
                f"--node-rank is {self.node_rank}, of {self.nnodes} nodes the last is {self.nnodes - 1}"
            )
        if not 0 <= self.master_port < 65536:
            faults.append(f"--master-port is {self.master_port}, ports end at 65535")
        if self.nnodes > 1 and self.staging == "in-place":
            faults.append(
                "--staging in-place with several nodes: a node that is lost for a moment may still write "
                "while the engine goes on; leave it out"
            )
        if self.nnodes > 1 and self.peers:
            faults.append(
                "--peers with several nodes: a version is lent between servers of one node each, as a "
                "lender sees the memory of its own node only; leave it out"
            )
        if self.nnodes > 1 and self.adapters:
            faults.append(
                f"--adapters {self.adapters} with several nodes: adapters that trainers send are kept on one "
                'node; leave it out, or pass --adapters "" to serve those of the files'
            )
        return faults

    @property
    def server_restarts(self) -> int:
        """How often a vLLM that dies is started again: never on several nodes, or if trainers send adapters.

        Of several nodes, a lost part cannot join the others again. With adapters, vLLM would come up with
        those of the files, and a round of the model alone would make it ready.
        """
        return 0 if self.nnodes > 1 or self.sent_adapters else self.max_server_restarts

    @property
    def sent_adapters(self) -> tuple[str, ...]:
        """The served names of the LoRA adapters that trainers may send.

        Raises:
            ConfigError: vLLM's --lora-modules cannot be read.
        """
        if self.adapters is not None:
            return tuple(dict.fromkeys(name for name in self.adapters.split(",") if name))
        # With one half there is no room for them, and nobody has asked.
        none = self.staging == "in-place" or self.nnodes > 1
        return () if none else loaded_adapters(self.vllm_args)

    def faults(self) -> list[str]:
        """Values that cannot work, each as a sentence."""
        faults = self._node_faults()
        faults += [
            f"{_flag(name)} is {getattr(self, name):g}, it must be above 0 seconds"
            for name in (
                "heartbeat_interval_s",
                "deadline_s",
                "commit_timeout_s",
                "repair_timeout_s",
                "start_timeout_s",
            )
            if getattr(self, name) <= 0
        ]
        if self.staging == "in-place" and self.flip != "auto":
            faults.append(
                f"--flip {self.flip} says how two halves change places, and --staging in-place has one; "
                "leave --flip out"
            )
        if self.staging == "in-place" and self.sent_adapters:
            faults.append(
                f"--adapters {self.adapters} cannot be sent with --staging in-place: a round that fails "
                "midway would leave one torn, which no broadcast of the model repairs"
            )
        given = [*_config_file(self.vllm_args), *self.vllm_args]
        if self.adapters and not _is_given(given, "--enable-lora"):
            faults.append(f"--adapters {self.adapters} needs --enable-lora among vLLM's flags")
        if self.shutdown_timeout_s < 0:
            faults.append(f"--shutdown-timeout is {self.shutdown_timeout_s:g}, it cannot be negative")
        if self.deadline_s < 2 * self.heartbeat_interval_s:
            faults.append(
                f"--deadline {self.deadline_s:g} leaves no room for two heartbeats of "
                f"--heartbeat-interval {self.heartbeat_interval_s:g}; one late heartbeat would end a round"
            )
        if self.bucket_bytes != 0 and self.bucket_bytes < 4096:
            faults.append(
                f"--bucket-bytes is {self.bucket_bytes}, the least is 4096, or 0 to choose by device"
            )
        if not 0 <= self.rendezvous_port < 65536:
            faults.append(f"--rendezvous-port is {self.rendezvous_port}, ports end at 65535")
        faults += [
            f"{_flag(name)} is {getattr(self, name)}, the least is 0"
            for name in ("max_daemon_restarts", "max_server_restarts")
            if getattr(self, name) < 0
        ]
        return faults


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """Where vLLM's HTTP server answers, and what it will hold, as far as its arguments say."""

    bind_host: str
    connect_host: str
    port: int
    uds: Path | None = None
    tls: bool = False
    api_key: str = ""
    dtype: str = "auto"
    load_format: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    data_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        """How many ranks all engines have together."""
        engine = self.tensor_parallel_size * self.pipeline_parallel_size * self.prefill_context_parallel_size
        return engine * self.data_parallel_size

    @property
    def url(self) -> str:
        """What a client on this host uses."""
        return self.url_at(self.connect_host)

    def url_at(self, address: str) -> str:
        """What a client uses that reaches this host by ``address``; if vLLM binds one, that one."""
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = address if self.bind_host in ("0.0.0.0", "::") else self.connect_host  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


def read_server_args(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServerView:
    """Read, without changing anything, what vLLM will make of its own arguments.

    Raises:
        ConfigError: a number is none, or the config file cannot be read.
    """
    args = [*_config_file(args), *args]
    bind = _value(args, "--host") or ""
    uds = _value(args, "--uds")
    return ServerView(
        bind_host=bind or "0.0.0.0",  # noqa: S104 - vLLM's default, told rather than chosen
        connect_host={"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind),  # noqa: S104
        port=_number(args, 8000, "--port"),
        uds=Path(uds) if uds else None,
        tls=_value(args, "--ssl-certfile") is not None,
        api_key=_value(args, "--api-key") or environ.get("VLLM_API_KEY", ""),
        dtype=_value(args, "--dtype") or "auto",
        load_format=_value(args, "--load-format") or "auto",
        tensor_parallel_size=_number(args, 1, *_TENSOR),
        pipeline_parallel_size=_number(args, 1, *_PIPELINE),
        prefill_context_parallel_size=_number(args, 1, *_PREFILL),
        data_parallel_size=_number(args, 1, *_DATA),
    )


def split_faults(options: ServeOptions) -> list[str]:
    """Why this server's ranks cannot be spread over its nodes, each as a sentence.

    Raises:
        ConfigError: a number among vLLM's flags is none.
    """
    if options.nnodes == 1:
        return []
    view, faults = read_server_args(options.vllm_args), []
    if view.data_parallel_size > 1:
        faults.append(
            f"--data-parallel-size {view.data_parallel_size} with --nnodes {options.nnodes}: a server on "
            "several nodes has one engine; start one server for each engine, one trainer feeds them all"
        )
    if view.world_size % options.nnodes:
        faults.append(
            f"{view.world_size} rank(s) cannot be spread evenly over --nnodes {options.nnodes}: choose "
            "tensor, pipeline and prefill context parallel sizes whose product is a multiple of it"
        )
    return faults


def loaded_adapters(args: Sequence[str]) -> tuple[str, ...]:
    """The names of the LoRA adapters that vLLM is to load at its start.

    Raises:
        ConfigError: one is neither NAME=PATH nor JSON with a name.
    """
    args = [*_config_file(args), *args]
    words: list[str] = []
    taking = False
    for arg in args:
        name, value = _split(arg)
        if name.startswith("-"):
            taking = name == "--lora-modules"
            words = [] if taking else words  # the last one given wins
            words += [value] if taking and value is not None else []
        elif taking:
            words.append(arg)
    return tuple(dict.fromkeys(name for word in words for name in _names_in(word)))


def _names_in(word: str) -> list[str]:
    if not word.lstrip().startswith(("{", "[")):
        name, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"--lora-modules {word[:200]!r} among vLLM's flags is not NAME=PATH")
        return [name]
    try:
        found = json.loads(word)
        return [str(one["name"]) for one in (found if isinstance(found, list) else [found])]
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise ConfigError(f"--lora-modules {word[:200]!r} among vLLM's flags has no name: {err!r}") from err


def node_faults(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """What asks for more than this version can do, or for nothing at all, each as a sentence.

    Raises:
        ConfigError: vLLM's --config file cannot be read.
    """
    faults = []
    own, args = args, [*_config_file(args), *args]
    only_one = "the bridge's own --nnodes, --node-rank and --master-addr, before the --, pass it on"
    nodes = environ.get("NUM_INFERENCE_NODES", "")
    if nodes and not _is_number(nodes):
        faults.append(f"NUM_INFERENCE_NODES is {nodes[:200]!r}, not a number")
    elif nodes and int(nodes) > 1:
        faults.append(f"NUM_INFERENCE_NODES is {nodes}, which the launcher does not follow: {only_one}")
    if _number(args, 1, *_NODES) > 1:
        faults.append(f"--nnodes {_value(args, *_NODES)} is among vLLM's flags: {only_one}")
    for flag, short in _ANOTHER_NODE.items():
        if _is_given(args, flag, short):
            faults.append(f"{flag} is among vLLM's flags: {only_one}")
    for flag, short in _ANOTHER_ENGINE.items():
        if _is_given(args, flag, short):
            faults.append(
                f"{flag} is given, but engines on several nodes are not supported: start one server each"
            )
    if environ.get("VLLM_ENABLE_SHARED_WEIGHTS") == "0":
        faults.append(
            "VLLM_ENABLE_SHARED_WEIGHTS is 0, which asks for a server without live weights; unset it, or "
            "start vLLM itself: python -m vllm.entrypoints.openai.api_server"
        )
    if _is_given(own, "--model"):
        faults.append("--model is among vLLM's flags; name the model once, right after --")
    return faults


def _config_file(args: Sequence[str]) -> list[str]:
    """vLLM's own --config file as arguments; those on the command line come later and win."""
    path = _value(args, "--config")
    if path is None:
        return []
    import yaml  # vLLM's own dependency; only needed with --config

    # Beside its own error, a scalar that is not what it looks like, or is tagged as, raises whatever Python
    # does: 2001-99-99, !!bool x, !!int "", !!timestamp x, and numbers too large for a float.
    unreadable = (
        OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
        RecursionError,
    )  # fmt: skip
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
        if isinstance(content, dict):
            return [word for key, value in content.items() for word in _words(key, value)]
    except unreadable as err:
        raise ConfigError(f"cannot read vLLM's --config {path}: {type(err).__name__}: {err}") from err
    raise ConfigError(f"vLLM's --config {path} holds a {type(content).__name__}, and not flags by name")


def _words(key: str, value: Any) -> list[str]:
    """One entry of the config file, as vLLM puts it on the command line: a list as a word for each item."""
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    if isinstance(value, dict):
        value = json.dumps(value)
    return [] if value is False else [f"--{key}={value}"]


def _split(arg: str) -> tuple[str, str | None]:
    name, equals, value = arg.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("_", "-")  # vLLM takes both
    return name, value if equals else None


def _value(args: Sequence[str], *names: str) -> str | None:
    found = None
    for index, arg in enumerate(args):
        name, value = _split(arg)
        if name in names:
            found = value if value is not None else "".join(args[index + 1 : index + 2])
    return found


def _number(args: Sequence[str], default: int, *names: str) -> int:
    text = _value(args, *names)
    if text is None:
        return default
    if not _is_number(text):
        raise ConfigError(f"{names[0]} {text[:200]!r} among vLLM's flags is not a number")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def _is_given(args: Sequence[str], *names: str) -> bool:
    return any(_split(arg)[0] in names for arg in args if arg.startswith("-"))
