"""Tests that take minutes and have nearer relatives in the rung: skipped loudly unless all are asked for."""

from __future__ import annotations

import os

import pytest

whole_rung = pytest.mark.skipif(
    os.environ.get("BRIDGE_TEST_SERVING") != "full", reason="minutes long; BRIDGE_TEST_SERVING=full"
)
