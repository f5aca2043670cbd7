"""Engines of a mixture of experts that is served data parallel: every step is one forward of all of them.

Their expert layers exchange tokens, so engines with different versions in one step would mix these. vLLM
numbers the steps: a wave begins when any engine gets a request while all rest, and ends on all of them after
the same step; an engine without work runs dummy batches meanwhile. Hence:

* Within a wave an engine takes up a version only where all do: before the wave's first step and every
  ``AGREE_EVERY`` steps, as the highest version that any engine sees requested. Every rank holds that one,
  or the daemon would not have asked for it, so nobody needs to object.
* Between waves an engine commits alone, whenever it sees the word. No forward comes before the agreement that
  begins the next wave, and that brings up whoever has not seen it.
"""

from __future__ import annotations

from typing import Any

from bridge.errors import BridgeError
from vllm_patching import compat
from vllm_patching.engine import EngineBridge, Wrapped

AGREE_EVERY = 4


class LockstepBridge(EngineBridge):
    """Stamps, labels and salts for one engine core of several that step together."""

    def __init__(self, engine: Any, *, salted: bool) -> None:
        super().__init__(engine, salted=salted)
        self._sent = 0  # the newest version that the workers were told by RPC

    def hook(self) -> None:
        super().hook()
        _hook_steps(self.engine, self)

    def hooks(self) -> dict[str, bool]:
        own = ("_process_engine_step", "execute_dummy_batch")
        return super().hooks() | {name: compat.is_wrapped(getattr(self.engine, name)) for name in own}

    def before_schedule(self) -> None:
        """Nothing: ``before_step`` has come before."""

    @property
    def idle(self) -> bool:
        """Whether this engine is in no wave, so that nothing runs before the next agreement."""
        return not compat.runs_wave(self.engine)

    def before_step(self) -> None:
        """Called before each turn of the busy loop; where an agreement is due, waits for the other engines.

        They come to it as they would to the forward behind it.

        Raises:
            BridgeError: the engines do not stand at the same step.
        """
        if self.idle:
            return
        if compat.enter_wave(self.engine) % AGREE_EVERY:
            return
        agreed = compat.highest(self.engine, max(self.requested, self.version))
        if agreed > self.requested:  # read again: the word only grows, and all engines share it
            raise BridgeError(
                f"the engines agreed on version {agreed}, but only {self.requested} was requested: they do "
                "not stand at the same step, so the server must not go on; please report this"
            )
        self.adopt(agreed)

    def before_dummy_batch(self) -> None:
        """Called before a batch that carries no stamp, within a step that other engines run."""
        if self._sent < self.version:
            self.commit_now()

    def commit_now(self) -> None:
        super().commit_now()
        self._sent = self.version

    @property
    def rpc_timeout_s(self) -> float:
        """As for a batch: before a dummy batch the call waits behind forwards that wait for other engines."""
        return compat.execute_timeout_s()


def _hook_steps(engine: Any, bridge: LockstepBridge) -> None:
    def make_step(process_engine_step: Wrapped) -> Wrapped:
        def agreed_step(*args: Any, **kwargs: Any) -> Any:
            bridge.before_step()
            return process_engine_step(*args, **kwargs)

        return agreed_step

    def make_dummy(execute_dummy_batch: Wrapped) -> Wrapped:
        def committed_dummy_batch(*args: Any, **kwargs: Any) -> Any:
            bridge.before_dummy_batch()
            return execute_dummy_batch(*args, **kwargs)

        return committed_dummy_batch

    compat.wrap(engine, "_process_engine_step", make_step)
    compat.wrap(engine, "execute_dummy_batch", make_dummy)
