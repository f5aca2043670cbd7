"""A flight record: the last events of this process, kept in memory and written down when it ends badly.

An event is what passed a border: a frame sent or received, an order, a report, a change of state. Never the
contents of a tensor, and never a secret. Keeping one costs an append.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KEPT = 512
MAX_CHARS = 200  # of any one text in an event

_events: deque[tuple[int, str, str, dict[str, Any]]] = deque(maxlen=KEPT)
_who: tuple[str, int | None] = ("trainer", None)  # whoever configures nothing is a trainer
_lock = threading.Lock()


def name_process(role: str, rank: int | None) -> None:
    """What the record's file is called after, and what every line of the log says."""
    global _who
    _who = role, rank


def who() -> tuple[str, int | None]:
    """This process's role, and its rank in that role if it has one."""
    role, rank = _who
    if role == "trainer" and rank is None and os.environ.get("RANK", "").isdecimal():
        rank = int(os.environ["RANK"])
    return role, rank


def note(kind: str, **fields: Any) -> None:
    """Keep one event; ``fields`` are numbers and short texts."""
    _events.append((time.monotonic_ns(), threading.current_thread().name, kind, fields))


def events() -> list[dict[str, Any]]:
    """What is kept, oldest first; ``at`` is wall-clock time, ``monotonic_s`` for comparing on one host."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return [
        {
            "at": _wall(when + offset_ns),
            "monotonic_s": when / 1e9,
            "thread": thread,
            "event": kind,
            **{key: _short(value) for key, value in fields.items()},
        }
        for when, thread, kind, fields in list(_events)
    ]


def _wall(ns: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(ns // 10**9))}.{ns % 10**9 // 1000:06d}Z"


def _short(value: Any) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}.."


def write(why: str, directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Write the record down as JSON lines, the newest of this process over the one before.

    Never raises: whatever is under way is failing already.

    Args:
        why: what happened.
        directory: default is ``BRIDGE_LOGDIR`` or ``LOGDIR``; without one nothing is written.

    Returns:
        Where it is; None if it could not be written, which is logged.
    """
    where = directory or os.environ.get("BRIDGE_LOGDIR") or os.environ.get("LOGDIR")
    if not where:
        return None
    role, rank = who()
    host, parts = socket.gethostname(), [] if rank is None else [str(rank)]
    if role in ("trainer", "lender"):  # they share the directory from many hosts
        parts.append(host)
    if role not in ("updater", "lender"):  # those come anew in each epoch or loan: the newest record is kept
        parts.append(str(os.getpid()))
    name = "-".join(["flight", role, *parts])
    path = Path(where, f"{name}.jsonl")
    head = {
        "role": role,
        "rank": rank,
        "pid": os.getpid(),
        "host": host,
        "at": _wall(time.time_ns()),
        "why": why,
    }
    text = "".join(json.dumps(line) + "\n" for line in (head, *events()))
    partial = path.with_suffix(".partial")
    try:
        with _lock:
            partial.unlink(missing_ok=True)  # whose mode may be another
            partial.touch(mode=0o600, exist_ok=False)
            partial.write_text(text)
            partial.replace(path)
    except OSError as err:
        logger.warning("the flight record could not be written to %s: %s", path, err)
        return None
    return path
