"""The recorder against toy loaders: its records, replayed, do what they do; the rest it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn

from bridge.errors import MappingError
from bridge.protocol.mapping import Source
from vllm_patching import affine
from vllm_patching.coverage import Coverage, find_gaps
from vllm_patching.tracing import LiveTensor, Trace, TracedWrite, dtype_name, live_tensors, trace

Weights = Iterable[tuple[str, torch.Tensor]]
Loader = Callable[["Toy", str, torch.Tensor], None]


class Toy(nn.Module):
    """Named parameters ``p.*`` of given shapes, and one function that loads each source into them."""

    def __init__(self, load: Loader, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.load = load
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False))

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self.load(self, name, tensor)


def ignoring_the_result(load: Callable[[Toy, torch.Tensor], object]) -> Loader:
    def loader(model: Toy, name: str, tensor: torch.Tensor) -> None:
        load(model, tensor)

    return loader


def checkpoint(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def sources_of(tensors: dict[str, torch.Tensor]) -> list[Source]:
    return [Source(name=n, shape=tuple(t.shape), dtype=dtype_name(t.dtype)) for n, t in tensors.items()]


def replay(found: Trace, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Apply the records to clones of the live tensors, the way an updater does."""
    live = {t.name: t for t in live_tensors(model)}
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    result = {name: state[name].detach().clone(memory_format=torch.preserve_format) for name in live}
    flat = [tensors[s.name].contiguous().flatten() for s in found.sources]
    for write in found.writes:
        out = result[write.target]
        out.as_strided(write.size, write.dst_stride, write.dst_offset).copy_(
            flat[write.source].as_strided(write.size, write.src_stride, write.src_offset)
        )
    return result


def check_exact(model: Toy, tensors: dict[str, torch.Tensor], *, covered: bool = True) -> Trace:
    """Trace, prove that nothing moved, then replay and compare with a real load, bit for bit."""
    model.load_weights((name, torch.randn_like(tensor)) for name, tensor in tensors.items())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = trace(model, sources_of(tensors))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"tracing changed {name}"
    assert not found.refused, [str(refusal) for refusal in found.refused]
    replayed = replay(found, tensors, model)
    model.load_weights(tensors.items())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(-1).view(torch.uint8), replayed[name].view(-1).view(torch.uint8)), (
            name
        )
    if covered:
        assert coverage(found, model).faults == ()
    return found


def coverage(found: Trace, model: nn.Module) -> Coverage:
    return find_gaps(found, live_tensors(model), own_load=found)


# --- movements ----------------------------------------------------------------------------------------


def test_fused_qkv_with_a_tensor_parallel_slice_is_one_write_per_source() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        place = {"q": 0, "k": 8, "v": 12}[name]
        rows = tensor.shape[0] // 2
        model.qkv.data.narrow(0, place, rows).copy_(tensor.narrow(0, rows, rows))

    found = check_exact(Toy(load, qkv=(16, 6)), checkpoint(q=(16, 6), k=(8, 6), v=(8, 6)))
    assert [(w.size, w.src_offset, w.dst_offset) for w in found.writes] == [
        ((48,), 48, 0), ((24,), 24, 48), ((24,), 24, 72)
    ]  # fmt: skip


def test_row_parallel_slice_keeps_two_dimensions() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        model.o.data.copy_(tensor.narrow(1, 4, 4))

    (write,) = check_exact(Toy(load, o=(6, 4)), checkpoint(w=(6, 8))).writes
    assert (write.size, write.src_stride, write.dst_stride) == ((6, 4), (8, 1), (4, 1))


