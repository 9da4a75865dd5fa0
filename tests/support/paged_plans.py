"""Plans with pages, and page selection by plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.sketches import PageIndex, Sketcher
from fhopt.codegen import dispatch
from fhopt.codegen.cpu.pages import weigh_pages
from fhopt.evaluation.perplexity import switched
from fhopt.fitting.allocation import STEPS
from fhopt.hf.apply import latent_cache
from fhopt.ops import algebra, packing, paged_attention, registry
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, PagePlan, SidePlan, SketchPlan

TOKENS = 4  # per page
LONG = 150  # length of a sequence with enough pages


def sketch(key: SidePlan, seed: int = 0, bits: tuple[int, ...] = (4,)) -> SketchPlan:
    """A sketch of random channels, 8 per bit group, of latents with a deviation of about 1."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 * len(bits)
    channels = torch.rand(key.groups, key.width, generator=generator).argsort(-1)[:, :width]
    mean = torch.randn(key.groups, key.width, generator=generator) / 4
    deviation = torch.rand(key.groups, key.width, generator=generator) + 0.5
    return SketchPlan(channels, mean, deviation, tuple(BitGroup(b, 8, STEPS[b]) for b in bits))


def paged(
    plan: LatentPlan, share: float = 0.25, mass: float = 1.0, limit: float = 1.0, least: int = 16, fill: bool = False,
    lift: float = 0.0,
) -> LatentPlan:  # fmt: skip
    """Return the plan with the same pages at every site; fill: a quarter (first head) to all of the weight."""
    count, heads = len(plan.sites), plan.sites[0].site.heads
    sites = tuple(replace(site, sketch=sketch(site.key)) for site in plan.sites)
    parts = (tuple(torch.linspace(0.25, 1, heads).tolist()),) * count if fill else ()
    lifts = (lift,) * count if lift else ()
    return replace(
        plan, sites=sites, pages=PagePlan(TOKENS, (share,) * count, (mass,) * count, least, limit, parts, lifts)
    )


def index_of(latents: Tensor, share: float = 0.25, limit: float = 1.0, **changes: Any) -> PageIndex:
    """A page index over latents [B,J,T,R], with one unit per latent head."""
    key = SidePlan(torch.zeros(latents.shape[1], latents.shape[3], 1), torch.zeros(1, 1, 1), ())
    sketcher = Sketcher.on(sketch(key), latents.device)
    coded = sketcher.encode(latents)
    options: dict[str, Any] = dict(tokens=TOKENS, mass=1.0, lift=0.0, least=4, units=latents.shape[1], each_query=False)
    rows = *coded, sketcher.lost(latents, *coded) if limit < 1 else None
    counters = torch.zeros(4, dtype=torch.int64)
    return PageIndex(sketcher, rows, share=share, limit=limit, counters=counters, **(options | changes))


def naive_mask(lists: Tensor, page_tokens: int, heads: int, tokens: int) -> Tensor:
    seen = torch.zeros(lists.shape[0], heads, 1, tokens, dtype=torch.bool)
    for b in range(lists.shape[0]):
        for h in range(heads):
            for page in lists[b, h * lists.shape[1] // heads].tolist():
                if page >= 0:
                    seen[b, h, 0, page * page_tokens : (page + 1) * page_tokens] = True
    return seen


@contextmanager
def kernels(generated: bool) -> Iterator[None]:
    before = registry.use("latent_attention", "cpu", dispatch.dispatch_latent_attention if generated else None)
    try:
        yield
    finally:
        registry.use("latent_attention", "cpu", before)


def decoded(model: Any, plan: LatentPlan, ids: Tensor, start: int, **options: Any) -> Tensor:
    """Prefill the tokens before `start`, decode the others one by one, and return their logits."""
    with torch.no_grad(), switched(model, plan):
        cache = latent_cache(model, **options)
        model(ids[:, :start], past_key_values=cache)
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, ids.shape[1])]
    return torch.cat(parts, 1)


def page_operands(
    tiers: dict[int, int], rows: int, tokens: int, masked: bool, length: int | None, size: int = 32
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Operands of `fhopt::page_weights`: (weights, constant), and the rest; B=2, J=4, pages of `size` tokens."""
    bits, widths, steps = list(tiers), list(tiers.values()), [STEPS[b] for b in tiers]
    planes = [packing.integer_bytes(torch.randn(2, 4, tokens + 7, w), b, STEPS[b]) for b, w in tiers.items()]
    codes = torch.cat(planes, -1)[:, :, :tokens]  # a view, as of a cache with spare capacity
    scales = torch.rand(2, 4, tokens + 7).add(0.5).to(torch.float16)[:, :, :tokens]
    far = torch.rand(2, 1, 1, tokens) > 0.3 if masked else None
    factors = torch.randn(2, 4, rows, sum(widths)), torch.randn(2, 4, rows)
    return factors, (codes, scales, bits, widths, steps, size, far, None if length is None else torch.tensor(length))


def rounded(weights: Tensor, options: Any) -> Tensor:
    """Return the weights as the kernel rounds them: weight times quantization step, in 8 bits."""
    _, _, _, widths, steps, *_ = options
    stretch = torch.cat([torch.full((w,), s) for w, s in zip(widths, steps, strict=True)])
    products = weights * stretch
    unit = products.abs().amax(-1, keepdim=True) / 127
    return (products / unit).round() * unit / stretch


@contextmanager
def page_kernel() -> Iterator[None]:
    kernels: dict[str, registry.Kernel] = {"page_weights": weigh_pages, "attend_pages": dispatch.dispatch_attend_pages}
    before = {op: registry.use(op, "cpu", kernel) for op, kernel in kernels.items()}
    try:
        yield
    finally:
        for op, kernel in before.items():
            registry.use(op, "cpu", kernel)


def page_step(
    tiers: dict[int, int], tokens: int, masked: bool, length: int | None, size: int = 32, **changes: Any
) -> paged_attention.PageStep:
    """Operands of a page step: B=2, H=12, J=4, R=40, R_V=16, unquantized latents, pages of `size` tokens.

    The queries are already rounded as the kernel rounds them.
    """
    (weights, _), options = page_operands(tiers, 3, tokens, masked, length, size)
    codes, scales, bits, widths, steps, page_tokens, far, lengths = options
    channels = torch.rand(4, 40).argsort(-1)[:, : sum(widths)]
    mean, deviation, query = torch.randn(4, 40) / 4, torch.rand(4, 40) + 0.5, torch.randn(2, 4, 3, 40)
    index = channels[None, :, None].expand_as(weights)
    query.scatter_(-1, index, rounded(weights, options) / deviation[None, :, None].expand_as(query).gather(-1, index))
    given: dict[str, Any] = dict(
        query=query.reshape(2, 12, 1, 40), key=torch.randn(2, 4, tokens, 40), key_scale=None,
        value=torch.randn(2, 4, tokens, 16), value_scale=None, far=far, lengths=lengths,
        **algebra.uncoded_options(), scale=0.25, codes=codes, scales=scales, bits=bits, widths=widths,
        steps=steps, channels=channels, mean=mean, deviation=deviation, near=None, page_tokens=page_tokens, units=4,
        most=max(2, -(-tokens // size) // 4), share=0.2, least=2, mass=1.0, lift=0.0, fill=None, values=None,
    )  # fmt: skip
    return paged_attention.PageStep(**given | changes)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=1e-4, atol=1e-3)
    assert found[2].tolist() == expected[2].tolist()
