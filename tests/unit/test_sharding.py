"""What a model is to the bridge: names, boxes, faults; and the guard that keeps an optimizer waiting."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel

from bridge import guard, zero3
from bridge.catalogue import Catalogue
from bridge.declared import DeclaredLayout
from bridge.errors import ConfigError, MappingError, RoundAborted
from bridge.fallback import gather_full
from bridge.guard import Guarded, StepGuard
from bridge.job import Job, PendingBroadcast
from bridge.names import canonical_names
from bridge.param_mappings import export_param_mappings, load_param_mappings
from bridge.parts import collect_parts, collect_single, snapshot
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import Mapping, Rendezvous
from bridge.protocol.plan import build_plan
from bridge.sharding import collect
from tests.support.mappings import identity_mapping, shapes_of
from vllm_patching import update_files


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)  # a model's own part that is called as wrappers call theirs
        self.register_buffer("bias_correction", torch.ones(3))
        self.register_buffer("rope", torch.ones(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) * self.bias_correction


class Lm(nn.Module):
    def __init__(self, *, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = Block()
        self.lm_head = nn.Linear(4, 5, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight


NAMES = {
    "embed.weight",
    "block.module.weight",
    "block.module.bias",
    "block.bias_correction",
    "lm_head.weight",
}


def mapping_of(model: nn.Module, *, without: tuple[str, ...] = (), **arguments: object) -> Mapping:
    shapes = {name: s for name, s in shapes_of(canonical_names(model)).items() if name not in without}
    return identity_mapping(("checkpoint", shapes), **arguments)  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------------------


def test_parameters_and_persistent_buffers_have_names() -> None:
    assert canonical_names(Lm()).keys() == NAMES


def test_wrappers_leave_no_trace_in_names() -> None:
    model = Lm()
    model.block = checkpoint_wrapper(model.block)
    model.block._checkpoint_wrapped_module.module = torch.compile(
        model.block._checkpoint_wrapped_module.module
    )
    wrapped = nn.DataParallel(torch.compile(model))
    assert "module._orig_mod" in next(iter(wrapped.state_dict()))
    assert canonical_names(wrapped).keys() == NAMES
    shards = collect(wrapped, mapping_of(Lm()), rank=0)
    assert len(shards.tensors) == len(NAMES)


def test_wrappers_leave_no_trace_in_a_state_dict() -> None:
    model = Lm()
    model.block = checkpoint_wrapper(model.block)
    state = nn.DataParallel(torch.compile(model)).state_dict()
    assert len(collect(state, mapping_of(Lm()), rank=0).tensors) == len(NAMES)
    assert len(collect(state.items(), mapping_of(Lm()), rank=0).tensors) == len(NAMES)


def test_names_that_wrappers_alone_tell_apart_are_refused() -> None:
    state = {"a.w": torch.ones(2), "a._orig_mod.w": torch.zeros(2)}
    with pytest.raises(MappingError, match=r"one name without wrappers: a\.w; which is meant"):
        collect(state, identity_mapping(("v", {"a.w": (2,)})), rank=0)


def test_a_tied_head_needs_no_source_of_its_own() -> None:
    model = Lm(tie=True)
    shards = collect(model, mapping_of(model, without=("lm_head.weight",)), rank=0)
    assert len(shards.tensors) == len(NAMES) - 1


def test_a_source_is_found_by_the_tied_partners_name() -> None:
    model = Lm(tie=True)
    shards = collect(model, mapping_of(model), rank=0)
    assert len(shards.tensors) == len(NAMES)
    addresses = [address for address, _ in shards.fingerprint()]
    assert len(set(addresses)) == len(NAMES) - 1


def test_an_untied_head_is_a_stranger_to_a_tied_server() -> None:
    with pytest.raises(MappingError, match=r"lm_head\.weight: the model has it, the server knows no such"):
        collect(Lm(), mapping_of(Lm(), without=("lm_head.weight",)), rank=0)


TIED = identity_mapping(
    ("checkpoint", {"embed": (8, 4), "w": (4,)}),
    ("transformers", {"embed": (8, 4), "head": (8, 4), "w": (4,)}),
    unused=["head"], tied={"head": "embed"},
)  # fmt: skip


def test_a_head_that_is_not_tied_here_is_not_dropped() -> None:
    """The server's names in memory include the tied one, which its loader drops."""
    embed, w = torch.ones(8, 4), torch.ones(4)
    assert len(collect({"embed": embed, "head": embed, "w": w}, TIED, rank=0).tensors) == 2
    # As in a state dict, where one parameter is two tensors of the same memory.
    assert len(collect({"embed": embed, "head": embed.detach(), "w": w}, TIED, rank=0).tensors) == 2
    assert len(collect({"embed": embed, "head": embed.clone(), "w": w}, TIED, rank=0).tensors) == 2
    for head in (torch.zeros(8, 4), embed[:4], torch.ones(0, 4), torch.ones(8, 4).bfloat16()):
        with pytest.raises(
            MappingError, match=r"head: the server has no weights of its own .* tied to embed"
        ):
            collect({"embed": embed, "head": head, "w": w}, TIED, rank=0)


