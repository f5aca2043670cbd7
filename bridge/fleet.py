"""The servers that one trainer feeds: one as a rule, or several, which get each version in the same round.

Each server has a session of its own, with its epoch, groups and background thread, so their layouts may
differ and all of them take the bytes at the same time. Here is what several need beyond that: who takes part
in a round, the one decision to commit (``protocol.ballot``), and one outcome for the caller.

Trainer rank 0 decides. The others learn it server by server, as DONE or ABORT of that server's epoch, so that
all ranks tell the same of a round. Before each round the ranks agree, in a group of their own, on
whom to meet anew.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bridge.catalogue import Catalogue
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import BridgeError, ConfigError, RendezvousError, RendezvousRefused, RoundAborted
from bridge.job import Encoding, Job, Outcome, Receipt, forget_frames
from bridge.joining import RETRY_S, RankMissing, highest
from bridge.protocol.ballot import GIVEN_UP, Ballot, Policy, Verdict
from bridge.rounds import Session, write_flight
from bridge.sharding import LocalShards, current_gpu

logger = logging.getLogger(__name__)

OWN_RANKS = "its own ranks to come to the next broadcast"
FIRST_S = 30.0  # so long a server that was never met is waited for beside others, once


class Server:
    """One server, as a trainer rank sees it from epoch to epoch."""

    def __init__(self, config: BridgeConfig) -> None:
        self.config = config
        self.name = config.logdir or config.config_path or ""
        self.catalogue: Catalogue | None = None
        self.base: tuple[tuple[str, str], int] | None = None  # launch and version of what we last made live
        self.before: int | None = None  # the version that we had made live there before
        self.sent_model = False  # whether we have ever sent it weights of the model itself
        self.serves_anothers_model = False  # and we have sent it adapters
        self.merged = False  # whether what it has of the model from us has adapters merged into it
        self._sending_merged = False
        self._sending_adapter = False
        # How many rounds of ours, of the model and of an adapter, have made what it serves, at most; and what
        # a rollback comes back to, of which at first we know nothing.
        self._serves = self._newest = (0, 0)
        self._kept = (-1, -1)
        self.tried = False
        self._trainer = secrets.token_hex(16)  # what we are called there, from epoch to epoch
        self._session: Session | None = None

    @property
    def met(self) -> bool:
        """Whether there is a session; it may be over."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session of a server that was met."""
        assert self._session is not None, f"{self.name} was not met"
        return self._session

    @property
    def version(self) -> int:
        """The version known to be live there; 0 before the first."""
        return self._session.version if self._session is not None else 0

    @property
    def launch(self) -> tuple[str, str]:
        """Where it is, and which launch: another one may have the same run directory."""
        mapping = self.session.mapping
        return mapping.run_dir, mapping.rendezvous.launch if mapping.rendezvous else ""

    def is_over(self, device: torch.device | None) -> bool:
        """Whether it must be met anew, also because the weights have come to a GPU since."""
        session = self._session
        return session is None or bool(session.closed) or (session.device is None and device is not None)

    def open(self, ranks: Ranks, device: torch.device | None, *, patient: bool = True) -> None:
        """Meet it anew; see ``Session.open``."""
        self.close()
        self.tried = True
        self._session = Session.open(
            self.config, ranks, device=device, trainer=self._trainer, patient=patient
        )
        self._session.resumes = self.base is not None

    def close(self) -> None:
        """End the session, if there is one."""
        self.catalogue = None
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def has_our_adapter(self) -> bool:
        """Whether an adapter that we sent by itself is there."""
        return self._newest[1] > 0

    def send(self, shards: LocalShards, *, merged: bool = False) -> None:
        """A round with ``shards`` begins; ``merged`` if adapters are in them."""
        self._sending_merged = merged or (self.merged and shards.partial)
        self._sending_adapter = bool(shards.layout.leading)
        if self._sending_adapter and self.base is None and self.version:
            self.serves_anothers_model = True
        self.sent_model = self.sent_model or not self._sending_adapter

    def is_rolled_back(self, *, adapter: bool) -> bool:
        """Whether its weights, with ``adapter`` the model's alone, are older than what we sent last."""
        return self._serves[0] != self._newest[0] if adapter else self._serves != self._newest

    def remember(self, version: int, *, rolled_back: bool) -> None:
        """``version`` was made live there by us."""
        if rolled_back:
            self._serves, self._kept = self._kept, self._serves
            if self._newest == (0, 0):  # neither is ours
                self._serves = self._kept = (-1, -1)
        else:
            model, adapters = self._newest
            # Not what is newest: an adapter comes to the weights of the model that are there.
            of_model = self._serves[0] if self._sending_adapter else model + 1
            if not self._sending_adapter:
                self.merged = self._sending_merged
            self.serves_anothers_model &= self._sending_adapter
            now = (of_model, adapters + self._sending_adapter)
            self._serves, self._kept, self._newest = now, self._serves, now
        if self._session is not None:
            launch = self.launch
            self.before = self.base[1] if self.base is not None and self.base[0] == launch else None
            self.base = (launch, version)


