"""The two state machines of a round: events in, actions out. No clock, no socket, no tensor.

Inference (one per daemon)::

    IDLE --BEGIN--> STAGING --all ranks staged--> STAGED --COMMIT--> COMMITTING --all flipped--> IDLE

Coordinator (trainer rank 0)::

    IDLE --begin--> GATHERING --all ready--> MOVING --all staged--> STAGED --commit--> COMMITTING
    COMMITTING --all committed--> IDLE

Whether to commit is decided outside, by a ``Ballot``, where there are several servers, each of which has a
coordinator and an epoch of its own. For one daemon alone BEGIN says that nobody else has a say; both sides
then pass through STAGED without waiting for COMMIT, which would cost two messages under load.

Any failure ends the epoch: the inference side drops what it staged and keeps serving the old version, and the
two sides meet again under a new epoch. There is one exception to dropping: once a commit has been
decided, every rank is known to hold the whole version, so the daemon finishes it even if the trainer dies.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

from bridge.errors import ProtocolError
from bridge.protocol.messages import COMMIT_WHEN_STAGED, MAX_VERSION, Frame, Opcode


class State(enum.Enum):
    """Where a round stands."""

    IDLE = "idle"
    GATHERING = "gathering"
    STAGING = "staging"
    MOVING = "moving"
    STAGED = "staged"
    COMMITTING = "committing"
    CLOSED = "closed"


class Send(msgspec.Struct, frozen=True):
    """Action: send ``frame`` to ``peers`` (control-group ranks), and wait until they have taken it."""

    peers: tuple[int, ...]
    frame: Frame
    awaited: bool = True  # or let it go on its way


class Stage(msgspec.Struct, frozen=True):
    """Action of the daemon: let every updater stage this round."""

    version: int
    plan_digest: bytes
    joint: str


class Commit(msgspec.Struct, frozen=True):
    """Action of the daemon: ask the engine to make ``version`` live."""

    version: int


class Move(msgspec.Struct, frozen=True):
    """Action of the coordinator: every trainer rank is ready; move the bytes."""

    version: int


class Released(msgspec.Struct, frozen=True):
    """Action of a trainer rank: every byte was read; the weights may change."""

    version: int


class Staged(msgspec.Struct, frozen=True):
    """Action of the coordinator: the server holds the whole version; ``commit`` or ``abort`` comes next."""

    version: int


class Finished(msgspec.Struct, frozen=True):
    """Action of a trainer rank: the version is live; ``text`` is the receipt."""

    version: int
    text: str


class Close(msgspec.Struct, frozen=True):
    """Action: the epoch is over; ``reason`` is empty after an orderly shutdown."""

    reason: str


Action = Send | Stage | Commit | Move | Released | Staged | Finished | Close

# Frames that only the round under way can bring; others end an epoch, or say what they mean to begin.
_OF_THE_ROUND = (Opcode.BUCKET, Opcode.STAGED, Opcode.RELEASE, Opcode.COMMITTED, Opcode.DONE)


class _Machine:
    def __init__(self, *, epoch: int, version: int) -> None:
        self.epoch = epoch
        self.version = version
        self.state = State.IDLE
        self.story: list[str] = []

    def _frame(self, opcode: Opcode, **fields: object) -> Frame:
        return msgspec.structs.replace(Frame(opcode=opcode, epoch=self.epoch, version=self.version), **fields)

    def _note(self, what: str) -> None:
        self.story.append(f"{self.state.value}: {what}")
        del self.story[:-64]

    def _check(self, frame: Frame) -> None:
        if frame.epoch != self.epoch:
            raise ProtocolError(f"frame {frame.opcode.name} of epoch {frame.epoch} in epoch {self.epoch}")
        if frame.opcode in _OF_THE_ROUND and frame.version != self.version:
            raise ProtocolError(
                f"frame {frame.opcode.name} of version {frame.version} in a round of version {self.version}"
            )

    def _impossible(self, what: str) -> ProtocolError:
        tail = "; ".join(self.story[-8:])
        return ProtocolError(f"{what} while {self.state.value} (version {self.version}); before it: {tail}")


class InferenceSession(_Machine):
    """A daemon's side of one epoch. ``coordinator`` is trainer rank 0 in the control group."""

    def __init__(self, *, epoch: int, version: int, ranks: Iterable[int], coordinator: int = 0) -> None:
        super().__init__(epoch=epoch, version=version)
        self._ranks = frozenset(ranks)
        self._staged: set[int] = set()
        self._coordinator = (coordinator,)
        self._asks = True
        self.progress = -1

    def on_frame(self, frame: Frame) -> list[Action]:
        """A frame from the coordinator."""
        self._check(frame)
        self._note(frame.opcode.name)
        if frame.opcode is Opcode.BUCKET:
            self.progress = frame.index
            return []
        if frame.opcode is Opcode.SHUTDOWN:
            return self._close("", reply=True)
        if frame.opcode is Opcode.ABORT:
            return self._close(frame.text or "aborted by the trainer", reply=True)
        if frame.opcode is Opcode.BEGIN:
            return self._begin(frame)
        if frame.opcode is Opcode.COMMIT:
            if self.state is not State.STAGED or frame.version != self.version:
                raise self._impossible(f"COMMIT of version {frame.version}")
            self.state = State.COMMITTING
            return [Commit(self.version)]
        raise self._impossible(f"{frame.opcode.name} from the coordinator")

    def _begin(self, frame: Frame) -> list[Action]:
        if self.state is not State.IDLE:
            raise self._impossible(f"BEGIN of version {frame.version}")
        if frame.version <= self.version:
            reason = f"version {frame.version} offered, version {self.version} is served already"
            return self._fail(reason)
        if frame.version > MAX_VERSION:
            return self._fail(f"version {frame.version} does not fit a signed 64-bit word")
        self.version = frame.version
        self._asks = frame.index != COMMIT_WHEN_STAGED
        self.state = State.STAGING
        self._staged.clear()
        self.progress = -1
        return [Stage(frame.version, frame.digest, frame.text)]

    def on_staged(self, rank: int) -> list[Action]:
        """An updater holds the whole version, checksums compared."""
        self._note(f"rank {rank} staged")
        if self.state is not State.STAGING or rank not in self._ranks:
            raise self._impossible(f"rank {rank} staged")
        self._staged.add(rank)
        if self._staged != self._ranks:
            return []
        self.state = State.STAGED if self._asks else State.COMMITTING
        # The version is live the sooner for it.
        staged = Send(self._coordinator, self._frame(Opcode.STAGED), awaited=False)
        return [staged] if self._asks else [staged, Commit(self.version)]

    def on_committed(self, measurements: str) -> list[Action]:
        """Every rank has flipped; ``measurements`` is JSON for the receipt."""
        self._note("committed")
        if self.state is not State.COMMITTING:
            raise self._impossible("committed")
        self.state = State.IDLE
        return [Send(self._coordinator, self._frame(Opcode.COMMITTED, text=measurements))]

    def on_failure(self, reason: str) -> list[Action]:
        """Something of ours broke: tell the coordinator and end the epoch."""
        self._note(f"failure: {reason}")
        return self._fail(reason)

    def on_peer_lost(self, reason: str) -> list[Action]:
        """The trainer is gone. A commit under way goes on; anything less is dropped."""
        self._note(f"lost: {reason}")
        return self._close(reason, reply=False)

    def _fail(self, reason: str) -> list[Action]:
        failed = Send(self._coordinator, self._frame(Opcode.FAILED, text=reason))
        return [failed, *self._close(reason, reply=True)]

    def _close(self, reason: str, *, reply: bool) -> list[Action]:
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        bye: list[Action] = [Send(self._coordinator, self._frame(Opcode.SHUTDOWN))] if reply else []
        return [*bye, Close(reason)]


