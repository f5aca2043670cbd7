"""What of vLLM's own configuration a worker refuses to publish under: by name, and all at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import KVTransferConfig, OffloadConfig, ParallelConfig, WeightTransferConfig

from bridge.errors import ConfigError, MappingError
from vllm_patching import compat, kept, loading, verification


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
    return loading.Loaded(model=model, model_config=SimpleNamespace(model="m"), loader=None, places=places)


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
    private = kept.private_tensors(model)
    places = {"weight": loading.Place(model.weight.detach(), verification.digest(model.weight))}
    return loading.Loaded(
        model=model, model_config=SimpleNamespace(model="m"), loader=None, places=places,
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


def test_a_buffer_that_processing_makes_of_weights_is_refused() -> None:
    model = Derived()
    record = loaded_once(model)
    model.register_buffer("scale", torch.ones(4))
    assert [home.name for home in loading.find_homes(record)] == ["weight"], (
        "a constant is made of no weights"
    )
    model.register_buffer("turned", torch.arange(8.0).view(2, 4))
    with pytest.raises(MappingError, match=r"turned \(2, 4\) was derived from weights after loading"):
        loading.find_homes(record)


def test_a_buffer_that_no_trace_writes_may_be_cast_and_no_more() -> None:
    model = Derived()
    model.register_buffer("table", torch.arange(4.0))
    record = loaded_once(model)
    record.untraced["table"] = model.table
    model.table = model.table.to(torch.bfloat16)
    assert [home.name for home in loading.find_homes(record)] == ["weight"]
    model.table = model.table + 1
    with pytest.raises(MappingError, match=r"table \(4,\) was derived from weights after loading"):
        loading.find_homes(record)


def test_a_tied_name_that_processing_gives_memory_of_its_own_is_refused() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    weight = model.head.weight = model.embed.weight
    places = {"embed.weight": loading.Place(weight.detach(), verification.digest(weight))}
    record = loading.Loaded(model=model, model_config=SimpleNamespace(model="m"), loader=None, places=places)
    assert [home.name for home in loading.find_homes(record)] == ["embed.weight"]
    model.head.weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(MappingError, match=r"head\.weight \(4, 2\) was derived from weights after loading"):
        loading.find_homes(record)


def test_a_copy_deep_in_a_layers_kernel_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = Derived()
    model.weight.data.copy_(torch.arange(8.0).view(4, 2))
    kernel = SimpleNamespace()
    model.quant_method = SimpleNamespace(kernel=kernel)
    record = loaded_once(model)
    kernel.alpha = torch.full((4,), 1.7)
    assert [home.name for home in loading.find_homes(record)] == ["weight"], "a kernel's own constant"
    kernel.table = torch.rand(5)
    assert [home.name for home in loading.find_homes(record)] == ["weight"], "only warned of"
    assert "quant_method.kernel.table (5,) was made while" in caplog.text
    kernel.packed = torch.cat([model.weight.detach(), torch.ones_like(model.weight)])
    with pytest.raises(MappingError, match=r"quant_method\.kernel\.packed .* was made while"):
        loading.find_homes(record)


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


# --- what the first forwards make of weights ------------------------------------------------------------


class Lazy(nn.Module):
    """A layer whose weights are the arena; ``table`` is a buffer that no update writes."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = torch.arange(16.0)
        self.q = nn.Parameter(self.arena[:8].view(4, 2), requires_grad=False)
        self.k = nn.Parameter(self.arena[8:].view(4, 2), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))
        self.kept: object = None
        self.kv_cache: list[torch.Tensor] = []

    def watch(self) -> kept.Watch:
        return kept.Watch(self, arena=self.arena.view(torch.uint8), run_time=lambda: self.kv_cache)


def _fills_a_buffer(layer: Lazy) -> None:  # as FoPE's rotary table
    layer.table.copy_(layer.q.sum(1))


def _replaces_a_buffer(layer: Lazy) -> None:
    layer.table = layer.q.sum(1)


def _keeps_both_in_one(layer: Lazy) -> None:  # as Glm5Next's convolutions
    layer.kept = torch.cat([layer.q, layer.k])


def _keeps_it_turned_in_a_kernel(layer: Lazy) -> None:
    layer.kept = SimpleNamespace(packed=layer.k.T.contiguous().to(torch.bfloat16))


