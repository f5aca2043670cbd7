"""Several servers: who decides to commit what, where, and what the caller is told."""

from __future__ import annotations

import contextlib
import gc
import itertools
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import bridge
from bridge import joining
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import (
    BridgeError,
    ConfigError,
    MappingError,
    PeerLost,
    RendezvousError,
    RendezvousRefused,
    RoundAborted,
    TransferError,
)
from bridge.fleet import Server
from bridge.guard import _active
from bridge.job import Encoding, Job, Receipt, Vote
from bridge.joining import RankMissing
from bridge.protocol import mapping as mapping_file
from bridge.protocol.ballot import Ballot, Policy, Verdict
from bridge.protocol.mapping import CONFIG_NAME, Rendezvous
from bridge.protocol.plan import Layout, Leading
from bridge.rounds import Session
from bridge.sharding import LocalShards
from bridge.wire import peer_memory, rendezvous
from tests.support.mappings import identity_mapping

# --- the ballot ------------------------------------------------------------------------------------------


def verdict_of(ballot: Ballot, events: str) -> Verdict | None:
    """Capital letters: that server has staged; small ones: it has failed."""
    given = [
        ballot.staged(event.lower()) if event.isupper() else ballot.failed(event.lower()) for event in events
    ]
    verdicts = [verdict for verdict in given if verdict is not None]
    assert len(verdicts) <= 1, "a verdict is final"
    return verdicts[0] if verdicts else None


@pytest.mark.parametrize("votes", list(itertools.product("Aa", "Bb", "Cc")), ids="".join)
def test_every_order_of_every_vote(votes: tuple[str, ...]) -> None:
    staged = {vote.lower() for vote in votes if vote.isupper()}
    for order in itertools.permutations(votes):
        strict = verdict_of(Ballot("abc", "all"), "".join(order))
        assert strict is not None
        assert set(strict.commit) == (staged if len(staged) == 3 else set())
        failed = [vote for vote in order if vote.islower()]
        assert set(strict.give_up) == ({*"abc"} - {failed[0]} if failed else set())
        lenient = verdict_of(Ballot("abc", "available"), "".join(order))
        assert lenient == Verdict(tuple(vote.lower() for vote in order if vote.isupper()), ())


@pytest.mark.parametrize(
    ("policy", "events", "expected"),
    [
        ("all", "", None),
        ("all", "AB", None),
        ("available", "", None),
        ("available", "ab", None),  # c may still stage
        ("available", "Ab", None),
        ("available", "Aa", None),  # it staged and was lost before the verdict
        ("available", "AaBc", Verdict(("b",), ())),
        ("all", "AaBC", Verdict((), ("b", "c"), "given up because of a")),
    ],
)
def test_the_verdict_waits_for_what_it_needs(policy: Policy, events: str, expected: Verdict | None) -> None:
    assert verdict_of(Ballot("abc", policy), events) == expected


def test_who_has_staged_waits_for_the_others_so_long() -> None:
    lenient = Ballot("abc", "available")
    assert lenient.expired(9.0) is None, "nobody has staged: there is nothing to commit"
    lenient.staged("b")
    assert lenient.expired(9.0) == Verdict(("b",), ("a", "c"), "not staged 9 s after another server was")
    assert lenient.staged("a") is None, "too late"
    strict = Ballot("ab", "all")
    strict.staged("b")
    assert strict.expired(9.0) is None


@pytest.mark.parametrize("policy", ["all", "available"])
def test_the_trainers_own_fault_is_nobodys_version(policy: Policy) -> None:
    ballot = Ballot("abc", policy)
    ballot.staged("a")
    assert ballot.failed("b", hopeless=True) == Verdict((), ("a", "c"), "given up because of b")


# --- a bridge to several servers -------------------------------------------------------------------------

SHAPES = {"weight": (4, 3), "bias": (4,)}