_WAITS_FOR = {  # a trainer rank whose round is under way
    State.MOVING: "the server to hold every byte",
    State.STAGED: "the decision to commit",
    State.COMMITTING: "the server to make the version live",
}


class Coordinator(_Machine):
    """Trainer rank 0's side of one epoch: it starts every round and is the hub of all control frames."""

    def __init__(self, *, epoch: int, version: int, trainers: int, daemons: int) -> None:
        super().__init__(epoch=epoch, version=version)
        self._others = tuple(range(1, trainers))
        self._daemons = tuple(range(trainers, trainers + daemons))
        self._waiting: set[int] = set()
        self._call = 0
        self._encoding = ""
        self._asks = True
        self.layouts: dict[int, bytes] = {}
        self.measurements: list[str] = []

    @property
    def waits_for(self) -> str:
        """What the round waits for now, in words."""
        if self.state is State.GATHERING:
            return f"trainer rank(s) {', '.join(map(str, sorted(self._waiting)))} to call broadcast_weights"
        return _WAITS_FOR.get(self.state, "nothing")

    def begin(self, version: int, layout_digest: bytes, call: int, encoding: str) -> list[Action]:
        """Our own weights are stable; wait for the other trainer ranks to say so too.

        ``call`` counts this rank's broadcasts: weights of different steps must never meet in one version.
        ``encoding`` is how they are to travel, which all ranks must want alike.
        """
        self._note(f"begin {version}")
        if self.state is not State.IDLE or version <= self.version:
            raise self._impossible(f"begin of version {version}")
        self.version, self.state = version, State.GATHERING
        self._call, self._encoding = call, encoding
        self.layouts = {0: layout_digest}
        self.measurements = []
        self._waiting = set(self._others)
        return self._move_if_ready()

    def _move_if_ready(self) -> list[Action]:
        if self._waiting:
            return []
        self.state = State.MOVING
        self._waiting = set(self._daemons)
        return [Move(self.version)]

    def announce(self, plan_digest: bytes, joint: str, *, vote: bool) -> list[Action]:
        """The plan is known: BEGIN to everyone. ``vote``: whether others have a say in the commit."""
        self._asks = vote or len(self._daemons) > 1
        index = -1 if self._asks else COMMIT_WHEN_STAGED
        frame = self._frame(Opcode.BEGIN, digest=plan_digest, text=joint, index=index)
        return [Send(self._others + self._daemons, frame)]

    def on_frame(self, peer: int, frame: Frame) -> list[Action]:
        """A frame from another trainer rank or a daemon.

        Returns the actions; ``Close`` carries the reason when the round is lost.
        """
        self._check(frame)
        self._note(f"{frame.opcode.name} from {peer}")
        if frame.opcode is Opcode.READY and self.state is State.GATHERING:
            if frame.version != self.version:
                return self.abort(
                    f"trainer rank {peer} offers version {frame.version}, rank 0 {self.version}"
                )
            if frame.index != self._call:
                return self.abort(
                    f"trainer rank {peer} makes its broadcast number {frame.index}, rank 0 number "
                    f"{self._call}; all ranks must call broadcast_weights equally often, or steps would be "
                    "mixed"
                )
            if frame.text != self._encoding:
                return self.abort(
                    f"trainer rank {peer} broadcasts with encoding={frame.text!r}, rank 0 with "
                    f"{self._encoding!r}; all ranks must pass the same"
                )
            self.layouts[peer] = frame.digest
            self._waiting.discard(peer)
            return self._move_if_ready()
        if frame.opcode is Opcode.STAGED and self.state is State.MOVING:
            return self._staged(peer)
        if frame.opcode is Opcode.COMMITTED and self.state is State.COMMITTING:
            return self._committed(peer, frame.text)
        if frame.opcode in (Opcode.FAILED, Opcode.ABORT):
            return self.abort(frame.text)
        if frame.opcode is Opcode.SHUTDOWN:
            return [] if self.state is State.CLOSED else self.abort(f"control rank {peer} shut down")
        raise self._impossible(f"{frame.opcode.name} from control rank {peer}")

    def _staged(self, peer: int) -> list[Action]:
        self._waiting.discard(peer)
        if self._waiting:
            return []
        release: list[Action] = [
            Send(self._others, self._frame(Opcode.RELEASE)),
            Released(self.version),
        ]
        if self._asks:
            self.state = State.STAGED
            return [*release, Staged(self.version)]
        self.state, self._waiting = State.COMMITTING, set(self._daemons)
        return release

    def commit(self) -> list[Action]:
        """Every server that is to have the version holds it: make it live."""
        self._note("commit")
        if self.state is not State.STAGED:
            raise self._impossible("commit")
        self.state = State.COMMITTING
        self._waiting = set(self._daemons)
        return [Send(self._daemons, self._frame(Opcode.COMMIT))]

    def _committed(self, peer: int, text: str) -> list[Action]:
        self.measurements.append(text)
        self._waiting.discard(peer)
        if self._waiting:
            return []
        self.state = State.IDLE
        done = Send(self._others, self._frame(Opcode.DONE, text=self.measurements[0]))
        return [done, Finished(self.version, self.measurements[0])]

    def abort(self, reason: str) -> list[Action]:
        """Give the round and the epoch up."""
        self._note(f"abort: {reason}")
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        frame = self._frame(Opcode.ABORT, text=reason)
        return [Send(self._others + self._daemons, frame), Close(reason)]

    def shutdown(self) -> list[Action]:
        """Orderly end."""
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        return [Send(self._others + self._daemons, self._frame(Opcode.SHUTDOWN)), Close("")]


