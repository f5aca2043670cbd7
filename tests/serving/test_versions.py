"""A live server answers, version after version, as a fresh vLLM started from the same weights does."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checks import (
    SINGLE,
    Streams,
    ask_document,
    assert_equal,
    assert_labels_in_order,
    flips,
)
from tests.support.full import only_in_full
from tests.support.serving import (
    UNBOUND,
    Trainers,
    serving,
    serving_together,
    stop,
    training,
    wait_until,
)

F32 = ["--dtype=float32"]

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

# --- float32, one rank, every feature ------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3(
    fresh_qwen3: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """One live server (HTTP endpoints on), and what plain vLLMs answer from three sets of weights."""
    options = {"flags": F32, "bridge_flags": ["--http"], "env": UNBOUND}
    with serving(fresh_qwen3.sets[0], tmp_path_factory.mktemp("qwen3") / "live", **options) as server:
        yield SimpleNamespace(server=server, sets=fresh_qwen3.sets, fresh=fresh_qwen3.answers)


@pytest.fixture(scope="module")
def trainer(qwen3: SimpleNamespace) -> Iterator[Trainers]:
    """One plain trainer, shared: an epoch costs nothing, importing transformers does."""
    env = {"BRIDGE_HTTP_URL": qwen3.server.api.url}
    with training("plain", qwen3.sets[0], logdir=qwen3.server.logdir, dtype="float32", env=env) as trainers:
        yield trainers


def publish(qwen3: SimpleNamespace, trainer: Trainers, index: int) -> dict[str, Any]:
    """Weights of set ``index`` become live; the receipt."""
    trainer.must("load", path=str(qwen3.sets[index]))
    return trainer.must("broadcast")[0]


def test_answers_equal_a_fresh_server_at_every_version(qwen3, trainer):
    api = qwen3.server.api
    assert_equal(api.greedy(), qwen3.fresh[0]["greedy"], tolerance=1e-5)
    before = qwen3.server.status()["weight_version"]
    for step, index in enumerate((1, 0, 2, 1, 0), start=1):
        receipt = publish(qwen3, trainer, index)
        assert receipt["version"] == before + step
        assert qwen3.server.status()["weight_version"] == before + step
        assert_equal(api.greedy(), qwen3.fresh[index]["greedy"], tolerance=1e-5)


def test_the_version_before_comes_back(qwen3, trainer):
    api = qwen3.server.api
    first, second = (publish(qwen3, trainer, index)["version"] for index in (1, 2))
    streams = Streams(api, width=4, tokens=200)
    (back,) = trainer.must("rollback")
    assert (back["version"], back["restores"], back["bytes"]) == (second + 1, first, 0)
    streams.stop()
    assert streams.failures == []
    assert_labels_in_order(qwen3.server, streams.finished)
    assert_equal(api.greedy(), qwen3.fresh[1]["greedy"], tolerance=1e-5)
    (again,) = trainer.must("rollback")
    assert again["restores"] == second
    assert_equal(api.greedy(2), qwen3.fresh[2]["greedy"][:2], tolerance=1e-5)
    publish(qwen3, trainer, 0)
    assert_equal(api.greedy(2), qwen3.fresh[0]["greedy"][:2], tolerance=1e-5)


def test_a_version_that_a_round_has_begun_to_overwrite_does_not_come_back(qwen3, trainer):
    publish(qwen3, trainer, 1)
    served = publish(qwen3, trainer, 2)["version"]
    (updater,) = qwen3.server.status()["pids"]["updaters"]
    stop(updater)
    trainer.must("broadcast", blocking=False)
    wait_until("the round", lambda: qwen3.server.status()["state"] == "round", timeout_s=30)
    os.kill(updater, signal.SIGKILL)
    (lost,) = trainer.command("wait")
    assert "error" in lost
    (refused,) = trainer.command("rollback")
    assert "begun to write over it" in refused["error"]
    assert refused["type"] == "RoundAborted"
    assert_equal(qwen3.server.api.greedy(2), qwen3.fresh[2]["greedy"][:2], tolerance=1e-5)
    assert publish(qwen3, trainer, 0)["version"] == served + 1
    assert_equal(qwen3.server.api.greedy(2), qwen3.fresh[0]["greedy"][:2], tolerance=1e-5)


def test_an_idle_engine_commits_at_once(qwen3, trainer):
    rows = [trainer.must("broadcast")[0] for _ in range(3)]
    # Nobody asks for tokens: the engine is woken. Well below any timeout or polling interval of vLLM.
    assert min(row["total_s"] for row in rows) < 1.0
    assert qwen3.server.status()["weight_version"] == rows[-1]["version"]


def test_the_prefix_cache_never_mixes_versions(qwen3, trainer):
    api = qwen3.server.api

    def hits() -> float:
        with api.open("/metrics") as response:
            text = response.read().decode()
        return sum(
            float(v) for v in re.findall(r"^vllm:prefix_cache_hits_total\{[^}]*\} (\S+)", text, re.MULTILINE)
        )

    publish(qwen3, trainer, 1)
    assert ask_document(api) == qwen3.fresh[1]["document"]
    warm = hits()
    assert ask_document(api) == qwen3.fresh[1]["document"]
    assert hits() > warm, "the same prompt at the same version must hit the cache"
    publish(qwen3, trainer, 0)
    warm = hits()
    assert ask_document(api) == qwen3.fresh[0]["document"]
    assert hits() == warm, "blocks of an older version were reused"


def test_fifty_updates_under_sixteen_streams(qwen3, trainer):
    streams = Streams(qwen3.server.api, width=16, tokens=480)
    versions = []
    for _ in range(50):
        trainer.must("perturb", seed=len(versions))
        versions.append(trainer.must("broadcast")[0]["version"])
    in_flight = sum(thread.is_alive() for thread in streams._threads)
    streams.stop()
    assert streams.failures == []
    assert in_flight == 16
    assert versions == list(range(versions[0], versions[0] + 50))
    batches, flipped = zip(*flips(qwen3.server, 0), strict=True)
    assert list(flipped) == list(range(1, versions[-1] + 1)), "every version was live once, in order"
    assert list(batches) == sorted(batches)
    spanning = assert_labels_in_order(qwen3.server, streams.finished)
    assert spanning >= 8, f"{spanning} of {len(streams.finished)} requests saw more than one version"
    publish(qwen3, trainer, 1)
    assert_equal(qwen3.server.api.greedy(2), qwen3.fresh[1]["greedy"][:2], tolerance=1e-5)


def test_the_next_step_waits_until_the_weights_have_been_read(qwen3, trainer, tmp_path):
    publish(qwen3, trainer, 0)
    trainer.must("load", path=str(qwen3.sets[1]))
    (updater,) = qwen3.server.status()["pids"]["updaters"]
    stop(updater)  # the round stays open until we say so
    try:
        (sent,) = trainer.must("broadcast", blocking=False)
        assert sent["seconds"] < 1.0
        begun = tmp_path / "begun"
        trainer.send("step", fill=0.0, begun=str(begun))
        wait_until("the step to begin", begun.exists, timeout_s=30)
        with pytest.raises(TimeoutError):
            trainer.answers(timeout_s=1.0)
    finally:
        os.kill(updater, signal.SIGCONT)
    (step,) = trainer.answers()
    assert step["seconds"] >= 1.0
    (receipt,) = trainer.must("wait")
    assert qwen3.server.status()["weight_version"] == receipt["version"]
    assert_equal(qwen3.server.api.greedy(), qwen3.fresh[1]["greedy"], tolerance=1e-5)


def test_a_single_parameter_changes_nothing_else(qwen3, trainer):
    publish(qwen3, trainer, 0)
    publish(qwen3, trainer, 1)  # the inactive half now holds set 0: a partial round must not resurrect it
    trainer.must("single", name=SINGLE, value=0.01)
    assert_equal(qwen3.server.api.greedy(), qwen3.fresh[2]["greedy"], tolerance=1e-5)


def test_a_round_serves_what_a_broadcast_of_the_same_weights_does(qwen3, trainer):
    for index in (1, 0):
        trainer.must("load", path=str(qwen3.sets[index]))
        before = qwen3.server.status()["weight_version"]
        (receipt,) = trainer.must("round")
        assert receipt["version"] == qwen3.server.status()["weight_version"] == before + 1
        served = qwen3.server.api.greedy()
        assert_equal(served, qwen3.fresh[index]["greedy"], tolerance=1e-5)
        (broadcast,) = trainer.must("broadcast")
        assert broadcast["bytes"] == receipt["bytes"]
        assert_equal(qwen3.server.api.greedy(), served, tolerance=0.0)


def test_a_round_of_some_parameters_is_laid_over_the_served_version(qwen3, trainer):
    publish(qwen3, trainer, 0)
    publish(qwen3, trainer, 1)
    trainer.must("load", path=str(qwen3.sets[2]))  # which differs in one parameter
    (receipt,) = trainer.must("round", only=SINGLE)
    (broadcast,) = trainer.must("single", name=SINGLE, value=0.01)
    assert receipt["bytes"] == broadcast["bytes"]
    assert_equal(qwen3.server.api.greedy(), qwen3.fresh[2]["greedy"], tolerance=1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=only_in_full("serving"))])
def test_rounds_of_two_ranks(qwen3, trainer, kind):
    trainer.must("close")
    with training(kind, qwen3.sets[0], logdir=qwen3.server.logdir, dtype="float32", ranks=2) as ranks:
        ranks.must("load", path=str(qwen3.sets[1]))
        first, second = ranks.must("round")
        assert first["version"] == second["version"]
        assert_equal(qwen3.server.api.greedy(), qwen3.fresh[1]["greedy"], tolerance=1e-5)
        ranks.must("load", path=str(qwen3.sets[0]))
        for fail_on in (0, 1):
            ranks.send("round", fail_on=fail_on)
            answers = ranks.answers()
            assert answers[fail_on] == {"error": "the loss is not finite", "type": "ArithmeticError"}
            assert answers[1 - fail_on]["type"] == "RoundAborted"
            said = f"trainer rank {fail_on}: the round was abandoned: ArithmeticError: the loss is not finite"
            assert said in answers[1 - fail_on]["error"]
        ranks.send("round", short_on=1)
        for answer in ranks.answers():
            assert re.search(
                r"number (\d+): trainer rank 1 handed over no more than \d+, trainer rank 0 ", answer["error"]
            )
        status = qwen3.server.status()
        assert (status["state"], status["weight_version"]) == ("ready", first["version"])
        assert_equal(qwen3.server.api.greedy(), qwen3.fresh[1]["greedy"], tolerance=1e-5)
        assert ranks.must("round")[0]["version"] == first["version"] + 1
        assert_equal(qwen3.server.api.greedy(), qwen3.fresh[0]["greedy"], tolerance=1e-5)
        ranks.must("close")


def test_merged_adapters_serve_what_pefts_merged_model_does(qwen3, trainer):
    pytest.importorskip("peft")
    trainer.must("close")
    with training("lora", qwen3.sets[0], logdir=qwen3.server.logdir, dtype="float32") as lora:
        (refused,) = lora.command("broadcast")
        assert refused["type"] == "MappingError"
        assert 'call broadcast_weights(model, adapters="merge")' in refused["error"]
        (receipt,) = lora.must("broadcast", adapters="merge")
        served = qwen3.server.api.greedy()
        assert served != qwen3.fresh[0]["greedy"]
        lora.must("unload")
        (plain,) = lora.must("broadcast")
        assert plain["bytes"] == receipt["bytes"]
        assert_equal(qwen3.server.api.greedy(), served, tolerance=0.0)
        lora.must("close")


def test_ddp_with_two_ranks(qwen3, trainer):
    trainer.must("close")
    with training("ddp", qwen3.sets[0], logdir=qwen3.server.logdir, dtype="float32", ranks=2) as ddp:
        for index in (1, 0):
            ddp.must("load", path=str(qwen3.sets[index]))
            receipts = ddp.must("broadcast")
            assert receipts[0]["version"] == receipts[1]["version"]
            assert_equal(qwen3.server.api.greedy(), qwen3.fresh[index]["greedy"], tolerance=1e-5)
        ddp.must("close")


def test_two_tensor_parallel_ranks_that_shard_by_hand(qwen3, trainer):
    """Plain local tensors, queries and keys in Meta's rotary order: all of it only declared."""
    trainer.must("close")
    options = {"logdir": qwen3.server.logdir, "dtype": "float32", "ranks": 2}
    with training("declared", qwen3.sets[0], **options) as declared:
        whole = sum(p.stat().st_size for p in qwen3.sets[0].glob("*.safetensors"))
        for index in (0, 1):
            declared.must("load", path=str(qwen3.sets[index]))
            receipts = declared.must("broadcast")
            assert receipts[0]["version"] == receipts[1]["version"]
            assert receipts[0]["bytes"] <= whole
            assert_equal(qwen3.server.api.greedy(), qwen3.fresh[index]["greedy"], tolerance=1e-5)
        declared.must("declare", tp_degree=4)
        for answer in declared.command("broadcast"):
            assert answer["type"] == "TopologyError"
            assert "do not divide the 2 trainer rank(s)" in answer["error"]
        declared.must("declare", tp_degree=2)
        declared.must("broadcast")
        declared.must("single", name=SINGLE, value=0.01)
        assert_equal(qwen3.server.api.greedy(), qwen3.fresh[2]["greedy"], tolerance=1e-5)
        declared.must("close")


