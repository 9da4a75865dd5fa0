"""`apply` switches a transformers model to a latent KV cache; `unapply` undoes it.

Only public interfaces of transformers are used: the attention registry, the cache class, and a forward pre-hook that
passes a `LatentCache` when the model (or `generate`) would create an ordinary one. No model source is patched: a model
with its own attention code uses the latents through `LatentTensor` (fhopt/attention/offered_latents.py).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from fhopt.errors import FhoptError
from fhopt.hf.layer_programs import drop_programs, use_programs
from fhopt.hf.skinny_products import replace_products, restore_products
from fhopt.models.model_facts import (
    cache_argument,
    check_segments,
    encoder_path,
    implementations,
    is_inside,
    keeps_own_cache,
    text_key,
    uses_interface,
)
from fhopt.parallel.offloaded_weights import Weights
from fhopt.parallel.tensor_parallel import local_plan
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.latent_plan import LatentPlan, PlanOrPath, as_plan
from fhopt.plan.site_plan import SitePlan

IMPLEMENTATION = "fhopt"


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
    fast: tuple[bool, bool]  # skinny_products, layer_programs
    warned: set[str] = field(default_factory=set)  # messages already issued


def apply(
    model: torch.nn.Module, plan: PlanOrPath, skinny_products: bool = True, layer_programs: bool = True
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

    layer_programs: on CPU, run the decode step of consecutive decoder layers as one native call
    (fhopt/hf/layer_programs.py) once a layer has been traced; False keeps torch's operations.

    Kernels that are not built yet compile in the background during the first calls; `prepare` waits for them.
    """
    import fhopt.codegen
    from fhopt.attention.offered_latents import LatentReader
    from fhopt.plan.layer_index import cached_sites, layer_indices

    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise FhoptError(
            f"{type(model).__name__} is not a transformers model; expected one with a cache. For any other module use "
            'torch.compile(model, backend="flashhead", options={"plan": plan}).'
        )
    compiled, model, plan = model, _uncompiled(model), as_plan(plan)
    _check_cache(model)
    network: Any = model  # torch types a module's attributes as tensors or modules
    whole_plan, weights = plan, Weights(model)
    if weights.absent:
        raise FhoptError(
            f"{weights.absent[0]} of {type(model).__name__} is on the meta device: it has no numbers. Load the weights "
            "first, with device_map where they are more than one device holds."
        )
    check_fingerprint(plan, weights, type(model).__name__)
    check_segments(network.config, plan.segment, type(model).__name__)
    if any(p.device.type not in ("cpu", "meta") for p in model.parameters()):  # meta: offloaded to disk
        plan.check_uniform("a GPU")
    plan = local_plan(model, plan)
    encoder = encoder_path(model)
    sites = [p.site for p in plan.sites if not is_inside(p.site.name, encoder)]
    modules = {site.name: _module(model, site.name) for site in sites}
    layers: dict[str, int] = {}
    for kind in ("self", "cross"):
        by_name = layer_indices([s for s in sites if s.kind == kind])
        layers |= {name: _layer_index(modules[name], index) for name, index in by_name.items()}
        cached_sites(plan, kind, layers)
    register_attention()
    unapply(model)
    before = implementations(network.config)
    interface = all(map(uses_interface, modules.values()))
    if interface:
        network.set_attn_implementation(before | {text_key(network.config): IMPLEMENTATION})
    hooks = (
        model.register_forward_pre_hook(_use_latents, with_kwargs=True),
        model.register_load_state_dict_post_hook(_check_loaded),
    )
    parameters = tuple(inspect.signature(model.forward).parameters)
    network._fhopt_applied = _Applied(
        whole_plan, plan, hooks, before, layers, cache_argument(model), parameters, is_set=interface,
        interface=interface and all(site.mask != "relative" for site in sites), reader=LatentReader(),
        config=network.config, fast=(skinny_products, layer_programs),
    )  # fmt: skip
    fhopt.codegen.register_kernels()
    if _reads_latents(network):
        fhopt.codegen.start_builds()
    if skinny_products:
        replace_products(model)
    if layer_programs and network._fhopt_applied.interface:
        use_programs(model, plan)
    return compiled


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
        warnings.warn(f"weights were loaded while a plan is applied: {error}", RuntimeWarning, stacklevel=2)


