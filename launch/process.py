"""Starting and naming children. What ties their lives to the launcher's is decided by Linux, not by luck.

Every child leads its own session, so that a terminal's Ctrl-C reaches only the launcher, and gets SIGTERM
from the kernel when the launcher dies, by whatever means. The launcher adopts the orphans of its children.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bridge.errors import ConfigError
from launch.commands import Command

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Loaded before any fork: dlopen is not safe between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)

EXIT_SIGNAL_BASE = 128


def become_subreaper() -> None:
    """Make orphans below this process its own children, so that it can find, end and reap them."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def _die_with(parent: int) -> Callable[[], None]:
    def preexec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(EXIT_SIGNAL_BASE + signal.SIGTERM)

    return preexec


@dataclass
class Child:
    """A started process. ``status`` is what waitpid said, None while it lives."""

    command: Command
    popen: subprocess.Popen[bytes]
    status: int | None = None

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 128 + n for signal n."""
        assert self.status is not None, f"{self.command.name} has not ended"
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else EXIT_SIGNAL_BASE - code

    def end(self, status: int) -> None:
        """Take note of what waitpid said."""
        self.status = status
        self.popen.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it again

    def signal(self, number: int) -> None:
        """Send a signal if it still lives."""
        if self.alive:  # not yet reaped, so the pid is still its own
            os.kill(self.pid, number)

    def describe(self) -> str:
        """Who, with its pid, and how it ended."""
        who = f"{self.command.name} (pid {self.pid})"
        if self.status is None:
            return f"{who} is running"
        if os.WIFSIGNALED(self.status):
            return f"{who} was killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"{who} ended with exit code {self.exit_code}"


def _appending(log: Path) -> BinaryIO:
    try:
        return log.open("ab")
    except OSError as err:  # a share that is away: whoever must be started again must be all the same
        logger.warning("%s cannot be written: %s; what would stand there is lost", log, err.strerror)
        return Path(os.devnull).open("ab")


def start(command: Command, log: Path) -> Child:
    """Start one child with both outputs appended to ``log``; call it from the main thread.

    The output goes to a file, never to a pipe: a pipe would break the children (SIGPIPE) with the launcher.

    Raises:
        ConfigError: the program cannot be executed.
    """
    with _appending(log) as output:
        try:
            popen = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=command.environment(),
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        except OSError as err:
            raise ConfigError(f"cannot start the {command.name}: {command.argv[0]}: {err.strerror}") from err
    return Child(command, popen)
