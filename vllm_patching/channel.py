"""The node's own socket: how workers, engine, updaters and the launcher talk to the daemon.

A Unix stream socket, mode 0600 in a directory of mode 0700; both ends compare the other's SO_PEERCRED
with their own uid. A message is a four-byte length and JSON; file descriptors ride on its first byte
(SCM_RIGHTS). No pickle: what a message may be is written down here. No torch either, so that the
launcher can ask for the status in milliseconds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from bridge.errors import BridgeError, ProtocolError, RendezvousError
from bridge.protocol.decoding import UNREADABLE

logger = logging.getLogger(__name__)

SOCKET_NAME = "daemon.sock"
ACCEPT_PAUSE_S = 0.2
MAX_MESSAGE_BYTES = 1 << 30  # a mapping of a 10,000-tensor model is some tens of MB
MAX_FDS = 64
SEND_TIMEOUT_S = 30.0  # without one byte of progress: whoever sends may have others to serve
_READ_BYTES = 1 << 20  # taken at once: memory follows what has come, not what was announced
_LENGTH = struct.Struct("!I")
_UCRED = struct.Struct("iII")
_TIMEVAL = struct.Struct("ll")


class PeerRefused(BridgeError):
    """The process at the other end of the socket belongs to another user."""


class ChannelClosed(BridgeError):
    """The other end is gone, or has stopped reading."""


def _framed(message: dict[str, Any]) -> bytes:
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that came with a message and have no owner."""
    for fd in fds:
        os.close(fd)


def connections(listener: socket.socket, who: str, ended: Callable[[], bool]) -> Iterator[socket.socket]:
    """Who connects, one after the other, until ``ended``; an error of one is no end for the next."""
    pause = threading.Event()
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as err:
            if ended():
                return
            logger.warning("%s could not be let in: %s", who, err)  # too many descriptors, for now
            pause.wait(ACCEPT_PAUSE_S)
        else:
            yield sock


def socket_path(run_dir: Path) -> Path:
    """The daemon's socket below a run directory."""
    return run_dir / SOCKET_NAME


def keep(run_dir: Path) -> None:
    """Keep systemd-tmpfiles, which deletes what is ten days old, out of ``run_dir`` while this process lives.

    It passes over a directory that somebody has locked. The descriptor is left open on purpose.
    """
    try:
        fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as err:
        logger.warning("%s is not safe from systemd-tmpfiles: %s", run_dir, err.strerror)


