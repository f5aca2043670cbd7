"""A layout as its user declares it: plain tensors do not say which part of a parameter they are."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from bridge.errors import ConfigError, TopologyError


class DeclaredLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How ``tp_degree`` x ``dp_shard_degree`` trainer ranks hold the weights. Equal on all ranks.

    Tensor-parallel ranks are neighbours, then come those of ``dp_shard``, then replicas of both:
    ``rank = (replica * dp_shard_degree + dp_rank) * tp_degree + tp_rank``.

    Both degrees cut as ``torch.chunk`` does: parts of ceil(n / degree), the last ones short or empty. Along
    dimension 0, ``dp_shard`` cuts what tensor parallelism left; a tensor that is all of that is taken as a
    replica, as FSDP keeps buffers. DTensors and ZeRO-3's parameters say themselves what they are: for them
    the degrees and ``tp_shard_dim`` are not asked, and ``needs_permute`` holds as for any other.

    Raises:
        ConfigError: a degree, dimension or head size that no layout can have; lists every fault.
    """

    tp_degree: int = 1
    dp_shard_degree: int = 1
    # By parameter name, the dimension (from 0) that tensor parallelism cuts. Those that are not named are
    # whole on every tensor-parallel rank.
    tp_shard_dim: Mapping[str, int] = {}
    # Names of weights (or biases) whose rows the trainer holds in Meta's rotary order: of each head of
    # ``head_dim`` rows, its row 2j + p is row p * head_dim / 2 + j of the server's, which is the order of
    # transformers ("rotate half").
    needs_permute: Collection[str] = frozenset()
    # Rows of a head: even, and the whole head is rotated.
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if faults := find_faults(**msgspec.structs.asdict(self)):
            listing = "\n  ".join(faults)
            raise ConfigError(
                f"no trainer can have the declared layout, {len(faults)} fault(s):\n  {listing}"
            )
        # What the caller goes on to change must not change what was checked.
        msgspec.structs.force_setattr(self, "tp_shard_dim", dict(self.tp_shard_dim))
        msgspec.structs.force_setattr(self, "needs_permute", frozenset(self.needs_permute))

    def check_world(self, world_size: int) -> None:
        """Whether that many trainer ranks can hold it.

        Raises:
            TopologyError: the degrees do not divide ``world_size``.
        """
        if world_size % (self.tp_degree * self.dp_shard_degree):
            raise TopologyError(
                f"tp_degree {self.tp_degree} x dp_shard_degree {self.dp_shard_degree} of the declared layout "
                f"do not divide the {world_size} trainer rank(s); the rest must be replicas"
            )

    def strangers(self, names: Iterable[str]) -> list[str]:
        """A sentence for each declared name that is not among the model's ``names``."""
        known = set(names)
        return [
            f"{name}: declared in the layout, but the model has no such parameter "
            f"(it has {', '.join(difflib.get_close_matches(name, known)) or 'nothing alike'})"
            for name in sorted({*self.tp_shard_dim, *self.needs_permute} - known)
        ]

    def misnamed(self, names: Iterable[str]) -> list[str]:
        """A sentence for each of ``names``, without wrappers, that is declared with a prefix."""
        declared = {*self.tp_shard_dim, *self.needs_permute}
        return [
            f"{name}: the layout declares it as {other}; declare it without the prefix"
            for name in names
            for other in sorted(declared)
            if name not in declared and other.endswith(f".{name}")
        ]

    def box(
        self, name: str, shape: Sequence[int], local: Sequence[int], *, rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        """Which part of a tensor a rank's plain one is.

        Args:
            name: the parameter's.
            shape: the whole tensor's, as the server knows it.
            local: the shape of what ``rank`` holds.

        Returns:
            Offset and shape in the whole tensor, or why ``local`` is not what was declared.
        """
        dim, cuts = self.tp_shard_dim.get(name), []
        if dim is not None and dim >= len(shape):
            return f"tp_shard_dim is {dim}, but the server's has shape {tuple(shape)}"
        tp_rank, dp_rank = rank % self.tp_degree, rank // self.tp_degree % self.dp_shard_degree
        offset, extent = [0] * len(shape), list(shape)
        if dim is not None:
            offset[dim], extent[dim] = _chunk(shape[dim], self.tp_degree, tp_rank)
            cuts.append(f"dimension {dim} over tp (rank {tp_rank} of {self.tp_degree})")
        if extent != list(local) and shape and self.dp_shard_degree > 1:
            start, extent[0] = _chunk(extent[0], self.dp_shard_degree, dp_rank)
            offset[0] += start
            cuts.append(f"dimension 0 over dp_shard (rank {dp_rank} of {self.dp_shard_degree})")
        if extent == list(local):
            return tuple(offset), tuple(extent)
        fault = f"the model's has shape {tuple(local)}, the server's {tuple(shape)}"
        if cuts:
            return f"{fault}, of which rank {rank} holds {tuple(extent)}: cut along {', then '.join(cuts)}"
        return f"{fault}, and the declared layout does not cut it" if self.tp_degree > 1 else fault

    def permuted(self, name: str, shape: Sequence[int]) -> int | str:
        """Rows of a head if the trainer's are in Meta's rotary order, else 0; a string is a fault."""
        if name not in self.needs_permute:
            return 0
        assert self.head_dim is not None, "checked when the layout was made"
        if len(shape) not in (1, 2):
            return f"needs_permute is for weights of one or two dimensions, and this has shape {tuple(shape)}"
        if shape[0] % self.head_dim:
            return f"needs_permute: its {shape[0]} rows are no whole heads of head_dim {self.head_dim}"
        return self.head_dim


def find_faults(
    *,
    tp_degree: int,
    dp_shard_degree: int,
    tp_shard_dim: Mapping[str, int],
    needs_permute: Collection[str],
    head_dim: int | None,
) -> list[str]:
    """What no ``DeclaredLayout`` can have, each as a sentence."""
    faults = [
        f"{what} is {degree!r}, it must be an integer of at least 1"
        for what, degree in (("tp_degree", tp_degree), ("dp_shard_degree", dp_shard_degree))
        if not _is_integer(degree) or degree < 1
    ]
    faults += [
        f"{name}: tp_shard_dim is {dim!r}, it must be a dimension, counted from 0"
        for name, dim in tp_shard_dim.items()
        if not _is_integer(dim) or dim < 0
    ]
    if isinstance(needs_permute, str):
        faults.append(f"needs_permute is {needs_permute!r}, it must be a collection of parameter names")
    elif needs_permute and head_dim is None:
        faults.append(f"head_dim is not given, and {len(needs_permute)} parameter(s) need a permutation")
    if head_dim is not None and (not _is_integer(head_dim) or head_dim < 2 or head_dim % 2):
        faults.append(f"head_dim is {head_dim!r}, it must be an even integer: heads have two halves")
    return faults


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of one part, by ``torch.chunk``'s rule."""
    size = -(-extent // parts)
    start = min(index * size, extent)
    return start, min(size, extent - start)
