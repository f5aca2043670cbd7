"""How trainers and daemons find and admit each other, and how their groups come to be.

The daemon keeps a TCPStore open. A trainer's rank 0 puts a signed request into a queue there; the daemon
answers with an epoch, or with a refusal that says why. The answer's epoch prefixes every later key, so no
message of an earlier incarnation can be taken for a new one.

Whoever reaches the port can give the store any command, and list its keys, so no name is a secret. Nothing
here adds to a number in it: the store hangs up on whoever adds to a key that holds none.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist

from bridge.errors import RendezvousError, RendezvousRefused
from bridge.protocol.decoding import UNREADABLE
from bridge.wire import sockets
from bridge.wire.stores import GRACE_S, DaemonStore, PrefixStore, TCPStore, raw
from bridge.wire.stores import Store as Store

MAX_REQUEST_BYTES = 1 << 16  # some hundred, in fact; whoever reaches the port can write any number of them
MAX_RANKS = 1 << 16
_Ranks = Annotated[int, msgspec.Meta(ge=0, le=MAX_RANKS)]
_Pid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]

logger = logging.getLogger(__name__)

_EPOCHS_KEY = re.compile(r"e(\d{1,18})/.")
GREETING_TIMEOUT_S = 5.0
ANSWERS_KEPT_S = 900.0  # longer than anybody waits for one
REQUESTS, LOANS = "request", "loan"  # queues, which no value under a key of the same name disturbs


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What trainer rank 0 says of itself.

    ``trainer``: what this connection is called from epoch to epoch, and no other one of this process; who
    asks under that name has given up the epoch before. "" for a peer's helper, which asks once.
    ``asked_ns``: when, by a clock of the asking process that never goes back.
    ``restores``: it is no trainer, but a peer server's helper, and brings this version, which is live there.
    ``job`` and ``attempt``: the batch job that it is in, and how often that was requeued; "" for none.
    """

    session: str
    protocol_version: int
    world_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
    mapping_digest: str
    host: str
    pid: _Pid
    trainer: Annotated[str, msgspec.Meta(max_length=32)] = ""
    asked_ns: _Number = 0
    restores: _Number = 0
    job: Annotated[str, msgspec.Meta(max_length=32)] = ""
    attempt: _Number = 0

    def follows(self, before: Request) -> bool:
        """Whether who asked ``before`` asks once more.

        A network that was away may bring an earlier request behind a later one, and a process that was forked
        off a trainer has its names too: neither has given anything up.
        """
        same = self.trainer != "" and (self.trainer, self.pid) == (before.trainer, before.pid)
        return same and self.asked_ns > before.asked_ns


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon replies. ``refusal`` is empty when the trainer is admitted.

    ``in_place``: before it takes a byte, every round waits for the engine to stand still.
    ``outdated``: ``weight_version`` is the newest, but vLLM was started again and serves an older one, over
    which no part of the weights may be laid.
    """

    session: str
    refusal: str = ""
    try_again: bool = False
    epoch: _Number = 0
    weight_version: _Number = 0
    num_daemons: _Ranks = 1
    num_inference_ranks: _Ranks = 0
    daemon_pid: _Pid = 0
    heartbeat_interval_s: _Seconds = 2.0
    deadline_s: _Seconds = 15.0
    commit_timeout_s: _Seconds = 120.0
    checksum: str = "first"
    bucket_bytes: _Number = 0
    in_place: bool = False
    outdated: bool = False

    @property
    def first_byte_s(self) -> float:
        """How long a transfer may take to begin."""
        return self.deadline_s + (self.commit_timeout_s if self.in_place else 0.0)


class Loan(msgspec.Struct, frozen=True, kw_only=True):
    """A server's daemon asks a peer's for the version that is live there.

    ``borrower`` is its log directory; without ``start`` it only asks what could be had. ``ahead`` says that
    it cannot take it yet, and gives way to one that can.
    """

    session: str
    borrower: str
    start: bool
    ahead: bool = False


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The peer's reply: ``version`` is the newest it knows; ``refusal`` says why it cannot be had, if so.

    ``borrower`` is whom it is being sent to; ``in_round`` says that a newer one may be on its way.
    """

    session: str
    version: _Number = 0
    refusal: str = ""
    borrower: str = ""
    in_round: bool = False


class _Signed(msgspec.Struct, frozen=True):
    body: bytes
    mac: bytes


T = TypeVar("T")


class Group(Protocol):
    """What we use of a ``ProcessGroupGloo``; torch's stub of it lacks both."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...


def seal(message: msgspec.Struct | list[str] | list[int], secret: str) -> bytes:
    """Encode and sign with the job's secret (HMAC-SHA256)."""
    body = msgspec.msgpack.encode(message)
    return msgspec.msgpack.encode(_Signed(body, hmac.digest(secret.encode(), body, hashlib.sha256)))


