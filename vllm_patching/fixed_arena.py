"""Arenas whose live memory never changes place: ``--flip copy`` and ``--staging in-place``.

With ``copy`` there is a second half, which is filled, and a flip copies all of it over the live one: for
systems that cannot exchange the memory under an address range. With ``in-place`` there is none; the live half
is written itself, while the engine stands still. The memory's own class knows the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self

import torch

COPY = "copy"
IN_PLACE = "in-place"


class Memory(Protocol):
    """One half: memory of this process that another one may map, by descriptor or by CUDA IPC handle."""

    @property
    def fds(self) -> tuple[int, ...]:
        """Its descriptors, in order of address; none if it has a handle."""

    @property
    def handle(self) -> str:
        """Its CUDA IPC handle in hex, "" if it has none."""

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 view [nbytes] with a storage of its own."""

    def copy_from(self, other: Self) -> None:
        """Take over all of the other half's bytes; they are there, for every reader, on return."""

    def quiesce(self) -> None:
        """Wait until nothing on the device uses this memory."""

    def free(self) -> None:
        """Give the memory back."""


class FixedArena:
    """A live half that stays where it is, and with ``copy`` a second one. Owner: the worker process."""

    def __init__(self, nbytes: int, allocate: Callable[[str], Memory], *, kind: str) -> None:
        """Allocate the live half.

        Args:
            nbytes: of one half.
            allocate: makes one half; it is told which one, for messages.
            kind: ``COPY`` or ``IN_PLACE``.

        Raises:
            OSError, DeviceError: no such memory is left.
        """
        self.nbytes = nbytes
        self.kind = kind
        self.active = 0
        self._allocate = allocate
        self._halves = [allocate("the live half")]

    def live(self, offset: int, nbytes: int) -> torch.Tensor:
        return self._halves[0].bytes(offset, nbytes)

    def open_second_half(self) -> None:
        """Allocate the half to be filled, if there is one.

        Raises:
            OSError, DeviceError: it does not fit.
        """
        if self.kind == COPY:
            self._halves.append(self._allocate("the second half"))

    def half(self, index: int) -> torch.Tensor:
        """All of one half: 0 is live, 1 is the one to be filled."""
        return self._halves[index].bytes(0, self.nbytes)

    def warm(self) -> float:
        """Copy the live half over the other, if there is one; returns seconds."""
        start = time.perf_counter()
        if self.kind == COPY:
            self._halves[1].copy_from(self._halves[0])
        return time.perf_counter() - start

    def export(self) -> tuple[int, ...]:
        return tuple(fd for half in self._halves for fd in half.fds)

    def handles(self) -> tuple[str, ...]:
        return tuple(half.handle for half in self._halves if half.handle)

    def flip(self, to: int) -> None:  # noqa: ARG002 - half 0 is always the live one
        """Copy the filled half over the live one; in place, what was written is live already.

        Raises:
            OSError, RuntimeError: the copy failed, and the live half may hold a part of it.
        """
        if self.kind == COPY:
            self._halves[0].copy_from(self._halves[1])

    def quiesce(self) -> None:
        self._halves[0].quiesce()

    def close(self) -> None:
        """Give the memory back; no tensor over the arena may be used afterwards."""
        for half in self._halves:
            half.free()
