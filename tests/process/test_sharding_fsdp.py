"""Real ranks over Gloo: what the plan copies from all ranks' tensors is the whole ones, bit for bit."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from bridge.catalogue import Catalogue
from bridge.config import BridgeConfig
from bridge.declared import DeclaredLayout
from bridge.environment import Ranks
from bridge.errors import MappingError, PeerLost, RoundAborted, TransferError
from bridge.fallback import gather_full
from bridge.fleet import Fleet
from bridge.guard import Guarded, StepGuard
from bridge.job import Job
from bridge.joining import any_rank, highest
from bridge.names import canonical_names
from bridge.param_mappings import export_param_mappings, load_param_mappings
from bridge.parts import Round, collect_single
from bridge.rounds import Session
from bridge.sharding import LocalShards, collect
from tests.support.mappings import identity_mapping, interleaved, shapes_of
from tests.support.ranks import put_together, run_ranks


class Mlp(nn.Module):
    """Sizes that 2 and 4 do not divide."""

    def __init__(self, hidden: int = 7, inner: int = 5, vocab: int = 11, *, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.lm_head(hidden + self.down(torch.relu(self.up(hidden)))) * self.scale


def seeded(**arguments: object) -> Mlp:
    torch.manual_seed(3)
    return Mlp(**arguments)  # type: ignore[arg-type]


def check_whole(
    model: nn.Module,
    reference: nn.Module,
    *,
    skip: tuple[str, ...] = (),
    layout: DeclaredLayout | None = None,
) -> LocalShards:
    """What all ranks' tensors become against the unsharded model and against what torch itself gathers."""
    expected = {n: t.detach() for n, t in canonical_names(reference).items() if n not in skip}
    mapping = identity_mapping(("checkpoint", shapes_of(expected)))
    shards = collect(model, mapping, rank=dist.get_rank(), layout=layout)
    plan, whole = put_together(shards, mapping)
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
    for name, tensor in canonical_names(model).items():
        if isinstance(tensor, DTensor) and name in whole:
            head_dim = layout.head_dim if layout is not None and name in layout.needs_permute else 0
            assert torch.equal(tensor.full_tensor(), interleaved(whole[name], head_dim or 0)), name
    assert plan.total_bytes == sum(t.numel() * t.element_size() for t in expected.values())
    return shards


# --- scenarios, run by every rank -----------------------------------------------------------------------


def fsdp_uneven(path: Path) -> None:
    model = seeded()
    fully_shard(model.up)
    fully_shard(model)
    shards = check_whole(model, seeded())
    if dist.get_rank() == dist.get_world_size() - 1 == 3:
        # 5 rows over 4 ranks are 2, 2, 1 and none: this rank holds nothing of "up".
        up = list(canonical_names(seeded())).index("up.weight")
        assert up not in {shard.source for shard in shards.layout.shards}
    assert all(shards.contiguous)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = shards.fingerprint()
    model(torch.arange(4)[None]).sum().backward()
    optimizer.step()
    after = check_whole(model, _unsharded(model))
    assert after.fingerprint() == before, "a step changes values, not addresses"


def _unsharded(model: nn.Module) -> nn.Module:
    reference = seeded()
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    reference.load_state_dict(full)
    return reference


def fsdp_mixed_precision(path: Path) -> None:
    model = seeded()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.up, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    shards = check_whole(model, seeded())
    # The root stays unsharded after a forward, as bfloat16 tensors; the float32 masters are what counts.
    with torch.no_grad():
        model(torch.arange(4)[None])
    assert not isinstance(model.embed.weight, DTensor)
    again = check_whole(model, seeded())
    assert {s.dtype for s in again.layout.shards} == {"float32"}
    assert again.fingerprint() == shards.fingerprint()