# --- the HTTP fallback ---------------------------------------------------------------------------------


def test_http_needs_the_key(qwen3):
    for path, body in (
        ("/bridge/status", None),
        ("/bridge/metrics", None),
        ("/bridge/requests/cmpl-1", None),
        ("/bridge/notify_update", {"path": "/x"}),
    ):
        for key in ("", "wrong"):
            code, text = qwen3.server.call(path, body, key=key)
            assert code == 401, (path, key, text)
    code, text = qwen3.server.call("/bridge/status")
    assert code == 200
    assert json.loads(text)["state"] == "ready"
    code, text = qwen3.server.call("/bridge/metrics")
    assert code == 200
    assert re.search(r"^\w*version\w*(\{.*\})? \d", text, re.MULTILINE), text


def test_an_announced_file_becomes_live(qwen3, trainer):
    before = qwen3.server.status()["weight_version"]
    for step, index in enumerate((1, 0), start=1):
        trainer.must("close")
        trainer.must("load", path=str(qwen3.sets[index]))
        (receipt,) = trainer.must("notify")
        assert receipt["version"] == before + step
        assert_equal(qwen3.server.api.greedy(), qwen3.fresh[index]["greedy"], tolerance=1e-5)


def test_bad_update_files_are_refused(qwen3, trainer, tmp_path):
    from safetensors.torch import load_file, save_file

    trainer.must("close")
    server = qwen3.server
    updates = server.logdir / "updates"
    before, served = server.status()["weight_version"], server.api.greedy(2)
    good = load_file(qwen3.sets[1] / "model.safetensors")
    whole = updates / "whole.safetensors"
    save_file(good, whole)
    truncated = updates / "truncated.safetensors"
    truncated.write_bytes(whole.read_bytes()[:-1000])
    missing = updates / "missing.safetensors"
    save_file({k: v for k, v in good.items() if k != SINGLE}, missing)
    misshapen = updates / "misshapen.safetensors"
    save_file(
        {**good, SINGLE: good[SINGLE][:-1].contiguous(), "extra.weight": good[SINGLE].clone()}, misshapen
    )
    outside = tmp_path / "outside.safetensors"
    save_file(good, outside)
    expected = {
        truncated: ["not a whole safetensors file"],
        missing: [f"{SINGLE}: missing"],
        misshapen: [f"{SINGLE}: shape", "extra.weight: not a parameter"],
        updates / "absent.safetensors": ["absent.safetensors"],
        outside: ["is not below", "--update-dir"],
        updates / ".." / ".." / "x.safetensors": ["is not below"],
    }
    for path, said in expected.items():
        code, text = server.call("/bridge/notify_update", {"path": str(path)})
        assert code == 409, (path, code, text)
        for words in said:
            assert words in text
    assert server.status()["weight_version"] == before
    assert server.api.greedy(2) == served
    code, text = server.call("/bridge/notify_update", {"path": str(whole)})
    assert code == 200, text
    assert_equal(server.api.greedy(2), qwen3.fresh[1]["greedy"][:2], tolerance=1e-5)