@pytest.mark.parametrize(
    ("movement", "pieces"),
    [
        (lambda w: w.t(), 1),
        (lambda w: w.t().contiguous(), 1),
        (lambda w: w.t().contiguous().t().contiguous().t(), 1),
        (lambda w: w.view(2, 3, 2, 12).transpose(1, 2).reshape(12, 12), 1),
        (lambda w: w.view(2, 3, 2, 12)[:, 1].reshape(4, 12).repeat(3, 1), 3),
        (lambda w: w.view(2, 3, 24).permute(1, 0, 2).reshape(-1).view(12, 12), 1),
        (lambda w: w.view(2, 3, 24).permute(1, 0, 2).reshape(12, 12)[2:8].repeat(2, 1), 4),
        (lambda w: w.clone().to(torch.float64).float(), 1),
        (lambda w: torch.cat([w[6:], w[:6]]), 2),
        (lambda w: torch.cat([w[:, ::2], w[:, 1::2]], dim=1), 2),
        (lambda w: torch.stack([w[i] for i in range(12)]), 1),
        (lambda w: w.flip(0), 12),
        (lambda w: w[torch.tensor([3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11])], 4),
        (lambda w: w[:1].expand(12, 12), 1),
        (lambda w: w[0], 1),
        (lambda w: w.chunk(3)[1].reshape(4, 3, 4).transpose(0, 1).reshape(12, 4).repeat(1, 3), 3),
        (lambda w: torch.empty_like(w).copy_(w), 1),
        (lambda w: torch.zeros(12, 12).copy_(w), 1),
        (lambda w: w.index_select(1, torch.arange(11, -1, -1)), 12),
        (lambda w: w.unfold(0, 4, 4).permute(0, 2, 1).reshape(12, 12), 1),
    ],
)
def test_movements_are_followed(movement: Callable[[torch.Tensor], torch.Tensor], pieces: int) -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        model.p.data.copy_(movement(tensor))

    found = check_exact(Toy(load, p=(12, 12)), checkpoint(w=(12, 12)))
    assert len(found.writes) <= pieces, found.writes


