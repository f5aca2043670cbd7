"""What can happen to the daemon: all of it arrives in its one queue, as one of these or a crew's Report."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

from bridge.wire import rendezvous
from bridge.wire.control import Event
from vllm_patching.epoch import Epoch

ASKED = "shutdown requested"


@dataclass(frozen=True)
class Requested:
    """A trainer asks to be admitted."""

    request: rendezvous.Request


@dataclass(frozen=True)
class Heard:
    """Something came on an epoch's control group; of an earlier epoch, it is ignored."""

    epoch: Epoch
    event: Event


@dataclass(frozen=True)
class Notified:
    """Somebody announces an update file; ``reply`` takes the answer."""

    path: str
    version: int | None
    reply: queue.Queue[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """Another server's daemon asks for the version that is live here."""

    loan: rendezvous.Loan


@dataclass(frozen=True)
class Learned:
    """A peer serves this version, so it is the newest of ours too."""

    version: int


@dataclass(frozen=True)
class PeersAsked:
    """Nobody is asked any more, or for now; behind whatever was learned of them."""

    question: threading.Event


@dataclass(frozen=True)
class LookAgain:
    """Time has passed, in which something may have changed of which nobody tells."""


@dataclass(frozen=True)
class Lost:
    """A vLLM process is gone."""

    who: str


@dataclass(frozen=True)
class NodeFailed:
    """Another node's part of the server is gone for good, and the server with it."""

    why: str


@dataclass(frozen=True)
class Broken:
    """The daemon cannot do its work any more, as of a thread that has ended; the launcher starts another."""

    why: str


@dataclass(frozen=True)
class Stop:
    """The daemon is to end; ``final`` if the server ends with it, as none will be started again."""

    why: str
    final: bool = False