# --- bfloat16 from float32 master weights ----------------------------------------------------------------


def test_two_fsdp2_ranks_with_float32_masters(checkpoint, tmp_path):
    served = [checkpoint("qwen3_moe", "bfloat16", seed) for seed in (0, 1)]
    masters = [checkpoint("qwen3_moe", "float32", seed) for seed in (0, 1)]
    plain = (served[1], tmp_path / "fresh", {"bridge": False, "flags": ["--dtype=bfloat16"], "env": UNBOUND})
    live = (served[0], tmp_path / "live", {"flags": ["--dtype=bfloat16"], "env": UNBOUND})
    with serving_together(live, plain) as (server, other):
        fresh = other.api.greedy()
        other.stop()
        first = server.api.greedy()
        assert first != fresh
        assert server.call("/bridge/status", key="any")[0] == 404  # endpoints are off unless asked for
        with training("fsdp2", masters[0], logdir=server.logdir, dtype="float32", ranks=2) as trainers:
            for index, expected in ((1, fresh), (0, first), (1, fresh)):
                trainers.must("load", path=str(masters[index]))
                receipts = trainers.must("broadcast")
                assert receipts[0]["version"] == receipts[1]["version"]
                assert_equal(server.api.greedy(), expected, tolerance=0.0)
            trainers.must("close")


