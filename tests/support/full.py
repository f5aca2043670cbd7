"""Cases that take minutes and have nearer relatives in their rung: skipped loudly until asked for."""

from __future__ import annotations

import os

import pytest


def in_full(rung: str) -> bool:
    """Whether a rung is to run with its long cases: ``BRIDGE_TEST_SLURM=full`` for the one called slurm."""
    return os.environ.get(_variable(rung)) == "full"


def only_in_full(rung: str) -> pytest.MarkDecorator:
    """A test that takes minutes."""
    return pytest.mark.skipif(not in_full(rung), reason=f"takes minutes; {_variable(rung)}=full")


def _variable(rung: str) -> str:
    return f"BRIDGE_TEST_{rung.upper()}"
