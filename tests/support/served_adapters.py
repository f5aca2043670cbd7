"""A small model, the mapping of a server that takes adapters of it, and what a round brings to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bridge.protocol.mapping import Mapping
from bridge.protocol.plan import Layout, build_plan
from tests.support.mappings import identity_mapping, run_copies

MAX_RANK = 8
MODULES = {"up": (12, 8), "down": (8, 12)}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.relu(self.up(self.embed(tokens)))))


def served(*names: str, dtype: str = "float32") -> Mapping:
    """A server that takes adapters of ``up`` and ``down`` by these names; ``lm_head`` it knows, and drops."""
    model = {name: tuple(tensor.shape) for name, tensor in Base().state_dict().items()}
    matrices: dict[str, tuple[int, ...]] = {}
    for module, (outputs, inputs) in (MODULES | {"lm_head": (11, 8)}).items():
        matrices[f"{module}.lora_A.weight"] = (MAX_RANK, inputs)
        matrices[f"{module}.lora_B.weight"] = (outputs, MAX_RANK)
    matrices["sent"] = (1,)
    unused = [name for name in matrices if name.startswith("lm_head.")]
    vocabularies = [(f"adapter:{name}", matrices) for name in names]
    return identity_mapping(("checkpoint", model), *vocabularies, dtype=dtype, unused=unused)


def brought(
    held: Sequence[tuple[Layout, Sequence[torch.Tensor]]],
    mapping: Mapping,
    name: str = "policy",
) -> dict[str, torch.Tensor]:
    """What a round brings to the adapter's sources; ``MISSING`` where nothing comes."""
    layouts = [layout for layout, _ in held]
    only = frozenset().union(*(layout.named for layout in layouts))
    plan = build_plan(mapping, layouts, bucket_bytes=64, only=only)
    (flat,) = run_copies(plan, mapping, {layout.rank: tensors for layout, tensors in held})
    targets = mapping.ranks[0].targets
    return {
        source.name: flat[write.target].view(targets[write.target].shape)
        for write in mapping.ranks[0].writes[f"adapter:{name}"]
        for source in [mapping.adapters[name].sources[write.source]]
    }
