"""The weight-updater daemon: one per node, a sibling of the vLLM server it serves.

Owns the node's socket, the rendezvous, the updaters and the word that asks for a commit. Everything that
happens arrives in one queue and is handled by one thread, in ``Daemon.run``.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bridge import telemetry
from bridge.errors import BridgeError, ConfigError, RendezvousRefused, TransferError
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import CONFIG_NAME, Mapping, Rendezvous
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire import rendezvous
from bridge.wire.control import Event
from vllm_patching import residue
from vllm_patching.channel import Channel, ChannelClosed, PeerRefused, listen, socket_path
from vllm_patching.crew import Crew, Report
from vllm_patching.epoch import Epoch, Limits, inactive_half
from vllm_patching.registry import Member, Registry

logger = logging.getLogger("vllm_patching.daemon")  # __name__ is __main__ here

WAKE_INTERVAL_S = 0.05
COMMIT_POLL_S = 0.0005
DOORMAN_POLL_S = 0.05
HELLO_TIMEOUT_S = 30.0
STAGE_FILE_TIMEOUT_S = 600.0
VLLM_EXIT_TIMEOUT_S = 20.0
MAX_IDLE_DEATHS = 5


@dataclass(frozen=True)
class Requested:
    """A trainer asks to be admitted."""

    request: rendezvous.Request


@dataclass(frozen=True)
class Heard:
    """Something came on an epoch's control group; of an earlier epoch, it is ignored."""

    epoch: Epoch
    event: Event


@dataclass(frozen=True)
class Notified:
    """Somebody announces an update file; ``reply`` takes the answer."""

    path: str
    version: int | None
    reply: queue.Queue[dict[str, Any]]


@dataclass(frozen=True)
class Lost:
    """A vLLM process is gone."""

    who: str


@dataclass(frozen=True)
class Stop:
    """The daemon is to end."""

    why: str


