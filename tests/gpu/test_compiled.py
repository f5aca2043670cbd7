"""Code that torch.compile made reads the version that was flipped in, at vLLM's own level of compilation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.test_serving import ON_GPU, SERVER_ENV, SHAPE
from tests.support.models import build_checkpoint
from tests.support.serving import serving, serving_together, training

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CACHED = "Directly load AOT compilation"  # how vLLM says that it compiles nothing
FLAGS = (
    "--no-enforce-eager",
    '--compilation-config={"cudagraph_capture_sizes": [1, 8, 32]}',
    "--gpu-memory-utilization=0.1",
    "--kv-cache-memory-bytes=1G",
    "--dtype=bfloat16",
)


def test_twenty_versions_under_compiled_code(tmp_path: Path) -> None:
    """Which kernels are compiled is decided by timing, so two compilations may answer otherwise, and one that
    is found in vLLM's cache otherwise than the one that wrote it: all that are compared take theirs from the
    cache, which one fills first. What is cached goes by the model's path, so both checkpoints have one."""
    sets = [build_checkpoint("qwen3", tmp_path / f"set{seed}", seed=seed, **SHAPE) for seed in range(2)]
    path = tmp_path / "model"
    path.symlink_to(sets[0])
    env = {**SERVER_ENV, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    plain = {"bridge": False, "flags": FLAGS, "env": env}
    with serving(path, tmp_path / "fill", **plain) as server:
        assert CACHED not in server.text()
    with serving_together(
        (path, tmp_path / "fresh", plain), (path, tmp_path / "live", {"flags": FLAGS, "env": env})
    ) as (first, live):
        path.unlink()
        path.symlink_to(sets[1])
        with serving(path, tmp_path / "fresh1", **plain) as second:
            logs = [first.text(), second.text(), (live.logdir / "vllm.log").read_text(errors="replace")]
            assert [log.count(CACHED) for log in logs] == [1, 1, 1]
            fresh = [first.api.greedy(), second.api.greedy()]
        assert fresh[0] != fresh[1]
        assert live.api.greedy() == fresh[0]
        with training("plain", sets[0], logdir=live.logdir, env=ON_GPU) as trainers:
            for version in range(1, 21):
                trainers.must("load", path=str(sets[version % 2]))
                assert trainers.must("broadcast")[0]["transport"] == "pull-gpu"
                assert live.api.greedy() == fresh[version % 2]
