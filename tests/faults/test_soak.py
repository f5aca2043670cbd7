"""Five minutes of what ``tests.faults.soak`` does for hours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.faults.soak import ANSWER_S, KEEPER, RECOVER_S, grown, growth, left_behind, soak, started
from tests.support.serving import alive, wait_until
from vllm_patching import residue

pytestmark = [pytest.mark.faults, pytest.mark.serving, pytest.mark.timeout(1500)]

SEED = 15  # its first five faults hit both servers and the trainer; one starts vLLM again, the longest wait
LEAST_FAULTS = 5
LEAST_SAMPLES = 5  # of a process whose growth is looked at: two early, two late and its first


def test_five_minutes_with_a_fault_every_twenty_seconds(tmp_path: Path, runtime_dir: Path) -> None:
    shm_before, runs_before = set(residue.SHM_DIR.iterdir()), set(runtime_dir.iterdir())
    with started(tmp_path, SEED) as made:
        rows = soak(
            made, minutes=5, every_s=20, publish_every_s=1, least_faults=LEAST_FAULTS,
            say=lambda row: print(json.dumps(row), file=sys.stderr),
        )  # fmt: skip
        everybody = [pid for server in made.servers for pid in (server.process.pid, *server.pids())]
    assert len(rows) >= LEAST_FAULTS
    assert {row["server"] for row in rows} >= {0, 1}
    assert made.late <= 1
    assert max(row["recovered_s"] for row in rows) < RECOVER_S
    kept = made.loads[KEEPER]
    assert kept.failed == 0, kept.errors
    assert kept.longest_s < ANSWER_S
    assert kept.answered * kept.longest_s > 60 * rows[-1]["minute"], "it was to be asked all the time"
    held_by = growth(made.samples, least=LEAST_SAMPLES)
    assert {held["who"] for held in held_by} >= {
        f"server {KEEPER} {role}" for role in ("daemon", "engines", "workers", "launcher", "api")
    }
    assert grown(held_by) == []
    wait_until("the end of everybody", lambda: not any(map(alive, everybody)), timeout_s=30)
    assert left_behind(shm_before) == []
    assert set(runtime_dir.iterdir()) <= runs_before
