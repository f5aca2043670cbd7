"""The helper says what SLURM itself says, from whichever source."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import msgspec
import pytest

from bridge import nodes
from bridge.nodes import Shape
from tests.slurm.cluster import Cluster
from tests.support.serving import REPO, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
JOB_TIMEOUT_S = 60.0
# Options of sbatch by component, and whether the variables alone can tell the GPUs.
JOBS = {
    "bare": ([["--nodes=3"]], True),
    "gpus": ([["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4"]], True),
    "gres": ([["--nodes=4", "--gres=gpu:1"]], True),
    "total": ([["--nodes=2", "--gpus=3", "--ntasks=3"]], False),
    "het": (
        [["--nodes=1", "--gpus-per-node=1"], ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3"]],
        True,
    ),
}
ASK = """#!/bin/bash
cd "$REPO" && exec "$PYTHON" -c '
import sys, msgspec
from bridge import nodes
for name in sys.argv[1:]:
    print(name, msgspec.json.encode(getattr(nodes, "from_" + name)()).decode(), flush=True)
' "$@"
"""


def random_nodelist(rng: random.Random) -> str:
    def ranges() -> str:
        width = rng.choice([1, 2, 3])
        found = []
        for _ in range(rng.randint(1, 3)):
            first = rng.randint(0, 10**width - 3)
            last = min(first + rng.randint(0, 3), 10**width - 1)
            found.append(f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else ""))
        return f"[{','.join(found)}]"

    def part() -> str:
        name = rng.choice(["gpu", "n-", "rack1node", "a100"])
        return name + rng.choice(["", "7", "03", ranges(), ranges(), f"{ranges()}-{ranges()}"])

    return ",".join(part() for _ in range(rng.randint(1, 3)))


def test_nodelists_expand_as_scontrol_expands_them(cluster: Cluster) -> None:
    rng = random.Random(0)
    for text in (random_nodelist(rng) for _ in range(200)):
        assert nodes.expand_nodelist(text) == cluster.call("scontrol", "show", "hostnames", text).split(), (
            text
        )


@pytest.mark.parametrize(
    "other",
    [
        "variables",
        pytest.param(
            "pyslurm",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("pyslurm") is None,
                reason="pyslurm is not installed: it has to be built against the cluster's very SLURM",
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", JOBS)
def test_another_source_tells_the_same_as_scontrol(
    cluster: Cluster, tmp_path: Path, name: str, other: str
) -> None:
    components, told = JOBS[name]
    script = tmp_path / "ask.sh"
    script.write_text(ASK)
    options = [option for number, one in enumerate(components) for option in [":"] * (number > 0) + one]
    output, env = tmp_path / "out", {"REPO": str(REPO), "PYTHON": sys.executable}
    words = ["sbatch", "--parsable", f"--output={output}", *options, str(script), "scontrol", other]
    job = cluster.call(*words, **env).strip()
    wait_until(
        f"job {job} to end (output {output})",
        lambda: "JobState=COMPLETED" in cluster.call("scontrol", "show", "job", job),
        timeout_s=JOB_TIMEOUT_S,
    )
    shape, found = (
        msgspec.json.decode(line.partition(" ")[2], type=Shape) for line in output.read_text().splitlines()
    )
    assert shape.job_id == int(job)
    sizes = [len(part.hosts) for part in shape.components]
    assert sizes == [int(one[0].removeprefix("--nodes=")) for one in components]
    if other == "variables" and not told:
        assert [sum(part.gpus or ()) for part in shape.components] == [3]
        unknown = tuple(msgspec.structs.replace(part, gpus=None) for part in shape.components)
        shape = msgspec.structs.replace(shape, components=unknown)
    assert found == shape