def test_a_tied_name_handed_over_by_itself_is_refused() -> None:
    embed = torch.ones(8, 4)
    named = [(name, snapshot(embed, rank=0, world_size=1)) for name in ("embed", "head")]
    assert len(collect_parts(named, TIED, rank=0).tensors) == 1
    other = ("head", snapshot(embed + 1, rank=0, world_size=1))
    w = ("w", snapshot(torch.ones(4), rank=0, world_size=1))
    for parts in ([named[0], other], [other], [other, w]):
        with pytest.raises(MappingError, match=r"head: .* tied to embed; hand embed over instead"):
            collect_parts(parts, TIED, rank=0)


def test_the_vocabulary_with_most_names_is_taken() -> None:
    mapping = identity_mapping(
        ("checkpoint", {"a": (2,), "b.0": (3,), "b.1": (3,)}), ("transformers", {"a": (2,), "b": (2, 3)})
    )
    fused = {"a": torch.ones(2), "b": torch.ones(2, 3)}
    assert collect(fused, mapping, rank=0).layout.vocabulary == "transformers"
    split = {"a": torch.ones(2), "b.0": torch.ones(3), "b.1": torch.ones(3)}
    assert collect(split, mapping, rank=0).layout.vocabulary == "checkpoint"


def test_what_the_loader_drops_is_neither_wanted_nor_sent() -> None:
    mapping = identity_mapping(("checkpoint", {"a": (2,), "inv_freq": (3,)}), unused=["inv_freq"])
    for tensors in ({"a": torch.ones(2)}, {"a": torch.ones(2), "inv_freq": torch.ones(99)}):
        assert [s.source for s in collect(tensors, mapping, rank=0).layout.shards] == [0]


# --- shards -----------------------------------------------------------------------------------------------


def test_shards_are_the_parameters_memory() -> None:
    model = Lm()
    shards = collect(model, mapping_of(model), rank=3)
    assert shards.layout.rank == 3
    assert not any(t.requires_grad for t in shards.tensors)
    names = [s.name for s in mapping_of(model).vocabularies[0].sources]
    for shard, tensor in zip(shards.layout.shards, shards.tensors, strict=True):
        parameter = canonical_names(model)[names[shard.source]]
        assert tensor.data_ptr() == parameter.data_ptr()
        assert (shard.offset, shard.shape) == ((0,) * parameter.ndim, tuple(parameter.shape))
    assert all(shards.contiguous)
    build_plan(mapping_of(model), [shards.layout], bucket_bytes=16)


def test_a_moved_parameter_changes_the_fingerprint() -> None:
    model = Lm()
    mapping = mapping_of(model)
    before = collect(model, mapping, rank=0).fingerprint()
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert collect(model, mapping, rank=0).fingerprint() == before
    model.embed.weight = nn.Parameter(model.embed.weight.clone())
    assert collect(model, mapping, rank=0).fingerprint() != before


def test_a_parameter_that_is_not_contiguous_is_copied_and_marked() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    shards = collect(
        {"a": tensor, "b": torch.ones(2)}, identity_mapping(("v", {"a": (3, 2), "b": (2,)})), rank=0
    )
    assert shards.contiguous == (False, True)
    assert shards.tensors[0].is_contiguous()
    assert torch.equal(shards.tensors[0], tensor)


class Stream:
    """Stands where a GPU's stream and an event on it are."""

    def __init__(self, *_: object) -> None:
        self.recorded: object = None

    def record(self, stream: object) -> None:
        self.recorded = stream