def is_kept(run_dir: Path) -> bool:
    """Whether a living process keeps it; systemd-tmpfiles asks in the same way."""
    try:
        fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False  # it is gone, as after a restart of the host
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class Channel:
    """One connection. Not thread-safe for sending; one reader and one writer thread are fine."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            sock.close()
            raise PeerRefused(
                f"pid {self.pid} of uid {uid} is at the other end of the bridge's socket, which belongs "
                f"to uid {os.geteuid()}; refused"
            )
        # The kernel's own, which leaves a reader of the same socket alone: it may wait for days.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(SEND_TIMEOUT_S), 0))

    @classmethod
    def connect(cls, run_dir: Path, *, timeout_s: float) -> Channel:
        """Connect to the daemon of ``run_dir``.

        Raises:
            OSError: there is no daemon, or it does not answer within ``timeout_s`` seconds.
            PeerRefused: another user owns the socket.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(socket_path(run_dir)))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send one message, with file descriptors if any.

        Raises:
            ChannelClosed: the other end is gone, or has read nothing for ``SEND_TIMEOUT_S`` seconds while its
                buffer was full. What follows a message that was cut off is no message: close then.
        """
        data = _framed(message)
        try:
            sent = socket.send_fds(self.sock, [data], list(fds)) if fds else 0
            if sent < len(data):  # the reader of a whole message may have left already
                self.sock.sendall(data[sent:])
        except (BlockingIOError, TimeoutError) as err:
            raise ChannelClosed(
                f"pid {self.pid} has read nothing from the bridge's socket for a while, and its buffer is "
                "full; is the process stopped?"
            ) from err
        except OSError as err:
            raise ChannelClosed(f"the bridge's socket to pid {self.pid} broke: {err}") from err

    def nudge(self, message: dict[str, Any]) -> bool:
        """Send a short message if there is room for it, and never wait; whether it was sent.

        Where there is none the other end has much to read already, and wakes up for that.

        Raises:
            ChannelClosed: the other end is gone.
        """
        data = _framed(message)
        try:
            sent = self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as err:
            raise ChannelClosed(f"the bridge's socket to pid {self.pid} broke: {err}") from err
        assert sent == len(data), "a Unix socket takes a message of one buffer whole or not at all"
        return True

    def receive(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Wait for one message; the socket's own timeout applies.

        Raises:
            ChannelClosed: the other end is gone.
            TimeoutError: nothing came in time.
            ProtocolError: what came is not a message.
        """
        head, fds, cut_off = self._receive_head()
        try:
            if cut_off:
                raise ProtocolError(f"pid {self.pid} sent more than {MAX_FDS} descriptors with one message")
            return self._receive_message(head), fds
        except BaseException:
            close_all(fds)  # nobody else will ever know of them
            raise

    def _receive_message(self, head: bytes) -> dict[str, Any]:
        head += self._receive_exactly(_LENGTH.size - len(head))
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"pid {self.pid} announced a message of {length} bytes")
        body = self._receive_exactly(length)
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except UNREADABLE as err:
            raise ProtocolError(f"pid {self.pid} sent something that is not a message: {err}") from err

    def _receive_head(self) -> tuple[bytes, tuple[int, ...], bool]:
        """The first bytes, the descriptors that came with them, and whether there were more than we take."""
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, _LENGTH.size, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise
        except OSError as err:
            raise ChannelClosed(f"the bridge's socket to pid {self.pid} broke: {err}") from err
        if not data:
            raise ChannelClosed(f"pid {self.pid} closed the bridge's socket")
        return data, tuple(fds), bool(flags & socket.MSG_CTRUNC)

    def _receive_exactly(self, count: int) -> bytes:
        buffer = bytearray()
        while (left := count - len(buffer)) > 0:
            try:
                received = self.sock.recv(min(left, _READ_BYTES))
            except TimeoutError:
                raise
            except OSError as err:
                raise ChannelClosed(f"the bridge's socket to pid {self.pid} broke: {err}") from err
            if not received:
                raise ChannelClosed(f"pid {self.pid} closed the bridge's socket in the middle of a message")
            buffer += received
        return bytes(buffer)

    def close(self) -> None:
        """Close this end; the other sees the end of the stream."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a reader in another thread
        except OSError:
            pass  # the peer was faster
        self.sock.close()


def ask(run_dir: Path, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Put one request to the daemon of ``run_dir`` and return its answer.

    Raises:
        RendezvousError: no daemon answers there within ``timeout_s`` seconds.
    """
    try:
        channel = Channel.connect(run_dir, timeout_s=timeout_s)
        try:
            channel.send(request)
            answer, fds = channel.receive()
            close_all(fds)  # an answer has none
        finally:
            channel.close()
    except (OSError, BridgeError) as err:
        raise RendezvousError(
            f"no weight-updater daemon answers at {socket_path(run_dir)}: {err}; is the server running "
            "on this host, and as this user?"
        ) from err
    if answer.get("type") == "error":
        raise RendezvousError(f"the weight-updater daemon refused a request: {answer.get('error')}")
    return answer


def listen(run_dir: Path) -> socket.socket:
    """Open the daemon's listening socket, mode 0600, below ``run_dir`` (created 0700)."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    keep(run_dir)
    path = socket_path(run_dir)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(previous)
    sock.listen(64)
    return sock
