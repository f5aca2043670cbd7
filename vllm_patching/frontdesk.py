"""The daemon's end of the node's socket: who connects, what they ask, and when a member of vLLM is gone."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from bridge.errors import BridgeError, ConfigError, ProtocolError, TransferError
from vllm_patching import build, introductions
from vllm_patching.build import OtherCode
from vllm_patching.channel import Channel, PeerRefused, close_all, connections
from vllm_patching.events import ASKED, Broken, Lost, Notified, Stop
from vllm_patching.file_round import STAGE_FILE_TIMEOUT_S
from vllm_patching.introductions import (
    EngineHello,
    LenderHello,
    RoundRequest,
    ShutdownRequest,
    StatusRequest,
    UpdateRequest,
    UpdaterHello,
    WorkerHello,
)
from vllm_patching.status import Status

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon
    from vllm_patching.follower import Follower

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 30.0
MEMBERS = ("worker", "engine")
INTRODUCE_THEMSELVES = (*MEMBERS, "updater", "lender")
FOLLOWS = "this node follows another; ask the daemon of node 0"


def start_thread(name: str, target: Callable[..., None], *args: Any) -> threading.Thread:
    """Start a thread that does not keep the daemon from ending."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


class FrontDesk:
    """Answers connections in threads of their own; what changes the daemon's state goes into its queue."""

    def __init__(self, daemon: Daemon | Follower, head: Daemon | None = None) -> None:
        """``head`` is the same daemon where it has rounds of its own."""
        self._daemon = daemon
        self._head = head

    def accept(self, listener: socket.socket) -> None:
        """Let connections in until ``listener`` is closed; each is answered by a thread of its own."""
        for sock in connections(listener, "a connection", lambda: listener.fileno() < 0):
            sock.settimeout(HELLO_TIMEOUT_S)
            try:
                channel = Channel(sock)
            except PeerRefused as err:
                logger.warning("%s", err)
                continue
            start_thread("bridge-connection", self._converse, channel)

    def _converse(self, channel: Channel) -> None:
        """Answer one connection's first message, and stay with it if it is a member's."""
        try:
            message, fds = channel.receive()
            try:
                if message.get("type") in INTRODUCE_THEMSELVES:
                    build.check(message, f"{message['type']} (pid {channel.pid})")
                request = introductions.read(message)
            except BridgeError as err:
                close_all(fds)
                if isinstance(err, OtherCode):
                    self._cannot_go_on(message["type"], channel.pid, err)
                self._refuse(channel, err)
                return
            if isinstance(request, WorkerHello | EngineHello):
                self._keep(message, fds, channel)
                return
            close_all(fds)  # only members hand memory over
            if isinstance(request, UpdaterHello):
                self._welcome_updater(request, channel)
                return
            if isinstance(request, LenderHello):
                self._welcome_lender(request, channel)
            else:
                channel.send(self._reply(request))
        except (BridgeError, TimeoutError) as err:
            logger.warning("a connection of pid %d ended: %s", channel.pid, err)
        channel.close()

    def _cannot_go_on(self, kind: str, pid: int, err: OtherCode) -> None:
        """A process of our own runs other code, as will those to come; only lenders can be done without."""
        crew = self._daemon.crew
        if kind in MEMBERS:
            self._daemon.failed = self._daemon.last_error = str(err)
        elif kind == "updater" and crew is not None and pid in {p.pid for p in crew.processes.values()}:
            self._daemon.events.put(Broken(str(err)))

    def _refuse(self, channel: Channel, err: BridgeError) -> None:
        logger.warning("pid %d was refused: %s", channel.pid, err)
        try:
            channel.send({"type": "error", "error": str(err)})
        finally:
            channel.close()

    def _reply(
        self, request: StatusRequest | ShutdownRequest | UpdateRequest | RoundRequest
    ) -> dict[str, Any]:
        if isinstance(request, StatusRequest):
            return _answer(self._daemon.describe())
        if isinstance(request, ShutdownRequest):
            self._daemon.events.put(Stop(request.why or ASKED, final=True))
            return {"type": "ok"}
        if (head := self._head) is None:
            return {"type": "error", "error": FOLLOWS}
        if isinstance(request, RoundRequest):
            return self._await_round(head, request)
        reply: queue.Queue[dict[str, Any]] = queue.Queue()
        head.events.put(Notified(request.path, request.version, reply))
        patience_s = STAGE_FILE_TIMEOUT_S + head.limits.commit_timeout_s
        try:
            return reply.get(timeout=patience_s)
        except queue.Empty:
            raise TransferError(
                f"no outcome of the update from {request.path} within {patience_s:g} s"
            ) from None

    def _await_round(self, here: Daemon, order: RoundRequest) -> dict[str, Any]:
        """The status, once what is waited for has come, or cannot come any more, or time is up.

        With a ``version`` that is its commit, or an abort more than ``aborted``; without, the end of more
        rounds than ``ended``. Another daemon than ``daemon`` has counted none of them.
        """
        version = order.version

        def settled() -> bool:
            if order.daemon != os.getpid():
                return True
            if version is None:
                return bool(here.rounds_ended > order.ended)
            return bool(here.live_version >= version or here.aborted > order.aborted)

        with here.handled:
            here.handled.wait_for(settled, timeout=order.timeout_s)
        return _answer(here.describe())

    def _keep(self, hello: dict[str, Any], fds: tuple[int, ...], channel: Channel) -> None:
        try:
            member = self._daemon.registry.admit(hello, channel, fds)
        except BridgeError as err:
            page = self._daemon.registry.control
            close_all(fd for fd in fds if page is None or fd != page.fd)
            if isinstance(err, ConfigError):
                self._daemon.failed = self._daemon.last_error = str(err)
                self._refuse(channel, err)
                return
            raise
        self._daemon.vllm_pids.add(hello["pid"])
        logger.info("%s registered", member.who)
        channel.sock.settimeout(None)
        try:
            _, more = channel.receive()  # members only ever listen; the end of the stream is their death
            close_all(more)
        except BridgeError:
            pass  # reported below, with a name
        self._daemon.registry.forget(member)
        self._daemon.vllm_pids.discard(hello["pid"])  # by the time it is looked at, it may be a stranger's
        self._daemon.events.put(Lost(member.who))

    def _welcome_updater(self, hello: UpdaterHello, channel: Channel) -> None:
        rank, crew, head = hello.rank, self._daemon.crew, self._head
        if head is not None:  # it may have been started ahead, and is ended if that was in vain
            with head.handled:
                head.handled.wait_for(lambda: head.published or head.crew is not crew)
        mapping = self._daemon.mapping
        process = crew.processes.get(rank) if crew is not None else None
        if crew is None or process is None or process.pid != hello.pid or mapping is None:
            self._refuse(channel, ProtocolError(f"pid {hello.pid} is not this daemon's updater"))
            return
        with self._daemon.registry.lock:
            worker, page = self._daemon.registry.workers.get(rank), self._daemon.registry.control
            if worker is None or page is None:  # it has died, and its connection says so elsewhere
                self._refuse(channel, ProtocolError(f"worker rank {rank} is not registered any more"))
                return
            memory = {key: worker.hello[key] for key in ("gpu", "handles", "arena")}
            welcome = {"mapping": msgspec.to_builtins(mapping), **memory}
            channel.send({"type": "welcome", **welcome}, (*worker.fds, page.fd))
        crew.adopt(rank, channel)

    def _welcome_lender(self, hello: LenderHello, channel: Channel) -> None:
        """Show the helper what is live: one message for each rank."""
        if self._head is None:
            channel.send({"type": "error", "error": FOLLOWS})
            return
        lending, mapping, registry = self._head.lending, self._head.mapping, self._head.registry
        with registry.lock:
            workers = [registry.workers.get(rank) for rank in range(len(lending.halves))]
            if hello.pid != lending.pid or mapping is None or None in workers:
                channel.send({"type": "error", "error": f"pid {hello.pid} is not this daemon's lender"})
                return
            channel.send({"type": "welcome", "mapping": msgspec.to_builtins(mapping)})
            for worker, half in zip(workers, lending.halves, strict=True):
                assert worker is not None
                memory = {key: worker.hello[key] for key in ("gpu", "handles", "arena")}
                channel.send({"type": "memory", "half": half, **memory}, worker.fds)


def _answer(status: Status) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(status)
    return made
