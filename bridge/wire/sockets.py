"""This process's connections as the system knows them: torch's groups and stores offer no option for theirs.

A connection is told by when it was opened. One that another thread opens at the same moment may be taken
for ours, so nothing is done here that would harm it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Collection, Container, Iterator
from pathlib import Path
from typing import Any

ALL_ADDRESSES = "0.0.0.0"  # noqa: S104 - of a name that other hosts know by an address that this one does not
# Address translation and firewalls forget flows that are idle; the hastiest in use, after a minute or more.
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
LOST_AFTER_S = 90.0  # an idle flow that nothing answers any more for so long is found broken by its next user
_MOST_PROBES = 127  # the system's limit
# Without the second, a user's ``socket.setdefaulttimeout`` would alter the socket that is looked at.
_AS_IT_IS = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


def opened() -> set[int]:
    """All sockets that this process has, by inode."""
    return {inode for _, inode in _sockets()}


def _sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each."""
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            status = os.fstat(int(path.name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(path.name), status.st_ino


def connections(which: Callable[[int], bool]) -> Iterator[socket.socket]:
    """The TCP connections whose inode is wanted, each by a descriptor that is closed behind it."""
    for fd, inode in _sockets():
        if not which(inode):
            continue
        with (
            contextlib.suppress(OSError),  # closed meanwhile, or not connected
            socket.socket(-1, _AS_IT_IS, -1, fileno=os.dup(fd)) as one,
        ):
            if one.proto == socket.IPPROTO_TCP:
                one.getpeername()
                yield one


def keep_alive(since: Collection[int], *, lost_after_s: float = LOST_AFTER_S) -> None:
    """Have the system ask after the other end of new connections while they are idle.

    It answers even while the process there stands still. One that does not for ``lost_after_s`` seconds,
    or ``LOST_AFTER_S`` if those are more, breaks the connection.
    """
    unanswered_s = max(lost_after_s, LOST_AFTER_S) - KEEPALIVE_IDLE_S
    probes = max(1, min(_MOST_PROBES, round(unanswered_s / KEEPALIVE_INTERVAL_S)))
    for connection in connections(lambda inode: inode not in since):
        with contextlib.suppress(OSError):  # broken by now, as its user will learn
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections to ``host``'s address only, by IPv4 if it has one; port 0 takes any.

    A name that is loopback to this host alone (``/etc/hosts``) is another address to all others, nobody here
    knows which: then all addresses are listened at.

    Raises:
        OSError: ``host`` is nobody's name, its address is not this host's, or the port is in use there.
    """
    family, kind, protocol, address = address_of(host, port)
    if host not in ("localhost", address[0]) and ipaddress.ip_address(address[0]).is_loopback:
        family, kind, protocol, address = address_of(ALL_ADDRESSES, port)
    listener = socket.socket(family, kind, protocol)
    try:
        # TIME_WAIT of a former server is no fault.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def address_of(
    host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM
) -> tuple[socket.AddressFamily, socket.SocketKind, int, Any]:
    """Family, kind, protocol and address to open a socket for ``host`` with, by IPv4 if it has one."""
    found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, kind, protocol, address


def await_hang_up(host: str, port: int, *, connect_s: float, limit_s: float) -> None:
    """Connect, hang up, and return once a process there does so too: the system alone takes connections.

    Raises:
        OSError: nobody takes the connection, or nobody hangs up; says which.
    """
    with socket.create_connection((host, port), timeout=connect_s) as connection:
        connection.settimeout(limit_s)
        connection.shutdown(socket.SHUT_WR)
        try:
            connection.recv(1)
        except TimeoutError:
            raise TimeoutError(
                f"the connection was taken, and then nothing was heard for {limit_s:g} s; is the daemon "
                "stopped?"
            ) from None


def leading_to(addresses: Container[object], port: int, *, since: Collection[int]) -> set[int]:
    """The connections that are not among ``since`` and lead there, by inode."""
    return {
        os.fstat(connection.fileno()).st_ino
        for connection in connections(lambda inode: inode not in since)
        if connection.getpeername()[1] == port
        and connection.getpeername()[0].removeprefix("::ffff:") in addresses
    }


def shut(inodes: Collection[int]) -> None:
    """End these connections: who waits on one, in whatever library, gets an error."""
    for connection in connections(inodes.__contains__):
        with contextlib.suppress(OSError):  # the other end was faster
            connection.shutdown(socket.SHUT_RDWR)
