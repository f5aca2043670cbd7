"""What every rung shares: nothing may be left behind by a module, and a skip is never silent."""

from __future__ import annotations

import ctypes
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

from tests.support.models import build_checkpoint
from vllm_patching import residue

PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
SETTLE_S = 5.0


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """Run directories of every launcher that a test starts go here, so that one left over is surely ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Orphans of a killed launcher become our children instead of init's: they cannot hide from the check.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A /dev/shm of our own where we may have one: what is left there was certainly left by these tests.
    if libc.unshare(CLONE_NEWNS) == 0:
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777")
    directory = Path(tempfile.mkdtemp(prefix="vbt-"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(directory)


def _children() -> dict[int, str]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline()) or process.name()
            # multiprocessing's own helpers live as long as the interpreter that they belong to.
            helper = any(f"multiprocessing.{name}" in command for name in ("resource_tracker", "forkserver"))
            if process.status() != psutil.STATUS_ZOMBIE and not helper:
                found[process.pid] = command
        except psutil.NoSuchProcess:
            continue
    return found


def _shared_memory() -> set[Path]:
    return set(residue.SHM_DIR.iterdir()) if residue.SHM_DIR.is_dir() else set()


def _leaks(children: set[int], threads: set[threading.Thread], shm: set[Path], runtime: Path) -> list[str]:
    leaks = [f"process {pid}: {what[:200]}" for pid, what in _children().items() if pid not in children]
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
    before = (set(_children()), set(threading.enumerate()), _shared_memory())
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the very end, in red, how much was not tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_sep(
            "!", f"{len(skipped)} SKIPPED: what they cover was NOT tested here", red=True
        )
