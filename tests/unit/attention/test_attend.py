"""Attention to latents and to the full-precision tokens around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from latent_caches import logits
from needs import needs_compiler
from small_models import FittedModel, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.latent_cache import LatentCache
from fhopt.codegen import dispatch
from fhopt.codegen.cpu import graph_kernels
from fhopt.ops import registry


def test_steps_of_a_block_see_exactly_what_single_tokens_see(fitted: FittedModel) -> None:
    """Run in float64, so that both ways round every latent to the same code."""
    plan, ids, model = fitted.plan(4, window_bits=16), token_ids(1, 60), copy.deepcopy(fitted.model).double()
    fhopt.apply(model, plan)
    blocks = logits(model, LatentCache(plan), ids, list(range(20, 60, 8)))
    single = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(blocks, single, rtol=1e-4, atol=1e-4)


def test_absorbed_attention_equals_attention_on_rebuilt_keys_and_values(fitted: FittedModel) -> None:
    """Run in float64, so that both ways round every latent to the same code; tests/unit/codegen compares kernels."""
    plan, ids, model = fitted.plan(4), token_ids(2, 60), copy.deepcopy(fitted.model).double()
    rebuilt = logits(model, LatentCache(plan, absorb=False), ids, list(range(20, 60)))
    fhopt.apply(model, plan)
    absorbed = logits(model, LatentCache(plan), ids, list(range(20, 60)))
    torch.testing.assert_close(absorbed, rebuilt, rtol=1e-4, atol=1e-4)  # decoders are rounded to float32


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window_bits": 16}, {"mean_tokens": 16}], ids=["window", "exact", "means"])
def test_a_decode_step_on_a_cpu_is_one_native_call(
    fitted: FittedModel, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The native call agrees with its parts; a model without supported sites never makes it."""
    plan, ids, model = fitted.plan(4, **options), token_ids(2, 60), copy.deepcopy(fitted.model).to(dtype)
    fhopt.apply(model, plan, skinny_products=False, decode_program=False)
    served: list[bool] = []

    def watched(*operands: Any, **numbers: Any) -> Tensor | None:
        output = dispatch.dispatch_attend_latents(*operands, **numbers)
        served.append(output is not None)
        return output

    before = registry.use("attend_latents", "cpu", None)
    try:
        by_parts = logits(model, LatentCache(plan), ids, list(range(40, 60)))
        registry.use("attend_latents", "cpu", watched)
        at_once = logits(model, LatentCache(plan), ids, list(range(40, 60)))
    finally:
        registry.use("attend_latents", "cpu", before)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.03}[dtype]  # codes of later layers may round differently
    assert (at_once - by_parts).norm() <= tolerance * by_parts.norm()
    assert all(served) and len(served) >= 20


@needs_compiler
def test_it_is_so_from_the_first_tokens_on(fitted: FittedModel) -> None:
    """While all tokens are attention sinks or in the window, which attention loads without unpacking."""
    plan, ids = fitted.plan(4), token_ids(2, 20)
    assert plan.window.first_length >= 20
    fhopt.apply(fitted.model, plan, decode_program=False)
    rebuilt = logits(fitted.model, LatentCache(plan, absorb=False), ids, list(range(1, 20)))
    before = graph_kernels.call_attend_latents
    calls: list[bool] = []

    def watched(*operands: Any) -> Tensor | None:
        output = before(*operands)
        calls.append(output is not None)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_kernels, "call_attend_latents", watched)
        at_once = logits(fitted.model, LatentCache(plan), ids, list(range(1, 20)))
    fhopt.unapply(fitted.model)
    assert all(calls) and len(calls) == 20 * len(plan.sites)
    torch.testing.assert_close(at_once, rebuilt, rtol=1e-4, atol=1e-4)