def test_interleaved_heads_reshaped_as_in_bloom() -> None:
    heads, dim, hidden = 4, 3, 5

    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        w = tensor.view(heads, 3, dim, hidden).transpose(0, 1).reshape(3 * heads * dim, hidden)
        for index in range(3):  # this rank's second half of the heads
            part = w[index * heads * dim : (index + 1) * heads * dim].narrow(
                0, heads * dim // 2, heads * dim // 2
            )
            model.qkv.data.narrow(0, index * heads * dim // 2, heads * dim // 2).copy_(part)

    found = check_exact(Toy(load, qkv=(18, hidden)), checkpoint(w=(36, hidden)))
    assert len(found.writes) == 3


def test_two_sources_concatenated_before_the_copy() -> None:
    held: dict[str, torch.Tensor] = {}

    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        held[name] = tensor
        if len(held) == 3:
            model.p.data.copy_(torch.cat([held["gate"], held["up"]]))
            model.s.data.copy_(torch.stack([held["a"][0], held["gate"][0, 0], held["up"][0, 0]]))
            held.clear()

    check_exact(Toy(load, p=(8, 4), s=(3,)), checkpoint(gate=(4, 4), up=(4, 4), a=(2,)))


def test_scratch_buffer_and_setitem_and_index_put() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        scratch = tensor.new_zeros(6, 4)
        scratch[1:5] = tensor
        model.p.data[:] = scratch
        model.q.data[torch.tensor([2, 0, 3, 1])] = tensor

    found = check_exact(Toy(load, p=(6, 4), q=(4, 4)), checkpoint(w=(4, 4)), covered=False)
    assert sum(w.size[0] for w in found.writes if w.target == "p") == 16
    assert coverage(found, Toy(load, p=(6, 4), q=(4, 4))).faults == ()  # the padding is a fill


def test_transposed_fused_experts_with_a_slice_per_rank() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:  # [E, H, 2I] -> [E, 2I/2, H]
        gate, up = tensor.transpose(-1, -2).chunk(2, dim=1)
        for expert in range(3):
            model.w13.data[expert, :2].copy_(gate[expert].contiguous()[2:])
            model.w13.data[expert, 2:].copy_(up[expert].contiguous()[2:])

    check_exact(Toy(load, w13=(3, 4, 5)), checkpoint(w=(3, 5, 8)))


def test_casts_between_floats_are_plain() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        model.p.data.copy_(tensor.float().to(torch.bfloat16))

    check_exact(Toy(load, torch.float32, p=(4, 4)), checkpoint(torch.bfloat16, w=(4, 4)))


def test_scalars_empty_tensors_and_unused_sources() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "w":
            model.p.data.copy_(tensor.view(model.p.shape))
        elif name == "e":
            model.e.data.copy_(tensor)

    found = check_exact(Toy(load, p=(1, 1), e=(0, 3)), checkpoint(w=(), e=(0, 3), rope=(7,)))
    assert found.unused == ("e", "rope")


# --- aliases, pads, coverage ----------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.head = self.embed
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("normalizer", torch.tensor(3.0))

    def load_weights(self, weights: Weights) -> None:
        for _, tensor in weights:
            for parameter in (self.embed, self.head):
                parameter.data[:5].copy_(tensor)
                parameter.data[5:].fill_(0)


def test_tied_parameters_are_written_once_and_pads_are_fills() -> None:
    model = Tied()
    found = trace(model, [Source(name="w", shape=(5, 4), dtype="float32")])
    assert [(w.target, w.size) for w in found.writes] == [("embed", (20,))]
    assert [(f.target, f.size, f.dst_offset) for f in found.fills] == [("embed", (4,), 20)]
    assert live_tensors(model)[0].aliases == ("head",)
    result = coverage(found, model)
    assert result.faults == ()
    assert result.derived == ("scale", "normalizer")  # vLLM's own load leaves both alone
    strict = find_gaps(found, live_tensors(model), own_load=None)
    assert [gap.names for gap in strict.gaps] == [("scale",)]  # without a checkpoint nobody vouches for it
    assert strict.derived == ("normalizer",)


def test_every_gap_is_listed_with_its_count() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "a":
            model.p.data[:, :3].copy_(tensor)
            model.p.data[2:].copy_(tensor[:2].expand(2, 3)[:, :1].expand(2, 4))
        elif name == "b":
            model.q.data[1:].copy_(tensor)
        else:
            model.r.data.copy_(tensor)
            model.r.data[:2].zero_()

    model = Toy(load, p=(4, 4), q=(4,), r=(4,))
    found = trace(model, sources_of(checkpoint(a=(4, 3), b=(3,), c=(4,))))
    gaps = {gap.names: gap for gap in coverage(found, model).gaps}
    assert (gaps[("p",)].uncovered, gaps[("p",)].doubled) == (2, 6)
    assert (gaps[("q",)].uncovered, gaps[("q",)].doubled) == (1, 0)
    assert gaps[("r",)].overwritten == 2
    with pytest.raises(MappingError, match="3 fault") as caught:
        coverage(found, model).check("checkpoint")
    assert "p: 2 of 16 elements never written; 6 of 16" in str(caught.value)


def test_a_second_vocabulary_must_write_what_the_own_load_writes() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        getattr(model, name).data.copy_(tensor)

    model = Toy(load, p=(4,), q=(4,), scale=(1,))
    own = trace(model, sources_of(checkpoint(p=(4,), q=(4,))))
    other = trace(model, sources_of(checkpoint(p=(4,))))
    result = find_gaps(other, live_tensors(model), own_load=own)
    assert [gap.names for gap in result.gaps] == [("q",)]
    assert result.derived == ("scale",)


def test_a_transposed_view_of_a_parameter_is_covered_with_it() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        model.p.data.copy_(tensor)

    model = Toy(load, p=(4, 6))
    model.register_buffer("view", model.p.data[1:3].t())
    found = trace(model, sources_of(checkpoint(w=(4, 6))))
    assert coverage(found, model).faults == ()
    assert coverage(found, model).derived == ()


def test_coverage_agrees_with_a_bitmap_on_random_regions() -> None:
    generator = torch.Generator().manual_seed(1)
    source = Source(name="w", shape=(4096,), dtype="float32")
    for _ in range(200):
        counts = torch.zeros(24 * 10, dtype=torch.int64)
        tensor = LiveTensor("p", True, (24, 10), (10, 1), "float32", 0, 0)
        writes = []
        for order in range(int(torch.randint(1, 6, (), generator=generator))):
            n = torch.randint(1, 5, (3,), generator=generator).tolist()
            stride = [int(s) for s in torch.randint(1, 25, (3,), generator=generator)]
            view = counts[:200]
            last = sum((a - 1) * s for a, s in zip(n, stride, strict=True))
            if last >= 200 or torch.arange(240).as_strided(n, stride).unique().numel() != n[0] * n[1] * n[2]:
                continue
            offset = int(torch.randint(0, 240 - last, (), generator=generator))
            counts.as_strided(n, stride, offset).add_(1)
            writes.append(TracedWrite(0, "p", tuple(n), 0, (1, 1, 1), offset, tuple(stride), order))
            del view
        found = Trace((source,), tuple(writes), (), (), ())
        gaps = find_gaps(found, [tensor], own_load=None).gaps
        uncovered, doubled = int((counts == 0).sum()), int((counts > 1).sum())
        if uncovered or doubled:
            assert (gaps[0].uncovered, gaps[0].doubled) == (uncovered, doubled)
        else:
            assert not gaps


def test_ten_thousand_writes_cover_experts_of_real_size() -> None:
    tensors, writes = [], []
    for layer in range(25):
        shape = (128, 2 * 768, 2048)
        tensors.append(LiveTensor(f"w13.{layer}", True, shape, (1536 * 2048, 2048, 1), "bfloat16", layer, 0))
        tensors.append(
            LiveTensor(f"t.{layer}", True, shape, (1536 * 2048, 2048, 1), "bfloat16", 99 + layer, 0)
        )
        for expert in range(128):
            for half in range(2):
                offset = expert * 1536 * 2048 + half * 768 * 2048
                writes.append(TracedWrite(0, f"w13.{layer}", (768 * 2048,), 0, (1,), offset, (1,), 0))
                offset, size = expert * 1536 * 2048 + half * 1024, (1536, 1024)
                writes.append(TracedWrite(0, f"t.{layer}", size, 0, (1024, 1), offset, (2048, 1), 0))
    source = Source(name="w", shape=(768 * 2048,), dtype="bfloat16")
    result = find_gaps(Trace((source,), tuple(writes), (), (), ()), tensors, own_load=None)
    assert len(writes) == 12800
    assert not result.faults


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "op"),
    [
        (lambda m, w: m.p.data.copy_(-torch.exp(w)), "aten.exp"),
        (lambda m, w: m.p.data.copy_(w + 1), "aten.add"),
        (lambda m, w: m.p.data.copy_(w.mul_(2)), "aten.mul_"),
        (lambda m, w: m.p.data.copy_(w.sum(0, keepdim=True)), "aten.sum"),
        (lambda m, w: m.p.data.copy_(torch.cat([w[:2] * 2, w[2:]])), "aten.mul"),
        (lambda m, w: m.p.data.copy_(torch.where(w > 0, w, 0)), "aten.gt"),
        (lambda m, w: m.p.data.copy_(w.to(torch.int8).float()), "aten.copy_"),
        (lambda m, w: m.p.data.copy_(w.half()), "aten.copy_"),
        (lambda m, w: m.p.data.copy_(w.view(torch.int32)), "aten.copy_"),
        (lambda m, w: m.p.data.copy_(w.view(torch.int32).clone()), "aten.clone"),
        (lambda m, w: m.p.data.view(torch.int32).copy_(w), "aten.copy_"),
        (lambda m, w: m.p.data.add_(w), "aten.add_"),
        (lambda m, w: (m.p.data.copy_(w), m.p.data.neg_()), "aten.neg_"),
        (lambda m, w: (m.p.data.copy_(w), m.p.data.copy_(m.p.data.t().clone())), "aten.clone"),
        (lambda m, w: (m.p.data.copy_(w), m.p.data.copy_(m.p.data.t())), "aten.copy_"),
        (lambda m, w: torch.add(w, 1, out=m.p.data), "aten.add"),
        (lambda m, w: m.p.data.fill_(w.max()), "aten.max"),
        (lambda m, w: m.p.data.copy_(torch.zeros(4, 4).add_(w)), "aten.add_"),
        (lambda m, w: m.outside.copy_(w), "aten.copy_"),
    ],
)  # fmt: skip
def test_arithmetic_is_refused_with_names(load: Callable[[Toy, torch.Tensor], object], op: str) -> None:
    model = Toy(ignoring_the_result(load), p=(4, 4))
    model.__dict__["outside"] = torch.ones(4, 4)
    before = model.p.detach().clone()
    found = trace(model, [Source(name="layers.0.w", shape=(4, 4), dtype="float32")])
    assert torch.equal(model.p, before)
    assert torch.equal(model.__dict__["outside"], torch.ones(4, 4))
    (refusal, *_) = found.refused
    assert op in refusal.op
    if "outside" not in refusal.target:
        assert refusal.target == "p"
    if refusal.op not in ("aten.neg_.default", "aten.clone.default") and "live" not in refusal.reason:
        assert refusal.sources == ("layers.0.w",)
    with pytest.raises(MappingError, match="exactly"):
        coverage(found, model).check("checkpoint")


