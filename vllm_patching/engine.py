"""The engine core's side: which batch carries which version.

The daemon asks for a version by writing one word in the control page, after every rank has staged it. The
engine reads that word before it schedules a batch and stamps the batch: one message queue feeds all ranks in
order, so all of them flip before the same batch, without a drain and without a further message. An
engine that runs no batches is woken and commits by one RPC instead. Engines whose steps are one forward
together agree before they follow the word: ``lockstep.py``.

New requests after a commit must not reuse KV blocks computed under older weights: their prefix-cache salt
names the version, and requests that still wait are given the new salt before the stamped batch is
scheduled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge import flight, telemetry
from bridge.errors import ConfigError, TransferError
from vllm_patching import compat
from vllm_patching.control_page import ControlPage
from vllm_patching.hold import Hold
from vllm_patching.registration import Registration
from vllm_patching.weight_updates import WeightUpdates

logger = logging.getLogger(__name__)

RPC_TIMEOUT_S = 30.0
SCHEDULER_HOOKS = ("schedule", "update_from_output", "set_pause_state")
ENGINE_HOOKS = ("_handle_client_request", "add_request", "_pause_complete", "_notify_idle_state_callbacks")

Wrapped = Callable[..., Any]


class EngineBridge:
    """Stamps, labels and salts for one engine core; lives in its busy loop's thread."""

    def __init__(self, engine: Any, *, salted: bool) -> None:
        self.engine = engine
        self.control: ControlPage | None = None
        self.version = 0
        self._answered = 0  # the version of the newest batch whose tokens have come
        self.salted = salted
        self.hold = Hold(engine)

    def connect(self, control: ControlPage, index: int = 0) -> None:
        """Follow this control page from now on, as the engine core with data-parallel index ``index``."""
        self.control = self.hold.control = control
        self.hold.slot = control.engine(index)

    def hook(self) -> None:
        """Wrap what vLLM's busy loop calls from now on."""
        _hook(self.engine, self)

    def hooks(self) -> dict[str, bool]:
        """Which of vLLM's calls must be wrapped, and whether they are."""
        engine, scheduler = self.engine, self.engine.scheduler
        wrapped = {name: compat.is_wrapped(getattr(engine, name)) for name in ENGINE_HOOKS}
        return wrapped | {name: compat.is_wrapped(getattr(scheduler, name)) for name in SCHEDULER_HOOKS}

    def stamp(self, scheduler_output: Any) -> None:
        """Mark one batch with the version it runs under; workers flip where that is new to them."""
        scheduler_output.bridge_commit = self.version

    @property
    def requested(self) -> int:
        """The version the daemon wants live; ours until it has answered."""
        return self.version if self.control is None else self.control.requested

    def check(self) -> None:
        """Called at both ends of a batch: no token of a batch whose ranks differ may leave.

        The daemon looks for the same while it waits for a commit, but a rank may be late, or the daemon dead.

        Raises:
            TransferError: a rank could not flip, or cannot follow; ends the engine core, and vLLM with it.
        """
        if self.control is not None and (failed := self.control.failed_ranks()):
            why = (
                f"rank(s) {failed} could not flip to version {self.version}, or keep their model in step: "
                "the engine ends; see the worker's error in vllm.log"
            )
            flight.write(why)  # vLLM catches what ends its loop, so nobody else would
            raise TransferError(why)

    def before_schedule(self) -> None:
        """Called before a batch is scheduled, which will be stamped."""
        self.adopt(self.requested)

    def adopt(self, version: int) -> None:
        """Take up ``version`` if it is newer than ours; between two batches."""
        if version <= self.version:
            return
        self.version = version
        telemetry.stand(epoch=None, version=version)
        flight.note("commit asked", version=version)
        if self.salted:
            for request in compat.waiting_requests(self.engine.scheduler):
                self.salt(request)

    def label(self, scheduler_output: Any) -> None:
        """Name the version this batch ran under, for vLLM's own ``WeightVersionSpan`` (0.32 and later)."""
        self.engine._weight_version = str(scheduler_output.bridge_commit)
        if scheduler_output.bridge_commit != self._answered:  # once per version: this runs for every batch
            self._note_done(scheduler_output.bridge_commit, how="the first batch under it has answered")

    def _note_done(self, version: int, *, how: str) -> None:
        self._answered = version
        flight.note("commit done", version=version, how=how)

    def salt(self, request: Any) -> None:
        """Tie a request's prefix-cache blocks to the current version."""
        if not hasattr(request, "bridge_salt"):
            request.bridge_salt = request.cache_salt or ""
        if self.version:
            compat.resalt(request, f"{request.bridge_salt}|weight_version={self.version}")

    @property
    def idle(self) -> bool:
        """Whether no batch will carry a stamp, and a flip may come at any time."""
        return compat.will_not_step(self.engine)

    def commit_if_idle(self) -> None:
        """Commit by RPC when no batch will carry the stamp; runs in the busy loop, between steps."""
        if self.requested <= self.version or not self.idle:
            return
        self.adopt(self.requested)
        self.commit_now()
        self.engine._weight_version = str(self.version)
        self._note_done(self.version, how="every worker was told, as no batch runs")

    def commit_now(self) -> None:
        """Let every worker flip behind the batches it has been given; one that has flipped does nothing."""
        self.engine.model_executor.collective_rpc(
            "bridge_commit", timeout=self.rpc_timeout_s, args=(self.version,)
        )

    @property
    def rpc_timeout_s(self) -> float:
        """How long a call to all workers may take, where nothing runs."""
        return RPC_TIMEOUT_S


