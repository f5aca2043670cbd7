"""What the daemon says of itself when asked for ``status``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm_patching import waiting

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon


def describe(daemon: Daemon) -> dict[str, Any]:
    """What ``status`` shows; read from whatever is there at the moment."""
    mapping, epoch, page = daemon.mapping, daemon.epoch, daemon.registry.control
    world_size = daemon.registry.world_size
    here = len(daemon.registry.workers)
    engines = f"{len(daemon.registry.engines)} of {daemon.registry.num_engines} engine(s)"
    members = f"{here} of {world_size or '?'} worker(s) and {engines}"
    state, detail = _state(daemon, members)
    ranks = range(mapping.num_inference_ranks) if mapping and page else range(0)
    if daemon.nodes is not None and daemon.nodes.missing:
        detail += f"; nodes {daemon.nodes.missing} of {daemon.nodes.nnodes} are missing"
    return {
        "type": "status",
        "state": state,
        "detail": detail,
        "complete": daemon.published,
        "borrowing": daemon.borrowing.asking,
        "weight_version": min((page.slot(r).version for r in ranks), default=0) if page else 0,
        "requested_version": daemon.version,
        "writing": page.writing if page else 0,
        "epoch": daemon.admission.epochs,
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
        "waits": waiting.describe(daemon),
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


def _state(daemon: Daemon, members: str) -> tuple[str, str]:
    """One word, and what is to be known of it."""
    if daemon.failed:
        return "failed", daemon.failed
    if daemon.mapping is None:
        why = f"; {daemon.last_error}" if daemon.registry.complete and daemon.last_error else ""
        return "waiting", members + why
    torn = "" if daemon.in_round or daemon.swap is None else daemon.swap.torn
    if torn and daemon.published:
        return "torn", torn
    if outdated := daemon.outdated:  # never ready, whatever round is under way to mend it
        return "recovering", f"{members}: {outdated}"
    if daemon.in_round:
        return "round", members
    return "ready", members
