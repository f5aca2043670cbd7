"""A peer's helper: sends what its server serves to another server, as a trainer of one rank.

A child of the daemon whose server has the version, on the host where the weights are. It reads the live
halves and never writes; the daemon ends it before a round would write what it reads.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from bridge import telemetry
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import BridgeError, ConfigError, RendezvousError
from bridge.protocol.mapping import Mapping as MappingDocument
from bridge.rounds import Session
from vllm_patching import build
from vllm_patching.arena import adopt
from vllm_patching.channel import Channel
from vllm_patching.reading_back import read_back
from vllm_patching.updater import die_with

logger = logging.getLogger("vllm_patching.lender")  # __name__ is __main__ here

CONNECT_TIMEOUT_S = 30.0
KNOCK_TIMEOUT_S = 80.0  # the other server may be about to become ready; it waits a little longer for us


def _receive_halves(channel: Channel) -> tuple[MappingDocument, list[torch.Tensor]]:
    """The mapping, and the live half of each rank, uint8 [arena_bytes]."""
    channel.send({"type": "lender", "pid": os.getpid(), build.KEY: build.BUILD})
    welcome, _ = channel.receive()
    if welcome.get("type") != "welcome":
        raise RendezvousError(f"the daemon refused its lender: {welcome.get('error', welcome)}")
    mapping = msgspec.convert(welcome["mapping"], MappingDocument)
    halves = []
    for rank_map in mapping.ranks:
        memory, fds = channel.receive()
        half = adopt(
            fds, rank_map.arena_bytes, memory["gpu"], tuple(memory["handles"]), memory["arena"]
        ).halves[memory["half"]]
        halves.append(half)
    return mapping, halves


def lend(run_dir: Path, *, to: Path, version: int) -> Mapping[str, Any]:
    """Bring ``version`` to the server that publishes in ``to``; returns the receipt.

    What is lent, GPU memory perhaps, is mapped only when the other server has let us in.

    Raises:
        BridgeError: the other server refuses or is gone, or cannot be sent the same version.
    """
    session = Session.open(
        BridgeConfig(logdir=str(to), connect_timeout_s=KNOCK_TIMEOUT_S),
        Ranks(),
        device=None,
        restores=version,
    )
    telemetry.stand(epoch=session.epoch, version=version)
    try:
        if session.mapping.adapters:
            raise ConfigError("it serves adapters that trainers send, which cannot be borrowed")
        mapping, halves = _receive_halves(Channel.connect(run_dir, timeout_s=CONNECT_TIMEOUT_S))
        shards = read_back(mapping, halves, session.mapping)
        receipt = session.submit(shards, call=1, version=version).wait()
    except BridgeError as err:
        session.refuse_round(str(err))
        raise
    finally:
        session.close()
    made: Mapping[str, Any] = msgspec.to_builtins(receipt)
    return made


def main() -> int:
    """Entry point: ``python -m vllm_patching.lender --run-dir D --to LOGDIR --version N --daemon-pid P``."""
    parser = argparse.ArgumentParser(prog="vllm_patching.lender")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--version", type=int, required=True)
    parser.add_argument("--daemon-pid", type=int, required=True)
    args = parser.parse_args(sys.argv[1:])
    die_with(args.daemon_pid)
    telemetry.configure(role="lender")
    telemetry.stand(epoch=None, version=args.version)
    torch.set_num_threads(1)  # it runs beside a server that generates
    try:
        receipt = lend(args.run_dir, to=args.to, version=args.version)
    except (BridgeError, OSError) as err:
        logger.error("version %d was not lent to %s: %s", args.version, args.to, err)
        return err.exit_code if isinstance(err, BridgeError) else 1
    logger.info("version %d is live in %s too: %s", args.version, args.to, receipt)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
