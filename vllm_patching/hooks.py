"""Where the bridge enters vLLM's processes: which call is wrapped, and what it does then.

========================  =============================  ================================================
process                   vLLM call                      what the bridge does
========================  =============================  ================================================
worker                    BaseModelLoader.load_model     remembers the loader (whose checkpoint this is)
worker                    process_weights_after_loading  before it: traces ``model.load_weights``
worker                    Worker.load_model              before it: names the process; after it: moves
                                                         weights into the arena, publishes
worker                    compile_or_warm_up_model       after it: looks at what forwards made of weights
worker                    Worker.execute_model           counts batches, notes the stamp
worker                    Worker.execute_dummy_batch     counts it, as other engines' workers do theirs
worker                    the forward (three places)     before it: flips if this batch's stamp is new
worker                    _load_adapter                  notes which adapter has which id
worker                    activate_adapter               after it: the slot gets what was sent last
engine core               EngineCoreProc.run_busy_loop   stamps batches, labels outputs, salts prefix cache,
                                                         stands still on request
engine core, mixture of   _process_engine_step           agrees with the other engines on the version
experts, data parallel    execute_dummy_batch            before it: flips if the version agreed on is new
engine core               EngineCore.collective_rpc      refuses what writes over the weights, answers
                                                         weight-transfer calls of the backend "bridge"
API server                RequestState                   keeps each request's version spans
========================  =============================  ================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_patching import compat, lora_compat

Wrapped = Callable[..., Any]


def install() -> None:
    """Wrap everything above in this process, each right after its module is first imported."""
    compat.when_imported(compat.LINEAR_MODULE, compat.keep_linear_weights_live)
    compat.when_imported(compat.RETIE_MODULE, compat.keep_embeddings_apart)
    compat.when_imported(compat.CPU_PLATFORM_MODULE, compat.prefer_unpacked_mla)
    compat.when_imported(compat.CPU_EXPERTS_MODULE, compat.keep_raw_experts)
    for name in compat.EXECUTOR_MODULES:
        compat.when_imported(name, compat.keep_store_in_run_dir)
    compat.when_imported(compat.LOADER_MODULE, _hook_loader)
    compat.when_imported(compat.WORKER_MODULE, _hook_worker)
    compat.when_imported(compat.CPU_WORKER_MODULE, lambda module: _hook_warm_up(module.CPUWorker))
    for module, path in compat.FORWARD_POINTS:
        compat.when_imported(module, functools.partial(_hook_forward, path=path))
    compat.when_imported(lora_compat.MANAGER_MODULE, _hook_slots)
    compat.when_imported(lora_compat.LOADING_MODULE, _hook_adapters)
    compat.when_imported(compat.ENGINE_MODULE, _hook_engine)
    compat.when_imported(compat.OUTPUT_MODULE, _hook_outputs)
    compat.when_imported(compat.TRANSFER_MODULE, _register_backend)


def _hook_loader(module: ModuleType) -> None:
    from vllm_patching import loading

    def make_load(original: Wrapped) -> Wrapped:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            with loading.remembering(self):
                return original(self, *args, **kwargs)

        return load_model

    def make_process(original: Wrapped) -> Wrapped:
        def process_weights_after_loading(model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            loading.before_processing(model, model_config)
            return original(model, model_config, *args, **kwargs)

        return process_weights_after_loading

    compat.wrap(module.BaseModelLoader, "load_model", make_load)
    compat.wrap(module, "process_weights_after_loading", make_process)


def _hook_worker(module: ModuleType) -> None:
    from vllm_patching import worker

    def make_load(original: Wrapped) -> Wrapped:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            worker.name_process(self)
            result = original(self, *args, **kwargs)
            worker.publish(self)
            return result

        return load_model

    def make_execute(original: Wrapped) -> Wrapped:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            stamp, tokens = compat.stamp_and_tokens(scheduler_output)
            self.bridge.before_batch(stamp, tokens)
            result = original(self, scheduler_output, *args, **kwargs)
            self.bridge.after_batch()
            return result

        return execute_model

    def make_dummy(original: Wrapped) -> Wrapped:
        def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.bridge.before_dummy_batch()
            return original(self, *args, **kwargs)

        return execute_dummy_batch

    compat.wrap(module.Worker, "load_model", make_load)
    _hook_warm_up(module.Worker)
    compat.wrap(module.Worker, "execute_model", make_execute)
    compat.wrap(module.Worker, "execute_dummy_batch", make_dummy)
    module.Worker.bridge_commit = worker.commit_while_idle
    module.Worker.bridge_quiesce = worker.quiesce
    module.Worker.bridge = worker.Unpublished()


def _hook_warm_up(worker: Any) -> None:
    def make(original: Wrapped) -> Wrapped:
        def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            self.bridge.warmed_up()
            return result

        return compile_or_warm_up_model

    compat.wrap(worker, "compile_or_warm_up_model", make)


def _hook_forward(module: ModuleType, *, path: tuple[str, ...]) -> None:
    from vllm_patching import worker

    def make(original: Wrapped) -> Wrapped:
        def announced(*args: Any, **kwargs: Any) -> Any:
            worker.before_forward()
            return original(*args, **kwargs)

        return announced

    owner = functools.reduce(getattr, path[:-1], module)
    compat.wrap(owner, path[-1], make)


def _hook_slots(module: ModuleType) -> None:
    from vllm_patching import worker

    def make(original: Wrapped) -> Wrapped:
        def activate_adapter(self: Any, lora_id: int, *args: Any, **kwargs: Any) -> Any:
            filled = original(self, lora_id, *args, **kwargs)
            if filled:
                worker.adapter_activated(lora_id)
            return filled

        return activate_adapter

    compat.wrap(module.LoRAModelManager, "activate_adapter", make)


def _hook_adapters(module: ModuleType) -> None:
    from vllm_patching import worker

    def make(original: Wrapped) -> Wrapped:
        def load_adapter(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
            worker.loading_adapter(lora_request.lora_int_id, lora_request.lora_name)
            return original(self, lora_request, *args, **kwargs)

        return load_adapter

    compat.wrap(module.WorkerLoRAManager, "_load_adapter", make)


def _hook_engine(module: ModuleType) -> None:
    from vllm_patching.engine import EngineBridge, attach
    from vllm_patching.lockstep import LockstepBridge

    def make_loop(original: Wrapped, kind: type[EngineBridge]) -> Wrapped:
        def run_busy_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
            attach(self, kind)
            return original(self, *args, **kwargs)

        return run_busy_loop

    kinds = {module.EngineCoreProc: EngineBridge, module.DPEngineCoreProc: LockstepBridge}
    for owner, kind in kinds.items():
        compat.wrap(owner, "run_busy_loop", functools.partial(make_loop, kind=kind))


def _hook_outputs(module: ModuleType) -> None:
    from vllm_patching import spans

    def make_spans(original: Wrapped) -> Wrapped:
        def weight_version_spans(self: Any) -> Any:
            found = original(self)
            spans.remember(self.external_req_id, found)
            return found

        return weight_version_spans

    if hasattr(module.RequestState, "_weight_version_spans"):  # 0.32 and later label tokens
        compat.wrap(module.RequestState, "_weight_version_spans", make_spans)


def _register_backend(module: ModuleType) -> None:
    module.WeightTransferEngineFactory.register_engine(
        compat.BACKEND, "vllm_patching.backend", "BridgeWeightTransferEngine"
    )
