"""A network link with faults between this namespace and one of its own, for a trainer or a node to live in.

Two TUN devices, joined by a process that carries packets from one to the other: late, some of them, or none.
It needs root, ``ip`` and /dev/net/tun, and no module of the kernel's (netem is not everywhere).

``python -m tests.support.link NAMESPACE DIRECTORY HERE THERE`` is that process: it does what ``link.json``
says and counts in ``packets.json``.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import math
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.serving import environment, wait_until

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
_SYN = 2
REPO = Path(__file__).parents[2]


def why_not() -> str:
    """What is missing for a link here, or "" if nothing is."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        return "a network namespace with a link of our own needs root and /dev/net/tun"
    return ""


class Link:
    """The link, whole until told otherwise; a context manager. One at a time in a process.

    ``here`` is this end's address.
    """

    def __init__(self, directory: Path) -> None:
        pid = os.getpid()
        self.namespace = f"bridge-{pid}"
        subnet = f"10.{64 + pid % 64}.{pid // 64 % 250}"
        self.here = f"{subnet}.1"
        self._order, self._count = directory / "link.json", directory / "packets.json"
        self._order.write_text("{}")
        self._number = 0
        _ip("netns", "add", self.namespace)
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.link", self.namespace, str(directory), self.here,
                f"{subnet}.2",
            ],
            env=environment(), cwd=REPO,
        )  # fmt: skip
        wait_until("the link", self._count.exists, timeout_s=60)

    def set(
        self,
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        cut_after: int = -1,
        forgets_s: float = math.inf,
        seed: int = 0,
    ) -> None:
        """From now on packets come ``delay_s`` late, a share ``loss`` never, after so many none at all.

        ``seed`` draws which of them are lost. As firewalls do, it forgets TCP connections that are idle for
        ``forgets_s``, and carries nothing of those any more.
        """
        self._number += 1
        order = {
            "number": self._number, "delay_s": delay_s, "loss": loss, "cut_after": cut_after,
            "forgets_s": forgets_s, "seed": seed,
        }  # fmt: skip
        partial = self._order.with_suffix(".new")
        partial.write_text(json.dumps(order))
        partial.replace(self._order)
        wait_until("the link to change", lambda: self.packets()["number"] == self._number, timeout_s=30)

    def packets(self) -> dict[str, int]:
        """Since the last change: carried, late and lost."""
        return dict(json.loads(self._count.read_text())["packets"])

    def lost(self) -> int:
        """Packets lost from the last change to this moment."""
        now = time.monotonic()
        wait_until(
            "the link to count",
            lambda: json.loads(self._count.read_text())["at"] >= now,
            timeout_s=30,
            interval_s=0.005,
        )
        return self.packets()["lost"]

    def inside(self) -> tuple[str, ...]:
        """What a command begins with that runs at the other end."""
        return ("ip", "netns", "exec", self.namespace)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        _ip("netns", "delete", self.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def enter(namespace: str) -> None:
    """Move this thread, and all that it starts, to the other end."""
    with Path("/run/netns", namespace).open("rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"entering {namespace}")


def _open(namespace: str, ours_at: str, theirs_at: str) -> tuple[int, int]:
    """Both ends, up and with addresses."""
    here = f"vbt{os.getpid()}"[:15]
    ours = _tun(here)
    _ip("addr", "add", ours_at, "peer", theirs_at, "dev", here)
    _ip("link", "set", here, "up")
    enter(namespace)
    theirs = _tun("bridge0")
    _ip("link", "set", "lo", "up")
    _ip("addr", "add", theirs_at, "peer", ours_at, "dev", "bridge0")
    _ip("link", "set", "bridge0", "up")
    return ours, theirs


class _Flows:
    """The TCP connections that a firewall knows."""

    def __init__(self) -> None:
        self._seen: dict[frozenset[bytes], float] = {}

    def knows(self, packet: bytes, forgets_s: float) -> bool:
        """Whether a packet is of a connection that is known, if of any; it keeps that one from being idle."""
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            return True
        tcp = (packet[0] & 15) * 4
        ports = packet[tcp : tcp + 2], packet[tcp + 2 : tcp + 4]
        flow = frozenset((packet[12:16] + ports[0], packet[16:20] + ports[1]))
        now, begins = time.monotonic(), packet[tcp + 13] & _SYN
        if not begins and now - self._seen.get(flow, -math.inf) > forgets_s:
            return False
        self._seen[flow] = now
        return True


def carry(namespace: str, directory: Path, *addresses: str) -> None:
    """Carry packets for ever between this end's address and the other's."""
    ours, theirs = _open(namespace, *addresses)
    other = {ours: theirs, theirs: ours}
    order: dict[str, Any] = {"number": 0}
    count = {"number": 0, "carried": 0, "late": 0, "lost": 0}
    waiting: list[tuple[float, int, int, bytes]] = []
    looked_at, serial, flows, chance = 0.0, 0, _Flows(), random.Random()
    while True:
        now = time.monotonic()
        if now - looked_at > 0.02:
            looked_at = now
            found = json.loads((directory / "link.json").read_text())
            if found and found["number"] != order["number"]:
                order = found
                count = {"number": order["number"], "carried": 0, "late": 0, "lost": 0}
                chance.seed(order["seed"])
            partial = directory / "packets.new"
            partial.write_text(json.dumps({"at": now, "packets": count}))
            partial.replace(directory / "packets.json")
        pause = max(0.0, min(0.02, waiting[0][0] - now)) if waiting else 0.02
        for fd in select.select([ours, theirs], [], [], pause)[0]:
            packet = os.read(fd, 1 << 16)
            cut = 0 <= order.get("cut_after", -1) <= count["carried"]
            known = flows.knows(packet, order.get("forgets_s", math.inf))
            if cut or not known or chance.random() < order.get("loss", 0.0):
                count["lost"] += 1
                continue
            delay_s = order.get("delay_s", 0.0)
            count["carried"] += 1
            count["late"] += delay_s > 0
            serial += 1
            heapq.heappush(waiting, (time.monotonic() + delay_s, serial, other[fd], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(waiting)
            try:
                os.write(to, packet)
            except BlockingIOError:
                count["lost"] += 1  # as a full queue would


if __name__ == "__main__":
    carry(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
