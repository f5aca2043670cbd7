"""How a trainer rank comes into an epoch: it is admitted, says where its memory is, and joins the groups."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bridge import flight
from bridge.config import BridgeConfig
from bridge.environment import Ranks, job_attempt
from bridge.errors import (
    ConfigError,
    DeviceError,
    MappingError,
    PeerLost,
    RendezvousError,
    RendezvousRefused,
)
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import Mapping, Rendezvous
from bridge.protocol.messages import PROTOCOL_VERSION
from bridge.wire import nccl, peer_memory, rendezvous, sockets
from bridge.wire.device_memory import DeviceNonce
from bridge.wire.meeting import Meeting
from bridge.wire.stores import GRACE_S

logger = logging.getLogger(__name__)

RETRY_S = 0.5
LENDER_RETRY_S = 1.0  # it may stand at the door for long, beside a server that generates
_beside: tuple[object, dist.ProcessGroup] | None = None  # the default group, and ours of the same ranks
_answers: list[dist.Work] = []  # of rank 0, to the others' last call of ``highest``
IMPATIENT_S = 5.0
RANKS_TAG = 9
CAME = 1
SESSION = ">4I"  # 16 bytes, as numbers that ``highest`` can carry


class RankMissing(PeerLost):
    """A rank of the trainer's own, without which no server can be met."""


@dataclass(frozen=True)
class Joined:
    """What a trainer rank has once it has met the others.

    ``peers`` names the control ranks this one talks to; ``links`` has the transport of each inference
    rank.
    The nonces are only kept alive: updaters may probe for them as long as the epoch lasts.
    """

    control: rendezvous.Group
    data: rendezvous.Group
    peers: dict[int, str]
    links: list[str]
    nonce: peer_memory.Nonce
    device_nonce: DeviceNonce | None


def ask_admission(
    config: BridgeConfig, ranks: Ranks, *, trainer: str = "", patient: bool = True, restores: int = 0
) -> tuple[Mapping, rendezvous.Answer, rendezvous.Store]:
    """Rank 0 asks the daemon, the others read its answer; called by every trainer rank.

    A daemon that is being restarted publishes another rendezvous, so rank 0 reads the mapping anew for every
    try, for as long as ``config.connect_timeout_s``. If not ``patient``, for a server without which a round
    would go on, it tries once, and no step of it takes longer than ``IMPATIENT_S``. ``trainer`` and
    ``restores`` are as in ``Request``.

    Returns:
        The mapping, the answer, and a connection to the daemon's store.

    Raises:
        MappingError: the mapping is damaged, or was exported without a rendezvous.
        RendezvousError: there is no mapping in time, or the daemon cannot be reached in time, or refuses.
        RankMissing: another trainer rank did not come.
    """
    timeout_s = config.connect_timeout_s if patient else min(IMPATIENT_S, config.connect_timeout_s)
    session = ""
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            mapping, store, session, answer = _ask_until_answered(
                config, ranks, timeout_s, again=patient, trainer=trainer, restores=restores
            )
        except Exception as err:  # noqa: BLE001 - raised below; until then the other ranks wait for us
            failure = err
    try:
        # The others wait for all the steps of a try: connecting, a greeting of two, asking, the answer.
        session = _agree(session, ranks, timeout_s=config.ranks_timeout_s + 5 * (timeout_s + GRACE_S))
        if failure is not None:
            raise failure
    finally:
        del failure  # or it and this frame, by its traceback, keep each other, and the store with them
    if not session:
        raise RendezvousError("trainer rank 0 could not join the inference side; its error says why")
    if ranks.rank != 0:
        mapping, place = _load(config)
        store = rendezvous.reach_store(place.host, place.port, timeout_s=timeout_s)
        answer = rendezvous.await_answer(store, session, place.secret, timeout_s=timeout_s)
    return mapping, answer, store


def _load(config: BridgeConfig) -> tuple[Mapping, Rendezvous]:
    path = config.mapping_path()
    if not path.exists():  # it is written once vLLM is complete
        raise RendezvousError(
            f"there is no mapping at {path}: the server is not ready yet, or its log directory is another "
            "one, or not on a file system that this host sees"
        )
    mapping = mapping_file.load(path)
    if mapping.rendezvous is None:
        raise MappingError(
            f"{path} names no rendezvous: it is an exported copy; use the one in the server's log directory"
        )
    return mapping, mapping.rendezvous


def _ask_until_answered(
    config: BridgeConfig, ranks: Ranks, timeout_s: float, *, again: bool, trainer: str, restores: int
) -> tuple[Mapping, rendezvous.Store, str, rendezvous.Answer]:
    deadline, retry_s = time.monotonic() + timeout_s, LENDER_RETRY_S if restores else RETRY_S
    while True:
        left = max(retry_s, deadline - time.monotonic()) if again else timeout_s
        try:
            mapping, place = _load(config)
            store = rendezvous.reach_store(place.host, place.port, timeout_s=left)
            session, answer = _ask(store, place, mapping, ranks, left, trainer=trainer, restores=restores)
        except RendezvousRefused:
            raise
        except RendezvousError as err:
            if not again or time.monotonic() + retry_s >= deadline:
                raise
            logger.info("trying again: %s", err)
            threading.Event().wait(retry_s)
        else:
            return mapping, store, session, answer