def attach(engine: Any, kind: type[EngineBridge] = EngineBridge) -> None:
    """Hook one engine core, right before its busy loop starts, and introduce it to the daemon.

    ``kind`` says by what rule it follows the daemon's word.

    Raises:
        BridgeError: the daemon cannot be reached.
    """
    parallel = engine.vllm_config.parallel_config
    index, world_size = parallel.data_parallel_index, parallel.world_size
    flight.name_process("engine", index)
    telemetry.stand(epoch=None, version=0)
    salted = os.environ.get("BRIDGE_PREFIX_CACHE", "salt") == "salt"
    bridge = kind(engine, salted=salted)
    bridge.hook()
    ours = compat.transfers_weights_by_bridge(engine.vllm_config)
    _hook_calls(engine, WeightUpdates(Path(os.environ["BRIDGE_RUN_DIR"])) if ours else None)
    hello = {
        "type": "engine",
        "index": index,
        "world_size": world_size,
        "hooks": bridge.hooks(),
    }
    registration = Registration(hello, who=f"vLLM engine core {index}")
    bridge.connect(registration.connect(), index)
    registration.exit_with_parent = True
    registration.on_wake = lambda: engine.input_queue.put_nowait(compat.wake_request())
    registration.watch()
    flight.note("engine hooked", index=index, ranks=world_size)
    cache = "salted" if salted else "kept"
    logger.info("engine core %d hooked: %d rank(s), prefix cache %s", index, world_size, cache)


def _hook(engine: Any, bridge: EngineBridge) -> None:
    def make_schedule(schedule: Wrapped) -> Wrapped:
        def stamped_schedule(*args: Any, **kwargs: Any) -> Any:
            bridge.check()
            bridge.before_schedule()
            scheduler_output = schedule(*args, **kwargs)
            bridge.stamp(scheduler_output)
            return scheduler_output

        return stamped_schedule

    def make_update(update: Wrapped) -> Wrapped:
        def labelled_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            bridge.check()
            bridge.label(scheduler_output)
            return update(scheduler_output, *args, **kwargs)

        return labelled_update

    def make_handle(handle: Wrapped) -> Wrapped:
        def handle_client_request(*args: Any, **kwargs: Any) -> None:
            handle(*args, **kwargs)
            bridge.hold.follow()
            bridge.commit_if_idle()

        return handle_client_request

    def make_add(add: Wrapped) -> Wrapped:
        def salted_add(request: Any, *args: Any, **kwargs: Any) -> Any:
            if bridge.salted:
                bridge.salt(request)
            return add(request, *args, **kwargs)

        return salted_add

    compat.wrap(engine.scheduler, "schedule", make_schedule)
    compat.wrap(engine.scheduler, "update_from_output", make_update)
    compat.wrap(engine, "_handle_client_request", make_handle)
    compat.wrap(engine, "add_request", make_add)
    _hook_pauses(engine, bridge.hold)


def _hook_calls(engine: Any, updates: WeightUpdates | None) -> None:
    """Refuse calls to workers that write over the weights; answer weight transfers here, by ``updates``."""

    def make_rpc(collective_rpc: Wrapped) -> Wrapped:
        # vLLM compares the number of arguments with the signature's.
        def answered_rpc(
            method: Any, timeout: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if method in compat.WRITES_OVER_WEIGHTS:
                raise ConfigError(
                    f"{method} would write over the weights that are served, and no version would say so; "
                    "send them by bridge.broadcast_weights, or start the server anew for the checkpoint's"
                )
            if updates is not None and updates.answers(method):
                return updates.answer(method, tuple(args), kwargs or {})
            return collective_rpc(method, timeout, args, kwargs)

        return answered_rpc

    compat.wrap(engine, "collective_rpc", make_rpc)


def _hook_pauses(engine: Any, hold: Hold) -> None:
    """Keep vLLM's own pauses and ours apart: theirs begin, are reported done and end outside of a hold."""

    def make_set(set_pause_state: Wrapped) -> Wrapped:
        def set_unless_held(state: Any) -> None:
            if not hold.defers(state):
                set_pause_state(state)

        return set_unless_held

    def make_complete(pause_complete: Wrapped) -> Wrapped:
        def complete_unless_held() -> bool:
            return not hold.active and bool(pause_complete())

        return complete_unless_held

    def make_notify(notify: Wrapped) -> Wrapped:
        def notify_unless_held() -> None:
            if hold.active:
                hold.confirm()  # and that is not the idle engine that others wait for
            else:
                notify()

        return notify_unless_held

    compat.wrap(engine.scheduler, "set_pause_state", make_set)
    compat.wrap(engine, "_pause_complete", make_complete)
    compat.wrap(engine, "_notify_idle_state_callbacks", make_notify)