def unsharded_by_name(path: Path) -> None:
    """FSDP2's gathered copies, which a step leaves as they were, are told from parameters by name."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    kept = {"embed.weight", "lm_head.weight", "down.weight"}  # the root's, unsharded after evaluation

    def evaluated() -> nn.Module:
        model = seeded()
        fully_shard(model.up)
        fully_shard(model, ignored_params={model.up.bias})
        with torch.no_grad():
            model(torch.arange(4)[None])
        return model

    def kept_unsharded() -> nn.Module:
        model = seeded()
        fully_shard(model)
        model.set_reshard_after_backward(False)
        model(torch.arange(4)[None]).sum().backward()
        return model

    def over_tensor_parallel() -> nn.Module:
        """There the copies are DTensors too."""
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = seeded(hidden=8, inner=12)
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        with torch.no_grad():
            model(torch.arange(4)[None])
        return model

    def cut_after_forward() -> nn.Module:
        """Into fewer parts than ranks."""
        model = seeded(hidden=8, inner=12)
        fully_shard(model.up, reshard_after_forward=2)
        fully_shard(model)
        with torch.no_grad():
            model(torch.arange(4)[None])
        return model

    both = {"up.weight", "up.bias"}
    for make, gathered in (
        (evaluated, kept), (kept_unsharded, kept | both), (over_tensor_parallel, kept | both),
        (cut_after_forward, kept | both),
    ):  # fmt: skip
        model = make()
        named = {**dict(model.named_parameters()), "scale": model.scale}
        mapping = identity_mapping(("checkpoint", shapes_of(named)))
        views = {name: tensor.data for name, tensor in named.items()}
        made = Round(rank=rank, world_size=world_size)
        for name, tensor in named.items():
            made.update_weight(name, tensor)
        sends: list[Callable[[], object]] = [
            lambda named=named, mapping=mapping: collect(named, mapping, rank=rank),
            lambda views=views, mapping=mapping: collect(views, mapping, rank=rank),
            lambda made=made, mapping=mapping: made.collect(mapping),
        ]
        for send in sends:
            with pytest.raises(MappingError, match=r"copy that FSDP2 has gathered.*reshard") as caught:
                send()
            lines = str(caught.value).splitlines()[1:-1]
            assert {line.split(":")[0].strip() for line in lines} == gathered, make
        with pytest.raises(MappingError, match=r"embed\.weight: .*FSDP2 has gathered"):
            collect_single("embed.weight", named["embed.weight"], mapping, rank=rank)
        with pytest.raises(MappingError, match=r"embed\.weight: .*FSDP2 has gathered"):
            gather_full(named, keep=rank == 0, mapping=mapping)
        for state in (model.state_dict(), canonical_names(model)):  # both reshard
            shapes = shapes_of(state)
            collect(state, identity_mapping(("checkpoint", shapes)), rank=rank)
    del torch.distributed._composable_state._module_state_mapping  # as another torch might
    with pytest.raises(MappingError, match=r"torch 2.* does not say which .*pass the module itself"):
        collect(model.state_dict(), mapping, rank=rank)


def fsdp_offloaded(path: Path) -> None:
    """float32 shards that live in host memory between steps, computed with in bfloat16."""
    model = seeded()
    policy = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),  # without a GPU nothing can be pinned
    }
    fully_shard(model.up, **policy)
    fully_shard(model, **policy)
    before = check_whole(model, seeded())
    with torch.no_grad():
        model(torch.arange(4)[None])
    after = check_whole(model, seeded())
    assert {s.dtype for s in after.layout.shards} == {"float32"}
    assert after.fingerprint() == before.fingerprint()
    assert all(t.device.type == "cpu" for t in after.tensors)


def fsdp_in_metas_order(path: Path) -> None:
    """12 rows in heads of 4, of which 5 ranks hold 3 at most: every cut but one is within a head."""
    sizes = {"hidden": 8, "inner": 12}
    model, layout = seeded(**sizes), DeclaredLayout(needs_permute=["up.weight", "up.bias"], head_dim=4)
    with torch.no_grad():
        for parameter in model.up.parameters():
            parameter.copy_(interleaved(parameter.clone(), 4))
    fully_shard(model.up)
    fully_shard(model)
    shards = check_whole(model, seeded(**sizes), layout=layout)
    assert all(shards.contiguous)


def fsdp_tied(path: Path) -> None:
    model = seeded(tie=True)
    fully_shard(model)
    shards = check_whole(model, seeded(tie=True), skip=("lm_head.weight",))
    assert len(check_whole(model, seeded(tie=True)).tensors) == len(shards.tensors) + 1


def fsdp_dim1(path: Path) -> None:
    sizes = {"hidden": 8, "inner": 12, "vocab": 10}  # FSDP2 wants other dimensions than 0 to be divisible
    model = seeded(**sizes)
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    shards = check_whole(model, seeded(**sizes))
    assert {shard.offset for shard in shards.layout.shards} > {(0, 4 * dist.get_rank())}


def packed(path: Path) -> None:
    """Several tensors in one, each cut: transformers' packed_colwise and packed_rowwise, of fused experts."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(0)
    named, expected, pieces = {}, {}, 0
    for name, shape, dim in (("experts", (3, 8, 5), 1), ("rows", (12, 2), 0), ("columns", (3, 8), 1)):
        whole = expected[name] = torch.randn(shape, generator=generator)
        placement = _StridedShard(dim, split_factor=2)
        local = placement._split_tensor(whole, world_size, with_padding=False, contiguous=True)[0][rank]
        named[name] = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        pieces += 2 * math.prod(shape[:dim])
    mapping = identity_mapping(("checkpoint", shapes_of(expected)), dtype="float32")
    shards = collect(named, mapping, rank=rank)
    assert len(shards.tensors) == pieces
    assert all(shards.contiguous)
    assert not shards.lasting
    memory = [tensor.to_local() for tensor in named.values()]
    for tensor in shards.tensors:
        assert any(tensor.untyped_storage().data_ptr() == m.untyped_storage().data_ptr() for m in memory)
    plan, found = put_together(shards, mapping)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert plan.total_bytes == sum(t.nbytes for t in expected.values())


