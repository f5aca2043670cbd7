"""The HTTP fallback's whole round: a version staged by the updaters from a file, then committed."""

from __future__ import annotations

import logging
import queue
import time
from typing import TYPE_CHECKING, Any

import msgspec

from bridge import telemetry
from bridge.errors import BridgeError, ConfigError, TransferError
from bridge.protocol.messages import MAX_VERSION
from vllm_patching import update_files
from vllm_patching.crew import Crew, Report
from vllm_patching.events import Notified
from vllm_patching.status import LastRound

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon

logger = logging.getLogger(__name__)

STAGE_FILE_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 60.0  # updaters that were just started import torch


def stage_file(daemon: Daemon, event: Notified) -> dict[str, Any]:
    """Stage a version from a file and commit it; the HTTP fallback's whole round."""
    try:
        version = _check_notification(daemon, event)
        assert daemon.crew is not None
        assert daemon.swap is not None
        start = time.monotonic()
        daemon.crew.wait_all(timeout_s=READY_TIMEOUT_S)
        orders = daemon.swap.orders()
        daemon.filing = True
        telemetry.stand(epoch=None, version=version)
        try:
            order = {"type": "stage_file", "path": event.path, "below": str(daemon.args.update_dir)}
            daemon.crew.order({**order, "version": version}, orders)
            reports = _await_reports(daemon, daemon.crew, version)
        except TransferError as err:
            daemon.new_crew()  # a late report, or a write under way, must never meet the next round
            daemon.swap.abandon(str(err))
            raise
        try:
            flips = daemon.swap.commit(version)
        except TransferError as err:
            daemon.new_crew()  # updaters that begin anew take nothing for granted of the half they filled
            daemon.swap.abandon(str(err))  # in place, a version that is whole is committed again
            raise
    except BridgeError as err:
        torn = daemon.swap.torn if daemon.swap is not None else ""
        error = f"{err}; {torn}" if torn else str(err)
        daemon.aborted += 1
        daemon.last_error = error
        logger.error("update from %s: %s", event.path, error)
        return {"type": "update_result", "ok": False, "version": daemon.live_version, "error": error}
    finally:
        if daemon.filing:
            daemon.filing = False
            telemetry.stand(epoch=None, version=daemon.version)
    daemon.borrowing.satisfied()
    daemon.committed += 1
    daemon.last_round = LastRound(
        version=version,
        bytes=sum(r["bytes"] for r in reports),
        transfer_s=max(r["seconds"] for r in reports),
        stage_s=time.monotonic() - start,
        flip_s=max(flips) / 1e9,
        transport="file",
    )
    made = msgspec.to_builtins(daemon.last_round)
    logger.info("version %d is live: %s", version, made)
    return {"type": "update_result", "ok": True, "version": version, "error": "", "round": made}


def _check_notification(daemon: Daemon, event: Notified) -> int:
    if not daemon.published or not daemon.registry.complete:
        raise ConfigError("the server is not complete yet")
    if daemon.epoch is not None:
        raise ConfigError(
            f"a trainer is connected by process group ({daemon.epoch.trainer}); it must use broadcast_weights"
        )
    update_files.find(event.path, daemon.args.update_dir)
    version = daemon.version + 1 if event.version is None else event.version
    if version <= daemon.version:
        raise ConfigError(f"version {version} offered, version {daemon.version} is served already")
    if version > MAX_VERSION:
        raise ConfigError(f"version {version} does not fit a signed 64-bit word")
    return version


def _await_reports(daemon: Daemon, crew: Crew, version: int) -> list[dict[str, Any]]:
    """Collect one report per rank, and give leave to write in between; other events wait their turn."""
    assert daemon.swap is not None
    reports: dict[int, dict[str, Any]] = {}
    poised: set[int] = set()
    errors: list[str] = []
    kept: list[Any] = []
    deadline = time.monotonic() + STAGE_FILE_TIMEOUT_S
    try:
        # Who waits for leave will not report once another rank has failed: nobody gets it then.
        while len(reports) + len(errors) + (len(poised) if errors else 0) < crew.num_ranks:
            event = daemon.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if not (isinstance(event, Report) and event.crew is crew):
                kept.append(event)
            elif event.message is None:
                errors.append(f"{crew.describe(event.rank)} died")
            elif event.message["type"] == "failed":
                errors.append(event.message["error"])
            elif event.message["type"] == "poised":
                poised.add(event.rank)
                if len(poised) == crew.num_ranks:
                    daemon.swap.hold()
                    crew.post("held")  # behind the news of whoever has died meanwhile
            elif event.message["type"] == "held":
                daemon.swap.begin(version)
                crew.order({"type": "write"})
                poised.clear()
            else:
                reports[event.rank] = event.message
    except queue.Empty:
        raise TransferError(f"updaters did not stage within {STAGE_FILE_TIMEOUT_S:g} s") from None
    finally:
        for event in kept:
            daemon.events.put(event)
    if errors:
        raise TransferError("\n".join(dict.fromkeys(errors)))
    return list(reports.values())
