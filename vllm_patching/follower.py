"""The weight-updater daemon of a node that follows another: a limb of the head's daemon on node 0.

It serves its node's socket and runs its node's updaters, as the head's does on its own, and says over a
``Link`` what its workers and updaters do. It decides nothing. When the link breaks it ends its updaters, so
that nothing of a round that the head gives up is written any more, and looks for the head again.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bridge import flight, telemetry
from bridge.errors import (
    BridgeError,
    ConfigError,
    PeerLost,
    RendezvousError,
    RendezvousRefused,
    TransferError,
)
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import Mapping
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire import rendezvous
from vllm_patching import arguments, residue
from vllm_patching import link as wire
from vllm_patching.build import BUILD
from vllm_patching.channel import listen, socket_path
from vllm_patching.crew import Crew, Report
from vllm_patching.events import ASKED, Broken, Lost, Stop
from vllm_patching.frontdesk import FrontDesk, start_thread
from vllm_patching.link import Link
from vllm_patching.nodes import FILE_NAME, read_meeting
from vllm_patching.registry import Registry
from vllm_patching.status import NodesHere, Pids, Rounds, StateName, Status, ranks_of
from vllm_patching.waiting import Wait

logger = logging.getLogger("vllm_patching.follower")  # __name__ is __main__ here

CONNECT_TIMEOUT_S = 10.0
RETRY_S = 0.2
WATCH_S = 0.001  # how late a flip that the head waits for is told
GLANCE_S = 0.1  # and any other


@dataclass(frozen=True)
class _Met:
    """The head has let us in."""

    link: Link
    welcome: wire.Welcome
    secret: str


@dataclass(frozen=True)
class _Said:
    """A frame of the head."""

    link: Link
    frame: wire.Frame


@dataclass(frozen=True)
class _Parted:
    """A link has ended."""

    link: Link
    why: str


@dataclass(frozen=True)
class _Failed:
    """There is no head for us, or none that will have us."""

    error: BridgeError


def read_launch(path: Path) -> str:
    """The launch of which an earlier daemon of this node was a part; "" if there was none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    if re.fullmatch(rb"[\w-]{0,64}", data) is None:
        raise ConfigError(f"{path} holds {data[:32]!r}, which names no launch; end the launcher")
    return data.decode()


