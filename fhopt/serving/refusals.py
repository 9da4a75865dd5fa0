"""Rejection of unsupported models, plans and engine options, each with one message and a fix.

Checked before the engine allocates memory: the folder when vLLM loads its configuration, options and layers when it
builds the model.
"""

from __future__ import annotations

from typing import Any

from fhopt.errors import FhoptError
from fhopt.models.rewritten_folder import RewrittenFolder
from fhopt.models.stored_weights import check_stored
from fhopt.parallel.tensor_parallel import Share, shard_site
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.layer_index import layer_indices
from fhopt.plan.segment_rotation import MAX_TOKENS
from fhopt.plan.site_plan import SitePlan


def check_served_folder(folder: RewrittenFolder, hf_config: Any) -> None:
    """Raise FhoptError for a folder whose plan an engine cannot serve. hf_config: of transformers, or None."""
    plan = folder.plan
    check_stored(plan, folder.path)
    for site in plan.sites:
        one = site.site
        if (one.kind, one.mask) != ("self", "causal") or one.window or one.sinks or one.softcap:
            raise FhoptError(
                f"{one.name} is {one.kind} attention with a {one.mask!r} mask"
                f"{', a sliding window' if one.window else ''}{', sink logits' if one.sinks else ''}"
                f"{', a softcap' if one.softcap else ''}; "
                "expected causal self-attention to all tokens in vLLM. Serve the original model, or use "
                "fhopt with transformers."
            )
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    known = len(layer_indices([site.site for site in plan.sites]))
    if layers and known != layers:
        raise FhoptError(
            f"the plan of {folder.path} covers {known} of {layers} layers; expected all of them in vLLM. "
            "Serve the original model, or use fhopt with transformers."
        )


def check_engine(plan: LatentPlan, config: Any) -> None:
    """Raise FhoptError for engine options that do not support a plan. config: vLLM's configuration."""
    cache, parallel = config.cache_config, config.parallel_config
    speculative = getattr(config.speculative_config, "method", None)
    found = [
        (cache.cache_dtype != "auto", f"--kv-cache-dtype {cache.cache_dtype}",
         "the plan determines how keys and values are stored"),
        (parallel.pipeline_parallel_size > 1, f"--pipeline-parallel-size {parallel.pipeline_parallel_size}",
         "a plan is served by one process, or by several with --tensor-parallel-size"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "a plan's blocks cannot be split"),
        (speculative not in (None, "ngram"), f"speculative decoding by {speculative!r}",
         "the draft model has no plan; ngram does not need one"),
        (config.kv_transfer_config is not None, "a KV connector", "it does not support a plan's caches"),
        (bool(config.scheduler_config.disable_hybrid_kv_cache_manager), "--disable-hybrid-kv-cache-manager",
         "a plan has several caches"),
    ]  # fmt: skip
    for is_found, what, why in found:
        if is_found:
            raise FhoptError(f"{what} is not supported with an fhopt plan: {why}. Drop it.")
    if config.device_config.device_type != "cpu":
        plan.check_uniform("vLLM on a GPU")
    longest = config.model_config.max_model_len
    if plan.segment and longest > MAX_TOKENS:
        raise FhoptError(
            f"--max-model-len {longest} exceeds the limit for plans with segments; expected at most "
            f"{MAX_TOKENS}. Lower it, or refit with: fhopt fit MODEL --segment 0."
        )
    for site in plan.sites:
        local_site(site, parallel.tensor_parallel_size, 0)


def local_site(site: SitePlan, count: int, rank: int) -> SitePlan:
    """Return a site's plan for one of `count` processes. Raises FhoptError if heads do not divide evenly."""
    if count == 1:
        return site
    groups, heads = {site.key.groups, site.value.groups}, site.site.kv_heads
    if groups != {heads} or site.is_shared or heads % count:
        raise FhoptError(
            f"--tensor-parallel-size {count} does not fit {site.site.name}, with {heads} kv heads in "
            f"{max(groups)} latent heads; expected one latent per kv head and a divisor of {heads}. Refit "
            "with --layout head, or use one process."
        )
    return shard_site(site, Share(rank % count, count))


def check_layer(layer: Any, name: str) -> None:
    """Raise FhoptError for a vLLM attention layer with features that plans do not support."""
    impl = layer.impl
    found = [
        ("a sliding window", layer.sliding_window is not None),
        ("a softcap", bool(getattr(impl, "logits_soft_cap", 0))),
        ("ALiBi slopes", getattr(impl, "alibi_slopes", None) is not None),
        ("sink logits", getattr(impl, "sinks", None) is not None),
        ("keys of another layer", layer.kv_sharing_target_layer_name is not None),
        ("another type than the decoder's", layer.attn_type != "decoder"),
    ]
    for what, is_found in found:
        if is_found:
            raise FhoptError(
                f"{name} has {what}, which plans do not support in vLLM. Serve the original model, or use "
                "fhopt with transformers."
            )
