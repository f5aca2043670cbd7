"""Both halves of the backend ``bridge`` against vLLM's own classes, and the daemon's front desk."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import (
    ModuleSource,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer import factory as factory_module
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from bridge.environment import Ranks
from bridge.errors import ConfigError, MappingError, TopologyError
from bridge.job import Receipt
from tests.support.mappings import identity_mapping
from vllm_patching import compat, hooks, trainer_half
from vllm_patching.arguments import parse_args
from vllm_patching.backend import BridgeWeightTransferEngine
from vllm_patching.channel import listen, socket_path
from vllm_patching.control_page import ControlPage
from vllm_patching.daemon import Daemon
from vllm_patching.engine import _hook_calls
from vllm_patching.frontdesk import FrontDesk, start_thread
from vllm_patching.trainer_half import BridgeTrainerInitInfo
from vllm_patching.weight_updates import WeightUpdates

RECEIPT = Receipt(version=3, bytes=8, transfer_s=0.1, stage_s=0.1, flip_s=0.1, transport="pull")
ANSWER_TIMEOUT_S = 20.0


# --- the server's half ---------------------------------------------------------------------------------


@pytest.fixture
def worker_half(monkeypatch: pytest.MonkeyPatch) -> BridgeWeightTransferEngine:
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", {**WeightTransferEngineFactory._registry})
    WeightTransferEngineFactory._registry.pop("bridge", None)
    hooks._register_backend(factory_module)
    config = WeightTransferConfig(backend="bridge")
    vllm_config: Any = SimpleNamespace(parallel_config=None, model_config=None)
    return WeightTransferEngineFactory.create_engine(
        config, vllm_config, torch.device("cpu"), nn.Linear(2, 2)
    )


def test_vllms_factory_makes_the_workers_half(worker_half: BridgeWeightTransferEngine) -> None:
    assert type(worker_half) is BridgeWeightTransferEngine
    worker_half.shutdown()


@pytest.mark.parametrize(
    ("call", "args"), [("start_weight_update", ()), ("update_weights", ({},)), ("finish_weight_update", ())]
)
def test_a_call_in_a_worker_touches_no_weight(
    worker_half: BridgeWeightTransferEngine, call: str, args: tuple[Any, ...]
) -> None:
    weight = worker_half.model.weight
    before, memory = weight.clone(), weight.data_ptr()
    with pytest.raises(AssertionError, match=r"python -m bridge\.launch"):
        getattr(worker_half, call)(*args)
    assert worker_half.model.weight is weight
    assert weight.data_ptr() == memory
    assert torch.equal(weight, before)


class Desk:
    """A daemon that answers at its socket, and whose rounds end when a test says so."""

    def __init__(self, run_dir: Path, logdir: Path) -> None:
        self.run_dir = run_dir
        arguments = ["--run-dir", str(run_dir), "--logdir", str(logdir), "--launcher-pid", "1"]
        self.daemon = Daemon(parse_args(arguments))
        self.daemon.mapping = identity_mapping(("checkpoint", {"w": (2,)}))
        self.daemon.registry.control = ControlPage.create(1)
        self.listener = listen(run_dir)
        start_thread("desk", FrontDesk(self.daemon, self.daemon).accept, self.listener)

    def end_round(self, *, error: str = "") -> None:
        with self.daemon.handled:
            if error:
                self.daemon.aborted += 1
                self.daemon.last_error = error
            else:
                self.daemon.committed += 1
                page = self.daemon.registry.control
                assert page is not None
                page.slot(0).record(version=self.daemon.committed, batch=0, flip_ns=1, active=0)
            self.daemon.handled.notify_all()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "run", tmp_path)
    yield made
    made.listener.shutdown(socket.SHUT_RDWR)  # its thread sees the end
    made.listener.close()


class Core:
    """vLLM's own handling of a utility call, around an executor that must not be asked."""

    def __init__(self, run_dir: Path, *, answers: bool = True) -> None:
        self.engine: Any = object.__new__(EngineCoreProc)
        self.engine.shutdown_state = EngineShutdownState.RUNNING
        self.engine.output_queue = queue.Queue()
        self.asked: list[str] = []

        def collective_rpc(method: str, *_: Any) -> list[str]:
            self.asked.append(method)
            return ["from a worker"]

        self.engine.model_executor = SimpleNamespace(collective_rpc=collective_rpc)
        _hook_calls(self.engine, WeightUpdates(run_dir) if answers else None)

    def post(self, method: str, **kwargs: Any) -> None:
        """As ``AsyncLLM`` posts it; returns at once."""
        call = (0, 1, "collective_rpc", (method, None, (), kwargs or None))
        self.engine._handle_client_request(EngineCoreRequestType.UTILITY, call)

    @property
    def answered(self) -> bool:
        return not self.engine.output_queue.empty()

    def answer(self) -> str:
        """What it failed with, "" if it did not."""
        _, outputs = self.engine.output_queue.get(timeout=ANSWER_TIMEOUT_S)
        return outputs.utility_output.failure_message or ""

    def call(self, method: str, **kwargs: Any) -> str:
        self.post(method, **kwargs)
        return self.answer()


