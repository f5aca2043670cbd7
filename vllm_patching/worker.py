"""One vLLM worker's side: it alone changes what its forward pass reads.

A commit is a flip of the arena in ``execute_model``, before the forward of the batch that carries the stamp:
as late as that, because vLLM prepares a batch while the GPU still runs the one before, and a flip must wait
for the GPU. Nothing between the two reads a weight (prompt embeddings would; there it is at the entry).
Nothing here may raise inside a worker RPC: vLLM reads the replies of all ranks in order, and one
exception would leave its response queues off by one. A flip that fails is recorded in the control page: the
engine core ends before a token of that batch leaves, and the daemon ends it if it stands.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from bridge import flight, telemetry
from bridge.errors import BridgeError, MappingError
from bridge.wire import cuda
from vllm_patching import adapters, compat, loading, lora_compat
from vllm_patching.adapters import Shelves
from vllm_patching.arena import Arena
from vllm_patching.control_page import RankSlot
from vllm_patching.flip_log import FlipLog
from vllm_patching.kept import Watch
from vllm_patching.registration import Registration

logger = logging.getLogger(__name__)

LOOKS = 2  # at what the first batches make of weights: one reads a prompt, the next may go on with it


class WorkerBridge:
    """The state of one worker: its arena, what it has committed, and how many batches it has begun.

    Only batches with tokens count, and dummy batches, as they are forwards too: ranks that flip before the
    same forward have then flipped before the same batch.
    """

    def __init__(
        self,
        *,
        rank: int,
        arena: Arena,
        log_path: Path,
        at_entry: bool = False,
        shelves: Shelves | None = None,
        watch: Watch | None = None,
    ) -> None:
        """
        Args:
            at_entry: something reads weights before the forward, so nothing may be put off.
            watch: looked at behind the first batches.
        """
        self.rank = rank
        self.arena = arena
        self.shelves = shelves
        self.batch = 0
        self.version = 0
        self._at_entry = at_entry
        self._pending = 0
        self._within = False  # a batch that counts, whose forward has not run
        self._unlogged: dict[str, int] = {}
        self._forward_seen = False
        self.slot: RankSlot | None = None
        self._log = FlipLog(log_path)
        self._watch = watch
        self._looks = LOOKS

    def before_batch(self, stamp: int, tokens: int) -> None:
        """Called at the entry of ``execute_model``, with the batch's stamp and its number of tokens.

        A flip is put off only once a forward was seen to announce itself.
        """
        self._within = tokens > 0
        if self._within:
            self._count()
        if stamp <= self.version:
            return
        if tokens and self._forward_seen and not self._at_entry:
            if self._pending != stamp:
                flight.note("flip put off", rank=self.rank, version=stamp, batch=self.batch)
            self._pending = stamp
        else:
            self.commit(stamp)

    def before_dummy_batch(self) -> None:
        """Called before a batch that vLLM runs for the sake of other engines; it carries no stamp."""
        self._count()

    def _count(self) -> None:
        self.batch += 1
        if self.slot is not None:
            self.slot.begun = self.batch

    def before_forward(self) -> None:
        """Called right before the model runs, within a batch or for vLLM's own profiling."""
        self._forward_seen = True
        if self._pending:
            version, self._pending = self._pending, 0
            self.commit(version)

    def after_batch(self) -> None:
        """Called at the exit of ``execute_model``; a flip still pending was missed by the forward."""
        ran, self._within = self._within, False
        self._note_flip()
        if ran and self._watch is not None:
            self._look(self._watch)
        if self._pending:
            logger.error(
                "rank %d: batch %d ran without announcing its forward, so version %d was not flipped in",
                self.rank,
                self.batch,
                self._pending,
            )
            self._fail(f"batch {self.batch} ran without announcing its forward", self._pending)
            self._pending = 0

    def warmed_up(self) -> None:
        """Called once vLLM has run the model for itself, if it did.

        Raises:
            MappingError: it has made tensors of weights that no update would reach.
        """
        if self._watch is not None:
            self._check(self._watch)

    def _check(self, watch: Watch) -> None:
        try:
            watch.check()
        except RuntimeError:  # torch's: no room beside the KV cache, or a lost device, which the batch tells
            logger.exception("rank %d: nobody could look at what the forwards made of weights", self.rank)

    def _look(self, watch: Watch) -> None:
        """Keep this batch's tokens back, and end the server, if a forward made something of weights."""
        self._looks -= 1
        if not self._looks:
            self._watch = None
        try:
            self._check(watch)
        except MappingError as err:
            logger.error("rank %d: %s", self.rank, err)
            assert self.slot is not None, "no batch runs before the daemon has answered"
            self.slot.fail()
            flight.write(f"rank {self.rank} cannot keep its model in step: {err}")

    def commit(self, version: int) -> None:
        """Make the staged half live. Never raises: failures go to the control page and the log."""
        assert self.slot is not None, "no commit can be requested before the daemon has answered"
        self._pending = 0
        if version <= self.version:
            return
        flight.note("flip begun", rank=self.rank, version=version, batch=self.batch)
        try:
            self.arena.quiesce()
            start = time.perf_counter_ns()
            self.arena.flip(1 - self.arena.active)
            if self.shelves is not None:
                self.shelves.flipped()
        except (OSError, RuntimeError, BridgeError) as err:  # RuntimeError: torch's, of a lost device
            logger.exception("rank %d: version %d could not be flipped in", self.rank, version)
            self._fail(f"{type(err).__name__}: {err}", version)
            return
        flip_ns = time.perf_counter_ns() - start
        self.version = version
        telemetry.stand(epoch=None, version=version)
        first = self.batch + (not self._within)  # the first batch under this version
        self.slot.record(version=version, batch=first, flip_ns=flip_ns, active=self.arena.active)
        self._unlogged = {"rank": self.rank, "batch": first, "version": version, "flip_ns": flip_ns}
        flight.note("flipped", **self._unlogged)

    def _fail(self, why: str, version: int) -> None:
        """Tell the others that this rank differs, and only then write down what came before."""
        assert self.slot is not None, "no commit can be requested before the daemon has answered"
        self.slot.fail()
        flight.note("flip failed", rank=self.rank, version=version, why=why)
        flight.write(f"rank {self.rank} could not flip to version {version}: {why}")

    def quiesce(self) -> bool:
        """Wait until nothing on the device reads a weight any more; False, and counted, if that failed."""
        assert self.slot is not None, "no hold can be requested before the daemon has answered"
        try:
            self.arena.quiesce()
        except (RuntimeError, BridgeError) as err:  # torch's, of a lost device
            logger.exception("rank %d: the device did not come to rest", self.rank)
            self.slot.fail()
            flight.write(f"the device of rank {self.rank} did not come to rest: {err}")
            return False
        return True

    def loading_adapter(self, lora_id: int, name: str) -> None:
        """Called before vLLM reads an adapter's files."""
        if self.shelves is not None:
            self.shelves.loading(lora_id, name)

    def adapter_activated(self, lora_id: int) -> None:
        """Called once vLLM has filled a slot from an adapter's files."""
        if self.shelves is not None:
            self.shelves.activated(lora_id)

    def close(self) -> None:
        """Release the memory and the log; nothing may use the weights any more."""
        self.arena.close()
        self._note_flip()
        self._log.close()

    def _note_flip(self) -> None:
        """Have the last flip written down: behind the forward, which a flip already holds up."""
        if self._unlogged:
            self._log.add(self._unlogged)
            self._unlogged = {}


