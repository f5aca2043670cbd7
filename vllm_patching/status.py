"""What a daemon says of itself when asked for ``status``; docs/operations.md has a row for every field."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec

from vllm_patching import waiting
from vllm_patching.waiting import Wait

if TYPE_CHECKING:
    from vllm_patching.control_page import ControlPage
    from vllm_patching.daemon import Daemon

StateName = Literal["waiting", "ready", "round", "recovering", "torn", "failed"]


class Pids(msgspec.Struct, frozen=True, kw_only=True):
    """Process ids of a server."""

    daemon: int
    engines: list[int]
    workers: list[int]
    updaters: list[int]


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """How many rounds have ended in which way."""

    committed: int
    aborted: int


class LastRound(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in the newest round that was committed."""

    version: int
    bytes: int
    transfer_s: float
    stage_s: float
    flip_s: float
    transport: str
    restores: int | None = None


class NodesHere(msgspec.Struct, frozen=True, kw_only=True):
    """Of a server on several nodes: which there are, seen from one of them."""

    count: int
    rank: int
    missing: list[int]
    hosts: dict[int, str]
    address: str
    master_addr: str
    master_port: int


class RankHere(msgspec.Struct, frozen=True, kw_only=True):
    """One inference rank, as its worker says."""

    rank: int
    version: int
    batch: int
    active_half: int


class Status(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="status"):
    """The answer to ``status``."""

    state: StateName
    detail: str
    complete: bool
    borrowing: bool
    kept_out: str
    weight_version: int
    requested_version: int
    writing: int
    epoch: int
    model: str
    world_size: int | None
    pids: Pids
    rendezvous: str | None
    trainer: str | None
    bucket: int
    rounds: Rounds
    last_error: str | None
    last_round: LastRound | None
    given_up: str
    nodes: NodesHere | None
    waits: list[Wait]
    ranks: list[RankHere]


def ranks_of(page: ControlPage | None, ranks: list[int]) -> list[RankHere]:
    """What the control page says of these."""
    if page is None:
        return []
    slots = {rank: page.slot(rank) for rank in ranks}
    return [
        RankHere(rank=rank, version=slot.version, batch=slot.batch, active_half=slot.active)
        for rank, slot in slots.items()
    ]


def describe(daemon: Daemon) -> Status:
    """What ``status`` shows; read from whatever is there at the moment."""
    mapping, epoch, page = daemon.mapping, daemon.epoch, daemon.registry.control
    world_size = daemon.registry.world_size
    here = len(daemon.registry.workers)
    engines = f"{len(daemon.registry.engines)} of {daemon.registry.num_engines} engine(s)"
    members = f"{here} of {world_size or '?'} worker(s) and {engines}"
    state, detail = _state(daemon, members)
    ranks = ranks_of(page, list(range(mapping.num_inference_ranks if mapping else 0)))
    if daemon.nodes is not None and daemon.nodes.missing:
        detail += f"; nodes {daemon.nodes.missing} of {daemon.nodes.nnodes} are missing"
    return Status(
        state=state,
        detail=detail,
        complete=daemon.published,
        borrowing=daemon.borrowing.asking,
        kept_out=daemon.gate.word.why,
        weight_version=min((rank.version for rank in ranks), default=0),
        requested_version=daemon.version,
        writing=page.writing if page else 0,
        epoch=daemon.admission.epochs,
        model=mapping.model if mapping else "",
        world_size=world_size,
        pids=Pids(
            daemon=os.getpid(),
            updaters=daemon.crew.pids() if daemon.crew else [],
            **daemon.registry.pids(),
        ),
        rendezvous=f"{daemon.args.rendezvous_host}:{daemon.store.port}" if daemon.store else None,
        trainer=epoch.trainer if epoch else None,
        bucket=epoch.machine.progress if epoch else -1,
        rounds=Rounds(committed=daemon.committed, aborted=daemon.aborted),
        last_error=daemon.last_error,
        last_round=daemon.last_round,
        given_up=daemon.given_up,
        nodes=daemon.nodes.describe() if daemon.nodes else None,
        waits=waiting.describe(daemon),
        ranks=ranks,
    )


def _state(daemon: Daemon, members: str) -> tuple[StateName, str]:
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
