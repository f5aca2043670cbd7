"""The command line: ``python -m bridge.launch {serve,demo,check,status,export-mapping}``.

Each subcommand imports what it needs when it runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import flight
from bridge.errors import BridgeError, ConfigError, RendezvousError
from launch.arguments import build_parser, make_options, split_words
from launch.options import ServeOptions

if TYPE_CHECKING:
    from launch.supervisor import Supervisor

Words = list[str] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; default the process's own.

    Returns:
        The exit code, as the epilog of --help lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, served, trainer = split_words(words)
    parser = build_parser()
    args, strange = parser.parse_known_args(own)
    if strange:
        parser.error(f"unknown: {shlex.join(strange)}; the model and vLLM's own flags come after a --")
    from bridge import telemetry

    try:
        telemetry.configure(role="launcher", level=getattr(args, "log_level", None))
        return _COMMANDS[args.command](args, served, trainer)
    except BridgeError as err:
        sys.stderr.write(f"error: {err}\n")
        return err.exit_code


def prepare(options: ServeOptions) -> Supervisor:
    """Make the directories of a launch and put it together; nothing runs yet."""
    from launch import commands
    from launch.options import read_server_args
    from launch.supervisor import URL_NAME, Launch, Limits, Supervisor

    if options.nnodes > 1:
        flight.name_process("launcher", options.node_rank)
    options.logdir.mkdir(parents=True, exist_ok=True)
    options.updates.mkdir(mode=0o700, parents=True, exist_ok=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    run_dir = commands.make_run_dir(options)
    server = read_server_args(options.vllm_args)
    (options.logs / URL_NAME).unlink(missing_ok=True)  # of an earlier server that was killed
    launch = Launch(
        vllm=commands.vllm_command(options, run_dir),
        daemon=commands.daemon_command(
            options, run_dir, launcher_pid=os.getpid(), launch_id=uuid.uuid4().hex
        ),
        trainer=commands.trainer_command(options),
        server=server,
        public_url=server.url_at(options.rendezvous_host),
        run_dir=run_dir,
        logdir=options.logs.absolute(),
        nnodes=options.nnodes,
        node_rank=options.node_rank,
        limits=Limits(
            start_timeout_s=options.start_timeout_s,
            shutdown_timeout_s=options.shutdown_timeout_s,
            max_daemon_restarts=options.max_daemon_restarts,
            max_server_restarts=options.server_restarts,
        ),
    )
    return Supervisor(launch)


def _serve(args: argparse.Namespace, served: Words, trainer: Words) -> int:
    options = make_options(args, served, trainer)
    from launch import preflight

    if args.dry_run:
        return _dry_run(options)
    preflight.refuse(preflight.inspect(options))
    if options.nnodes > 1:
        from launch import display
        from launch.options import read_server_args

        display.show_place(options, read_server_args(options.vllm_args))
    return prepare(options).run()


def _dry_run(options: ServeOptions) -> int:
    from launch import commands, display
    from launch.options import node_faults, read_server_args, split_faults

    if faults := options.faults() + node_faults(options.vllm_args) + split_faults(options):
        raise ConfigError("\n  ".join(faults))
    run_dir = options.run_dir or commands.run_dir_parent() / "vllm-bridge-XXXXXXXX"
    wanted = (
        commands.daemon_command(options, run_dir, launcher_pid=os.getpid()),
        commands.vllm_command(options, run_dir),
        commands.trainer_command(options),
    )
    display.show_dry_run(options, read_server_args(options.vllm_args), run_dir, [c for c in wanted if c])
    return 0


def _demo(args: argparse.Namespace, served: Words, _: Words) -> int:
    if served is not None:
        raise ConfigError("demo takes no model: it makes its own")
    from launch import demo

    chosen = {} if args.steps is None else {"steps": args.steps}
    return demo.run(workdir=args.workdir, **chosen)


def _check(args: argparse.Namespace, served: Words, _: Words) -> int:
    options = make_options(args, served)
    from launch import display, preflight

    findings = preflight.inspect(options)
    display.show_findings(findings)
    return ConfigError.exit_code if any(f.level == "fault" for f in findings) else 0


def _status(args: argparse.Namespace, _served: Words, _trainer: Words) -> int:
    from launch import display, probe
    from vllm_patching.channel import ask

    status = ask(
        args.run_dir or _published_run_dir(args.logdir),
        {"type": "status"},
        timeout_s=probe.PROBE_TIMEOUT_S,
    )
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


def _export(args: argparse.Namespace, served: Words, _: Words) -> int:
    logdir: Path = args.logdir
    if served is None:
        return export_mapping(logdir, args.output)
    options = make_options(args, served)
    from launch import preflight

    preflight.refuse(preflight.inspect(options))
    if options.node_rank:  # node 0 writes it, and ends the server; this node ends with it
        return prepare(options).run()
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


_COMMANDS: dict[str, Callable[[argparse.Namespace, Words, Words], int]] = {
    "serve": _serve,
    "demo": _demo,
    "check": _check,
    "status": _status,
    "export-mapping": _export,
}
