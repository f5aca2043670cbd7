"""One epoch of the daemon: a trainer that was admitted, the groups it joined, and its rounds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge import flight, telemetry
from bridge.errors import BridgeError, PeerLost
from bridge.protocol.messages import ROLLBACK, Frame
from bridge.protocol.session import Action, Close, Commit, InferenceSession, Send, Stage, State
from bridge.wire import rendezvous
from bridge.wire.control import ControlGroup, Event
from vllm_patching.crew import Crew, Report
from vllm_patching.swap import Swap

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Limits:
    """Every wait of an epoch, in seconds."""

    heartbeat_interval_s: float
    deadline_s: float
    commit_timeout_s: float


@dataclass
class RoundRecord:
    """What is known of the newest round, for receipts and status."""

    version: int = 0
    started: float = 0.0
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    staged_s: float = 0.0
    joint: str = ""
    restores: int | None = None
    committed: bool = False  # or about to be


class Epoch:
    """Drives one InferenceSession with real frames, updaters and commits."""

    def __init__(
        self,
        request: rendezvous.Request,
        *,
        epoch: int,
        version: int,
        crew: Crew,
        swap: Swap,
        limits: Limits,
    ) -> None:
        self.request = request
        self.epoch = epoch
        self.crew = crew
        self.limits = limits
        self.round = RoundRecord(version=version)
        self.closed: str | None = None
        self.changed_at = time.monotonic()  # when the machine's state changed last
        self.heard_at: dict[int, float] = {}  # by rank, its updater's last report
        self.poised: set[int] = set()
        self.joined: set[int] = set()
        self._swap = swap
        self._control: ControlGroup | None = None
        self.machine = InferenceSession(epoch=epoch, version=version, ranks=range(crew.num_ranks))
        self._state = self.machine.state

    @property
    def trainer(self) -> str:
        """Who is at the other end."""
        request = self.request
        if request.restores:
            return f"a peer server's lender, pid {request.pid} on {request.host}"
        return f"trainer of {request.world_size} rank(s), rank 0 pid {request.pid} on {request.host}"

    @property
    def trainer_says(self) -> str:
        """What trainer rank 0 has last said that it waits for, while this side knows of no round."""
        return self._control.said.get(0, "") if self._control is not None else ""

    def open(
        self,
        store: rendezvous.Store,
        *,
        address: tuple[str, int],
        transport: str,
        checksum: str,
        deliver: Callable[[Event], None],
    ) -> None:
        """Send the updaters to the data group, and join the control group.

        Raises:
            BridgeError: not everyone came within the deadline.
        """
        trainers = self.request.world_size
        host, port = address
        own = rendezvous.local_address(host, port)
        order = {
            "type": "join",
            "epoch": self.epoch,
            "host": host,
            "port": port,
            "address": own,
            "num_trainers": trainers,
            "group_size": trainers + self.crew.num_ranks,
            "transport": transport,
            "checksum": checksum,
            "deadline_s": self.limits.deadline_s,
        }
        self.crew.order(order, {r: {"group_rank": trainers + r} for r in range(self.crew.num_ranks)})
        group = rendezvous.make_group(
            store,
            f"e{self.epoch}/control",
            rank=trainers,
            size=trainers + 1,
            address=own,
            timeout_s=self.limits.deadline_s,
            named=rendezvous.members(trainers, "daemon"),
        )
        self._control = ControlGroup(
            group,
            {0: f"trainer rank 0 (pid {self.request.pid} on {self.request.host})"},
            epoch=self.epoch,
            heartbeat_interval_s=self.limits.heartbeat_interval_s,
            deadline_s=self.limits.deadline_s,
            deliver=lambda _peer, event: deliver(event),
        )

    # --- events ---------------------------------------------------------------------------------

    def on_control(self, event: Event) -> None:
        """A frame from trainer rank 0, or the loss of it."""
        if isinstance(event, Frame):
            flight.note("received", frame=event.opcode.name, version=event.version, index=event.index,
                        text=event.text)  # fmt: skip
            self._guarded(lambda: self.machine.on_frame(event))
        else:
            flight.note("lost", what=str(event))
            self._perform(self.machine.on_peer_lost(str(event)))

    def on_report(self, report: Report) -> None:
        """An updater's answer, or its death."""
        message = report.message
        flight.note("report", rank=report.rank, report="died" if message is None else message["type"])
        self.heard_at[report.rank] = time.monotonic()
        if message is None:
            self.fail(f"{self.crew.describe(report.rank)} died")
        elif message["type"] == "failed":
            self.fail(f"updater of rank {report.rank}: {message['error']}")
        elif message["type"] == "joined":
            self.joined.add(report.rank)
            links = ", ".join(message["links"])
            logger.info("epoch %d: rank %d receives by %s", self.epoch, report.rank, links)
        elif message["type"] == "poised":
            self.poised.add(report.rank)
            if len(self.poised) == self.crew.num_ranks and self.closed is None:
                self._guarded(self._hold)
        elif message["type"] == "held":
            if self.closed is None:
                self._guarded(self._give_leave)
        else:
            self.round.reports[report.rank] = message
            self._guarded(lambda: self.machine.on_staged(report.rank))

    def _hold(self) -> Sequence[Action]:
        """Every updater waits for leave to write: let the engine stand still first.

        That takes a while, in which the round may have failed; leave comes behind that news.
        """
        self._swap.hold()
        self.crew.post("held")
        return ()

    def _give_leave(self) -> Sequence[Action]:
        self._swap.begin(self.round.version)
        self.crew.order({"type": "write"})
        return ()

    def on_committed(self, result: str | None, error: str) -> None:
        """The commit that ``Commit`` asked for has ended."""
        if result is None:
            self.fail(error)
        elif self.machine.state is State.COMMITTING:
            self._guarded(lambda: self.machine.on_committed(result))

    def fail(self, reason: str) -> None:
        """Something on this side broke or ends: an updater, vLLM, the daemon itself."""
        torn = self._swap.torn
        self._perform(self.machine.on_failure(reason if torn in reason else f"{reason}; {torn}"))

    def _guarded(self, step: Any) -> None:
        try:
            self._perform(step())
        except BridgeError as err:
            logger.exception("epoch %d: %s", self.epoch, type(err).__name__)
            self.fail(str(err))

    # --- actions ---------------------------------------------------------------------------------

    def _perform(self, actions: Sequence[Action]) -> None:
        if self.machine.state is not self._state:
            self._state, self.changed_at = self.machine.state, time.monotonic()
            flight.note("state", state=self._state.value, version=self.machine.version)
            telemetry.stand(epoch=self.epoch, version=self.machine.version)
        staged = 0 < len(self.round.reports) == self.crew.num_ranks and not self.round.committed
        for action in actions:
            if isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Stage):
                self._stage(action)
            elif isinstance(action, Commit):
                self.round.staged_s = time.monotonic() - self.round.started
                self.pending_commit = action.version
                self.round.committed = True
            elif isinstance(action, Close):
                self.closed = action.reason
                if staged and self._swap.keeps_what_is_staged:
                    self.pending_commit = self.round.version

    pending_commit: int | None = None

    def _send(self, action: Send) -> None:
        frame = action.frame
        flight.note("sent", frame=frame.opcode.name, version=frame.version, text=frame.text)
        if self._control is None:
            return
        try:
            self._control.send(action.peers, action.frame, awaited=action.awaited)
        except PeerLost as err:
            # Its receiver thread reports the loss as an event of its own.
            logger.warning("epoch %d: %s not delivered: %s", self.epoch, action.frame.opcode.name, err)

    def _stage(self, action: Stage) -> None:
        self.round = RoundRecord(version=action.version, started=time.monotonic(), joint=action.joint)
        self.poised.clear()
        kind, _, wanted = action.joint.partition(" ")
        if kind == ROLLBACK:
            self.round.restores = self._swap.restore(int(wanted) if wanted.isdecimal() else None)
            self.crew.order({"type": "restore", "version": action.version})
            return
        order = {
            "type": "stage",
            "version": action.version,
            "joint": action.joint,
            "plan_digest": action.plan_digest.hex(),
        }
        self.crew.order(order, self._swap.orders())

    def receipt(self, flips_ns: Sequence[int]) -> str:
        """JSON of what was measured in the round, for the trainer's receipt."""
        reports = self.round.reports.values()
        return json.dumps(
            {
                "version": self.round.version,
                "bytes": sum(r["bytes"] for r in reports),
                "transfer_s": round(max((r["seconds"] for r in reports), default=0.0), 6),
                "stage_s": round(self.round.staged_s, 6),
                "flip_s": round(max(flips_ns) / 1e9, 9),
                "transport": "+".join(sorted({r["transport"] for r in reports})),
                "restores": self.round.restores,
            }
        )

    def close(self) -> None:
        """Leave the groups and end the crew."""
        self.crew.end()
        if self._control is not None:
            self._control.close(timeout_s=CLOSE_TIMEOUT_S)