@pytest.mark.parametrize(
    "load",
    [
        lambda m, w: m.p.data.fill_(w.max().item()),
        lambda m, w: m.p.data.copy_(torch.tensor(w.tolist())),
        lambda m, w: m.p.data.copy_(w) if w[0, 0] > 0 else None,
        lambda m, w: m.p.data.copy_(torch.from_numpy(w.numpy())),
        lambda m, w: m.p.data.copy_(w) if torch.equal(w, w) else None,
        lambda m, w: m.p.data.copy_(w[w > 0]),
        lambda m, w: m.p.data.copy_(torch.tensor(torch.zeros(4, 4).copy_(w).tolist())),
    ],
)
def test_reading_values_names_the_source(load: Callable[[Toy, torch.Tensor], object]) -> None:
    model = Toy(ignoring_the_result(load), p=(4, 4))
    before = model.p.detach().clone()
    with pytest.raises(MappingError, match=r"layers\.0\.w"):
        trace(model, [Source(name="layers.0.w", shape=(4, 4), dtype="float32")])
    assert torch.equal(model.p, before)


@pytest.mark.parametrize(
    "load",
    [
        lambda m, w: setattr(m.p, "data", w),
        lambda m, _: setattr(m.p, "data", torch.zeros(4, 4)),
        lambda m, w: setattr(m, "p", nn.Parameter(w[:2], requires_grad=False)),
        lambda m, _: m.register_buffer("late", torch.zeros(3)),
        lambda m, _: m.p.set_(torch.zeros(4, 4)),
        lambda m, _: m.p.data.resize_(8, 8),
        lambda m, _: m.p.t_(),
        lambda m, _: delattr(m, "p"),
    ],
)
def test_replacing_a_parameter_is_refused_and_undone(load: Callable[[Toy, torch.Tensor], object]) -> None:
    model = Toy(ignoring_the_result(load), p=(4, 4))
    parameter, before, address = model.p, model.p.detach().clone(), model.p.data_ptr()
    with pytest.raises(MappingError):
        coverage(trace(model, [Source(name="w", shape=(4, 4), dtype="float32")]), model).check("checkpoint")
    assert model.p is parameter
    assert model.p.data_ptr() == address
    assert torch.equal(model.p, before)
    assert [name for name, _ in model.named_buffers()] == []


