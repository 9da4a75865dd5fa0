"""quant_method "fhopt" in vLLM: weights are unchanged, attention stores the latents of a plan.

vLLM selects the method by `quantization_config` in a rewritten folder's config.json, and queries it for every layer
that it creates. The folder is verified before weights are loaded.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from fhopt import codegen
from fhopt.models.rewritten_folder import METHOD, read_folder
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan
from fhopt.serving import backend, block_sizes, refusals
from fhopt.serving.batch import means_from
from fhopt.serving.layer_cache import LayerCache


class VllmConfig(QuantizationConfig):  # type: ignore[misc]
    """The quantization configuration of a rewritten folder."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: LatentPlan | None = None

    def get_name(self) -> str:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the supported model dtypes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the minimum GPU capability."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything is in config.json and in the plan."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Make the configuration from `quantization_config`."""
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Load and verify the model's folder. Raises FhoptError."""
        folder = read_folder(Path(model_name))
        refusals.check_served_folder(folder, hf_config)
        self.plan = folder.plan

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Set up the plan's caches for an attention layer; linear layers stay unquantized."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, Attention) and not isinstance(layer.impl, backend.LatentAttention):
            self._use(layer, prefix)
        return None

    def _use(self, layer: Any, prefix: str) -> None:
        refusals.check_layer(layer, prefix)
        made = self._made
        name = made.names(prefix)
        backend.use_plan(layer, made.caches[name], made.sizes, made.rows[name], made.plan.window)

    @cached_property
    def _made(self) -> _Made:
        assert self.plan is not None, "maybe_update_config was called"
        return _Made(self.plan, get_current_vllm_config())


register_quantization_config(METHOD)(VllmConfig)


class _Made:
    """The caches of a model's layers in one process, made once the engine's configuration is known."""

    def __init__(self, plan: LatentPlan, config: Any) -> None:
        refusals.check_engine(plan, config)
        codegen.register_kernels()
        codegen.build_all()
        parallel = config.parallel_config
        self.plan, dtype = plan, config.model_config.dtype
        self.device = torch.device(config.device_config.device_type)
        sites = [refusals.local_site(site, parallel.tensor_parallel_size, parallel.rank) for site in plan.sites]
        self.caches = {site.site.name: self._cache(site, dtype) for site in sites}
        self.rows = block_sizes.uneven({name: cache.latent_rows.size for name, cache in self.caches.items()})
        given = config.cache_config.block_size if config.cache_config.user_specified_block_size else None
        self.sizes = block_sizes.choose_block_sizes(self._needs(config.model_config.max_model_len), given)

    def _cache(self, site: SitePlan, dtype: torch.dtype) -> LayerCache:
        cache = LayerCache(self.plan, site, site.site.scale, dtype, self.device)
        cache.compile()
        return cache

    def _needs(self, tokens: int) -> block_sizes.CacheNeeds:
        caches = list(self.caches.values())
        return block_sizes.CacheNeeds(
            layers=len(caches), latent_bytes=sum(self.rows.values()),
            window_bytes=max(cache.window_rows.size for cache in caches),
            first_bytes=max(cache.first_rows.size for cache in caches), window=self.plan.window,
            first=max(1, self.plan.sinks, means_from(self.plan)), tokens=tokens,
        )  # fmt: skip

    def names(self, prefix: str) -> str:
        """Return the site name of the layer that vLLM calls `prefix`. Raises FhoptError."""
        return self.plan.site(prefix.removesuffix(".attn")).site.name
