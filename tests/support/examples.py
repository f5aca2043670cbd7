"""Examples, run as their first lines say."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.serving import REPO, Server, environment

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
EXAMPLE_TIMEOUT_S = 180


def _run(launcher: list[str], server: Server, name: str, *words: str, **env: str) -> str:
    """What it printed; it must end by itself, and well."""
    # SIGTERM to a launcher ends its ranks too.
    command = ["timeout", "--kill-after=10", str(EXAMPLE_TIMEOUT_S), *launcher, str(REPO / "examples" / name)]
    done = subprocess.run(
        [*command, str(server.model), *words],
        env=environment(OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def torchrun(server: Server, name: str, *words: str) -> str:
    """What an example printed on two ranks."""
    return _run(TORCHRUN, server, name, *words, BRIDGE_LOGDIR=str(server.logdir))


def ray(server: Server, name: str, *words: str) -> str:
    """What an example printed that starts Ray itself."""
    # A session's sockets and logs: their paths must be short, and they are to be gone afterwards.
    with tempfile.TemporaryDirectory(prefix="ray-") as tmp:
        off = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        words = ("--logdir", str(server.logdir), *words)
        return _run([sys.executable], server, name, *words, RAY_TMPDIR=tmp, **off)


def says(server: Server, prompt: str, length: int) -> str:
    """What the server generates after ``prompt``, greedily."""
    (choice,) = server.api.complete(prompt, max_tokens=length, temperature=0.0, ignore_eos=True)
    return str(choice["text"])


def versions_of(output: str) -> list[int]:
    """Of the receipts that were printed."""
    return [int(version) for version in re.findall(r"version (\d+) live after", output)]


def sent_by(output: str) -> dict[str, int]:
    """Bytes by encoding, as sparse_rows.py prints them."""
    found = re.findall(r"^(\w+): version .* ([\d,]+) bytes by", output, re.MULTILINE)
    return {encoding: int(count.replace(",", "")) for encoding, count in found}
