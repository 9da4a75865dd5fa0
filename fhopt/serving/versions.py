"""Supported vLLM versions, and the hooks that the plugin needs.

vLLM has no stable interface for attention backends: a release may move what the plugin depends on. One range of
versions is therefore supported, HOOKS lists every dependency, and a test in the environment of `make test-serving`
finds moved ones.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from fhopt.errors import FhoptError

FROM, BEFORE = (0, 32), (0, 33)  # supported vLLM versions

# Modules, and what the plugin uses of them.
HOOKS = {
    "vllm.config": ("get_current_vllm_config", "DeviceConfig.device_type"),
    "vllm.forward_context": ("get_forward_context", "ForwardContext.no_compile_layers", "ForwardContext.attn_metadata"),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.layers.attention_layer_base": ("AttentionLayerBase.get_kv_cache_spec",),
    "vllm.model_executor.layers.linear": ("LinearBase", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.quantization": ("register_quantization_config",),
    "vllm.model_executor.layers.quantization.base_config": (
        "QuantizationConfig.maybe_update_config", "QuantizationConfig.get_quant_method",
    ),
    "vllm.v1.attention.backend": (
        "AttentionBackend.supported_kv_cache_layouts", "AttentionBackend.customize_spec", "AttentionImpl",
        "AttentionMetadataBuilder.build", "AttentionMetadataBuilder.get_cudagraph_support",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE", "CommonAttentionMetadata.block_table_tensor",
        "CommonAttentionMetadata.query_start_loc_cpu", "CommonAttentionMetadata.seq_lens",
    ),
    "vllm.v1.core.kv_cache_utils": ("resolve_block_hashes", "get_max_concurrency_for_kv_cache_config"),
    "vllm.v1.core.single_type_kv_cache_manager": (
        "SlidingWindowManager.get_num_blocks_to_allocate", "SlidingWindowManager.allocate_new_blocks",
        "SlidingWindowManager._remove_blocks_in_range", "SlidingWindowManager.pop_blocks_for_free",
        "SlidingWindowManager.find_longest_cache_hit", "SlidingWindowManager.reachable_block_mask",
        "SlidingWindowManager.get_num_skipped_tokens", "SlidingWindowManager._get_num_evictable_blocks",
    ),
    "vllm.v1.kv_cache_interface": (
        "FullAttentionSpec.state_content_bytes", "FullAttentionSpec.num_head_slots",
        "FullAttentionSpec.tokens_per_state", "SlidingWindowSpec.max_admission_blocks_per_request",
    ),
    "vllm.v1.kv_cache_layout": ("KVCacheLayout.BLNHC",),
    "vllm.v1.kv_cache_spec_registry": ("KVCacheSpecRegistry.register", "KVCacheSpecRegistry._ensure_registered"),
}  # fmt: skip


def check_version(version: str) -> None:
    """Raise FhoptError for an unsupported vLLM version."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not FROM <= numbers < BEFORE:
        raise FhoptError(
            f"vLLM {version} is not supported; expected at least {_text(FROM)} and below {_text(BEFORE)}. "
            "Install it with: pip install 'fhopt[vllm]'."
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def missing_hooks() -> list[str]:
    """List the hooks that the installed vLLM lacks."""
    return [f"{module}.{name}" for module, names in HOOKS.items() for name in names if not _has(module, name)]


def _has(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    for part in name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        if not hasattr(found, part) and part not in fields:
            return False
        found = getattr(found, part, None)
    return True
