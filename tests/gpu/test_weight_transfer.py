"""Trainers that know only vLLM's weight-transfer interface, with the backend ``bridge``, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.gpu.test_serving import FLAGS, ON_GPU, SERVER_ENV, SHAPE, decoding
from tests.serving.test_weight_transfer import BACKEND_FLAGS, DEV_MODE, endpoint_training
from tests.support.models import build_checkpoint
from tests.support.serving import Trainers, serving_together

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A live server with vLLM's endpoints, and what unpatched vLLMs answer from two sets of weights."""
    root = tmp_path_factory.mktemp("transfer")
    sets = [build_checkpoint("qwen3", root / str(seed), seed=seed, **SHAPE) for seed in range(2)]
    # Several servers start on a GPU at once: none may measure the others' memory as its own.
    flags = [*FLAGS, "--kv-cache-memory-bytes=1G"]
    plain = {"bridge": False, "flags": flags, "env": SERVER_ENV}
    options = {"flags": [*flags, *BACKEND_FLAGS], "env": {**SERVER_ENV, **DEV_MODE}}
    wanted = [(path, root / f"fresh{index}", dict(plain)) for index, path in enumerate(sets)]
    with serving_together((sets[0], root / "live", options), *wanted) as (live, *others):
        fresh = [other.api.greedy() for other in others]
        assert fresh[0] != fresh[1]
        yield SimpleNamespace(live=live, sets=sets, fresh=fresh)


@pytest.fixture(scope="module")
def trainer(served: SimpleNamespace) -> Iterator[Trainers]:
    options = {"dtype": "bfloat16", "env": ON_GPU}
    with endpoint_training(served.live, served.sets[0], **options) as trainers:
        yield trainers


def check(served: SimpleNamespace, trainer: Trainers, index: int, send: str) -> None:
    trainer.must("load", path=str(served.sets[index]))
    before = served.live.status()["weight_version"]
    (receipt,) = trainer.must(send)
    assert receipt["version"] == before + 1
    assert receipt["transport"] == "pull-gpu"
    assert served.live.api.greedy() == served.fresh[index]


@pytest.mark.parametrize("source", ["module", "one_buffer"])
def test_versions_through_vllms_factory(served: SimpleNamespace, trainer: Trainers, source: str) -> None:
    trainer.must("init", source=source)
    for index in (1, 0, 1, 0):
        check(served, trainer, index, "send")
    trainer.must("leave")


def test_requests_decode_on_while_a_loop_of_its_own_drives_the_endpoints(
    served: SimpleNamespace, trainer: Trainers
) -> None:
    trainer.must("init_by_hand")
    with decoding(served.live.api, 4):
        for index in (1, 0, 1, 0):
            check(served, trainer, index, "send_by_hand")
    trainer.must("close")
