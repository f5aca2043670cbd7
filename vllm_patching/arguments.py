"""The daemon's command line; the launcher writes it, flag by flag."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bridge import telemetry
from bridge.errors import ConfigError

logger = logging.getLogger(__name__)


class Runs(Protocol):
    """A node's daemon, the first node's or another's."""

    def run(self) -> int: ...


def main(kind: Callable[[argparse.Namespace], Runs]) -> int:
    """Make a daemon by this process's command line, and run it; returns the exit code."""
    args = parse_args(sys.argv[1:])
    telemetry.configure(role="daemon", rank=args.node_rank if args.nnodes > 1 else None)
    try:
        daemon = kind(args)
    except ConfigError as err:  # what an earlier one has left is damaged
        logger.error("%s", err)
        return err.exit_code
    return daemon.run()


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The daemon's command line; the launcher writes it."""
    parser = argparse.ArgumentParser(
        prog="vllm_patching.daemon", description="The weight-updater daemon of one node."
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--num-engines", type=int, default=1)
    parser.add_argument("--rendezvous-host", default="127.0.0.1")
    parser.add_argument("--rendezvous-port", type=int, default=0)
    parser.add_argument("--heartbeat-interval", type=float, default=2.0)
    parser.add_argument("--deadline", type=float, default=15.0)
    parser.add_argument("--commit-timeout", type=float, default=120.0)
    parser.add_argument("--repair-timeout", type=float, default=600.0)
    parser.add_argument("--serve-checkpoint", choices=("first", "never", "always"), default="first")
    parser.add_argument("--bucket-bytes", type=int, default=0)
    parser.add_argument("--transport", choices=("auto", "pull", "nccl", "gloo"), default="auto")
    parser.add_argument("--checksum", choices=("first", "always", "off"), default="first")
    parser.add_argument("--prefix-cache", choices=("salt", "keep"), default="salt")
    parser.add_argument("--update-dir", type=Path)
    parser.add_argument("--peers", default="")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="")
    parser.add_argument("--master-port", type=int, default=0)
    parser.add_argument("--launch-id", default="")
    parser.add_argument("--start-timeout", type=float, default=1800.0)
    parser.add_argument("--launcher-pid", type=int, default=os.getppid())
    args = parser.parse_args(argv)
    args.update_dir = args.update_dir or args.logdir
    args.peers = [Path(peer) for peer in args.peers.split(os.pathsep) if peer]
    return args