@pytest.mark.parametrize("in_use", [True, False])
def test_host_memory_is_waited_for_where_a_gpu_may_write_to_it(
    monkeypatch: pytest.MonkeyPatch, in_use: bool
) -> None:
    """Pinned, copied into with non_blocking=True: the copy may be under way."""
    streams = {3: Stream()}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    model = Lm()
    mapping = mapping_of(model)
    shards = collect(model, mapping, rank=0)
    known = Catalogue(model, mapping, shards, Guarded(model.parameters())).find(model, mapping)
    assert known is not None
    for found in (shards, known):
        assert [event.recorded for event in found.computed] == [streams[3]] * in_use


def test_one_parameter() -> None:
    mapping = mapping_of(Lm())
    shards = collect_single("_orig_mod.embed.weight", torch.ones(5, 4), mapping, rank=0)
    assert len(shards.layout.shards) == 1
    with pytest.raises(
        MappingError, match=r"^1 fault.*\n.*nonsense: the server knows no such parameter among 5"
    ):
        collect_single("nonsense", torch.ones(1), mapping, rank=0)
    with pytest.raises(MappingError, match=r"has shape \(1,\), the server's \(5, 4\)"):
        collect_single("embed.weight", torch.ones(1), mapping, rank=0)


def test_one_parameter_may_belong_to_either_vocabulary() -> None:
    mapping = identity_mapping(("checkpoint", {"w": (4,)}), ("transformers", {"w": (2, 2)}))
    assert collect_single("w", torch.ones(2, 2), mapping, rank=0).layout.vocabulary == "transformers"
    assert collect_single("w", torch.ones(4), mapping, rank=0).layout.vocabulary == "checkpoint"


def test_of_vocabularies_of_equal_names_the_shapes_decide(tmp_path: Path) -> None:
    """Whichever way the tensors are handed over, and by files of the HTTP fallback as well."""
    mapping = identity_mapping(
        ("checkpoint", {"a": (2,), "w": (2, 3)}), ("transformers", {"a": (2,), "w": (3, 2)}), dtype="float32"
    )
    mapping = in_one_place(mapping, "a")
    for name, shape in (("checkpoint", (2, 3)), ("transformers", (3, 2))):
        tensors = {"a": torch.ones(2), "w": torch.ones(shape)}
        assert collect(tensors, mapping, rank=0).layout.vocabulary == name
        parts = [(key, snapshot(tensor, rank=0, world_size=1)) for key, tensor in tensors.items()]
        assert collect_parts(parts, mapping, rank=0).layout.vocabulary == name
        assert gather_full(tensors, keep=True, mapping=mapping).keys() == tensors.keys()
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        found = update_files.index([file])
        assert update_files.match_vocabulary(mapping, mapping.ranks[0], found) == name


def in_one_place(mapping: Mapping, name: str) -> Mapping:
    """``mapping`` with the source ``name`` written to where the first vocabulary has it."""
    (rank,) = mapping.ranks
    writes = {}
    for vocabulary in mapping.vocabularies:
        at = [source.name for source in vocabulary.sources].index(name)
        first = next(w for w in rank.writes[mapping.vocabularies[0].name] if w.source == at)
        writes[vocabulary.name] = tuple(first if w.source == at else w for w in rank.writes[vocabulary.name])
    return msgspec.structs.replace(mapping, ranks=(msgspec.structs.replace(rank, writes=writes),))


@pytest.mark.parametrize("digest", ["", "known"])
def test_what_two_vocabularies_write_to_different_places_is_refused(tmp_path: Path, digest: str) -> None:
    mapping = in_one_place(
        identity_mapping(("checkpoint", {"a": (2,), "w": (2, 2)}), ("transformers", {"a": (2,), "w": (2, 2)}),
                         dtype="float32", digest=digest), "a",
    )  # fmt: skip
    tensors = {"a": torch.ones(2), "w": torch.ones(2, 2)}
    fault = r"^1 fault\(s\)[^\n]*\n  w: the server takes it by its checkpoint and by its transformers names"
    for _ in range(2):
        with pytest.raises(MappingError, match=fault):
            collect(tensors, mapping, rank=0)
    with pytest.raises(MappingError, match=fault):
        collect_single("w", tensors["w"], mapping, rank=0)
    assert collect_single("a", tensors["a"], mapping, rank=0).layout.vocabulary == "checkpoint"
    save_file(tensors, tmp_path / "model.safetensors")
    found = update_files.index([tmp_path / "model.safetensors"])
    with pytest.raises(MappingError, match=fault):
        update_files.match_vocabulary(mapping, mapping.ranks[0], found)


