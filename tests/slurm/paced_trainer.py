"""examples/requeued_trainer.py, paced so that a test can look on.

    PACE_DIR=DIRECTORY [STEP_BY_STEP=1] [MORE_STEPS=N] paced_trainer.py MODEL STATE STEPS

With STEP_BY_STEP it makes DIRECTORY/pausedA.N after the N steps that attempt A of the job has made so far,
and waits until it is asked to stop, or DIRECTORY/goA.N exists. With MORE_STEPS a later attempt makes so many.
When all steps are done, the servers are kept until DIRECTORY/release exists. A rank that ends since it was
asked to stop makes DIRECTORY/stoppedRANK. Faults happen that are armed in BRIDGE_TEST_FAULTS.
"""

import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

import bridge
from bridge import environment
from tests.support import faults
from tests.support.serving import REPO, wait_until

TIMEOUT_S = 600.0
DIRECTORY = Path(os.environ["PACE_DIR"])
STEP_BY_STEP = "STEP_BY_STEP" in os.environ
calls = 0
ask = bridge.should_stop


def paced() -> bool:
    global calls
    if STEP_BY_STEP:
        which = f"{os.environ['JOB_EPOCH']}.{calls}"
        if dist.get_rank() == 0:
            (DIRECTORY / f"paused{which}").touch()
        go = DIRECTORY / f"go{which}"
        wait_until("a sign", lambda: environment.stop_requested() or go.exists(), timeout_s=TIMEOUT_S)
    calls += 1
    return ask()


bridge.should_stop = paced
faults.install("trainer")
if os.environ["JOB_EPOCH"] != "0" and (more := os.environ.get("MORE_STEPS")):
    sys.argv[3] = str(int(Path(sys.argv[2], "latest").read_text()) + int(more))
try:
    runpy.run_path(str(REPO / "examples" / "requeued_trainer.py"), run_name="__main__")
except SystemExit as end:
    if end.code == 0:
        if os.environ["RANK"] == "0":
            (DIRECTORY / "done").touch()
        wait_until("being released", (DIRECTORY / "release").exists, timeout_s=TIMEOUT_S)
    elif end.code == 75:
        (DIRECTORY / f"stopped{os.environ['RANK']}").touch()
    sys.exit(end.code)
