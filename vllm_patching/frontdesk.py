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

from bridge.errors import BridgeError, ConfigError
from vllm_patching.channel import Channel, PeerRefused
from vllm_patching.events import ASKED, Lost, Notified, Stop
from vllm_patching.file_round import STAGE_FILE_TIMEOUT_S

if TYPE_CHECKING:
    from vllm_patching.daemon import Daemon
    from vllm_patching.follower import Follower

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 30.0


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
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed: the daemon ends
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
            kind = message.get("type")
            if kind in ("worker", "engine"):
                self._keep(message, fds, channel)
                return
            if kind == "updater":
                self._welcome_updater(message, channel)
                return
            channel.send(self._reply(message))
        except (BridgeError, TimeoutError) as err:
            logger.warning("a connection of pid %d ended: %s", channel.pid, err)
        channel.close()

    def _reply(self, message: dict[str, Any]) -> dict[str, Any]:
        kind = message.get("type")
        if kind == "status":
            return self._daemon.describe()
        if kind == "shutdown":
            self._daemon.events.put(Stop(message.get("why") or ASKED, final=True))
            return {"type": "ok"}
        head = self._head
        if head is None:
            return {"type": "error", "error": "this node follows another; ask the daemon of node 0"}
        if kind == "await_round":
            return self._await_round(head, message)
        if kind == "notify_update":
            reply: queue.Queue[dict[str, Any]] = queue.Queue()
            head.events.put(Notified(str(message["path"]), message.get("version"), reply))
            return reply.get(timeout=STAGE_FILE_TIMEOUT_S + head.limits.commit_timeout_s)
        return {"type": "error", "error": f"unknown request {kind!r}"}

    def _await_round(self, here: Daemon, order: dict[str, Any]) -> dict[str, Any]:
        """The status, once what is waited for has come, or cannot come any more, or time is up.

        With a ``version`` that is its commit, or an abort more than ``aborted``; without, the end of more
        rounds than ``ended``. Another daemon than ``daemon`` has counted none of them.
        """
        version = order["version"]

        def settled() -> bool:
            if order["daemon"] != os.getpid():
                return True
            if version is None:
                return bool(here.rounds_ended > order["ended"])
            return bool(here.live_version >= version or here.aborted > order["aborted"])

        with here.handled:
            here.handled.wait_for(settled, timeout=order["timeout_s"])
        return here.describe()

    def _keep(self, hello: dict[str, Any], fds: tuple[int, ...], channel: Channel) -> None:
        try:
            member = self._daemon.registry.admit(hello, channel, fds)
        except ConfigError as err:
            self._daemon.failed = self._daemon.last_error = str(err)
            channel.send({"type": "error", "error": str(err)})
            channel.close()
            return
        self._daemon.vllm_pids.add(hello["pid"])
        logger.info("%s registered", member.who)
        channel.sock.settimeout(None)
        try:
            channel.receive()  # members only ever listen; the end of the stream is their death
        except BridgeError:
            pass  # reported below, with a name
        self._daemon.registry.forget(member)
        self._daemon.events.put(Lost(member.who))

    def _welcome_updater(self, hello: dict[str, Any], channel: Channel) -> None:
        rank, crew, mapping = hello["rank"], self._daemon.crew, self._daemon.mapping
        if crew is None or crew.processes[rank].pid != hello["pid"] or mapping is None:
            channel.send({"type": "error", "error": f"pid {hello['pid']} is not this daemon's updater"})
            channel.close()
            return
        with self._daemon.registry.lock:
            worker = self._daemon.registry.workers[rank]
            memory = {key: worker.hello[key] for key in ("gpu", "handles", "arena")}
            welcome = {"mapping": msgspec.to_builtins(mapping), **memory}
            channel.send({"type": "welcome", **welcome}, worker.fds)
        crew.adopt(rank, channel)
