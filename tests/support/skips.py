"""What was skipped is said at the very end; with BRIDGE_TEST_STRICT=1, as on CI, most of it is a failure.

There a rung that did not run, for want of SLURM or of a package, would look like one that passed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import pytest

VARIABLE = "BRIDGE_TEST_STRICT"
# Reasons that count nowhere as a failure, each whole. Whatever else a machine lacks, ``make setup`` and
# ``scripts/setup_slurm.sh`` install, or root has.
ALLOWED = (
    r"takes minutes; BRIDGE_TEST_[A-Z]+=full",  # tests.support.full: its nearer relatives have run
    r"no CUDA device here",  # tests/gpu
    r"one GPU here, these tests need two",
    r"pyslurm is not installed: .*",  # it must be built against the very SLURM; what it may say is fuzzed
    r"no IPv6 here|this host has no IPv6",  # as in many containers; IPv4 has run
)


def refused(reports: Iterable[pytest.CollectReport | pytest.TestReport]) -> Iterator[str]:
    """What was skipped for another reason, as ``where: reason``; a module that was not collected, too."""
    for report in reports:
        assert isinstance(report.longrepr, tuple), report
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.fullmatch(allowed, reason, re.DOTALL) for allowed in ALLOWED):
            yield f"{report.nodeid}: {reason}"


def _skipped(config: pytest.Config) -> list[pytest.CollectReport | pytest.TestReport]:
    """Of all processes: pytest-xdist's workers send theirs to the one that reports, and have no reporter."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return reporter.stats.get("skipped", []) if reporter is not None else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let it fail, if nothing else has."""
    passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if os.environ.get(VARIABLE) == "1" and passed and any(refused(_skipped(session.config))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say, in red, how much was not tested, and which of it may not be left out."""
    skipped = _skipped(terminalreporter.config)
    if not skipped:
        return
    terminalreporter.write_sep("!", f"{len(skipped)} SKIPPED: what they cover was NOT tested here", red=True)
    if os.environ.get(VARIABLE) == "1" and (faults := list(refused(skipped))):
        terminalreporter.write_sep("!", f"{len(faults)} of them FAIL, by {VARIABLE}=1", red=True)
        for fault in faults:
            terminalreporter.write_line(fault, red=True)
