"""A trainer may have another default device than the CPU (``torch.set_default_device``).

There lies a tensor that is made without a device. Here that is "meta", of which no value can be read, nor
sent by Gloo.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Placement, Shard

from bridge import SparsePatch, joining
from bridge.patches import PatchShare, share_of
from bridge.sharding import _pieces

LIMIT_S = 20.0


def test_ranks_agree_in_host_memory() -> None:
    store = dist.HashStore()

    def agree(rank: int) -> list[int]:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=LIMIT_S)
        group = gloo(store, rank, 2, options)
        with torch.device("meta"):
            if rank == 0:
                return joining._collect(group, [3, 1], 2, LIMIT_S, [], lambda _: None)
            return joining._hand_in(group, [2, 5], LIMIT_S)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(agree, range(2))) == [[3, 5], [3, 5]]


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)]])
def test_the_part_of_a_rank_is_found(placements: list[Placement]) -> None:
    wanted = _pieces((4, 6), placements, [2], [1])
    with torch.device("meta"):
        assert _pieces((4, 6), placements, [2], [1]) == wanted


@pytest.mark.parametrize("indices", [[3, 1, 2], [[3, 0], [1, 5]]])
def test_the_share_of_a_patch_is_found(indices: list[Any]) -> None:
    places = torch.tensor(indices)
    values = torch.rand(len(indices), *([6] if places.ndim == 1 else []))

    def found() -> list[Any]:
        share: PatchShare = share_of(SparsePatch("a", places, values), rank=0, world_size=1)
        boxes = share.boxes((4, 6))
        assert not isinstance(boxes, str), boxes
        return [(box, part.tolist()) for box, part in boxes]

    wanted = found()
    with torch.device("meta"):
        assert found() == wanted