@pytest.fixture
def core(desk: Desk) -> Core:
    return Core(desk.run_dir)


def test_an_update_waits_beside_the_engines_loop_until_the_round_has_ended(desk: Desk, core: Core) -> None:
    assert core.call("init_weight_transfer_engine", init_info={"run": desk.run_dir.name}) == ""
    for _ in range(2):
        assert core.call("start_weight_update") == ""
        core.post("update_weights", update_info={})
        assert core.call("collective_rpc_of_somebody_else") == "", "the loop goes on"
        assert not core.answered
        desk.end_round()
        assert core.answer() == ""
        assert core.call("finish_weight_update") == ""
    assert core.asked == ["collective_rpc_of_somebody_else"] * 2, "workers hear nothing of the updates"


def test_a_round_that_ended_before_the_update_is_the_one(desk: Desk, core: Core) -> None:
    core.call("start_weight_update")
    desk.end_round()
    assert core.call("update_weights", update_info={"timeout_s": 0.0}) == ""


def test_a_named_version_is_waited_for(desk: Desk, core: Core) -> None:
    core.call("start_weight_update")
    desk.end_round()
    said = core.call("update_weights", update_info={"version": 2, "timeout_s": 0.1})
    assert "waited 0.1 s for version 2 to become live; version 1 is served on" in said
    assert "no trainer is connected" in said
    core.call("start_weight_update")
    core.post("update_weights", update_info={"version": 2})
    desk.end_round()
    assert core.answer() == ""


@pytest.mark.parametrize("info", [{}, {"version": 1}], ids=["any", "named"])
def test_a_round_that_fails_fails_the_update_with_its_reason(
    desk: Desk, core: Core, info: dict[str, Any]
) -> None:
    core.call("start_weight_update")
    core.post("update_weights", update_info=info)
    desk.end_round(error="w: shape (3,), not (2,)")
    said = core.answer()
    assert "was not committed: w: shape (3,), not (2,); version 0 is served on" in said
    assert "call start_weight_update first" in core.call("finish_weight_update"), "the update is over"
    assert core.call("start_weight_update") == "", "and another can begin"


def test_a_trainer_that_died_in_the_middle_locks_nobody_out(desk: Desk, core: Core) -> None:
    core.call("start_weight_update")
    desk.end_round(error="the trainer is gone")
    assert core.call("start_weight_update") == ""
    core.post("update_weights", update_info={})
    desk.end_round()
    assert core.answer() == ""
    assert core.call("shutdown_weight_transfer_engine") == ""
    assert "call start_weight_update first" in core.call("update_weights", update_info={})


def test_a_daemon_that_was_started_anew_is_not_waited_for(desk: Desk, core: Core) -> None:
    core.call("start_weight_update")
    updates = next(c for c in _closure(core.engine.collective_rpc) if isinstance(c, WeightUpdates))
    assert updates._before is not None
    updates._before["pids"]["daemon"] = 1
    assert "was started anew" in core.call("update_weights", update_info={})


def _closure(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__]


def test_without_a_daemon_calls_fail_and_say_so(desk: Desk, core: Core) -> None:
    socket_path(desk.run_dir).unlink()
    assert "no weight-updater daemon answers" in core.call("init_weight_transfer_engine", init_info={})
    assert "no weight-updater daemon answers" in core.call("start_weight_update")


