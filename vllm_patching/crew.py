"""The daemon's updaters: one process per inference rank, started, ordered about and ended here."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bridge import flight
from bridge.errors import BridgeError, TransferError
from vllm_patching import introductions
from vllm_patching.channel import Channel, ChannelClosed, close_all

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 30.0  # a process with a GPU takes its time to be taken apart
DEATH_POLL_S = 0.2
START_TIMEOUT_S = 5.0  # the daemon does nothing else meanwhile; whoever waits asks again


@dataclass(frozen=True)
class Report:
    """What an updater answered; ``message`` is None when it died. Rank -1: a note of the daemon to itself."""

    crew: Crew
    rank: int
    message: dict[str, Any] | None


class Limb(Protocol):
    """Another node's part of a crew."""

    lost: str

    @property
    def ranks(self) -> list[int]: ...

    def start(self, crew: Crew, *, on_gpu: bool) -> None: ...

    def order(self, message: dict[str, Any], ranks: dict[int, dict[str, Any]]) -> None: ...

    def describe(self, rank: int) -> str: ...

    def pids(self) -> dict[int, int]: ...

    def ask_end(self) -> None: ...

    def end(self) -> None: ...


class Crew:
    """All updaters of one epoch. A crew is never reused: a fresh one has no half-finished transfer."""

    def __init__(
        self,
        num_ranks: int,
        run_dir: Path,
        reports: queue.SimpleQueue[Any],
        *,
        on_gpu: bool,
        ranks: Sequence[int] | None = None,
        limbs: Sequence[Limb] = (),
        on_ready: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``ranks`` are those with an updater on this node (default: all), ``limbs`` have the others'."""
        self.num_ranks = num_ranks
        self._limbs = {rank: limb for limb in limbs for rank in limb.ranks}
        self._on_ready = on_ready
        self._reports = reports
        self._channels: dict[int, Channel] = {}
        self._ready: set[int] = set()
        self._here = threading.Condition()
        self._ending = False
        self.processes = {
            rank: subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm_patching.updater",
                    "--run-dir",
                    str(run_dir),
                    "--rank",
                    str(rank),
                    "--daemon-pid",
                    str(os.getpid()),
                ],
                env=_environment(on_gpu=on_gpu),
            )
            for rank in (range(num_ranks) if ranks is None else ranks)
        }
        for limb in limbs:
            limb.start(self, on_gpu=on_gpu)

    def adopt(self, rank: int, channel: Channel) -> None:
        """An updater has introduced itself and been answered."""
        channel.sock.settimeout(None)
        with self._here:
            self._channels[rank] = channel
        name = f"bridge-updater-{rank}"
        threading.Thread(target=self._read, args=(rank, channel), name=name, daemon=True).start()

    def _read(self, rank: int, channel: Channel) -> None:
        while True:
            try:
                message, fds = channel.receive()
                close_all(fds)
                introductions.check_report(message)
            except BridgeError as err:
                if not isinstance(err, ChannelClosed):
                    logger.error(
                        "what %s sends cannot be read, so it counts as dead: %s", self.describe(rank), err
                    )
                if not self._ending:
                    self._reports.put(Report(self, rank, None))
                return
            if message["type"] == "ready":
                self.mark_ready(rank)
                continue
            self._reports.put(Report(self, rank, message))

    def mark_ready(self, rank: int) -> None:
        """An updater is ready for its first round."""
        with self._here:
            self._ready.add(rank)
            self._here.notify_all()
        self._on_ready(rank)

    def wait_all(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every updater is ready for its first round.

        Raises:
            TransferError: names those that are not.
        """
        deadline = time.monotonic() + timeout_s
        with self._here:
            while absent := sorted(set(range(self.num_ranks)) - self._ready):
                if lost := [limb.lost for limb in self._limbs.values() if limb.lost]:
                    raise TransferError(f"the updaters of ranks {absent} went with their node: {lost[0]}")
                processes = {rank: self.processes[rank] for rank in absent if rank in self.processes}
                if dead := [rank for rank, process in processes.items() if process.poll() is not None]:
                    self._reports.put(Report(self, dead[0], None))  # it had no connection whose end tells
                    raise TransferError(f"{self.describe(dead[0])} died before it was ready; see daemon.log")
                if time.monotonic() > deadline:
                    raise TransferError(f"updaters of ranks {absent} were not ready within {timeout_s:g} s")
                self._here.wait(DEATH_POLL_S)  # a process's death notifies nobody

    @property
    def has_died(self) -> bool:
        """Whether an updater on this node has; of one that was not adopted yet nobody else says so."""
        return any(process.poll() is not None for process in self.processes.values())

    def order(self, message: dict[str, Any], ranks: dict[int, dict[str, Any]] | None = None) -> None:
        """Send an order to all updaters; ``ranks`` adds fields per rank.

        Raises:
            TransferError: an updater is gone.
        """
        flight.note("order", order=message["type"])
        for rank, channel in self._channels.items():
            try:
                channel.send({**message, **(ranks or {}).get(rank, {})})
            except ChannelClosed as err:
                raise TransferError(f"{self.describe(rank)} is gone: {err}") from err
        for limb in dict.fromkeys(self._limbs.values()):
            limb.order(message, ranks or {})

    def post(self, kind: str) -> None:
        """Put a note to the crew's owner behind all that has been reported so far."""
        self._reports.put(Report(self, -1, {"type": kind}))

    def describe(self, rank: int) -> str:
        """Name one updater, with its exit code if it ended."""
        if (limb := self._limbs.get(rank)) is not None:
            return limb.describe(rank)
        process = self.processes[rank]
        code = process.poll()
        ended = f", ended with {code}" if code is not None else ""
        return f"updater of rank {rank} (pid {process.pid}{ended})"

    def pids(self) -> list[int]:
        """Process ids by rank."""
        pids = {rank: process.pid for rank, process in self.processes.items()}
        for limb in dict.fromkeys(self._limbs.values()):
            pids |= limb.pids()
        return [pids[rank] for rank in sorted(pids)]

    def end(self) -> None:
        """Kill every updater: they hold nothing that must be saved, and a transfer cannot be interrupted."""
        self._ending = True
        for process in self.processes.values():
            process.kill()
        limbs = dict.fromkeys(self._limbs.values())
        for limb in limbs:
            limb.ask_end()
        for limb in limbs:
            limb.end()
        for rank, process in self.processes.items():
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise TransferError(
                    f"{self.describe(rank)} does not end {END_TIMEOUT_S:g} s after SIGKILL; another one must "
                    "not write the same memory beside it. See its kernel stack, and the GPU's state"
                ) from None
        for channel in self._channels.values():
            channel.close()


def _environment(*, on_gpu: bool) -> dict[str, str]:
    """An updater must see the trainer's GPUs too: it maps their memory, and finds its own by UUID."""
    return {k: v for k, v in os.environ.items() if not (on_gpu and k == "CUDA_VISIBLE_DEVICES")}
