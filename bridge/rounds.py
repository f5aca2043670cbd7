"""A trainer rank's session: its groups, its one background thread, and the rounds it takes part in."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import torch

from bridge import flight, replicas, telemetry
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import (
    BridgeError,
    ConfigError,
    DeviceError,
    MappingError,
    PeerLost,
    ProtocolError,
    RoundAborted,
    TransferError,
)
from bridge.job import Encoding, Job, Receipt, Vote, again, forget_frames, read_receipt
from bridge.joining import ask_admission, meet
from bridge.moving import Mover
from bridge.protocol.mapping import Mapping
from bridge.protocol.messages import DIGEST_BYTES, Frame, Opcode
from bridge.protocol.plan import Layout
from bridge.protocol.session import (
    Action,
    Close,
    Coordinator,
    Finished,
    Member,
    Move,
    Released,
    Send,
    Stage,
    Staged,
    State,
)
from bridge.sharding import LocalShards
from bridge.wire import rendezvous
from bridge.wire.control import ControlGroup, Event
from bridge.wire.meeting import Meeting
from bridge.wire.transport import GLOO, SLOWEST_BYTES_PER_S

logger = logging.getLogger(__name__)

ROOT_CAUSE_TIMEOUT_S = 3.0
CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass(frozen=True)
class _Commit:
    pass


@dataclass(frozen=True)
class _GiveUp:
    reason: str


_Inbox = queue.Queue[Job | tuple[int, Event] | _Stop | _Commit | _GiveUp]


def write_flight(config: BridgeConfig, why: str) -> None:
    """Write this process's flight record to the log directory of the server that ``config`` names."""
    if config.logdir is not None:
        flight.write(why, config.logdir)
    elif config.config_path is not None:
        flight.write(why, Path(config.config_path).parent)