@pytest.mark.parametrize(
    ("method", "kwargs", "said"),
    [
        ("update_weights", {"update_info": {}}, "call start_weight_update first"),
        ("finish_weight_update", {}, "call start_weight_update first"),
        ("start_draft_weight_update", {}, "no draft model"),
        ("init_weight_transfer_engine", {"init_info": {"run": "elsewhere"}}, "is of run elsewhere"),
        ("init_weight_transfer_engine", {"init_info": {"master_port": 1}}, "`master_port`"),
        ("update_weights", {"update_info": [{}]}, "takes version, timeout_s, all optional"),
    ],
)
def test_calls_out_of_place_are_refused(core: Core, method: str, kwargs: dict[str, Any], said: str) -> None:
    assert said in core.call(method, **kwargs)
    assert core.asked == []


@pytest.mark.parametrize("method", ["reset_weights", "reload_weights"])
@pytest.mark.parametrize("answers", [True, False])
def test_calls_that_write_over_the_weights_are_refused_with_any_backend(
    desk: Desk, method: str, answers: bool
) -> None:
    core = Core(desk.run_dir, answers=answers)
    assert f"{method} would write over the weights that are served" in core.call(method)
    assert core.asked == []
    assert core.call("checksum") == ""
    assert core.asked == ["checksum"]


@pytest.mark.parametrize(
    ("chosen", "ours"),
    [(None, False), (WeightTransferConfig(), False), (WeightTransferConfig(backend="bridge"), True)],
)
def test_other_backends_calls_are_left_alone(chosen: WeightTransferConfig | None, ours: bool) -> None:
    assert compat.transfers_weights_by_bridge(SimpleNamespace(weight_transfer_config=chosen)) is ours


# --- the trainer's half --------------------------------------------------------------------------------


