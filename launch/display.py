"""What the command line shows: tables on a terminal (by rich, imported only there), plain lines elsewhere."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launch.commands import Command
from launch.options import ServeOptions, ServerView

if TYPE_CHECKING:
    from launch.preflight import Finding

MIB = 1 << 20


def say(text: str, output: TextIO | None = None) -> None:
    """Write one line, or several, to standard output; a reader who has left is no error."""
    output = output if output is not None else sys.stdout
    try:
        print(text, file=output, flush=True)
    except BrokenPipeError:
        sys.stderr.close()  # keeps Python's exit from complaining about the same pipe


def show_findings(findings: Sequence[Finding]) -> None:
    """The report of ``check``: all findings, faults marked."""
    if sys.stdout.isatty():
        styles = {"ok": "green", "note": "yellow", "fault": "bold red"}
        rows = [(f"[{styles[f.level]}]{f.level}[/]", f.topic, f.text) for f in findings]
        _table("preflight", ("", "what", "found"), rows)
    else:
        for finding in findings:
            say(f"{finding.level:<5} {finding.topic}: {finding.text}")
    faults = sum(f.level == "fault" for f in findings)
    say(f"{faults} fault(s)" if faults else "no fault found")


def show_dry_run(
    options: ServeOptions, server: ServerView, run_dir: Path, commands: Sequence[Command]
) -> None:
    """Topology and command lines of a launch that does not happen."""
    ranks = ranks_here(options, server)
    lines = [
        f"model          {options.model}",
        f"server         {server.url if options.node_rank == 0 else 'on node 0'}",
        *_place(options, server),
        f"inference      {server.world_size} rank(s), {len(ranks)} on this node: tensor "
        f"{server.tensor_parallel_size} x pipeline {server.pipeline_parallel_size}{_prefill(server)} x data "
        f"{server.data_parallel_size}",
        f"daemon         1, with updaters for ranks {', '.join(map(str, ranks))}",
        f"rendezvous     {options.rendezvous_host}:{options.rendezvous_port or 'any free port'}",
        f"transport      {options.transport}, buckets of {_bucket_size(options.bucket_bytes)}",
        f"run directory  {run_dir}",
        f"log directory  {options.logdir.absolute()}",
    ]
    for command in commands:
        lines += ["", f"{command.name}:"]
        lines += [f"  {key}={shlex.quote(value)} \\" for key, value in command.env.items()]
        lines += [f"  {command.shown_argv()}"]
    say("\n".join(lines))


def ranks_here(options: ServeOptions, server: ServerView) -> range:
    """The inference ranks of this node; vLLM gives each node a run of them, all equally long."""
    each = server.world_size // options.nnodes
    return range(options.node_rank * each, (options.node_rank + 1) * each)


def show_place(options: ServeOptions, server: ServerView) -> None:
    """What this launcher understood of a server on several nodes."""
    ranks = ", ".join(map(str, ranks_here(options, server)))
    say("\n".join([*_place(options, server), f"inference      {server.world_size} rank(s), here {ranks}"]))


def _place(options: ServeOptions, server: ServerView) -> list[str]:
    if options.nnodes == 1:
        return []
    port = options.master_port or "any free port"
    part = "the HTTP server, the engine and workers" if options.node_rank == 0 else "workers only"
    return [
        f"node           {options.node_rank} of {options.nnodes} on {socket.gethostname()}, by "
        f"{options.place_origin}: {part}",
        f"node 0         {options.master_addr}:{port}, tensor {server.tensor_parallel_size} x pipeline "
        f"{server.pipeline_parallel_size}{_prefill(server)}",
    ]


def _prefill(server: ServerView) -> str:
    size = server.prefill_context_parallel_size
    return f" x prefill context {size}" if size > 1 else ""


def _bucket_size(nbytes: int) -> str:
    return f"{nbytes / MIB:g} MiB" if nbytes else "the device's size"


def show_status(status: dict[str, Any], *, as_json: bool) -> None:
    """The daemon's status: a table on a terminal, one fact per line elsewhere."""
    if as_json:
        say(json.dumps(status, indent=2))
        return
    facts = _facts(status)
    ranks = [
        tuple(str(rank[key]) for key in ("rank", "version", "batch", "active_half"))
        for rank in status["ranks"]
    ]
    header = ("rank", "version", "batch", "active half")
    if sys.stdout.isatty():
        _table("bridge", ("", ""), facts)
        if ranks:
            _table("", header, ranks)
        return
    lines = [f"{name}: {value}" for name, value in facts]
    lines += [", ".join(f"{name} {value}" for name, value in zip(header, row, strict=True)) for row in ranks]
    say("\n".join(lines))


def _facts(status: dict[str, Any]) -> list[tuple[str, str]]:
    pids, rounds, last = status["pids"], status["rounds"], status["last_round"]
    facts = [
        ("state", f"{status['state']} ({status['detail']})"),
        ("model", f"{status['model'] or '-'} on {status['world_size'] or '?'} rank(s)"),
        ("weight version", str(status["weight_version"])),
        ("epoch", f"{status['epoch']}, trainer {status['trainer'] or 'none'}"),
        ("rounds", f"{rounds['committed']} committed, {rounds['aborted']} aborted"),
        ("rendezvous", status["rendezvous"] or "-"),
        (
            "pids",
            f"daemon {pids['daemon']}, engines {pids.get('engines')}, workers {pids.get('workers')}, "
            f"updaters {pids.get('updaters')}",
        ),
    ]
    if status.get("kept_out"):
        facts.append(("requests", f"kept out: {status['kept_out']}"))
    if nodes := status.get("nodes"):
        missing = f"; missing {nodes['missing']}" if nodes["missing"] else ""
        hosts = ", ".join(f"{rank} on {host}" for rank, host in nodes["hosts"].items())
        facts.append(("nodes", f"{nodes['rank']} of {nodes['count']} asked; {hosts}{missing}"))
    facts += [
        ("waits", f"{wait['who']} for {wait['waits_for']}{_since(wait['since_s'])}")
        for wait in status.get("waits", ())
    ]
    if last:
        facts.append(("last round", ", ".join(f"{key} {_number(value)}" for key, value in last.items())))
    if status["last_error"]:
        facts.append(("last error", status["last_error"]))
    return facts


def _since(seconds: float | None) -> str:
    return "" if seconds is None else f", since {seconds:g} s"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        say("\n".join("  ".join(row) for row in rows))
        return
    table = Table(*header, title=title or None, title_justify="left", show_header=any(header))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
