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

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Self, TypedDict, TypeVar, Unpack, get_args, overload

import torch
from torch import nn

from bridge import environment, served_adapter, zero3
from bridge.adapters import Merged, merge
from bridge.catalogue import Catalogue
from bridge.config import BridgeConfig
from bridge.declared import DeclaredLayout
from bridge.errors import BridgeError, ConfigError, RoundAborted, TopologyError
from bridge.fleet import Fleet, Server
from bridge.guard import Guarded, StepGuard
from bridge.job import Encoding, PendingBroadcast, Receipt
from bridge.parts import Round, collect_single
from bridge.patches import SparsePatch
from bridge.served_adapter import AdapterTensors
from bridge.sharding import LocalShards, collect, current_gpu, device_of

logger = logging.getLogger(__name__)

Weights = nn.Module | Mapping[str, torch.Tensor]
Adapters = Literal["merge", "only"]
Gather = Callable[[Server], tuple[LocalShards, Guarded]]
_Found = TypeVar("_Found")

__all__ = ["Bridge", "PendingBroadcast", "Receipt", "Round"]


class SingleOptions(TypedDict, total=False):
    """Keywords of ``Bridge.broadcast_single_param``; ``broadcast_weights`` says what they mean."""

    version: int | None
    layout: DeclaredLayout | None


class Options(SingleOptions, total=False):
    """Keywords of ``Bridge.broadcast_weights``."""

    encoding: Encoding
    adapters: Adapters | None
    adapters_only: bool
    adapter: str | None
    served_as: str | None


