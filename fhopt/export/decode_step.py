"""Exportable decode step with the KV cache as explicit state.

    step(ids [B,S], counts [2], state...)  ->  logits [B,S,V], new keys and values [B,G,S,D] of each site
    seal(keys [B,G,n,D], values [B,G,n,D] of each site)  ->  packed latents of each site

The programs never write the state. The caller appends new tokens to the recent window and, when it is full, the packed
latents of its oldest block to those of the quantized tokens (`StepState` does so). counts holds how many slots of the
window (with the sinks) and of quantized tokens are in use, so that buffers may be larger than their content.

Per site the state is

    open_key [B,G,N,D], open_value [B,G,N,E]    sinks, then the recent window; N = sinks + recent + block, in the
                                                model's dtype
    key_rows, value_rows [B,J,T,bytes]          packed latents (uint8), or unquantized latents [B,J,T,R]
    key_scale, value_scale [B,J,T]              float16, if latents are quantized

T is the only dynamic size. Attention runs on packed latents directly: queries are absorbed, each bit group is one
matmul, and keys and values are never reconstructed (`fhopt verify` proves it for an exported step). With `kernels=True`
attention on quantized tokens is the C++ op of codegen/cpu/graph_kernels.py instead of torch operations.

Dimensions: B batch, H query heads, G kv heads, J latent heads, S new tokens, N slots of sinks and window, T slots of
quantized tokens, D and E head sizes, R latent width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.export.step_attention import SiteAttention, state_tensors
from fhopt.hf.apply import attended_by
from fhopt.models.model_facts import cache_argument
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.layer_index import layer_indices
from fhopt.plan.site_plan import SitePlan

IMPLEMENTATION = "fhopt_step"


class ExportedStep(nn.Module):
    """Decode step of a model that calls transformers' attention interface; see the module docstring."""

    def __init__(self, model: nn.Module, plan: LatentPlan, kernels: bool = False) -> None:
        super().__init__()
        _check(model, plan)
        self.model, self.plan = model, plan
        dtype = next(model.parameters()).dtype
        names = [_serve(site) if kernels else "" for site in plan.sites]
        self.sites = nn.ModuleList(SiteAttention(s, plan, n) for s, n in zip(plan.sites, names, strict=True))
        indices = layer_indices([s.site for s in plan.sites])
        self.layers = [int(getattr(model.get_submodule(n), "layer_idx", i)) for n, i in indices.items()]
        self.tensors = state_tensors(plan, dtype)
        self.sizes = [sum(t.name.rpartition(".")[0] == s.site.name for t in self.tensors) for s in plan.sites]

    def forward(self, ids: Tensor, counts: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits [B,S,V], and new keys and values of each site, from ids [B,S] and counts [2], int64."""
        cache = _new_tokens(len(self.layers), self.layers)
        parts = dict(zip(self.layers, zip(self.sites, _split(state, self.sizes), strict=True), strict=True))
        positions = (torch.arange(ids.shape[1], device=ids.device) + counts.sum()).unsqueeze(0).expand(ids.shape)
        with attending(self.model, parts, counts):
            options = {
                "input_ids": ids,
                "position_ids": positions,
                "use_cache": True,
                cache_argument(self.model): cache,
            }
            logits = self.model(**options).logits
        return (logits, *(x for layer in self.layers for x in cache.taken[layer]))


class Seal(nn.Module):
    """Quantization of a block of tokens; see the module docstring. Exported as the program `seal`."""

    def __init__(self, step: ExportedStep) -> None:
        super().__init__()
        self.sites = step.sites

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Quantize keys and values [B,G,n,D] of each site to packed latents, in the order of the state."""
        pairs = zip(self.sites, tokens[::2], tokens[1::2], strict=True)
        return tuple(rows for site, key, value in pairs for rows in site.quantize(key, value))  # type: ignore[operator]


def _check(model: Any, plan: LatentPlan) -> None:
    """Raise FhoptError for models and plans whose decode step cannot be exported."""
    if (
        not hasattr(model, "set_attn_implementation")
        or "position_ids" not in inspect.signature(model.forward).parameters
    ):
        raise FhoptError(
            f"{type(model).__name__} takes no position_ids; expected a causal transformers language model "
            "with position_ids. Use `fhopt.apply` for this model."
        )
    check_fingerprint(plan, dict(model.named_parameters()), type(model).__name__)
    plan.check_no_means("an exported decode step")
    plan.check_uniform("an exported decode step")
    module = inspect.getmodule(type(model))
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        raise FhoptError(
            f"{type(model).__name__} computes attention in its own code; expected a call of transformers' "
            "attention interface. Use `fhopt.apply` for this model."
        )
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    for site in (site_plan.site for site_plan in plan.sites):
        if site.kind != "self" or site.mask != "causal" or site.sinks or site.window:
            raise FhoptError(
                f"{site.name} has a {site.mask!r} mask, sink logits or an encoder; expected causal "
                "self-attention for an exported decode step. Use `fhopt.apply` for this model."
            )
    if len(plan.sites) != layers:
        raise FhoptError(
            f"the plan has {len(plan.sites)} sites for {layers} layers; expected one site per layer. Fit a plan "
            "for this model."
        )


def _serve(site: SitePlan) -> str:
    """Build the kernel of a site and return its name. Raises FhoptError without a compiler."""
    from fhopt.codegen.cpu import graph_kernels

    spec = KernelSpec.of(site, "float32")
    if not graph_kernels.register_kernel(spec):
        raise FhoptError("the kernels could not be compiled; expected g++ or clang++ on PATH. Install one.")
    return spec.name


def _split(state: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    start = 0
    for size in sizes:
        yield state[start : start + size]
        start += size


def _new_tokens(count: int, layers: Sequence[int]) -> Any:
    """Create a cache whose `update` returns its arguments and records them."""
    from transformers.cache_utils import Cache, DynamicLayer

    class NewTokens(Cache):  # type: ignore[misc]
        """Cache of new tokens only. `taken`: their keys and values by layer. Not in fhopt/hf: only exports use it."""

        def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.taken[layer_idx] = key, value
            return key, value

    cache = NewTokens(layers=[DynamicLayer() for _ in range(max(layers) + 1)])
    cache.taken = {}
    return cache


@contextmanager
def attending(model: Any, parts: dict[int, Any], counts: Tensor) -> Iterator[None]:
    """Inside the context, run each layer's attention on its state in `parts`."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        site, state = parts[module.layer_idx]
        out = site(query, key, value, counts, state, float(options.get("scaling") or query.shape[-1] ** -0.5))
        return out.transpose(1, 2).to(query.dtype), None

    with attended_by(model, IMPLEMENTATION, attention):
        yield


def unrounded(plan: LatentPlan) -> LatentPlan:
    """Return the plan with an unrounded recent window, as in the state."""
    return replace(plan, window_bits=16)
