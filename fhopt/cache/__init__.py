"""The KV cache of latents: layers, the residual window, packed latents, reports of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.cache.latent_cache import LatentCache as LatentCache
    from fhopt.cache.layer_map import latent_layers as latent_layers
    from fhopt.cache.layer_map import plain_layers as plain_layers
    from fhopt.cache.report import cache_bytes as cache_bytes
    from fhopt.cache.report import cache_report as cache_report

_WHERE = {
    "LatentCache": "fhopt.cache.latent_cache",
    "latent_layers": "fhopt.cache.layer_map",
    "plain_layers": "fhopt.cache.layer_map",
    "cache_bytes": "fhopt.cache.report",
    "cache_report": "fhopt.cache.report",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = ["LatentCache", "cache_bytes", "cache_report", "latent_layers", "plain_layers"]