class Fleet:
    """All configured servers. Methods that say so are called by every trainer rank, in the same order."""

    def __init__(self, config: BridgeConfig, own_ranks: Callable[[], Ranks]) -> None:
        self.servers = tuple(Server(one) for one in config.servers())
        self._policy = config.commit
        self._stage_timeout_s = config.stage_timeout_s
        self._connect_timeout_s = config.connect_timeout_s
        self._ranks_timeout_s = config.ranks_timeout_s
        self._own_ranks = own_ranks
        self._absent: dict[str, str] = {}
        # The highest number that a server may serve by us, as ranks agreed or rank 0 decided.
        self._newest = config.versions_after

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.servers) > 1

    @property
    def version(self) -> int:
        """The newest version that is live on any of them, as far as this rank knows."""
        return max(server.version for server in self.servers)

    @property
    def agrees(self) -> bool:
        """Whether the ranks agree before each round: several servers, or several ranks of the trainer."""
        return self.several or self._own_ranks().world_size > 1

    @property
    def stale(self) -> bool:
        """Whether the epoch had ended before the round, and none but this rank took part."""
        return not self.agrees and self.servers[0].met and self.servers[0].session.stale

    # --- meeting -----------------------------------------------------------------------------------

    def ready(self, device: torch.device | None) -> list[Server]:
        """The servers of the next round, met anew where their epoch is over. Every rank calls it.

        The news that an epoch is over reaches ranks at different times, and one that met the server anew by
        itself would wait for the others, who are elsewhere: so they decide together.

        Raises:
            BridgeError: a server cannot be met, and the policy is "all", or it is the last.
            PeerLost: another trainer rank did not come.
        """
        try:
            return self._meet(device) if self.several else [self._meet_only(device)]
        except RendezvousRefused:
            raise  # the daemon said why, and knows more
        except BridgeError as err:
            write_flight(self.servers[0].config, str(err))
            raise

    def _meet_only(self, device: torch.device | None) -> Server:
        (server,) = self.servers
        over = server.is_over(device)
        if self.agrees:
            (over,) = self._agree(refusing=False, over=[over])
        if over:
            server.open(self._own_ranks(), device)
        return server

    def refuse(self, reason: str) -> None:
        """This rank cannot take part in a round that the others begin: let nobody wait for it."""
        if self.agrees:
            self._agree(refusing=True, over=[False] * len(self.servers))
        elif self.servers[0].met:
            self.servers[0].session.refuse_round(reason)

    def _agree(self, *, refusing: bool, over: Sequence[bool]) -> list[bool]:
        newest = self._newest_known
        refused, self._newest, *anew = self._highest([int(refusing), newest, *map(int, over)])
        if refused and not refusing:
            raise RoundAborted(
                "another trainer rank cannot take part in this round, and its error says why; every server "
                "keeps its weights"
            )
        return list(map(bool, anew))

    def _highest(self, values: Sequence[int]) -> list[int]:
        """As ``joining.highest``; meanwhile every server's daemon is told which ranks are waited for."""
        self._say(lambda: OWN_RANKS)
        try:
            return highest(
                values, self._own_ranks(), timeout_s=self._ranks_timeout_s, tell=self._say_who_is_missing
            )
        finally:
            self._say(str)

    def _say_who_is_missing(self, missing: Callable[[], list[int]]) -> None:
        def waits_for() -> str:
            ranks = ", ".join(map(str, missing()))
            return f"trainer rank(s) {ranks} to come to the next broadcast" if ranks else OWN_RANKS

        self._say(waits_for)

    def _say(self, waits_for: Callable[[], str]) -> None:
        for server in self.servers:
            if server.met:
                server.session.waits_for = waits_for

    def _meet(self, device: torch.device | None) -> list[Server]:
        ranks = self._own_ranks()
        anew = self._agree(refusing=False, over=[server.is_over(device) for server in self.servers])
        over = [server for server, flag in zip(self.servers, anew, strict=True) if flag]
        new = {server.name for server in over if not server.tried}
        began = time.monotonic()
        while True:
            faults = self._open(over, ranks, device)
            present = [server for server in self.servers if server.met]
            if self._policy == "all" or not faults:
                break
            # Without one there is no round, so the first that comes is waited for; where there is one, what
            # may have been started beside it a little while longer, but only once.
            coming = {name for name, err in faults.items() if _may_come(err)}
            if present:
                coming &= new
            limit_s = min(FIRST_S, self._connect_timeout_s) if present else self._connect_timeout_s
            hope = bool(coming) and time.monotonic() - began < limit_s
            if not self._highest([int(hope)])[0]:
                break
            threading.Event().wait(RETRY_S)
            over = [server for server in over if not server.met]
        self._check_absent(faults)
        self._check_policy(present)
        return present

    def _open(
        self, over: Sequence[Server], ranks: Ranks, device: torch.device | None
    ) -> dict[str, BridgeError]:
        """Meet these servers anew; why some cannot be met, by name, on all ranks alike."""
        faults: dict[str, BridgeError] = {}
        for server in over:
            try:
                # One that is not there must not hold up the others.
                server.open(ranks, device, patient=self._policy == "all")
            except RankMissing:
                raise  # the other servers would be met in vain, each after the same wait
            except BridgeError as err:
                forget_frames(err)  # they hold the server's store, and ``faults``, which holds the error
                faults[server.name] = err
        if over:
            lost = self._highest([int(server.name in faults) for server in over])
            for server in (s for s, flag in zip(over, lost, strict=True) if flag):
                server.close()
                faults.setdefault(server.name, RendezvousError("another trainer rank could not join it"))
        return faults

    def _check_absent(self, faults: Mapping[str, BridgeError]) -> None:
        self._absent = {name: str(err) for name, err in faults.items()}
        if faults and (self._policy == "all" or len(faults) == len(self.servers)):
            kind = type(next(iter(faults.values())))
            raise kind(
                f"{len(faults)} of {len(self.servers)} servers cannot be met, and commit={self._policy!r} "
                f"needs {'all' if self._policy == 'all' else 'one'}: {_listed(self._absent)}"
            )
        for name, reason in self._absent.items():
            self._warn("server %s is left out of this round: %s", name, reason)

    def _check_policy(self, present: Sequence[Server]) -> None:
        in_place = [server.name for server in present if server.session.in_place]
        if in_place and self._policy == "all":
            raise ConfigError(
                f"commit='all' needs servers that can give a staged version up, and {', '.join(in_place)} "
                "cannot: with --staging in-place it is written over the old one; use commit='available'"
            )

    def _warn(self, message: str, *args: object) -> None:
        """Once for all ranks, which find the same."""
        if self._own_ranks().rank == 0:
            logger.warning(message, *args)

    # --- a round -----------------------------------------------------------------------------------

    @property
    def _made(self) -> list[int]:
        """The versions that this trainer has made live last, of those servers where it has."""
        return [server.base[1] for server in self.servers if server.base is not None]

    @property
    def _newest_known(self) -> int:
        """The highest number that this rank knows of, whatever servers do that were started anew."""
        return max([self._newest, self.version, *self._made])

    def that_take_parts(self, servers: Sequence[Server], *, whole_adapter: bool = False) -> list[Server]:
        """Those of ``servers`` over whose version a part of the weights may be laid.

        That is the one this trainer made live last, or, if it has made none, the checkpoint; on all of them
        the same. Of any other, a rollback's too, it need not hold the rest: a mixture would be nobody's.
        ``whole_adapter`` says that the part is all that an adapter is: an earlier one may have been rolled
        back, and as long as this trainer has sent no weights of the model, and all serve the same, whatever
        it is laid over is what the adapter belongs to. One that missed some of our adapters lies over that
        model still.

        Raises:
            ConfigError: one of them serves another, and the policy is "all", or none of them may.
        """
        one = len({server.session.version for server in servers}) == 1
        adapters_only = whole_adapter and not any(server.sent_model for server in self.servers)
        if adapters_only and one:
            return list(servers)
        wanted = max(self._made, default=0)
        what = f"version {wanted}" if wanted else "the checkpoint"
        faults = self._serving_another(servers, wanted)
        if not wanted and self._newest:  # as after a requeue: what an earlier attempt had sent is gone
            before = f"was served version {self._newest} before, and what it serves lacks that"
            faults = {server.name: _at(server, before) for server in servers} | faults
        for server in servers:
            session = server.session
            if adapters_only and server.base == (server.launch, session.version):
                faults.pop(server.name, None)
            elif server.serves_anothers_model and not whole_adapter:
                faults.setdefault(server.name, _at(server, "serves a model that this trainer did not send"))
            elif server.is_rolled_back(adapter=whole_adapter):
                faults.setdefault(server.name, _at(server, "was rolled back to earlier weights"))
            elif whole_adapter and server.merged:
                faults.setdefault(server.name, _at(server, "serves weights that adapters are merged into"))
        fit = [server for server in servers if server.name not in faults]
        if faults and (self._policy == "all" or not fit):
            raise ConfigError(
                f"part of the weights was to be laid over {what}, but {', '.join(faults.values())}; "
                "call broadcast_weights once"
            )
        for name, fault in faults.items():
            self._absent[name] = f"a part is laid over {what}, but {fault}"
            self._warn("server %s is left out of this round: %s", name, self._absent[name])
        return fit

    def _serving_another(self, servers: Sequence[Server], wanted: int) -> dict[str, str]:
        """Those that do not serve version ``wanted`` of this trainer, or, if it has made none, of anybody."""
        made = self._made
        return {
            server.name: _at(server, _serves(server.session, wanted))
            for server in servers
            if server.session.version != wanted
            or server.session.outdated
            or (made and server.base != (server.launch, wanted))
        }

    def roll_back(self, servers: Sequence[Server], to: int | None, *, call: int) -> Outcome:
        """All ``servers`` come back to one version, or none does; each checks that it holds that one.

        Raises:
            ConfigError: servers are absent, or this trainer cannot know which version; nothing has begun.
        """
        if not self.several:
            return servers[0].session.submit(None, call=call, version=None, to=to)
        served = max(self._made or [server.session.version for server in servers])
        others = self._serving_another(servers, served)
        before = {server.name: server.before if to is None else to for server in servers}
        wanted = before[servers[0].name]
        absent = len(servers) < len(self.servers)
        if others or absent or wanted is None or set(before.values()) != {wanted}:
            held = ", ".join(f"{name}: {'unknown' if v is None else v}" for name, v in before.items())
            raise ConfigError(
                f"the versions that this trainer had made live before are not one ({held}), or servers are "
                "absent, so a rollback would part them; broadcast the wanted weights instead"
            )
        parts = [(server, None) for server in servers]
        return self._submit(parts, call=call, version=None, encoding="dense", policy="all", to=wanted)

    def submit(
        self,
        parts: Sequence[tuple[Server, LocalShards]],
        *,
        call: int,
        version: int | None,
        encoding: Encoding,
        merged: bool = False,
    ) -> Outcome:
        """Hand a broadcast to the sessions' threads; see ``Session.submit``.

        ``merged``: the weights have adapters merged into them.

        Raises:
            ConfigError: they have, and an adapter that this trainer sent is served beside them: who asks for
                that would get both.
        """
        if merged and (twice := [server.name for server, _ in parts if server.has_our_adapter]):
            raise ConfigError(
                f"weights with adapters merged were to be sent to {', '.join(twice)}, where an adapter of "
                "this trainer is served beside them, and who asks for that would get both; send the model "
                "without adapters='merge', or start the server anew"
            )
        for server, shards in parts:
            server.send(shards, merged=merged)
        if not self.several:
            ((server, shards),) = parts
            if version is None and server.version < self._newest_known:
                version = self._newest_known + 1
            return server.session.submit(shards, call=call, version=version, encoding=encoding)
        return self._submit(parts, call=call, version=version, encoding=encoding, policy=self._policy)

    def _submit(
        self,
        parts: Sequence[tuple[Server, LocalShards | None]],
        *,
        call: int,
        version: int | None,
        encoding: Encoding,
        policy: Policy,
        to: int | None = None,
    ) -> Outcome:
        wanted = self._newest_known + 1 if version is None else version

        def begin() -> None:
            self._newest = max(self._newest, wanted)

        sessions = {server.name: server.session for server, _ in parts}
        leads = self._own_ranks().rank == 0
        tally = _Tally(sessions, policy, self._stage_timeout_s, before_commit=begin) if leads else None
        jobs = {
            server.name: server.session.submit(
                shards, call=call, version=wanted, encoding=encoding, vote=_Say(tally, server.name), to=to
            )
            for server, shards in parts
        }
        return _Together(jobs, self._absent, policy=policy, version=wanted, warn=self._warn)

    def remember(self, receipt: Receipt, *, rolled_back: bool = False) -> None:
        """What a round or a rollback has made live."""
        for server in self.servers:
            if not self.several or server.name in receipt.servers:
                server.remember(receipt.version, rolled_back=rolled_back)

    def beat(self) -> None:
        """Send a heartbeat to every server that was met; the only one is met first.

        Raises:
            PeerLost: one of them is gone, and the policy is "all".
        """
        if not self.several:
            (server,) = self.servers
            if not server.met:
                self.ready(current_gpu())
            elif not self.agrees:  # else the next broadcast, which every rank makes, meets it anew
                self.ready(server.session.device)
        for server in self.servers:
            if server.met and not (self._policy == "available" and server.session.closed):
                server.session.beat()

    def close(self) -> None:
        """Leave all servers."""
        for server in self.servers:
            server.close()