def _ask(
    store: rendezvous.Store,
    place: Rendezvous,
    mapping: Mapping,
    ranks: Ranks,
    timeout_s: float,
    *,
    trainer: str,
    restores: int,
) -> tuple[str, rendezvous.Answer]:
    session = secrets.token_hex(16)
    job, attempt = ("", 0) if restores else job_attempt()
    request = rendezvous.Request(
        session=session,
        protocol_version=PROTOCOL_VERSION,
        world_size=ranks.world_size,
        mapping_digest=mapping.digest,
        host=socket.gethostname(),
        pid=os.getpid(),
        trainer=trainer,
        asked_ns=time.monotonic_ns(),
        restores=restores,
        job=job,
        attempt=attempt,
    )
    rendezvous.ask(store, request, place.secret, timeout_s=timeout_s)
    try:
        return session, rendezvous.await_answer(store, session, place.secret, timeout_s=timeout_s)
    except RendezvousError:
        rendezvous.withdraw(store, session)
        raise


def _agree(session: str, ranks: Ranks, *, timeout_s: float) -> str:
    """Give every trainer rank rank 0's session id; "" is a failure. The others pass ""."""
    words = struct.unpack(SESSION, bytes.fromhex(session).ljust(16, b"\0"))
    agreed = highest(words, ranks, timeout_s=timeout_s)
    return struct.pack(SESSION, *agreed).hex() if any(agreed) else ""


def any_rank(flag: bool, ranks: Ranks, *, timeout_s: float) -> bool:
    """Whether ``flag`` is set on any trainer rank; raises as ``highest`` does."""
    return bool(highest([int(flag)], ranks, timeout_s=timeout_s)[0])


def highest(
    values: Sequence[int],
    ranks: Ranks,
    *,
    timeout_s: float,
    tell: Callable[[Callable[[], list[int]]], None] = lambda _: None,
) -> list[int]:
    """The highest of each of the ``values`` on any trainer rank; every rank calls it.

    Rank 0 collects them and answers, for only who waits for each rank by itself knows which did not come.

    Args:
        tell: on rank 0 called with a function, for any thread, that says which ranks have not come by then.

    Raises:
        RankMissing: a rank is gone, or has not called it within ``timeout_s``; rank 0's error names it. The
            next call begins anew, on all ranks alike.
    """
    if ranks.world_size == 1:
        return list(values)
    flight.note("waits", what="the trainer's own ranks", rank=ranks.rank, ranks=ranks.world_size)
    missing: list[int] = []
    try:
        group = _own_group(timeout_s)
        if ranks.rank == 0:
            return _collect(group, values, ranks.world_size, timeout_s, missing, tell)
        return _hand_in(group, values, timeout_s)
    except RuntimeError as err:
        _leave_own_group()
        who = (
            f"trainer rank(s) {missing} did not come"
            if missing
            else "rank 0 did not answer: it, or a rank that its own error names, did not come"
        )
        raise RankMissing(
            f"the {ranks.world_size} trainer ranks could not agree on the next round (rank {ranks.rank} on "
            f"{socket.gethostname()}, pid {os.getpid()}): {who} within {timeout_s:g} s, or is gone. See what "
            "that rank does; raise BRIDGE_RANKS_TIMEOUT_S if it only comes late "
            f"({rendezvous.first_line(err)})"
        ) from err


def _collect(
    group: dist.ProcessGroup,
    values: Sequence[int],
    world_size: int,
    timeout_s: float,
    missing: list[int],
    tell: Callable[[Callable[[], list[int]]], None],
) -> list[int]:
    """Rank 0's part of ``highest``; puts into ``missing`` who did not come.

    What a rank sends ends with ``CAME``, and Gloo writes it straight into memory that is 0 until then. So one
    can see who has come: a work says so only once it was waited for, and a wait that ends early breaks the
    group.
    """
    deadline = time.monotonic() + timeout_s
    agreed = torch.tensor([*values, CAME], dtype=torch.int64, device="cpu")  # not the caller's default
    theirs = {rank: torch.zeros_like(agreed) for rank in range(1, world_size)}
    coming = {rank: group.recv([wire], rank, RANKS_TAG) for rank, wire in theirs.items()}

    def absent() -> list[int]:
        return [rank for rank, wire in theirs.items() if wire[-1] != CAME]

    tell(absent)
    for rank, work in coming.items():
        try:
            # Never 0, which would be no limit at all.
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:
            # Before the deadline this one is gone, and whoever is only late is not waited for.
            missing += (absent() if time.monotonic() >= deadline else []) or [rank]
            raise
    for wire in theirs.values():
        torch.maximum(agreed, wire, out=agreed)
    # Not waited for: each rank was ready to take it before it said what it had to say, and of one that dies
    # now Gloo might say nothing for as long as the limit is. Kept until the next call, or Gloo would drop it.
    _answers.clear()
    for rank in theirs:
        try:
            _answers.append(group.send([agreed], rank, RANKS_TAG))
        except RuntimeError:
            missing.append(rank)
            raise
    return [int(value) for value in agreed[:-1].tolist()]