class Bridge:
    """One trainer rank's connection to the inference side. Not thread-safe; a context manager.

    The connection is made by the first broadcast, or by ``connect``. A round that fails ends it, and the next
    broadcast makes a new one under a new epoch, so a restarted server or trainer needs no further call.

    With ``logdirs`` of several servers there is one connection to each, and a round brings its version to all
    of them; ``commit`` says what becomes of it where one fails.
    """

    def __init__(self, config: BridgeConfig, *, ranks: environment.Ranks | None = None) -> None:
        """``ranks``: as for ``connect``.

        Raises:
            TopologyError: ``ranks`` are several, and not those of the default process group.
        """
        group = environment.initialised_ranks()
        if (
            (ranks and group)
            and ranks.world_size > 1
            and (ranks.rank, ranks.world_size) != (group.rank, group.world_size)
        ):
            raise TopologyError(
                f"ranks says rank {ranks.rank} of {ranks.world_size}, but torch.distributed's default group, "
                f"over which trainer ranks agree, says rank {group.rank} of {group.world_size}; a part of a "
                "group cannot broadcast: use one rank alone, Ranks(), or all"
            )
        self.config = config
        self._ranks = ranks
        self._fleet = Fleet(config, self._own_ranks)
        self._pending: PendingBroadcast | None = None
        self._round: Round | None = None
        self._calls = 0

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
        bridge._fleet.ready(current_gpu())
        return bridge

    def _own_ranks(self) -> environment.Ranks:
        return self._ranks or environment.ranks()

    @property
    def weight_version(self) -> int:
        """The newest version this rank knows to be live on any server; 0 before the first broadcast."""
        return self._fleet.version

    @overload
    def broadcast_weights(
        self, model: Weights, *, blocking: Literal[True] = True, **options: Unpack[Options]
    ) -> Receipt: ...

    @overload
    def broadcast_weights(
        self, model: Weights, *, blocking: bool, **options: Unpack[Options]
    ) -> Receipt | PendingBroadcast: ...

    def broadcast_weights(
        self,
        model: Weights,
        *,
        blocking: bool = True,
        version: int | None = None,
        encoding: Encoding = "dense",
        adapters: Adapters | None = None,
        adapters_only: bool = False,
        adapter: str | None = None,
        served_as: str | None = None,
        layout: DeclaredLayout | None = None,
    ) -> Receipt | PendingBroadcast:
        """Send the model's weights and make them live; every trainer rank calls it.

        Args:
            model: a plain module, DDP, FSDP2 or tensor parallel (DTensor parameters), or one that DeepSpeed
                partitions (ZeRO-3), or tensors by name. Each rank sends the shards it holds.
                float32 master weights are cast to the server's dtype on the way.
            blocking: wait until the version is live. With False the call returns at once; the next step of an
                optimizer over these parameters waits by itself until the weights have been read.
            version: the weight version; default is the served one plus one, the newest served by any of
                several servers. Equal on all ranks.
            encoding: "dense" sends every element. "auto" sends of each bucket what has changed since the last
                broadcast, without loss, where that is shorter and the bytes go by Gloo; each rank then keeps
                what it last sent, in the server's dtype, in host memory. "delta" does the same, and refuses
                where the bytes would go another way. Equal on all ranks.
            adapters: "merge" for a model with LoRA adapters of peft: each adapted weight is sent as
                ``W + scaling * B @ A``, by the base model's names. The model stays as it is; the sums take
                the memory of the adapted weights once, until they have been read. "only" sends one adapter's
                A and B and nothing else, to a server that serves it (``--enable-lora``): copies, so that the
                model may change at once.
            adapters_only: True is ``adapters="only"``.
            adapter: with "only", peft's name of the adapter to send; default is the active one.
            served_as: with "only", the name that it is served by; default is peft's, or if that is "default"
                the only one that the server takes.
            layout: what plain tensors are parts of, where the trainer shards by hand; None if they are whole.
                With ``adapters`` it goes by the base model's names.

        Returns:
            A ``Receipt``, or with ``blocking=False`` a ``PendingBroadcast``.

        Raises:
            ConfigError: there is no such encoding, or it cannot be had here; ``adapters`` was given, and
                there are none; options contradict each other.
            TopologyError: the degrees of ``layout`` do not divide the number of trainer ranks.
            MappingError: the model does not fit the server's; lists every fault. All ranks' round is aborted.
            RendezvousError: the server cannot be met; of several, one that ``commit`` needs.
            TransferError: the round failed on the way. The old version is still served, whole; by several
                servers, unless the error says on which of them the new one is live.
        """
        if encoding not in get_args(Encoding):
            raise ConfigError(f"encoding is {encoding!r}; it is one of {', '.join(get_args(Encoding))}")
        adapters = _mode(adapters, adapters_only=adapters_only, layout=layout, names=(adapter, served_as))
        self._check_layout(layout)
        if adapters == "only":
            found = self._look_up(
                model, lambda of: served_adapter.find(of, adapter=adapter, served_as=served_as), adapters
            )
            return self._broadcast_adapter(found, blocking=blocking, version=version, encoding=encoding)
        merged = self._look_up(model, merge, adapters) if adapters is not None else None
        return self._broadcast(
            lambda server: self._collect(model, server, merged, layout),
            device_of(_tensors_of(model)),
            parameters=lambda: _tensors_of(model),
            module=model if isinstance(model, nn.Module) else None,
            blocking=blocking,
            version=version,
            encoding=encoding,
            merged=merged is not None,
        )

    @overload
    def broadcast_single_param(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        blocking: Literal[True] = True,
        **options: Unpack[SingleOptions],
    ) -> Receipt: ...

    @overload
    def broadcast_single_param(
        self, name: str, tensor: torch.Tensor, *, blocking: bool, **options: Unpack[SingleOptions]
    ) -> Receipt | PendingBroadcast: ...

    def broadcast_single_param(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        blocking: bool = True,
        version: int | None = None,
        layout: DeclaredLayout | None = None,
    ) -> Receipt | PendingBroadcast:
        """Send one parameter under its own version; the others stay as they are. Every rank calls it.

        Args:
            name: the parameter's name in the mapping.
            tensor: the whole tensor or a DTensor, of the mapping's global shape; or the part that ``layout``
                says.
            blocking: as in ``broadcast_weights``.
            version: as in ``broadcast_weights``.
            layout: as in ``broadcast_weights``.

        Raises:
            MappingError: no such parameter, or of another shape or dtype.
            TopologyError: as in ``broadcast_weights``.
            TransferError: the round failed on the way.
        """
        self._check_layout(layout)

        def gather(server: Server) -> tuple[LocalShards, Guarded]:
            session = server.session
            shards = collect_single(name, tensor, session.mapping, rank=session.rank, layout=layout)
            return shards, Guarded([tensor, *shards.tensors])

        return self._broadcast(
            gather,
            device_of([tensor]),
            parameters=lambda: [tensor],
            blocking=blocking,
            version=version,
        )

    @contextmanager
    def round(self, *, version: int | None = None, blocking: bool = True) -> Iterator[Round]:
        """One version out of the ``update_weight`` calls in this block; every trainer rank enters it.

        Nothing is sent before the block ends. If all that the server needs was named, that is what it serves
        then; if not, the rest stays as it was. An exception in the block abandons the round on all ranks,
        at the end of their blocks, and the old version is served on.

        Each rank keeps copies until they have been read: of whole tensors its even share, so all of them
        together need the memory of the model once.

        Args:
            version: as in ``broadcast_weights``.
            blocking: as in ``broadcast_weights``; with False the weights may be changed at once all the same.

        Returns:
            A context manager; its ``Round`` has a ``receipt`` after the block.

        Raises:
            ConfigError: a round is open already, or the block named no parameter.
            MappingError: names or tensors do not fit, or names differ between ranks; lists every fault.
            TransferError: the round failed on the way, or another rank abandoned it.
        """
        self._begin()
        servers = self._fleet.ready(current_gpu())
        ranks = self._own_ranks()
        made = self._round = Round(rank=ranks.rank, world_size=ranks.world_size)
        outcome = None
        try:
            yield made
        except BaseException as err:
            _refuse(servers, f"the round was abandoned: {type(err).__name__}: {err}")
            raise
        else:
            outcome = self._send_round(made, servers, blocking=blocking, version=version)
        finally:
            made.end(outcome)
            self._round = None

    def _send_round(
        self, made: Round, servers: list[Server], *, blocking: bool, version: int | None
    ) -> Receipt | PendingBroadcast:
        closed = [server.session.closed for server in servers]
        if all(closed):  # told only now: a rank that left its block early would be missed in a gather
            raise RoundAborted(f"the round was not sent: {closed[0]}; the server keeps its weights")

        def gather(server: Server) -> tuple[LocalShards, Guarded]:
            return made.collect(server.session.mapping), Guarded([], hold=True)  # copies, which only we have

        return self._send(servers, gather, blocking=blocking, version=version)

    @overload
    def update_weight(self, name: str, tensor: torch.Tensor) -> None: ...

    @overload
    def update_weight(self, name: SparsePatch) -> None: ...

    def update_weight(self, name: str | SparsePatch, tensor: torch.Tensor | None = None) -> None:
        """Hand one parameter over to the round under way; the tensor may be freed or overwritten at once.

        Every rank calls it with the same names in the same order. What does not fit is told when the round
        ends, all at once.

        Args:
            name: the parameter's name in the mapping, or as in the model's state dict. Or alone a
                ``SparsePatch``, equal on all ranks, for some elements of a parameter; the others stay as they
                were in the version that this trainer made live itself, or in the checkpoint.
            tensor: the whole tensor (such as ``full_tensor()`` or one that ``GatheredParameters`` gathers),
                equal on all ranks; or a DTensor or a ZeRO-3 parameter as it is. Of the mapping's shape.

        Raises:
            ConfigError: no round is open; a name came without a tensor.
        """
        if self._round is None:
            given = name.name if isinstance(name, SparsePatch) else name
            raise ConfigError(
                f"update_weight({given!r}) belongs into a round: `with bridge.round(): ...` around the loop "
                "makes one version of it. broadcast_single_param sends one parameter as a version of its own"
            )
        self._round.update_weight(name, tensor)  # type: ignore[arg-type]  # told apart there

    def rollback(self, *, to: int | None = None) -> Receipt:
        """Serve the version before the served one again, at once and without sending it; every rank calls it.

        It is kept until the next round begins. Numbers never come back: after version 7 this makes version 8,
        with the weights of 6, and another rollback version 9, with those of 7. The trainer's own weights stay
        as they are, so a round of some parameters is refused until the next of all, or until what they made
        is back; an adapter is not, if it was one that was rolled back. All of several servers come back to
        one version, or none does.

        Args:
            to: the version whose weights are wanted; refused if the server holds another. Without it, a
                rollback that is repeated because the first one's outcome was lost would undo that. Equal
                on all ranks.

        Raises:
            ConfigError: several servers would not all come back to the same version.
            TransferError: the server does not hold it any more (a later round has begun), or never does
                (``--staging in-place``, ``--flip copy``). The served version stays.
        """
        self._begin()
        servers = self._fleet.ready(current_gpu())
        try:
            outcome = self._fleet.roll_back(servers, to, call=self._calls)
        except BaseException as err:
            _refuse(servers, str(err) or type(err).__name__)
            raise
        receipt = outcome.wait()
        self._fleet.remember(receipt, rolled_back=True)
        return receipt

    def _check_layout(self, layout: DeclaredLayout | None) -> None:
        """Before any rank waits for the others: all of them find it alike."""
        if layout is not None:
            layout.check_world((self._own_ranks()).world_size)

    def _look_up(self, model: Weights, look: Callable[[nn.Module], _Found], adapters: Adapters) -> _Found:
        """Before the session is asked for: sums may be collective, and ranks may come to it one by one."""
        if not isinstance(model, nn.Module):
            raise ConfigError(f"adapters={adapters!r} is for a model; tensors by name are sent as they are")
        try:
            self._finish_pending()  # which may still hold earlier sums
            return look(model)
        except BaseException as err:
            self._calls += 1  # the others make this broadcast, and count it
            self._fleet.refuse(str(err) or type(err).__name__)
            raise

    def _collect(
        self, model: Weights, server: Server, merged: Merged | None, layout: DeclaredLayout | None
    ) -> tuple[LocalShards, Guarded]:
        session = server.session
        if not isinstance(model, nn.Module):
            named = collect(model, session.mapping, rank=session.rank, layout=layout)
            return named, Guarded([*model.values(), *named.tensors])
        if merged is not None:
            sums = collect(merged, session.mapping, rank=session.rank, layout=layout)
            sums = dataclasses.replace(sums, comparable=False)
            return sums, Guarded(merged.kept, hold=True)  # not the sums: no optimizer has them
        known = server.catalogue
        if known is not None and (shards := known.find(model, session.mapping, layout)) is not None:
            return shards, known.guarded
        shards = collect(model, session.mapping, rank=session.rank, layout=layout)
        # The shards too: an optimizer may hold views of their memory, and not the parameters.
        guarded = Guarded([*model.parameters(), *shards.tensors])
        made = Catalogue(model, session.mapping, shards, guarded, layout) if shards.lasting else None
        server.catalogue = made
        return shards, guarded

    def _broadcast_adapter(
        self, found: AdapterTensors, *, blocking: bool, version: int | None, encoding: Encoding
    ) -> Receipt | PendingBroadcast:
        matrices = [tensor for tensor, _ in found.tensors.values()]

        def gather(server: Server) -> tuple[LocalShards, Guarded]:
            session = server.session
            shards = served_adapter.collect_adapter(found, session.mapping, rank=session.rank)
            return shards, Guarded([], hold=True)  # copies, which only we have

        return self._broadcast(
            gather,
            device_of(matrices),
            parameters=lambda: (),  # no optimizer has to wait
            blocking=blocking,
            version=version,
            encoding=encoding,
        )

    def _broadcast(
        self,
        gather: Gather,
        device: torch.device | None,
        *,
        parameters: Callable[[], Iterable[torch.Tensor]],
        module: nn.Module | None = None,
        blocking: bool,
        version: int | None,
        encoding: Encoding = "dense",
        merged: bool = False,
    ) -> Receipt | PendingBroadcast:
        if not blocking and zero3.steps_by_itself(module, parameters()):
            raise ConfigError(
                "blocking=False needs an optimizer step that can be made to wait, and DeepSpeed's ZeRO has "
                "none (while DeepSpeed is in use, tensors by name may be its own); call with blocking=True, "
                "or hand copies over by bridge.round(blocking=False)"
            )
        self._begin()
        for attempt in range(2):
            servers = self._fleet.ready(device)
            try:
                return self._send(
                    servers,
                    gather,
                    module=module,
                    blocking=blocking,
                    version=version,
                    encoding=encoding,
                    merged=merged,
                )
            except BridgeError:
                # The epoch had ended between two rounds, and the news came during this call.
                if attempt or not self._fleet.stale:
                    raise
        raise AssertionError("unreachable: the second attempt returns or raises")

    def _begin(self) -> None:
        """What comes before every broadcast, on every rank."""
        environment.check_enabled()
        if self._round is not None:
            raise ConfigError("a round is open: end its block before another round or broadcast")
        self._calls += 1  # whatever comes of it: ranks that counted differently would never agree again
        try:
            self._finish_pending()
        except BridgeError as err:
            if self._fleet.agrees:  # which the other ranks are about to do
                self._fleet.refuse(str(err))
            raise

    def _send(
        self,
        servers: list[Server],
        gather: Gather,
        *,
        module: nn.Module | None = None,
        blocking: bool,
        version: int | None,
        encoding: Encoding = "dense",
        merged: bool = False,
    ) -> Receipt | PendingBroadcast:
        try:
            gathered = {server: self._gather(gather, server) for server in servers}
            if any(shards.partial for shards, _ in gathered.values()):
                whole_adapter = any(shards.layout.leading for shards, _ in gathered.values())
                servers = self._fleet.that_take_parts(servers, whole_adapter=whole_adapter)
        except BaseException as err:
            _refuse(servers, str(err) or type(err).__name__)
            raise
        found = [gathered[server] for server in servers]
        holding = [
            tensor
            for shards, guarded in found
            for tensor in ([*shards.owners, *shards.tensors] if guarded.held is None else guarded.held)
        ]
        parts = [(server, gathered[server][0]) for server in servers]
        try:
            job = self._fleet.submit(
                parts, call=self._calls, version=version, encoding=encoding, merged=merged
            )
        except ConfigError as err:  # every rank finds the same
            _refuse(servers, str(err))
            raise
        guarded = Guarded.together([guarded for _, guarded in found])
        self._pending = PendingBroadcast(job, StepGuard(guarded, job, module=module, holding=holding))
        if not blocking:
            return self._pending
        receipt = self._pending.wait()
        self._pending = None
        self._fleet.remember(receipt)
        return receipt

    def _gather(self, gather: Gather, server: Server) -> tuple[LocalShards, Guarded]:
        try:
            return gather(server)
        except BridgeError as err:
            if self._fleet.several:
                raise type(err)(f"server {server.name}: {err}") from err
            raise

    def _finish_pending(self) -> None:
        """Wait for a broadcast that was left under way; raise its error unless its caller has seen it."""
        pending = self._pending
        if pending is None:
            return
        seen = pending._job.seen
        try:
            receipt = pending.wait()
        except BridgeError:
            if not seen:
                raise
        else:
            self._fleet.remember(receipt)
        finally:
            if pending.done:  # else a signal cut the wait short, and it is under way still
                self._pending = None

    def miss(self, reason: str) -> None:
        """Take no part in the broadcast that the other ranks make; called in its place on this rank.

        Theirs raises ``RoundAborted``, and the servers keep their weights. Without it they would wait.

        Args:
            reason: why, for the other end's log.
        """
        self._begin()
        self._fleet.refuse(reason)

    def send_heartbeat(self) -> None:
        """Send one heartbeat now. Heartbeats are sent by themselves; this one raises if the peer is gone.

        Raises:
            PeerLost: the daemon (or on other ranks trainer rank 0) cannot be reached.
        """
        self._fleet.beat()

    def notify_update(
        self, model: nn.Module | dict[str, torch.Tensor], *, version: int | None = None
    ) -> Receipt:
        """The HTTP fallback: write safetensors to the shared path and announce them; no group is needed.

        Every rank calls it, as full tensors are gathered one at a time; rank 0 writes and posts. It knows no
        declared layout: plain tensors must be whole, and as the server has them.

        Raises:
            ConfigError: no ``http_url`` or ``update_dir`` is configured.
            RoundAborted: the server refused the update; carries its reason.
        """
        from bridge.fallback import notify_update

        return notify_update(self.config, model, self._own_ranks(), version=version)

    def close(self) -> None:
        """Leave in order; the server goes on serving. Idempotent.

        Raises:
            BridgeError: a broadcast with ``blocking=False`` failed, and nobody had asked for its outcome.
        """
        pending = self._pending
        try:
            self._finish_pending()
        finally:
            self._fleet.close()
            if pending is not None:
                pending.unguard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _refuse(servers: Iterable[Server], reason: str) -> None:
    """This rank cannot take part: end the epochs for everyone, so that nobody waits for it."""
    for server in servers:
        server.session.refuse_round(reason)


def _mode(
    adapters: Adapters | None,
    *,
    adapters_only: bool,
    layout: DeclaredLayout | None,
    names: tuple[str | None, str | None],
) -> Adapters | None:
    """What becomes of adapters; every rank finds it alike."""
    if adapters not in (None, *get_args(Adapters)):
        raise ConfigError(
            f"adapters is {adapters!r}; it must be 'merge' or 'only', or None where there are none"
        )
    if adapters_only and adapters == "merge":
        raise ConfigError("adapters_only=True sends adapters by themselves, adapters='merge' does not")
    mode: Adapters | None = "only" if adapters_only else adapters
    if mode != "only" and any(name is not None for name in names):
        raise ConfigError("adapter and served_as say which adapter is sent by itself: with adapters='only'")
    if mode == "only" and layout is not None:
        raise ConfigError("adapters='only' takes no layout: an adapter's matrices are whole, or DTensors")
    return mode


def _tensors_of(model: Weights) -> Iterable[torch.Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else model.values()
