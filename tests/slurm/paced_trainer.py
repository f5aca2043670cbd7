"""examples/requeued_trainer.py, paced so that a test can look on.

    PACE_DIR=DIRECTORY [PAUSE_AT=N | STEP_BY_STEP=1] torchrun ... paced_trainer.py MODEL STATE STEPS

In a job's first attempt it waits after PAUSE_AT steps until it is asked to stop, or DIRECTORY/go exists; with
STEP_BY_STEP after each number N of steps, for DIRECTORY/goN. When all steps are done, the servers are kept
until DIRECTORY/release exists.
"""

import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

import bridge
from bridge import environment
from tests.support.serving import REPO, wait_until

TIMEOUT_S = 600.0
DIRECTORY = Path(os.environ["PACE_DIR"])
PAUSE_AT = int(os.environ.get("PAUSE_AT", "-1"))
STEP_BY_STEP = "STEP_BY_STEP" in os.environ
calls = 0
ask = bridge.should_stop


def paced() -> bool:
    global calls
    if (STEP_BY_STEP or calls == PAUSE_AT) and os.environ["JOB_EPOCH"] == "0":
        which = str(calls) if STEP_BY_STEP else ""
        if dist.get_rank() == 0:
            (DIRECTORY / f"paused{which}").touch()
        go = DIRECTORY / f"go{which}"
        wait_until("a sign", lambda: environment.stop_requested() or go.exists(), timeout_s=TIMEOUT_S)
    calls += 1
    return ask()


bridge.should_stop = paced
try:
    runpy.run_path(str(REPO / "examples" / "requeued_trainer.py"), run_name="__main__")
except SystemExit as end:
    if end.code == 0:
        if os.environ["RANK"] == "0":
            (DIRECTORY / "done").touch()
        wait_until("being released", (DIRECTORY / "release").exists, timeout_s=TIMEOUT_S)
    sys.exit(end.code)