class FakeSession:
    """Stands where a session is: the test says what its server does."""

    def __init__(
        self, place: str, version: int, dtype: str, device: torch.device | None, launch: str
    ) -> None:
        mapping = identity_mapping(("checkpoint", SHAPES), dtype=dtype)
        meeting = Rendezvous(host="h", port=1, secret=secrets.token_hex(4), launch=launch)
        self.mapping = msgspec.structs.replace(mapping, run_dir=f"/run/{place}", rendezvous=meeting)
        self.place, self.rank, self.device = place, 0, device
        self.version, self.closed, self.stale, self.in_place = version, "", False, False
        self.outdated = False
        self.job: Job | None = None
        self.committed = False
        self.beats = 0

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
        version = self.version + 1 if version is None else version
        self.job = Job(shards, version=version, call=call, encoding=encoding, vote=vote, to=to)
        self.committed = False
        if self.closed:
            self.job.finish(None, RoundAborted(self.closed))
        elif _answers.get(self.place) is not None:
            _answers[self.place](self)
        return self.job

    def stage(self) -> None:
        assert self.job is not None
        self.job.released.set()
        if self.job.vote is not None:
            self.job.vote.staged()
        else:  # the only server
            self.commit()

    def fail(self, error: BridgeError) -> None:
        assert self.job is not None
        self.closed = str(error)
        self.job.finish(None, error)

    def commit(self) -> None:
        assert self.job is not None
        self.committed = True
        self.version = self.job.version
        made = Receipt(
            version=self.version, bytes=10, transfer_s=0.1, stage_s=0.2, flip_s=0.3, transport="pull"
        )
        self.job.finish(made, None)

    def give_up(self, reason: str) -> None:
        self.closed = reason
        if self.job is not None:
            self.job.forsake(RoundAborted(reason))

    def refuse_round(self, reason: str) -> None:
        self.closed = reason

    def beat(self) -> None:
        if self.closed:
            raise PeerLost(self.closed)
        self.beats += 1

    def close(self) -> None:
        self.closed = self.closed or "closed"


_answers: dict[str, Callable[[FakeSession], None]] = {}