class Follower:
    """State of a following node. Only ``run``'s thread changes it, but for the registry, which has a lock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()  # a signal handler puts into it
        self.registry = Registry(on_change=lambda: self.events.put(None))
        self.mapping: Mapping | None = None
        self.crew: Crew | None = None
        self.link: Link | None = None
        self.welcome: wire.Welcome | None = None
        self.address = ""  # ours, on the way to the head
        self.failed = ""
        self.last_error: str | None = None
        self.vllm_pids: set[int] = set()
        self._secret = ""
        self._crew_number = 0
        self._epoch: int | None = None  # of the trainer whose round this crew takes part in
        self._told: dict[int, int] = {}  # rank -> pid of the worker the head was told of
        self._announced = 0  # how often it was told of one
        self._watched = threading.Event()
        self._stopping = threading.Event()
        self._launch_file: Path = args.run_dir / residue.LAUNCH_FILE
        self._launch = read_launch(self._launch_file)

    # --- the one loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Handle events until told to stop; returns the exit code: 0 after an orderly end of the server."""
        listener = listen(self.args.run_dir)
        start_thread("bridge-accept", FrontDesk(self).accept, listener)
        signal.signal(signal.SIGTERM, lambda *_: self.events.put(Stop("SIGTERM")))
        signal.signal(signal.SIGINT, lambda *_: self.events.put(Stop("SIGINT")))
        logger.info("node %d: listening on %s", self.args.node_rank, socket_path(self.args.run_dir))
        start_thread("bridge-seek", self._seek, self.args.start_timeout)
        start_thread("bridge-watch", self._watch)
        try:
            while True:
                event = self.events.get()
                if isinstance(event, Stop):
                    # A signal is not the launcher's order: it starts another daemon.
                    return 0 if self._stop(event) else 128 + signal.Signals[event.why]
                if isinstance(event, _Said) and isinstance(event.frame, wire.End):
                    if not event.frame.why:
                        logger.info("node 0 has ended in order")
                        return 0
                    raise PeerLost(f"node 0 has ended: {event.frame.why}")
                if isinstance(event, _Failed):
                    raise event.error
                if isinstance(event, Broken):
                    raise TransferError(event.why)
                self._handle(event)
        except BridgeError as err:
            logger.error("%s", err)
            flight.write(f"the daemon ended: {err}", self.args.logdir / f"node{self.args.node_rank}")
            self.last_error = str(err)
            return err.exit_code
        finally:
            self._end(listener)

    def _stop(self, event: Stop) -> bool:
        """Whether the server's part on this node ends with the daemon."""
        orphaned = os.getppid() != self.args.launcher_pid
        why = f"the launcher (pid {self.args.launcher_pid}) died" if orphaned else event.why
        logger.info("ending: %s", why)
        if event.final or orphaned:
            self._tell(wire.Leave("it was asked to" if why == ASKED else why))
        return event.final or orphaned

    def _handle(self, event: Any) -> None:
        if isinstance(event, _Met):
            self._join(event)
        elif isinstance(event, _Parted) and event.link is self.link:
            self._part(event.why)
        elif isinstance(event, _Said) and event.link is self.link:
            self._obey(event.frame)
        elif isinstance(event, Report) and event.crew is self.crew:
            who = self.crew.describe(event.rank)
            if event.message is None:
                who = f"{who} on {socket.gethostname()}"
            self._tell(wire.Reported(self._crew_number, event.rank, event.message, who))
        elif isinstance(event, Lost):
            self.last_error = f"{event.who} is gone"
            logger.error("%s", self.last_error)
        self._tell_members()

    # --- the head ----------------------------------------------------------------------------------

    def _seek(self, timeout_s: float) -> None:
        """Look for the head until it lets us in, and hear it until the link ends; a thread of its own."""
        deadline, last = time.monotonic() + timeout_s, "it was not asked yet"
        while not self._stopping.is_set():
            try:
                met = self._knock()
            except (ConfigError, RendezvousRefused) as err:
                self.events.put(_Failed(err))
                return
            except BridgeError as err:
                if str(err) != last:
                    logger.info("waiting for node 0: %s", err)
                last = str(err)
            else:
                self.events.put(met)
                self._hear(met.link)
                return
            if time.monotonic() > deadline:
                where = self.args.logdir / FILE_NAME
                error = RendezvousError(f"node 0 was not met within {timeout_s:g} s by {where}: {last}")
                self.events.put(_Failed(error))
                return
            self._stopping.wait(RETRY_S)

    def _knock(self) -> _Met:
        """One try.

        Raises:
            ConfigError: the head will never have us.
            RendezvousRefused: it is of another start of the server than our workers.
            BridgeError: it is not there, or has no place for us yet.
        """
        meeting, args = read_meeting(self.args.logdir), self.args
        try:
            sock = socket.create_connection((meeting.host, meeting.port), timeout=CONNECT_TIMEOUT_S)
        except OSError as err:
            raise RendezvousError(f"nobody answers at {meeting.host}:{meeting.port}: {err}") from err
        try:
            link = Link(sock, meeting.secret, role=wire.FOLLOWER, deadline_s=CONNECT_TIMEOUT_S)
            link.send(
                wire.Join(
                    node_rank=args.node_rank,
                    nnodes=args.nnodes,
                    protocol_version=PROTOCOL_VERSION,
                    build=BUILD,
                    launch=self._launch,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                )
            )
            answer = link.receive()
        except RendezvousRefused as err:  # the file is older than who listens there now
            sock.close()
            raise RendezvousError(str(err)) from err
        except PeerLost as err:
            sock.close()
            raise RendezvousError(
                f"who listens at {meeting.host}:{meeting.port} did not answer ({err}): it ends, or is of "
                f"another server, and does not know the secret in {FILE_NAME}"
            ) from err
        except BaseException:
            sock.close()
            raise
        if isinstance(answer, wire.Welcome):
            return _Met(link, answer, meeting.secret)
        link.close()
        if isinstance(answer, wire.Refused) and not answer.try_again:
            kind = ConfigError if answer.misconfigured else RendezvousRefused
            raise kind(f"node 0 refused this node: {answer.reason}")
        raise RendezvousError(f"node 0 has no place for this node yet: {answer}")

    def _hear(self, link: Link) -> None:
        try:
            while True:
                frame = link.receive()
                if isinstance(frame, wire.Watch):
                    self._watched.set() if frame.on else self._watched.clear()
                elif not isinstance(frame, wire.Beat):
                    self.events.put(_Said(link, frame))
        except BridgeError as err:
            self.events.put(_Parted(link, str(err)))

    def _join(self, met: _Met) -> None:
        met.link.set_deadline(met.welcome.deadline_s)
        met.link.beat(met.welcome.heartbeat_interval_s)
        self._launch = met.welcome.launch
        mapping_file.write_atomically(self._launch_file, self._launch.encode())
        self.address = met.link.address
        self.link, self.welcome, self._secret = met.link, met.welcome, met.secret
        self._told.clear()
        self._stand(epoch=None)
        logger.info("joined node 0 at %s, from %s", met.link.peer, self.address)

    def _part(self, why: str) -> None:
        """The head, its daemon or the network is gone: let nothing be written that it has not asked for."""
        assert self.link is not None
        assert self.welcome is not None
        flight.note("lost", what="node 0", why=why)
        logger.error("lost node 0: %s; its next daemon is awaited for %g s", why, self.welcome.grace_s)
        self.last_error = f"lost node 0: {why}"
        self.link.close()
        self.link = None
        self._watched.clear()
        if self.crew is not None:
            self.crew.end()
            self.crew = None
        self._stand(epoch=None)
        start_thread("bridge-seek", self._seek, self.welcome.grace_s)

    def _tell(self, frame: wire.Frame) -> None:
        if self.link is None:
            return
        try:
            self.link.send(frame)
        except PeerLost as err:
            logger.debug("%s; the reader reports it", err)

    def _obey(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Published):
            self._take(mapping_file.decode(frame.mapping, origin="the mapping of node 0"))
        elif isinstance(frame, wire.StartCrew):
            self._start_crew(frame)
        elif isinstance(frame, wire.Order):
            self._order(frame)
        elif isinstance(frame, wire.EndCrew):
            if self.crew is not None and frame.crew == self._crew_number:
                self.crew.end()
                self.crew = None
                self._stand(epoch=None)
            self._tell(wire.CrewEnded(frame.crew))
        elif isinstance(frame, wire.Refused):
            raise ConfigError(f"node 0 refused a worker of this node: {frame.reason}")

    def _stand(self, *, epoch: int | None) -> None:
        """What the log is about from now on: ``epoch``, and what all workers of this node serve."""
        self._epoch = epoch
        telemetry.stand(epoch=epoch, version=self._served())

    def _served(self) -> int | None:
        """The version that all workers of this node have flipped to; None while there are none."""
        ranks = ranks_of(self.registry.control, self.registry.ranks_of(0))
        return min((rank.version for rank in ranks), default=None)

    def _take(self, mapping: Mapping) -> None:
        """Of the head's present daemon: its updaters' words to trainers are signed with its secret."""
        assert mapping.rendezvous is not None
        meeting = msgspec.structs.replace(mapping.rendezvous, secret=self._secret)
        self.mapping = msgspec.structs.replace(mapping, rendezvous=meeting)

    def _start_crew(self, frame: wire.StartCrew) -> None:
        if self.crew is not None:
            self.crew.end()
        self._crew_number = number = frame.crew
        self._stand(epoch=None)
        ranks = self.registry.ranks_of(0)

        def tell_ready(rank: int) -> None:
            assert crew is not None
            self._tell(wire.Ready(number, rank, crew.processes[rank].pid))

        self.crew = crew = Crew(
            len(ranks), self.args.run_dir, self.events, on_gpu=frame.on_gpu, ranks=ranks, on_ready=tell_ready
        )

    def _order(self, frame: wire.Order) -> None:
        if self.crew is None or frame.crew != self._crew_number:
            return
        message = frame.message
        try:
            if message["type"] == "join":
                self._stand(epoch=message["epoch"])
                message = {**message, "address": rendezvous.local_address(message["host"], message["port"])}
            elif "version" in message:
                telemetry.stand(epoch=self._epoch, version=message["version"])
            self.crew.order(message, frame.ranks)
        except BridgeError as err:
            logger.warning("%s; its end is reported", err)
        except OSError as err:
            why = f"node {self.args.node_rank} finds no way to {message['host']}:{message['port']}: {err}"
            logger.error("%s", why)
            for rank in self.registry.ranks_of(0):
                self._tell(wire.Reported(self._crew_number, rank, None, f"updater of rank {rank} ({why})"))

    # --- what the head must know -----------------------------------------------------------------------

    def _tell_members(self) -> None:
        """Tell the head of workers that have come or gone since it was told."""
        if self.link is None:
            return
        workers = {member.hello["rank"]: member for member in self.registry.members()}
        for rank in [rank for rank, pid in self._told.items() if self._pid(workers.get(rank)) != pid]:
            del self._told[rank]
            self._tell(wire.Gone(rank))
        for rank, member in workers.items():
            page = self.registry.control
            if rank not in self._told and page is not None:  # without one the last worker is gone again
                self._told[rank] = member.hello["pid"]
                self._tell(wire.Registered(hello=member.hello, slot=page.slot(rank).words))
                self._announced += 1

    @staticmethod
    def _pid(member: Any) -> int:
        return int(member.hello["pid"]) if member is not None else 0

    def _watch(self) -> None:
        """Tell the head what workers write into the control page; a thread of its own."""
        seen: dict[int, wire.Slot] = {}
        told: tuple[Link | None, int] = None, 0
        pause = threading.Event()
        while not self._stopping.is_set():
            if not self._watched.is_set():
                self._watched.wait(GLANCE_S)
            else:
                pause.wait(WATCH_S)
            link, page = self.link, self.registry.control
            if link is None or page is None:
                continue
            if (hearer := (link, self._announced)) != told:
                # The head drops words of workers that it was not told of; they are told again now.
                seen, told = {}, hearer
            now = {rank: page.slot(rank).words for rank in self.registry.ranks_of(0)}
            if news := {rank: words for rank, words in now.items() if seen.get(rank) != words}:
                seen |= news
                self._tell(wire.Slots(news))

    def describe(self) -> Status:
        """The status, for whoever asks: of this node only."""
        here = len(self.registry.workers)
        joined = self.link is not None
        state: StateName = "waiting"
        if self.failed:
            state = "failed"
        elif joined and self.mapping and self.crew:
            state = "ready"
        detail = f"node {self.args.node_rank} of {self.args.nnodes}, {here} worker(s) here; node 0 "
        detail += "is joined" if joined else "is looked for"
        ranks = ranks_of(self.registry.control, self.registry.ranks_of(0))
        return Status(
            state=state,
            detail=self.failed or detail,
            complete=state == "ready",
            borrowing=False,
            kept_out="",
            weight_version=min((rank.version for rank in ranks), default=0),
            requested_version=0,
            writing=0,
            epoch=0,
            model=self.mapping.model if self.mapping else "",
            world_size=self.registry.world_size,
            pids=Pids(
                daemon=os.getpid(), updaters=self.crew.pids() if self.crew else [], **self.registry.pids()
            ),
            rendezvous=None,
            trainer=None,
            bucket=-1,
            rounds=Rounds(committed=0, aborted=0),
            last_error=self.last_error,
            last_round=None,
            given_up="",
            nodes=NodesHere(
                count=self.args.nnodes,
                rank=self.args.node_rank,
                missing=[] if joined else [0],
                hosts={self.args.node_rank: socket.gethostname()},
                address=self.address,
                master_addr=self.args.master_addr,
                master_port=self.welcome.master_port if self.welcome else 0,
            ),
            waits=[
                Wait(
                    who=f"node {self.args.node_rank}'s daemon",
                    waits_for="word of node 0" if joined else "node 0 to be found",
                    since_s=None,
                )
            ],
            ranks=ranks,
        )

    # --- the end -----------------------------------------------------------------------------------

    def _end(self, listener: socket.socket) -> None:
        self._stopping.set()
        if self.link is not None:
            self.link.close()
        if self.crew is not None:
            self.crew.end()
        listener.close()
        socket_path(self.args.run_dir).unlink(missing_ok=True)
        if os.getppid() != self.args.launcher_pid:
            residue.clean_up_behind(self.vllm_pids, (), self.args.run_dir)


def main() -> int:
    """Entry point: ``python -m vllm_patching.follower``."""
    return arguments.main(Follower)


if __name__ == "__main__":
    raise SystemExit(main())
