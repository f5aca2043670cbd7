"""What the daemon says of itself when asked for ``status``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon


def describe(daemon: Daemon) -> dict[str, Any]:
    """What ``status`` shows; read from whatever is there at the moment."""
    mapping, epoch, page = daemon.mapping, daemon.epoch, daemon.registry.control
    world_size = daemon.registry.world_size
    if daemon.failed:
        state = "failed"
    elif mapping is None:
        state = "waiting"
    elif daemon.in_round:
        state = "round"
    else:
        state = "torn" if daemon.swap and daemon.swap.torn else "ready"
    here = len(daemon.registry.workers)
    engines = f"{len(daemon.registry.engines)} of {daemon.registry.num_engines} engine(s)"
    detail = f"{here} of {world_size or '?'} worker(s) and {engines}"
    ranks = range(mapping.num_inference_ranks) if mapping and page else range(0)
    if daemon.nodes is not None and daemon.nodes.missing:
        detail += f"; nodes {daemon.nodes.missing} of {daemon.nodes.nnodes} are missing"
    return {
        "type": "status",
        "state": state,
        "detail": daemon.failed or (daemon.swap.torn if state == "torn" and daemon.swap else detail),
        "weight_version": min((page.slot(r).version for r in ranks), default=0) if page else 0,
        "requested_version": daemon.version,
        "writing": page.writing if page else 0,
        "epoch": daemon.epochs,
        "model": mapping.model if mapping else "",
        "world_size": world_size,
        "pids": {
            "daemon": os.getpid(),
            **daemon.registry.pids(),
            "updaters": daemon.crew.pids() if daemon.crew else [],
        },
        "rendezvous": f"{daemon.args.rendezvous_host}:{daemon.store.port}" if daemon.store else None,
        "trainer": epoch.trainer if epoch else None,
        "bucket": epoch.machine.progress if epoch else -1,
        "rounds": {"committed": daemon.committed, "aborted": daemon.aborted},
        "last_error": daemon.last_error,
        "last_round": daemon.last_round,
        "given_up": daemon.given_up,
        "nodes": daemon.nodes.describe() if daemon.nodes else None,
        "ranks": [
            {
                "rank": r,
                "version": page.slot(r).version,
                "batch": page.slot(r).batch,
                "active_half": page.slot(r).active,
            }
            for r in ranks
            if page
        ],
    }
