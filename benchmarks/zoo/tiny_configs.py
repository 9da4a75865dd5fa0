"""Tiny configurations of any transformers model, made by rewriting the size fields of the default configuration.

    LlamaConfig()  hidden_size 4096, 32 layers of 32 heads     ->     hidden_size 64, 2 layers of 4 heads

A field is recognized by its name, in nested configurations, too. A list with an item per layer is reduced to one layer
of each kind. Models whose widths are lists (hierarchical vision models) have their original widths, but fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
VOCABULARY, POSITIONS, WINDOW = 128, 512, 4
LARGE_PATCH = 8  # min patch size at which image patches are the tokens; smaller ones are merged by convolutions
RANKS = {"q_lora_rank": 32, "kv_lora_rank": 24, "o_lora_rank": 16}
LATENT_HEADS = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_head_dim": 24}

# The first pattern that matches a whole name gives the largest value of the field; None: unchanged.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"type_vocab_size|num_kv_shared_layers|num_nextn_predict_layers|num_residual_layers|num_lstm_layers", None),
    (r"(\w+_)?(vocab_size|vocab_size_per_layer_input|n_vocab|byte_group_vocab|n_words)", VOCABULARY),
    (r"num_hidden_layers|num_layers|n_layers?|depth|(num_)?(encoder|decoder|text|vision)_(hidden_)?layers", LAYERS),
    (r"(\w+_)?(num_blocks|resampler_depth|num_pre_layers|n_text_layers|num_encoder_blocks)", LAYERS),
    (r"num_mem_blocks", 1),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_(d_head|head_dim)|linear_(key|value)_head_dim", HEAD_DIM),
    (r"linear_num_key_heads", 2),
    (r"mamba_n_groups|n_group|topk_group|num_expert_group", 1),
    (r"index_topk", 4),
    (r"rotary_dim", 8),
    (r"(\w+_)?(kv_heads|key_value_heads)", KV_HEADS),
    (r"(\w+_)?(attention_heads|num_heads|n_heads?|num_value_heads)", HEADS),
    (r"(\w+_)?(head_dim|d_kv|dim_head|attention_head_size)", HEAD_DIM),
    (r"(\w+_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"(n_routed|num|num_local|moe_num|num_moe|num_routed|n)_experts", 4),
    (r"(\w+_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|n_inner|intermediate_dim|ffn_hidden_size|mlp_hidden_size)", 96),
    (r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|embd_dim|d_embed|emb_dim)", HIDDEN),
    (r"dim|width|hidden_size_global|projection_dim|out_hidden_size|entity_emb_size|mla_scale_dim|lru_width", HIDDEN),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq(uence)?_len(gth)?", POSITIONS),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|local_attention", WINDOW),
)
PER_LAYER = re.compile(r"layer|block|type|rope|pattern|window|list")  # names of lists with an item per layer
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Not derivable from names: changes to the configuration of a type, applied last.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDES, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(rope_parameters={FULL: ROPE, SLIDES: ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "gemma3n_text": dict(
        num_hidden_layers=6, num_kv_shared_layers=2, intermediate_size=96, layer_types=[SLIDES, SLIDES, FULL] * 2,
        activation_sparsity_pattern=[0.95, 0.0] * 3),
    "granitemoehybrid": dict(layer_types=[LINEAR, FULL], num_hidden_layers=2),
    "hunyuan_v1_dense": dict(head_dim=HEAD_DIM),
    "hunyuan_v1_moe": dict(head_dim=HEAD_DIM),
    "lfm2_moe": dict(layer_types=["conv", FULL], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=16),
    "ministral": dict(head_dim=HEAD_DIM),
    "nemotron": dict(num_key_value_heads=KV_HEADS),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "layoutlmv3": dict(coordinate_size=8, shape_size=16),
    "perceiver": dict(d_latents=HIDDEN, num_latents=8, num_blocks=1, num_self_attends_per_block=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=HEAD_DIM, indexer_budget=8, indexer_compress_ratio=2),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        layers_block_type=[LINEAR, "hybrid", "hybrid"], num_hidden_layers=3, attention_hidden_size=128,
        attention_head_dim=32, mamba_dt_rank=4),
    "zamba2": dict(attention_hidden_size=128, attention_head_dim=32, mamba_headdim=16),
}  # fmt: skip


def tiny(make: Callable[..., Any]) -> Any:
    """Return a small configuration of the class `make`. Raises what the class raises."""
    return make(**shrunk(make()))


def shrunk(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that change, nested configurations as dictionaries of all their fields."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    is_hierarchical = any(isinstance(value, (list, tuple)) for name, value in fields.items() if name.endswith("heads"))
    kept = kept_layers(fields)
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            changes[name] = nested(value)
        elif isinstance(value, (list, tuple)):
            changes |= _shorter(name, value, fields, kept)
        elif isinstance(value, int) and not isinstance(value, bool) and not is_hierarchical:
            changes |= _smaller(name, value, fields)
    if kept and not is_hierarchical:
        changes |= {name: len(kept) for name in LAYER_COUNTS if isinstance(fields.get(name), int)}
    changes |= _tokens(fields) | _rotary(fields, changes) | _single_layers(fields, kept)
    return changes | EXCEPTIONS.get(config.model_type, {})


def nested(config: Any) -> dict[str, Any]:
    """Return a nested configuration in its parent's form."""
    plain = {name: value for name, value in _plain(config).items() if name != "per_layer_config"}
    return {"model_type": config.model_type, **plain, **shrunk(config)}


