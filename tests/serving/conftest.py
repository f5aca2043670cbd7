"""What a fresh vLLM answers, asked once for all modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.checks import SINGLE, answers, edited
from tests.support.serving import UNBOUND, serving_together


@pytest.fixture(scope="session")
def fresh_qwen3(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three sets of float32 weights (the third: the second, one parameter edited), and their answers."""
    root = tmp_path_factory.mktemp("fresh")
    sets = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    sets.append(edited(sets[1], root / "edited", SINGLE, 0.01))
    options = {"bridge": False, "flags": ["--dtype=float32"], "env": UNBOUND}
    with serving_together(*((path, root / str(i), dict(options)) for i, path in enumerate(sets))) as servers:
        found = [answers(server.api) for server in servers]
    assert found[0] != found[1]
    assert found[1] != found[2]
    return SimpleNamespace(sets=sets, answers=found)