class Servers:
    """What stands at the other end: by log directory the served version, or why nobody answers."""

    def __init__(self) -> None:
        self.served: dict[str, int | str] = {"a": 0, "b": 0, "c": 0}
        self.dtypes = dict.fromkeys("abc", "float32")
        self.launches = dict.fromkeys("abc", "first")
        self.sessions: dict[str, FakeSession] = {}
        self.patience: list[tuple[str, bool]] = []
        self.called: dict[str, set[str]] = {}  # what trainers are called there

    def open(
        self,
        config: BridgeConfig,
        _: Ranks,
        *,
        device: torch.device | None,
        trainer: str,
        patient: bool = True,
    ) -> FakeSession:
        assert config.logdir is not None
        self.called.setdefault(config.logdir, set()).add(trainer)
        self.patience.append((config.logdir, patient))
        served = self.served[config.logdir]
        if isinstance(served, str):
            raise RendezvousError(served)
        place = config.logdir
        session = FakeSession(place, served, self.dtypes[place], device, self.launches[place])
        self.sessions[config.logdir] = session
        return session


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    made = Servers()
    monkeypatch.setattr(Session, "open", made.open)
    for name in ("VLLM_ENABLE_SHARED_WEIGHTS", "NUM_INFERENCE_NODES", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("bridge.fleet.FIRST_S", 0.2)
    _answers.clear()
    _answers.update(dict.fromkeys("abc", FakeSession.stage))
    yield made
    _answers.clear()


def trainer(policy: Policy = "all", connect_timeout_s: float = 60.0) -> bridge.Bridge:
    return bridge.Bridge(
        BridgeConfig(logdirs=("a", "b", "c"), commit=policy, connect_timeout_s=connect_timeout_s)
    )


def lost(name: str) -> Callable[[FakeSession], None]:
    return lambda session: session.fail(PeerLost(f"{name} is gone"))


MODEL = nn.Linear(3, 4)


@pytest.mark.parametrize("policy", ["all", "available"])
def test_a_version_goes_to_all_and_its_number_is_one_above_the_newest(
    servers: Servers, policy: Policy
) -> None:
    servers.served.update(a=3, b=7, c=0)
    made = trainer(policy)
    receipt = made.broadcast_weights(MODEL)
    assert (receipt.version, receipt.servers, receipt.absent) == (8, ("a", "b", "c"), {})
    assert (receipt.bytes, receipt.transport) == (30, "pull")
    assert made.weight_version == 8
    assert made.broadcast_weights(MODEL).version == 9
    assert made.broadcast_weights(MODEL, version=20).version == 20
    assert len(servers.patience) == 3, "epochs last"


def test_numbers_go_on_after_servers_were_started_again(servers: Servers) -> None:
    made = bridge.Bridge(BridgeConfig(logdirs=("a", "b", "c"), versions_after=5))
    assert made.broadcast_weights(MODEL).version == 6
    assert made.broadcast_weights(MODEL).version == 7
    servers.served.update(a=9)
    newer = bridge.Bridge(BridgeConfig(logdirs=("a", "b", "c"), versions_after=5))
    assert newer.broadcast_weights(MODEL).version == 10
    servers.served.update(a=0)
    _answers["a"] = FakeSession.commit
    alone = bridge.Bridge(BridgeConfig(logdir="a", versions_after=5))
    assert alone.broadcast_weights(MODEL).version == 6
    with pytest.raises(ConfigError, match="versions_after is -1; it must be a version"):
        BridgeConfig(logdir="a", versions_after=-1)


def test_a_number_is_not_given_twice_when_the_newest_server_is_gone(servers: Servers) -> None:
    made = trainer("available")
    _answers["b"] = lost("b")
    assert made.broadcast_weights(MODEL, version=9).servers == ("a", "c")
    for name in "ac":
        servers.sessions[name].closed = servers.served[name] = "gone"
    _answers["b"] = FakeSession.stage
    receipt = made.broadcast_weights(MODEL)
    assert (receipt.version, receipt.servers) == (10, ("b",))
    assert made.weight_version == 10


@pytest.mark.parametrize("policy", ["all", "available"])
def test_heartbeats_tell_who_is_gone_where_all_are_needed(servers: Servers, policy: Policy) -> None:
    made = trainer(policy)
    made.broadcast_weights(MODEL)
    made.send_heartbeat()
    servers.sessions["b"].closed = "b is gone"
    if policy == "all":
        with pytest.raises(PeerLost, match="b is gone"):
            made.send_heartbeat()
    else:
        made.send_heartbeat()
    assert [servers.sessions[name].beats for name in "abc"] == ([2, 1, 1] if policy == "all" else [2, 1, 2])


def test_all_or_none(servers: Servers) -> None:
    made = trainer()
    made.broadcast_weights(MODEL)
    _answers["b"] = lost("b's updater")
    with pytest.raises(PeerLost) as caught:
        made.broadcast_weights(MODEL)
    assert str(caught.value) == (
        "version 2 is live on no server: b: b's updater is gone; a: given up because of b; "
        "c: given up because of b"
    )
    assert [session.version for session in servers.sessions.values()] == [1, 1, 1]
    _answers["b"] = FakeSession.stage
    receipt = made.broadcast_weights(MODEL)
    assert (receipt.version, receipt.servers) == (2, ("a", "b", "c"))


def test_a_server_lost_behind_the_verdict_is_named(servers: Servers) -> None:
    made = trainer()
    _answers["b"] = lambda s: setattr(s, "commit", lambda: s.fail(TransferError("did not flip"))) or s.stage()
    with pytest.raises(TransferError, match="live on a, c, but not on every server: b: did not flip"):
        made.broadcast_weights(MODEL)
    assert made.weight_version == 1


def test_those_that_can_have_it_get_it(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer("available")
    servers.served["c"] = "nobody answers"
    _answers["a"] = lost("a's daemon")
    receipt = made.broadcast_weights(MODEL)
    assert receipt.servers == ("b",)
    assert receipt.absent == {"a": "a's daemon is gone", "c": "nobody answers"}
    said = [record.getMessage() for record in caplog.records if record.name == "bridge.fleet"]
    assert said == [
        "server c is left out of this round: nobody answers",
        "version 1 is not live on server a: a's daemon is gone",
    ]
    servers.served.update(a=0, c=0)
    _answers["a"] = FakeSession.stage
    servers.patience.clear()
    receipt = made.broadcast_weights(MODEL)
    assert (receipt.version, receipt.servers, receipt.absent) == (2, ("a", "b", "c"), {})
    assert servers.patience == [("a", False), ("c", False)], "one that was away must not hold the others up"


def test_none_is_an_error_even_then(servers: Servers) -> None:
    made = trainer("available", connect_timeout_s=1.0)
    _answers.update({name: lost(name) for name in "abc"})
    with pytest.raises(PeerLost, match="live on no server: a: a is gone; b: b is gone; c: c is gone"):
        made.broadcast_weights(MODEL)
    servers.served = dict.fromkeys("abc", "nobody answers")
    with pytest.raises(
        RendezvousError, match="3 of 3 servers cannot be met, and commit='available' needs one"
    ):
        made.broadcast_weights(MODEL)


def test_with_none_there_the_first_that_comes_is_waited_for(servers: Servers) -> None:
    made = trainer("available")
    made.broadcast_weights(MODEL)
    for session in servers.sessions.values():
        session.closed = "gone"
    servers.served = dict.fromkeys("abc", "vLLM starts again")
    coming = threading.Timer(1.0, servers.served.update, [{"b": 0}])
    coming.start()
    receipt = made.broadcast_weights(MODEL)
    coming.join()
    assert receipt.servers == ("b",)
    assert receipt.absent == {"a": "vLLM starts again", "c": "vLLM starts again"}


def test_a_server_that_was_never_met_is_waited_for_a_little_while_beside_others(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.fleet.FIRST_S", 20.0)
    servers.served["c"] = "vLLM starts"
    made = trainer("available")
    coming = threading.Timer(1.0, servers.served.update, [{"c": 0}])
    coming.start()
    assert made.broadcast_weights(MODEL).servers == ("a", "b", "c")
    coming.join()
    for session in servers.sessions.values():
        session.closed = "gone"
    servers.served["c"] = "vLLM starts again"
    servers.patience.clear()
    assert made.broadcast_weights(MODEL).servers == ("a", "b")
    assert servers.patience == [("a", False), ("b", False), ("c", False)]  # once each


def test_numbers_go_on_where_the_only_server_knows_nothing_of_them(servers: Servers) -> None:
    made = bridge.Bridge(BridgeConfig(logdir="a"))
    assert [made.broadcast_weights(MODEL).version for _ in range(2)] == [1, 2]
    servers.sessions["a"].closed = "its launcher was replaced"
    assert servers.served["a"] == 0
    assert made.broadcast_weights(MODEL).version == 3


@pytest.mark.parametrize("logdirs", [("a",), ("a", "b")])
def test_no_part_is_laid_over_the_checkpoint_in_place_of_an_earlier_attempts_weights(
    servers: Servers, logdirs: tuple[str, ...]
) -> None:
    made = bridge.Bridge(BridgeConfig(logdirs=logdirs, versions_after=7))
    part = ("bias", MODEL.bias.detach())
    with pytest.raises(ConfigError, match=r"was served version 7 before.* call broadcast_weights once"):
        made.broadcast_single_param(*part)
    assert made.broadcast_weights(MODEL).version == 8
    assert made.broadcast_single_param(*part).version == 9


def test_who_will_never_come_is_not_waited_for(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> FakeSession:
        raise RendezvousRefused("another trainer feeds it")

    monkeypatch.setattr(Session, "open", refuse)
    with pytest.raises(RendezvousRefused, match="another trainer feeds it"):
        trainer("available").broadcast_weights(MODEL)


def test_an_absent_server_stops_a_round_for_all(servers: Servers) -> None:
    servers.served["c"] = "nobody answers"
    made = trainer()
    with pytest.raises(RendezvousError, match="needs all: c: nobody answers"):
        made.broadcast_weights(MODEL)
    assert all(session.job is None for session in servers.sessions.values())
    servers.served["c"] = 0
    assert made.broadcast_weights(MODEL).servers == ("a", "b", "c")
    assert all(patient for _, patient in servers.patience)
    (a,), (b,), (c,) = servers.called.values()  # of which two were met twice
    assert len({a, b, c}) == 3


def test_what_the_trainer_may_not_ask_for_is_an_error_under_any_policy(servers: Servers) -> None:
    made = trainer("available")
    _answers["a"] = lambda session: session.fail(ConfigError("encoding='delta' cannot be had"))
    with pytest.raises(ConfigError, match="live on no server: a: encoding='delta' cannot be had"):
        made.broadcast_weights(MODEL)
    with pytest.raises(MappingError, match="server a: "):
        made.broadcast_weights(nn.Linear(5, 5))
    assert all(session.closed.startswith("server a: ") for session in servers.sessions.values())


def test_weights_staged_in_place_cannot_be_given_up(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = servers.open

    def in_place(*args: Any, **options: Any) -> FakeSession:
        session = opened(*args, **options)
        session.in_place = session.place == "b"
        return session

    monkeypatch.setattr(Session, "open", in_place)
    with pytest.raises(ConfigError, match=r"commit='all' needs servers that can give .* b cannot"):
        trainer().broadcast_weights(MODEL)
    assert trainer("available").broadcast_weights(MODEL).servers == ("a", "b", "c")


@pytest.mark.parametrize("policy", ["all", "available"])
def test_the_step_waits_until_every_server_has_read(servers: Servers, policy: Policy) -> None:
    made = trainer(policy)
    _answers.update(dict.fromkeys("bc", None))  # type: ignore[arg-type]  # they are busy reading
    pending = made.broadcast_weights(MODEL, blocking=False)
    assert isinstance(pending, bridge.PendingBroadcast)
    a, b, c = (servers.sessions[name] for name in "abc")
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    stepped: list[bool] = []
    waited: list[str] = []

    def read(session: FakeSession) -> Callable[[], bool]:
        def wait(*_: object) -> bool:
            waited.append(session.place)
            session.stage()
            return True

        return wait

    for session in (b, c):
        assert session.job is not None
        session.job.released.wait = read(session)  # type: ignore[method-assign, assignment]
    assert not pending.done
    assert a.job is not None
    assert not a.committed, "the others have not staged yet"
    MODEL.weight.grad = torch.zeros_like(MODEL.weight)
    optimizer.step()
    stepped.append(True)
    assert waited == ["b", "c"]
    assert pending.done
    assert pending.wait().servers == ("a", "b", "c")
    assert not any(guard is pending._guard for guard in _active)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_broadcast_whose_wait_is_interrupted_is_still_under_way(servers: Servers, blocking: bool) -> None:
    made = trainer("all")
    made.broadcast_weights(MODEL)
    job = servers.sessions["a"].job
    _answers.update(a=interrupted)  # whose wait comes first
    with pytest.raises(KeyboardInterrupt):
        made.broadcast_weights(MODEL, blocking=blocking).wait()  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        made.broadcast_weights(MODEL)
    busy = servers.sessions["a"]
    assert busy.job is not None
    assert busy.job is not job
    assert busy.job.version == 2, "no other was submitted in the middle of it"
    del busy.job.finished.wait  # type: ignore[method-assign]
    _answers.update(a=FakeSession.stage)
    threading.Timer(0.05, busy.stage).start()
    assert made.broadcast_weights(MODEL).version == 3
    assert _active == ()


def interrupted(session: FakeSession) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    assert session.job is not None
    session.job.finished.wait = interrupt  # type: ignore[method-assign]


def test_a_server_that_was_given_up_holds_no_step_up(servers: Servers) -> None:
    made = trainer("available")
    _answers.update(b=None)  # type: ignore[arg-type]
    pending = made.broadcast_weights(MODEL, blocking=False)
    assert isinstance(pending, bridge.PendingBroadcast)
    first = servers.sessions["a"].job
    assert first is not None
    assert first.vote is not None
    assert first.vote.stage_timeout_s == 30.0
    first.vote.expired()
    pending.wait_released()
    assert pending.wait().absent == {"b": "not staged 30 s after another server was"}
    stuck = servers.sessions["b"].job
    assert stuck is not None
    assert stuck.shards.tensors, "its thread may still be in the middle of them"
    stuck.finish(None, PeerLost("at last"))
    assert isinstance(stuck.error, RoundAborted), "the outcome is what the caller was told"
    assert stuck.shards.tensors == []


def test_a_part_goes_only_where_the_last_version_is(servers: Servers) -> None:
    made = trainer("available")
    made.broadcast_weights(MODEL)
    _answers["b"] = lost("b")
    made.broadcast_weights(MODEL)
    servers.served["b"] = 1
    _answers["b"] = FakeSession.stage
    receipt = made.broadcast_single_param("bias", MODEL.bias)
    assert (receipt.version, receipt.servers) == (3, ("a", "c"))
    assert receipt.absent == {"b": "a part is laid over version 2, but the server at /run/b serves version 1"}
    servers.sessions["b"].version = 3  # the number, but not the weights
    with made.round() as block:
        made.update_weight("bias", MODEL.bias)
    assert block.receipt.servers == ("a", "c")
    assert "serves version 3 of another history" in block.receipt.absent["b"]
    assert made.broadcast_weights(MODEL).servers == ("a", "b", "c")
    assert made.broadcast_single_param("bias", MODEL.bias).servers == ("a", "b", "c")


def test_a_version_of_another_launch_is_not_the_one_that_was_made(servers: Servers) -> None:
    """Whatever its number, and in the same run directory; another daemon of one launch is no other."""
    made = bridge.Bridge(BridgeConfig(logdir="a"))
    assert made.broadcast_weights(MODEL).version == 1
    servers.served["a"] = 1
    servers.sessions["a"].closed = "the daemon died"
    assert made.broadcast_single_param("bias", MODEL.bias).version == 2
    servers.served["a"], servers.launches["a"] = 2, "second"
    servers.sessions["a"].closed = "the server is gone"
    with pytest.raises(ConfigError, match="the server at /run/a serves version 2 of another history"):
        made.broadcast_single_param("bias", MODEL.bias)


def test_a_part_that_one_cannot_take_is_refused_for_all(servers: Servers) -> None:
    servers.served["b"] = 4
    made = trainer()
    with pytest.raises(ConfigError, match=r"the checkpoint, but the server at /run/b serves version 4; c"):
        made.broadcast_single_param("bias", MODEL.bias)
    assert all(session.job is None for session in servers.sessions.values())


def test_a_trainer_that_holds_another_version_lays_no_part_over_it(servers: Servers) -> None:
    """One that was started again, whose weights are older; and one whose version was taken back."""
    servers.served.update(a=40, b=40, c=40)
    with pytest.raises(ConfigError, match="the server at /run/a serves version 40"):
        trainer().broadcast_single_param("bias", MODEL.bias)
    made = trainer()
    made.broadcast_weights(MODEL)
    made.broadcast_weights(MODEL)
    made.broadcast_single_param("bias", MODEL.bias)
    made.rollback()
    with pytest.raises(ConfigError, match="the server at /run/b was rolled back to earlier weights"):
        made.broadcast_single_param("bias", MODEL.bias)
    made.broadcast_weights(MODEL)
    assert made.broadcast_single_param("bias", MODEL.bias).servers == ("a", "b", "c")
    made.rollback()
    made.rollback()  # which takes the first one back
    assert made.broadcast_single_param("bias", MODEL.bias).servers == ("a", "b", "c")


def test_a_rollback_to_what_this_trainer_never_sent(servers: Servers) -> None:
    made = trainer()
    for server in made._fleet.ready(None):
        server.remember(40, rolled_back=True)
    servers.served.update(a=40, b=40, c=40)
    for session in servers.sessions.values():
        session.version = 40
    with pytest.raises(ConfigError, match="the server at /run/b was rolled back to earlier weights"):
        made.broadcast_single_param("bias", MODEL.bias)
    for server in made._fleet.servers:  # which brings back what was there; that is not this trainer's either
        server.remember(41, rolled_back=True)
    servers.served.update(a=41, b=41, c=41)
    with pytest.raises(ConfigError, match="the server at /run/b was rolled back to earlier weights"):
        made.broadcast_single_param("bias", MODEL.bias)


def test_an_adapter_over_anothers_model_does_not_make_it_ours(servers: Servers) -> None:
    """Parts of the model may follow only where the model is the checkpoint's or this trainer's."""
    lead = Layout(rank=0, vocabulary="", shards=(), leading=(Leading(source=0, shape=(4, 2)),))
    adapter = LocalShards(layout=lead, tensors=[], contiguous=())
    for served, refused in ((40, True), (0, False)):
        servers.served.update(a=served, b=served, c=served)
        made = trainer()
        fleet = made._fleet
        for server in fleet.ready(None):
            server.send(adapter)
            servers.sessions[server.session.place].version = served + 1  # type: ignore[attr-defined]
            server.remember(served + 1, rolled_back=False)
        if refused:
            with pytest.raises(ConfigError, match="serves a model that this trainer did not send"):
                made.broadcast_single_param("bias", MODEL.bias)
            made.broadcast_weights(MODEL)
        assert made.broadcast_single_param("bias", MODEL.bias).servers == ("a", "b", "c")
        made.close()


def test_what_is_rolled_back_may_be_an_adapter() -> None:
    """The next adapter comes to the weights of the model that are there, if they are the newest."""
    server = Server(BridgeConfig(logdir="/logs/a"))

    def rolled_back(*rounds: str) -> tuple[bool, bool]:
        for kind in rounds:
            if kind == "back":
                server.remember(1, rolled_back=True)
                continue
            lead = (Leading(source=0, shape=(4, 2)),) if kind == "adapter" else ()
            layout = Layout(rank=0, vocabulary="", shards=(), leading=lead)
            server.send(LocalShards(layout=layout, tensors=[], contiguous=()))
            server.remember(1, rolled_back=False)
        return server.is_rolled_back(adapter=False), server.is_rolled_back(adapter=True)

    assert rolled_back("adapter", "back") == (True, False)
    assert rolled_back("model", "adapter") == (False, False)
    assert rolled_back("adapter", "back") == (True, False)
    assert rolled_back("back") == (False, False)
    assert rolled_back("model", "back") == (True, True)
    assert rolled_back("model", "adapter", "model", "back", "back", "back") == (True, True)


def test_no_adapter_comes_over_weights_that_it_is_merged_into_nor_the_other_way_round(
    servers: Servers,
) -> None:
    lead = Layout(rank=0, vocabulary="", shards=(), leading=(Leading(source=0, shape=(4, 2)),))
    adapter = LocalShards(layout=lead, tensors=[], contiguous=())
    made = bridge.Bridge(BridgeConfig(logdir="a"))
    fleet = made._fleet
    for _ in range(2):
        made.broadcast_weights(MODEL)  # meets it
        (server,) = fleet.servers
        shards = LocalShards(layout=Layout(rank=0, vocabulary="", shards=()), tensors=[], contiguous=())
        fleet.submit([(server, shards)], call=1, version=None, encoding="dense", merged=True)
        server.remember(server.version, rolled_back=False)
        with pytest.raises(ConfigError, match="serves weights that adapters are merged into"):
            fleet.that_take_parts([server], whole_adapter=True)
        made.broadcast_single_param("bias", MODEL.bias)  # the rest is merged still
        with pytest.raises(ConfigError, match="serves weights that adapters are merged into"):
            fleet.that_take_parts([server], whole_adapter=True)
    made.broadcast_weights(MODEL)
    assert fleet.that_take_parts([server], whole_adapter=True) == [server]
    server.send(adapter)
    server.remember(server.version, rolled_back=False)
    with pytest.raises(ConfigError, match="an adapter of this trainer is served beside them"):
        fleet.submit([(server, shards)], call=1, version=None, encoding="dense", merged=True)
    made.broadcast_weights(MODEL)


def test_an_adapter_goes_to_one_that_missed_the_last_of_them(servers: Servers) -> None:
    """As long as this trainer has sent no weights of the model: what it lies over is the same everywhere."""
    fleet = trainer("available")._fleet
    ready = fleet.ready(None)

    def made_live(version: int, *places: str) -> None:
        for place in places:
            servers.sessions[place].version = version
        fleet.remember(
            Receipt(
                version=version, bytes=1, transfer_s=0, stage_s=0, flip_s=0, transport="pull", servers=places
            )
        )

    def takers() -> list[str]:
        return [server.name for server in fleet.that_take_parts(ready, whole_adapter=True)]

    made_live(1, "a", "b", "c")
    made_live(2, "a", "c")
    assert takers() == ["a", "b", "c"]
    servers.sessions["b"].version = 7  # another trainer's, of whatever model
    assert takers() == ["a", "c"]
    servers.sessions["b"].version = 1
    ready[0].sent_model = True
    assert takers() == ["a", "c"]


def test_all_come_back_to_one_version_or_none_does(servers: Servers) -> None:
    made = trainer("available")
    made.broadcast_weights(MODEL)
    with pytest.raises(ConfigError, match="a: unknown, b: unknown, c: unknown"):
        made.rollback()
    made.broadcast_weights(MODEL)
    assert (made.rollback().version, made.rollback().version) == (3, 4)
    _answers["b"] = lost("b")
    made.broadcast_weights(MODEL)
    servers.served["b"] = 4
    _answers["b"] = FakeSession.stage
    with pytest.raises(ConfigError, match="would part them"):
        made.rollback()
    made.broadcast_weights(MODEL)
    with pytest.raises(ConfigError, match="a: 5, b: 4, c: 5"):
        made.rollback()
    made.broadcast_weights(MODEL)
    assert made.rollback().servers == ("a", "b", "c")


def test_an_exception_in_a_block_abandons_the_round_everywhere(servers: Servers) -> None:
    made = trainer()
    with pytest.raises(ArithmeticError), made.round():
        raise ArithmeticError("nan")
    assert {session.closed for session in servers.sessions.values()} == {
        "the round was abandoned: ArithmeticError: nan"
    }


def test_what_was_found_in_a_model_is_kept_for_each_mapping(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.dtypes["b"] = "bfloat16"
    made = trainer()
    made.broadcast_weights(MODEL)
    monkeypatch.setattr("bridge.trainer.collect", lambda *_, **__: pytest.fail("the model was walked again"))
    assert made.broadcast_weights(MODEL).version == 2


def test_one_failure_of_a_broadcast_left_under_way_is_told_once(servers: Servers) -> None:
    made = trainer()
    _answers["b"] = lost("b")
    made.broadcast_weights(MODEL, blocking=False)
    _answers["b"] = FakeSession.stage
    with pytest.raises(PeerLost, match="b is gone"):
        made.broadcast_weights(MODEL)
    assert made.broadcast_weights(MODEL).version == 1


# --- reading this process's memory -----------------------------------------------------------------------


@pytest.mark.parametrize(("pids", "allowed"), [((1,), [1]), ((1, 1), [1, 1]), ((1, 2), [1, -1])])
def test_yama_knows_one_reader_or_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, pids: tuple[int, ...], allowed: list[int]
) -> None:
    yama = tmp_path / "ptrace_scope"
    yama.write_text("1\n")
    said: list[int] = []

    class Libc:
        @staticmethod
        def prctl(_: int, pid: Any, *__: int) -> int:
            said.append(pid.value if pid.value < 2**31 else -1)
            return 0

    monkeypatch.setattr(peer_memory, "_YAMA", yama)
    monkeypatch.setattr(peer_memory, "_libc", Libc)
    monkeypatch.setattr(peer_memory, "_readers", set())
    monkeypatch.setattr(peer_memory, "_exists", lambda _: True)
    for pid in pids:
        peer_memory.allow_reader(pid)
    assert said == allowed


# --- being admitted --------------------------------------------------------------------------------------


@pytest.fixture
def silent_daemon(tmp_path: Path) -> tuple[rendezvous.Store, BridgeConfig]:
    """A rendezvous at which nobody answers, and the way there."""
    store = rendezvous.serve_store("127.0.0.1", 0)
    place = Rendezvous(host="127.0.0.1", port=store.port, secret="s")
    mapping = msgspec.structs.replace(identity_mapping(("checkpoint", SHAPES)), rendezvous=place)
    mapping_file.write_atomically(tmp_path / CONFIG_NAME, mapping_file.encode(mapping))
    return store, BridgeConfig(logdir=tmp_path, connect_timeout_s=1.0)


@pytest.mark.parametrize("patient", [True, False])
def test_who_gives_up_waiting_takes_its_request_back(
    silent_daemon: tuple[rendezvous.Store, BridgeConfig], monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    store, config = silent_daemon
    monkeypatch.setattr(joining, "IMPATIENT_S", 0.2)
    monkeypatch.setattr(joining, "RETRY_S", 0.1)
    with pytest.raises(RendezvousError, match=r"waited .* for the daemon's answer"):
        joining.ask_admission(config, Ranks(), patient=patient)
    assert patient or store.queue_len(rendezvous.REQUESTS) == 1
    request = rendezvous.next_request(store, secret="s")
    assert request is not None
    assert rendezvous.is_withdrawn(store, request)
    other = msgspec.structs.replace(request, session="0" * 32)
    assert not rendezvous.is_withdrawn(store, other)


Connections = list[weakref.ref[rendezvous.Store]]


@pytest.fixture
def refusing_daemon(
    silent_daemon: tuple[rendezvous.Store, BridgeConfig], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[BridgeConfig, Connections]]:
    """The way to a rendezvous that refuses everybody, and who was connected to it.

    The collector of circles is switched off meanwhile, as some trainers have it.
    """
    store, config = silent_daemon
    monkeypatch.setattr(joining.secrets, "token_hex", lambda _: "s")
    rendezvous.Answers("answer").give(store, rendezvous.Answer(session="s", refusal="no"), "s")  # type: ignore[arg-type]
    reached: Connections = []

    def reach(*args: Any, **kwargs: Any) -> rendezvous.Store:
        made = reach_store(*args, **kwargs)
        reached.append(weakref.ref(made))
        return made

    reach_store = rendezvous.reach_store
    monkeypatch.setattr(rendezvous, "reach_store", reach)
    gc.disable()
    yield config, reached
    gc.enable()


def test_a_refusal_keeps_no_connection(refusing_daemon: tuple[BridgeConfig, Connections]) -> None:
    config, reached = refusing_daemon
    with pytest.raises(RendezvousRefused):
        joining.ask_admission(config, Ranks())
    assert [ref() for ref in reached] == [None]


def test_nor_does_one_of_which_the_other_ranks_cannot_be_told(
    refusing_daemon: tuple[BridgeConfig, Connections], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_came(*_: Any, **__: Any) -> list[int]:
        raise RankMissing("rank 1 did not come")

    config, reached = refusing_daemon
    monkeypatch.setattr(joining, "highest", nobody_came)
    with pytest.raises(RankMissing):
        joining.ask_admission(config, Ranks(world_size=2))
    assert [ref() for ref in reached] == [None]


def test_nor_does_one_of_a_server_among_several(
    refusing_daemon: tuple[BridgeConfig, Connections], tmp_path: Path
) -> None:
    config, reached = refusing_daemon
    places = str(config.logdir), str(tmp_path / "absent")
    several = BridgeConfig(logdirs=places, commit="available", connect_timeout_s=0.5)
    with pytest.raises(RendezvousError, match="2 of 2 servers cannot be met"):
        bridge.Bridge(several).broadcast_weights(MODEL)
    assert {ref() for ref in reached} == {None}


@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, hangs_up: bool) -> None:
    """As of a daemon that dies, or one that is stopped: torch's client would wait for the second for ever."""
    monkeypatch.setattr(rendezvous, "GREETING_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        if hangs_up:
            threading.Thread(target=hang_up, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(RendezvousError, match="no weight-updater daemon answers at 127"):
            rendezvous.reach_store("127.0.0.1", server.getsockname()[1], timeout_s=60)
        assert time.monotonic() - began < 20
        server.shutdown(socket.SHUT_RDWR)


def test_what_earlier_epochs_said_is_let_go_of() -> None:
    store = rendezvous.serve_store("127.0.0.1", 0)
    kept = {"e12/layout/x", "e3/control/0", "answer/1", "e", "e2", "ex/1", f"e{'9' * 5000}/x"}
    gone = {"e1/layout/x", "e2/nccl/0-0/0"}
    for key in kept | gone:
        store.set(key, "x")
    rendezvous.forget_epochs(store, 3)
    assert kept <= set(store.list_keys())
    assert not gone & set(store.list_keys())


def test_an_absent_server_is_tried_once(
    silent_daemon: tuple[rendezvous.Store, BridgeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = silent_daemon
    tries: list[float] = []

    def refuse(host: str, port: int, *, timeout_s: float) -> rendezvous.Store:
        tries.append(timeout_s)
        raise RendezvousError(f"nobody at {host}:{port}")

    monkeypatch.setattr(rendezvous, "reach_store", refuse)
    monkeypatch.setattr(joining, "RETRY_S", 0.1)
    with pytest.raises(RendezvousError, match="nobody at"):
        joining.ask_admission(config, Ranks(), patient=False)
    assert len(tries) == 1
    tries.clear()
    with pytest.raises(RendezvousError, match="nobody at"):
        joining.ask_admission(config, Ranks())
    assert len(tries) > 1


def test_a_server_that_cannot_be_met_leaves_a_flight_record(tmp_path: Path) -> None:
    config = BridgeConfig(logdir=tmp_path, connect_timeout_s=0.2)
    with bridge.Bridge(config) as trainer, pytest.raises(bridge.BridgeError) as caught:
        trainer.broadcast_weights({"weight": torch.zeros(2)})
    (record,) = tmp_path.glob("flight-*.jsonl")
    assert msgspec.json.decode(record.read_text().splitlines()[0])["why"] == str(caught.value)
