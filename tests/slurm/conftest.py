"""One cluster for all modules."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


# Before any module begins, whichever test asks for it: a module may leave nothing behind that came during it.
@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Four nodes that nobody breaks."""
    yield from running()


@pytest.fixture
def breakable() -> Iterator[Cluster]:
    """Four nodes of one test's own."""
    yield from running()


def running() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no SLURM here: {reason}")
    root = Path(tempfile.mkdtemp(prefix="vbs-"))  # short, as sockets will be below
    made = Cluster(root)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(root)
