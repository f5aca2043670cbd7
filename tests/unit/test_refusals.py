"""What of vLLM's own configuration a worker refuses to publish under: by name, and all at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn
from vllm.config import KVTransferConfig, OffloadConfig, ParallelConfig, WeightTransferConfig

from bridge.errors import ConfigError, MappingError
from vllm_patching import compat, loading, verification


def served(**parallel: Any) -> SimpleNamespace:
    """The parts of a worker's ``VllmConfig`` that are looked at, as they are by default."""
    return SimpleNamespace(
        parallel_config=ParallelConfig(**parallel),
        offload_config=OffloadConfig(),
        weight_transfer_config=None,
        kv_transfer_config=None,
        speculative_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(quantization=None, is_multimodal_model=False, enable_sleep_mode=False),
    )


def refusal(config: SimpleNamespace) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compat.refuse_unsupported_config(config)
    return str(caught.value).splitlines()[1:]


def test_tensor_and_expert_parallel_servers_are_accepted() -> None:
    compat.refuse_unsupported_config(served())
    compat.refuse_unsupported_config(served(tensor_parallel_size=2, enable_expert_parallel=True))


def test_pipelines_and_engines_in_lockstep_are_accepted() -> None:
    compat.refuse_unsupported_config(served(pipeline_parallel_size=2, tensor_parallel_size=2))
    compat.refuse_unsupported_config(served(data_parallel_size=2, enable_expert_parallel=True))


def test_engines_in_lockstep_do_not_stand_still_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_STAGING", "in-place")
    compat.refuse_unsupported_config(served(pipeline_parallel_size=2))
    (fault,) = refusal(served(data_parallel_size=2))
    assert "--data-parallel-size 2 with a mixture of experts and --staging in-place" in fault


def _offload(config: SimpleNamespace) -> None:
    config.offload_config = OffloadConfig(prefetch={"offload_group_size": 8})


def _offload_uva(config: SimpleNamespace) -> None:
    config.offload_config = OffloadConfig(uva={"cpu_offload_gb": 1})


def _eplb(config: SimpleNamespace) -> None:
    config.parallel_config.enable_eplb = True


def _lockstep_pipelines(config: SimpleNamespace) -> None:
    config.parallel_config.data_parallel_size = config.parallel_config.pipeline_parallel_size = 2


def _transfer(config: SimpleNamespace) -> None:
    config.weight_transfer_config = WeightTransferConfig(backend="nccl")


def _connector(config: SimpleNamespace) -> None:
    config.kv_transfer_config = KVTransferConfig(kv_connector="SharedStorageConnector", kv_role="kv_both")


def _fault_tolerance(config: SimpleNamespace) -> None:
    config.parallel_config.enable_fault_tolerance = True


def _ray(config: SimpleNamespace) -> None:
    config.parallel_config.distributed_executor_backend = "ray"


