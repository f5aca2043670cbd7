"""What a node's vLLM processes have published, and the mapping document that follows from it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from bridge.errors import BridgeError, ConfigError, MappingError
from bridge.protocol.legacy_fields import param_mappings
from bridge.protocol.mapping import Mapping, RankMap, Vocabulary
from vllm_patching.channel import Channel
from vllm_patching.control_page import ControlPage


class Wire(Protocol):
    """How a member is told something: its own connection, or the way to its node."""

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None: ...

    def nudge(self, message: dict[str, Any], /) -> bool: ...

    def close(self) -> None: ...


@dataclass(eq=False)  # a process is itself, whatever it says
class Member:
    """One registered process of vLLM: its introduction, its connection and the descriptors it handed over."""

    hello: dict[str, Any]
    channel: Wire
    fds: tuple[int, ...] = ()
    node: int = 0

    @property
    def who(self) -> str:
        engine = self.hello["type"] == "engine"
        name = f"engine core {self.hello['index']}" if engine else f"worker rank {self.hello['rank']}"
        return f"vLLM {name} (pid {self.hello['pid']} on {self.hello['host']})"


@dataclass
class Registry:
    """All members of a node, at the head of several also theirs.

    Guarded by ``lock``; ``on_change`` is called without it.
    """

    on_change: Callable[[], None]
    num_engines: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)
    workers: dict[int, Member] = field(default_factory=dict)
    engines: dict[int, Member] = field(default_factory=dict)
    control: ControlPage | None = None
    found_running: bool = False  # whether vLLM had the page before this daemon was there
    # Told of a new vLLM's page, before any of its processes is answered, and so before it has an API; and of
    # the page that a vLLM has which was there before this daemon.
    on_new_vllm: Callable[[ControlPage], None] = lambda _: None
    on_found_vllm: Callable[[ControlPage], None] = lambda _: None

    def admit(self, hello: dict[str, Any], channel: Channel, fds: tuple[int, ...]) -> Member:
        """Register a worker or an engine core, and answer it with the control page.

        Raises:
            ChannelClosed: it is gone already.
            ConfigError: its hooks are not in place, or it contradicts who is registered already.

        The descriptors of one that was not registered stay the caller's, but for one that ``control`` has.
        """
        missing = [name for name, there in hello["hooks"].items() if not there]
        if missing:
            raise ConfigError(f"{hello['type']} pid {hello['pid']}: not hooked: {', '.join(missing)}")
        with self.lock:
            own, control_fd = self._split(hello, fds)
            member = Member(hello, channel, own)
            try:
                self._register(member, control_fd)
            except BridgeError:
                self._remove(member, keep_fd=control_fd)
                raise
            assert self.control is not None
            if control_fd not in (-1, self.control.fd):
                os.close(control_fd)
        self.on_change()
        return member

    def admit_remote(self, hello: dict[str, Any], channel: Wire, *, node: int) -> Member | None:
        """Register a worker that another node's daemon has answered and keeps the descriptors of.

        Returns:
            None if nobody is here any more who has the control page.

        Raises:
            ConfigError: it contradicts who is registered already.
        """
        with self.lock:
            if self.control is None:
                return None
            member = Member(hello, channel, node=node)
            self._check_place(member, self.workers, hello["rank"], self.control.num_ranks)
            self._check_worker(hello)
            self.workers[hello["rank"]] = member
        self.on_change()
        return member

    def ranks_of(self, node: int) -> list[int]:
        """The inference ranks of one node that are registered now."""
        with self.lock:
            return sorted(rank for rank, worker in self.workers.items() if worker.node == node)

    def _register(self, member: Member, control_fd: int) -> None:
        hello = member.hello
        if self.control is None:
            self.found_running = control_fd >= 0
            if control_fd >= 0:
                self.control = ControlPage(control_fd)
                self.on_found_vllm(self.control)
            else:
                self.control = ControlPage.create(hello["world_size"] * self.num_engines, self.num_engines)
                self.on_new_vllm(self.control)
        elif control_fd >= 0 and not os.path.sameopenfile(control_fd, self.control.fd):
            raise ConfigError(
                f"{member.who} follows another control page than those who came before it, so it would hear "
                "of no commit: a daemon died while vLLM started. The server must be started again"
            )
        if hello["type"] == "engine":
            self._check_place(member, self.engines, hello["index"], self.num_engines)
            self.engines[hello["index"]] = member
        else:
            self._check_place(member, self.workers, hello["rank"], self.control.num_ranks)
            self._check_worker(hello)
            self.workers[hello["rank"]] = member
        # It may have died meanwhile, and nobody watches its connection yet.
        member.channel.send({"type": "welcome"}, () if hello["has_control"] else (self.control.fd,))

    def _split(self, hello: dict[str, Any], fds: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        expected = (hello["descriptors"] if hello["type"] == "worker" else 0) + bool(hello["has_control"])
        if len(fds) != expected:
            raise ConfigError(
                f"{hello['type']} pid {hello['pid']} sent {len(fds)} descriptors, not {expected}"
            )
        return (fds[:-1], fds[-1]) if hello["has_control"] else (fds, -1)

    def _check_place(self, member: Member, others: dict[int, Member], index: int, count: int) -> None:
        if index >= count:
            raise ConfigError(
                f"{member.who} is one more than was expected: {self.num_engines} engine core(s) with "
                f"{member.hello['world_size']} rank(s) each, as the launcher read vLLM's flags; spell "
                "--data-parallel-size out among them"
            )
        other = others.get(index, member)
        if other.hello["pid"] != member.hello["pid"]:
            raise ConfigError(f"{member.who} comes where {other.who} is already: two servers, one --run-dir?")

    def _check_worker(self, hello: dict[str, Any]) -> None:
        for other in self.workers.values():
            for key in ("world_size", "model", "dtype", "vllm_version"):
                if other.hello[key] != hello[key]:
                    raise ConfigError(
                        f"worker rank {hello['rank']} has {key} {hello[key]!r}, "
                        f"{other.who} has {other.hello[key]!r}"
                    )

    def _remove(self, member: Member, *, keep_fd: int = -1) -> None:
        """Take a member out; ``keep_fd`` is not ours to close."""
        for place in (self.engines, self.workers):
            for index in [index for index, other in place.items() if other is member]:
                del place[index]
        if self.control is not None and not self.workers and not self.engines:
            # Nobody is left who maps the page: the next vLLM begins with one of its own. The versions on the
            # old one are not those of its weights.
            if self.control.fd != keep_fd:
                os.close(self.control.fd)
            self.control = None

    def forget(self, member: Member) -> None:
        """A member's connection ended."""
        with self.lock:
            self._remove(member)
        for fd in member.fds:
            os.close(fd)
        member.channel.close()
        self.on_change()

    @property
    def world_size(self) -> int | None:
        """How many workers there will be, of all engines, as soon as anyone has said so."""
        members = [*self.workers.values(), *self.engines.values()]
        return members[0].hello["world_size"] * self.num_engines if members else None

    def members(self) -> list[Member]:
        """Everybody who is registered now, the engines last."""
        with self.lock:
            return [*self.workers.values(), *self.engines.values()]

    @property
    def arenas(self) -> set[str]:
        """The kinds of memory that workers have their weights in."""
        with self.lock:
            return {worker.hello["arena"] for worker in self.workers.values()}

    @property
    def complete(self) -> bool:
        """Whether every worker and every engine is registered."""
        return len(self.engines) == self.num_engines and self.has_all_workers

    @property
    def has_all_workers(self) -> bool:
        """Whether every worker is."""
        return len(self.workers) == self.world_size

    def pids(self) -> dict[str, list[int]]:
        """Process ids for status and messages."""
        with self.lock:
            return {
                "engines": [self.engines[i].hello["pid"] for i in sorted(self.engines)],
                "workers": [self.workers[r].hello["pid"] for r in sorted(self.workers)],
            }

    def mapping(self) -> Mapping:
        """The mapping document of all workers, without rendezvous.

        Raises:
            MappingError: ranks do not agree on the names a trainer may use.
        """
        with self.lock:
            hellos = [self.workers[rank].hello for rank in sorted(self.workers)]
        first = hellos[0]
        for hello in hellos[1:]:
            names = [[s["name"] for s in v["sources"]] for v in hello["vocabularies"]]
            if names != [[s["name"] for s in v["sources"]] for v in first["vocabularies"]]:
                raise MappingError(
                    f"worker ranks {first['rank']} and {hello['rank']} list different parameters"
                )
        ranks = tuple(msgspec.convert(hello["rank_map"], RankMap) for hello in hellos)
        vocabularies = []
        for index, vocabulary in enumerate(msgspec.convert(first["vocabularies"], tuple[Vocabulary, ...])):
            unused = _unused_everywhere(hellos, index)
            tied = {  # of a name that nobody uses; its partner may be on one rank only
                name: kept
                for hello in hellos
                for name, kept in hello["vocabularies"][index].get("tied", {}).items()
                if name in unused and kept not in unused
            }
            vocabularies.append(msgspec.structs.replace(vocabulary, unused=unused, tied=tied))
        return Mapping(
            model=first["model"],
            vllm_version=first["vllm_version"],
            dtype=first["dtype"],
            tp_degree=first["tp_degree"],
            num_inference_ranks=len(ranks),
            vocabularies=tuple(vocabularies),
            ranks=ranks,
            param_mappings=param_mappings(vocabularies[0], ranks),
            omitted_vocabularies=first["omitted_vocabularies"],
        )


def _unused_everywhere(hellos: list[dict[str, Any]], index: int) -> tuple[str, ...]:
    """A name is unused only if no rank uses it: experts and vocabulary slices live on one rank each."""
    sets = [set(hello["vocabularies"][index]["unused"]) for hello in hellos]
    common = set.intersection(*sets)
    return tuple(name for name in hellos[0]["vocabularies"][index]["unused"] if name in common)
