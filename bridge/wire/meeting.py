"""What the ranks of one epoch tell each other through the store: layouts, plans and how to reach memory.

Keys live below ``e<epoch>/``. A layout is stored once per digest, so a round of the same model costs no
more than naming the joint layout it uses.

Whoever reaches the daemon's port can write to its store, so every value is signed with the job's secret and
with its key: nobody without the secret can say where memory is to be read, and no value counts elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import blake3
import msgspec
import torch.distributed as dist

from bridge.errors import PeerLost, RendezvousError, RendezvousRefused, TransferError
from bridge.protocol.mapping import Mapping
from bridge.protocol.messages import DIGEST_BYTES
from bridge.protocol.plan import Layout, Plan, build_plan
from bridge.wire.peer_memory import Whereabouts
from bridge.wire.rendezvous import Store, fetch, seal, unseal

T = TypeVar("T")
KEPT_PLANS = 4  # a training run has one, or two; but each patch has one of its own
# By the second round behind a layout's, every rank has read it. Patches hardly come again; others may.
KEPT_PATCHES, KEPT_LAYOUTS = 2, KEPT_PLANS


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What BEGIN refers to: whose layouts are in force, whether the round carries every source, and how."""

    layouts: tuple[bytes, ...]
    partial: bool
    encoding: str
    bucket_bytes: int


class Meeting:
    """One process's view of an epoch's shared keys."""

    def __init__(self, store: Store, mapping: Mapping, *, epoch: int, timeout_s: float) -> None:
        self._store = store
        self._mapping = mapping
        self._epoch = epoch
        self._timeout_s = timeout_s
        store.set_timeout(timedelta(seconds=timeout_s))  # whatever it was for whoever asked to be let in
        self._secret = mapping.rendezvous.secret if mapping.rendezvous is not None else ""
        self._plans: dict[str, tuple[Plan, tuple[Layout, ...], Round]] = {}
        self._published: set[bytes] = set()
        self._patches: list[bytes] = []
        self._layouts: list[bytes] = []
        self._parts: list[str] = []
        self._last: tuple[Layout | None, bytes] = (None, b"")

    def _key(self, *parts: object) -> str:
        return "/".join([f"e{self._epoch}", *map(str, parts)])

    def _set(self, key: str, value: msgspec.Struct | list[str] | list[int]) -> None:
        sealed = seal(value, f"{self._secret}/{key}")
        try:
            self._store.set(key, sealed)  # type: ignore[arg-type]  # bytes too, the stub says str
        except (RuntimeError, dist.DistError) as err:
            raise PeerLost(f"the daemon's store is gone (setting {key}): {err}") from err

    def _delete(self, key: str) -> None:
        try:
            self._store.delete_key(key)
        except (RuntimeError, dist.DistError) as err:
            raise PeerLost(f"the daemon's store is gone (deleting {key}): {err}") from err

    def _get(self, key: str, what: str, kind: type[T]) -> T:
        try:
            sealed = fetch(self._store, key, timeout_s=self._timeout_s, what=what)
            return unseal(sealed, f"{self._secret}/{key}", kind)
        except RendezvousRefused as err:
            raise TransferError(f"waiting for {what}, found something else at {key}: {err}") from err
        except RendezvousError as err:
            raise TransferError(str(err)) from err

    def publish_layout(self, layout: Layout) -> bytes:
        """Store a trainer rank's layout; returns its digest."""
        if layout is self._last[0]:  # as in every round of an unchanged model
            return self._last[1]
        data = msgspec.msgpack.encode(layout)
        digest = blake3.blake3(data).digest(DIGEST_BYTES)
        if digest not in self._published:
            self._set(self._key("layout", digest.hex()), layout)
            self._published.add(digest)
        self._forget_layouts(layout, digest)
        self._last = layout, digest
        return digest

    def _forget_layouts(self, layout: Layout, latest: bytes) -> None:
        """Let the daemon's store go of earlier ones: patches and rounds of parts may each have their own."""
        kept, count = (self._patches, KEPT_PATCHES) if layout.patches else (self._layouts, KEPT_LAYOUTS)
        for old in _outlived(kept, latest, count):
            self._published.discard(old)
            self._delete(self._key("layout", old.hex()))

    def publish_sums(self, call: int, rank: int, sums: list[int]) -> None:
        """A trainer rank says what each of its shards adds up to, for the round of one call."""
        self._set(self._key("sums", call, rank), sums)

    def take_sums(self, call: int, rank: int) -> list[int]:
        """What a rank has said of its shards before it was ready; nobody asks for it again."""
        key = self._key("sums", call, rank)
        found = self._get(key, f"trainer rank {rank} to say what its shards add up to", list[int])
        self._delete(key)
        return found

    def publish_round(
        self, layouts: Sequence[bytes], *, partial: bool, encoding: str, bucket_bytes: int
    ) -> str:
        """Store the joint layout (trainer rank 0); returns the key that BEGIN carries."""
        description = Round(
            layouts=tuple(layouts), partial=partial, encoding=encoding, bucket_bytes=bucket_bytes
        )
        joint = blake3.blake3(msgspec.msgpack.encode(description)).hexdigest(DIGEST_BYTES)
        if joint not in self._plans:
            self._set(self._key("round", joint), description)
            if partial:
                self._forget_parts(joint)
        return joint

    def _forget_parts(self, latest: str) -> None:
        """As ``_forget_layouts``, of the joint layouts of parts."""
        for old in _outlived(self._parts, latest, KEPT_PATCHES):
            self._delete(self._key("round", old))

    def plan(self, joint: str) -> tuple[Plan, tuple[Layout, ...], Round]:
        """The plan of a joint layout, computed here and kept for a while; every rank gets the same."""
        if joint not in self._plans:
            description = self._get(self._key("round", joint), "trainer rank 0's joint layout", Round)
            layouts = tuple(
                self._get(self._key("layout", digest.hex()), f"trainer rank {rank}'s layout", Layout)
                for rank, digest in enumerate(description.layouts)
            )
            only = frozenset().union(*(lay.named for lay in layouts)) if description.partial else None
            plan = build_plan(self._mapping, layouts, bucket_bytes=description.bucket_bytes, only=only)
            while len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[joint] = (plan, layouts, description)
        self._plans[joint] = self._plans.pop(
            joint
        )  # the one that was not used for the longest time goes first
        return self._plans[joint]

    def publish_whereabouts(self, trainer: int, whereabouts: Whereabouts) -> None:
        """A trainer rank says where its memory is."""
        self._set(self._key("where", trainer), whereabouts)

    def whereabouts(self, trainer: int) -> Whereabouts:
        """Wait for a trainer rank's whereabouts."""
        what = f"trainer rank {trainer} to say where it is"
        return self._get(self._key("where", trainer), what, Whereabouts)

    def publish_links(self, inference: int, links: Sequence[str]) -> None:
        """An updater says by which transport it takes each trainer rank's buckets."""
        self._set(self._key("links", inference), list(links))

    def links(self, inference: int) -> list[str]:
        """Wait for an updater's choice of transports, by trainer rank."""
        what = f"updater {inference} to choose transports"
        return self._get(self._key("links", inference), what, list[str])


def _outlived(kept: list[T], latest: T, count: int) -> list[T]:
    """Put ``latest`` last among ``kept``; those beyond ``count`` come out, and are returned."""
    kept[:] = [*(known for known in kept if known != latest), latest]
    old = kept[:-count]
    del kept[:-count]
    return old
