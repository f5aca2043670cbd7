"""Another process on the same GPU, for tests: adopts an arena's halves, or shows memory of its own."""

from __future__ import annotations

import socket
from typing import Any

import torch

from bridge.wire import cuda
from bridge.wire.device_transport import Showcase
from vllm_patching import arena
from vllm_patching.cuda_arena import CudaHalves


def fill_halves(channel: socket.socket, nbytes: int, values: tuple[float, float]) -> None:
    """Receive two descriptors, fill the halves with one bfloat16 value each, and say so."""
    _, fds, _, _ = socket.recv_fds(channel, 1, 2)
    halves = CudaHalves(tuple(fds), nbytes, torch.device("cuda", 0))
    for half, value in zip(halves.halves, values, strict=True):
        half.view(torch.bfloat16).fill_(value)
    halves.synchronize()
    channel.sendall(b"!")
    channel.recv(1)  # stay until told to go


def fill_adopted(
    channel: socket.socket, nbytes: int, handles: tuple[str, ...], kind: str, values: tuple[float, ...]
) -> None:
    """Adopt an arena's halves as an updater does, fill each with one bfloat16 value, and say so."""
    _, fds, _, _ = socket.recv_fds(channel, 1, 64)
    halves = arena.adopt(tuple(fds), nbytes, cuda.uuid_of(torch.device("cuda", 0)), handles, kind)
    for half, value in zip(halves.halves, values, strict=True):
        half.view(torch.bfloat16).fill_(value)
    halves.synchronize()
    channel.sendall(b"!")
    channel.recv(1)  # stay until told to go


def show(pipe: Any, nbytes: int, moves: int) -> None:
    """Show a tensor, then replace it by another one ``moves`` times; each holds its own number."""
    device = torch.device("cuda", 0)
    cuda.use(device)
    showcase = Showcase(device)
    for number in range(moves + 1):
        data = torch.full((nbytes,), number, dtype=torch.uint8, device=device)
        torch.cuda.synchronize()
        shown = [showcase.prepare([data[256:]], [torch.uint8]).message for _ in range(2)]
        assert shown[0] == shown[1], "nothing moved between the two"
        pipe.send(shown[1])
        pipe.recv()
        del data
        torch.cuda.empty_cache()
