"""The engine's side of ``--staging in-place``: stand still while the live weights are written.

vLLM's own mechanism stops the scheduler and keeps the requests (the state behind ``/pause?mode=keep``). Two
things are added: batches in flight finish on every rank before the stand-still is confirmed, and what vLLM's
user asks for meanwhile by ``/pause`` or ``/resume`` is remembered and takes effect afterwards. Nobody but the
daemon ends a hold.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm_patching import compat
from vllm_patching.control_page import ControlPage, EngineSlot

logger = logging.getLogger(__name__)

QUIESCE_TIMEOUT_S = 30.0


class Hold:
    """Whether one engine core stands still for the daemon; lives in its busy loop's thread."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.control: ControlPage | None = None
        self.slot: EngineSlot | None = None
        self._ticket = 0
        self._wish: Any = None  # the pause state that vLLM's user wants, for afterwards
        self._since_ns = 0

    @property
    def active(self) -> bool:
        """Whether nothing may be scheduled."""
        return self._ticket != 0

    def follow(self) -> None:
        """Stop or go on as the control page says; called between two steps."""
        asked = self._ticket if self.control is None else self.control.hold
        if asked == self._ticket:
            return
        if self.active:
            self._go_on()
        if asked:
            self._since_ns = time.monotonic_ns()
            self._wish = compat.pause_all(self.engine.scheduler)
            self._ticket = asked

    def defers(self, state: Any) -> bool:
        """Whether a pause state that somebody sets now must wait; it is remembered then."""
        if self.active:
            self._wish = state
        return self.active

    def confirm(self) -> None:
        """Called when the engine's loop has nothing left to run: all batches in flight have answered."""
        if not self.active or self.slot is None or self.slot.held == self._ticket:
            return
        quiet = self.engine.model_executor.collective_rpc("bridge_quiesce", timeout=QUIESCE_TIMEOUT_S)
        if all(quiet):  # else a rank has counted a failure, and the daemon ends the engine
            self.slot.held = self._ticket

    def _go_on(self) -> None:
        assert self.slot is not None
        self._ticket = 0
        self.engine.scheduler.set_pause_state(self._wish)
        self.slot.stood_ns = time.monotonic_ns() - self._since_ns
        self.slot.held = 0