def test_one_parameter_that_the_loader_drops() -> None:
    mapping = identity_mapping(("checkpoint", {"a": (2,)}), unused=["a"])
    with pytest.raises(MappingError, match="a: the server's loader drops it"):
        collect_single("a", torch.ones(2), mapping, rank=0)


# --- faults -----------------------------------------------------------------------------------------------


def test_all_faults_come_at_once() -> None:
    model = Lm()
    tensors = {**canonical_names(model), "value_head.weight": torch.ones(1)}
    del tensors["embed.weight"]
    tensors["lm_head.weight"] = torch.ones(6, 4)
    tensors["block.module.bias"] = torch.ones(3, dtype=torch.int8)
    with pytest.raises(MappingError) as caught:
        collect(tensors, mapping_of(model), rank=2)
    text = str(caught.value)
    assert text.startswith("4 fault(s) between trainer rank 2's model and the server's 'tests/tiny'")
    assert "embed.weight: the server needs it, the model has no such parameter" in text
    assert "value_head.weight: the model has it, the server knows no such parameter" in text
    assert "lm_head.weight: the model's has shape (6, 4), the server's (5, 4)" in text
    assert "block.module.bias: the model's is int8, which is not cast to the server's bfloat16" in text
    assert "pass the whole of it and no more" in text


def test_another_model_is_told_apart_at_a_glance() -> None:
    with pytest.raises(MappingError) as caught:
        collect({"x": torch.ones(1)}, mapping_of(Lm()), rank=0)
    assert "it has x, .. and not embed.weight" in str(caught.value)


FLOATS = {"float64": 3, "float32": 2, "bfloat16": 1, "float16": 1}


@pytest.mark.parametrize("served", [*FLOATS, "int8"])
@pytest.mark.parametrize("trained", [*FLOATS, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("digest", ["", "abc"])
def test_casts(trained: str, served: str, digest: str) -> None:
    mapping = identity_mapping(
        ("checkpoint", {"a": (2,)}), dtype=served, digest=digest and f"{digest}{served}"
    )
    tensors = {"a": torch.ones(2).to(getattr(torch, trained))}
    narrowing = trained in FLOATS and served in FLOATS and FLOATS[trained] > FLOATS[served]
    widening = (trained, served) in {("bfloat16", "float32"), ("float16", "float32")}
    if trained == served or narrowing or widening:
        assert collect(tensors, mapping, rank=0).layout.shards[0].dtype == trained
    else:
        with pytest.raises(MappingError, match=f"is {trained}, which is not cast to the server's {served}"):
            collect(tensors, mapping, rank=0)


def partitioned() -> torch.Tensor:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 0, 2, torch.Size([2])
    parameter.ds_tensor = torch.ones(1)
    parameter.ds_tensor.status = SimpleNamespace(name="NOT_AVAILABLE")
    return parameter


def let_go() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


def wrapped() -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.ones(2))


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (partitioned, "offloaded to NVMe by DeepSpeed"),
        (lambda: torch.empty(2, device="meta"), "on the meta device"),
        (lambda: torch.ones(2).to_sparse(), "stored as torch.sparse_coo"),
        (nn.UninitializedParameter, "not initialised yet"),
        (wrapped, "is a TwoTensor"),
        (let_go, "has no memory any more"),
        (fake, "is a FakeTensor"),
        (lambda: torch._neg_view(torch.ones(2)), "holds the opposite of its values"),
        (lambda: torch._efficientzerotensor(2), "is a zero tensor"),
    ],
)
def test_memory_that_does_not_hold_the_values_is_refused_by_name(tensor, reason: str) -> None:
    mapping = identity_mapping(("checkpoint", {"a": (2,), "b": (2,)}))
    with pytest.raises(MappingError, match=rf"^1 fault\(s\)[^\n]*\n  a: .*{reason}"):
        collect({"a": tensor(), "b": torch.ones(2)}, mapping, rank=0)


