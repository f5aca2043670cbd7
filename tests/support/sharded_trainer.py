"""A trainer rank of a ``parallel_mapping``'s servers, which holds its rows of every tensor.

    python -m tests.support.sharded_trainer KIND PATH DTYPE

Obeys as ``tests.support.trainer``, whose arguments are of no use here. The environment names the servers, and
says what becomes of a version where one of them fails.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.nodes import weights
from tests.support.trainer import Trainer, obey, take_stdout


class ShardedTrainer(Trainer):
    def __init__(self) -> None:
        self.layout = self.pending = self.adapted = None
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model: Any = {}

    def draw(self, seed: int) -> dict[str, Any]:
        """From here on the tensors are ``weights(seed)``, in as even parts as their rows allow."""
        self.model = {
            name: distribute_tensor(tensor, self._mesh, [Shard(0)]) for name, tensor in weights(seed).items()
        }
        return {}


if __name__ == "__main__":
    answers = take_stdout()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    obey(ShardedTrainer(), answers)