def _check_cache(model: torch.nn.Module) -> None:
    """Raise FhoptError if the model does not generate with a transformers cache: a plan would have no effect."""
    if not hasattr(model, "generate"):
        return
    network: Any = model
    wrapped = network.get_base_model() if hasattr(network, "get_base_model") else network  # PEFT
    taken = inspect.signature(type(wrapped).forward).parameters  # ignores a replaced `forward` of the instance
    takes_one = not {"cache", "past_key_values"}.isdisjoint(taken)
    own = keeps_own_cache(model)
    if own or not takes_one:
        what = "a cache of its own" if own else "no KV cache"
        raise FhoptError(
            f"{type(model).__name__} keeps {what}; expected a model "
            "that generates with a DynamicCache of transformers. Use torch.compile(model, backend='flashhead') for "
            "this model."
        )


def _layer_index(module: torch.nn.Module, index: int) -> int:
    """Return a module's layer index in the cache: `layer_idx`, else `index`; a shared module has -1 (Zamba2)."""
    own = getattr(module, "layer_idx", None)
    return own if isinstance(own, int) and own >= 0 else index


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Wait until the kernels for the plan applied to `model` are built. Returns the model.

    Kernels serve every plan and are cached on disk: a machine builds them once, in about 10 seconds. Without this call
    they compile in the background during the first calls, which run on torch operations until then: the first token
    comes immediately, the next ones are slower, and results agree within rounding. Does nothing for a model without a
    plan.
    """
    import fhopt.codegen

    if _record(model) is not None and _reads_latents(model):
        fhopt.codegen.build_all()
    return model


@contextmanager
def waiting_for_kernels() -> Iterator[None]:
    """Wait inside the context for kernels that calls need, which speeds up work on many tokens."""
    import fhopt.codegen

    with fhopt.codegen.wait_for_kernels():
        yield


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
            f"the plan names {name}, which {type(model).__name__} does not have. Fit a plan for it."
        ) from error


def _uses_latents(config: Any) -> bool:
    return bool(config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION)


def register_attention() -> None:
    """Register `latent_attention_forward` with transformers as IMPLEMENTATION."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from fhopt.hf.attention_interface import latent_attention_forward

    AttentionInterface.register(IMPLEMENTATION, latent_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)  # without it transformers would drop padding masks


def _mask(*args: Any, **options: Any) -> Any:
    """Make transformers' mask; None if it is only causal.

    `latent_attention_forward` applies causality itself, also with a cache; `sdpa_mask` would make a mask for it.
    """
    from transformers.masking_utils import sdpa_mask

    if not torch.compiler.is_compiling():
        defaults = _defaults(sdpa_mask)
        if _is_causal({**defaults, **dict(zip(defaults, args, strict=False)), **options}):
            return None
    return sdpa_mask(*args, **options)


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's parameters and their defaults. Cached: inspection takes as long as half a layer."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def _is_causal(of: dict[str, Any]) -> bool:
    """Return whether `sdpa_mask` would be only causal with these arguments: new tokens last, no padding."""
    from transformers.masking_utils import causal_mask_function

    padding = of.get("attention_mask")
    if of.get("mask_function") is not causal_mask_function or of.get("local_size") is not None:
        return False
    numbers: list[Any] = [of.get(name) for name in ("q_offset", "q_length", "kv_offset", "kv_length")]
    if not of.get("allow_is_causal_skip") or not all(type(n) is int for n in numbers):
        return False
    at_the_end = numbers[0] + numbers[1] == numbers[2] + numbers[3]
    return at_the_end and (padding is None or (padding.device.type == "cpu" and bool(padding.all())))


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
            "attention 'flex_attention' cannot read the latents of the applied plan; expected 'fhopt', 'sdpa' or "
            "'eager'. Call model.set_attn_implementation('fhopt'), or remove the plan with fhopt.unapply(model)."
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
        _check_plan(cache.plan, applied.plan)
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
        f"a cache of class {name} is used without the applied plan; expected a DynamicCache or a StaticCache. Leave "
        "out `cache` and `cache_implementation` to compress by the plan, or call fhopt.unapply(model)."
    )


def _check_plan(held: LatentPlan, applied: LatentPlan) -> None:
    """Raise FhoptError if a plan for another model made the cache; another plan for this model is fine."""
    prints = {plan.provenance.get("fingerprint") for plan in (held, applied)} - {None}
    names, known = ({p.site.name for p in plan.sites} for plan in (held, applied))
    if held is not applied and (len(prints) > 1 or not names & known):
        raise FhoptError(
            "the cache was made by a plan for another model. Make one for this model: "
            "fhopt.LatentCache(plan, model.config), with a plan that was fitted for it."
        )
    if held is not applied and len({p.sites[0].site.kv_heads for p in (held, applied)}) > 1:
        raise FhoptError(
            f"the cache keeps {held.sites[0].site.kv_heads} kv heads, the model has {applied.sites[0].site.kv_heads} "
            "of them in this process. Make the cache by fhopt.hf.apply.latent_cache(model)."
        )
