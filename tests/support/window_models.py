"""Tiny random models whose caches hold more than all keys and values: windows, chunks, states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WINDOW = 128
TEXT: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=65536, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, num_local_experts=4)
SLIDES = ["sliding_attention"]
FULL = ["full_attention"]

# name -> (configuration, model, options)
WINDOWED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(
        num_hidden_layers=6, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=SLIDES * 5 + FULL)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(
        num_hidden_layers=2, sliding_window=WINDOW, **EXPERTS)),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", dict(
        num_hidden_layers=2, layer_types=["linear_attention", *FULL], linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)),
    "gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM", dict(
        num_hidden_layers=6, num_kv_shared_layers=2, sliding_window=WINDOW, layer_types=(SLIDES * 2 + FULL) * 2,
        vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 6)),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", dict(
        num_hidden_layers=4, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=WINDOW)),
    "deepseek": ("DeepseekV3Config", "DeepseekV3ForCausalLM", dict(
        num_hidden_layers=2, num_key_value_heads=4, head_dim=8, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=32)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(num_hidden_layers=2, sliding_window=WINDOW)),
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(num_hidden_layers=2)),
}  # fmt: skip


def windowed(name: str, **changes: Any) -> Any:
    """Make a model of WINDOWED."""
    import transformers

    config, model, options = WINDOWED[name]
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, model)
    return make(getattr(transformers, config)(**TEXT | options | changes)).eval()
