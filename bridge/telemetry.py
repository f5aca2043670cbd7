"""Logging, set up once per process by whoever owns the process, never at import.

A line reads ``INFO 2026-11-30 12:34:56 [bridge trainer rank 1 pid 42 epoch 3 version 7] message``;
with ``BRIDGE_LOG_FORMAT=json`` it is one JSON object. The package only ever asks for loggers by module name;
trainers that configure logging themselves see the same records.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from bridge import flight
from bridge.errors import ConfigError

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

ROOTS = ("bridge", "vllm_patching", "launch")
FORMATS = ("text", "json")

# Of this thread: a trainer has one for each server, and they are at different versions.
_standing: contextvars.ContextVar[tuple[int | None, int | None]] = contextvars.ContextVar(
    "bridge_standing", default=(None, None)
)


def stand(*, epoch: int | None, version: int | None) -> None:
    """What this thread's records are about from now on: an epoch, and the version served or wanted."""
    _standing.set((epoch, version))


class _Text(logging.Formatter):
    def __init__(self, who: str) -> None:
        super().__init__(
            "%(levelname)s %(asctime)s [bridge %(who)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
        )
        self._who = f"{who} pid {os.getpid()}"

    def format(self, record: logging.LogRecord) -> str:
        epoch, version = _standing.get()
        about = "" if epoch is None else f" epoch {epoch}"
        about += "" if version is None else f" version {version}"
        record.__dict__["who"] = self._who + about
        return super().format(record)


class _Json(logging.Formatter):
    def __init__(self, role: str, rank: int | None) -> None:
        super().__init__()
        self._fixed = {"role": role, "rank": rank, "pid": os.getpid(), "host": socket.gethostname()}

    def format(self, record: logging.LogRecord) -> str:
        epoch, version = _standing.get()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            **self._fixed,
            "epoch": epoch,
            "version": version,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(*, role: str, rank: int | None = None, level: str | None = None) -> None:
    """Send the bridge's records to stderr with the process's role and rank; idempotent.

    An exception that ends the process, or one of its threads, leaves a flight record.

    Args:
        role: what this process is: daemon, updater, vllm, trainer.
        rank: its rank in that role, if it has one.
        level: a logging level's name; default ``BRIDGE_LOG_LEVEL`` or INFO.

    Raises:
        ConfigError: ``BRIDGE_LOG_FORMAT`` is neither text nor json.
    """
    wanted = os.environ.get("BRIDGE_LOG_FORMAT") or FORMATS[0]
    if wanted not in FORMATS:
        raise ConfigError(f"BRIDGE_LOG_FORMAT is {wanted!r}; it is one of {', '.join(FORMATS)}")
    who = role if rank is None else f"{role} rank {rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(role, rank) if wanted == "json" else _Text(who))
    for name in ROOTS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level or os.environ.get("BRIDGE_LOG_LEVEL", "INFO"))
        logger.propagate = False
    flight.name_process(role, rank)
    sys.excepthook = _Last(sys.excepthook)
    threading.excepthook = _last_of_thread


class _Last:
    """Writes the flight record of a process that an exception ends; what was there before does the rest."""

    def __init__(self, before: Hook | _Last) -> None:
        self._before: Hook = before._before if isinstance(before, _Last) else before

    def __call__(self, kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            flight.note("ends", error=f"{kind.__name__}: {err}")
            flight.write(f"the process ended by {kind.__name__}: {err}")
        self._before(kind, err, trace)


def _last_of_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "a thread"
    flight.note("thread ends", name=name, error=f"{args.exc_type.__name__}: {args.exc_value}")
    flight.write(f"{name} ended by {args.exc_type.__name__}: {args.exc_value}")
    threading.__excepthook__(args)