def test_models_whose_parameters_are_others_hear_what_to_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    mapping = mapping_of(model)
    with pytest.raises(MappingError, match=r"it is an AveragedModel around the model: pass its \.module"):
        collect(AveragedModel(model), mapping, rank=0)
    weight_norm(model[0])
    advice = (
        r"  0\.weight: the server needs it, the model computes it of others \(torch\.nn\.utils\.parametrize\)"
        r"; pass a copy\.deepcopy of the model after remove_parametrizations\(layer, 'weight'\)"
    )
    with pytest.raises(MappingError, match=advice):
        collect(model, mapping, rank=0)
    alone = weight_norm(nn.Linear(3, 2, bias=False))
    with pytest.raises(MappingError, match="weight: the model computes it of others"):
        collect(alone, identity_mapping(("checkpoint", {"weight": (2, 3)})), rank=0)
    remove_parametrizations(alone, "weight")
    assert collect(alone, identity_mapping(("checkpoint", {"weight": (2, 3)})), rank=0).tensors


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_run_of_elements_is_made_of_contiguous_boxes(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(0, whole.numel()))
    found = []
    for offset, extent in zero3.boxes_of_run(tuple(shape), start, end):
        box = whole[tuple(slice(lo, lo + n) for lo, n in zip(offset, extent, strict=True))]
        assert tuple(box.shape) == extent
        found += box.flatten().tolist()
    assert found == list(range(start, end))


def test_a_gathered_zero3_parameter_is_whole() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.ds_id, parameter.ds_numel = 0, 2
    assert collect({"a": parameter}, identity_mapping(("checkpoint", {"a": (2,)})), rank=0).tensors


# --- guard --------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adafactor, {}),
]


class Wait:
    def __init__(self, model: nn.Module, error: Exception | None = None) -> None:
        self.model, self.error = model, error
        self.seen: list[torch.Tensor] = []
        self.free = False

    def wait_released(self) -> None:
        self.free = True
        self.seen.append(self.model.weight.detach().clone())
        if self.error is not None:
            raise self.error


def trained_once(model: nn.Module) -> nn.Module:
    model(torch.ones(1, 3)).sum().backward()
    return model


@pytest.mark.parametrize(("kind", "arguments"), OPTIMIZERS)
def test_the_next_step_waits_once_and_before_it_changes_anything(kind, arguments) -> None:
    model = trained_once(nn.Linear(3, 2))
    optimizer = kind(model.parameters(), lr=0.1, **arguments)
    before = model.weight.detach().clone()
    wait = Wait(model)
    step_guard = StepGuard(Guarded(model.parameters()), wait)
    optimizer.step()
    optimizer.step()
    assert len(wait.seen) == 1
    assert torch.equal(wait.seen[0], before)
    assert not torch.equal(model.weight, before)
    assert not step_guard.active
    assert guard._active == ()


