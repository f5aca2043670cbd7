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
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from bridge import flight, telemetry
from bridge.errors import BridgeError, TransferError
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import CONFIG_NAME, Mapping, Rendezvous
from bridge.protocol.session import State
from bridge.wire import rendezvous
from vllm_patching import arguments, residue
from vllm_patching.admission import Admission
from vllm_patching.borrowing import Borrowing
from vllm_patching.boundary import Boundary, end_engines
from vllm_patching.channel import listen, socket_path
from vllm_patching.control_page import ControlPage
from vllm_patching.crew import Crew, Report
from vllm_patching.epoch import Epoch, Limits
from vllm_patching.events import (
    ASKED,
    Asked,
    Broken,
    Heard,
    Learned,
    LookAgain,
    Lost,
    NodeFailed,
    Notified,
    PeersAsked,
    Requested,
    Stop,
)
from vllm_patching.file_round import stage_file
from vllm_patching.fixed_arena import COPY, IN_PLACE
from vllm_patching.frontdesk import FrontDesk, start_thread
from vllm_patching.gate import Checkpoint, Gate, Word
from vllm_patching.lending import Lending
from vllm_patching.link import End
from vllm_patching.newest import Newest
from vllm_patching.nodes import Nodes
from vllm_patching.registry import Registry
from vllm_patching.status import LastRound, Status, describe
from vllm_patching.swap import DoubleStaging, InPlaceStaging, Swap

logger = logging.getLogger("vllm_patching.daemon")  # __name__ is __main__ here

MAX_IDLE_DEATHS = 5
PUBLISH_RETRY_S = 2.0
COMES = "it comes with the trainer's next broadcast of the whole model"


