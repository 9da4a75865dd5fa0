"""`apply` switches a transformers model to a latent KV cache; `unapply` undoes it.

Only public interfaces of transformers are used: the attention registry, the cache class, and a forward pre-hook that
passes a `LatentCache` when the model (or `generate`) would create an ordinary one. No model source is patched: a model
with its own attention code uses the latents through `LatentTensor` (fhopt/attention/offered_latents.py).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from fhopt.decode.programs import drop_programs, use_programs
from fhopt.errors import FhoptError
from fhopt.hf.attention_interface import IMPLEMENTATION, latent_attention_forward, register_attention
from fhopt.hf.model_checks import check_cache_plan, check_decoder, check_fitted_weights
from fhopt.hf.skinny_products import is_replaced, replace_products, restore_products
from fhopt.models.model_facts import (
    cache_argument,
    encoder_path,
    implementations,
    is_inside,
    text_key,
    uses_interface,
)
from fhopt.parallel.offloaded_weights import Weights
from fhopt.parallel.tensor_parallel import local_plan
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.latent_plan import LatentPlan, PlanOrPath, as_plan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan


@dataclass
class _Applied:
    whole_plan: LatentPlan
    plan: LatentPlan  # this process's shard of it under tensor parallelism
    hooks: tuple[Any, ...]
    before: dict[str, str]  # attention implementation by sub-configuration
    layers: dict[str, int]  # cache layer index of each cached site
    cache: str  # name of the cache argument of the model's forward
    parameters: tuple[str, ...]  # of the model's forward
    is_set: bool  # IMPLEMENTATION was set
    interface: bool  # attention goes through the registry, and the code before it does not need full-length keys
    reader: Any  # shared by the caches of this model
    config: Any  # the model's
    fast: tuple[bool, bool]  # skinny_products, decode_program
    warned: set[str] = field(default_factory=set)  # messages already issued


def apply(
    model: torch.nn.Module, plan: PlanOrPath, skinny_products: bool = True, decode_program: bool = True
) -> torch.nn.Module:
    """Switch `model` to a latent KV cache as described by `plan`. Returns the model.

    model: a transformers model with a decoder, or the wrapper that `torch.compile` returned. plan: a plan or its path.

    `model.generate()` and `model(..., use_cache=True)` need no change. An empty DynamicCache or StaticCache gets latent
    layers. A cache of another class, such as that of `cache_implementation="quantized"`, is used without the plan, with
    a warning. `model.set_attn_implementation` changes the attention over latents, not the plan, and warns.
    `model.save_pretrained` writes the model without the plan; use `plan.save` or `fhopt rewrite` for it.

    Applying another plan replaces the first. Encoder sites are not compressed: they have no KV cache. Under tensor
    parallelism (fhopt/parallel/tensor_parallel.py), every process must call this with the same plan. Raises FhoptError
    if the model is not a decoder with a transformers cache, if the plan was fitted for another model, or if the plan
    does not allow the model's sharding.

    skinny_products: on CPU, use fhopt's GEMV/skinny-GEMM kernel for up to 16 rows, and its GEMM kernel for more rows in
    16-bit dtypes without native support (fhopt/hf/skinny_products.py), even if the plan compresses no site; False keeps
    torch's matmuls.
    decode_program: on CPU, run the decode step of the model as one program (fhopt/decode/), which the first decode step
    captures; False keeps torch's operations.

    Kernels that are not built yet start to compile, in threads; the first calls wait for them, or `prepare` does.
    """
    import fhopt.codegen
    from fhopt.attention.offered_latents import LatentReader

    network: Any = _uncompiled(model)  # torch types a module's attributes as tensors or modules
    check_decoder(network)
    whole_plan = as_plan(plan)
    check_fitted_weights(network, whole_plan)
    plan, encoder = local_plan(network, whole_plan), encoder_path(network)
    sites = [p.site for p in plan.sites if not is_inside(p.site.name, encoder)]
    modules = {site.name: _module(network, site.name) for site in sites}
    layers = _cache_layers(plan, sites, modules)
    register_attention()
    unapply(network)
    before = implementations(network.config)
    interface = all(map(uses_interface, modules.values()))
    if interface:
        network.set_attn_implementation(before | {text_key(network.config): IMPLEMENTATION})
    hooks = (
        network.register_forward_pre_hook(_use_latents, with_kwargs=True),
        network.register_load_state_dict_post_hook(_check_loaded),
    )
    parameters = tuple(inspect.signature(network.forward).parameters)
    network._fhopt_applied = _Applied(
        whole_plan, plan, hooks, before, layers, cache_argument(network), parameters, is_set=interface,
        interface=interface and all(site.mask != "relative" for site in sites), reader=LatentReader(),
        config=network.config, fast=(skinny_products, decode_program),
    )  # fmt: skip
    fhopt.codegen.register_kernels()
    if _reads_latents(network):
        fhopt.codegen.start_builds()
    if skinny_products:
        replace_products(network)
    if decode_program and network._fhopt_applied.interface:
        use_programs(network, tuple(_module_names(sites)), latent_attention_forward, _uses_own_attention, is_replaced)
    return model


def _cache_layers(plan: LatentPlan, sites: list[AttentionSite], modules: dict[str, torch.nn.Module]) -> dict[str, int]:
    """Return the cache layer index of each site."""
    from fhopt.plan.layer_index import cached_sites, layer_indices

    layers: dict[str, int] = {}
    for kind in ("self", "cross"):
        by_name = layer_indices([s for s in sites if s.kind == kind])
        layers |= {name: _layer_index(modules[name], index) for name, index in by_name.items()}
        cached_sites(plan, kind, layers)
    return layers


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module wrapped by `torch.compile`; any other module unchanged."""
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _check_loaded(model: torch.nn.Module, _: Any) -> None:
    """Warn if `load_state_dict` loaded weights that the applied plan was not fitted for.

    Runs as a post-hook: the weights are loaded already.
    """
    try:
        check_fingerprint(_applied(model).whole_plan, Weights(model), type(model).__name__)
    except FhoptError as error:
        warnings.warn(f"weights were loaded while a plan was applied: {error}", RuntimeWarning, stacklevel=2)


