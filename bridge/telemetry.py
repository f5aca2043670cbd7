"""Logging, set up once per process by whoever owns the process, never at import.

A line reads ``INFO 12:34:56 [bridge trainer rank 1 pid 42] message``. The package only ever asks for loggers
by module name; trainers that configure logging themselves see the same records.
"""

from __future__ import annotations

import logging
import os
import sys

ROOTS = ("bridge", "vllm_patching", "launch")


def configure(*, role: str, rank: int | None = None, level: str | None = None) -> None:
    """Send the bridge's records to stderr with the process's role and rank; idempotent.

    Args:
        role: what this process is: daemon, updater, vllm, trainer.
        rank: its rank in that role, if it has one.
        level: a logging level's name; default ``BRIDGE_LOG_LEVEL`` or INFO.
    """
    who = role if rank is None else f"{role} rank {rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(levelname)s %(asctime)s [bridge {who} pid {os.getpid()}] %(message)s", datefmt="%H:%M:%S"
        )
    )
    for name in ROOTS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level or os.environ.get("BRIDGE_LOG_LEVEL", "INFO"))
        logger.propagate = False