def unseal(data: bytes, secret: str, kind: type[T]) -> T:
    """Check the signature and decode.

    Raises:
        RendezvousRefused: signed with another secret, or not a message at all.
    """
    try:
        signed = msgspec.msgpack.decode(data, type=_Signed)
    except UNREADABLE as err:
        raise RendezvousRefused(f"a rendezvous message of {len(data)} bytes is not ours: {err}") from err
    if not hmac.compare_digest(signed.mac, hmac.digest(secret.encode(), signed.body, hashlib.sha256)):
        raise RendezvousRefused(
            "a rendezvous message was signed with another job's secret; is the mapping file that of this "
            "server's present run?"
        )
    try:
        return msgspec.msgpack.decode(signed.body, type=kind)
    except UNREADABLE as err:
        raise RendezvousRefused(
            f"the other side's {kind.__name__} is of another release of the bridge: {err}"
        ) from err


def serve_store(host: str, port: int) -> TCPStore:
    """Open the store that trainers will look for, at this address only; port 0 takes any.

    Raises:
        RendezvousError: the port is in use or the address is not ours.
    """
    try:
        # The store's own socket would listen at all addresses, whatever ``host`` is.
        listener = sockets.listen(host, port)
        port = listener.getsockname()[1]
        return TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError, ValueError) as err:
        raise RendezvousError(
            f"cannot open the rendezvous at {host}:{port}: {first_line(err)}; choose another "
            "--rendezvous-port or --rendezvous-host"
        ) from err


def reach_store(host: str, port: int, *, timeout_s: float) -> DaemonStore:
    """Connect to a daemon's store.

    Raises:
        RendezvousError: nobody answers there within ``timeout_s`` seconds.
    """
    limit_s = min(timeout_s, GREETING_TIMEOUT_S)
    try:
        # The store's own connect retries for long after its timeout; a plain connect answers at once. Behind
        # one that was answered it has little to wait for, but for a daemon that is dying or stopped: the next
        # one is elsewhere, and whoever asks must look for it there.
        sockets.await_hang_up(host, port, connect_s=timeout_s, limit_s=limit_s)
        store = DaemonStore(host, port, timeout_s=limit_s)
    except (OSError, RuntimeError) as err:
        raise RendezvousError(
            f"no weight-updater daemon answers at {host}:{port} within {timeout_s:g} s: {first_line(err)}; "
            "is the server up, and is this its present mapping file?"
        ) from err
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def first_line(err: BaseException) -> str:
    """A C++ error without its backtrace."""
    return str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__


def ask(
    store: Store, request: Request | Loan, secret: str, *, timeout_s: float, line: str = REQUESTS
) -> None:
    """Leave a request for the daemon (trainer rank 0, or another server's daemon), in one of its queues.

    Raises:
        RendezvousError: the daemon died since its store was reached.
    """
    sealed = seal(request, secret)
    try:
        store.set_timeout(timedelta(seconds=timeout_s))
        store.queue_push(line, sealed)
    except (RuntimeError, dist.DistError) as err:
        raise RendezvousError(f"the daemon's store is gone: {first_line(err)}") from err


def await_answer(store: Store, session: str, secret: str, *, timeout_s: float) -> Answer:
    """Wait for the daemon's answer to ``session``.

    Raises:
        RendezvousError: no answer in time, or not yet.
        RendezvousRefused: the daemon said no; carries its reason.
    """
    data = fetch(store, f"answer/{session}", timeout_s=timeout_s, what="the daemon's answer")
    answer = unseal(data, secret, Answer)
    if answer.refusal and answer.try_again:
        raise RendezvousError(f"the daemon is not ready for a trainer: {answer.refusal}")
    if answer.refusal:
        raise RendezvousRefused(f"the daemon refused this trainer: {answer.refusal}")
    return answer


def fetch(store: Store, key: str, *, timeout_s: float, what: str) -> bytes:
    """Wait for a key and read it.

    Raises:
        RendezvousError: it was not set within ``timeout_s`` seconds, or the store is gone.
    """
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        return bytes(store.get(key))
    except (RuntimeError, dist.DistError) as err:
        raise RendezvousError(f"waited {timeout_s:g} s for {what}: {first_line(err)}") from err


def withdraw(store: Store, session: str) -> None:
    """Take a request back: whoever is admitted and does not come holds the daemon up for its deadline."""
    try:
        store.set(f"withdrawn/{session}", "")
    except (RuntimeError, dist.DistError):
        return  # with the store, the request is gone too


def forget_epochs(store: TCPStore, before: int) -> None:
    """Let go of what earlier epochs' ranks told each other, the layouts of whole models among it.

    Whoever still waits for one of these keys is of an epoch that has ended, and meets its own deadline.
    Anybody may have put keys there; what cannot be let go of stays.
    """
    try:
        for key in store.list_keys():
            if (found := _EPOCHS_KEY.match(key)) is not None and int(found[1]) < before:
                store.delete_key(key)
    except (RuntimeError, ValueError) as err:
        logger.warning("what earlier epochs said stays in the rendezvous: %s", first_line(err))