class Daemon:
    """State of the node. Only ``run``'s thread changes it, but for the registry, which has a lock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.limits = Limits(args.heartbeat_interval, args.deadline, args.commit_timeout)
        # Simple: a signal handler puts into it, which must not meet a lock of the same thread.
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.registry = Registry(
            on_change=lambda: self.events.put(None),
            num_engines=args.num_engines,
            on_new_vllm=lambda page: self.gate.close(page),
            on_found_vllm=lambda page: self.gate.found(page),
        )
        self.gate = Gate(args.run_dir)
        self.newest = Newest(args.run_dir)
        self._learned = 0  # of a peer, noted or not
        self.admission = Admission(self)
        self.lending = Lending(self)
        self.borrowing = Borrowing(self, args.peers)
        self.mapping: Mapping | None = None
        self.store: Any = None
        self.secret = secrets.token_hex(16)
        self.nodes = Nodes(self) if args.nnodes > 1 else None
        self.boundary: Boundary | None = None
        self.swap: Swap | None = None
        self.crew: Crew | None = None
        self.epoch: Epoch | None = None
        self.committed = 0
        self.aborted = 0
        self.idle_deaths = 0
        self.failed = ""
        self._first_death = ""
        self.given_up = ""
        self._final = False  # whether the server ends with the daemon
        self._closing = False
        self._publish_due = 0.0  # the earliest time for another try, on the monotonic clock
        self._unpublished = ""  # why the last one failed
        self._looking = False  # whether LookAgain is on its way
        self.published = False  # whether the vLLM that was published is still there, all of it
        self._dead_page: ControlPage | None = None  # of a vLLM of which a part has died
        self._known_page: ControlPage | None = None  # of the vLLM that was complete last
        self.handled = threading.Condition()  # notified behind each event, for those who wait for a round
        self.filing = False  # whether a version is being staged from a file
        self.last_error: str | None = None
        self.last_round: LastRound | None = None
        self.vllm_pids: set[int] = set()
        self._shm: set[Path] = set()

    # --- the one loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Handle events until told to stop; returns the exit code."""
        listener = listen(self.args.run_dir)
        start_thread("bridge-accept", FrontDesk(self, head=self).accept, listener)
        signal.signal(signal.SIGTERM, lambda *_: self.events.put(Stop("SIGTERM")))
        signal.signal(signal.SIGINT, lambda *_: self.events.put(Stop("SIGINT")))
        logger.info("listening on %s", socket_path(self.args.run_dir))
        try:
            if self.nodes is not None:
                self.nodes.listen()
            while True:
                event = self._next_event()
                if isinstance(event, Stop):
                    orphaned = os.getppid() != self.args.launcher_pid
                    why = f"the launcher (pid {self.args.launcher_pid}) died" if orphaned else event.why
                    logger.info("ending: %s", why)
                    self.last_error = why
                    self._final = event.final or orphaned
                    return 0
                if isinstance(event, Broken):
                    raise TransferError(event.why)
                self._handle(event)
                with self.handled:
                    self.handled.notify_all()
        except BridgeError as err:
            logger.error("%s", err)
            flight.write(f"the daemon ended: {err}", self.args.logdir)
            self.last_error = str(err)
            return err.exit_code
        finally:
            self._end(listener)

    def _next_event(self) -> Any:
        """Wait for an event; None if the server was ended because torn weights were not repaired in time."""
        due = self.swap.repair_due if self.swap is not None else None
        if due is None or self.in_round or self.given_up or not self.published:
            return self.events.get()
        try:
            return self.events.get(timeout=max(0.0, due - time.monotonic()))
        except queue.Empty:
            assert self.swap is not None
            self.given_up = self.last_error = f"no complete round came in time: {self.swap.torn}"
            end_engines(self.registry, self.given_up)
            return None

    @property
    def _over(self) -> bool:
        """Whether nothing can bring the server back: of several nodes, none is started again by itself."""
        return self.nodes is not None and bool(self.given_up)

    @property
    def _expected(self) -> bool:
        """Whether vLLM will publish, unless it dies first: all workers are there, and of no dead one.

        What takes seconds to start is started then: on one node, where nobody else has a word in it.
        """
        page = self.registry.control
        here = page is not None and page is not self._dead_page and self.registry.has_all_workers
        return here and not self.published and self.nodes is None

    @property
    def rounds_ended(self) -> int:
        """How many rounds have ended, either way."""
        return self.committed + self.aborted

    @property
    def in_round(self) -> bool:
        """Whether a round is under way; it has deadlines of its own."""
        if self.filing or self._closing:  # in place, until it is known whether and why the weights are torn
            return self.swap is not None and bool(self.swap.torn)
        return self.epoch is not None and self.epoch.machine.state is not State.IDLE

    def _handle(self, event: Any) -> None:
        if self.nodes is not None:
            self.nodes.admit_waiting()
        self._take(event)
        if self.epoch is not None:
            self._settle(self.epoch)
        if self._over:
            if self.registry.engines:  # one that has come since, of a vLLM that is not whole
                end_engines(self.registry, self.given_up)
        elif self.registry.complete and not self.published:
            if time.monotonic() >= self._publish_due:
                self._first_death = self.given_up = ""
                self._publish()
            else:
                self._look_again()
        elif self._expected:
            if self.crew is None:
                self.new_crew()
            if self.mapping is not None:
                self.borrowing.expect()
        self._mind_the_gate()

    def _mind_the_gate(self) -> None:
        """Let requests in once vLLM serves what it should; it is closed from the start."""
        page = self.registry.control
        if page is None or page is not self._known_page or page is self._dead_page:
            return
        try:
            if self.gate.word.open:
                self.gate.keep(page)
                return
            word = self._word(page)
            self.gate.say(word, page)
        except TransferError as err:
            if self.last_error != str(err):
                logger.error("%s; trying again every %g s", err, PUBLISH_RETRY_S)
            self.last_error = str(err)
            self._look_again()
            return
        if page.requested > self.live_version:
            self._look_again()  # nobody says so when a rank has flipped
        if word.open and self.outdated:
            logger.warning("requests are let in all the same: %s", self.outdated)
        elif word.open:
            logger.info("requests are let in, with version %d", self.live_version)

    def _word(self, page: ControlPage) -> Word:
        """What a complete vLLM's API servers are told. Anybody may hear it: no host, pid or path is in it."""
        rule: Checkpoint = self.args.serve_checkpoint
        newest = 0 < self.version <= self.live_version
        fresh = not self.version and rule != "never"  # the checkpoint is what there is
        if self._unpublished:
            if rule == "always" or newest or (fresh and not self.borrowing.has_peers):
                return Word(open=True)
            return Word(open=False, why="the mapping file cannot be written, so nobody can bring a version")
        if self.borrowing.asking:
            return Word(open=False, why="its peers are asked for a newer version", soon=True)
        if rule == "always" or newest or fresh:
            return Word(open=True)
        if not self.version:
            return Word(
                open=False,
                why="no version was broadcast yet, and --serve-checkpoint never keeps requests out",
            )
        if page.requested == self.version:
            return Word(open=False, why=f"version {self.version} is about to be live", soon=True)
        return Word(open=False, why=_lacking(page, self.version, COMES))

    def _take(self, event: Any) -> None:
        """Do what one event asks for; None is there for what has changed elsewhere."""
        if isinstance(event, Lost):
            self._vllm_lost(event.who)
        elif isinstance(event, NodeFailed):
            self._give_up(event.why)
        elif isinstance(event, Requested):
            self.admission.consider(event.request)
        elif isinstance(event, Asked):
            self.lending.consider(event.loan)
        elif isinstance(event, Learned):
            self._learn(event.version)
        elif isinstance(event, PeersAsked):
            self.borrowing.heard(event.question)
        elif isinstance(event, LookAgain):
            self._looking = False
        elif isinstance(event, Notified):
            event.reply.put(stage_file(self, event))
        elif isinstance(event, Report):
            self._hear_updater(event)
        elif isinstance(event, Heard) and event.epoch is self.epoch:
            event.epoch.on_control(event.event)

    def _hear_updater(self, report: Report) -> None:
        if self.epoch is not None and report.crew is self.epoch.crew:
            self.epoch.on_report(report)
        elif report.crew is self.crew and report.message is None:
            self._replace_idle_crew(self.crew.describe(report.rank))

    def _learn(self, version: int) -> None:
        """A peer serves ``version``."""
        self._learned = max(self._learned, version)
        try:
            self.newest.raise_to(version)
        except TransferError:
            logger.exception("a peer serves version %d", version)

    def _settle(self, epoch: Epoch) -> None:
        """Do what the last event led to: a commit, the end of the epoch, or both."""
        if epoch.pending_commit is not None:
            version, epoch.pending_commit = epoch.pending_commit, None
            assert self.swap is not None
            try:
                flips = self.swap.commit(version)
            except TransferError as err:
                epoch.on_committed(None, str(err))
            else:
                receipt = epoch.receipt(flips)
                self.last_round = msgspec.json.decode(receipt, type=LastRound)
                self.committed += 1
                if not epoch.request.restores:
                    self.borrowing.satisfied()
                epoch.on_committed(receipt, "")
                logger.info("epoch %d: version %d is live: %s", epoch.epoch, version, receipt)
        if epoch.closed is not None:
            self._close_epoch(epoch)

    def _close_epoch(self, epoch: Epoch) -> None:
        assert self.swap is not None
        if epoch.closed:
            self.aborted += 1
            self.last_error = epoch.closed  # before the epoch is seen to be over
        self.epoch, self._closing = None, True
        epoch.close()
        self.swap.abandon(epoch.closed or "the trainer left")  # only now: no updater writes any more
        self._closing = False
        if epoch.closed:
            logger.error("epoch %d ended: %s; %s", epoch.epoch, epoch.closed, self._served())
            flight.write(f"epoch {epoch.epoch} ended: {epoch.closed}", self.args.logdir)
        else:
            logger.info("epoch %d ended in order at version %d", epoch.epoch, self.live_version)
        telemetry.stand(epoch=None, version=self.version)
        self.new_crew()

    def _served(self) -> str:
        """What clients get now, for the log."""
        if self.swap is not None and self.swap.torn:
            return "nothing is served"
        here = self.registry.control is not None and not self.given_up
        if here and self.nodes is not None and self.nodes.missing:
            return f"version {self.live_version} is served on; nodes {self.nodes.missing} are waited for"
        if not self.registry.complete:
            return "vLLM is not complete any more, and serves nothing or will end"
        return f"version {self.live_version} is served on"

    # --- publication -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest version: the one every rank serves or is about to, unless vLLM was started again."""
        page = self.registry.control
        return max(self.newest.version, self._learned, page.requested if page else 0)

    @property
    def outdated(self) -> str:
        """Why what is served is not the newest version, "" if it is, or if nothing ever was."""
        if not (behind := self._behind) or self.gate.word.open or self.registry.control is None:
            return behind
        return f"{behind}; requests {'wait' if self.gate.word.soon else 'are refused'} meanwhile"

    @property
    def _behind(self) -> str:
        page = self.registry.control
        if self.mapping is None:
            return ""
        asking = self.borrowing.asking
        if self.published and page is not None and page.requested == self.version:
            return "its peers are being asked for a newer version" if asking else ""
        wanted = f"the newest version is {self.version}" if self.version else "no version was broadcast yet"
        if self._unpublished:
            return f"{self._unpublished}, so nobody can bring a version; {wanted}"
        if not self.published or page is None:
            return f"{self._first_death or 'vLLM is gone'}, and vLLM is not complete again; {wanted}"
        return _lacking(page, self.version, "its peers are being asked" if asking else COMES)

    @property
    def live_version(self) -> int:
        """The version every rank has flipped to."""
        page = self.registry.control
        return min((page.slot(rank).version for rank in range(page.num_ranks)), default=0) if page else 0

    def _publish(self) -> None:
        """vLLM is complete: for the first time, or again after it was started again."""
        args = self.args
        self._known_page, self._dead_page = self.registry.control, None
        mapping = self.registry.mapping()
        if self.store is None:  # it outlives vLLM, and so do its address and the job's secret
            self.store = rendezvous.serve_store(args.rendezvous_host, args.rendezvous_port)
        meeting = Rendezvous(
            host=args.rendezvous_host, port=self.store.port, secret=self.secret, launch=args.launch_id
        )
        data = mapping_file.encode(
            msgspec.structs.replace(mapping, rendezvous=meeting, run_dir=str(args.run_dir))
        )
        path = args.logdir / CONFIG_NAME
        try:
            mapping_file.write_atomically(path, data)
        except OSError as err:  # a file system that is full or away; vLLM serves on meanwhile
            self._publish_later(f"the mapping cannot be written to {path}: {err.strerror}")
            return
        if (page := self.registry.control) is not None:  # an earlier daemon's note may have been deleted
            self.newest.raise_to(page.requested)
        self._prepare_swap()  # before anybody can be told that the server is ready
        self.mapping = mapping_file.decode(data, origin="the mapping just built")
        logger.info(
            "all %d rank(s) published; mapping %s (%d bytes), rendezvous %s:%d",
            mapping.num_inference_ranks,
            path,
            len(data),
            meeting.host,
            meeting.port,
        )
        self.published, self._unpublished = True, ""
        if self.nodes is not None:
            self.nodes.publish()
        if self.crew is None or self.crew.has_died:
            self.new_crew()
        self.lending.watch()
        self.borrowing.begin()
        telemetry.stand(epoch=None, version=self.version)
        if self.outdated:
            logger.warning("%s", self.outdated)
        self.admission.watch()
        self._shm = residue.snapshot(self.vllm_pids)

    def _publish_later(self, why: str) -> None:
        if why != self.last_error:
            logger.error("%s; trying again every %g s", why, PUBLISH_RETRY_S)
        self.last_error = self._unpublished = why
        self._publish_due = time.monotonic() + PUBLISH_RETRY_S
        self._look_again()

    def _look_again(self) -> None:
        """Handle an event of no content in a while, whatever happens until then."""
        if not self._looking:
            self._looking = True
            again = threading.Timer(PUBLISH_RETRY_S, self.events.put, (LookAgain(),))
            again.daemon = True
            again.start()

    def _prepare_swap(self) -> None:
        limits = self.limits
        self.boundary = Boundary(
            self.registry,
            timeout_s=limits.commit_timeout_s,
            first_death=lambda: self._first_death,
            before_commit=self.newest.raise_to,
            after_commit=self._mind_the_gate,  # who is told of the version may ask for its tokens
            watch=self.nodes.watch if self.nodes is not None else lambda _: None,
        )
        # What the workers have, whatever the launcher said: an earlier daemon may have published for them.
        kinds = self.registry.arenas
        if IN_PLACE in kinds:
            self.swap = InPlaceStaging(
                self.boundary,
                repair_timeout_s=self.args.repair_timeout,
                outdated=lambda: self.outdated,
                before_write=self.lending.before_write,
            )
        else:
            self.swap = DoubleStaging(
                self.boundary,
                copies=COPY in kinds,
                outdated=lambda: self.outdated,
                before_write=self.lending.before_write,
            )

    @property
    def on_gpu(self) -> bool:
        """Whether a worker of vLLM has one."""
        return any(member.hello.get("gpu") for member in self.registry.members())

    def new_crew(self) -> None:
        """Replace the updaters by fresh ones, which hold no half-finished transfer; none without a vLLM."""
        if self.crew is not None:
            self.crew.end()
        page = self.registry.control
        if self.published:
            assert self.mapping is not None
            num_ranks = self.mapping.num_inference_ranks
        elif self._expected and page is not None:
            num_ranks = page.num_ranks
        else:
            self.crew = None  # the memory of a vLLM that is gone is free only without them
            return
        if self.nodes is None:
            self.crew = Crew(num_ranks, self.args.run_dir, self.events, on_gpu=self.on_gpu)
            return
        # A node may be lost already, and the news on its way: no round can begin until it is back.
        complete = self.registry.complete
        self.crew = Crew(
            num_ranks,
            self.args.run_dir,
            self.events,
            on_gpu=self.on_gpu,
            ranks=self.registry.ranks_of(0) if complete else (),
            limbs=list(self.nodes.here.values()) if complete else (),
        )

    def _replace_idle_crew(self, who: str) -> None:
        self.idle_deaths += 1
        if self.idle_deaths > MAX_IDLE_DEATHS:
            raise TransferError(
                f"{who} died without a round under way, like {MAX_IDLE_DEATHS} before it; giving up"
            )
        logger.error("%s died while idle; starting another crew", who)
        self.new_crew()

    def _vllm_lost(self, who: str) -> None:
        logger.error("%s is gone", who)
        flight.note("lost", what=who)
        if not self._first_death:
            # One death ends all of vLLM: the first is the cause, the others follow from it.
            self._first_death = self.last_error = self.given_up or f"{who} is gone"
        self.published, self._dead_page = False, self.registry.control
        self._unpublished = ""
        self.borrowing.close()
        self.lending.reclaim("vLLM is gone, and its memory must be free")
        if self.epoch is not None:
            self.epoch.fail(self._first_death)  # and its updaters end with it
        elif self.crew is not None:
            self.new_crew()

    def _give_up(self, why: str) -> None:
        """A part of vLLM on another node is gone: the rest cannot serve, and does not notice while idle."""
        logger.error("%s", why)
        if not self.given_up:
            self.given_up = self.last_error = self._first_death = why
            self.published = False
            end_engines(self.registry, why)
        if self.epoch is not None:
            self.epoch.fail(self.given_up)

    def describe(self) -> Status:
        """The status, for whoever asks."""
        return describe(self)

    # --- the end -----------------------------------------------------------------------------------

    def _end(self, listener: socket.socket) -> None:
        if self.nodes is not None:
            why = "" if self.last_error == ASKED else self.last_error or ""
            self.nodes.end(End(why) if self._final else None)
        self.admission.close()  # its thread holds the store, which must not be used while it is torn down
        self.borrowing.close()
        self.lending.close()
        if self.epoch is not None:
            self.epoch.fail(f"the weight-updater daemon ends: {self.last_error}")
            self.epoch.close()
        if self.crew is not None:
            self.crew.end()
        if self.swap is not None:
            self.swap.let_go()
        listener.close()
        self.newest.close()
        socket_path(self.args.run_dir).unlink(missing_ok=True)
        if os.getppid() != self.args.launcher_pid:
            residue.clean_up_behind(self.vllm_pids, self._shm, self.args.run_dir)


def _lacking(page: ControlPage, newest: int, then: str) -> str:
    """What is said of a whole vLLM without ``newest``, to its operator and to whoever asks it for tokens."""
    has = page.requested or "0 (the checkpoint)"
    return f"vLLM has version {has}, but the newest version is {newest}; {then}"


def main() -> int:
    """Entry point: ``python -m vllm_patching.daemon``."""
    return arguments.main(Daemon)


if __name__ == "__main__":
    raise SystemExit(main())
