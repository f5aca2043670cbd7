"""Transfers over shared links as fluid flows: rates are max-min fair, found anew when one begins or ends.

A ``Transfer`` stands for any number of flows that are alike; what each link carries of them is said by
``uses``. So a thousand servers that all take the same cost no more than one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Link = Hashable
_TIE = 1e-9  # relative; rates and times closer than this are equal but for rounding
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """Flows of ``nbytes`` each, all alike.

    ``uses`` says by link what one byte of each flow costs it: 1 for a link that one flow crosses, n for one
    that n of them share, and anything else for what is not counted in bytes (seconds of a core per byte).
    The first byte moves ``latency_s`` after the last of the transfers ``after`` (indices) has ended; no flow
    is faster than ``limit`` bytes per second.
    """

    nbytes: float
    uses: tuple[tuple[Link, float], ...]
    after: tuple[int, ...] = ()
    latency_s: float = 0.0
    limit: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """When each transfer's first byte moved and when its last had arrived, in seconds; what links carried."""

    starts: _Array
    ends: _Array
    carried: dict[Link, float]

    @property
    def seconds(self) -> float:
        """Until everything has arrived."""
        return float(self.ends.max(initial=0.0))


class _Incidence:
    """Which transfers use which links, as flat arrays sorted by transfer."""

    def __init__(self, transfers: Sequence[Transfer], links: Mapping[Link, float]) -> None:
        self.names = list(links)
        number = {name: i for i, name in enumerate(self.names)}
        self.capacity = np.array([links[name] for name in self.names], dtype=float)
        counts = [len(t.uses) for t in transfers]
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.link = np.array([number[name] for t in transfers for name, _ in t.uses], dtype=np.int64)
        self.cost = np.array([cost for t in transfers for _, cost in t.uses], dtype=float)
        self.limit = np.array([t.limit for t in transfers], dtype=float)

    def of(self, flows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Places in ``link`` and ``cost`` of these flows, and for each the flow's position in ``flows``."""
        counts = self.first[flows + 1] - self.first[flows]
        owner = np.repeat(np.arange(len(flows)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.first[flows][owner] + within, owner


def fair_rates(incidence: _Incidence, flows: npt.NDArray[np.int64]) -> _Array:
    """Max-min fair rates of ``flows``, bytes per second: all are raised alike until a link is full."""
    places, owner = incidence.of(flows)
    link, cost = incidence.link[places], incidence.cost[places]
    num_links = len(incidence.capacity)
    limit = incidence.limit[flows]
    rates = np.zeros(len(flows))
    free = np.ones(len(flows), dtype=bool)
    room = incidence.capacity.copy()
    while free.any():
        open_uses = free[owner]
        demand = np.bincount(link[open_uses], cost[open_uses], num_links)
        asked = demand > 0
        # An absolute level for all that are still free: the room left to them, shared.
        level = np.full(num_links, np.inf)
        level[asked] = np.maximum(room[asked], 0.0) / demand[asked]
        lowest = min(level.min(initial=np.inf), limit[free].min())
        if not math.isfinite(lowest):
            raise ValueError("a transfer crosses no link and has no limit, so it would take no time")
        full = level <= lowest * (1 + _TIE)
        done = free & (limit <= lowest * (1 + _TIE))
        done[owner[open_uses & full[link]]] = True
        done &= free
        rates[done] = lowest
        free &= ~done
        fixed = done[owner]
        room -= np.bincount(link[fixed], cost[fixed] * lowest, num_links)
    return rates


class _Run:
    """The state of one simulation."""

    def __init__(self, links: Mapping[Link, float], transfers: Sequence[Transfer], resolution: float) -> None:
        self._transfers, self._resolution = transfers, resolution
        self.incidence = _Incidence(transfers, links)
        self.now = 0.0
        self.starts, self.ends = np.full(len(transfers), np.nan), np.full(len(transfers), np.nan)
        self.left = np.array([t.nbytes for t in transfers], dtype=float)
        self.moved = np.zeros(len(transfers))
        self.active = np.empty(0, dtype=np.int64)
        self._waiting = [len(set(t.after)) for t in transfers]
        self._followers: list[list[int]] = [[] for _ in transfers]
        for index, transfer in enumerate(transfers):
            for before in set(transfer.after):
                self._followers[before].append(index)
        self.due = [(t.latency_s, i) for i, t in enumerate(transfers) if not t.after]
        heapq.heapify(self.due)

    def begin(self) -> None:
        """Let those start whose time has come."""
        begun = []
        while self.due and self.due[0][0] <= self.now * (1 + _TIE):
            _, index = heapq.heappop(self.due)
            self.starts[index] = self.now
            if self.left[index] > 0:
                begun.append(index)
            else:
                self._end(index)
        if begun:
            self.active = np.concatenate([self.active, np.array(begun, dtype=np.int64)])

    def advance(self) -> None:
        """Move bytes until one ends or another is due."""
        until = self.due[0][0] - self.now if self.due else math.inf
        if not len(self.active):
            self.now += until
            return
        rates = fair_rates(self.incidence, self.active)
        times = self.left[self.active] / rates
        step = float(times.min())
        if step <= until:
            over = times <= step * (1 + _TIE) + self._resolution * (self.now + step)
        else:
            step, over = until, np.zeros(len(self.active), dtype=bool)
        self.now += step
        self.left[self.active] -= rates * step
        self.moved[self.active] += rates * step
        for index in self.active[over].tolist():
            self.left[index] = 0.0
            self._end(index)
        self.active = self.active[~over]

    def _end(self, index: int) -> None:
        self.ends[index] = self.now
        for follower in self._followers[index]:
            self._waiting[follower] -= 1
            if not self._waiting[follower]:
                heapq.heappush(self.due, (self.now + self._transfers[follower].latency_s, follower))


def simulate(
    links: Mapping[Link, float], transfers: Sequence[Transfer], *, resolution: float = 0.0
) -> Outcome:
    """Let all transfers happen.

    Args:
        links: capacity of each, in bytes per second (or what its ``uses`` are counted in, per second).
        transfers: ``after`` may name later ones too.
        resolution: transfers that would end within this share of the time passed so far end together, so
            that many that are nearly alike take few steps. Their last bytes arrive early by as much.

    Raises:
        ValueError: a link has no capacity, or transfers wait for each other in a circle.
    """
    if bad := [name for name, capacity in links.items() if not capacity > 0]:
        raise ValueError(f"links without capacity: {bad}")
    run = _Run(links, transfers, resolution)
    while run.due or len(run.active):
        run.begin()
        if run.due or len(run.active):
            run.advance()
    if np.isnan(run.ends).any():
        stuck = np.flatnonzero(np.isnan(run.ends))
        raise ValueError(f"{len(stuck)} transfers wait for each other, from number {stuck[0]} on")
    incidence = run.incidence
    carried = np.bincount(
        incidence.link,
        incidence.cost * np.repeat(run.moved, np.diff(incidence.first)),
        len(incidence.names),
    )
    return Outcome(run.starts, run.ends, dict(zip(incidence.names, carried.tolist(), strict=True)))
