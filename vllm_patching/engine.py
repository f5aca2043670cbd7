"""The engine core's side: which batch carries which version.

The daemon asks for a version by writing one word in the control page, after every rank has staged it. The
engine reads that word before it schedules a batch and stamps the batch: one message queue feeds all ranks in
order, so all of them flip before the same batch, without a drain and without a further message. An
engine that runs no batches is woken and commits by one RPC instead.

New requests after a commit must not reuse KV blocks computed under older weights: their prefix-cache salt
names the version, and requests that still wait are given the new salt before the stamped batch is
scheduled.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm_patching import compat
from vllm_patching.arena import ControlPage
from vllm_patching.registration import Registration

logger = logging.getLogger(__name__)

IDLE_COMMIT_TIMEOUT_S = 30.0


class EngineBridge:
    """Stamps, labels and salts for one engine core; lives in its busy loop's thread."""

    def __init__(self, engine: Any, control: ControlPage, *, salted: bool) -> None:
        self.engine = engine
        self.control = control
        self.version = 0
        self._salted = salted

    def stamp(self, scheduler_output: Any) -> None:
        """Mark one batch with the version it runs under; workers flip where that is new to them."""
        scheduler_output.bridge_commit = self.version

    def adopt(self) -> None:
        """Take up a newly requested version, before a batch is scheduled."""
        requested = self.control.requested
        if requested <= self.version:
            return
        self.version = requested
        if self._salted:
            for request in compat.waiting_requests(self.engine.scheduler):
                self.salt(request)

    def label(self, scheduler_output: Any) -> None:
        """Name the version this batch ran under, for vLLM's own ``WeightVersionSpan`` (0.32 and later)."""
        self.engine._weight_version = str(scheduler_output.bridge_commit)

    def salt(self, request: Any) -> None:
        """Tie a request's prefix-cache blocks to the current version."""
        if not hasattr(request, "bridge_salt"):
            request.bridge_salt = request.cache_salt or ""
        if self.version:
            compat.resalt(request, f"{request.bridge_salt}|weight_version={self.version}")

    def commit_if_idle(self) -> None:
        """Commit by RPC when no batch will carry the stamp; runs in the busy loop, between steps."""
        if self.control.requested <= self.version or not compat.will_not_step(self.engine):
            return
        self.adopt()
        self.engine.model_executor.collective_rpc(
            "bridge_commit", timeout=IDLE_COMMIT_TIMEOUT_S, args=(self.version,)
        )
        self.engine._weight_version = str(self.version)


def attach(engine: Any) -> None:
    """Hook one engine core, right before its busy loop starts, and introduce it to the daemon.

    Raises:
        BridgeError: the daemon cannot be reached.
    """
    parallel = engine.vllm_config.parallel_config
    hello = {
        "type": "engine",
        "world_size": parallel.world_size,
        "hooks": {"schedule": True, "update_from_output": True, "add_request": True, "wake": True},
    }
    registration = Registration(hello, who="vLLM engine core")
    salted = os.environ.get("BRIDGE_PREFIX_CACHE", "salt") == "salt"
    control = registration.connect()
    bridge = EngineBridge(engine, control, salted=salted)
    _hook_scheduler(engine, bridge)
    registration.exit_with_parent = True
    registration.on_wake = lambda: engine.input_queue.put_nowait(compat.wake_request())
    registration.watch()
    logger.info(
        "engine core hooked: %d rank(s), prefix cache %s", parallel.world_size, "salted" if salted else "kept"
    )


def _hook_scheduler(engine: Any, bridge: EngineBridge) -> None:
    scheduler = engine.scheduler
    schedule, update = scheduler.schedule, scheduler.update_from_output
    handle, add = engine._handle_client_request, engine.add_request

    def stamped_schedule(*args: Any, **kwargs: Any) -> Any:
        bridge.adopt()
        scheduler_output = schedule(*args, **kwargs)
        bridge.stamp(scheduler_output)
        return scheduler_output

    def labelled_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        bridge.label(scheduler_output)
        return update(scheduler_output, *args, **kwargs)

    def handle_client_request(request_type: Any, request: Any) -> None:
        handle(request_type, request)
        bridge.commit_if_idle()

    def salted_add(request: Any, *args: Any, **kwargs: Any) -> Any:
        if bridge._salted:
            bridge.salt(request)
        return add(request, *args, **kwargs)

    scheduler.schedule = stamped_schedule
    scheduler.update_from_output = labelled_update
    engine._handle_client_request = handle_client_request
    engine.add_request = salted_add