class Answers:
    """What a daemon tells those who ask; let go of once everybody has read it who will."""

    def __init__(self, kind: str) -> None:
        """``kind`` is what their keys begin with."""
        self._kind = kind
        self._given: deque[tuple[float, str]] = deque()  # when, and to which session

    def give(self, store: TCPStore, message: Answer | Offer, secret: str) -> None:
        """Answer ``message.session``."""
        store.set(f"{self._kind}/{message.session}", seal(message, secret))  # type: ignore[arg-type]  # bytes too
        now = time.monotonic()
        self._given.append((now, message.session))
        while now - self._given[0][0] > ANSWERS_KEPT_S:
            _, old = self._given.popleft()
            try:
                for kind in (self._kind, "withdrawn"):
                    store.delete_key(f"{kind}/{old}")
            except (RuntimeError, ValueError) as err:
                logger.warning("an old answer stays in the rendezvous: %s", first_line(err))


def is_withdrawn(store: Store, request: Request) -> bool:
    """Whether the trainer has given up meanwhile; does not wait."""
    return bool(store.check([f"withdrawn/{request.session}"]))


def await_offer(store: Store, session: str, secret: str, *, timeout_s: float) -> Offer:
    """Wait for a peer's answer to a ``Loan``.

    Raises:
        RendezvousError: no answer in time.
        RendezvousRefused: it was signed with another secret.
    """
    data = fetch(store, f"offer/{session}", timeout_s=timeout_s, what="the peer's offer")
    return unseal(data, secret, Offer)


def next_loan(store: TCPStore, *, secret: str) -> Loan | None:
    """As ``next_request``, of the other queue."""
    return _next(store, LOANS, secret, Loan)


def next_request(store: TCPStore, *, secret: str) -> Request | None:
    """Take the oldest request, or None if there is none; does not wait.

    Raises:
        RendezvousRefused: the request was not signed with our secret.
    """
    return _next(store, REQUESTS, secret, Request)


def _next(store: TCPStore, line: str, secret: str, kind: type[T]) -> T | None:
    if not store.queue_len(line):
        return None
    try:
        data = bytes(store.queue_pop(line, block=False))
    except dist.QueueEmptyError:
        return None  # a stranger was faster; whoever asked meets a deadline of its own
    if len(data) > MAX_REQUEST_BYTES:
        raise RendezvousRefused(
            f"a request of {len(data)} bytes is none; one has {MAX_REQUEST_BYTES} at most"
        )
    return unseal(data, secret, kind)


def local_address(host: str, port: int) -> str:
    """The address of this host's interface that leads to ``host``."""
    family, kind, protocol, address = sockets.address_of(host, port or 9, socket.SOCK_DGRAM)
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def members(trainers: int, other: str) -> Callable[[int], str]:
    """Names the ranks of a group in which ``trainers`` come first, for messages."""
    return lambda rank: f"trainer rank {rank}" if rank < trainers else f"{other} {rank - trainers}"


def make_group(
    store: Store,
    prefix: str,
    *,
    rank: int,
    size: int,
    address: str,
    timeout_s: float,
    named: Callable[[int], str] = "rank {}".format,
) -> Group:
    """Build a Gloo group of our own beside whatever default group the process has.

    Raises:
        RendezvousError: not all ``size`` ranks came within ``timeout_s`` seconds; says which, as ``named``.
    """
    gloo: Any = dist.ProcessGroupGloo  # its stub lacks _Options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    before = sockets.opened()
    try:
        store.set(f"{prefix}/came/{rank}", "")
        group = _form(store, prefix, lambda prefixed: gloo(prefixed, rank, size, options), timeout_s)
    except RuntimeError as err:
        raise RendezvousError(
            f"group {prefix!r} of {size} ranks did not form within {timeout_s:g} s ({named(rank)} on "
            f"{socket.gethostname()}): {_missing(store, prefix, size, named)}{first_line(err)}"
        ) from err
    sockets.keep_alive(before)  # of the data group, nothing goes through it between two rounds
    return group


def _form(store: Store, prefix: str, make: Callable[[PrefixStore], Group], timeout_s: float) -> Group:
    if not isinstance(store, DaemonStore):
        return make(PrefixStore(prefix, raw(store)))
    limit_s = 2 * timeout_s + GRACE_S  # Gloo waits for the others to come, and then for connections to them
    return store.within(lambda raw: make(PrefixStore(prefix, raw)), f"forming {prefix}", limit_s=limit_s)


def _missing(store: Store, prefix: str, size: int, named: Callable[[int], str]) -> str:
    try:
        absent = [named(rank) for rank in range(size) if not store.check([f"{prefix}/came/{rank}"])]
    except RuntimeError:
        return ""  # the store is gone, as the error below says
    return f"{', '.join(absent)} did not come; " if absent else "all came, but could not connect; "


def boot_id() -> str:
    """Names this boot of this kernel: equal for all processes and containers of one host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def describe_process() -> str:
    """Host and pid, for messages."""
    return f"pid {os.getpid()} on {socket.gethostname()}"