class Daemon:
    """State of the node. Only ``run``'s thread changes it, but for the registry, which has a lock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.limits = Limits(args.heartbeat_interval, args.deadline, args.commit_timeout)
        self.events: queue.Queue[Any] = queue.Queue()
        self.registry = Registry(on_change=lambda: self.events.put(None))
        self.mapping: Mapping | None = None
        self.store: Any = None
        self.secret = secrets.token_hex(16)
        self.crew: Crew | None = None
        self.epoch: Epoch | None = None
        self.epochs = 0
        self.committed = 0
        self.aborted = 0
        self.idle_deaths = 0
        self.failed = ""
        self.last_error: str | None = None
        self.last_round: dict[str, Any] | None = None
        self._vllm_pids: set[int] = set()
        self._shm: set[Path] = set()
        self._stopping = threading.Event()
        self._doorman_thread: threading.Thread | None = None

    # --- the one loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Handle events until told to stop; returns the exit code."""
        listener = listen(self.args.run_dir)
        self._thread("bridge-accept", self._accept, listener)
        signal.signal(signal.SIGTERM, lambda *_: self.events.put(Stop("SIGTERM")))
        signal.signal(signal.SIGINT, lambda *_: self.events.put(Stop("SIGINT")))
        logger.info("listening on %s", socket_path(self.args.run_dir))
        try:
            while True:
                event = self.events.get()
                if isinstance(event, Stop):
                    logger.info("ending: %s", event.why)
                    return 0
                self._handle(event)
        except BridgeError as err:
            logger.error("%s", err)
            self.last_error = str(err)
            return err.exit_code
        finally:
            self._end(listener)

    def _handle(self, event: Any) -> None:
        if isinstance(event, Lost):
            self._vllm_lost(event.who)
        elif isinstance(event, Requested):
            self._admit(event.request)
        elif isinstance(event, Notified):
            event.reply.put(self._stage_file(event))
        elif isinstance(event, Report):
            if self.epoch is not None and event.crew is self.epoch.crew:
                self.epoch.on_report(event)
            elif event.crew is self.crew and event.message is None:
                self._replace_idle_crew(self.crew.describe(event.rank))
        elif isinstance(event, Heard) and event.epoch is self.epoch:
            event.epoch.on_control(event.event)
        if self.mapping is None and self.registry.complete:
            self._publish()
        if self.epoch is not None:
            self._settle(self.epoch)

    def _settle(self, epoch: Epoch) -> None:
        """Do what the last event led to: a commit, the end of the epoch, or both."""
        if epoch.pending_commit is not None:
            version, epoch.pending_commit = epoch.pending_commit, None
            try:
                flips = self.commit(version)
            except TransferError as err:
                epoch.on_committed(None, str(err))
            else:
                receipt = epoch.receipt(flips)
                self.last_round = msgspec.json.decode(receipt)
                self.committed += 1
                logger.info("epoch %d: version %d is live: %s", epoch.epoch, version, receipt)
                epoch.on_committed(receipt, "")
        if epoch.closed is not None:
            self._close_epoch(epoch)

    def _close_epoch(self, epoch: Epoch) -> None:
        if epoch.closed:
            self.aborted += 1
            self.last_error = epoch.closed
            logger.error(
                "epoch %d ended: %s; version %d is served on", epoch.epoch, epoch.closed, self.version
            )
        else:
            logger.info("epoch %d ended in order at version %d", epoch.epoch, self.version)
        self.epoch = None
        epoch.close()
        self._new_crew()

    # --- publication -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version every rank serves or is about to."""
        return self.registry.control.requested if self.registry.control else 0

    def _publish(self) -> None:
        args = self.args
        mapping = self.registry.mapping()
        self.store = rendezvous.serve_store(args.rendezvous_host, args.rendezvous_port)
        meeting = Rendezvous(host=args.rendezvous_host, port=self.store.port, secret=self.secret)
        data = mapping_file.encode(
            msgspec.structs.replace(mapping, rendezvous=meeting, run_dir=str(args.run_dir))
        )
        self.mapping = mapping_file.decode(data, origin="the mapping just built")
        path = args.logdir / CONFIG_NAME
        mapping_file.write_atomically(path, data)
        logger.info(
            "all %d rank(s) published; mapping %s (%d bytes), rendezvous %s:%d",
            mapping.num_inference_ranks,
            path,
            len(data),
            meeting.host,
            meeting.port,
        )
        self._new_crew()
        self._doorman_thread = self._thread("bridge-doorman", self._doorman)
        self._shm = residue.snapshot(self._vllm_pids)

    def _new_crew(self) -> None:
        if self.crew is not None:
            self.crew.end()
        assert self.mapping is not None
        self.crew = Crew(self.mapping.num_inference_ranks, self.args.run_dir, self.events)

    def _replace_idle_crew(self, who: str) -> None:
        self.idle_deaths += 1
        if self.idle_deaths > MAX_IDLE_DEATHS:
            raise TransferError(f"{who} died without a round under way, like {MAX_IDLE_DEATHS} before it; giving up")
        logger.error("%s died while idle; starting another crew", who)
        self._new_crew()

    def _vllm_lost(self, who: str) -> None:
        self.last_error = f"{who} is gone"
        logger.error("%s", self.last_error)
        if self.epoch is not None:
            self.epoch.shut_down(self.last_error)

    # --- rounds ------------------------------------------------------------------------------------

    def _doorman(self) -> None:
        """Look for trainers that knock; ``_admit`` lets them in or sends them away."""
        ticket = 1
        while not self._stopping.wait(DOORMAN_POLL_S):
            try:
                request = rendezvous.next_request(self.store, ticket, secret=self.secret)
            except RendezvousRefused as err:
                logger.warning("ignored a stranger at the rendezvous: %s", err)
                ticket += 1
                continue
            if request is not None:
                self.events.put(Requested(request))
                ticket += 1

    def _admit(self, request: rendezvous.Request) -> None:
        if refusal := self._refusal(request):
            logger.warning("refused a trainer (pid %d on %s): %s", request.pid, request.host, refusal)
            self._answer(rendezvous.Answer(session=request.session, refusal=refusal))
            return
        assert self.crew is not None and self.mapping is not None and self.registry.control is not None
        self.epochs += 1
        epoch = Epoch(
            request,
            epoch=self.epochs,
            version=self.version,
            crew=self.crew,
            control=self.registry.control,
            limits=self.limits,
        )
        self._answer(
            rendezvous.Answer(
                session=request.session,
                epoch=self.epochs,
                weight_version=self.version,
                num_inference_ranks=self.mapping.num_inference_ranks,
                daemon_pid=os.getpid(),
                heartbeat_interval_s=self.limits.heartbeat_interval_s,
                deadline_s=self.limits.deadline_s,
                bucket_bytes=self.args.bucket_bytes,
            )
        )
        self.epoch = epoch
        self.idle_deaths = 0
        address = (self.args.rendezvous_host, self.store.port)
        try:
            epoch.open(
                self.store,
                address=address,
                transport=self.args.transport,
                deliver=lambda event: self.events.put(Heard(epoch, event)),
            )
        except BridgeError as err:
            epoch.fail(f"epoch {self.epochs} could not be opened: {err}")
            return
        logger.info("epoch %d: %s joined at version %d", self.epochs, epoch.trainer, self.version)

    def _refusal(self, request: rendezvous.Request) -> str:
        assert self.mapping is not None
        if request.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol {request.protocol_version}, this daemon {PROTOCOL_VERSION}"
        if request.mapping_digest != self.mapping.digest:
            return (
                f"its mapping has digest {request.mapping_digest[:16]}.., this server's has "
                f"{self.mapping.digest[:16]}..; it must read {self.args.logdir / CONFIG_NAME} of this run"
            )
        if self.epoch is not None:
            return f"another trainer is connected (epoch {self.epoch.epoch}): {self.epoch.trainer}"
        if not self.registry.complete:
            return f"the server is not complete: {self.last_error}"
        return ""

    def _answer(self, answer: rendezvous.Answer) -> None:
        self.store.set(f"answer/{answer.session}", rendezvous.seal(answer, self.secret))

    def commit(self, version: int) -> list[int]:
        """Ask the engine to make ``version`` live and wait until every rank has; returns flip times in ns.

        Raises:
            TransferError: a rank failed to flip (the engine is ended then), or the deadline passed.
        """
        page, engine = self.registry.control, self.registry.engine
        assert page is not None and self.mapping is not None
        slots = [page.slot(rank) for rank in range(self.mapping.num_inference_ranks)]
        failures = [slot.failures for slot in slots]
        page.requested = version
        deadline = time.monotonic() + self.limits.commit_timeout_s
        next_wake = 0.0
        pause = threading.Event()
        # Workers answer by a word in shared memory, in the middle of their step: there is nothing to wait
        # on but the word, for about one decode step.
        while any(slot.version != version for slot in slots):
            now = time.monotonic()
            if any(s.failures != f for s, f in zip(slots, failures, strict=True)):
                self._end_engine(f"a rank could not flip to version {version}; ranks would differ")
                raise TransferError(f"version {version}: a rank could not flip; the server was ended")
            if now > deadline or self.registry.engine is not engine or engine is None:
                behind = [rank for rank, slot in enumerate(slots) if slot.version != version]
                raise TransferError(
                    f"version {version} was staged, but ranks {behind} did not commit within "
                    f"{self.limits.commit_timeout_s:g} s; it becomes live with their next batch"
                )
            if now >= next_wake:
                self._wake(engine)
                next_wake = now + WAKE_INTERVAL_S
            pause.wait(COMMIT_POLL_S)
        return [slot.flip_ns for slot in slots]

    def _wake(self, engine: Member) -> None:
        try:
            engine.channel.send({"type": "wake"})
        except ChannelClosed:
            logger.debug("the engine's connection ended; its reader reports it")

    def _end_engine(self, why: str) -> None:
        engine = self.registry.engine
        logger.critical("%s; ending the engine", why)
        if engine is not None:
            os.kill(engine.hello["pid"], signal.SIGKILL)

    def _stage_file(self, event: Notified) -> dict[str, Any]:
        """Stage a version from a file and commit it; the HTTP fallback's whole round."""
        try:
            version = self._check_notification(event)
            assert self.crew is not None and self.registry.control is not None
            start = time.monotonic()
            self.crew.wait_all(self.limits.deadline_s * 2)
            page = self.registry.control
            halves = {r: {"half": inactive_half(page, r)} for r in range(self.crew.num_ranks)}
            self.crew.order({"type": "stage_file", "path": event.path}, halves)
            reports = self._await_reports(self.crew)
            flips = self.commit(version)
        except BridgeError as err:
            self.aborted += 1
            self.last_error = str(err)
            logger.error("update from %s: %s", event.path, err)
            return {"type": "update_result", "ok": False, "version": self.version, "error": str(err)}
        self.committed += 1
        self.last_round = {
            "version": version,
            "bytes": sum(r["bytes"] for r in reports),
            "transfer_s": max(r["seconds"] for r in reports),
            "stage_s": time.monotonic() - start,
            "flip_s": max(flips) / 1e9,
            "transport": "file",
        }
        logger.info("version %d is live: %s", version, self.last_round)
        return {"type": "update_result", "ok": True, "version": version, "error": ""}

    def _check_notification(self, event: Notified) -> int:
        if self.mapping is None or not self.registry.complete:
            raise ConfigError("the server is not complete yet")
        if self.epoch is not None:
            raise ConfigError(
                f"a trainer is connected by process group ({self.epoch.trainer}); it must use broadcast_weights"
            )
        allowed = self.args.update_dir.resolve()
        if not Path(event.path).resolve().is_relative_to(allowed):
            raise ConfigError(f"{event.path} is not below {allowed}; see --update-dir")
        version = self.version + 1 if event.version is None else event.version
        if version <= self.version:
            raise ConfigError(f"version {version} offered, version {self.version} is served already")
        return version

    def _await_reports(self, crew: Crew) -> list[dict[str, Any]]:
        """Collect one report per rank; other events wait their turn."""
        reports: dict[int, dict[str, Any]] = {}
        errors: list[str] = []
        kept: list[Any] = []
        deadline = time.monotonic() + STAGE_FILE_TIMEOUT_S
        while len(reports) + len(errors) < crew.num_ranks:
            try:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TransferError(f"updaters did not stage within {STAGE_FILE_TIMEOUT_S:g} s") from None
            if not (isinstance(event, Report) and event.crew is crew):
                kept.append(event)
            elif event.message is None:
                errors.append(f"{crew.describe(event.rank)} died")
            elif event.message["type"] == "failed":
                errors.append(event.message["error"])
            else:
                reports[event.rank] = event.message
        for event in kept:
            self.events.put(event)
        if errors:
            self._new_crew()
            raise TransferError("\n".join(dict.fromkeys(errors)))
        return list(reports.values())

    # --- the node's socket ---------------------------------------------------------------------------

    def _thread(self, name: str, target: Any, *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
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
            self._thread("bridge-connection", self._converse, channel)

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
            return self.status()
        if kind == "shutdown":
            self.events.put(Stop("shutdown requested"))
            return {"type": "ok"}
        if kind == "notify_update":
            reply: queue.Queue[dict[str, Any]] = queue.Queue()
            self.events.put(Notified(str(message["path"]), message.get("version"), reply))
            return reply.get(timeout=STAGE_FILE_TIMEOUT_S + self.limits.commit_timeout_s)
        return {"type": "error", "error": f"unknown request {kind!r}"}

    def _keep(self, hello: dict[str, Any], fds: tuple[int, ...], channel: Channel) -> None:
        try:
            member = self.registry.admit(hello, channel, fds)
        except ConfigError as err:
            self.failed = self.last_error = str(err)
            channel.send({"type": "error", "error": str(err)})
            channel.close()
            return
        self._vllm_pids.add(hello["pid"])
        logger.info("%s registered", member.who)
        channel.sock.settimeout(None)
        try:
            channel.receive()  # members only ever listen; the end of the stream is their death
        except BridgeError:
            pass  # reported below, with a name
        self.registry.forget(member)
        self.events.put(Lost(member.who))

    def _welcome_updater(self, hello: dict[str, Any], channel: Channel) -> None:
        rank, crew = hello["rank"], self.crew
        if crew is None or crew.processes[rank].pid != hello["pid"] or self.mapping is None:
            channel.send({"type": "error", "error": f"pid {hello['pid']} is not this daemon's updater"})
            channel.close()
            return
        with self.registry.lock:
            fds = self.registry.workers[rank].fds
            channel.send({"type": "welcome", "mapping": msgspec.to_builtins(self.mapping)}, fds)
        crew.adopt(rank, channel)

    def status(self) -> dict[str, Any]:
        """What ``status`` shows; read from whatever is there at the moment."""
        mapping, epoch, page = self.mapping, self.epoch, self.registry.control
        world_size = self.registry.world_size
        if self.failed:
            state = "failed"
        elif mapping is None:
            state = "waiting"
        else:
            state = "round" if epoch and epoch.machine.state.value != "idle" else "ready"
        here = len(self.registry.workers)
        detail = f"{here} of {world_size or '?'} worker(s) and {int(self.registry.engine is not None)} engine"
        ranks = range(mapping.num_inference_ranks) if mapping and page else range(0)
        return {
            "type": "status",
            "state": state,
            "detail": self.failed or detail,
            "weight_version": min((page.slot(r).version for r in ranks), default=0) if page else 0,
            "requested_version": self.version,
            "epoch": self.epochs,
            "model": mapping.model if mapping else "",
            "world_size": world_size,
            "pids": {
                "daemon": os.getpid(),
                **self.registry.pids(),
                "updaters": self.crew.pids() if self.crew else [],
            },
            "rendezvous": f"{self.args.rendezvous_host}:{self.store.port}" if self.store else None,
            "trainer": epoch.trainer if epoch else None,
            "bucket": epoch.machine.progress if epoch else -1,
            "rounds": {"committed": self.committed, "aborted": self.aborted},
            "last_error": self.last_error,
            "last_round": self.last_round,
            "ranks": [
                {
                    "rank": r,
                    "version": page.slot(r).version,
                    "batch": page.slot(r).batch,
                    "active_half": page.slot(r).active,
                }
                for r in ranks
                if page
            ],
        }

    # --- the end -----------------------------------------------------------------------------------

    def _end(self, listener: socket.socket) -> None:
        self._stopping.set()
        if self._doorman_thread is not None:
            self._doorman_thread.join()  # it holds the store, which must not be used while it is torn down
        if self.epoch is not None:
            self.epoch.shut_down("the weight-updater daemon ends")
            self.epoch.close()
        if self.crew is not None:
            self.crew.end()
        listener.close()
        socket_path(self.args.run_dir).unlink(missing_ok=True)
        if os.getppid() != self.args.launcher_pid:
            # The launcher was killed: nobody else is left to clean up behind vLLM.
            residue.end_processes(self._vllm_pids, timeout_s=VLLM_EXIT_TIMEOUT_S)
            for path in residue.sweep(self._shm):
                logger.info("removed %s, left behind by vLLM", path)
            residue.remove_run_dir(self.args.run_dir)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The daemon's command line; the launcher writes it."""
    parser = argparse.ArgumentParser(prog="vllm_patching.daemon", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--rendezvous-host", default="127.0.0.1")
    parser.add_argument("--rendezvous-port", type=int, default=0)
    parser.add_argument("--heartbeat-interval", type=float, default=2.0)
    parser.add_argument("--deadline", type=float, default=15.0)
    parser.add_argument("--commit-timeout", type=float, default=120.0)
    parser.add_argument("--bucket-bytes", type=int, default=64 << 20)
    parser.add_argument("--transport", choices=("auto", "pull", "gloo"), default="auto")
    parser.add_argument("--prefix-cache", choices=("salt", "keep"), default="salt")
    parser.add_argument("--update-dir", type=Path)
    parser.add_argument("--launcher-pid", type=int, default=os.getppid())
    args = parser.parse_args(argv)
    args.update_dir = args.update_dir or args.logdir
    return args


def main() -> int:
    """Entry point: ``python -m vllm_patching.daemon``."""
    telemetry.configure(role="daemon")
    return Daemon(parse_args(sys.argv[1:])).run()


if __name__ == "__main__":
    raise SystemExit(main())
