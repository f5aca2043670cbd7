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

Standing = tuple[int | None, int | None]  # an epoch, and the version served or wanted
_of_process: Standing = (None, None)
_of_thread: contextvars.ContextVar[Standing | None] = contextvars.ContextVar("bridge_standing", default=None)


def stand(*, epoch: int | None, version: int | None) -> None:
    """What this process's records are about from now on, whichever of its threads they come from.

    For a process that serves one server: its daemon, an updater, a worker, an engine core. None is for what
    the process does not know.
    """
    global _of_process
    _of_process = epoch, version


def stand_in_thread(*, epoch: int | None, version: int | None) -> None:
    """The same for this thread only: a trainer has one for each server, at versions that differ."""
    _of_thread.set((epoch, version))


def _standing() -> Standing:
    return _of_thread.get() or _of_process


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(asctime)s [bridge %(who)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        role, rank = flight.who()
        epoch, version = _standing()
        who = role if rank is None else f"{role} rank {rank}"
        who += f" pid {os.getpid()}"
        who += "" if epoch is None else f" epoch {epoch}"
        who += "" if version is None else f" version {version}"
        record.__dict__["who"] = who
        return super().format(record)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        role, rank = flight.who()
        epoch, version = _standing()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "role": role,
            "rank": rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
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

    An exception that ends the process, or one of its threads, leaves a flight record. A process that learns
    later what it is, or which, says so by ``flight.name_process``.

    Args:
        role: what this process is: daemon, updater, api, trainer and others, listed in docs/operations.md.
        rank: its rank in that role, if it has one.
        level: a logging level's name; default ``BRIDGE_LOG_LEVEL`` or INFO.

    Raises:
        ConfigError: ``BRIDGE_LOG_FORMAT`` is neither text nor json.
    """
    wanted = os.environ.get("BRIDGE_LOG_FORMAT") or FORMATS[0]
    if wanted not in FORMATS:
        raise ConfigError(f"BRIDGE_LOG_FORMAT is {wanted!r}; it is one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if wanted == "json" else _Text())
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