def _layer_index(module: torch.nn.Module, index: int) -> int:
    """Return a module's layer index in the cache: `layer_idx`, else `index`; a shared module has -1 (Zamba2)."""
    own = getattr(module, "layer_idx", None)
    return own if isinstance(own, int) and own >= 0 else index


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Wait until the kernels for the plan applied to `model` are built. Returns the model.

    Kernels serve every plan and are cached on disk: a machine builds them once, in about half a minute on 2
    cores. Without this call, the first tokens wait for them, and lines on stderr report it. Does nothing for a model
    without a plan.
    """
    import fhopt.codegen

    if _record(model) is not None and _reads_latents(model):
        fhopt.codegen.build_all()
    return model


def _compressed(model: torch.nn.Module) -> list[SitePlan]:
    """Return the sites that have latent layers in a cache of the model; the others stay in full precision."""
    from fhopt.cache.layer_map import LATENT_LAYERS

    cache = latent_cache(model)
    pair = (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None))
    layers = [layer for part in pair if part is not None for layer in part.layers]
    return [layer.site for layer in layers if isinstance(layer, LATENT_LAYERS)]


def _reads_latents(model: torch.nn.Module) -> bool:
    """Return whether the model attends to latents on CPU; False if every site is in full precision."""
    weight = next(model.parameters(), None)
    if weight is None or weight.device.type != "cpu":
        return False
    return any(not site.is_exact for site in _compressed(model))


def unapply(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `apply`; no effect on a model without a plan. Returns the model."""
    applied = _record(model)
    if applied is not None:
        network: Any = _uncompiled(model)
        for hook in applied.hooks:
            hook.remove()
        applied.reader.active = False
        if _uses_latents(network.config):
            network.set_attn_implementation(applied.before)
        drop_programs(network)
        restore_products(network)
        del network._fhopt_applied
    return model


