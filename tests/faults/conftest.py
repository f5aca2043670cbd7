"""Tiny checkpoints for the faults rung, each built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import build_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(kind, dtype, seed)``: the folder of a seeded random model."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(kind: str, dtype: str, seed: int) -> Path:
        path = root / f"{kind}-{dtype}-{seed}"
        return path if path.exists() else build_checkpoint(kind, path, dtype=dtype, seed=seed)

    return build
