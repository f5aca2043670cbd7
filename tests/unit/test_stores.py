"""A daemon that stands still: whoever asks its store is told so in time, and keeps nothing of the attempt."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from bridge.errors import BridgeError, PeerLost, RendezvousError, TransferError
from bridge.wire import nccl, rendezvous, sockets, stores
from bridge.wire.meeting import Meeting
from bridge.wire.stores import GRACE_S, DaemonStore, StoreSilent
from launch import preflight
from tests.support.mappings import parallel_mapping
from tests.support.pages import ROOT
from tests.support.serving import stop, wait_until

LIMIT_S = 1.0
SERVE = """
import sys
from bridge.wire.rendezvous import serve_store
store = serve_store("127.0.0.1", 0)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def daemon() -> Iterator[tuple[int, int]]:
    """Pid and port of a process that has a store open."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def reach(port: int) -> DaemonStore:
    return rendezvous.reach_store("127.0.0.1", port, timeout_s=LIMIT_S)


def meeting(store: DaemonStore) -> Meeting:
    return Meeting(store, parallel_mapping(1), epoch=1, timeout_s=LIMIT_S)


def form(store: DaemonStore) -> None:
    rendezvous.make_group(store, "e1/data", rank=0, size=2, address="127.0.0.1", timeout_s=LIMIT_S)


def ask(store: DaemonStore) -> None:
    """As a trainer does; its answer does not come, and the request is taken back."""
    loan = rendezvous.Loan(session="ab", borrower="/logs", start=False)
    rendezvous.ask(store, loan, "s", timeout_s=LIMIT_S)
    try:
        rendezvous.await_answer(store, "ab", "s", timeout_s=LIMIT_S)
    finally:
        rendezvous.withdraw(store, "ab")


def listening(port: int) -> set[str]:
    """The addresses at which somebody takes connections to ``port``, as the kernel prints them."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    ends = [line.split()[1].split(":") for table in tables for line in table if line.split()[3] == "0A"]
    return {address for address, number in ends if int(number, 16) == port}


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "0100007F"),
        ("127.0.0.2", "0200007F"),
        ("localhost", "0100007F"),
        ("0.0.0.0", "00000000"),
        ("::1", "00000000000000000000000001000000"),
    ],
)
def test_a_store_is_open_at_its_address_only(host: str, address: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    store = rendezvous.serve_store(host, 0)
    assert listening(store.port) == {address}
    reached = rendezvous.reach_store(host, store.port, timeout_s=10)
    reached.set("key", "value")
    assert store.get("key") == b"value"
    # The kernel leaves by 127.0.0.1 to whatever of 127.0.0.0/8.
    assert rendezvous.local_address(host, store.port) == (host if ":" in host else "127.0.0.1")


def test_a_name_that_is_loopback_to_this_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it: trainers elsewhere know the name by an address of the network."""
    real = socket.getaddrinfo
    known = {"node7": "127.0.1.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real(known.get(host, host), *a, **k))
    with sockets.listen("node7", 0) as listener:
        assert listening(listener.getsockname()[1]) == {"00000000"}
    found = preflight._port_finding("rendezvous", "node7", 0, "--rendezvous-host")
    assert (found.level, "loopback on this host" in found.text) == ("note", True)


def test_an_address_that_a_store_cannot_have_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, why in (("127.0.0.1", "Address already in use"), ("192.0.2.77", "Cannot assign")):
            said = f"cannot open the rendezvous at {host}:{port}: .*{why}.*choose another --rendezvous-port"
            with pytest.raises(RendezvousError, match=said):
                rendezvous.serve_store(host, port)
            found = preflight._port_finding("rendezvous", host, port, "--rendezvous-host")
            assert (found.level, why in found.text) == ("fault", True)
        assert rendezvous.serve_store("127.0.0.2", port).port == port, "nobody is there"


Use = Callable[[DaemonStore], object]
WAIT = timedelta(seconds=LIMIT_S)
USES: dict[str, tuple[Use, type[Exception], str]] = {
    "answer": (ask, RendezvousError, r"for the daemon's answer: .*\(waiting for answer/ab\)"),
    "offer": (
        lambda store: rendezvous.await_offer(store, "ab", "s", timeout_s=LIMIT_S),
        RendezvousError, r"for the peer's offer: .*\(waiting for offer/ab\)",
    ),
    "links": (lambda store: meeting(store).links(3), TransferError, "updater 3 to choose transports"),
    "publish": (
        # No answer is awaited, so only what is more than the system takes in advance is held up.
        lambda store: meeting(store).publish_links(0, ["x" * (1 << 26)]),
        PeerLost, r"store is gone \(setting e1/links/0\)",
    ),
    "group": (form, RendezvousError, r"group 'e1/data' of 2 ranks did not form within 1 s"),
    "check": (lambda store: store.check(["a"]), StoreSilent, r"\(looking for a\)"),
    "delete": (lambda store: store.delete_key("a"), StoreSilent, r"\(deleting a\)"),
    "get": (lambda store: store.get("a"), StoreSilent, r"\(reading a\)"),
    # It has told them that it is there, and freezes while they wait for each other.
    "forming": (
        lambda store: store.within(lambda raw: raw.wait(["a"], WAIT), "forming e1/data", limit_s=LIMIT_S),
        StoreSilent, r"\(forming e1/data\)",
    ),
}  # fmt: skip


def held() -> tuple[set[str], set[str]]:
    """Threads and sockets of this process."""
    sockets = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            sockets.add(str(path.readlink()))
    threads = {path.name for path in Path("/proc/self/task").iterdir()}
    return threads, {link for link in sockets if link.startswith("socket:")}


def assert_no_more_held(before: tuple[set[str], set[str]]) -> None:
    def settled() -> bool:
        return all(now <= then for now, then in zip(held(), before, strict=True))

    wait_until("threads and sockets to end", settled, timeout_s=20)


def test_nobody_waits_longer_than_told_for_a_daemon_that_stands_still(daemon: tuple[int, int]) -> None:
    pid, port = daemon
    before = held()
    stores = {name: reach(port) for name in USES}
    stop(pid)
    said: dict[str, Exception] = {}

    def use(name: str) -> None:
        try:
            USES[name][0](stores[name])
        except (BridgeError, RuntimeError) as err:
            said[name] = err

    threads = {name: threading.Thread(target=use, args=(name,), daemon=True) for name in USES}
    try:
        for thread in threads.values():
            thread.start()
        deadline = time.monotonic() + 2 * LIMIT_S + GRACE_S + 5  # a busy machine
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        assert [name for name, thread in threads.items() if thread.is_alive()] == []
        for name, (_, kind, text) in USES.items():
            with pytest.raises(kind, match=text) as caught:
                raise said[name]
            assert f"the store at 127.0.0.1:{port} did not answer within" in str(caught.value)
            del caught
            began = time.monotonic()
            with pytest.raises(StoreSilent, match="did not answer within"):
                stores[name].check(["b"])  # for good
            assert time.monotonic() - began < LIMIT_S
        said.clear()
        threads.clear()
        stores.clear()
        assert_no_more_held(before)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_daemon_that_stands_still_costs_whoever_knocks_nothing(
    daemon: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, port = daemon
    before = held()
    stop(pid)
    with monkeypatch.context() as brief:
        brief.setattr(rendezvous, "GREETING_TIMEOUT_S", 0.2)
        for _ in range(5):
            with pytest.raises(RendezvousError, match=r"nothing was heard for 0\.2 s; is the daemon stopped"):
                reach(port)
            assert_no_more_held(before)
    # It freezes behind its greeting; torch's own client then waits for more than was asked for.
    with pytest.raises(StoreSilent, match="its greeting"):
        DaemonStore("127.0.0.1", port, timeout_s=0.2)
    assert_no_more_held(before)
    os.kill(pid, signal.SIGCONT)
    reach(port).set("a", "b")
    assert_no_more_held(before)


def test_one_that_only_takes_its_time_is_waited_for(daemon: tuple[int, int]) -> None:
    pid, port = daemon
    store = reach(port)
    stop(pid)
    timer = threading.Timer(LIMIT_S / 2, partial(os.kill, pid, signal.SIGCONT))
    timer.start()
    assert not store.check(["a"])
    timer.join()
    with pytest.raises(RendezvousError, match=r"waited 0\.1 s for nothing: wait timeout after 100ms"):
        rendezvous.fetch(store, "a", timeout_s=0.1, what="nothing")
    nccl.store_of(store, 1, 2, 3).set("id", "x")
    assert store.get("e1/nccl/2-3/id") == b"x"
    assert store.delete_key("e1/nccl/2-3/id")
    assert not store.check(["e1/nccl/2-3/id"])


# Where an operation may raise torch's errors, and so StoreSilent, and why nobody outside ever sees them.
BARE = {
    "bridge/wire/rendezvous.py _form",  # for make_group, which makes a RendezvousError of it
    "bridge/wire/rendezvous.py give",  # of the daemon's own store, which is in its process
    "bridge/wire/rendezvous.py is_withdrawn",  # the same
}


def bare_uses(source: str) -> list[str]:
    """The functions that use a store where nobody catches torch's errors."""
    uses = {*vars(stores.Store), "within"} - {"set_timeout"}  # which asks nobody
    found = []

    def look(node: ast.AST, function: str, caught: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            function, caught = node.name, False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            store = ast.unparse(node.func.value).endswith("store")
            if store and node.func.attr in uses and not caught:
                found.append(function)
        for field, value in ast.iter_fields(node):
            kinds = [ast.unparse(h.type) for h in getattr(node, "handlers", []) if h.type is not None]
            inside = field == "body" and any("RuntimeError" in kind for kind in kinds)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    look(child, function, caught or inside)

    look(ast.parse(source), "", caught=False)
    return found


def test_no_user_of_a_store_lets_its_silence_out() -> None:
    """It is no BridgeError, and nobody is told what to do about it: whoever asks a store makes one of it."""
    found = {
        f"{path.relative_to(ROOT)} {function}"
        for room in ("bridge", "vllm_patching", "launch")
        for path in (ROOT / room).rglob("*.py")
        for function in bare_uses(path.read_text())
    }
    assert found == BARE


def test_a_bare_use_of_a_store_is_found() -> None:
    handled = "def f():\n    try:\n        {}\n    except ({}) as err:\n        {}\n"
    assert bare_uses(handled.format("self._store.get('a')", "OSError, RuntimeError", "pass")) == []
    assert bare_uses(handled.format("self._store.get('a')", "OSError", "pass")) == ["f"]
    assert bare_uses(handled.format("pass", "RuntimeError", "store.check(['a'])")) == ["f"]