def test_a_parameter_that_the_loader_makes_anew_is_followed() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        fresh = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        model.register_parameter("p", fresh)
        model.p.data.copy_(tensor.t())
        model.q = nn.Parameter(tensor, requires_grad=False)
        model.s = nn.Parameter(tensor.exp(), requires_grad=False)

    model = Toy(load, p=(4, 4), q=(4, 4), s=(4, 4))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    found = trace(model, [Source(name="w", shape=(4, 4), dtype="float32")])
    for name, (parameter, values) in before.items():
        assert getattr(model, name) is parameter
        assert torch.equal(parameter, values)
    assert {(w.target, w.src_stride) for w in found.writes} == {("p", (1, 4)), ("q", (1,))}
    assert [(r.target, r.op) for r in found.refused] == [("s", "aten.exp.default")]


def test_the_sources_may_be_prepared_before_they_are_loaded() -> None:
    def prepare(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        (fused,) = (tensor for _, tensor in weights)
        for index, expert in enumerate(fused.chunk(2)):
            yield f"p{index}", expert.squeeze(0).contiguous()

    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        getattr(model, name).data.copy_(tensor)

    found = trace(
        Toy(load, p0=(3, 4), p1=(3, 4)),
        [Source(name="fused", shape=(2, 3, 4), dtype="float32")],
        prepare=prepare,
    )
    assert [(w.source, w.target, w.src_offset, w.size) for w in found.writes] == [
        (0, "p0", 0, (12,)), (0, "p1", 12, (12,))
    ]  # fmt: skip


def test_a_failing_loader_becomes_a_mapping_error_with_the_source() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        raise ValueError("There is no module or parameter named 'x'")

    with pytest.raises(MappingError, match=r"at source 'w'.*no module or parameter named 'x'"):
        trace(Toy(load, p=(4,)), [Source(name="w", shape=(4,), dtype="float32")])


def test_an_error_that_the_loader_swallows_still_ends_the_trace() -> None:
    def load(model: Toy, name: str, tensor: torch.Tensor) -> None:
        try:
            tensor.max().item()
        except Exception:  # noqa: BLE001 - what the test is about
            model.p.data.copy_(tensor)

    with pytest.raises(MappingError, match="reads values of w"):
        trace(Toy(load, p=(4,)), [Source(name="w", shape=(4,), dtype="float32")])


def test_duplicate_source_names_are_refused() -> None:
    twice = [Source(name="w", shape=(4,), dtype="float32")] * 2
    with pytest.raises(MappingError, match="w"):
        trace(Toy(lambda *_: None, p=(4,)), twice)


# --- the address algebra -----------------------------------------------------------------------------------


def test_layouts_agree_with_tables_on_random_chains_of_movements() -> None:
    generator = torch.Generator().manual_seed(2)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    affine_chains = 0
    for _ in range(500):
        layout, numel = affine.Layout.identity(100, 48), 48
        view = torch.empty(4, 3, 2, 2)
        for _ in range(4):
            kind = pick(4)
            if kind == 0:
                a, b = pick(view.ndim), pick(view.ndim)
                view = view.transpose(a, b)
            elif kind == 1 and max(view.shape) > 1:
                dim = view.shape.index(max(view.shape))
                length = 1 + pick(view.shape[dim])
                view = view.narrow(dim, pick(view.shape[dim] - length + 1), length)
            elif kind == 2:
                copy = view.contiguous() if not view.is_contiguous() else view.clone()
                found = layout.copied(view, copy)
                if found is None:
                    break
                expected = layout.table().as_strided(view.shape, view.stride(), view.storage_offset())
                assert torch.equal(found.table().as_strided(copy.shape, copy.stride()), expected)
                layout, view, numel = found, copy, copy.numel()
            elif view.is_contiguous() and view.numel() % 2 == 0:
                view = view.view(2, view.numel() // 2)
        addresses = layout.table().as_strided(view.shape, view.stride(), view.storage_offset())
        dst = torch.empty(view.shape)
        exact = layout.pieces(view, dst)
        for pieces in filter(None, (exact, affine.table_pieces(addresses, dst))):
            out = torch.full((dst.numel(),), -1, dtype=torch.int64)
            for piece in map(affine.coalesce, pieces):
                source = torch.arange(1000).as_strided(piece.size, piece.src_stride, piece.address)
                out.as_strided(piece.size, piece.dst_stride, piece.offset).copy_(source)
            assert torch.equal(out.view(dst.shape), addresses)
        affine_chains += exact is not None
        assert numel
    assert affine_chains > 400