def _hand_in(group: dist.ProcessGroup, values: Sequence[int], timeout_s: float) -> list[int]:
    """Any other rank's part of ``highest``."""
    wire = torch.tensor([*values, CAME], dtype=torch.int64, device="cpu")
    agreed = torch.empty_like(wire)
    answer = group.recv([agreed], 0, RANKS_TAG)
    group.send([wire], 0, RANKS_TAG).wait(timedelta(seconds=timeout_s))
    answer.wait(timedelta(seconds=timeout_s))
    return [int(value) for value in agreed[:-1].tolist()]


def _own_group(timeout_s: float) -> dist.ProcessGroup:
    """All trainer ranks, by host memory, in a group of ours that the first call makes.

    What they agree on must not wait for work that a GPU has queued, nor for as long as the trainer's own
    group would; and a wait that failed must not break that group.
    """
    global _beside
    world = dist.group.WORLD
    if _beside is None or _beside[0] is not world:
        _answers.clear()
        before = sockets.opened()
        _beside = (world, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
        # A network that is away between two broadcasts is waited for as long as a rank is.
        sockets.keep_alive(before, lost_after_s=timeout_s)
    return _beside[1]


def _leave_own_group() -> None:
    """A group in which one wait has failed is of no use to anybody; torch keeps it until told otherwise."""
    global _beside
    known, _beside = _beside, None
    _answers.clear()  # each of which keeps the group's sockets
    if known is not None and known[0] is dist.group.WORLD:
        dist.destroy_process_group(known[1])


def meet(
    meeting: Meeting,
    mapping: Mapping,
    ranks: Ranks,
    answer: rendezvous.Answer,
    store: rendezvous.Store,
    *,
    device: torch.device | None,
) -> Joined:
    """Form the epoch's groups with the daemon and its updaters, and learn their choice of transports.

    ``device`` is the GPU this rank's weights are on, if they are.

    Raises:
        RendezvousError: not everyone came in time.
        TransferError: a rank or an updater did not say where it is, or how it takes buckets, in time.
    """
    place = mapping.rendezvous
    assert place is not None
    rank, size = ranks.rank, ranks.world_size
    nonce = peer_memory.Nonce()
    peer_memory.allow_reader(answer.daemon_pid)
    device_nonce = _device_nonce(device)
    gpu = None if device_nonce is None else device_nonce.whereabouts(nccl=nccl.version())
    where = nonce.whereabouts(socket.gethostname(), on_gpu=device is not None, gpu=gpu)
    meeting.publish_whereabouts(rank, where)
    address = rendezvous.local_address(place.host, place.port)
    timeout_s = answer.deadline_s * 2
    control = rendezvous.make_group(
        store,
        f"e{answer.epoch}/control",
        rank=rank,
        size=size + answer.num_daemons,
        address=address,
        timeout_s=timeout_s,
        named=rendezvous.members(size, "daemon"),
    )
    data = rendezvous.make_group(
        store,
        f"e{answer.epoch}/data",
        rank=rank,
        size=size + answer.num_inference_ranks,
        address=address,
        timeout_s=timeout_s,
        named=rendezvous.members(size, "the updater of inference rank"),
    )
    links = [meeting.links(k)[rank] for k in range(answer.num_inference_ranks)]
    return Joined(control, data, _peers(meeting, ranks, answer, place), links, nonce, device_nonce)


def _device_nonce(device: torch.device | None) -> DeviceNonce | None:
    """Memory of this rank's GPU for updaters to probe; None without one, or where CUDA shows none."""
    if device is None:
        return None
    try:
        return DeviceNonce(device)
    except (ConfigError, DeviceError) as err:
        logger.warning("updaters cannot read from %s, so its weights go by Gloo: %s", device, err)
        return None


def _peers(meeting: Meeting, ranks: Ranks, answer: rendezvous.Answer, place: Rendezvous) -> dict[int, str]:
    names = {}
    for rank in range(1, ranks.world_size) if ranks.rank == 0 else (0,):
        where = meeting.whereabouts(rank)
        names[rank] = f"trainer rank {rank} (pid {where.pid} on {where.host})"
    if ranks.rank != 0:
        return names
    for index in range(answer.num_daemons):
        pid = answer.daemon_pid
        names[ranks.world_size + index] = f"the weight-updater daemon (pid {pid} at {place.host})"
    return names
