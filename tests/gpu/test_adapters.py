"""A served LoRA adapter on a GPU, version after version, answers as a fresh vLLM that loads it from files."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.gpu.test_serving import FLAGS, ON_GPU, SERVER_ENV, SHAPE
from tests.serving.test_adapters import ADAPTERS, CRAMPED, answers, check, publish, send
from tests.support.checks import Streams
from tests.support.models import build_checkpoint
from tests.support.serving import Api, Trainers, serving, serving_together, training

pytest.importorskip("peft")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

# Several servers start on a GPU at once: none may measure the others' memory as its own.
LORA = [*FLAGS, "--kv-cache-memory-bytes=1G", "--enable-lora", "--max-lora-rank=8", *CRAMPED]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A live server, and what fresh ones answer: by base and adapter ("" for none)."""
    from tests.support.trainer import with_adapter

    root = tmp_path_factory.mktemp("adapters")
    bases = [build_checkpoint("qwen3", root / str(seed), seed=seed, **SHAPE) for seed in (0, 1)]
    for name, config in ADAPTERS.items():
        with_adapter(bases[0], torch.bfloat16, **config).save_pretrained(root / name)
    modules = [f"{name}={root / name}" for name in ADAPTERS]
    plain = {"bridge": False, "flags": [*LORA, "--lora-modules", *modules], "env": SERVER_ENV}
    with serving_together(*((base, root / f"fresh{i}", dict(plain)) for i, base in enumerate(bases))) as some:
        fresh = [{name: answers(server, name or server.model) for name in ("", *ADAPTERS)} for server in some]
    for base in fresh:  # else nothing below could fail
        assert len({str(found) for found in base.values()}) == len(ADAPTERS) + 1
    flags = [*LORA, "--lora-modules", f"policy={root / 'files'}", f"other={root / 'other'}"]
    options = {"flags": flags, "bridge_flags": ["--adapters=policy", "--http"], "env": SERVER_ENV}
    with serving(bases[0], root / "live", **options) as server:
        yield SimpleNamespace(server=server, bases=bases, fresh=fresh, tolerance=0.0)


@pytest.fixture(scope="module")
def trainer(served: SimpleNamespace) -> Iterator[Trainers]:
    with training("plain", served.bases[0], logdir=served.server.logdir, env=ON_GPU) as trainers:
        yield trainers


def test_versions_of_the_adapter_and_of_the_base_in_turns(served: SimpleNamespace, trainer: Trainers) -> None:
    check(served, 0, "files")
    wide = send(served, trainer, "wide")
    assert wide["transport"] == "pull-gpu"
    check(served, 0, "wide")
    trainer.must("rollback")
    check(served, 0, "files")
    narrow = send(served, trainer, "narrow")
    assert 0 < narrow["bytes"] < wide["bytes"] < publish(served, trainer, 1)["bytes"]
    check(served, 1, "narrow")
    send(served, trainer, "wide")
    send(served, trainer, "files")
    check(served, 1, "files")
    publish(served, trainer, 0)
    check(served, 0, "files")


def test_streams_of_the_adapter_live_through_its_versions(served: SimpleNamespace, trainer: Trainers) -> None:
    streams = Streams(Api(served.server.port, "policy"), width=4, tokens=480)
    versions = [send(served, trainer, name)["version"] for name in ("narrow", "wide") * 4]
    streams.stop()
    assert streams.failures == []
    assert versions == list(range(versions[0], versions[0] + len(versions)))
    check(served, 0, "wide")
