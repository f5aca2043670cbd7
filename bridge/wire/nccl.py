"""NCCL between one trainer rank and one updater: a communicator of their own for each such pair.

Beside whatever the trainer's own job uses. A lost peer must never end the trainer's process nor leave a
kernel waiting on its GPU, so torch's own reaction to errors is switched off here: whoever uses a pair waits
with deadlines on the Gloo link, and aborts the pair when they pass.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bridge.errors import BridgeError, PeerLost
from bridge.wire import cuda
from bridge.wire.device_memory import DeviceWhereabouts
from bridge.wire.rendezvous import first_line
from bridge.wire.stores import PrefixStore, Store, TorchStore, raw

# What torch reads when a group is made: whether an error ends the process, whether waits block, and whether
# errors are looked into, which turns the first on again.
_REACTIONS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_DESYNC_DEBUG")
_POLL_S = 0.1
_TRAINER, _UPDATER = 0, 1
LONGEST_ROUND = timedelta(hours=1)  # torch only logs it; the deadlines that count are those of the Gloo link


def version() -> str:
    """NCCL's version in this process; "" without one."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def why_not(peer: DeviceWhereabouts | None, device: torch.device) -> str:
    """ "" if NCCL can join ``device`` to a trainer's GPU, else the reason.

    Versions are compared for being the same, in no order: NCCL gives no promise that two of them understand
    each other, and one that does not hangs.
    """
    if peer is None:
        return "its weights are not on a GPU that can be named"
    if not version() or peer.nccl != version():
        return f"it has NCCL {peer.nccl or 'not at all'}, this updater {version() or 'not at all'}"
    if peer.uuid == cuda.uuid_of(device):
        return "NCCL cannot join two processes on one GPU"
    return ""


class Pair:
    """The communicator of one lane. Used by one thread."""

    def __init__(
        self,
        store: TorchStore,
        *,
        device: torch.device,
        is_trainer: bool,
        who: str,
        timeout_s: float,
        interrupted: threading.Event | None = None,
    ) -> None:
        """Meet the peer; both ends of all pairs must do so in the order of (trainer, updater).

        Args:
            store: where the two find each other, under a prefix that only they use.
            device: this end's GPU.
            is_trainer: which end this is.
            who: names the peer in errors.
            timeout_s: how long to wait for it; it may have others to join first.
            interrupted: ends the wait when it is set.

        Raises:
            PeerLost: the communicator was not formed in time, or NCCL refused.
        """
        self.who = who
        self.device = device
        self._peer = _UPDATER if is_trainer else _TRAINER
        self._group: Any = None
        self._backend: Any = None
        self._failure = ""
        # NCCL's own initialisation knows no deadline: it is given one by waiting for a thread.
        forming = threading.Thread(
            target=self._form, args=(store, timeout_s), name="bridge-nccl", daemon=True
        )
        forming.start()
        deadline = time.monotonic() + timeout_s
        while forming.is_alive() and time.monotonic() < deadline:
            if interrupted is not None and interrupted.is_set():
                self._failure = "the epoch ended meanwhile"
                break
            forming.join(_POLL_S)
        if forming.is_alive() or self._failure:
            reason = self._failure or f"nothing came of it within {timeout_s:g} s"
            # Not here: a communicator that is being made may take its time to end, too.
            threading.Thread(target=self.abort, name="bridge-nccl-abort", daemon=True).start()
            raise PeerLost(
                f"NCCL could not join {device} to {who}: {reason}; NCCL_DEBUG=INFO says more, and "
                "--transport gloo does without NCCL"
            )

    def _form(self, store: TorchStore, timeout_s: float) -> None:
        try:
            cuda.use(self.device)
            kind: Any = dist.ProcessGroupNCCL
            options = kind.Options()
            options._timeout = LONGEST_ROUND
            rank = 1 - self._peer
            store.set_timeout(timedelta(seconds=timeout_s))
            with _errors_are_ours():
                backend = kind(store, rank, 2, options)
            self._backend = backend
            backend.eager_connect_single_device(self.device)
            # Only torch's wrapper offers to send several tensors in one launch.
            group: Any = dist.ProcessGroup(store, rank, 2)
            group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
            group._register_backend(self.device, dist.ProcessGroup.BackendType.NCCL, backend)
            self._group = group
        except (BridgeError, RuntimeError, dist.DistError) as err:
            self._failure = first_line(err)

    def send(self, tensors: Sequence[torch.Tensor]) -> dist.Work:
        """Enqueue tensors, all contiguous, behind the current stream; ``wait`` orders that stream after."""
        return self._all(self._group.send, tensors)

    def receive(self, tensors: Sequence[torch.Tensor]) -> dist.Work:
        """Enqueue the peer's ``send`` of as many tensors of the same sizes, behind the current stream."""
        return self._all(self._group.recv, tensors)

    def _all(self, call: Any, tensors: Sequence[torch.Tensor]) -> dist.Work:
        self._group._start_coalescing(self.device)
        for tensor in tensors:
            call([tensor], self._peer, 0)
        work: dist.Work = self._group._end_coalescing(self.device)
        return work

    def abort(self) -> None:
        """End the communicator and every kernel of it that still waits. Idempotent."""
        if self._backend is not None:
            self._backend.abort()
            self._backend = self._group = None


def store_of(store: Store, epoch: int, trainer: int, inference: int) -> TorchStore:
    """Where the two ends of one lane find each other."""
    return PrefixStore(f"e{epoch}/nccl/{trainer}-{inference}", raw(store))


@contextlib.contextmanager
def _errors_are_ours() -> Iterator[None]:
    """A transfer of ours that fails must neither end the process nor block it; the user's own may."""
    before = {name: os.environ.get(name) for name in _REACTIONS}
    torch_dist: Any = dist  # its stub lacks the debug level
    level = torch_dist.get_debug_level()
    os.environ.update(dict.fromkeys(_REACTIONS, "0"))
    if level == torch_dist.DebugLevel.DETAIL:
        torch_dist.set_debug_level(torch_dist.DebugLevel.INFO)
    try:
        yield
    finally:
        torch_dist.set_debug_level(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
