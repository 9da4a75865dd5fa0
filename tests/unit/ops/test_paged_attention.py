"""Page selection without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_plans import kernels, naive_mask, page_kernel, page_step

from fhopt.codegen import dispatch
from fhopt.ops import algebra, latent_attention, paged_attention

REFUSED: dict[str, Callable[[paged_attention.PageStep], dict[str, Any]]] = {
    "pages of 20 tokens": lambda s: dict(page_tokens=20),
    "float64": lambda s: dict(query=s.query.double()),
    "a gradient": lambda s: dict(query=s.query.clone().requires_grad_()),
    "one mask for all tokens": lambda s: dict(far=torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    "one mean for all sequences": lambda s: dict(fill=torch.zeros(12), values=torch.randn(1, 4, 1, 16)),
    "channels of 32 bits": lambda s: dict(channels=s.channels.int()),
    "scales of 32 bits": lambda s: dict(scales=s.scales.float()),
    "several queries": lambda s: dict(query=s.query.repeat(1, 1, 2, 1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_step_without_kernel_support_is_left_to_torch(why: str) -> None:
    step = page_step({4: 16}, 200, False, None)
    step = step._replace(**REFUSED[why](step))
    with kernels(True), page_kernel():
        assert dispatch.dispatch_attend_pages(step) is None
        if why in ("channels of 32 bits", "several queries"):  # torch refuses them as well
            return
        found = torch.ops.fhopt.attend_pages(*step)
    expected = paged_attention.attend_pages_reference(step._replace(query=step.query.double()))
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)


def test_units_that_do_not_divide_heads_are_refused() -> None:
    with kernels(True), page_kernel(), pytest.raises((ValueError, RuntimeError)):
        torch.ops.fhopt.attend_pages(*page_step({4: 16}, 200, False, None, units=3))


def test_gradients_flow_through_the_selected_pages() -> None:
    step = page_step({4: 16}, 200, False, None)
    parts = [x.clone().requires_grad_() for x in (step.query, step.key, step.value)]
    query, key, value = parts
    with kernels(True), page_kernel():
        output, lse, _ = torch.ops.fhopt.attend_pages(*step._replace(query=query, key=key, value=value))
    lists, _, _ = paged_attention.list_selected_pages(step)
    seen = naive_mask(lists, 32, 12, 200)
    reference: Any = latent_attention.latent_attention_reference
    expected = reference(query, key, None, value, None, seen, **algebra.uncoded_options(), scale=step.scale)
    wanted = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), parts)
    found = torch.autograd.grad(output.square().sum() + lse.sum(), parts)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
