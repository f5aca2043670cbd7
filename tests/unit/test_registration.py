"""A process of vLLM loses its daemon and finds the next one, over the real socket."""

from __future__ import annotations

import os
import queue
import socket
import threading
from pathlib import Path

import pytest

from vllm_patching.channel import Channel, listen, socket_path
from vllm_patching.control_page import ControlPage
from vllm_patching.registration import Registration

HELLO = {"type": "engine", "index": 0, "world_size": 1, "hooks": {}}


def test_who_finds_another_daemon_looks_at_the_page_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before may have died between its word there and the nudge that tells of it."""
    monkeypatch.setenv("BRIDGE_RUN_DIR", str(tmp_path))
    page, woken = ControlPage.create(1), queue.SimpleQueue[int]()
    parent, ends = os.pipe()  # in place of the parent's process descriptor
    monkeypatch.setattr("vllm_patching.registration.linux.pidfd_open", lambda _: parent)

    def daemon(listener: socket.socket) -> Channel:
        sock, _ = listener.accept()
        listener.close()
        channel = Channel(sock)
        hello, fds = channel.receive()
        channel.send({"type": "welcome"}, () if hello["has_control"] else (page.fd,))
        for fd in fds:
            os.close(fd)
        return channel

    found: list[Channel] = []
    listener = listen(tmp_path)
    first = threading.Thread(target=lambda: found.append(daemon(listener)))
    first.start()
    registration = Registration(HELLO, who="an engine")
    control = registration.connect()
    first.join()
    registration.on_wake = lambda: woken.put(control.requested)
    registration.watch()
    page.requested = 3
    socket_path(tmp_path).unlink()
    found[0].close()  # and nobody was told of the word
    second = daemon(listen(tmp_path))
    assert woken.get(timeout=20) == 3
    os.write(ends, b"x")
    for thread in threading.enumerate():
        if thread.name == "bridge-registration":
            thread.join(10)
            assert not thread.is_alive()
    second.close()
    assert registration._channel is not None
    registration._channel.close()
    for fd in (parent, ends):
        os.close(fd)
