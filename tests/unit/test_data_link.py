"""A peer that is gone is a ``PeerLost``, whether Gloo says so as a transfer begins or as it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from bridge.errors import PeerLost
from bridge.wire.transport import DataLink

BROKEN = "Read error [127.0.0.1]:6312: Connection reset by peer"


class Broken:
    """A group whose peer has died: seen at once, or only by who waits."""

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once

    def send(self, *_: Any) -> Any:
        if self._at_once:
            raise RuntimeError(BROKEN)
        return self

    recv = send

    def wait(self, _: timedelta) -> None:
        raise RuntimeError(BROKEN)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "use",
    [lambda link, word: link.send(word, 1, "a word"), lambda link, word: link.receive(word, 1, "a word")],
)
def test_a_lost_peer_is_named(at_once: bool, use: Callable[[DataLink, torch.Tensor], None]) -> None:
    group: Any = Broken(at_once=at_once)
    link = DataLink(group, 1, who="updater 0 (pid 7 on h)", timeout_s=3)
    with pytest.raises(PeerLost, match=r"lost updater 0 \(pid 7 on h\) .*Connection reset by peer"):
        use(link, torch.zeros(1))
