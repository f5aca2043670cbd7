"""How a vLLM process introduces itself to the node's daemon, and does so again when that restarts.

The connection doubles as a lifeline: its end tells the daemon that the process died, and the daemon's
messages on it wake an idle engine. The control page outlives the daemon, because every process that maps
it hands it to the next one.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from vllm_patching import build, linux
from vllm_patching.channel import Channel, ChannelClosed
from vllm_patching.control_page import ControlPage

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
RETRY_S = 0.5


class Registration:
    """One process's standing introduction: a message, the descriptors that go with it, and a thread."""

    def __init__(self, hello: dict[str, Any], *, fds: tuple[int, ...] = (), who: str) -> None:
        self._hello = {**hello, "pid": os.getpid(), "host": socket.gethostname(), build.KEY: build.BUILD}
        self._fds = fds
        self._who = who
        self._run_dir = Path(os.environ["BRIDGE_RUN_DIR"])
        self._channel: Channel | None = None
        self._control: ControlPage | None = None
        self.on_wake: Callable[[], None] | None = None
        self.exit_with_parent = False

    def connect(self) -> ControlPage:
        """Introduce this process to the daemon; returns the node's control page.

        Raises:
            BridgeError: the daemon cannot be reached, refuses, or answers something else.
        """
        try:
            channel = Channel.connect(self._run_dir, timeout_s=CONNECT_TIMEOUT_S)
            known = (self._control.fd,) if self._control else ()
            channel.send({**self._hello, "has_control": bool(known)}, self._fds + known)
            answer, fds = channel.receive()
        except (OSError, ChannelClosed) as err:
            raise BridgeError(
                f"{self._who} (pid {os.getpid()}) cannot reach the weight-updater daemon at "
                f"{self._run_dir}: {err}; see daemon.log in the log directory"
            ) from err
        if answer.get("type") != "welcome":
            raise BridgeError(f"the daemon refused {self._who}: {answer.get('error', answer)}")
        channel.sock.settimeout(None)
        self._channel = channel
        if self._control is None:
            if len(fds) != 1:
                raise BridgeError(
                    f"the daemon sent {self._who} {len(fds)} descriptors instead of the control page"
                )
            self._control = ControlPage(fds[0])
        return self._control

    def watch(self) -> None:
        """Keep the connection in a daemon thread: wake on request, come back when the daemon does."""
        threading.Thread(target=self._watch, name="bridge-registration", daemon=True).start()

    def _watch(self) -> None:
        parent = linux.pidfd_open(os.getppid())
        while True:
            assert self._channel is not None
            if parent in _readable(self._channel.sock.fileno(), parent):
                self._parent_died()
                return
            try:
                self._channel.receive()
            except (BridgeError, TimeoutError) as err:
                self._channel.close()
                logger.warning(
                    "%s lost the daemon (%s); serving on, waiting for the next one", self._who, err
                )
                if not self._reconnect(parent):
                    return  # else it is woken too: a daemon may have died between its word and the nudge
            if self.on_wake is not None:
                self.on_wake()

    def _reconnect(self, parent: int) -> bool:
        said = ""
        while True:
            # The parent's end is the only deadline: a server without a daemon still serves.
            if _readable(parent, timeout_s=RETRY_S):
                self._parent_died()
                return False
            try:
                self.connect()
            except BridgeError as err:
                if str(err) != said:
                    logger.warning("%s; trying again", err)
                    said = str(err)
                continue
            logger.info("%s is registered with the restarted daemon", self._who)
            return True

    def _parent_died(self) -> None:
        if self.exit_with_parent:
            # vLLM's engine core does not notice that its API server was killed; nobody could reach it.
            logger.error("%s: the parent process died; ending", self._who)
            os.kill(os.getpid(), signal.SIGTERM)


def _readable(*fds: int, timeout_s: float | None = None) -> set[int]:
    """Those of ``fds`` that can be read, or are closed; vLLM may have more than ``select`` can count."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else 1000 * timeout_s)}
