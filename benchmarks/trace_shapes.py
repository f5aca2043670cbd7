"""Do the mappings of ``model_shapes.py`` equal what vLLM's own loaders do? Traced at full width, no memory.

Every rank of a server builds vLLM's model on the meta device, traces its loader under transformers' names,
and compares each write with the synthesised mapping's. Layers repeat, so two of each model are traced.

    python -m benchmarks.trace_shapes --out benchmarks/results/trace-shapes.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.model_shapes import KIMI_1T, LLAMA_70B, QWEN3_8B, VOCABULARY, Model, Server, mapping_of

CASES: dict[str, tuple[Model, Server]] = {
    "8b": (dataclasses.replace(QWEN3_8B, layers=2), Server(tp=2)),
    "70b": (dataclasses.replace(LLAMA_70B, layers=2), Server(tp=2)),
    "1t": (dataclasses.replace(KIMI_1T, layers=2), Server(tp=2)),
}
TIMEOUT_S = 900.0


def config_of(model: Model) -> dict[str, Any]:
    """The config.json that has this model's numbers."""
    config: dict[str, Any] = {
        "hidden_size": model.hidden, "intermediate_size": model.intermediate, "head_dim": model.head_dim,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "vocab_size": model.vocab,
        "num_key_value_heads": model.kv_heads, "max_position_embeddings": 4096, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "dtype": "bfloat16", "tie_word_embeddings": False,
        "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if not model.experts:
        kind, name = ("qwen3", "Qwen3ForCausalLM") if model.qk_norm else ("llama", "LlamaForCausalLM")
        return {**config, "model_type": kind, "architectures": [name]}
    del config["head_dim"]
    return {
        **config, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": model.heads, "moe_intermediate_size": model.expert_intermediate,
        "first_k_dense_replace": model.dense_layers, "n_routed_experts": model.experts,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.827, "q_lora_rank": model.q_rank, "kv_lora_rank": model.kv_rank,
        "qk_nope_head_dim": model.head_dim, "qk_rope_head_dim": model.rope_dim,
        "v_head_dim": model.head_dim, "num_nextn_predict_layers": 0,
    }  # fmt: skip


def traced(model: Model, server: Server, rank: int, directory: str) -> set[tuple[Any, ...]]:
    """Every write of one rank's loader, by the names of its source and its target."""
    import torch
    from vllm.config import DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe import expert_map_manager
    from vllm.model_executor.model_loader.utils import get_model_architecture

    from vllm_patching import sources, tracing

    os.environ["VLLM_DIST_IDENT"] = Path(directory).name  # as an executor does; ranks' shared memory has it
    original = expert_map_manager.ExpertMapManager._calculate_expert_maps
    expert_map_manager.ExpertMapManager._calculate_expert_maps = lambda self: on_host(self, original)
    model_config = ModelConfig(
        model=directory, tokenizer=directory, dtype="bfloat16", skip_tokenizer_init=True,
        enforce_eager=True, max_model_len=512,
    )  # fmt: skip
    parallel = ParallelConfig(tensor_parallel_size=server.tp, enable_expert_parallel=bool(model.experts))
    config = VllmConfig(
        model_config=model_config, device_config=DeviceConfig("cpu"), parallel_config=parallel
    )
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=server.tp, rank=rank, distributed_init_method=f"file://{directory}/rendezvous",
            local_rank=rank, backend="gloo",
        )  # fmt: skip
        initialize_model_parallel(server.tp)
        kind, _ = get_model_architecture(model_config)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            built = kind(vllm_config=config)
        torch.set_default_dtype(torch.float32)
        names = sources.transformers_names(model_config)
        trace = tracing.trace(built, names.sources, prepare=names.as_saved)
    if trace.refused:
        raise RuntimeError(f"refused: {[str(refusal) for refusal in trace.refused]}")
    return {
        (names.sources[w.source].name, w.target, w.size, w.src_offset, w.src_stride, w.dst_offset,
         w.dst_stride)
        for w in trace.writes
    }  # fmt: skip


def on_host(manager: Any, original: Any) -> None:
    """The map of experts keeps its values: loaders read them."""
    import torch

    with torch.device("cpu"):
        original(manager)


def synthesised(model: Model, server: Server, rank: int) -> set[tuple[Any, ...]]:
    """The same of ``model_shapes``."""
    mapping = mapping_of(model, server)
    names, rank_map = mapping.vocabulary(VOCABULARY).sources, mapping.ranks[rank]
    return {
        (names[w.source].name, rank_map.targets[w.target].name, w.size, w.src_offset, w.src_stride,
         w.dst_offset, w.dst_stride)
        for w in rank_map.writes[VOCABULARY]
    }  # fmt: skip


def compare(name: str, rank: int, directory: str, answers: Any) -> None:
    """One rank's comparison, in a process of its own."""
    model, server = CASES[name]
    start = time.monotonic()
    found, made = traced(model, server, rank, directory), synthesised(model, server, rank)
    answers.put(
        {
            "case": name,
            "model": model.name,
            "layers": model.layers,
            "server": dataclasses.asdict(server),
            "rank": rank,
            "writes": len(found),
            "only_traced": [str(w) for w in sorted(found - made)[:20]],
            "only_synthesised": [str(w) for w in sorted(made - found)[:20]],
            "seconds": time.monotonic() - start,
        }
    )


def collect(ranks: Sequence[SpawnProcess], answers: Any) -> list[dict[str, Any]]:
    """What every rank answers; a rank's death ends it, since the others would wait for that one."""
    deadline = time.monotonic() + TIMEOUT_S
    found: list[dict[str, Any]] = []
    while len(found) < len(ranks):
        try:
            found.append(answers.get(timeout=1.0))
        except queue.Empty:
            dead = [f"{number} ({rank.exitcode})" for number, rank in enumerate(ranks) if rank.exitcode]
            if dead or time.monotonic() > deadline:
                why = f"rank(s) ended, by exit code: {', '.join(dead)}" if dead else f"waited {TIMEOUT_S:g} s"
                raise RuntimeError(f"{len(found)} of {len(ranks)} ranks have answered: {why}") from None
    return found


def main() -> int:
    """Compare all cases; exit code 1 if a write differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    for name in args.cases:
        model, server = CASES[name]
        with tempfile.TemporaryDirectory(prefix="shape-") as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config_of(model)))
            answers = context.Queue()
            ranks = [
                context.Process(target=compare, args=(name, rank, directory, answers), daemon=True)
                for rank in range(server.tp)
            ]
            for process in ranks:
                process.start()
            results += collect(ranks, answers)
            for process in ranks:
                process.join(60)
        for found in results[-server.tp :]:
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        if args.out:
            document = {
                "command": ["python", "-m", "benchmarks.trace_shapes", *sys.argv[1:]],
                "machine": machine(),
                "ranks": results,
            }
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    wrong = [r for r in results if r["only_traced"] or r["only_synthesised"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