def _registers_a_copy(layer: Lazy) -> None:
    layer.register_buffer("copy", layer.q.clone())


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (_fills_a_buffer, r"table \(4,\) of Lazy was filled by a forward"),
        (_replaces_a_buffer, r"table \(4,\) of Lazy was filled by a forward"),
        (_keeps_both_in_one, r"kept \(8, 2\) of Lazy is a copy of q"),
        (_keeps_it_turned_in_a_kernel, r"kept\.packed \(2, 4\) of Lazy is a copy of k"),
        (_registers_a_copy, r"copy \(4, 2\) of Lazy is a copy of q"),
    ],
)
def test_what_a_forward_makes_of_weights_is_refused(forward: Callable[[Lazy], None], says: str) -> None:
    layer = Lazy()
    watch = layer.watch()
    watch.check()
    forward(layer)
    with pytest.raises(MappingError, match=says):
        watch.check()


def test_what_else_a_forward_makes_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    layer = Lazy()
    watch = layer.watch()
    layer.table = layer.table.to(torch.bfloat16)  # as vLLM's rotary embedding does
    layer.arena.mul_(2)  # a new version
    layer.kv_cache = [torch.arange(64.0)]
    layer.kept = {"view": layer.q.T, "ids": torch.arange(4), "unused": torch.zeros(4, 2)}
    watch.check()
    assert not caplog.records
    layer.kept = torch.rand(3, 3)
    for _ in range(2):
        watch.check()
    (record,) = caplog.records
    assert "kept (3, 3) of Lazy was made by a forward, outside the weights' memory" in record.getMessage()


def _over_the_same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Another storage object over a contiguous tensor's elements, as vLLM's ``weak_ref_tensor`` makes."""
    elements = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return torch.frombuffer(elements, dtype=torch.float32).view(tensor.shape)


def test_what_follows_the_arena_by_a_storage_of_its_own_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = Lazy()
    watch = layer.watch()
    weak = _over_the_same_memory(layer.k)
    assert kept.storage_key(weak) != kept.storage_key(layer.k)
    layer.kept = SimpleNamespace(turned=weak.T, part=weak[2:], parameter=nn.Parameter(weak))
    layer.register_buffer("alias", weak[:, 1])
    watch.check()
    assert not caplog.records
    layer.kept.copy = weak.clone()
    with pytest.raises(MappingError, match=r"kept\.copy \(4, 2\) of Lazy is a copy of k"):
        watch.check()


def test_tensors_without_memory_hide_nothing_beside_them(caplog: pytest.LogCaptureFixture) -> None:
    layer = Lazy()
    layer.before = torch.eye(2).to_sparse()
    watch = layer.watch()
    with FakeTensorMode():
        traced = torch.rand(4, 2)
    layer.kept = [traced, torch.empty(4, 2, device="meta"), torch.eye(2).to_sparse(), torch.empty(0)]
    watch.check()
    assert not caplog.records
    layer.kept = [traced, layer.q.clone()]
    with pytest.raises(MappingError, match=r"kept\[1\] \(4, 2\) of Lazy is a copy of q"):
        watch.check()


def test_rotary_frequencies_may_be_computed_anew_for_a_longer_prompt() -> None:
    layer = Lazy()
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=1, max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    layer.rotary = LlamaRotaryEmbedding(config)
    watch = layer.watch()
    before = layer.rotary.inv_freq
    layer.rotary(torch.zeros(1), torch.arange(20)[None])
    assert not torch.equal(layer.rotary.inv_freq, before)
    watch.check()
    layer.rotary(torch.zeros(1), torch.arange(4)[None])
    watch.check()
    before.copy_(layer.q[:, 0])
    with pytest.raises(MappingError, match=r"rotary\.inv_freq \(4,\) of \w+ was filled by a forward"):
        watch.check()


def test_a_loader_that_wants_other_arguments_costs_its_names_only() -> None:
    class Other:
        def get_all_weights(self) -> None:
            """Takes neither a configuration nor a model."""

    with (
        loading.remembering(Other()),
        pytest.raises(MappingError, match=r"checkpoint: TypeError: .*get_all_weights\(\) takes 1 positional"),
    ):
        loading.before_processing(nn.Linear(2, 2), SimpleNamespace(model="m"))