# --- two tensor-parallel ranks ---------------------------------------------------------------------------


def test_tensor_parallel_ranks_flip_at_the_same_batch(checkpoint, tmp_path):
    sets = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    options: dict[str, Any] = {"flags": [*F32, "--tensor-parallel-size=2"], "env": UNBOUND}
    with serving(sets[1], tmp_path / "fresh", bridge=False, **options) as other:
        fresh = other.api.greedy()
    with (
        serving(
            sets[0], tmp_path / "live", bridge_flags=["--transport=gloo", "--bucket-bytes=65536"], **options
        ) as server,
        training("plain", sets[0], logdir=server.logdir, dtype="float32") as trainers,
    ):
        first = server.api.greedy()
        streams = Streams(server.api, width=4, tokens=400)
        receipts = []
        for seed in range(10):
            trainers.must("perturb", seed=seed)
            receipts += trainers.must("broadcast", encoding="auto" if seed < 7 else "dense")
        streams.stop()
        assert streams.failures == []
        assert {r["transport"] for r in receipts} == {"gloo"}
        sent = [r["bytes"] for r in receipts]
        assert sent[0] == sent[7] == sent[8] == sent[9], "whole buckets"
        assert max(sent[1:7]) < sent[0] / 10, "64 elements of each parameter changed"
        wait_until("an idle server", lambda: server.status()["state"] == "ready", timeout_s=10)
        # Back and forth, each time over what the round before has brought.
        for index, encoding in (
            (1, "auto"),
            (1, "auto"),
            (0, "delta"),
            (1, "dense"),
            (0, "auto"),
            (1, "auto"),
        ):
            trainers.must("load", path=str(sets[index]))
            trainers.must("broadcast", encoding=encoding)
            assert_equal(server.api.greedy(), (first, fresh)[index], tolerance=1e-5)
        (patched,) = trainers.must("patch", rows="model.embed_tokens.weight", whole=SINGLE, every=3)
        assert patched["bytes"] == 4 * patched["numel"], "each row and each element to one rank"
        served = server.api.greedy()
        assert served != fresh
        trainers.must("broadcast")
        assert_equal(server.api.greedy(), served, tolerance=0.0)
        assert flips(server, 0) == flips(server, 1)
        batches, versions = zip(*flips(server, 0), strict=True)
        assert list(versions) == list(range(1, 19))
        assert len(set(batches[:10])) == 10, "flips happened between batches of running requests"
