"""The simulation of transfers: fair, conserving, equal to what can be worked out by hand or was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import gpu_rates, strategies, strategies_check
from benchmarks.fluid import Transfer, simulate
from benchmarks.model_shapes import (
    KIMI_1T,
    LLAMA_70B,
    QWEN3_8B,
    QWEN3_32B,
    Model,
    Server,
    Trainer,
    layouts_of,
    mapping_of,
    model_bytes,
)
from benchmarks.simulation_check import SMALL
from benchmarks.strategies import (
    STRATEGIES,
    Cluster,
    Lanes,
    direct,
    direct_at_once,
    direct_in_step,
    plan_lanes,
    plan_of,
)
from bridge.protocol.mapping import find_faults

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CLUSTER = Cluster(
    "test",
    nccl=364e9,
    nccl_bucket_s=15e-6,
    all_gather=256e9,
    round_s=1e-3,
    nic=1e9,
    message_s=1e-5,
    hop_s=1e-5,
)
DENSE = dataclasses.replace(
    QWEN3_8B, name="dense", hidden=256, intermediate=512, layers=4, heads=8, vocab=1024
)
EXPERTS = dataclasses.replace(
    KIMI_1T, name="experts", hidden=256, intermediate=512, layers=6, heads=8, vocab=1024, experts=16,
    expert_intermediate=64, q_rank=64, kv_rank=32, head_dim=16, rope_dim=16,
)  # fmt: skip


def on(*links: str) -> tuple[tuple[str, float], ...]:
    return tuple((link, 1.0) for link in links)


# --- flows ------------------------------------------------------------------------------------------------


def test_two_transfers_share_a_link_equally_and_the_longer_gets_it_all_afterwards() -> None:
    found = simulate({"a": 10.0}, [Transfer(100, on("a")), Transfer(200, on("a"))])
    assert found.ends.tolist() == pytest.approx([20, 30])


def test_what_one_cannot_use_the_other_gets() -> None:
    found = simulate({"a": 10.0, "b": 4.0}, [Transfer(60, on("a")), Transfer(100, on("a", "b"))])
    assert found.ends.tolist() == pytest.approx([10, 25])
    found = simulate({"a": 10.0}, [Transfer(70, on("a")), Transfer(30, on("a"), limit=3)])
    assert found.ends.tolist() == pytest.approx([10, 10])


def test_one_transfer_that_stands_for_several_takes_as_long_as_they_do() -> None:
    links = {"out": 10.0, "in 0": 3.0, "in 1": 3.0, "in 2": 3.0, "in 3": 3.0}
    each = simulate(links, [Transfer(30, on("out", f"in {i}")) for i in range(4)])
    alike = simulate({"out": 10.0, "in": 3.0}, [Transfer(30, (("out", 4), ("in", 1)))])
    assert each.seconds == pytest.approx(alike.seconds) == pytest.approx(12)


@pytest.mark.parametrize(("stations", "buckets"), [(1, 1), (5, 1), (1, 7), (6, 9)])
def test_a_chain_takes_a_bucket_for_each_station_and_each_further_bucket(stations: int, buckets: int) -> None:
    transfers = [
        Transfer(
            2.0,
            on(f"hop {k}"),
            tuple(
                i for i in ((k - 1) * buckets + b if k else -1, k * buckets + b - 1 if b else -1) if i >= 0
            ),
            latency_s=0.5,
        )
        for k in range(stations)
        for b in range(buckets)
    ]
    found = simulate({f"hop {k}": 1.0 for k in range(stations)}, transfers)
    assert found.seconds == pytest.approx(2.5 * (stations + buckets - 1))


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, float], list[Transfer]]:
    links = {f"l{i}": draw(st.floats(0.5, 20)) for i in range(draw(st.integers(1, 4)))}
    transfers = []
    for index in range(draw(st.integers(1, 8))):
        crossed = draw(st.lists(st.sampled_from(sorted(links)), min_size=1, unique=True))
        transfers.append(
            Transfer(
                draw(st.floats(0, 50)),
                tuple((link, draw(st.sampled_from([0.5, 1.0, 3.0]))) for link in crossed),
                tuple(draw(st.lists(st.integers(0, index - 1), unique=True, max_size=2))) if index else (),
                latency_s=draw(st.sampled_from([0.0, 0.25])),
                limit=draw(st.sampled_from([1.0, float("inf")])),
            )
        )
    return links, transfers


@settings(max_examples=60)
@given(networks())
@example(  # Once failed: the last is due within a rounding of when the second ends.
    (
        {"l0": 4.0},
        [
            Transfer(15.0, (("l0", 0.5),), limit=1.0),
            Transfer(2.0**-23, (("l0", 0.5),), (0,)),
            Transfer(0.0, (("l0", 0.5),), (0, 1), latency_s=0.25),
            Transfer(0.0, (("l0", 0.5),), (0,), latency_s=0.25),
        ],
    )
)
def test_every_byte_arrives_and_no_link_carries_more_than_it_can(
    network: tuple[dict[str, float], list[Transfer]],
) -> None:
    links, transfers = network
    found = simulate(links, transfers)
    for link, capacity in links.items():
        sent = sum(t.nbytes * cost for t in transfers for name, cost in t.uses if name == link)
        assert found.carried[link] == pytest.approx(sent, abs=1e-6)
        assert found.carried[link] <= capacity * found.seconds * (1 + 1e-6) + 1e-9
    for index, transfer in enumerate(transfers):
        begun = max((found.ends[i] for i in transfer.after), default=0.0) + transfer.latency_s
        assert found.starts[index] == pytest.approx(begun)
        alone = max(
            [transfer.nbytes / transfer.limit, *(transfer.nbytes * c / links[n] for n, c in transfer.uses)]
        )
        # Times that differ by a billionth are one time to the simulation: a start may be early by as much.
        assert found.ends[index] >= begun * (1 - 1e-8) + alone * (1 - 1e-6) - 1e-9
    # Twice as fast a network takes half the time, if nothing in it has a time of its own.
    bare = [dataclasses.replace(t, latency_s=0.0, limit=float("inf")) for t in transfers]
    doubled = simulate({name: 2 * capacity for name, capacity in links.items()}, bare)
    assert doubled.seconds == pytest.approx(simulate(links, bare).seconds / 2)


def test_what_cannot_be_simulated_is_an_error() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        simulate({"a": 1.0}, [Transfer(1, on("a"), (1,)), Transfer(1, on("a"), (0,))])
    with pytest.raises(ValueError, match="without capacity"):
        simulate({"a": 0.0}, [Transfer(1, on("a"))])
    with pytest.raises(ValueError, match="crosses no link"):
        simulate({"a": 1.0}, [Transfer(1, ())])


# --- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "server", "file"),
    [
        (QWEN3_8B, Server(1), "swap-1x1.json"),
        (QWEN3_8B, Server(2), "swap-2x2-shared.json"),
        (QWEN3_32B, Server(1), "swap-1x1-32b.json"),
    ],
)
def test_a_servers_bytes_are_those_that_a_real_round_carried(model: Model, server: Server, file: str) -> None:
    carried = json.loads((RESULTS / file).read_text())["found"]["first"]["bytes"]
    assert sum(rank.arena_bytes for rank in mapping_of(model, server).ranks) == carried


@pytest.mark.parametrize(
    ("model", "server"),
    [(DENSE, Server(1)), (DENSE, Server(8)), (DENSE, Server(16)), (EXPERTS, Server(2, engines=4))],
)
def test_mappings_do_not_contradict_themselves(model: Model, server: Server) -> None:
    mapping = mapping_of(model, server)
    assert find_faults(mapping) == []
    for rank in mapping.ranks:
        for index, target in enumerate(rank.targets):
            places = [
                w.dst_offset + sum((n - 1) * s for n, s in zip(w.size, w.dst_stride, strict=True))
                for w in rank.writes["transformers"]
                if w.target == index
            ]
            assert max(places) + 1 == target.nbytes // 2, target.name  # nothing is left out, nor lies beyond


def test_large_models_are_as_large_as_they_are_called() -> None:
    assert model_bytes(LLAMA_70B) / 2e9 == pytest.approx(70.6, abs=0.1)
    assert model_bytes(KIMI_1T) / 2e12 == pytest.approx(1.03, abs=0.01)


@pytest.mark.parametrize(
    "trainer", [Trainer(8), Trainer(4, replicas=2), Trainer(8, expert_parallel=4), Trainer(3)]
)
def test_a_trainer_holds_all_of_a_model_once_for_each_replica(trainer: Trainer) -> None:
    held = sum(
        2 * s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1) * (s.shape[2] if len(s.shape) > 2 else 1)
        for layout in layouts_of(EXPERTS, trainer)
        for s in layout.shards
    )
    assert held == trainer.replicas * model_bytes(EXPERTS)
    server = Server(2, engines=2)
    needed = sum(rank.arena_bytes for rank in mapping_of(EXPERTS, server).ranks)
    assert plan_of(EXPERTS, trainer, server).total_bytes == needed


def test_three_layers_tell_what_the_planner_makes_of_all() -> None:
    arguments = (EXPERTS, Trainer(8, expert_parallel=4), Server(2, engines=2))
    whole = plan_lanes(*arguments, bucket_bytes=1 << 16)
    told = plan_lanes(*arguments, bucket_bytes=1 << 16, layers=3)
    assert {pair: sum(parts) for pair, parts in told.buckets.items()} == {
        pair: sum(parts) for pair, parts in whole.buckets.items()
    }


# --- strategies -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lanes() -> Lanes:
    return plan_lanes(DENSE, Trainer(4), Server(2), bucket_bytes=1 << 18)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_faster_network_is_not_slower_and_more_servers_are_not_faster(lanes: Lanes, name: str) -> None:
    way = STRATEGIES[name]
    for servers in (1, 2, 5, 16, 64):
        taken = way(lanes, CLUSTER, servers)
        faster = dataclasses.replace(CLUSTER, nic=2 * CLUSTER.nic)
        assert 0 < way(lanes, faster, servers) <= taken * 1.001
        assert way(lanes, CLUSTER, 2 * servers) >= taken * 0.999


def test_a_long_chain_is_told_from_a_short_one(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    told = strategies.relay_chain(lanes, CLUSTER, 1000)
    monkeypatch.setattr(strategies, "LONG_CHAIN", 1000)
    assert strategies.relay_chain(lanes, CLUSTER, 1000) == pytest.approx(told, rel=1e-3)


def test_one_trainer_sends_to_each_server_in_turn_what_its_card_lets_out() -> None:
    one = plan_lanes(DENSE, Trainer(1), Server(1), bucket_bytes=1 << 30)
    for servers in (1, 3, 100):
        expected = servers * model_bytes(DENSE) / CLUSTER.nic
        assert direct(one, CLUSTER, servers) == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_lanes_in_turn_are_never_faster_than_all_at_once(lanes: Lanes) -> None:
    for servers in (1, 2, 8):
        assert direct(lanes, CLUSTER, servers) >= direct_at_once(lanes, CLUSTER, servers) * 0.99


def test_servers_soon_drift_apart_and_many_are_told_from_one(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dataclasses.replace(CLUSTER, nic=CLUSTER.nic / 100)
    each = [direct(lanes, slow, servers) for servers in (2, 8, 20)]
    assert each[1] < 0.7 * direct_in_step(lanes, slow, 8)
    monkeypatch.setattr(strategies, "MOST_BUCKETS", 0)
    assert each == pytest.approx([direct(lanes, slow, servers) for servers in (2, 8, 20)], rel=0.2)


# --- what was measured ------------------------------------------------------------------------------------


def test_rounds_on_gpus_are_predicted_within_a_fifth() -> None:
    found = {r["measured_in"]: r["ratio"] for r in gpu_rates.compare(gpu_rates.measured())}
    # Of an older version, which summed every round and worked out each copy anew; see the benchmarks' README.
    older = found.pop("swap-2x2.json")
    assert older < 0.8, "it is now predicted too: say so there, and compare it as the others"
    assert all(0.8 < ratio < 1.2 for ratio in found.values()), found


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_predicted_within_a_fifth(name: str) -> None:
    document = json.loads((RESULTS / "simulation-strategies.json").read_text())
    for found in document["cases"]:
        case, row = strategies_check.Case(**found["case"]), found["strategies"][name]
        small = plan_lanes(
            SMALL, Trainer(case.trainers), Server(case.tp), bucket_bytes=document["bucket_bytes"]
        )
        expected = STRATEGIES[name](small, Cluster(**found["cluster"]), case.servers)
        assert row["predicted_s"] == pytest.approx(expected, rel=1e-3), (
            "it is of another model: measure again"
        )
        assert 0.8 < expected / row["measured_s"] < 1.2, case.name
        assert row["bytes_compared"] >= case.servers * found["model_bytes"]