@contextmanager
def attended_by(model: Any, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Run the model with `attention`, registered as `name`, inside the context, without a plan and without masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    unapply(model)
    before = model.config._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return model.get_submodule(name.partition("#")[0])
    except AttributeError as error:
        raise FhoptError(
            f"the plan names {name}, which {type(model).__name__} does not have. Fit a plan for this model."
        ) from error


def _module_names(sites: list[AttentionSite]) -> dict[str, None]:
    return dict.fromkeys(site.name.partition("#")[0] for site in sites)


def _uses_own_attention(model: Any) -> bool:
    return _uses_latents(model.config)


def _uses_latents(config: Any) -> bool:
    return bool(config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION)


# --------------------------------------------------------------------------------------------------- caches


def _use_latents(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass a latent cache to a forward without a cache, and give latent layers to an empty ordinary cache.

    A forward pre-hook. Raises FhoptError for a latent cache of another model.
    """
    applied: _Applied = model._fhopt_applied  # type: ignore[assignment]
    applied.reader.active = applied.interface and _uses_latents(applied.config)
    named = {**dict(zip(applied.parameters, args, strict=False)), **kwargs}
    cache = next((named[n] for n in ("cache", "past_key_values") if named.get(n) is not None), None)
    if cache is not None:
        _convert(cache, applied)
        _check_attention(cache, applied)
        _note_padding(cache, named, applied)
        return args, kwargs
    uses_cache = named.get("use_cache")
    if uses_cache is None:
        uses_cache = getattr(applied.config.get_text_config(decoder=True), "use_cache", True) and not model.training
    if uses_cache:
        cache = latent_cache(model)
        _check_attention(cache, applied)
        _note_padding(cache, named, applied)
        kwargs = {**kwargs, applied.cache: cache}
    return args, kwargs


def _check_attention(cache: Any, applied: _Applied) -> None:
    """Warn if another attention implementation was set after the plan was applied; it attends to latents.

    Raises FhoptError for an implementation that cannot.
    """
    if not applied.is_set or _uses_latents(applied.config) or not _has_latents(cache):
        return
    name = applied.config.get_text_config(decoder=True)._attn_implementation
    if name == "flex_attention":
        raise FhoptError(
            "attention 'flex_attention' does not support latents; expected 'fhopt', 'sdpa' or 'eager'. Call "
            "model.set_attn_implementation('fhopt'), or remove the plan with fhopt.unapply(model)."
        )
    _warn(
        applied,
        f"attention {name!r} was set after a plan was applied: the KV cache still holds latents, and {name!r} attends "
        "to them. Call fhopt.unapply(model) for a full-precision cache, or model.set_attn_implementation('fhopt') for "
        "fhopt's kernels.",
    )


def _has_latents(cache: Any) -> bool:
    """Return whether a cache has latent layers."""
    from fhopt.cache.layer_map import LATENT_LAYERS

    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return any(isinstance(layer, LATENT_LAYERS) for layer in layers)


def _warn(applied: _Applied, message: str) -> None:
    """Warn once per applied plan and message; never while compiling."""
    if not torch.compiler.is_compiling() and message not in applied.warned:
        applied.warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _note_padding(cache: Any, named: dict[str, Any], applied: _Applied) -> None:
    """Report left padding of this call's sequences to an empty cache, so that it does not count as attention sinks.

    named: arguments of the model's forward. A graph under compilation cannot inspect mask values, but it can compute
    with position ids.
    """
    prefix = "decoder_" if applied.config.is_encoder_decoder else ""
    ids = next((named[n] for n in (f"{prefix}input_ids", f"{prefix}inputs_embeds") if named.get(n) is not None), None)
    if ids is None or ids.shape[1] == 1:
        return
    from fhopt.cache.left_padding import note_padding, note_positions

    mask = named.get(f"{prefix}attention_mask")
    if isinstance(mask, dict):  # by layer type
        mask = mask.get("full_attention")
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    positions = named.get(f"{prefix}position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        positions = positions.expand(len(ids), -1)
    if torch.compiler.is_compiling():
        note_positions(layers, positions, ids.shape[1])
        return
    note_padding(layers, mask, ids.shape[1], positions)


def applied_site_layers(model: torch.nn.Module) -> dict[str, int]:
    """Return the cache layer index of each site of `model`. Raises FhoptError if no plan is applied."""
    return dict(_applied(model).layers)


def held_plan(model: torch.nn.Module, plan: LatentPlan) -> LatentPlan:
    """Return the part of `plan` that this process caches: all of it unless the model is sharded."""
    applied = _record(model)
    return applied.plan if applied is not None and applied.whole_plan is plan else local_plan(model, plan)


def applied_plan(model: torch.nn.Module) -> LatentPlan:
    """Return the plan applied to `model`; for a sharded model, this process's part.

    Raises FhoptError if no plan is applied.
    """
    return _applied(model).plan


def _record(model: torch.nn.Module) -> _Applied | None:
    applied: _Applied | None = getattr(model, "_fhopt_applied", None)
    return applied


def _applied(model: torch.nn.Module) -> _Applied:
    applied = _record(model)
    if applied is None:
        raise FhoptError(f"no plan is applied to {type(model).__name__}. Call fhopt.apply(model, plan) first.")
    return applied


def latent_cache(model: torch.nn.Module, **options: Any) -> Any:
    """Make an empty cache for a model with a plan; options as of `LatentCache`.

    Raises FhoptError if no plan is applied.
    """
    from fhopt.cache.latent_cache import LatentCache, encoder_decoder_cache

    applied, network = _applied(model), cast(Any, model)
    make = encoder_decoder_cache if network.config.is_encoder_decoder else LatentCache
    cache = make(applied.plan, network.config, layers=applied.layers, **options)
    _convert(cache, applied)
    return cache


def _convert(cache: Any, applied: _Applied, kind: str = "self") -> None:
    """Put latent layers into an ordinary, empty cache, in place: the caller owns the object."""
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

    from fhopt.cache.latent_cache import LatentCache
    from fhopt.cache.layer_map import LATENT_LAYERS, latent_layers, plain_layers

    if isinstance(cache, EncoderDecoderCache):
        _convert(cache.self_attention_cache, applied)
        return _convert(cache.cross_attention_cache, applied, "cross")
    if isinstance(cache, LatentCache):
        check_cache_plan(cache.plan, applied.plan)
    elif not _has_latents(cache):
        if type(cache) is Cache:  # the caller chose the layers: a full-precision cache
            return None
        if type(cache) not in (DynamicCache, StaticCache):
            return _warn(applied, _unused(cache))
        if any(getattr(x, "is_initialized", False) for x in cache.layers) and int(cache.get_seq_length()):
            return None
        plain = cache.layers or plain_layers(applied.config)
        cache.layers = latent_layers(applied.plan, plain, kind=kind, layers=applied.layers)
        cache.layer_class_to_replicate = None
    for layer in cache.layers:
        if isinstance(layer, LATENT_LAYERS):
            layer.reader = applied.reader
    return None


def _unused(cache: Any) -> str:
    name = type(cache).__name__
    return (
        f"a cache of class {name} bypasses the applied plan; expected a DynamicCache or a StaticCache. Drop "
        "`cache` and `cache_implementation` to use the plan, or call fhopt.unapply(model)."
    )
