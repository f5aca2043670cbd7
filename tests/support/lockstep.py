"""Engine cores of a mixture of experts, in lockstep: vLLM's own busy loops over simulated workers.

Each loop runs in a thread of its own, but only one of them at a time: whenever one has to wait (for a
request, for the other engines, for its worker), the next is chosen from all that could go on, by a seed. So
every order in which messages and steps can fall is reachable, and repeatable.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineShutdownState

from vllm_patching.compat import wake_request
from vllm_patching.control_page import ControlPage
from vllm_patching.engine import EngineBridge

THREAD_TIMEOUT_S = 20.0
Ready = Callable[[], bool]


class Over(BaseException):
    """Ends an engine's thread."""


class Scheduler:
    """As much of vLLM's as its busy loop asks for; a request is a number of steps still to run."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.in_flight: list[int] = []
        self.pause_state = PauseState.UNPAUSED
        self.waiting: list[Any] = []
        self.flushed = True

    def add_request(self, request: Any) -> None:
        self.left.append(request.steps)
        self.in_flight.append(0)

    def has_unfinished_requests(self) -> bool:
        return self.pause_state is not PauseState.PAUSED_ALL and bool(self.left)

    def has_requests(self) -> bool:
        return self.has_unfinished_requests() or not self.flushed

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state

    def schedule(self, _throttle: bool = False) -> Any:
        self.flushed = True
        tokens = []
        if self.pause_state is not PauseState.PAUSED_ALL:
            tokens = [i for i, left in enumerate(self.left) if left > self.in_flight[i]]
        for index in tokens:
            self.in_flight[index] += 1
        return SimpleNamespace(
            requests=tokens, total_num_scheduled_tokens=len(tokens), pending_structured_output_tokens=False
        )

    def get_grammar_bitmask(self, _output: Any) -> None:
        return None

    def update_from_output(self, scheduler_output: Any, _output: Any) -> dict[int, Any]:
        for index in scheduler_output.requests:
            self.left[index] -= 1
            self.in_flight[index] -= 1
        if self.left and not any(self.left):
            self.left, self.in_flight, self.flushed = [], [], False
        return {}


class Engine:
    """One busy loop, its worker's queue and what the worker serves."""

    def __init__(self, server: LockstepServer, index: int, kind: type[EngineBridge], batches: int) -> None:
        self.server, self.index = server, index
        self.messages: deque[tuple[str, Any, Future[Any]]] = deque()
        self.served = 0
        self.newest: Any = None  # the batch that was given to the worker last
        self.arrived: Any = None  # what it waits with in a collective of the engines
        self.ready: Ready = lambda: True
        self.go = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.core = core = object.__new__(DPEngineCoreProc)
        executor = SimpleNamespace(
            is_sleeping=False,
            execute_model=self._execute_model,
            sample_tokens=lambda _grammar, **_: self.newest,
            execute_dummy_batch=lambda: self._ask("forward", 0),
            collective_rpc=lambda _name, timeout=None, args=(0,): self._ask("commit", args[0]),  # noqa: ARG005
        )
        state = {
            "scheduler": Scheduler(), "model_executor": executor, "engine_index": index, "dp_rank": index,
            "dp_group": SimpleNamespace(size=lambda: len(server.engines), engine=self), "step_counter": 0,
            "current_wave": 0, "engines_running": False, "pending_pause": False, "log_stats": False,
            "ignore_start_dp_wave": False, "eep_scaling_state": None, "has_coordinator": True,
            "publish_dp_lb_stats": False, "dp_sync_interval": 32, "prefill_schedule_interval": 1,
            "shutdown_state": EngineShutdownState.RUNNING, "process_input_queue_block": True,
            "is_ec_consumer": True, "is_mm_encoder_only": False, "is_pooling_model": False,
            "check_for_draft_tokens": False, "async_scheduling": batches > 1, "batch_queue_size": batches,
            "batch_queue": deque() if batches > 1 else None, "aborts_queue": queue.Queue(),
            "input_queue": InputQueue(self), "output_queue": queue.Queue(), "_idle_state_callbacks": [],
            "enable_fault_tolerance": False, "_weight_version": "",
            "vllm_config": SimpleNamespace(
                observability_config=SimpleNamespace(enable_logging_iteration_details=False)
            ),
        }  # fmt: skip
        vars(core).update(state)
        core.step_fn = core.step if batches == 1 else core.step_with_batch_queue
        self.bridge = kind(core, salted=False)
        self.bridge.hook()
        self.bridge.connect(server.page, index)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.server.over:
                self.core.run_busy_loop()
        except Over:
            pass
        except BaseException as err:  # noqa: BLE001 - shown by the test's own thread
            self.error = err
        self.ready = lambda: False
        self.server.baton.release()

    def wait(self, ready: Ready) -> None:
        """Let others go on, at least until ``ready``."""
        self.ready = ready
        self.server.baton.release()
        self.go.acquire()
        if self.server.over:
            raise Over

    def _post(self, kind: str, payload: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self.messages.append((kind, payload, done))
        return done

    def _ask(self, kind: str, payload: Any) -> Any:
        done = self._post(kind, payload)
        self.wait(done.done)
        return done.result()

    def _execute_model(self, scheduler_output: Any, *, non_block: bool) -> Any:
        assert non_block
        kind = "forward" if scheduler_output.total_num_scheduled_tokens else "commit"
        done = self._post(kind, scheduler_output.bridge_commit)
        self.newest = SimpleNamespace(result=lambda: (self.wait(done.done), done.result())[1])
        return self.newest


class InputQueue(queue.Queue[Any]):
    """Waits by handing on the turn."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: ARG002 - as Queue's
        if block:
            self._engine.wait(lambda: not self.empty())
        return super().get(block=False)


class LockstepServer:
    """Engines, their workers, the client, its coordinator and the daemon."""

    def __init__(self, seed: int, *, engines: int, batches: int, kind: type[EngineBridge]) -> None:
        """``batches`` is how many an engine keeps in flight; ``kind`` is the rule that is tried."""
        self.random = random.Random(seed)
        self.over = False
        self.baton = threading.Semaphore(0)
        self.page = ControlPage.create(engines, engines)
        self.engines: list[Engine] = []
        self.engines += [Engine(self, index, kind, batches) for index in range(engines)]
        self.mail: list[tuple[int, Any]] = []  # messages on their way to an engine
        self.wave, self.running = 0, False  # as the client and its coordinator know it
        self.forwards: list[list[int]] = []  # the versions under which each one ran, by engine
        for engine in self.engines:
            engine.thread.start()

    # --- what can happen ---------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, *, op: Any, group: Any) -> None:
        """In place of torch's: every engine must come to it with the same operation."""
        engine: Engine = group.engine
        engine.arrived = (op, tensor)
        others = [e.arrived for e in self.engines]
        if all(arrived is not None for arrived in others):
            assert len({(str(o), t.dtype, t.shape) for o, t in others}) == 1, (
                f"different collectives: {others}"
            )
            stacked = torch.stack([t for _, t in others])
            total = stacked.sum(0) if op == dist.ReduceOp.SUM else stacked.amax(0)
            for other in self.engines:
                other.arrived[1].copy_(total)
                other.arrived = None
        engine.wait(lambda: engine.arrived is None)

    def request(self, index: int, steps: int) -> None:
        """A client's request, routed to one engine; wakes the others if the client thinks they rest."""
        request = SimpleNamespace(request_id="r", steps=steps, pooling_params=None, kv_transfer_params=None,
                                  ec_transfer_params=None, abort_immediately=False)  # fmt: skip
        self.mail.append((index, (EngineCoreRequestType.ADD, (request, self.wave))))
        if not self.running:
            self._start_wave(exclude=index)

    def _start_wave(self, exclude: int) -> None:
        self.running = True
        for index in range(len(self.engines)):
            self.mail.append((index, (EngineCoreRequestType.START_DP_WAVE, (self.wave, exclude))))

    def utility(self, name: str, *args: Any) -> None:
        """A call that the client sends to every engine."""
        for index in range(len(self.engines)):
            self.mail.append((index, (EngineCoreRequestType.UTILITY, (0, 0, name, args))))

    def wake(self, index: int) -> None:
        """The daemon's word on one engine's connection."""
        self.mail.append((index, wake_request()))

    @property
    def committed(self) -> bool:
        """Whether every worker serves what was requested."""
        return all(engine.served == self.page.requested for engine in self.engines)

    def _hear(self, engine: Engine) -> None:
        """What an engine tells the coordinator."""
        while not engine.core.output_queue.empty():
            client, outputs = engine.core.output_queue.get_nowait()
            if client != -1:
                assert outputs.utility_output is None or outputs.utility_output.failure_message is None, (
                    outputs
                )
                continue
            if outputs.wave_complete is not None and self.wave <= outputs.wave_complete:
                self.wave, self.running = outputs.wave_complete + 1, False
            elif (wave := outputs.start_wave) is not None and (
                wave > self.wave or (wave == self.wave and not self.running)
            ):
                self.wave = wave
                self._start_wave(exclude=engine.index)

    def _can_happen(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        heads = [engine.messages[0][0] if engine.messages else "" for engine in self.engines]
        for engine, head in zip(self.engines, heads, strict=True):
            if engine.ready():
                found.append(lambda engine=engine: self._turn(engine))
            if head == "commit":
                found.append(lambda engine=engine: self._commit(engine))
            first = next((i for i, (to, _) in enumerate(self.mail) if to == engine.index), None)
            if first is not None:
                found.append(lambda first=first: self._deliver(first))
        if set(heads) == {"forward"}:
            found.append(self._forward)
        return found

    def _turn(self, engine: Engine) -> None:
        engine.go.release()
        assert self.baton.acquire(timeout=THREAD_TIMEOUT_S), f"engine {engine.index} never came back"
        if engine.error is not None:
            raise engine.error
        self._hear(engine)

    def _commit(self, engine: Engine) -> None:
        _, version, done = engine.messages.popleft()
        engine.served = max(engine.served, version)
        done.set_result([engine.served])

    def _deliver(self, first: int) -> None:
        index, message = self.mail.pop(first)
        self.engines[index].core.input_queue.put_nowait(message)

    def _forward(self) -> None:
        for engine in self.engines:
            engine.served = max(engine.served, engine.messages[0][1])
        versions = [engine.served for engine in self.engines]
        self.forwards.append(versions)
        assert len(set(versions)) == 1, f"forward {len(self.forwards)} ran under versions {versions}"
        for engine in self.engines:
            engine.messages.popleft()[2].set_result("output")

    # --- the run -----------------------------------------------------------------------------------

    def happen(self, events: int) -> bool:
        """Let that many things happen, chosen by the seed; False once nothing can any more."""
        for _ in range(events):
            possible = self._can_happen()
            if not possible:
                return False
            self.random.choice(possible)()
        return True

    @property
    def resting(self) -> bool:
        """Whether every engine waits for a request, and none is on its way."""
        return not self.mail and all(
            not engine.core.has_work() and engine.core.input_queue.empty() and not engine.messages
            for engine in self.engines
        )

    def settle(self, limit: int = 20_000) -> None:
        """Let everything under way come to its end."""
        for _ in range(limit):
            if self.resting and not any(engine.ready() for engine in self.engines):
                return
            assert self.happen(1), f"nothing can happen, yet {self.stuck()}"
        raise AssertionError(f"no end after {limit} events: {self.stuck()}")

    def stuck(self) -> str:
        return "; ".join(
            f"engine {e.index}: wave {e.core.current_wave} step {e.core.step_counter} "
            f"running {e.core.engines_running} collective {e.arrived} messages {[m[0] for m in e.messages]}"
            for e in self.engines
        )

    def end(self) -> None:
        """End every loop, wherever it stands."""
        self.over = True
        for engine in self.engines:
            engine.go.release()
            engine.thread.join(THREAD_TIMEOUT_S)
            assert not engine.thread.is_alive()
