"""What idles between two broadcasts is kept alive: every connection of ours, at both its ends."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge import joining
from bridge.wire import rendezvous, sockets
from tests.support.link import REPO, Link
from tests.support.link import why_not as link_missing
from tests.support.ranks import run_ranks
from tests.support.serving import environment

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

FORGETS_S, IDLE_S = 4.0, 8.0


def connections_of_ours(path: Path) -> None:
    """One of two ranks: the trainer's own group, an epoch's, and a way to the store."""
    rank, port = dist.get_rank(), int((path / "port").read_text())
    socket.setdefaulttimeout(7.0)  # a user's; torch's sockets are none of Python's
    before = sockets.opened()
    joining._own_group(600.0)
    store = rendezvous.reach_store("127.0.0.1", port, timeout_s=10)
    group = rendezvous.make_group(store, "e1/data", rank=rank, size=2, address="127.0.0.1", timeout_s=20)
    lost_after = []
    for one in sockets.connections(lambda inode: inode not in before):
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count = (
            one.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        lost_after.append(idle + interval * count)
        to_store = one.getpeername()[1] == port
        assert os.get_blocking(one.fileno()) == to_store, "Gloo's do not block, and the store's does"
    assert sorted(lost_after) == [90, 90, 600], "the store, the epoch's group, the trainer's own"
    word = torch.tensor([5.0])
    work = group.send([word], 1, 3) if rank == 0 else group.recv([word], 0, 3)
    work.wait(timedelta(seconds=10))
    assert not store.check(["nothing"])


def test_every_connection_is_kept_alive(tmp_path: Path) -> None:
    store = rendezvous.serve_store("127.0.0.1", 0)
    (tmp_path / "port").write_text(str(store.port))
    run_ranks(connections_of_ours, 2, tmp_path)


# The far end of two groups: one kept alive, as all are, and one as it would be without.
FAR = """
import sys
from datetime import timedelta
import torch
from bridge.wire import rendezvous, sockets

host, port, forgets_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
words = [torch.zeros(1) for _ in range(2)]
sockets.KEEPALIVE_IDLE_S = sockets.KEEPALIVE_INTERVAL_S = 1
store = rendezvous.reach_store(host, port, timeout_s=20)
groups = []
for name in ("kept", "idle"):
    address = rendezvous.local_address(host, port)
    groups.append(rendezvous.make_group(store, name, rank=1, size=2, address=address, timeout_s=30))
    sockets.KEEPALIVE_IDLE_S = 1000
print("joined", flush=True)
sys.stdin.readline()
assert not store.check(["nothing"])
for group, word in zip(groups, words):
    try:
        group.recv([word], 0, 5).wait(timedelta(seconds=forgets_s))
    except RuntimeError:
        continue
print(*(int(word) for word in words), flush=True)
sys.stdin.read()
"""


def test_what_idles_for_longer_than_a_firewall_remembers_carries_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := link_missing():
        pytest.skip(reason)
    with Link(tmp_path) as link:
        link.set(forgets_s=FORGETS_S)
        store = rendezvous.serve_store(link.here, 0)
        far = subprocess.Popen(
            [*link.inside(), sys.executable, "-c", FAR, link.here, str(store.port), str(FORGETS_S)],
            env=environment(), cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert far.stdin is not None
        assert far.stdout is not None
        with far:
            monkeypatch.setattr(sockets, "KEEPALIVE_IDLE_S", 1000)  # this end leaves it to the other to ask
            groups = [
                rendezvous.make_group(store, name, rank=0, size=2, address=link.here, timeout_s=60)
                for name in ("kept", "idle")
            ]
            assert far.stdout.readline() == "joined\n"
            select.select([], [], [], IDLE_S)
            sent = [group.send([torch.ones(1)], 1, 5) for group in groups]
            far.stdin.write("\n")
            far.stdin.flush()
            assert far.stdout.readline() == "1 0\n", "of the group that was kept alive, and of the other"
            sent[0].wait(timedelta(seconds=10))
            far.kill()
            with pytest.raises(RuntimeError):
                sent[1].wait(timedelta(seconds=0.1))
