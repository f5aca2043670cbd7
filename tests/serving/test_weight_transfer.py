"""Trainers that know only vLLM's weight-transfer interface, on a real server with the backend ``bridge``."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.checks import SINGLE, Streams, assert_equal
from tests.support.serving import UNBOUND, Server, Trainers, serving, stop, training, wait_until

DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
BACKEND_FLAGS = ("--weight-transfer-config", json.dumps({"backend": "bridge"}))
ENDPOINTS = {**UNBOUND, **DEV_MODE}
FLAGS = ["--dtype=float32", *BACKEND_FLAGS]

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def live(fresh_qwen3: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A live server with vLLM's endpoints, and what plain vLLMs answer from three sets of weights."""
    options = {"flags": FLAGS, "env": ENDPOINTS}
    with serving(fresh_qwen3.sets[0], tmp_path_factory.mktemp("transfer") / "live", **options) as server:
        yield SimpleNamespace(server=server, sets=fresh_qwen3.sets, fresh=fresh_qwen3.answers)


def endpoint_training(
    server: Server, checkpoint: Path, kind: str = "plain", *, ranks: int = 1, dtype: str = "float32",
    env: dict[str, str] | None = None,
) -> AbstractContextManager[Trainers]:  # fmt: skip
    """Trainer ranks that post to ``server``."""
    given = {"SERVER_URL": server.api.url, **(env or {})}
    options = {"dtype": dtype, "ranks": ranks, "env": given, "module": "support.endpoint_trainer"}
    return training(kind, checkpoint, logdir=server.logdir, **options)


@pytest.fixture(scope="module")
def trainer(live: SimpleNamespace) -> Iterator[Trainers]:
    with endpoint_training(live.server, live.sets[0]) as trainers:
        yield trainers


@pytest.fixture(scope="module")
def by_hand(trainer: Trainers) -> Trainers:
    """The trainer, with a loop of its own from here on."""
    trainer.must("init_by_hand")
    return trainer


@pytest.mark.parametrize("source", ["module", "one_buffer"])
def test_three_versions_through_vllms_factory(live, trainer, source):
    before = live.server.status()["weight_version"]
    trainer.must("init", source=source)
    for step, index in enumerate((1, 2, 0), start=1):
        trainer.must("load", path=str(live.sets[index]))
        (receipt,) = trainer.must("send")
        assert receipt["version"] == before + step
        assert_equal(live.server.api.greedy(), live.fresh[index]["greedy"], tolerance=1e-5)
    trainer.must("leave")


def test_streams_go_on_while_a_loop_of_its_own_drives_the_endpoints(live, by_hand):
    streams = Streams(live.server.api, width=4, tokens=400)
    for index in (1, 2, 1):
        by_hand.must("load", path=str(live.sets[index]))
        by_hand.must("send_by_hand")
    (updater,) = live.server.status()["pids"]["updaters"]
    stop(updater)  # a round that stands, as long as the deadline lets it
    try:
        by_hand.send("send_by_hand")
        wait_until("the round", lambda: live.server.status()["state"] == "round", timeout_s=30)
        produced = streams.produced
        wait_until(
            "tokens while the server waits for the round", lambda: streams.produced > produced, timeout_s=30
        )
        assert live.server.status()["state"] == "round"
    finally:
        os.kill(updater, signal.SIGCONT)
    (receipt,) = by_hand.answers()
    assert "version" in receipt, receipt
    assert all(streams.alive())
    streams.stop()
    assert streams.failures == []
    assert_equal(live.server.api.greedy(), live.fresh[1]["greedy"], tolerance=1e-5)


def test_a_wrong_shape_is_an_error_of_the_call_and_changes_nothing(live, by_hand):
    served, before = live.server.api.greedy(2), live.server.status()["weight_version"]
    (failed,) = by_hand.must("send_by_hand", shorten=SINGLE)
    assert failed["code"] == 500
    for said in (failed["sender"], failed["server"]):
        assert SINGLE in said
        assert "shape" in said
    assert f"version {before} is served on" in failed["server"]
    assert live.server.api.greedy(2) == served
    by_hand.must("load", path=str(live.sets[0]))
    (receipt,) = by_hand.must("send_by_hand")
    assert receipt["version"] == before + 1
    assert_equal(live.server.api.greedy(), live.fresh[0]["greedy"], tolerance=1e-5)


def test_a_paused_server_commits(live, by_hand):
    assert live.server.call("/pause?mode=keep", {})[0] == 200
    by_hand.must("load", path=str(live.sets[1]))
    by_hand.must("send_by_hand")
    assert live.server.call("/resume", {})[0] == 200
    assert_equal(live.server.api.greedy(), live.fresh[1]["greedy"], tolerance=1e-5)


def test_calls_out_of_place_are_refused_and_never_hang(live):
    call = live.server.call
    for path, body, said in (
        ("/update_weights", {"update_info": {}}, "call start_weight_update first"),
        ("/finish_weight_update", {}, "call start_weight_update first"),
        ("/start_draft_weight_update", {}, "no draft model"),
        ("/init_weight_transfer_engine", {"init_info": {"run": "another"}}, "is of run another"),
        ("/init_weight_transfer_engine", {"init_info": {"master_port": 1}}, "master_port"),
    ):
        code, text = call(path, body)
        assert code >= 400, (path, text)
        assert said in text
    assert call("/start_weight_update", {})[0] == 200
    code, text = call("/update_weights", {"update_info": {"version": 10**6, "timeout_s": 0.5}})
    assert code >= 400
    assert "waited 0.5 s for version 1000000 to become live" in text
    assert live.server.api.greedy(1)


@pytest.mark.parametrize("source", ["module", "one_buffer"])
def test_two_ranks_send_their_shards_or_rank_0_what_it_gathers(live, trainer, source):
    trainer.must("close")
    with endpoint_training(live.server, live.sets[0], "fsdp2", ranks=2) as ranks:
        ranks.must("init", source=source)
        for index in (2, 0):
            ranks.must("load", path=str(live.sets[index]))
            first, second = ranks.must("send")
            assert second.get("version") == (first["version"] if source == "module" else None)
            assert_equal(live.server.api.greedy(), live.fresh[index]["greedy"], tolerance=1e-5)
        ranks.must("leave")


def test_tensor_parallel_workers_stay_in_step_when_updates_fail(live, tmp_path):
    flags = [*FLAGS, "--tensor-parallel-size=2"]
    with serving(live.sets[1], tmp_path / "tp2", flags=flags, env=ENDPOINTS) as server:
        served = server.api.greedy(2)
        for _ in range(3):
            assert server.call("/update_weights", {"update_info": {}})[0] >= 400
            assert server.call("/start_weight_update", {})[0] == 200
            assert server.call("/update_weights", {"update_info": {"timeout_s": 0}})[0] >= 400
        assert server.api.greedy(2) == served
        with endpoint_training(server, live.sets[0]) as one:
            one.must("init", source="module")
            one.must("send")
            one.must("leave")
        assert_equal(server.api.greedy(), live.fresh[0]["greedy"], tolerance=1e-4)