class Member(_Machine):
    """The side of a trainer rank other than 0: ready, move, released, done."""

    @property
    def waits_for(self) -> str:
        """What the round waits for now, in words."""
        if self.state is State.GATHERING:
            return "every trainer rank to call broadcast_weights"
        return _WAITS_FOR.get(self.state, "nothing")

    def begin(self, version: int, layout_digest: bytes, call: int, encoding: str) -> list[Action]:
        """Tell the coordinator that our weights are stable; see ``Coordinator.begin``."""
        self._note(f"begin {version}")
        if self.state is not State.IDLE or version <= self.version:
            raise self._impossible(f"begin of version {version}")
        self.version, self.state = version, State.GATHERING
        ready = self._frame(Opcode.READY, digest=layout_digest, index=call, text=encoding)
        return [Send((0,), ready)]

    def on_frame(self, frame: Frame) -> list[Action]:
        """A frame from the coordinator."""
        self._check(frame)
        self._note(frame.opcode.name)
        if frame.opcode is Opcode.BEGIN and self.state is State.GATHERING:
            self.state = State.MOVING
            return [Stage(frame.version, frame.digest, frame.text)]
        if frame.opcode is Opcode.RELEASE and self.state is State.MOVING:
            self.state = State.COMMITTING
            return [Released(self.version)]
        if frame.opcode is Opcode.DONE and self.state is State.COMMITTING:
            self.state = State.IDLE
            return [Finished(self.version, frame.text)]
        if frame.opcode is Opcode.BUCKET:
            return []
        if frame.opcode is Opcode.ABORT:
            return self._close(frame.text)
        if frame.opcode is Opcode.SHUTDOWN:
            return self._close("" if self.state is State.IDLE else "trainer rank 0 shut down")
        raise self._impossible(f"{frame.opcode.name} from trainer rank 0")

    def leave(self) -> list[Action]:
        """Orderly end, ours or an answer to the coordinator's."""
        return self._close("")

    def on_failure(self, reason: str) -> list[Action]:
        """Something of ours broke: tell the coordinator, who aborts the round for all."""
        if self.state is State.CLOSED:  # said already: nobody listens behind our SHUTDOWN
            return []
        failed = Send((0,), self._frame(Opcode.FAILED, text=reason))
        return [failed, *self._close(reason)]

    def _close(self, reason: str) -> list[Action]:
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        return [Send((0,), self._frame(Opcode.SHUTDOWN)), Close(reason)]
