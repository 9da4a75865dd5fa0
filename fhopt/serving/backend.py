"""vLLM's view of a layer with a plan: attention backend, batch metadata, and two additional caches.

An `Attention` layer of vLLM stores packed latents under its own name. Residual window and first tokens are separate
vLLM layers, `<name>.window` and `<name>.first`, with their own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from fhopt.plan.window import ResidualWindow
from fhopt.serving.batch import Batch, SequenceBlocks
from fhopt.serving.block_groups import FirstSpec, WindowSpec
from fhopt.serving.block_sizes import BlockSizes
from fhopt.serving.device_step import DeviceStep
from fhopt.serving.layer_cache import LayerCache
from fhopt.serving.layer_rows import CacheMemory, Caches

WINDOW, FIRST = ".window", ".first"  # suffixes of the layer name


@dataclass
class LatentMetadata(AttentionMetadata):  # type: ignore[misc]
    """A batch's blocks in one cache."""

    blocks: SequenceBlocks


class LatentMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Builds the metadata of a batch; layers that share blocks share it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return single-token decode support if all layers have kernels that CUDA graphs can record."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        caches = [
            impl.cache for impl in (getattr(x, "impl", None) for x in layers) if isinstance(impl, LatentAttention)
        ]
        recordable = caches and all(isinstance(cache.compiled, DeviceStep) for cache in caches)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if recordable else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Build the metadata of a batch."""
        about, key = common_attn_metadata, f"_fhopt_{self.kv_cache_spec.block_size}"
        blocks = getattr(about, key, None)
        if blocks is None or blocks.table is not about.block_table_tensor:
            starts = about.query_start_loc_cpu[: about.num_reqs + 1].tolist()
            lengths = about.seq_lens[: about.num_reqs]  # on a GPU they stay there
            device = about.block_table_tensor.device
            batch = Batch(starts, lengths.tolist() if lengths.is_cpu else lengths, device)
            blocks = SequenceBlocks(batch, about.block_table_tensor, self.kv_cache_spec.block_size)
            setattr(about, key, blocks)
        return LatentMetadata(blocks)


class LatentBackend(AttentionBackend):  # type: ignore[misc]
    """Attention backend for the caches of a plan."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """Return the backend name in vLLM's registry, which does not list this backend."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentAttention]:
        """Return the attention class of a layer."""
        return LatentAttention

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """Return the metadata builder class."""
        return LatentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Return the only layout in which layers with different row sizes share blocks."""
        return (KVCacheLayout.BLNHC,)


class LatentAttention(AttentionImpl):  # type: ignore[misc]
    """vLLM attention implementation of one layer with a plan."""

    def __init__(self, layer: Any, cache: LayerCache, window: FurtherCache, first: FurtherCache) -> None:
        exact = layer.impl
        self.num_heads, self.head_size, self.scale = exact.num_heads, exact.head_size, exact.scale
        self.num_kv_heads, self.kv_cache_dtype = exact.num_kv_heads, "auto"
        self.cache, self.window, self.first = cache, window, first

    def _caches(self, latents: Tensor, blocks: SequenceBlocks) -> Caches:
        """Collect the layer's caches and the blocks of the current batch."""
        window, first = self.window, self.first
        metadata = get_forward_context().attn_metadata
        return Caches(
            CacheMemory(latents, blocks),
            CacheMemory(window.kv_cache, metadata[window.layer_name].blocks),
            CacheMemory(first.kv_cache, metadata[first.layer_name].blocks),
        )

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Write keys [T,G,D] and values [T,G,E] of new tokens; attend with queries [T,H,D] into `output` [T,H,E]."""
        if attn_metadata is None or not kv_cache.numel():  # memory profiling, or nothing to compute
            return output.fill_(0)
        self.cache.write_and_attend(self._caches(kv_cache, attn_metadata.blocks), query, key, value, output)
        return output


class FurtherCache(torch.nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """An additional cache of a layer, for which vLLM allocates blocks as for a layer."""

    def __init__(self, name: str, spec: Any) -> None:
        super().__init__()
        self.kv_cache, self.layer_name, self.spec = torch.tensor([]), name, spec
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[LatentBackend]:
        """Return the backend for the plan's caches."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Return the cache's specification for vLLM."""
        return self.spec

    def forward(self) -> None:
        """Do nothing: the layer's attention uses the cache."""


def use_plan(layer: Any, cache: LayerCache, sizes: BlockSizes, row_bytes: int, window: ResidualWindow) -> None:
    """Set up an `Attention` layer of vLLM for packed latents of `row_bytes` per token, window and first tokens."""
    name = layer.layer_name
    packed = dict(
        num_kv_heads=layer.num_kv_heads, head_size=layer.head_size, head_size_v=layer.head_size_v, dtype=torch.uint8,
        num_head_slots=1, dcp_sharded=False,
    )  # fmt: skip
    spec = FullAttentionSpec(block_size=sizes.latents, state_content_bytes=row_bytes, **packed)
    layer.window_cache = FurtherCache(name + WINDOW, WindowSpec(
        block_size=sizes.window, sliding_window=window.capacity, window=window,
        state_content_bytes=cache.window_rows.size, **packed,
    ))  # fmt: skip
    layer.first_cache = FurtherCache(name + FIRST, FirstSpec(
        block_size=sizes.first, sliding_window=1, tokens_per_state=sizes.first,
        state_content_bytes=cache.first_rows.size, **packed,
    ))  # fmt: skip
    layer.impl = LatentAttention(layer, cache, layer.window_cache, layer.first_cache)
    layer.attn_backend = LatentBackend
    layer.get_kv_cache_spec = lambda vllm_config: spec
