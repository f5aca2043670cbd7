"""What vLLM is kept from doing, where its versions differ."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_patching import compat, residue


def test_packed_experts_leave_the_loaded_ones_as_they_are() -> None:
    def replace_parameter(layer: nn.Module, name: str, new: torch.Tensor) -> None:
        getattr(layer, name).data.copy_(new)  # as in 0.33, where shapes agree

    module: Any = ModuleType("cpu_moe")
    module.replace_parameter = replace_parameter
    compat.keep_raw_experts(module)
    layer = nn.Linear(2, 2)
    raw = layer.weight.detach()
    before = raw.clone()
    module.replace_parameter(layer, "weight", before + 1)
    assert torch.equal(layer.weight, before + 1)
    assert torch.equal(raw, before)


def test_a_module_without_it_is_left_alone() -> None:
    compat.keep_raw_experts(ModuleType("cpu_moe"))
    compat.keep_store_in_run_dir(ModuleType("multiproc_executor"))


@pytest.mark.parametrize(
    ("method", "transform"),
    [
        ({"moe_kernel": {"fused_experts": {"isa": "amx", "_pad_moe_intermediate": None}}}, "cpu_moe_w2:amx"),
        ({"cpu_fused_moe": {"isa": "vec"}}, "cpu_moe_w2:vec"),  # before 0.28
        ({"cpu_fused_moe": {"isa": "none"}}, ""),
        ({"cpu_fused_moe": {}}, ""),
        ({"moe_kernel": {"fused_experts": {"isa": "amx"}}}, ""),  # somebody else's experts
    ],
)
def test_how_experts_were_packed_is_known_by_their_kernel(method: dict[str, Any], transform: str) -> None:
    module: Any = SimpleNamespace(quant_method=_named(method))
    assert compat.moe_transform(module, "w2_weight") == transform


def _named(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return SimpleNamespace(**{name: _named(value) for name, value in content.items()})


def test_the_file_by_which_workers_meet_goes_with_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setenv("BRIDGE_RUN_DIR", str(run_dir))
    module: Any = ModuleType("multiproc_executor")
    module.get_file_store_init_method = lambda: "file:///tmp/vllm_dist_0"
    compat.keep_store_in_run_dir(module)
    first, second = (module.get_file_store_init_method().removeprefix("file://") for _ in range(2))
    assert Path(first).parent == Path(second).parent == run_dir
    assert first != second
    Path(first).touch()
    residue.remove_run_dir(run_dir)
    assert not run_dir.exists()
