"""The KV cache of latents: layers, the residual window, packed latents, reports of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.cache.latent_cache import LatentCache as LatentCache
    from fhopt.cache.latent_cache import LatentEncoderDecoderCache as LatentEncoderDecoderCache
    from fhopt.cache.latent_cache import encoder_decoder_cache as encoder_decoder_cache
    from fhopt.cache.layer_map import latent_layers as latent_layers
    from fhopt.cache.layer_map import plain_layers as plain_layers
    from fhopt.cache.report import cache_bytes as cache_bytes
    from fhopt.cache.report import cache_report as cache_report
    from fhopt.plan.layer_index import cached_sites as cached_sites
    from fhopt.plan.layer_index import layer_indices as layer_indices

_WHERE = {
    "layer_indices": "fhopt.plan.layer_index",
    "cached_sites": "fhopt.plan.layer_index",
    "encoder_decoder_cache": "fhopt.cache.latent_cache",
    "LatentEncoderDecoderCache": "fhopt.cache.latent_cache",
    "LatentCache": "fhopt.cache.latent_cache",
    "latent_layers": "fhopt.cache.layer_map",
    "plain_layers": "fhopt.cache.layer_map",
    "cache_bytes": "fhopt.cache.report",
    "cache_report": "fhopt.cache.report",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = [
    "LatentCache",
    "LatentEncoderDecoderCache",
    "cache_bytes",
    "cache_report",
    "cached_sites",
    "encoder_decoder_cache",
    "latent_layers",
    "layer_indices",
    "plain_layers",
]
