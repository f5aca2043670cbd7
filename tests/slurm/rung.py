"""All tests of this rung, the long ones too; a file says what they found: outcome, seconds, figures of each.

python -m tests.slurm.rung --out slurm.json [any of pytest's arguments]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import machine
from tests.slurm.cluster import PATH


class Found:
    """A plugin of pytest that keeps a row for each test."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # what goes well before and behind a test is no news
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.rows.append({**row, **dict(report.user_properties)})


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.slurm.rung")
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args()
    os.environ["BRIDGE_TEST_SLURM"] = "full"
    version = subprocess.run(
        ["slurmctld", "-V"], env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=True
    )
    found = Found()
    code = pytest.main([str(Path(__file__).parent), *rest], plugins=[found])
    document = {
        "command": f"python -m tests.slurm.rung {' '.join(sys.argv[1:])}",
        "machine": machine(),
        "slurm": version.stdout.strip(),
        "tests": found.rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
