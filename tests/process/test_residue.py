"""Ending a tree that does not want to end, so that it leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import alive, wait_until
from vllm_patching import residue

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

# An orphan like vLLM's behind a launcher that was killed, in a session of its own.
STUBBORN = """
import multiprocessing, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = multiprocessing.get_context("spawn").Semaphore()
print(os.getpid(), held._semlock.name, flush=True)
signal.pause()
"""
ENDING = """
import sys
from vllm_patching import residue
print(residue.end_processes([int(sys.argv[1])], timeout_s=0.2))
"""


def test_what_a_killed_process_named_is_unlinked_by_its_tracker() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            pid, name = process.stdout.readline().split()
            path = Path(residue.SHM_DIR, f"sem.{name.removeprefix('/')}")
            assert path.exists()
            assert path in residue.snapshot([process.pid]), "its maker maps it under another name"
            wait_until(
                "its tracker",
                lambda: [residue.is_tracker(p) for p in residue.descendants(process.pid)] == [True],
                timeout_s=20,
            )
            (tracker,) = residue.descendants(process.pid)
            assert not residue.is_tracker(process.pid)
            # By somebody else's process: nobody ends his own children so.
            ended = subprocess.run(
                [sys.executable, "-c", ENDING, pid], capture_output=True, text=True, check=True, timeout=60
            )
            assert ended.stdout.strip() == f"[{pid}]", ended.stderr
            assert process.wait(20) == -signal.SIGKILL
        finally:
            process.kill()  # or leaving the block would wait for it
    wait_until("the tracker's end", lambda: not alive(tracker), timeout_s=20)
    assert not path.exists()
