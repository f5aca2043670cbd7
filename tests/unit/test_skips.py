"""On CI a skip for another reason than the known ones is a failure; elsewhere no skip is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import ROOT
from tests.support.skips import VARIABLE

ALLOWED = """
import pytest
from tests.support.full import only_in_full

@only_in_full("nothing")
def test_long(): ...

@pytest.mark.skip(reason="no CUDA device here")
def test_gpu(): ...

@pytest.mark.xfail
def test_fails(): assert False

def test_runs(): ...
"""
REFUSED = """
import pytest

@pytest.fixture
def cluster():
    pytest.skip("no SLURM here: slurmd missing")

def test_job(cluster): ...

@pytest.mark.parametrize("case", [])
def test_of_nothing(case): ...

def test_nearly(): pytest.skip("no CUDA device here, nor anywhere")
"""
MODULE = """
import pytest
pytest.importorskip("no_such_module")
"""


def run(directory: Path, *flags: str, strict: bool) -> subprocess.CompletedProcess[str]:
    """pytest on a directory with the conftest of all rungs."""
    shutil.copy(ROOT / "tests" / "conftest.py", directory)
    env = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: "1" if strict else ""}
    for name in [name for name in env if name.startswith("PYTEST_")]:  # of the worker that this runs in
        del env[name]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={directory}", *flags]
    return subprocess.run(
        [*command, str(directory)],
        env=env,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("lanes", [(), ("-n", "2")], ids=["one process", "two"])
def test_a_strict_session_fails_for_what_must_not_be_skipped(tmp_path: Path, lanes: tuple[str, ...]) -> None:
    for name, text in (("allowed", ALLOWED), ("refused", REFUSED), ("module", MODULE)):
        (tmp_path / f"test_{name}.py").write_text(text)
    done = run(tmp_path, *lanes, strict=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 SKIPPED" in done.stdout
    said = done.stdout.partition("4 of them FAIL")[2]
    assert "test_refused.py::test_job: no SLURM here: slurmd missing\n" in said
    assert "test_refused.py::test_of_nothing[NOTSET]: got empty parameter set" in said
    assert "test_refused.py::test_nearly: no CUDA device here, nor anywhere\n" in said
    assert "test_module.py: could not import 'no_such_module'" in said
    assert "test_allowed.py" not in said


def test_any_other_session_says_what_was_skipped_and_passes(tmp_path: Path) -> None:
    for name, text in (("refused", REFUSED), ("module", MODULE), ("allowed", ALLOWED)):
        (tmp_path / f"test_{name}.py").write_text(text)
    done = run(tmp_path, strict=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 SKIPPED" in done.stdout
    assert "FAIL" not in done.stdout


def test_a_strict_session_takes_what_is_known_to_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_allowed.py").write_text(ALLOWED)
    done = run(tmp_path, strict=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 SKIPPED" in done.stdout
    assert "FAIL" not in done.stdout


def test_a_strict_session_in_which_nothing_but_a_module_is_skipped_fails(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text(MODULE)
    done = run(tmp_path, strict=True)
    assert done.returncode == 1, done.stdout + done.stderr
