"""The HTTP fallback's trainer side: safetensors on a shared path, announced to ``/bridge/notify_update``."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from bridge import unsharded
from bridge.config import BridgeConfig
from bridge.environment import Ranks
from bridge.errors import (
    BridgeError,
    ConfigError,
    MappingError,
    ProtocolError,
    RendezvousError,
    RoundAborted,
)
from bridge.job import Receipt
from bridge.names import canonical_names
from bridge.protocol import mapping as mapping_file
from bridge.protocol.decoding import UNREADABLE
from bridge.protocol.mapping import Mapping
from bridge.sharding import memory_of

logger = logging.getLogger(__name__)

HTTP_TIMEOUT_S = 900.0
OUTCOME_BYTES = 4096
ANSWER_BYTES = 1 << 20


def notify_update(
    config: BridgeConfig, model: nn.Module | dict[str, torch.Tensor], ranks: Ranks, *, version: int | None
) -> Receipt:
    """Write the whole model below ``config.update_dir`` and let the server stage it from there.

    See ``Bridge.notify_update``.
    """
    url, directory = config.http_url, config.update_path()
    if not url:
        raise ConfigError("notify_update needs http_url (BRIDGE_HTTP_URL), such as http://host:8000")
    start = time.monotonic()
    keep = ranks.rank == 0
    tensors = gather_full(model, keep=keep, mapping=_reachable_mapping(config) if keep else None)
    if ranks.rank != 0:
        return _read_outcome(_share(b""))
    outcome: Receipt | str = "trainer rank 0 did not get as far as announcing the update"
    try:
        outcome = _announce(config, url, directory, tensors, version, start)
    except BridgeError as err:
        outcome = str(err)
        raise
    finally:
        if ranks.world_size > 1:
            _share(_outcome(outcome))
    return outcome


def _announce(
    config: BridgeConfig,
    url: str,
    directory: Path,
    tensors: dict[str, torch.Tensor],
    version: int | None,
    start: float,
) -> Receipt:
    """Rank 0's part: write, post, and clean up."""
    folder = directory / f"update-{os.getpid()}-{time.monotonic_ns()}"
    try:
        _write(folder, tensors)
        answer = post(url, config, {"path": str(folder), "version": version})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return msgspec.structs.replace(answer.round, total_s=time.monotonic() - start)


def _share(data: bytes) -> bytes:
    """Give every rank rank 0's outcome, over the trainer's own default group."""
    data = data.ljust(OUTCOME_BYTES)[:OUTCOME_BYTES]
    on_cpu = any(name in str(dist.get_backend()) for name in ("gloo", "cpu"))
    device = torch.device("cpu") if on_cpu else torch.device("cuda")
    wire = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    dist.broadcast(wire, src=0)
    return wire.cpu().numpy().tobytes()


def _outcome(outcome: Receipt | str) -> bytes:
    """As it is shared. A path in an error may be no UTF-8, and only then is the error another text."""
    if isinstance(outcome, str):
        outcome = outcome.encode(errors="replace").decode()
    return msgspec.json.encode(outcome)


def _read_outcome(data: bytes) -> Receipt:
    """What rank 0 has shared.

    Raises:
        RoundAborted: it has no receipt; carries its reason.
        ProtocolError: it is neither receipt nor reason.
    """
    try:
        outcome = msgspec.json.decode(data, type=Receipt | str)
    except UNREADABLE as err:
        if not data.startswith(b'"'):
            raise ProtocolError(
                f"trainer rank 0 told its outcome by {len(data)} bytes that are neither a receipt nor a "
                f"reason ({err}): {data[:80]!r}; whether the update is live, status tells"
            ) from err
        outcome = data[1:].decode(errors="replace")  # a reason longer than the message
    if isinstance(outcome, str):
        raise RoundAborted(f"trainer rank 0's update was not committed: {outcome}")
    return outcome


