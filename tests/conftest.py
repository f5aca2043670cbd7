"""What every rung shares: nothing may be left behind by a module, and a skip is never silent."""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.left import move_apart, offspring
from tests.support.models import build_checkpoint
from tests.support.skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks
from vllm_patching import residue

SETTLE_S = 30.0


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """Run directories of every launcher that a test starts go here, so that one left over is surely ours."""
    move_apart()
    directory = Path(tempfile.mkdtemp(prefix="vbt-"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(directory)


def _shared_memory() -> set[Path]:
    return set(residue.SHM_DIR.iterdir()) if residue.SHM_DIR.is_dir() else set()


def _leaks(children: set[int], threads: set[threading.Thread], shm: set[Path], runtime: Path) -> list[str]:
    leaks = [f"process {pid}: {what[:200]}" for pid, what in offspring().items() if pid not in children]
    new_threads = [t for t in threading.enumerate() if t not in threads and not t.daemon]
    leaks += [f"thread {t.name}" for t in new_threads if not t.name.startswith("pytest_timeout")]
    # Where /dev/shm is shared, files that a living process maps are another job's: none of ours lives any
    # more, or it is listed above.
    new = {path for path in _shared_memory() - shm if path.exists() and path.stat().st_uid == os.geteuid()}
    mapped = residue.snapshot(psutil.pids()) if new else set()
    leaks += [f"shared memory {path}" for path in sorted(new - mapped)]
    leaks += [f"run directory {path}: {[p.name for p in path.iterdir()]}" for path in runtime.iterdir()]
    return leaks


@pytest.fixture(scope="module", autouse=True)
def nothing_left(runtime_dir: Path) -> Iterator[None]:
    """No process, thread, shared-memory file or run directory outlives a module's fixtures."""
    before = (set(offspring()), set(threading.enumerate()), _shared_memory())
    yield
    deadline = time.monotonic() + SETTLE_S
    while (leaks := _leaks(*before, runtime_dir)) and time.monotonic() < deadline:
        select.select([], [], [], 0.1)  # the kernel takes a moment to reap; a leak stays
    assert not leaks, "left behind:\n  " + "\n  ".join(leaks)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(kind, dtype, seed)``: the folder of a seeded random model."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(kind: str, dtype: str, seed: int) -> Path:
        path = root / f"{kind}-{dtype}-{seed}"
        return path if path.exists() else build_checkpoint(kind, path, dtype=dtype, seed=seed)

    return build