class Client:
    """A ``VLLMWeightSyncClient`` that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.error: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append("start")
        if self.error is not None:
            raise self.error

    def update_weights(self, update_info: Any) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:  # noqa: ARG002 - vLLM's
        self.calls.append("finish")


class Connection:
    """In place of a connected ``Bridge``: keeps what it is given, or fails."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(mapping_path=lambda: Path("mapping.json"))
        self.sent: list[Any] = []
        self.error: Exception | None = None
        self.ranks: Ranks | None = None

    def broadcast_weights(self, weights: Any, **_: Any) -> Receipt:
        if self.error is not None:
            raise self.error
        self.sent.append(weights)
        return RECEIPT

    def miss(self, reason: str) -> None:
        self.sent.append(reason)

    def close(self) -> None:
        self.sent.append("closed")


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Connection:
    made = Connection()

    def connect(config: Any = None, *, ranks: Ranks) -> Connection:
        made.ranks = ranks
        return made

    monkeypatch.setattr(trainer_half.Bridge, "connect", connect)
    monkeypatch.setattr(trainer_half.mapping_file, "load", lambda _: SimpleNamespace(run_dir="/run/vb-1"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return made


class Pairs(ModuleSource):
    """Another source than vLLM's own, with its metadata."""


def sender(source: Any, *, rank: int = 0) -> tuple[Any, Client]:
    client = Client()
    info = BridgeTrainerInitInfo(rank=rank)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source), client


def test_a_module_is_sent_as_it_is(connection: Connection) -> None:
    model = nn.Linear(2, 2)
    engine, client = sender(ModuleSource(model))
    assert engine.send_weights() == RECEIPT
    assert connection.sent == [model]
    assert client.calls == [("init", {"run": "vb-1"}), "start", ("update", {"version": 3}), "finish"]
    engine.shutdown()
    assert connection.sent[-1] == "closed"


def test_what_another_source_yields_is_sent_by_rank_0_alone(connection: Connection) -> None:
    model = nn.Linear(2, 2)
    engine, _ = sender(Pairs(model))
    engine.send_weights()
    assert connection.ranks == Ranks()
    assert set(connection.sent[0]) == {"weight", "bias"}
    assert connection.sent[0]["weight"] is model.weight, "a parameter stays where it is"
    iterated: list[str] = []

    class Counting(Pairs):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            iterated.append("once")
            return super().__iter__()

    other, silent = sender(Counting(model), rank=1)
    assert other.send_weights() is None
    assert iterated == ["once"], "gathering is collective"
    assert silent.calls == []
    other.shutdown()


class Modes:
    """A ``WeightSource`` of vLLM 0.33, which is not iterable itself."""

    def __init__(self, pairs: list[tuple[str, torch.Tensor]] | None) -> None:
        self.pairs, self.passes = pairs, 0

    def implements_iter_full(self) -> bool:
        return self.pairs is not None

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.pairs is not None
        self.passes += 1
        return iter(self.pairs)


def test_a_source_that_is_not_iterable_is_asked_for_full_tensors(connection: Connection) -> None:
    source = Modes([("w", torch.ones(1))])
    engine, _ = sender(source)
    engine.send_weights()
    assert set(connection.sent[0]) == {"w"}
    other, _ = sender(source, rank=1)
    other.send_weights()
    assert source.passes == 2, "gathering is collective"


def test_a_source_of_shards_alone_is_refused_before_the_first_round(connection: Connection) -> None:
    with pytest.raises(ConfigError, match=r"Modes has no iter_full, .* sends full tensors"):
        sender(Modes(None))
    assert connection.ranks is None


def test_a_round_that_fails_closes_the_update_and_raises(connection: Connection) -> None:
    engine, client = sender(ModuleSource(nn.Linear(2, 2)))
    connection.error = MappingError("weight: shape")
    with pytest.raises(MappingError, match="weight: shape"):
        engine.send_weights()
    assert client.calls[1:] == ["start", "finish"]


def test_a_server_that_cannot_be_told_lets_no_other_rank_wait(connection: Connection) -> None:
    engine, client = sender(ModuleSource(nn.Linear(2, 2)))
    client.error = ConnectionError("refused")
    with pytest.raises(ConnectionError):
        engine.send_weights()
    assert connection.sent == ["the server could not be told of it: ConnectionError: refused"]

    class Counting(Pairs):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            connection.sent.append("gathered")
            return super().__iter__()

    engine, client = sender(Counting(nn.Linear(2, 2)))
    client.error = ConnectionError("refused")
    with pytest.raises(ConnectionError):
        engine.send_weights()
    assert connection.sent[1:] == ["gathered"], "which is collective"


SHARED = nn.Parameter(torch.ones(1))


def test_memory_that_the_iterator_uses_again_is_copied(connection: Connection) -> None:
    buffer = torch.zeros(2)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for value, name in enumerate(("a", "b")):
            yield name, buffer.fill_(value)

    bridge = BridgeWeightTransferEngine.trainer_init()
    assert BridgeWeightTransferEngine.trainer_send_weights(pairs(), {"bridge": bridge}) == RECEIPT
    assert {name: t.tolist() for name, t in connection.sent[0].items()} == {"a": [0, 0], "b": [1, 1]}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("a", None)], "a: the source yields no tensor on rank 0"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "a: the source yields it twice"),
        (
            [("a", SHARED), ("b", SHARED)],
            "b: the source yields a parameter that it has yielded under another",
        ),
        (
            [("a", nn.Parameter(SHARED.data)), ("b", nn.Parameter(SHARED.data))],
            "b: the source yields a parameter that it has yielded under another",
        ),
    ],
)
def test_pairs_that_are_no_model_are_refused(connection: Connection, pairs: Any, said: str) -> None:
    """The source is taken to its end all the same: other ranks may be in its gathers."""
    source = iter([*pairs, ("z", torch.ones(1))])
    with pytest.raises(ConfigError, match=said):
        trainer_half.send(source, connection)  # type: ignore[arg-type]
    assert connection.sent == []
    assert next(source, None) is None


def test_a_rank_that_is_another_is_refused(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_half, "ranks", lambda: Ranks(rank=1, world_size=2))
    with pytest.raises(TopologyError, match=r"init_info.rank is 0, but this is rank 1 of 2"):
        sender(ModuleSource(nn.Linear(2, 2)))


def test_a_source_is_needed(connection: Connection) -> None:
    with pytest.raises(ConfigError, match="source is None"):
        sender(None)
