"""The daemon's socket: nothing that goes wrong with one connection closes it to the others."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_patching import frontdesk
from vllm_patching.channel import Channel, listen, socket_path


class Crowded:
    """A listener of a process that has no descriptor left for the first who come."""

    def __init__(self, listener: socket.socket, failures: int) -> None:
        self._listener, self.failures = listener, failures

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()


def test_too_many_descriptors_for_a_moment_do_not_make_the_daemon_deaf(tmp_path: Path) -> None:
    listener = listen(tmp_path)
    crowded = Crowded(listener, failures=2)
    desk = frontdesk.FrontDesk(SimpleNamespace())  # type: ignore[arg-type]
    let_in = threading.Event()
    desk._converse = lambda channel: (channel.close(), let_in.set())  # type: ignore[assignment, method-assign, func-returns-value]
    accepting = threading.Thread(target=desk.accept, args=(crowded,), daemon=True)
    accepting.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path(tmp_path)))
        Channel(client)
        assert let_in.wait(20)
    assert crowded.failures == 0
    listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which a mere close does not
    listener.close()
    accepting.join(20)
    assert not accepting.is_alive()
