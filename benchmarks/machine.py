"""What a result was measured on, as every result's file says it."""

from __future__ import annotations

import os
from pathlib import Path


def machine() -> str:
    """The processor's name and the number of cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} cores"
