"""A served LoRA adapter, version after version, answers as a fresh vLLM does that loads it from files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.checks import Streams, ask_document, assert_equal, assert_labels_in_order
from tests.support.full import only_in_full
from tests.support.serving import UNBOUND, Api, Server, Trainers, serving, serving_together, training

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1200)]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What the files of the served adapter hold, and what the trainer sends: other ranks, other layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "files": {"seed": 0, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "wide": {"seed": 1, "r": 8, "lora_alpha": 12, "use_rslora": True, "target_modules": ALL},
    "narrow": {"seed": 2, "r": 2, "lora_alpha": 6, "target_modules": ["o_proj", "k_proj"]},
    "other": {"seed": 3, "r": 4, "lora_alpha": 8, "target_modules": ALL},
}
LORA = ["--dtype=float32", "--enable-lora", "--max-lora-rank=8"]
# One slot, and room for one adapter in the host's memory: the next one asked for takes the place of both.
CRAMPED = ["--max-loras=1", "--max-cpu-loras=1"]


def answers(server: Server, model: str | Path) -> dict[str, Any]:
    api = Api(server.port, str(model))
    return {"greedy": api.greedy(3, 24), "document": ask_document(api)}


@pytest.fixture(scope="module")
def served(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A live server of two ranks, and what fresh ones answer: by base and adapter ("" for none)."""
    from tests.support.trainer import with_adapter

    root = tmp_path_factory.mktemp("adapters")
    bases = [checkpoint("qwen3", "float32", seed) for seed in (0, 1)]
    for name, config in ADAPTERS.items():
        with_adapter(bases[0], torch.float32, **config).save_pretrained(root / name)
    modules = [f"{name}={root / name}" for name in ADAPTERS]
    plain = {"bridge": False, "flags": [*LORA, "--max-loras=4", "--lora-modules", *modules], "env": UNBOUND}
    with serving_together(*((base, root / f"fresh{i}", dict(plain)) for i, base in enumerate(bases))) as some:
        fresh = [{name: answers(server, name or server.model) for name in ("", *ADAPTERS)} for server in some]
    for base in fresh:  # else nothing below could fail
        assert len({str(found) for found in base.values()}) == len(ADAPTERS) + 1
    flags = [*LORA, *CRAMPED, "--tensor-parallel-size=2", "--lora-modules", f"policy={root / 'files'}",
             f"other={root / 'other'}"]  # fmt: skip
    options = {"flags": flags, "bridge_flags": ["--adapters=policy", "--http"], "env": UNBOUND}
    with serving(bases[0], root / "live", **options) as server:
        yield SimpleNamespace(server=server, bases=bases, fresh=fresh, tolerance=1e-4)


@pytest.fixture(scope="module")
def trainer(served: SimpleNamespace) -> Iterator[Trainers]:
    with training("plain", served.bases[0], logdir=served.server.logdir, dtype="float32") as trainers:
        yield trainers


def check(served: SimpleNamespace, base: int, policy: str) -> None:
    """The policy, the base model, and an adapter that nobody sends: all as fresh servers have them."""
    for name, model in ((policy, "policy"), ("", served.bases[0]), ("other", "other"), (policy, "policy")):
        live, fresh = answers(served.server, model), served.fresh[base][name]
        assert_equal(live["greedy"], fresh["greedy"], tolerance=served.tolerance)
        assert live["document"] == fresh["document"], (base, policy, name)


def send(served: SimpleNamespace, trainer: Trainers, name: str, base: int = 0) -> dict[str, Any]:
    trainer.must("adapt", path=str(served.bases[base]), **ADAPTERS[name])
    return trainer.must("broadcast", adapters_only=True)[0]


def publish(served: SimpleNamespace, trainer: Trainers, base: int) -> dict[str, Any]:
    trainer.must("load", path=str(served.bases[base]))
    return trainer.must("broadcast")[0]


def test_versions_of_the_adapter_and_of_the_base_in_turns(served, trainer):
    check(served, 0, "files")
    wide = send(served, trainer, "wide")
    assert served.server.status()["weight_version"] == wide["version"] == 1
    check(served, 0, "wide")
    trainer.must("rollback")
    check(served, 0, "files")  # nothing was sent before
    narrow = send(served, trainer, "narrow")  # what it has not is zero again
    assert 0 < narrow["bytes"] < wide["bytes"] < publish(served, trainer, 1)["bytes"] / 4
    check(served, 1, "narrow")
    send(served, trainer, "wide")
    send(served, trainer, "files")
    check(served, 1, "files")
    publish(served, trainer, 0)
    publish(served, trainer, 1)
    check(served, 1, "files")
    send(served, trainer, "narrow")
    check(served, 1, "narrow")
    (back,) = trainer.must("rollback")
    assert back["bytes"] == 0
    check(served, 1, "files")
    send(served, trainer, "wide")
    publish(served, trainer, 0)
    check(served, 0, "wide")


@only_in_full("serving")  # streams live through versions of the model always, and so do an adapter's versions
def test_streams_of_the_adapter_live_through_its_versions(served, trainer):
    publish(served, trainer, 0)
    streams = Streams(Api(served.server.port, "policy"), width=4, tokens=300)
    versions = [send(served, trainer, name)["version"] for name in ("narrow", "wide") * 4]
    in_flight = sum(streams.alive())
    streams.stop()
    assert streams.failures == []
    assert in_flight == 4
    assert versions == list(range(versions[0], versions[0] + len(versions)))
    assert assert_labels_in_order(served.server, streams.finished) >= 2
    check(served, 0, "wide")


def test_an_adapter_that_does_not_fit_changes_nothing(served, trainer):
    publish(served, trainer, 0)
    send(served, trainer, "wide")
    before = served.server.status()["weight_version"]
    config = {"seed": 5, "r": 16, "target_modules": ["q_proj", "lm_head"], "use_dora": True}
    trainer.must("adapt", path=str(served.bases[0]), **config)
    (refused,) = trainer.command("broadcast", adapters_only=True)
    assert refused["type"] == "MappingError"
    assert "has DoRA, which is not served" in refused["error"]
    trainer.must("adapt", path=str(served.bases[0]), **{**config, "use_dora": False})
    (refused,) = trainer.command("broadcast", adapters_only=True)
    assert "rank 16, above the server's --max-lora-rank 8" in refused["error"]
    assert "lm_head.lora_A.weight: the server takes no LoRA there" in refused["error"]
    (refused,) = trainer.command("broadcast", adapters_only=True, served_as="other")
    assert re.search(r"served as 'other', and the server takes: policy", refused["error"])
    assert served.server.status()["weight_version"] == before
    check(served, 0, "wide")


def test_fsdp2_with_two_ranks(served, trainer):
    publish(served, trainer, 0)
    trainer.must("close")
    with training("plain", served.bases[0], logdir=served.server.logdir, dtype="float32", ranks=2) as ranks:
        for name in ("narrow", "wide"):
            ranks.must("adapt", path=str(served.bases[0]), **ADAPTERS[name])
            first, second = ranks.must("broadcast", adapters_only=True, served_as="policy")
            assert first["version"] == second["version"]
            check(served, 0, name)
        ranks.must("close")