def _may_come(err: BridgeError) -> bool:
    """Whether a server that could not be met may be there a little later."""
    return isinstance(err, RendezvousError) and not isinstance(err, RendezvousRefused)


def _at(server: Server, what: str) -> str:
    return f"the server at {server.session.mapping.run_dir} {what}"


def _serves(session: Session, wanted: int) -> str:
    if session.outdated:
        return f"was started again, and serves an older version than {session.version}"
    return f"serves version {session.version}{'' if session.version != wanted else ' of another history'}"


def _listed(reasons: Mapping[str, object]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


class _Tally:
    """Trainer rank 0's count of the votes, which come from the sessions' threads."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        policy: Policy,
        stage_timeout_s: float,
        *,
        before_commit: Callable[[], None],
    ) -> None:
        """``before_commit`` is called once some server is about to be told to commit."""
        self._before_commit = before_commit
        self.stage_timeout_s = math.inf if policy == "all" else stage_timeout_s
        # A session keeps its last round, that its vote, and that this: were sessions kept here, whatever an
        # epoch held (groups, sockets, snapshots) would be kept by its own last round.
        self._sessions = weakref.WeakValueDictionary(sessions)
        self._ballot = Ballot(sessions, policy)
        self._lock = threading.Lock()

    def count(self, event: Callable[[Ballot], Verdict | None]) -> None:
        """Take one event, and carry out the verdict if it led to one."""
        with self._lock:
            verdict = event(self._ballot)
        if verdict is None:
            return
        if verdict.commit:
            self._before_commit()
        for name in verdict.commit:
            if (session := self._sessions.get(name)) is not None:  # else it is over, and so is its thread
                session.commit()
        for name in verdict.give_up:
            if (session := self._sessions.get(name)) is not None:
                session.give_up(verdict.reason)


@dataclass(frozen=True)
class _Say:
    """One server's vote; on ranks other than 0, who do not count, nothing."""

    tally: _Tally | None
    server: str

    @property
    def stage_timeout_s(self) -> float:
        return math.inf if self.tally is None else self.tally.stage_timeout_s

    def staged(self) -> None:
        self._count(lambda ballot: ballot.staged(self.server))

    def expired(self) -> None:
        self._count(lambda ballot: ballot.expired(self.stage_timeout_s))

    def failed(self, error: BridgeError) -> None:
        self._count(lambda ballot: ballot.failed(self.server, hopeless=isinstance(error, ConfigError)))

    def _count(self, event: Callable[[Ballot], Verdict | None]) -> None:
        if self.tally is not None:
            self.tally.count(event)


class _Together:
    """The outcome of one broadcast to several servers."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        absent: Mapping[str, str],
        *,
        policy: Policy,
        version: int,
        warn: Callable[..., None],
    ) -> None:
        self.seen = False
        self._jobs = jobs
        self._absent = absent
        self._policy = policy
        self._version = version
        self._warn = warn

    @property
    def done(self) -> bool:
        return all(job.done for job in self._jobs.values())

    @property
    def free(self) -> bool:
        return all(job.free for job in self._jobs.values())

    def wait_released(self) -> None:
        """Wait until every server has read the weights, or is left out; raises if the round failed before."""
        for job in self._jobs.values():
            job.released.wait()
        self._raise_failure()

    def wait(self) -> Receipt:
        """Wait for the outcome on every server."""
        for job in self._jobs.values():
            job.finished.wait()
        first = not self.seen
        self.seen = True
        self._raise_failure()
        errors = {name: str(job.error) for name, job in self._jobs.items() if job.error is not None}
        if first:
            for name, reason in errors.items():
                self._warn("version %d is not live on server %s: %s", self._version, name, reason)
        receipts = {name: job.receipt for name, job in self._jobs.items() if job.receipt is not None}
        made = list(receipts.values())
        return Receipt(
            version=self._version,
            bytes=sum(receipt.bytes for receipt in made),
            transfer_s=max(receipt.transfer_s for receipt in made),
            stage_s=max(receipt.stage_s for receipt in made),
            flip_s=max(receipt.flip_s for receipt in made),
            transport="+".join(sorted({part for r in made for part in r.transport.split("+")})),
            total_s=max(receipt.total_s for receipt in made),
            servers=tuple(receipts),
            restores=made[0].restores,
            absent={**self._absent, **errors},
        )

    def _raise_failure(self) -> None:
        errors = {name: job.error for name, job in self._jobs.items() if job.error is not None}
        if not errors or (self._policy == "available" and len(errors) < len(self._jobs)):
            return
        self.seen = True
        # Those that were given up because of another come last: the other is the cause.
        ordered = dict(sorted(errors.items(), key=lambda item: GIVEN_UP in str(item[1])))
        live = [name for name, job in self._jobs.items() if job.receipt is not None]
        where = f"on {', '.join(live)}, but not on every server" if live else "on no server"
        raise type(next(iter(ordered.values())))(
            f"version {self._version} is live {where}: {_listed(ordered)}"
        )
