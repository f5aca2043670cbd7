"""The trainer's side: connect, broadcast, close.

::

    import bridge
    ...
    optimizer.step()
    receipt = bridge.broadcast_weights(model)      # every trainer rank calls it

Every rank sends its own shards; nothing is gathered. All talking happens in one background thread per
process, so a blocking call and a handle from ``blocking=False`` take the same path.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Self, get_args, overload

import torch
from torch import nn

from bridge import environment, zero3
from bridge.catalogue import Catalogue
from bridge.config import BridgeConfig
from bridge.errors import BridgeError, ConfigError
from bridge.guard import Guarded, StepGuard
from bridge.job import Encoding, Job, Receipt
from bridge.rounds import Session
from bridge.sharding import LocalShards, collect, collect_single, current_gpu, device_of

logger = logging.getLogger(__name__)

Weights = nn.Module | Mapping[str, torch.Tensor]

__all__ = ["Bridge", "PendingBroadcast", "Receipt"]


class PendingBroadcast:
    """A broadcast under way. The weights are protected until every byte has been read."""

    def __init__(self, job: Job, guard: StepGuard) -> None:
        self._job = job
        self._guard = guard

    @property
    def done(self) -> bool:
        """Whether the version is live, or the round has failed."""
        return self._job.finished.is_set()

    def wait_released(self) -> None:
        """Wait until the weights may be changed; the next optimizer step does this by itself.

        Raises:
            BridgeError: the round failed before that.
        """
        self._job.wait_released()

    def wait(self) -> Receipt:
        """Wait until the version is live.

        Returns:
            What was sent, and how long it took.

        Raises:
            BridgeError: the round failed; the old version is still served.
        """
        try:
            return self._job.wait()
        finally:
            self._guard.remove()


class Bridge:
    """One trainer rank's connection to the inference side. Not thread-safe; a context manager.

    The connection is made by the first broadcast, or by ``connect``. A round that fails ends it, and the next
    broadcast makes a new one under a new epoch, so a restarted server or trainer needs no further call.
    """

    def __init__(self, config: BridgeConfig, *, ranks: environment.Ranks | None = None) -> None:
        """``ranks``: as for ``connect``."""
        self.config = config
        self._ranks = ranks
        self._session: Session | None = None
        self._pending: PendingBroadcast | None = None
        self._calls = 0
        self._base: tuple[str, int] | None = None
        self._catalogue: Catalogue | None = None

    @classmethod
    def connect(cls, config: BridgeConfig | None = None, *, ranks: environment.Ranks | None = None) -> Self:
        """Meet the inference side now; every trainer rank must call it.

        Args:
            config: default is what the environment says (``BRIDGE_CONFIG``, ``BRIDGE_LOGDIR``, ``LOGDIR``).
            ranks: this process among those that broadcast; default is the default process group, else the
                environment. ``Ranks()`` for one that broadcasts alone, whatever group it is in.

        Raises:
            ConfigError: no mapping can be found, or it is damaged.
            RendezvousError: the daemon cannot be reached, or refuses.
        """
        bridge = cls(config or environment.bridge_config(), ranks=ranks)
        bridge._ensure_session(current_gpu())
        return bridge

    def _ensure_session(self, device: torch.device | None) -> Session:
        """The session; a new one if it is over, or if it was made before the weights came to a GPU.

        Weights on another GPU than the session's, or back in host memory, are sent from a snapshot: every
        rank must decide alike, and this one cannot ask.
        """
        gpu_came = self._session is not None and self._session.device is None and device is not None
        if self._session is not None and (self._session.closed or gpu_came):
            self._session.close()
            self._session = None
        if self._session is None:
            self._session = Session.open(self.config, self._ranks or environment.ranks(), device=device)
        return self._session

    @property
    def weight_version(self) -> int:
        """The newest version this rank knows to be live; 0 before the first broadcast."""
        return self._session.version if self._session else 0

    @overload
    def broadcast_weights(
        self,
        model: Weights,
        *,
        blocking: Literal[True] = True,
        version: int | None = None,
        encoding: Encoding = "dense",
    ) -> Receipt: ...

    @overload
    def broadcast_weights(
        self,
        model: Weights,
        *,
        blocking: bool,
        version: int | None = None,
        encoding: Encoding = "dense",
    ) -> Receipt | PendingBroadcast: ...

    def broadcast_weights(
        self,
        model: Weights,
        *,
        blocking: bool = True,
        version: int | None = None,
        encoding: Encoding = "dense",
    ) -> Receipt | PendingBroadcast:
        """Send the model's weights and make them live; every trainer rank calls it.

        Args:
            model: a plain module, DDP, FSDP2 or tensor parallel (DTensor parameters), or one that DeepSpeed
                partitions (ZeRO-3), or tensors by name. Each rank sends the shards it holds.
                float32 master weights are cast to the server's dtype on the way.
            blocking: wait until the version is live. With False the call returns at once; the next step of an
                optimizer over these parameters waits by itself until the weights have been read.
            version: the weight version; default is the served one plus one. Equal on all ranks.
            encoding: "dense" sends every element. "auto" sends of each bucket what has changed since the last
                broadcast, without loss, where that is shorter and the bytes go by Gloo; each rank then keeps
                what it last sent, in the server's dtype, in host memory. "delta" does the same, and refuses
                where the bytes would go another way. Equal on all ranks.

        Returns:
            A ``Receipt``, or with ``blocking=False`` a ``PendingBroadcast``.

        Raises:
            MappingError: the model does not fit the server's; lists every fault. All ranks' round is aborted.
            ConfigError: there is no such encoding, or it cannot be had here.
            TransferError: the round failed on the way. The old version is still served, whole.
        """
        if encoding not in get_args(Encoding):
            raise ConfigError(f"encoding is {encoding!r}; it is one of {', '.join(get_args(Encoding))}")
        return self._broadcast(
            lambda session: self._collect(model, session),
            device_of(_tensors_of(model)),
            parameters=lambda: _tensors_of(model),
            module=model if isinstance(model, nn.Module) else None,
            blocking=blocking,
            version=version,
            partial=False,
            encoding=encoding,
        )

    @overload
    def broadcast_single_param(
        self, name: str, tensor: torch.Tensor, *, blocking: Literal[True] = True, version: int | None = None
    ) -> Receipt: ...

    @overload
    def broadcast_single_param(
        self, name: str, tensor: torch.Tensor, *, blocking: bool, version: int | None = None
    ) -> Receipt | PendingBroadcast: ...

    def broadcast_single_param(
        self, name: str, tensor: torch.Tensor, *, blocking: bool = True, version: int | None = None
    ) -> Receipt | PendingBroadcast:
        """Send one parameter under its own version; the others stay as they are. Every rank calls it.

        Args:
            name: the parameter's name in the mapping.
            tensor: the whole tensor or a DTensor, of the mapping's global shape.
            blocking: as in ``broadcast_weights``.
            version: as in ``broadcast_weights``.

        Raises:
            MappingError: no such parameter, or of another shape or dtype.
            TransferError: the round failed on the way.
        """

        def gather(session: Session) -> tuple[LocalShards, Guarded]:
            shards = collect_single(name, tensor, session.mapping, rank=session.rank)
            return shards, Guarded([tensor, *shards.tensors])

        return self._broadcast(
            gather,
            device_of([tensor]),
            parameters=lambda: [tensor],
            blocking=blocking,
            version=version,
            partial=True,
        )

    def _collect(self, model: Weights, session: Session) -> tuple[LocalShards, Guarded]:
        if not isinstance(model, nn.Module):
            named = collect(model, session.mapping, rank=session.rank)
            return named, Guarded([*model.values(), *named.tensors])
        known = self._catalogue
        if known is not None and (shards := known.find(model, session.mapping)) is not None:
            return shards, known.guarded
        shards = collect(model, session.mapping, rank=session.rank)
        # The shards too: an optimizer may hold views of their memory, and not the parameters.
        guarded = Guarded([*model.parameters(), *shards.tensors])
        self._catalogue = Catalogue(model, session.mapping, shards, guarded) if shards.lasting else None
        return shards, guarded

    def _broadcast(
        self,
        gather: Callable[[Session], tuple[LocalShards, Guarded]],
        device: torch.device | None,
        *,
        parameters: Callable[[], Iterable[torch.Tensor]],
        module: nn.Module | None = None,
        blocking: bool,
        version: int | None,
        partial: bool,
        encoding: Encoding = "dense",
    ) -> Receipt | PendingBroadcast:
        environment.check_enabled()
        if not blocking and zero3.steps_by_itself(module, parameters()):
            raise ConfigError(
                "blocking=False needs an optimizer step that can be made to wait, and DeepSpeed's ZeRO has "
                "none; call with blocking=True"
            )
        self._finish_pending()
        self._calls += 1
        for attempt in range(2):
            session = self._ensure_session(device)
            try:
                if partial:
                    self._check_base(session)
                shards, guarded = gather(session)
            except BridgeError as err:
                session.refuse_round(str(err))
                raise
            job = session.submit(
                shards, call=self._calls, version=version, partial=partial, encoding=encoding
            )
            holding = [*shards.owners, *shards.tensors]
            guard = StepGuard(guarded, job.wait_released, module=module, holding=holding)
            self._pending = PendingBroadcast(job, guard)
            if not blocking:
                return self._pending
            try:
                receipt = self._pending.wait()
            except BridgeError:
                # The epoch had ended between two rounds, and the news reached this rank during its own
                # call: rank 0 has not begun this round, and waits for us in a new epoch.
                if attempt or not session.stale:
                    raise
            else:
                self._pending = None
                self._base = (session.mapping.run_dir, receipt.version)
                return receipt
        raise AssertionError("unreachable: the second attempt returns or raises")

    def _finish_pending(self) -> None:
        """Wait for a broadcast that was left under way; raise its error unless its caller has seen it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        seen = pending._job.seen
        try:
            receipt = pending.wait()
        except BridgeError:
            if not seen:
                raise
        else:
            if self._session is not None:
                self._base = (self._session.mapping.run_dir, receipt.version)

    def _check_base(self, session: Session) -> None:
        """A part may only be laid over the version this trainer made live itself.

        Raises:
            ConfigError: the server was restarted, or somebody else's version came between.
        """
        served = (session.mapping.run_dir, session.version)
        if self._base is not None and self._base != served:
            raise ConfigError(
                f"one parameter was to be laid over version {self._base[1]}, but the server at "
                f"{session.mapping.run_dir} serves version {session.version} of another history; call "
                "broadcast_weights once"
            )

    def send_heartbeat(self) -> None:
        """Send one heartbeat now. Heartbeats are sent by themselves; this one raises if the peer is gone.

        Raises:
            PeerLost: the daemon (or on other ranks trainer rank 0) cannot be reached.
        """
        self._ensure_session(self._session.device if self._session else current_gpu()).beat()

    def notify_update(
        self, model: nn.Module | dict[str, torch.Tensor], *, version: int | None = None
    ) -> Receipt:
        """The HTTP fallback: write safetensors to the shared path and announce them; no group is needed.

        Every rank calls it, as full tensors are gathered one at a time; rank 0 writes and posts.

        Raises:
            ConfigError: no ``http_url`` or ``update_dir`` is configured.
            RoundAborted: the server refused the update; carries its reason.
        """
        from bridge.fallback import notify_update

        return notify_update(self.config, model, self._ranks or environment.ranks(), version=version)

    def close(self) -> None:
        """Leave in order; the server goes on serving. Idempotent.

        Raises:
            BridgeError: a broadcast with ``blocking=False`` failed, and nobody had asked for its outcome.
        """
        self._catalogue = None
        try:
            self._finish_pending()
        finally:
            if self._session is not None:
                self._session.close()
                self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _tensors_of(model: Weights) -> Iterable[torch.Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else model.values()


_default: Bridge | None = None


def connect(config: BridgeConfig | None = None) -> Bridge:
    """``Bridge.connect``."""
    return Bridge.connect(config)


def _default_bridge() -> Bridge:
    global _default  # the one connection behind the module-level functions
    if _default is None:
        _default = Bridge(environment.bridge_config())
        atexit.register(close)
    return _default


@overload
def broadcast_weights(
    model: Weights,
    *,
    blocking: Literal[True] = True,
    version: int | None = None,
    encoding: Encoding = "dense",
) -> Receipt: ...


@overload
def broadcast_weights(
    model: Weights, *, blocking: bool, version: int | None = None, encoding: Encoding = "dense"
) -> Receipt | PendingBroadcast: ...


def broadcast_weights(
    model: Weights, *, blocking: bool = True, version: int | None = None, encoding: Encoding = "dense"
) -> Receipt | PendingBroadcast:
    """``Bridge.broadcast_weights`` on a connection made by the first call, from the environment."""
    return _default_bridge().broadcast_weights(model, blocking=blocking, version=version, encoding=encoding)


@overload
def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: Literal[True] = True, version: int | None = None
) -> Receipt: ...


@overload
def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: bool, version: int | None = None
) -> Receipt | PendingBroadcast: ...


def broadcast_single_param(
    name: str, tensor: torch.Tensor, *, blocking: bool = True, version: int | None = None
) -> Receipt | PendingBroadcast:
    """``Bridge.broadcast_single_param`` on the default connection."""
    return _default_bridge().broadcast_single_param(name, tensor, blocking=blocking, version=version)


def send_heartbeat() -> None:
    """``Bridge.send_heartbeat`` on the default connection."""
    _default_bridge().send_heartbeat()


def notify_update(model: nn.Module | dict[str, torch.Tensor], *, version: int | None = None) -> Receipt:
    """``Bridge.notify_update`` on the default connection."""
    return _default_bridge().notify_update(model, version=version)


def close() -> None:
    """Close the default connection, if there is one."""
    global _default  # see _default_bridge
    if _default is not None:
        bridge, _default = _default, None
        bridge.close()
