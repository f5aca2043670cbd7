"""Who waits for what, and since when: what ``status`` says of a server that stands still.

Said by the daemon, of everybody, as far as it knows: it gives the orders and hears the answers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from bridge.protocol.session import State

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon
    from vllm_patching.epoch import Epoch


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Who waits for what, and how long in seconds; None where nobody knows."""

    who: str
    waits_for: str
    since_s: float | None


def describe(daemon: Daemon) -> list[Wait]:
    """One entry for the daemon, for the trainer if there is one, and for each rank."""
    if daemon.mapping is None:
        return [_entry("daemon", _missing(daemon), None)]
    if daemon.nodes is not None and daemon.nodes.missing:
        return [_entry("daemon", f"nodes {daemon.nodes.missing} to come back", None)]
    epoch = daemon.epoch
    if epoch is None:
        waits_for = "an update file to be staged" if daemon.filing else "a trainer"
        return [_entry("daemon", waits_for, None), *_flips(daemon)]
    return [*_parties(epoch), *_ranks(daemon, epoch)]


def _entry(who: str, waits_for: str, since: float | None) -> Wait:
    since_s = None if since is None else round(max(0.0, time.monotonic() - since), 1)
    return Wait(who=who, waits_for=waits_for, since_s=since_s)


def _missing(daemon: Daemon) -> str:
    registry = daemon.registry
    if daemon.nodes is not None and daemon.nodes.missing:
        return f"nodes {daemon.nodes.missing} to join"
    if registry.world_size is None:
        return "vLLM to publish its memory"
    workers = sorted(set(range(registry.world_size)) - registry.workers.keys())
    engines = sorted(set(range(registry.num_engines)) - registry.engines.keys())
    parts = [f"worker ranks {workers}"] if workers else []
    parts += [f"engine cores {engines}"] if engines else []
    return f"{' and '.join(parts) or 'vLLM'} to register"


def _parties(epoch: Epoch) -> list[Wait]:
    version, state = epoch.round.version, epoch.machine.state
    missing = sorted(set(range(epoch.crew.num_ranks)) - epoch.round.reports.keys())
    daemon, trainer = {
        State.IDLE: ("the trainer's next round", epoch.trainer_says or "its own next broadcast"),
        State.STAGING: (
            f"ranks {missing} to hold version {version}",
            f"bucket {epoch.machine.progress} to be taken" if epoch.machine.progress >= 0 else "its ranks",
        ),
        State.STAGED: ("the trainer's word to commit", "its decision to commit"),
        State.COMMITTING: (f"every rank to flip to version {version}", f"version {version} to be live"),
    }.get(state, ("the epoch to be closed", "the epoch to be closed"))
    return [
        _entry("daemon", daemon, epoch.changed_at),
        _entry(f"trainer (pid {epoch.request.pid} on {epoch.request.host})", trainer, epoch.changed_at),
    ]


def _ranks(daemon: Daemon, epoch: Epoch) -> list[Wait]:
    state = epoch.machine.state
    found: list[Wait] = []
    if state is State.COMMITTING:
        return _flips(daemon)
    for rank in range(epoch.crew.num_ranks):
        since = epoch.heard_at.get(rank, epoch.changed_at)
        if state is State.STAGING and rank not in epoch.round.reports:
            poised = (
                "leave to write" if rank in epoch.poised else f"the bytes of version {epoch.round.version}"
            )
            found.append(_entry(f"rank {rank}", poised, since))
        elif state in (State.STAGING, State.STAGED):
            found.append(_entry(f"rank {rank}", f"the commit of version {epoch.round.version}", since))
        elif rank not in epoch.joined:
            found.append(_entry(f"rank {rank}", "the trainer's ranks to join", since))
        else:
            found.append(_entry(f"rank {rank}", "the next round", since))
    return found


def _flips(daemon: Daemon) -> list[Wait]:
    """Ranks whose next batch has not come yet."""
    page = daemon.registry.control
    if page is None:
        return []
    late = [rank for rank in range(page.num_ranks) if page.slot(rank).version != page.requested]
    return [
        _entry(f"rank {rank}", f"its next batch, to flip to version {page.requested}", None) for rank in late
    ]