def _reachable_mapping(config: BridgeConfig) -> Mapping | None:
    """The server's mapping, or None where this host cannot see it: with an API key nothing else needs it."""
    try:
        return mapping_file.load(config.mapping_path())
    except (ConfigError, MappingError) as err:
        logger.info("no mapping to choose by, so the update carries every tensor of the model: %s", err)
        return None


def gather_full(
    model: nn.Module | dict[str, torch.Tensor], *, keep: bool, mapping: Mapping | None = None
) -> dict[str, torch.Tensor]:
    """Full tensors by checkpoint name, one gathered at a time; kept (copied) on one rank only.

    Every rank gathers every tensor, since gathering is collective; what is kept is only what the server
    loads. Without a ``mapping`` that is every tensor, tied ones under their first name.
    """
    named = canonical_names(model) if isinstance(model, nn.Module) else model
    copies = unsharded.memory()
    if faults := [f"{n}: {unsharded.FAULT}" for n, t in named.items() if unsharded.is_copy(t, copies)]:
        raise MappingError("\n  ".join([f"{len(faults)} fault(s), and nothing was sent:", *faults]))
    chosen = _choose(named, mapping) if keep else frozenset()
    kept = {}
    for name, tensor in named.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in chosen:
            kept[name] = full.detach().cpu().clone().contiguous()
    return kept


def _choose(named: dict[str, torch.Tensor], mapping: Mapping | None) -> frozenset[str]:
    """The names to send: those of the vocabulary that fits them best, each tied tensor once.

    Where several do, the server says so. A tensor that it knows by no name is sent under its first name, for
    the server to refuse by name.
    """
    ties: dict[object, list[str]] = {}
    for name, tensor in named.items():
        ties.setdefault(memory_of(tensor), []).append(name)
    if mapping is None:
        return frozenset(names[0] for names in ties.values())
    best, _ = mapping_file.matching(mapping, named, lambda s: tuple(named[s.name].shape) == s.shape)
    unused = frozenset(best.unused)
    needed = {source.name for source in best.sources} - unused
    chosen: set[str] = set()
    for names in ties.values():
        wanted = needed.intersection(names)
        # A second tensor where the server has one goes along, for the server to compare.
        chosen |= wanted or ({names[0]} if unused.isdisjoint(names) else best.tied.keys() & set(names))
    return frozenset(chosen)


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> int:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Posted(msgspec.Struct, frozen=True):
    """The server's answer to an update that is live."""

    round: Receipt


def post(url: str, config: BridgeConfig, body: dict[str, Any]) -> Posted:
    """POST to the server's ``/bridge/notify_update``.

    Raises:
        RendezvousError: nobody answers at ``url``, or somebody else.
        RoundAborted: the server refused; carries its reason.
    """
    token = config.api_key or _secret(config)
    request = urllib.request.Request(
        f"{url.rstrip('/')}/bridge/notify_update",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            answer = response.read(ANSWER_BYTES)
    except urllib.error.HTTPError as err:
        with err:
            raise RoundAborted(f"{url} refused the update ({err.code}): {_reason_of(err)}") from err
    except (OSError, http.client.HTTPException) as err:
        raise RendezvousError(f"no server answers at {url}: {err!r}") from err
    return _read_answer(url, answer)


def _reason_of(err: urllib.error.HTTPError) -> str:
    try:
        return err.read(ANSWER_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"and did not say why ({broken!r})"


def _read_answer(url: str, answer: bytes) -> Posted:
    try:
        return msgspec.json.decode(answer, type=Posted)
    except UNREADABLE as err:
        raise RendezvousError(
            f"{url} answered with {len(answer)} bytes that are no receipt of a bridge: {err}; whether the "
            "update is live, status tells"
        ) from err


def _secret(config: BridgeConfig) -> str:
    place = mapping_file.load(config.mapping_path()).rendezvous
    if place is None:
        raise ConfigError("no api_key is configured, and the mapping file carries no secret")
    return place.secret
