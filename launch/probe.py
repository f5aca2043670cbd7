"""Asking the children how they are: the daemon over its Unix socket, vLLM over HTTP."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path
from typing import Any

from bridge.errors import RendezvousError
from launch.options import ServerView
from vllm_patching.channel import ask

PROBE_TIMEOUT_S = 2.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def is_healthy(server: ServerView, *, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether vLLM's /health answers 200 now."""
    connection: http.client.HTTPConnection
    if server.uds is not None:
        connection = _UnixConnection(server.uds, timeout_s)
    elif server.tls:
        # The certificate names the service, not the loopback address; the answer carries no secret.
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(
            server.connect_host, server.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(server.connect_host, server.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        connection.request("GET", "/health", headers=headers)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False  # not listening yet, or not any more
    finally:
        connection.close()


def daemon_status(run_dir: Path, *, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any] | None:
    """The daemon's status, or None while there is no daemon to ask."""
    try:
        return ask(run_dir, {"type": "status"}, timeout_s=timeout_s)
    except RendezvousError:
        return None
