"""System calls by the C library are those of Python's own module, where it has them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_patching import linux


@pytest.fixture(params=["as built", "as conda builds it"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as built":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.delattr(os, "memfd_create")


@pytest.mark.usefixtures("python")
def test_a_process_is_waited_for_that_may_be_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        fd = linux.pidfd_open(child.pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(0) == []
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.close()
        assert poll.poll(10_000) == [(fd, select.POLLIN)]
        assert not os.get_inheritable(fd)
        os.close(fd)
    with pytest.raises(ProcessLookupError):
        linux.pidfd_open(child.pid)


@pytest.mark.usefixtures("python")
def test_a_file_in_memory() -> None:
    fd = linux.memfd_create("some", linux.MFD_CLOEXEC | linux.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "/memfd:some (deleted)"
    assert os.fstat(fd).st_size == 4096
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_the_flags_are_linuxs() -> None:
    assert (linux.MFD_CLOEXEC, linux.MFD_ALLOW_SEALING) == (os.MFD_CLOEXEC, os.MFD_ALLOW_SEALING)
