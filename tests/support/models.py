"""Tiny random checkpoints that a real vLLM can serve: a transformers config, seeded weights, a tokenizer.

python -m tests.support.models KIND FOLDER [NAME=NUMBER ...]      arguments of the config, such as hidden_size
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VOCAB = 512
HIDDEN = 128
LAYERS = 2
_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
_UNTIED = {**_DENSE, "tie_word_embeddings": False}
_MOE = {**_UNTIED, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# kind -> (transformers model class, config arguments)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", _UNTIED),
    "llama_tied": ("LlamaForCausalLM", {**_DENSE, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_DENSE, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4, "decoder_sparse_step": 1}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **{k: v for k, v in _MOE.items() if k != "head_dim"},
            "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "q_lora_rank": None, "qk_nope_head_dim": 32, "v_head_dim": 32,
            # vLLM's CPU kernel for MLA knows one size of the latent cache: 512 + 64
            "kv_lora_rank": 512, "qk_rope_head_dim": 64, "topk_method": "greedy", "n_group": 1,
            "topk_group": 1, "num_hidden_layers": 3,
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", _UNTIED),
    "phi3": ("Phi3ForCausalLM", _UNTIED),
    "mixtral": ("MixtralForCausalLM", {**_UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_positions": 512, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4,
         "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    ),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4, "seq_length": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**{k: v for k, v in _UNTIED.items() if k not in ("head_dim", "num_key_value_heads")},
         "rotary_pct": 1.0},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 192, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "init_std": 0.2},
    ),
}  # fmt: skip


def build_checkpoint(
    kind: str, path: Path, *, dtype: str = "bfloat16", seed: int = 0, **overrides: Any
) -> Path:
    """Write a seeded random model and a tokenizer to ``path``; the same arguments give the same bytes.

    Args:
        kind: a key of ``KINDS``.
        dtype: "bfloat16" or "float32".
        overrides: config arguments that replace the kind's own (for example ``tie_word_embeddings``).

    Returns:
        ``path``, ready for ``vllm serve``. TP 1 and 2 both divide it.
    """
    import torch
    import transformers

    class_name, arguments = KINDS[kind]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**arguments, **overrides})
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros; make every one matter
                noise = torch.randn(parameter.shape) * 0.1
                parameter.add_(noise)
        if config.tie_word_embeddings:  # else a token's best successor is always itself
            model.get_input_embeddings().weight.mul_(0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    write_tokenizer(path, vocab_size=config.vocab_size)
    return path


def write_tokenizer(path: Path, *, vocab_size: int = VOCAB) -> None:
    """A byte-level tokenizer without merges; ids past the bytes are words, so every id can be decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{index}" for index in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    overrides = {name: int(number) for name, number in (word.split("=") for word in sys.argv[3:])}
    print(build_checkpoint(sys.argv[1], Path(sys.argv[2]), **overrides))