class Session:
    """One epoch, seen from one trainer rank. Made by ``open``; ``closed`` says why it is over."""

    def __init__(
        self,
        config: BridgeConfig,
        mapping: Mapping,
        ranks: Ranks,
        answer: rendezvous.Answer,
        store: rendezvous.Store,
        *,
        device: torch.device | None,
    ) -> None:
        self.config = config
        self.device = device
        self.mapping = mapping
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.version = answer.weight_version
        self.in_place = answer.in_place
        self.outdated = answer.outdated
        self.closed = ""
        self.stale = False
        self._answer = answer
        self._pid = os.getpid()
        self._inbox: _Inbox = queue.Queue()
        self._under_way: Job | None = None
        self._moving = False  # whether the background thread moves bytes, and hears nothing meanwhile
        self._ending: BridgeError | None = None  # what ended the epoch first; what follows says less
        self._staged_at = 0.0
        self._expired = False  # whether we have said that we wait no longer for other servers
        self._verdict_at = 0.0
        self._left = False  # whether the caller has given up waiting for the background thread
        self._early: list[tuple[int, Event]] = []
        self._summed: set[tuple[int, bytes]] = set()  # layouts, by rank, whose sums were said in this epoch
        self.resumes = False  # whether this trainer has made versions live there, in an earlier epoch
        self._meeting = Meeting(store, mapping, epoch=answer.epoch, timeout_s=answer.deadline_s * 2)
        machine = {"epoch": answer.epoch, "version": answer.weight_version}
        self._coordinator = Coordinator(**machine, trainers=self.world_size, daemons=answer.num_daemons)
        self._member = Member(**machine)
        self._joined = meet(self._meeting, mapping, ranks, answer, store, device=device)
        self._mover = Mover(
            self._joined.data,
            self._joined.links,
            mapping,
            rank=self.rank,
            world_size=self.world_size,
            deadline_s=answer.first_byte_s,
            device=device,
            checksum=answer.checksum,
            snapshot=config.snapshot,
        )
        self._control = ControlGroup(
            self._joined.control,
            self._joined.peers,
            epoch=answer.epoch,
            heartbeat_interval_s=answer.heartbeat_interval_s,
            deadline_s=answer.deadline_s,
            deliver=self._deliver,
        )
        try:  # heartbeats are under way by now: with many ranks this takes longer than their deadline
            self._mover.join_pairs(store, answer)
        except BridgeError:
            self._control.close(timeout_s=CLOSE_TIMEOUT_S)
            self._give_back()
            raise
        logger.info(
            "trainer rank %d of %d joined epoch %d at version %d; updaters take its buckets by %s",
            self.rank,
            self.world_size,
            answer.epoch,
            answer.weight_version,
            ", ".join(self._joined.links),
        )
        self._thread = threading.Thread(target=self._run, name="bridge-session", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        config: BridgeConfig,
        ranks: Ranks,
        *,
        device: torch.device | None,
        trainer: str = "",
        patient: bool = True,
        restores: int = 0,
    ) -> Self:
        """Meet the inference side; called by every trainer rank.

        ``device`` is the GPU that this rank's weights are on, None for the host's memory. ``trainer``,
        ``patient`` and ``restores`` are as for ``ask_admission``.

        Raises:
            MappingError: the mapping is missing or damaged, or was exported without a rendezvous.
            RendezvousError: the daemon cannot be reached in time, or refuses.
        """
        mapping, answer, store = ask_admission(
            config, ranks, trainer=trainer, patient=patient, restores=restores
        )
        return cls(config, mapping, ranks, answer, store, device=device)

    # --- the caller's side -------------------------------------------------------------------------

    def submit(
        self,
        shards: LocalShards | None,
        *,
        call: int,
        version: int | None,
        encoding: Encoding = "dense",
        vote: Vote | None = None,
        to: int | None = None,
    ) -> Job:
        """Hand a broadcast, or a rollback, to the background thread; ``call`` counts this process's."""
        wanted = self.version + 1 if version is None else version
        job = Job(shards, version=wanted, call=call, encoding=encoding, vote=vote, to=to)
        self._expired, self._verdict_at = False, 0.0
        self._under_way = job
        self._inbox.put(job)
        return job

    def commit(self) -> None:
        """The verdict on what this session's server has staged (trainer rank 0): make it live."""
        self._inbox.put(_Commit())

    def give_up(self, reason: str, *, error: BridgeError | None = None) -> None:
        """The other verdict: end the epoch, and the round for the caller at once, with ``error`` if given.

        The background thread may be held up by the server for as long as its deadlines allow, and learns of
        it behind them. The other trainer ranks are told here, so that none of them waits for that.
        """
        self.closed = reason
        self._mover.interrupt()
        frame = Frame(opcode=Opcode.ABORT, epoch=self.epoch, version=self.version, text=reason)
        # The daemon first: from then on nothing that is still sent can be served.
        self._perform_safely([Send(tuple(sorted(self._joined.peers, reverse=True)), frame)])
        self._inbox.put(_GiveUp(reason))  # after that: our thread would tell the ranks in words of its own
        if self._under_way is not None and not self.in_place:
            self._under_way.forsake(error or RoundAborted(reason))

    def refuse_round(self, reason: str) -> None:
        """This rank cannot take part: end the epoch for everyone, so that nobody waits for it."""
        reason = f"trainer rank {self.rank}: {reason}"
        self._perform_safely(
            self._coordinator.abort(reason) if self.rank == 0 else self._member.on_failure(reason)
        )
        self.closed = reason

    @property
    def epoch(self) -> int:
        """Which of the server's epochs this is."""
        return self._answer.epoch

    @property
    def waits_for(self) -> Callable[[], str]:
        """What this rank waits for while no round is under way, as ``status`` shows it.

        It is asked with every heartbeat, in the heartbeats' thread, and must not raise.
        """
        return self._control.doing

    @waits_for.setter
    def waits_for(self, asked: Callable[[], str]) -> None:
        self._control.doing = asked

    def beat(self) -> None:
        """Send a heartbeat now.

        Raises:
            PeerLost: a peer cannot be reached, or the epoch is over.
        """
        if self.closed:
            raise PeerLost(self.closed)
        self._control.beat()

    def close(self) -> None:
        """Leave: in order if the epoch is alive. Idempotent. In a forked child it is the parent's to do."""
        if os.getpid() != self._pid:
            return
        self._inbox.put(_Stop())
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self.closed:
            self.closed = "closed by this trainer"
            actions = self._coordinator.shutdown() if self.rank == 0 else self._member.leave()
            self._perform_safely(actions)
        if self._thread.is_alive():
            self._left = True
            logger.warning("a round is still under way; what it holds on the GPU stays with it")
        else:
            self._give_back()
        if not self._control.close(timeout_s=CLOSE_TIMEOUT_S):
            logger.debug("a thread of the control group of epoch %d still waits", self.epoch)

    def _give_back(self) -> None:
        self._mover.close()
        if self._joined.device_nonce is not None:
            self._joined.device_nonce.close()
            self._joined = dataclasses.replace(self._joined, device_nonce=None)

    def _deliver(self, peer: int, event: Event) -> None:
        """Called by the control group's threads."""
        ends = (Opcode.ABORT, Opcode.FAILED, Opcode.SHUTDOWN)
        if not isinstance(event, Frame) or event.opcode in ends:
            self._mover.interrupt()  # it may be waiting for a GPU, which hears nothing
        self._inbox.put((peer, event))
        lost = self._lost(peer, event)
        self._ending = self._ending or lost
        if self._moving and self.rank == 0 and lost is not None:
            # Our own thread may wait for whoever it was, by way of an updater, for as long as a slow transfer
            # might take. No commit can have been asked for yet.
            self._moving = False
            write_flight(self.config, f"a round failed while its bytes were moved: {self._ending}")
            assert self._ending is not None
            self.give_up(str(self._ending), error=again(self._ending))
            return
        job = self._under_way
        if job is None or job.vote is None or job.done or not isinstance(event, Frame) or self.in_place:
            return  # in place, what every rank has staged is served even then: the weights stay until it ends
        if event.opcode is Opcode.ABORT:
            # Other servers may go on without this one, for which our own thread may still be held up.
            self.closed = event.text
            job.forsake(RoundAborted(event.text))

    def _lost(self, peer: int, event: Event) -> BridgeError | None:
        """Why no round can go on, if ``event`` says that somebody is lost to it."""
        if not isinstance(event, Frame):
            return again(event)  # our own thread raises that one
        if event.opcode is Opcode.FAILED:
            return RoundAborted(event.text)
        if event.opcode is Opcode.SHUTDOWN:
            return RoundAborted(f"{self._who(peer)} left in the middle of a round")
        return None

    # --- the background thread ---------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        telemetry.stand_in_thread(epoch=self.epoch, version=self.version)
        while True:
            item = self._inbox.get()
            if isinstance(item, _Stop):
                if self._left:
                    self._give_back()
                return
            if isinstance(item, Job):
                self._run_job(item)
                del item  # or the next wait would hold it
            elif isinstance(item, tuple) and not self.closed:
                self._idle_event(*item)

    def _who(self, peer: int) -> str:
        return f"trainer rank {peer}" if peer < self.world_size else "the weight-updater daemon"

    def _idle_event(self, peer: int, event: Event) -> None:
        """Between rounds only ends are expected; the next broadcast will connect anew."""
        if isinstance(event, Frame) and event.opcode not in (Opcode.ABORT, Opcode.SHUTDOWN, Opcode.FAILED):
            if event.opcode is not Opcode.BUCKET:
                self._early.append((peer, event))  # another rank is ahead of ours: kept for our own call
            return
        in_order = isinstance(event, Frame) and event.opcode is Opcode.SHUTDOWN
        reason = (
            event.text if isinstance(event, Frame) else str(event)
        ) or f"{self._who(peer)} left in order"
        level = logging.INFO if in_order else logging.WARNING
        logger.log(level, "epoch %d is over: %s; a broadcast would connect anew", self.epoch, reason)
        if self.rank == 0:
            actions = self._coordinator.shutdown() if in_order else self._coordinator.abort(reason)
        else:
            actions = self._member.leave()
        self._perform_safely(actions)
        self.closed = reason
        if not in_order:
            write_flight(self.config, f"epoch {self.epoch} ended between two rounds: {reason}")

    def _run_job(self, job: Job) -> None:
        if self.closed:
            self.stale = True  # nothing was said of this round yet: it may go through a new epoch
            job.finish(None, RoundAborted(f"version {job.version} was not sent: {self.closed}"))
            return
        telemetry.stand_in_thread(epoch=self.epoch, version=job.version)
        flight.note("round", epoch=self.epoch, version=job.version, bytes=job.nbytes)
        try:
            if job.encoding == "delta":
                self._check_carries_changes()
            if job.shards is not None:
                job.shards.wait_computed(timeout_s=self._patience_s)
            receipt = self._lead(job) if self.rank == 0 else self._follow(job)
        except BridgeError as err:
            error = self._root_cause(err)
            if error is not err:
                forget_frames(err)  # it came by an event, which a frame of its own holds
            reason = f"trainer rank {self.rank}: {error}" if error is err else str(error)
            self._perform_safely(
                self._coordinator.abort(reason) if self.rank == 0 else self._member.on_failure(reason)
            )
            self.closed = str(error)
            logger.error("version %d failed: %s", job.version, error)
            write_flight(self.config, f"version {job.version} failed: {error}")
            job.finish(None, error)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as err:
            logger.exception("version %d: the GPU failed", job.version)
            self.refuse_round(f"{type(err).__name__}: {rendezvous.first_line(err)}")
            reason = f"version {job.version} was not sent: {rendezvous.first_line(err)}"
            job.finish(None, DeviceError(f"{reason}; the server keeps its weights"))
        except Exception as err:  # the thread's edge: the caller gets it, typed
            logger.exception("version %d: a defect of the bridge", job.version)
            write_flight(self.config, f"version {job.version}: {type(err).__name__}: {err}")
            self.refuse_round(f"{type(err).__name__}: {err}")
            job.finish(None, ProtocolError(f"version {job.version}: {type(err).__name__}: {err}"))
        else:
            self.version, self.outdated = job.version, False
            job.finish(receipt, None)

    def _check_carries_changes(self) -> None:
        """Every rank looks at all of them, so that all refuse alike, before anything has begun."""
        for inference in range(self._answer.num_inference_ranks):
            for trainer, link in enumerate(self._meeting.links(inference)):
                if link != GLOO:
                    raise ConfigError(
                        f"encoding='delta' was asked for, but the updater of inference rank {inference} "
                        f"takes trainer rank {trainer}'s buckets by {link}, which carries whole ones only; "
                        "pass encoding='auto', or serve with --transport gloo"
                    )

    def _root_cause(self, err: BridgeError) -> BridgeError:
        """A broken transfer is often only how another process's failure looks from here."""
        if not isinstance(err, PeerLost) or err.first_hand:
            return err
        deadline = time.monotonic() + ROOT_CAUSE_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                item = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(item, _Stop):
                self._inbox.put(item)
                break
            if isinstance(item, _GiveUp):
                return RoundAborted(item.reason)
            if isinstance(item, tuple) and isinstance(item[1], Frame) and item[1].text:
                if item[1].opcode in (Opcode.FAILED, Opcode.ABORT):
                    return RoundAborted(item[1].text)
            elif isinstance(item, tuple) and isinstance(item[1], PeerLost):
                return item[1]
        return err

    def _lead(self, job: Job) -> Receipt:
        actions = self._coordinator.begin(job.version, self._publish(job), job.call, self._manner(job))
        return self._drive(job, actions)

    def _follow(self, job: Job) -> Receipt:
        return self._drive(
            job, self._member.begin(job.version, self._publish(job), job.call, self._manner(job))
        )

    def _publish(self, job: Job) -> bytes:
        if not job.shards:
            return bytes(DIGEST_BYTES)
        digest = self._meeting.publish_layout(job.shards.layout)
        if self._compares(job.shards, self.rank, digest):
            self._meeting.publish_sums(job.call, self.rank, replicas.sums(job.shards.tensors))
            if self.rank:
                self._summed.add((self.rank, digest))
        return digest

    def _compares(self, shards: LocalShards, rank: int, layout: bytes) -> bool:
        """Whether ``rank``, with this ``layout``, says in this round what it holds; all find it alike."""
        when = self.config.compare_replicas
        if self.world_size == 1 or when == "never" or not shards.comparable:
            return False
        whole = not shards.partial or bool(shards.layout.leading)  # an adapter is a part that comes whole
        return when == "always" or (whole and (rank, layout) not in self._summed)

    def _manner(self, job: Job) -> str:
        """What all ranks must want alike; a rank that compares would wait for one that does not."""
        if job.shards is None or self.world_size == 1:
            return job.manner
        when = self.config.compare_replicas if job.shards.comparable else "not"
        return f"{job.manner}, replicas compared: {when}"

    def _compare_replicas(self, job: Job, digests: Sequence[bytes], layouts: Sequence[Layout]) -> None:
        """Rank 0, which knows all layouts: whether what several ranks hold is the same.

        Where a trainer goes on with a server it is not asked anew: what went apart since the first round
        must not be served all day and end training with the next lost connection. It is said in the log.

        Raises:
            MappingError: it is not.
        """
        assert job.shards is not None
        said = [(rank, d) for rank, d in enumerate(digests) if self._compares(job.shards, rank, d)]
        self._summed.update(said)
        sums = {rank: self._meeting.take_sums(job.call, rank) for rank, _ in said}
        if len(sums) < self.world_size:  # others have been compared, with what they held then
            return
        sources = self.mapping.vocabulary(layouts[0].vocabulary).sources
        try:
            count = replicas.compare(layouts, [sums[rank] for rank in range(self.world_size)], sources)
        except MappingError as err:
            if not self.resumes or self.config.compare_replicas == "always":
                raise
            logger.warning("sent all the same, as before this epoch: %s", err)
            return
        if count:
            logger.info("%d part(s) of the model are the same on all trainer ranks that hold them", count)

    def _drive(self, job: Job, actions: Sequence[Action]) -> Receipt:
        try:
            while True:
                for action in actions:
                    if (receipt := self._perform(job, action)) is not None:
                        return receipt
                # The daemon hears of a round when all ranks are ready; until then only this says of it.
                gathering = self.rank == 0 and self._coordinator.state is State.GATHERING
                waits_for = self._coordinator.waits_for if gathering else ""
                self._control.doing = functools.partial(str, waits_for)
                actions = self._next_actions(job)
        finally:
            self._control.doing = str

    @property
    def _patience_s(self) -> float:
        return max(self.config.commit_timeout_s, self._answer.commit_timeout_s)

    def _next_actions(self, job: Job) -> list[Action]:
        # Longer than the daemon's own limits, so that its reason arrives rather than our impatience.
        limit_s = (
            self._patience_s
            + 2 * self._answer.deadline_s
            + job.nbytes * self.world_size / SLOWEST_BYTES_PER_S
        )
        until = job.started + limit_s
        others = job.vote if self._coordinator.state is State.STAGED else None
        if others is not None:
            until = min(until, self._staged_at + others.stage_timeout_s)
            if self._expired:
                until = time.monotonic() + self._answer.deadline_s
        elif self._verdict_at:  # the time that other servers took was not this one's
            until = self._verdict_at + self._patience_s + 2 * self._answer.deadline_s
        machine = self._coordinator if self.rank == 0 else self._member
        if self._early:
            return self._on_event(job, *self._early.pop(0))
        try:
            item = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            if others is not None and not self._expired and others.stage_timeout_s < math.inf:
                self._expired = True
                others.expired()
                return []
            raise TransferError(
                f"version {job.version} did not become live within {limit_s:g} s: waited for "
                f"{machine.waits_for}"
            ) from None
        if isinstance(item, _Stop):
            self._inbox.put(item)
            raise RoundAborted(f"version {job.version}: the bridge was closed in the middle of the round")
        if isinstance(item, _GiveUp):
            raise RoundAborted(item.reason)
        if isinstance(item, _Commit):
            self._verdict_at = time.monotonic()
            return self._coordinator.commit()
        if isinstance(item, Job):
            raise ProtocolError("a second broadcast was submitted in the middle of a round")
        return self._on_event(job, *item)

    def _on_event(self, job: Job, peer: int, event: Event) -> list[Action]:
        if not isinstance(event, Frame):
            flight.note("lost", peer=self._who(peer), what=str(event))
            try:
                raise event
            finally:
                del event  # or it and this frame, by its traceback, keep each other, and the session
        flight.note("received", frame=event.opcode.name, peer=peer, version=event.version, text=event.text)
        if self.rank == 0:
            return self._coordinator.on_frame(peer, event)
        self.stale = event.opcode in (Opcode.ABORT, Opcode.SHUTDOWN) and event.version < job.version
        return self._member.on_frame(event)

    def _perform(self, job: Job, action: Action) -> Receipt | None:
        if isinstance(action, Send):
            flight.note("sent", frame=action.frame.opcode.name, version=job.version, text=action.frame.text)
            self._control.send(action.peers, action.frame)
        elif isinstance(action, Move):
            self._start_moving(job)
        elif isinstance(action, Stage):
            self._move(job, action.joint, action.plan_digest)
        elif isinstance(action, Released):
            if job.shards is not None:  # an updater may have read them itself, later than we looked
                job.shards.check_unwritten(self.mapping, f"version {job.version} may be live and a mixture")
            job.released.set()
        elif isinstance(action, Staged):
            self._staged_at = time.monotonic()
            if job.vote is None:
                self.commit()
            else:
                job.vote.staged()
        elif isinstance(action, Finished):
            receipt = read_receipt(action.text, version=job.version)
            return msgspec.structs.replace(receipt, total_s=time.monotonic() - job.started)
        elif isinstance(action, Close):
            raise RoundAborted(f"version {job.version} was not committed: {action.reason}")
        return None

    def _perform_safely(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                try:
                    self._control.send(action.peers, action.frame)
                except PeerLost as err:
                    logger.debug("%s not delivered: %s", action.frame.opcode.name, err)

    # --- moving bytes ------------------------------------------------------------------------------

    def _start_moving(self, job: Job) -> None:
        if job.shards is None:
            self._announce_round(job, bytes(DIGEST_BYTES), job.manner)
            self._mover.forget()
            return
        layouts = [self._coordinator.layouts[rank] for rank in range(self.world_size)]
        joint = self._meeting.publish_round(
            layouts,
            partial=job.shards.partial,
            encoding=job.encoding,
            bucket_bytes=self._answer.bucket_bytes,
        )
        plan, all_layouts, _ = self._meeting.plan(joint)
        self._compare_replicas(job, layouts, all_layouts)
        self._announce_round(job, plan.digest, joint)
        self._move(job, joint, plan.digest)

    def _announce_round(self, job: Job, plan_digest: bytes, joint: str) -> None:
        for action in self._coordinator.announce(plan_digest, joint, vote=job.vote is not None):
            self._perform(job, action)

    def _move(self, job: Job, joint: str, plan_digest: bytes) -> None:
        if job.shards is None:
            self._mover.forget()
            return
        plan, _, _ = self._meeting.plan(joint)
        if plan.digest != plan_digest:
            raise TransferError(
                f"plan digests differ: trainer rank 0 has {plan_digest.hex()}, trainer rank {self.rank} has "
                f"{plan.digest.hex()}; all ranks must read the same mapping file"
            )
        self._moving = True
        if self.rank == 0 and (ending := self._ending) is not None:  # it came while BEGIN was taken
            self._moving = False
            raise again(ending)
        try:
            self._mover.move(
                plan,
                job.shards,
                joint=joint,
                encoding=job.encoding,
                before=lambda index: self._announce(job.version, index),
            )
        finally:
            self._moving = False

    def _announce(self, version: int, index: int) -> None:
        """Rank 0 tells the daemons which bucket is next, unless the round is lost and nobody needs it."""
        if (ending := self._ending) is not None:
            raise again(ending)
        if self.closed:
            raise RoundAborted(self.closed)
        if self.rank != 0:
            return
        flight.note("bucket", version=version, index=index)
        daemons = range(self.world_size, self.world_size + self._answer.num_daemons)
        frame = Frame(opcode=Opcode.BUCKET, epoch=self.epoch, version=version, index=index)
        self._control.send(daemons, frame, awaited=False)  # one is told of the next as the last one moves
