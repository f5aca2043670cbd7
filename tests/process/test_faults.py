"""The failure table of the design, row by row, on a whole server without vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.faults import FULL_SHM, LOSSY, Fault
from tests.support.link import Link
from tests.support.link import why_not as link_missing
from tests.support.node import Node, node, suffer

pytestmark = [pytest.mark.processes, pytest.mark.faults, pytest.mark.timeout(300)]

FAULTS = [
    Fault("kill", "trainer", "mid_bucket"),
    Fault("kill", "trainer", "mid_bucket", which=1),
    Fault("kill", "trainer", "staged"),
    Fault("kill", "updater", "mid_bucket"),
    Fault("kill", "daemon", "staged"),
    Fault("kill", "updater", "mid_bucket", which=1),
    Fault("stop", "trainer", "mid_bucket"),
    Fault("stop", "trainer", "mid_bucket", which=1),
    Fault("stop", "updater", "mid_bucket"),
    Fault("stop", "engine", "staged"),
    Fault("drop", at="before_begin"),
    Fault("duplicate", at="before_begin"),
    Fault("duplicate", at="staged"),
    Fault("reorder", at="before_begin"),
    Fault("reorder", at="mid_bucket"),
    Fault("reorder", at="staged"),
    Fault("reorder", at="committed"),
    Fault("stale", at="committed"),
    Fault("other_version", at="before_begin"),
    Fault("other_version", at="mid_bucket"),
    Fault("other_version", at="staged"),
    Fault("other_version", at="committed"),
    Fault("drop", at="committed"),
    Fault("corrupt", at="mid_bucket"),
    Fault("corrupt_bucket", at="mid_bucket"),
    Fault("other_plan", at="before_begin"),
    Fault("delay", at="staged"),
    Fault("stop", "launcher", "mid_bucket"),
    Fault("term", "trainer", "mid_bucket"),
    Fault("term", "daemon", "mid_bucket"),
    Fault("term", "daemon", "committed"),
    Fault("term", "launcher", "mid_bucket"),
    Fault("term", "launcher", "committed"),
    Fault("term", "api", "mid_bucket"),
    Fault("term", "engine", "staged"),
    Fault("kill", "worker", "mid_bucket", which=1),
    Fault("kill", "api", "staged"),
    Fault("kill", "launcher", "mid_bucket"),
]
SHM_FAULTS = [Fault(FULL_SHM, "updater", "mid_bucket"), Fault(FULL_SHM, "daemon", "staged")]
LINK_FAULTS = [Fault(what, at="before_begin") for what in ("cut", "slow link", "lossy link")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("node")
    with node(directory, deadline_s=3.0, flags=["--transport=gloo"], trainers=2) as made:
        yield made


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A server in whose /dev/shm there is little room."""
    if os.geteuid() != 0:
        pytest.skip("a /dev/shm of one server's own needs root")
    flags = ["--transport=gloo"]
    with node(tmp_path_factory.mktemp("crowded"), deadline_s=3.0, flags=flags, own_shm=True) as made:
        yield made


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A server whose trainer lives behind a link."""
    if reason := link_missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("far")
    with Link(directory) as link:
        flags = ["--transport=gloo", f"--rendezvous-host={link.here}"]
        with node(directory, deadline_s=3.0, flags=flags, link=link) as made:
            yield made


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_nothing_is_lost_by(server: Node, fault: Fault) -> None:
    suffer(server, fault, seed=100 * (1 + FAULTS.index(fault)))


@pytest.mark.parametrize("fault", LINK_FAULTS, ids=str)
def test_nothing_is_lost_by_the_network(far: Node, fault: Fault) -> None:
    outcome = suffer(far, fault, seed=100 * (1 + LINK_FAULTS.index(fault)))
    if fault.what == "slow link":
        assert outcome.answers == ["receipt"], outcome
    if fault.what in LOSSY:
        assert outcome.lost, outcome


@pytest.mark.parametrize("fault", SHM_FAULTS, ids=str)
def test_nothing_is_lost_by_a_full_shm(crowded: Node, fault: Fault) -> None:
    outcome = suffer(crowded, fault, seed=100 * (1 + SHM_FAULTS.index(fault)))
    assert "receipt" not in outcome.answers, outcome