REFUSED: dict[str, Callable[[SimpleNamespace], None]] = {
    "--enable-eplb": _eplb,
    "--data-parallel-size 2 with a mixture of experts and --pipeline-parallel-size": _lockstep_pipelines,
    "--weight-transfer-config": _transfer,
    "--kv-transfer-config": _connector,
    "--enable-fault-tolerance": _fault_tolerance,
    "--distributed-executor-backend ray": _ray,
    "--cpu-offload-gb": _offload_uva,
    "--offload-group-size": _offload,
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_would_part_the_ranks_is_refused_by_name(named: str) -> None:
    config = served()
    REFUSED[named](config)
    (fault,) = refusal(config)
    assert named in fault


def test_rocm_is_refused_though_its_devices_are_called_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    config = served()
    config.device_config.device_type = "cuda"
    compat.refuse_unsupported_config(config)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    (fault,) = refusal(config)
    assert "ROCm 6.4" in fault


def test_all_refusals_are_listed_at_once() -> None:
    config = served()
    for apply in REFUSED.values():
        apply(config)
    assert len(refusal(config)) == len(REFUSED) - 1  # both ways to offload are one fault


# --- what an attention backend keeps for itself ---------------------------------------------------------


class Attention(nn.Module):
    """As vLLM's: the sinks are a parameter, which the backend's implementation holds too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.impl = SimpleNamespace(sinks=self.sinks)


def loaded(model: Attention) -> loading.Loaded:
    places = {"sinks": loading.Place(model.sinks.detach(), verification.digest(model.sinks))}
    return loading.Loaded(
        model=model, model_config=SimpleNamespace(model="m"), loader=None, places=places, names={"sinks"}
    )


def test_sinks_that_a_backend_copies_are_refused() -> None:
    model = Attention(torch.bfloat16)
    assert [home.name for home in loading.find_homes(loaded(model))] == ["sinks"]
    model.impl.sinks = model.sinks.to(torch.float32)  # as FlashInfer does after loading
    with pytest.raises(MappingError, match=r"impl\.sinks \(4,\) torch\.float32 is a copy in the attention"):
        loading.find_homes(loaded(model))
    with pytest.raises(MappingError, match=r"would be copied by the first forward; use --dtype bfloat16"):
        loading.find_homes(loaded(Attention(torch.float16)))


# --- what loading makes of weights ----------------------------------------------------------------------


class Derived(nn.Module):
    """As vLLM's openPangu: its loader keeps something made of two parameters, as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))
        self.made: torch.Tensor | None = None
        self.fixed = torch.arange(4.0)
        self.impl = SimpleNamespace(kept=None)


def loaded_once(model: Derived) -> loading.Loaded:
    private = loading.private_tensors(model)
    places = {"weight": loading.Place(model.weight.detach(), verification.digest(model.weight))}
    return loading.Loaded(
        model=model, model_config=SimpleNamespace(model="m"), loader=None, places=places, names={"weight"},
        private=private,
    )  # fmt: skip


def _as_an_attribute(model: Derived) -> None:
    model.made = model.weight.data * 2


def _in_a_list(model: Derived) -> None:
    model.made = [model.weight.data.clone()]  # type: ignore[assignment]


def _in_the_backend(model: Derived) -> None:
    model.impl.kept = model.weight.data.clone()


@pytest.mark.parametrize(
    ("keep", "path"),
    [(_as_an_attribute, "made"), (_in_a_list, r"made\[0\]"), (_in_the_backend, r"impl\.kept")],
)
def test_what_no_update_would_reach_is_refused(keep: Callable[[Derived], None], path: str) -> None:
    model = Derived()
    record = loaded_once(model)
    keep(model)
    with pytest.raises(MappingError, match=rf"\.{path} \(4, 2\) was made while the model was loaded"):
        loading.find_homes(record)


def test_views_of_weights_and_what_was_there_before_are_followed() -> None:
    model = Derived()
    record = loaded_once(model)
    model.made = model.weight.data.T  # as MLA's
    assert [home.name for home in loading.find_homes(record)] == ["weight"]


def test_what_vllm_itself_ties_is_known_as_tied() -> None:
    """Where transformers can't build the model, nobody else says that a second head is dropped."""
    model = nn.Module()
    model.embed, model.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    assert list(loading._aliases(model)) == []
    model.head.weight = model.embed.weight
    assert set(loading._aliases(model)) == {
        ("embed.weight", "head.weight"),
        ("head.weight", "embed.weight"),
    }


def test_a_loader_that_wants_other_arguments_costs_its_names_only() -> None:
    class Other:
        def get_all_weights(self) -> None:
            """Takes neither a configuration nor a model."""

    with (
        loading.remembering(Other()),
        pytest.raises(MappingError, match=r"checkpoint: TypeError: .*get_all_weights\(\) takes 1 positional"),
    ):
        loading.before_processing(nn.Linear(2, 2), SimpleNamespace(model="m"))
