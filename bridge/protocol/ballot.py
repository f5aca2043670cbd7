"""Which servers a version is committed on, where one trainer feeds several. No clock, no thread.

A server votes by staging the version or by failing to. The verdict comes once, and is final: whoever is told
to commit holds the whole version.

==============  ===============================================================================
policy          verdict
==============  ===============================================================================
``all``         commit on all once all have staged; the first failure gives the version up on all
``available``   commit on those that staged, once nobody is left to wait for
==============  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Policy = Literal["all", "available"]
GIVEN_UP = "given up because of"


class Verdict(msgspec.Struct, frozen=True):
    """``commit`` on these servers; the others that still take part give up, for the ``reason``."""

    commit: tuple[str, ...]
    give_up: tuple[str, ...]
    reason: str = ""


class Ballot:
    """One version's votes, by server. Each method returns the verdict if the event decides it."""

    def __init__(self, servers: Iterable[str], policy: Policy) -> None:
        self._policy = policy
        self._waiting = dict.fromkeys(servers)
        self._staged: dict[str, None] = {}
        self._decided = False

    def staged(self, server: str) -> Verdict | None:
        """``server`` holds the whole version."""
        if server in self._waiting:
            del self._waiting[server]
            self._staged[server] = None
        return self._decide_if_complete()

    def failed(self, server: str, *, hopeless: bool = False) -> Verdict | None:
        """``server`` will not take the version; ``hopeless``: nobody should, by the trainer's own fault."""
        self._waiting.pop(server, None)
        self._staged.pop(server, None)
        if hopeless or self._policy == "all":
            return self._decide((), (*self._staged, *self._waiting), f"{GIVEN_UP} {server}")
        return self._decide_if_complete()

    def expired(self, waited_s: float) -> Verdict | None:
        """Those that staged have waited long enough for the others; with ``all`` they go on waiting."""
        if self._policy == "all" or not self._staged:
            return None
        reason = f"not staged {waited_s:g} s after another server was"
        return self._decide(tuple(self._staged), tuple(self._waiting), reason)

    def _decide_if_complete(self) -> Verdict | None:
        return None if self._waiting else self._decide(tuple(self._staged), ())

    def _decide(self, commit: tuple[str, ...], give_up: tuple[str, ...], reason: str = "") -> Verdict | None:
        if self._decided:
            return None
        self._decided = True
        return Verdict(commit, give_up, reason)