def _plain(config: Any) -> dict[str, Any]:
    """Return the fields of a nested configuration that differ from its class's defaults."""
    try:
        return dict(config.to_diff_dict())
    except Exception:  # some classes cannot be compared with their defaults
        return {}


def kept_layers(fields: Mapping[str, Any]) -> list[int]:
    """Return layers of different kinds, at least two, in order."""
    count = next((fields[name] for name in LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    lists = [v for name, v in fields.items() if _is_per_layer(name, v, count)]
    if not lists:
        return []
    kinds: dict[str, int] = {}
    for layer, items in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(str(items), layer)
    kept = list(kinds.values())[:6]
    return sorted({*kept, *range(min(LAYERS, count) if len(kept) < LAYERS else 0)})


def _is_per_layer(name: str, value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and count > 1 and len(value) == count and bool(PER_LAYER.search(name))


def _shorter(name: str, value: Any, fields: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    count = next((fields[n] for n in LAYER_COUNTS if isinstance(fields.get(n), int)), 0)
    if _is_per_layer(name, value, count):
        return {name: [value[i] for i in kept]}
    if re.fullmatch(r"depths|num_layers|num_blocks|layers|blocks_per_stage", name):
        return {name: [min(int(n), 1) for n in value]}
    return {}


def _smaller(name: str, value: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    if name in RANKS:
        return {name: RANKS[name]}
    if "qk_rope_head_dim" in fields and (name in LATENT_HEADS or name == "head_dim"):
        return {name: LATENT_HEADS.get(name, LATENT_HEADS["qk_rope_head_dim"])}
    patch = fields.get("patch_size")
    if name == "image_size" and isinstance(patch, int) and patch >= LARGE_PATCH:
        return {name: min(value, 4 * patch)}
    largest = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    if largest is None or value <= largest:
        return {}
    heads = next((fields[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in fields), None)
    if largest == KV_HEADS and value == heads and name.endswith("heads"):
        return {name: HEADS}
    return {name: largest}


def _single_layers(fields: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the overrides of single layers, for the retained layers."""
    own = fields.get("per_layer_config")
    if not isinstance(own, dict):
        return {}
    by_layer = {int(layer): values for layer, values in own.items()}
    values = {new: by_layer[old] for new, old in enumerate(kept) if old in by_layer}
    small = {
        new: {n: _smaller(n, v, fields).get(n, v) if isinstance(v, int) else v for n, v in layer.items()}
        for new, layer in values.items()
        if isinstance(layer, dict)
    }
    return {"per_layer_config": small}


def _tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return distinct special tokens inside the small vocabulary."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    names = [n for n, v in fields.items() if re.search(r"_token_(id|index|ids)$", n) and _is_large(v)]
    free = iter(range(VOCABULARY - 1, 3, -1))
    return {name: known[name] if name in known else next(free) for name in names}


def _is_large(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_large(item) for item in value)
    return isinstance(value, int) and value >= VOCABULARY


def _rotary(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters whose lists fit the small head."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    size = {**fields, **changes}.get("head_dim") or HEAD_DIM
    return {"rope_parameters": _fitted(rope, size if isinstance(size, int) else HEAD_DIM)}


def _fitted(rope: Mapping[str, Any], size: int) -> dict[str, Any]:
    pairs = int(size * float(rope.get("partial_rotary_factor") or 1.0)) // 2
    new = {name: _fitted(value, size) if isinstance(value, dict) else value for name, value in rope.items()}
    for name in ("short_factor", "long_factor"):
        if isinstance(new.get(name), (list, tuple)):
            new[name] = list(new[name])[:pairs]
    section = new.get("mrope_section")
    if isinstance(section, (list, tuple)):
        share = pairs // len(section)
        new["mrope_section"] = [pairs - share * (len(section) - 1), *[share] * (len(section) - 1)]
    return new