class Unpublished:
    """Stands in until ``publish``: vLLM runs no batch that early; if it does, say so once."""

    def before_batch(self, stamp: int, tokens: int) -> None:  # noqa: ARG002 - as WorkerBridge has it
        if stamp:
            raise AssertionError("a stamped batch reached a worker that has published no memory")

    def before_dummy_batch(self) -> None:
        """Nothing: there is no arena yet."""

    def before_forward(self) -> None:
        """Nothing: there is no arena yet."""

    def after_batch(self) -> None:
        """Nothing: there is no arena yet."""

    def loading_adapter(self, lora_id: int, name: str) -> None:
        """Nothing: there is no shelf yet."""

    def adapter_activated(self, lora_id: int) -> None:
        """Nothing: there is no shelf yet."""

    def warmed_up(self) -> None:
        """Nothing: no weights have been published."""


_here: WorkerBridge | Unpublished = Unpublished()


def before_forward() -> None:
    """The model of this process's worker is about to run."""
    _here.before_forward()


def loading_adapter(lora_id: int, name: str) -> None:
    """This process's worker is about to read an adapter's files."""
    _here.loading_adapter(lora_id, name)


def adapter_activated(lora_id: int) -> None:
    """This process's worker has filled a slot from an adapter's files."""
    _here.adapter_activated(lora_id)