def hsdp(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = seeded()
    fully_shard(model, mesh=mesh)
    shards = check_whole(model, seeded())
    assert any(any(shard.offset) for shard in shards.layout.shards) == bool(mesh.get_local_rank("shard"))


def tensor_parallel(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = seeded()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    shards = check_whole(model, seeded())
    assert not all(t.numel() == 0 for t in shards.tensors)
    place = export_param_mappings(model, "tests/tiny", tp_degree=2, path=path / "layout.json")
    dist.barrier()
    rows = load_param_mappings(place).param_mappings
    assert (rows["up.weight"].tp_shard_dim, rows["down.weight"].tp_shard_dim) == (0, 1)
    assert rows["up.weight"].shape == (5, 7)
    assert rows["up.weight"].local_shape == (3, 7)
    assert rows["embed.weight"].tp_shard_dim is None


def fsdp_and_tensor_parallel(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = seeded(hidden=8, inner=12)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    assert "StridedShard" in str(model.up.weight.placements)
    check_whole(model, seeded(hidden=8, inner=12))


def declared(path: Path) -> None:
    """As Megatron cuts it, a tied vocabulary too; and dp_shard cuts rows of what that left."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = {"hidden": 8, "inner": 12, "vocab": 10}
    dims = {"embed.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1, "lm_head.weight": 0}
    tp_degree, dp_degree = 2, world_size // 2
    reference, model = seeded(tie=True, **sizes), seeded(tie=True, **sizes)
    with torch.no_grad():
        for parameter in model.up.parameters():
            parameter.copy_(interleaved(parameter.clone(), 4))
        for name, parameter in model.named_parameters():  # the tied one once
            part = parameter.chunk(tp_degree, dims[name])[rank % tp_degree] if name in dims else parameter
            parts = part.chunk(dp_degree)
            dp_rank = rank // tp_degree
            mine = parts[dp_rank] if dp_rank < len(parts) else part[:0]
            parameter.data = mine.clone(memory_format=torch.contiguous_format)
    place = export_param_mappings(
        model, "tests/tiny", tp_degree, dp_degree, path=path / "layout.json",
        tp_shard_dim=dims, needs_permute=["up.weight", "up.bias"], head_dim=4,
    )  # fmt: skip
    dist.barrier()
    layout = load_param_mappings(place).declared()
    layout.check_world(world_size)
    shards = check_whole(model, reference, skip=("lm_head.weight",), layout=layout)
    check_whole(model, reference, layout=layout)
    held = sum(tensor.numel() for tensor in shards.tensors)
    whole = sum(tensor.numel() for tensor in canonical_names(reference).values())
    assert held <= whole / world_size + 20, "each rank shows its own part"


def mesh_2d(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(1)
    whole = torch.randn(5, 3)
    for placements in (
        (Shard(0), Shard(1)), (Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Shard(0)),
    ):  # fmt: skip
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(whole, mesh, placements))
        reference = nn.Module()
        reference.weight = nn.Parameter(whole)
        check_whole(model, reference)


def any_order(path: Path) -> None:
    """Meshes whose ranks do not ascend: torch's groups sort them, so coordinates are not shards' numbers."""
    for order in ([0, 1, 3, 2], [3, 2, 1, 0], [2, 0, 3, 1]):
        model = seeded()
        fully_shard(model, mesh=DeviceMesh("cpu", order))
        check_whole(model, seeded())
    sizes = {"hidden": 8, "inner": 12, "vocab": 16}  # torch itself errs there where a dimension is uneven
    for grid in ([[1, 0], [3, 2]], [[2, 0], [3, 1]], [[3, 2], [1, 0]]):
        mesh = DeviceMesh("cpu", grid, mesh_dim_names=("a", "b"))
        model = seeded(**sizes)
        fully_shard(model, mesh=mesh)  # HSDP
        check_whole(model, seeded(**sizes))
        model = seeded(**sizes)
        parallelize_module(model, mesh["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["a"])
        check_whole(model, seeded(**sizes))
        for placements in ((Shard(0), Shard(1)), (Shard(1), Replicate()), (Replicate(), Shard(0))):
            model = nn.Module()
            model.weight = nn.Parameter(distribute_tensor(seeded(**sizes).up.weight, mesh, placements))
            reference = nn.Module()
            reference.weight = seeded(**sizes).up.weight
            check_whole(model, reference)


def no_one_order(path: Path) -> None:
    """A mesh in which torch's own ways of cutting differ: what one rank calls its part is another's."""
    mesh = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("a", "b"))
    model = seeded(hidden=8, inner=12)
    fully_shard(model, mesh=mesh)  # HSDP cuts along one dimension
    check_whole(model, seeded(hidden=8, inner=12))
    whole = torch.arange(64.0).reshape(8, 8)
    tensor = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    right = [torch.equal(tensor.full_tensor(), whole)]
    gathered: list[list[bool]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, right)
    assert gathered == [[True], [True], [False], [False]], "else torch has mended it"
    mapping = identity_mapping(("checkpoint", {"a": (8, 8)}))
    with pytest.raises(
        MappingError, match=r"a: is cut along several .*\[\[0, 3\], \[1, 2\]\].*ascending ranks"
    ):
        collect({"a": tensor}, mapping, rank=dist.get_rank())


def cut_twice_in_strides(path: Path) -> None:
    """FSDP2 over packed_colwise: torch cannot tell its own shards' order, which full_tensor() shows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.arange(96.0).reshape(16, 6)
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [_StridedShard(0, split_factor=2)]))
    fully_shard(model, mesh=mesh["dp"])
    assert not torch.equal(model.weight.full_tensor(), whole)
    with pytest.raises(MappingError, match=r"weight: .* cuts dimension 0 twice in strides.*cut another one"):
        collect(model, identity_mapping(("checkpoint", {"weight": (16, 6)})), rank=dist.get_rank())


def refusals(path: Path) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mapping = identity_mapping(("checkpoint", {"a": (4, 4), "b": (2,)}))
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    lying = DTensor.from_local(torch.ones(1), mesh, [Shard(0)], run_check=False, shape=(2,), stride=(1,))
    lying._local_tensor = torch.ones(2)
    with pytest.raises(MappingError, match=r"^2 fault\(s\)") as caught:
        collect({"a": partial, "b": lying}, mapping, rank=rank)
    assert "a: is placed as" in str(caught.value)
    assert "b: holds a local shard of shape (2,), but its placements give (1,)" in str(caught.value)
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(seeded(), device_id=torch.device("cpu"))
    with pytest.raises(MappingError, match=r"^1 fault\(s\)[^\n]*'tests/tiny'.*\n.*FSDP1.*fully_shard"):
        collect(wrapped, mapping, rank=rank)


def data_parallel(path: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    check_whole(DistributedDataParallel(seeded()), seeded())
    tied = DistributedDataParallel(seeded(tie=True))
    shards = check_whole(tied, seeded(tie=True), skip=("lm_head.weight",))
    assert len(check_whole(tied, seeded(tie=True)).tensors) == len(shards.tensors) + 1


def wrapped(path: Path) -> None:
    """Every wrapper that renames, one in the other, outside and inside of what shards."""
    from torch.nn.parallel import DistributedDataParallel

    def inner() -> Mlp:
        model = seeded()
        model.up = torch.compile(checkpoint_wrapper(model.up))
        return model

    check_whole(torch.compile(DistributedDataParallel(checkpoint_wrapper(inner()))), seeded())
    check_whole(DistributedDataParallel(torch.compile(inner())), seeded())
    model = inner()
    fully_shard(model.up)
    check_whole(torch.compile(checkpoint_wrapper(fully_shard(model))), seeded())
    state = DistributedDataParallel(torch.compile(checkpoint_wrapper(inner()))).state_dict()
    assert next(iter(state)).startswith("module._orig_mod.")
    shapes = shapes_of(canonical_names(seeded()))
    shards = collect(state, identity_mapping(("checkpoint", shapes)), rank=dist.get_rank())
    assert len(shards.tensors) == len(shapes)


def single(path: Path) -> None:
    model = seeded()
    fully_shard(model)
    mapping = identity_mapping(("checkpoint", shapes_of(canonical_names(seeded()))))
    shards = collect_single("up.weight", model.up.weight, mapping, rank=dist.get_rank())
    first = 3 * dist.get_rank()
    assert torch.equal(shards.tensors[0], seeded().up.weight[first : first + 3])
    assert shards.layout.shards[0].offset == (first, 0)


def handed_over(path: Path) -> None:
    """``full_tensor()`` of one parameter after the other, or DTensors as they are: the same whole tensors."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = seeded()
    fully_shard(model)
    expected = {name: tensor.detach() for name, tensor in canonical_names(seeded()).items()}
    mapping = identity_mapping(("checkpoint", shapes_of(expected)))
    gathers: list[Callable[[torch.Tensor], torch.Tensor]] = [DTensor.full_tensor, lambda tensor: tensor]
    rounds = [Round(rank=rank, world_size=world_size) for _ in gathers]
    for made, gather in zip(rounds, gathers, strict=True):
        for name, tensor in canonical_names(model).items():
            made.update_weight(name, gather(tensor) if isinstance(tensor, DTensor) else tensor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for made in rounds:
        plan, whole = put_together(made.collect(mapping), mapping)
        for name, tensor in expected.items():
            assert torch.equal(whole[name], tensor), name
        assert plan.total_bytes == sum(t.nbytes for t in expected.values())


def one_knows_that_the_epoch_is_over(path: Path) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank=rank, world_size=world_size)
    assert any_rank(rank == 1, ranks, timeout_s=20)
    assert not any_rank(False, ranks, timeout_s=20)
    assert highest([rank, 7 - rank, 1 << 40], ranks, timeout_s=20) == [world_size - 1, 7, 1 << 40]


def one_is_gone(path: Path) -> None:
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    assert not any_rank(False, ranks, timeout_s=20)
    if ranks.rank == 0:
        began = time.monotonic()
        with pytest.raises(PeerLost, match=r"the 2 trainer ranks could not agree .* rank\(s\) \[1\] did not"):
            any_rank(False, ranks, timeout_s=20)
        assert time.monotonic() - began < 10, "one that is gone need not be waited for"
    os._exit(0)  # there is nobody to end in order with


def meeting_anew(path: Path) -> None:
    """One server, several ranks: whoever knows that the epoch is over takes the others along."""
    rank = dist.get_rank()
    opened: list[SimpleNamespace] = []

    def meet(*_: object, **__: object) -> SimpleNamespace:
        dist.barrier()  # as any real meeting: nobody can be here alone
        opened.append(SimpleNamespace(closed="", device=None, version=3, close=lambda: None))
        return opened[-1]

    Session.open = meet  # type: ignore[method-assign, assignment]
    fleet = Fleet(BridgeConfig(logdir="a"), lambda: Ranks(rank=rank, world_size=dist.get_world_size()))
    for round_, knows in enumerate([None, 1, None, 0, None]):
        if knows == rank:
            opened[-1].closed = "the daemon is gone"
        (server,) = fleet.ready(None)
        assert server.session is opened[-1], round_
    assert len(opened) == 3
    if rank == 1:  # an earlier round's error came to it alone
        fleet.refuse("no")
    else:
        with pytest.raises(RoundAborted, match="another trainer rank cannot take part"):
            fleet.ready(None)
    fleet.ready(None)
    assert len(opened) == 3


def guarded_step(path: Path) -> None:
    model = seeded()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    stepped = threading.Event()
    with torch.no_grad():
        model(torch.arange(4)[None])  # leaves the root unsharded: other objects, and other memory
    shards = collect(
        model, identity_mapping(("checkpoint", shapes_of(canonical_names(seeded())))), rank=dist.get_rank()
    )
    job = Job(None, version=1, call=1, encoding="dense")
    guard = StepGuard(Guarded(shards.tensors), job)
    model(torch.arange(4)[None]).sum().backward()
    other.step()
    before = [t.clone() for t in shards.tensors]

    def step() -> None:
        optimizer.step()
        stepped.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not stepped.wait(0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, shards.tensors, strict=True))
    job.released.set()
    thread.join(5)
    assert stepped.is_set()
    assert not guard.active
    assert any(not torch.equal(a, b) for a, b in zip(before, shards.tensors, strict=True))


def written_in_place(path: Path) -> None:
    """A DTensor has a count, and its part one of its own; training until the step counts nothing."""
    model = seeded()
    fully_shard(model.up)
    fully_shard(model)
    mapping = identity_mapping(("checkpoint", shapes_of(canonical_names(seeded()))))

    def find() -> LocalShards:
        fresh = collect(model, mapping, rank=dist.get_rank())
        again = Catalogue(model, mapping, fresh, Guarded([])).find(model, mapping)
        assert again is not None
        return again

    for shards in (collect(model, mapping, rank=dist.get_rank()), find()):
        model(torch.arange(4)[None]).sum().backward()
        with torch.no_grad():
            model(torch.arange(4)[None])
        canonical_names(model)  # reshards
        shards.check_unwritten(mapping, "all is well")
    for write in (lambda p: p.mul_(0.5), lambda p: p.to_local().mul_(0.5)):
        for shards in (collect(model, mapping, rank=dist.get_rank()), find()):
            with torch.no_grad():
                write(model.embed.weight)
            with pytest.raises(TransferError, match=r"\(embed\.weight\)"):
                shards.check_unwritten(mapping, "it was given up")


# --- running them -------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("scenario", "world_size"),
    [
        (fsdp_uneven, 2), (fsdp_uneven, 3), (fsdp_uneven, 4), (fsdp_mixed_precision, 2), (fsdp_offloaded, 2),
        (unsharded_by_name, 4),
        (fsdp_tied, 2), (fsdp_dim1, 2), (packed, 2), (fsdp_in_metas_order, 5),
        (declared, 2), (declared, 4), (wrapped, 2),
        (hsdp, 4), (tensor_parallel, 2), (fsdp_and_tensor_parallel, 4), (mesh_2d, 4), (any_order, 4),
        (no_one_order, 4), (cut_twice_in_strides, 4), (refusals, 2),
        (data_parallel, 2), (single, 2), (guarded_step, 2), (written_in_place, 2),
        (handed_over, 2), (handed_over, 3),
        (one_knows_that_the_epoch_is_over, 2), (one_knows_that_the_epoch_is_over, 4),
        (meeting_anew, 2), (one_is_gone, 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)  # fmt: skip
def test_ranks(scenario: Callable[[Path], None], world_size: int, tmp_path: Path) -> None:
    run_ranks(scenario, world_size, tmp_path)
