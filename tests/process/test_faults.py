"""The failure table of the design, row by row, on a whole server without vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.faults import Fault
from tests.support.node import Node, node, suffer

pytestmark = [pytest.mark.processes, pytest.mark.faults, pytest.mark.timeout(300, method="signal")]

FAULTS = [
    Fault("kill", "trainer", "mid_bucket"),
    Fault("kill", "trainer", "committing"),
    Fault("kill", "updater", "mid_bucket"),
    Fault("kill", "daemon", "staged"),
    Fault("stop", "trainer", "mid_bucket"),
    Fault("stop", "updater", "mid_bucket"),
    Fault("stop", "engine", "before_commit"),
    Fault("drop", at="before_begin"),
    Fault("duplicate", at="before_begin"),
    Fault("duplicate", at="mid_bucket"),
    Fault("duplicate", at="before_commit"),
    Fault("reorder", at="mid_bucket"),
    Fault("stale", at="before_commit"),
    Fault("corrupt", at="mid_bucket"),
    Fault("corrupt_bucket", at="mid_bucket"),
    Fault("delay", at="staged"),
    Fault("kill", "worker", "mid_bucket"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), deadline_s=3.0, flags=["--transport=gloo"]) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_nothing_is_lost_by(server: Node, fault: Fault) -> None:
    suffer(server, fault, seed=100 * (1 + FAULTS.index(fault)))