def commit_while_idle(self: Any, version: int) -> int:
    """``collective_rpc`` target on every worker, for engines that run no batches; returns the version."""
    bridge: WorkerBridge = self.bridge
    if version > bridge.version:
        bridge.commit(version)
        bridge.after_batch()
    return bridge.version


def quiesce(self: Any) -> bool:
    """``collective_rpc`` target on every worker, before its live weights are written over."""
    bridge: WorkerBridge = self.bridge
    return bridge.quiesce()


def _rank_of(worker: Any) -> int:
    """Its inference rank: among all engines' workers."""
    parallel = worker.vllm_config.parallel_config
    rank: int = parallel.data_parallel_index * parallel.world_size + worker.rank
    return rank


def name_process(worker: Any) -> None:
    """vLLM's worker is about to load its model: from now on the log says which it is, and what it serves."""
    flight.name_process("worker", _rank_of(worker))
    telemetry.stand(epoch=None, version=0)


def publish(worker: Any) -> None:
    """Move a freshly loaded worker's weights into an arena and hand it to the daemon.

    Raises:
        MappingError: the loaded model cannot be kept in step; lists everything found.
        ConfigError: a feature is on that the bridge cannot follow, or the hooks are not in place.
        BridgeError: the daemon could not be reached.
    """
    compat.refuse_unsupported_config(worker.vllm_config)
    model = worker.model_runner.get_model()
    loaded = loading.finish(model)
    parallel = worker.vllm_config.parallel_config
    rank = _rank_of(worker)
    names, manager = adapters.wanted(), lora_compat.manager_of(worker)
    shelving = adapters.shelving(manager, names, loaded.vocabularies) if names else None
    arena, description, shelved = loading.rehome(loaded, rank=rank, shelving=shelving)
    compat.forget_weights_memory(worker)
    logdir = Path(os.environ["BRIDGE_LOGDIR"])
    global _here  # a process has one worker
    worker.bridge = _here = WorkerBridge(
        rank=rank,
        arena=arena,
        log_path=logdir / f"flips-rank{rank}.jsonl",
        at_entry=compat.reads_weights_before_forward(worker.vllm_config),
        shelves=Shelves(manager, shelving, shelved, arena) if shelving else None,
        watch=Watch(
            model, arena=arena.live(0, arena.nbytes), run_time=lambda: compat.run_time_tensors(worker)
        ),
    )
    fds = arena.export()
    hello = {
        "type": "worker",
        "rank": rank,
        "world_size": parallel.world_size,
        "tp_degree": parallel.tensor_parallel_size,
        "model": worker.vllm_config.model_config.model,
        "dtype": str(worker.vllm_config.model_config.dtype).removeprefix("torch."),
        "vllm_version": compat.installed_version(),
        "gpu": _gpu_of(arena),
        "arena": arena.kind,
        "handles": arena.handles(),
        "descriptors": len(fds),
        "hooks": {
            "load_model": compat.is_wrapped(type(worker).load_model),
            "compile_or_warm_up_model": compat.is_wrapped(type(worker).compile_or_warm_up_model),
            "execute_model": compat.is_wrapped(type(worker).execute_model),
            "execute_dummy_batch": compat.is_wrapped(type(worker).execute_dummy_batch),
            **(lora_compat.hooks(worker) if shelving else {}),
        },
        **description,
    }
    registration = Registration(hello, fds=fds, who=f"vLLM worker rank {rank}")
    worker.bridge.slot = registration.connect().slot(rank)
    registration.watch()
    flight.note("published", rank=rank, bytes=arena.nbytes, arena=arena.kind)
    logger.info("rank %d published %d MiB (%s)", rank, arena.nbytes >> 20, arena.kind)


def _gpu_of(arena: Arena) -> str:
    """The UUID of the device the arena is on; "" for the host's memory."""
    device = arena.live(0, arena.nbytes).device
    return cuda.uuid_of(device) if device.type == "cuda" else ""
