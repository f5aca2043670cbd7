"""What a node's vLLM processes have published, and the mapping document that follows from it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bridge.errors import ConfigError, MappingError
from bridge.protocol.legacy_fields import param_mappings
from bridge.protocol.mapping import Mapping, RankMap, Vocabulary
from vllm_patching.channel import Channel
from vllm_patching.control_page import ControlPage


@dataclass(eq=False)  # a process is itself, whatever it says
class Member:
    """One registered process of vLLM: its introduction, its connection and the descriptors it handed over."""

    hello: dict[str, Any]
    channel: Channel
    fds: tuple[int, ...] = ()

    @property
    def who(self) -> str:
        kind = "engine core" if self.hello["type"] == "engine" else f"worker rank {self.hello['rank']}"
        return f"vLLM {kind} (pid {self.hello['pid']} on {self.hello['host']})"


@dataclass
class Registry:
    """All members of a node. Guarded by ``lock``; ``on_change`` is called without it."""

    on_change: Callable[[], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    workers: dict[int, Member] = field(default_factory=dict)
    engine: Member | None = None
    control: ControlPage | None = None

    def admit(self, hello: dict[str, Any], channel: Channel, fds: tuple[int, ...]) -> Member:
        """Register a worker or the engine, and answer it with the control page.

        Raises:
            ConfigError: its hooks are not in place, or it contradicts who is registered already.
        """
        missing = [name for name, there in hello["hooks"].items() if not there]
        if missing:
            raise ConfigError(f"{hello['type']} pid {hello['pid']}: not hooked: {', '.join(missing)}")
        with self.lock:
            own, control_fd = self._split(hello, fds)
            if self.control is None:
                self.control = (
                    ControlPage(control_fd) if control_fd >= 0 else ControlPage.create(hello["world_size"])
                )
            elif control_fd >= 0:
                os.close(control_fd)
            member = Member(hello, channel, own)
            if hello["type"] == "engine":
                self.engine = member
            else:
                self._check_worker(hello)
                self.workers[hello["rank"]] = member
            answer_fds = () if hello["has_control"] else (self.control.fd,)
            channel.send({"type": "welcome"}, answer_fds)
        self.on_change()
        return member

    def _split(self, hello: dict[str, Any], fds: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        expected = (hello["descriptors"] if hello["type"] == "worker" else 0) + bool(hello["has_control"])
        if len(fds) != expected:
            raise ConfigError(
                f"{hello['type']} pid {hello['pid']} sent {len(fds)} descriptors, not {expected}"
            )
        return (fds[:-1], fds[-1]) if hello["has_control"] else (fds, -1)

    def _check_worker(self, hello: dict[str, Any]) -> None:
        for other in self.workers.values():
            for key in ("world_size", "model", "dtype", "vllm_version"):
                if other.hello[key] != hello[key]:
                    raise ConfigError(
                        f"worker rank {hello['rank']} has {key} {hello[key]!r}, "
                        f"{other.who} has {other.hello[key]!r}"
                    )

    def forget(self, member: Member) -> None:
        """A member's connection ended."""
        with self.lock:
            if self.engine is member:
                self.engine = None
            rank = member.hello.get("rank", -1)
            if self.workers.get(rank) is member:
                del self.workers[rank]
        for fd in member.fds:
            os.close(fd)
        member.channel.close()
        self.on_change()

    @property
    def world_size(self) -> int | None:
        """How many workers there will be, as soon as anyone has said so."""
        members = [*self.workers.values(), *([self.engine] if self.engine else [])]
        return members[0].hello["world_size"] if members else None

    def members(self) -> list[Member]:
        """Everybody who is registered now, the engine last."""
        with self.lock:
            return [*self.workers.values(), *([self.engine] if self.engine else [])]

    @property
    def complete(self) -> bool:
        """Whether every worker and the engine are registered."""
        return self.engine is not None and len(self.workers) == self.world_size

    def pids(self) -> dict[str, Any]:
        """Process ids for status and messages."""
        return {
            "engine": self.engine.hello["pid"] if self.engine else None,
            "workers": [self.workers[r].hello["pid"] for r in sorted(self.workers)],
        }

    def mapping(self) -> Mapping:
        """The mapping document of all workers, without rendezvous.

        Raises:
            MappingError: ranks do not agree on the names a trainer may use.
        """
        hellos = [self.workers[rank].hello for rank in sorted(self.workers)]
        first = hellos[0]
        for hello in hellos[1:]:
            names = [[s["name"] for s in v["sources"]] for v in hello["vocabularies"]]
            if names != [[s["name"] for s in v["sources"]] for v in first["vocabularies"]]:
                raise MappingError(
                    f"worker ranks {first['rank']} and {hello['rank']} list different parameters"
                )
        ranks = tuple(msgspec.convert(hello["rank_map"], RankMap) for hello in hellos)
        vocabularies = tuple(
            msgspec.structs.replace(vocabulary, unused=_unused_everywhere(hellos, index))
            for index, vocabulary in enumerate(msgspec.convert(first["vocabularies"], tuple[Vocabulary, ...]))
        )
        return Mapping(
            model=first["model"],
            vllm_version=first["vllm_version"],
            dtype=first["dtype"],
            tp_degree=first["tp_degree"],
            num_inference_ranks=len(ranks),
            vocabularies=vocabularies,
            ranks=ranks,
            param_mappings=param_mappings(vocabularies[0], ranks),
            omitted_vocabularies=first["omitted_vocabularies"],
        )


def _unused_everywhere(hellos: list[dict[str, Any]], index: int) -> tuple[str, ...]:
    """A name is unused only if no rank uses it: experts and vocabulary slices live on one rank each."""
    sets = [set(hello["vocabularies"][index]["unused"]) for hello in hellos]
    common = set.intersection(*sets)
    return tuple(name for name in hellos[0]["vocabularies"][index]["unused"] if name in common)