def test_an_optimizer_of_other_parameters_does_not_wait() -> None:
    model, critic = nn.Linear(3, 2), trained_once(nn.Linear(3, 2))
    wait = Wait(model)
    step_guard = StepGuard(Guarded(model.parameters()), wait)
    torch.optim.SGD(critic.parameters(), lr=0.1).step()
    assert step_guard.active
    step_guard.remove()
    step_guard.remove()
    trained_once(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert wait.seen == []


def test_an_optimizer_of_views_waits() -> None:
    flat = nn.Parameter(torch.ones(8))
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = flat.data[2:].view(2, 3)
    wait = Wait(model)
    StepGuard(Guarded(model.parameters()), wait)
    flat.grad = torch.ones(8)
    torch.optim.SGD([flat], lr=0.1).step()
    assert len(wait.seen) == 1


def test_what_the_wait_raises_comes_out_of_the_step_once() -> None:
    model = trained_once(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    StepGuard(Guarded(model.parameters()), Wait(model, RoundAborted("gone")))
    with pytest.raises(RoundAborted, match="gone"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_two_guards_are_both_honoured() -> None:
    model = trained_once(nn.Linear(3, 2))
    waits = [Wait(model), Wait(model)]
    for wait in waits:
        StepGuard(Guarded(model.parameters()), wait)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert [len(wait.seen) for wait in waits] == [1, 1]


class Interrupted(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[None]:
    """A signal in a moment, whose handler raises."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("waits", ["step", "load", "wait"])
def test_a_wait_that_a_signal_ends_leaves_the_weights_guarded(alarm: None, waits: str) -> None:
    model = trained_once(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    job = Job(None, version=7, call=1, encoding="dense")
    pending = PendingBroadcast(job, StepGuard(Guarded(model.parameters()), job, module=model))
    call = {
        "step": optimizer.step,
        "load": lambda: model.load_state_dict(nn.Linear(3, 2).state_dict()),
        "wait": pending.wait,
    }
    with pytest.raises(Interrupted):
        call[waits]()
    releaser = threading.Timer(0.1, lambda: (seen.append(model.weight.detach().clone()), job.released.set()))
    seen: list[torch.Tensor] = []
    releaser.start()
    optimizer.step()  # which may not come before that
    releaser.join()
    assert torch.equal(seen[0], before), "it is still read"
    assert not torch.equal(model.weight, before)
    assert guard._active == ()


def test_a_round_that_fails_behind_a_signal_ends_the_guard(alarm: None) -> None:
    model = trained_once(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = Job(None, version=7, call=1, encoding="dense")
    pending = PendingBroadcast(job, StepGuard(Guarded(model.parameters()), job, holding=[model.weight]))
    with pytest.raises(Interrupted):
        pending.wait()
    job.finish(None, RoundAborted("gone"))
    with pytest.raises(RoundAborted, match="gone"):
        pending.wait()
    assert guard._active == ()
    assert pending._guard._holding == ()
    optimizer.step()


def test_loading_a_checkpoint_waits_too() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    wait = Wait(model)
    step_guard = StepGuard(Guarded(model.parameters()), wait, module=model)
    state = nn.Linear(3, 2).state_dict()
    model.load_state_dict(state)
    model.load_state_dict(state)
    assert len(wait.seen) == 1
    assert torch.equal(wait.seen[0], before)
    step_guard.remove()
    assert not model._load_state_dict_pre_hooks


# --- the trainer's own layout ----------------------------------------------------------------------------


def test_the_layout_is_written_and_read_back(tmp_path: Path) -> None:
    place = export_param_mappings(
        Lm(), "tests/tiny", 2, 4, str(tmp_path),
        tp_shard_dim={"block.module.weight": 0}, needs_permute=["block.module.weight"], head_dim=2,
    )  # fmt: skip
    assert place == tmp_path / "vllm_bridge_config.json"
    document = json.loads(place.read_text())
    assert (document["model"], document["tp_degree"], document["dp_shard_degree"]) == ("tests/tiny", 2, 4)
    assert document["param_mappings"]["block.module.weight"] == {
        "vllm_name": "block.module.weight", "shape": [6, 4], "local_shape": [3, 4], "dtype": "float32",
        "tp_shard_dim": 0, "needs_permute": True,
    }  # fmt: skip
    assert document["param_mappings"].keys() == NAMES
    layout = load_param_mappings(place)
    assert layout.param_mappings["embed.weight"].shape == (5, 4)
    assert layout.declared() == DeclaredLayout(
        tp_degree=2, dp_shard_degree=4, tp_shard_dim={"block.module.weight": 0},
        needs_permute=["block.module.weight"], head_dim=2,
    )  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


def test_the_layout_never_replaces_a_servers_mapping(tmp_path: Path) -> None:
    served = mapping_of(Lm())
    place = tmp_path / mapping_file.CONFIG_NAME
    rendezvous = Rendezvous(host="h", port=1, secret="s")
    document = Mapping(
        **{f: getattr(served, f) for f in served.__struct_fields__} | {"rendezvous": rendezvous}
    )
    place.write_bytes(mapping_file.encode(document))
    with pytest.raises(ConfigError, match="a server's mapping"):
        export_param_mappings(Lm(), "tests/tiny", log_dir=tmp_path)
    assert mapping_file.load(place).rendezvous == rendezvous
    assert load_param_mappings(place).model == "tests/tiny"


def test_a_layout_that_cannot_be_lists_every_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export_param_mappings(
            Lm(),
            "",
            0,
            path=tmp_path / "x.json",
            tp_shard_dim={"nope": 0, "embed.weight": 2},
            needs_permute=["no"],
        )
    text = str(caught.value)
    assert "6 fault(s)" in text
    for part in (
        "model_name is ''", "tp_degree is 0", "nope:", "no:", "embed.weight: tp_shard_dim is 2",
        "head_dim is not given, and 1 parameter(s) need",
    ):  # fmt: skip
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_layout_needs_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGDIR", "BRIDGE_LOGDIR", "BRIDGE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="nowhere to write"):
        export_param_mappings(Lm(), "m")
    with pytest.raises(ConfigError, match="is not a directory"):
        export_param_mappings(Lm(), "m", log_dir=tmp_path / "missing")
    with pytest.raises(ConfigError, match="exclude each other"):
        export_param_mappings(Lm(), "m", log_dir=tmp_path, path=tmp_path / "a")
    with pytest.raises(MappingError, match="cannot read"):
        load_param_mappings(tmp_path / "a")
    (tmp_path / "a").write_text("{")
    with pytest.raises(MappingError, match="not an exported layout"):
        load_param_mappings(tmp_path / "a")
