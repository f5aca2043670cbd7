"""What may be said to the daemon over the node's socket, and what each message must carry.

The processes that speak are this user's own, but of whatever release is installed, and may break off
anywhere. A message is checked before anything of it is believed; what is not listed here is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from bridge.errors import ConfigError, ProtocolError
from bridge.protocol import mapping as mapping_file
from bridge.protocol.mapping import RankMap, Vocabulary
from bridge.wire.rendezvous import MAX_RANKS
from vllm_patching.channel import MAX_FDS

_Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
_Pid = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Process(msgspec.Struct, kw_only=True):
    pid: _Pid
    host: str


class _Member(_Process, kw_only=True):
    world_size: _Size
    hooks: dict[str, bool]
    has_control: bool


class EngineHello(_Member, kw_only=True, tag="engine"):
    """An engine core, by its data-parallel index."""

    index: _Index


class WorkerHello(_Member, kw_only=True, tag="worker"):
    """A worker: its rank among all engines' workers, how to get at its halves, and what they hold."""

    rank: _Index
    model: str
    dtype: str
    vllm_version: str
    tp_degree: _Size
    gpu: str
    arena: str
    handles: tuple[str, ...]
    descriptors: Annotated[int, msgspec.Meta(ge=0, le=MAX_FDS)]
    rank_map: RankMap
    vocabularies: Annotated[tuple[Vocabulary, ...], msgspec.Meta(min_length=1)]
    omitted_vocabularies: dict[str, str]


class UpdaterHello(_Process, kw_only=True, tag="updater"):
    """A child of the daemon."""

    rank: _Index


class LenderHello(msgspec.Struct, kw_only=True, tag="lender"):
    """The daemon's helper that sends what is live to another server."""

    pid: _Pid


class StatusRequest(msgspec.Struct, tag="status"):
    """Somebody wants to know how things stand."""


class ShutdownRequest(msgspec.Struct, tag="shutdown"):
    """The launcher asks the daemon to end."""

    why: str | None = None


class UpdateRequest(msgspec.Struct, tag="notify_update"):
    """An update file is there."""

    path: str
    version: int | None = None


class RoundRequest(msgspec.Struct, kw_only=True, tag="await_round"):
    """Somebody waits for a round; see ``FrontDesk``."""

    daemon: int
    ended: _Count
    aborted: _Count
    version: int | None
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Ready(msgspec.Struct, tag="ready"):
    """An updater can take orders."""


class Joined(msgspec.Struct, tag="joined"):
    """It has met the trainers, and takes each one's buckets by the transport named here."""

    links: list[str]


class Poised(msgspec.Struct, tag="poised"):
    """It waits for leave to write."""


class Staged(msgspec.Struct, tag="staged"):
    """It holds the whole version."""

    bytes: _Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    transport: str


class Failed(msgspec.Struct, tag="failed"):
    """It does not."""

    error: str


Hello = EngineHello | WorkerHello
Message = Hello | UpdaterHello | LenderHello | StatusRequest | ShutdownRequest | UpdateRequest | RoundRequest


def check_report(message: dict[str, Any]) -> None:
    """Whether an updater's report can be worked with.

    Raises:
        ProtocolError: it cannot; says which field is missing or wrong.
    """
    try:
        msgspec.convert(message, Ready | Joined | Poised | Staged | Failed)
    except msgspec.ValidationError as err:
        raise ProtocolError(f"cannot make sense of a {message.get('type')!r} report: {err}") from err


def read(message: dict[str, Any]) -> Message:
    """The message as one of the above.

    Raises:
        ProtocolError: it is none of them; says which field is missing or wrong.
        ConfigError: a worker's map contradicts itself; lists how.
    """
    try:
        found: Message = msgspec.convert(message, Message)
    except msgspec.ValidationError as err:
        raise ProtocolError(f"cannot make sense of a {message.get('type')!r} message: {err}") from err
    if isinstance(found, WorkerHello):
        sources = {v.name: v.sources for v in found.vocabularies}
        faults = mapping_file.rank_faults(found.rank_map, sources)
        faults += [f"has no writes for {name}" for name in sources.keys() - found.rank_map.writes.keys()]
        if faults:
            listing = "\n  ".join(faults)
            raise ConfigError(f"worker rank {found.rank} (pid {found.pid}) contradicts itself:\n  {listing}")
    return found
