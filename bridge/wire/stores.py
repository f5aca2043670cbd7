"""torch's key-value stores, and a daemon's as another process sees it: there every operation has a deadline.

torch's client knows none: behind its timeout it tells the server so, and waits for the answer without limit.
A server that stands still (a stopped job, a frozen machine) holds whoever asks, though connections are taken.
"""

from __future__ import annotations

import queue
import socket
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar, cast

# torch.distributed exports the stores, but does not say so to type checkers.
from torch.distributed import PrefixStore as PrefixStore  # type: ignore[attr-defined]
from torch.distributed import Store as _TorchStore  # type: ignore[attr-defined]
from torch.distributed import TCPStore as TCPStore  # type: ignore[attr-defined]

from bridge.wire import sockets

TorchStore = _TorchStore
T = TypeVar("T")
GRACE_S = 2.0  # torch's own timeout comes first, by an answer of the server


class Store(Protocol):
    """What we use of a store, torch's or a ``DaemonStore``."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...

    def queue_push(self, key: str, value: bytes | str, /) -> None: ...

    def set_timeout(self, timeout: timedelta, /) -> None: ...


class StoreSilent(RuntimeError):  # as torch's own errors are, so whoever catches those means this one too
    """A store did not answer in time."""


class DaemonStore:
    """A connection to a daemon's store. Any thread may use it; one does at a time.

    Its operations run in a thread of its own. Where one does not come back in time, the connection is
    given up for good: its socket is shut, by which that thread ends, and every later operation fails at once.
    """

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        """Connect; no operation takes longer than ``timeout_s``, but for waits, which have their own limit.

        Raises:
            RuntimeError: nobody answers there; torch's errors, or ``StoreSilent``.
            OSError: ``host`` cannot be resolved.
        """
        self._where = f"{host}:{port}"
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._broken = ""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        weakref.finalize(self, self._jobs.put, None)
        addresses = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        before = sockets.opened()
        self._sockets: Callable[[], set[int]] = lambda: sockets.leading_to(addresses, port, since=before)
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="bridge-store", daemon=True)
        self._thread.start()
        limit = timedelta(seconds=timeout_s)
        self.raw = self._run(
            lambda: TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit),
            "its greeting",
            timeout_s + GRACE_S,
        )
        ours = self._sockets()
        self._sockets = lambda: ours
        sockets.keep_alive(before)

    def _run(self, operation: Callable[[], T], what: str, limit_s: float) -> T:
        """``operation``'s result, or what it raises.

        Raises:
            StoreSilent: there was none within ``limit_s`` seconds, or the connection was given up before.
        """
        outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def job() -> None:
            try:
                outcome.put((operation(), None))
            except Exception as err:  # noqa: BLE001 - raised by who waits
                outcome.put((None, err.with_traceback(None)))  # which would keep this frame, and the store

        with self._turn:
            if self._broken:
                raise StoreSilent(self._broken)
            self._jobs.put(job)
            try:
                result, err = outcome.get(timeout=limit_s)
            except queue.Empty:
                self._give_up(f"did not answer within {limit_s:g} s ({what}); is the daemon stopped?")
                raise StoreSilent(self._broken) from None
            except BaseException:  # a signal's; its thread is held up all the same
                self._give_up(f"was not waited for any longer ({what})")
                raise
        if err is not None:
            try:
                raise err
            finally:
                del err  # for the same reason
        return cast(T, result)

    def _give_up(self, why: str) -> None:
        self._broken = f"the store at {self._where} {why}"
        sockets.shut(self._sockets())
        self._jobs.put(None)
        self._thread.join(GRACE_S)  # or a process that ends now would abort: torch is in the thread still

    def within(self, operation: Callable[[TorchStore], T], what: str, *, limit_s: float) -> T:
        """What ``operation`` makes of torch's own store, of which it may use anything.

        Raises:
            StoreSilent: it took longer than ``limit_s`` seconds, as of any operation.
        """
        raw = self.raw
        return self._run(lambda: operation(raw), what, limit_s)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long an operation may take from now on."""
        self._timeout_s = timeout.total_seconds()
        self.raw.set_timeout(timeout)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until all ``keys`` are set."""
        limit_s = timeout.total_seconds() + GRACE_S
        self.within(lambda raw: raw.wait(keys, timeout), f"waiting for {', '.join(keys)}", limit_s=limit_s)

    def set(self, key: str, value: str) -> None:
        """Set a key; ``value`` may be bytes, the stub says str."""
        self.within(lambda raw: raw.set(key, value), f"setting {key}", limit_s=self._timeout_s + GRACE_S)

    def get(self, key: str) -> bytes:
        """The value of a key that is set."""
        return self.within(lambda raw: raw.get(key), f"reading {key}", limit_s=self._timeout_s + GRACE_S)

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are set."""
        what = f"looking for {', '.join(keys)}"
        return self.within(lambda raw: raw.check(keys), what, limit_s=self._timeout_s + GRACE_S)

    def delete_key(self, key: str) -> bool:
        """Delete a key; whether there was one."""
        return self.within(
            lambda raw: raw.delete_key(key), f"deleting {key}", limit_s=self._timeout_s + GRACE_S
        )

    def queue_push(self, key: str, value: bytes | str) -> None:
        """Put ``value`` into a queue."""
        self.within(
            lambda raw: raw.queue_push(key, value), f"asking in {key}", limit_s=self._timeout_s + GRACE_S
        )


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # and with it the store, or waiting for the next one would keep it


def raw(store: Store) -> TorchStore:
    """Torch's own store, for what torch makes of one; nothing guards it."""
    return store.raw if isinstance(store, DaemonStore) else cast(TorchStore, store)
