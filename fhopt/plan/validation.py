"""Checks of a plan's parts: shapes, bits, finiteness, names. Raises FhoptError."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fhopt.errors import FhoptError
from fhopt.plan.site_plan import (
    LAYOUTS,
    MAX_SEGMENT,
    MAX_STEP,
    MAX_TRELLIS_STEP,
    MIN_SEGMENT,
    MIN_STEP,
    SKETCH_BITS,
    SUPPORTED_BITS,
    TIER_QUANTUM,
    TRELLIS_BITS,
    PagePlan,
    SidePlan,
    SitePlan,
    SketchPlan,
    is_step,
    no_pages,
)
from fhopt.plan.window import ResidualWindow

BASIS_DTYPES = (torch.float32, torch.float64)
MAX_BASIS = 1e12  # of a basis element; latents have about unit variance, and keys and values are far smaller
MIN_DEVIATION = 1e-9  # of a latent channel in sketches


def check_parts(
    sites: Sequence[SitePlan], window: ResidualWindow, pages: PagePlan | None, mean_tokens: int
) -> None:  # fmt: skip
    """Check the fields of a `LatentPlan`. Raises FhoptError."""
    if not sites:
        raise FhoptError(
            "the plan has no sites; expected at least one. Check `fhopt explain MODEL`, and fit the plan again."
        )
    if len({s.site.name for s in sites}) < len(sites):
        raise FhoptError("two sites of the plan have the same name. Fit the plan again.")
    if mean_tokens < 0:
        raise FhoptError(f"the plan has mean_tokens {mean_tokens}; expected 0 (none) or more. Fit the plan again.")
    for site in sites:
        if site.layout not in LAYOUTS:
            raise FhoptError(f"{site.site.name} has the layout {site.layout!r}; expected one of {', '.join(LAYOUTS)}.")
        _check_sides(site)
        if mean_tokens and not (site.key.tiers and site.value.tiers):
            raise FhoptError(f"{site.site.name}: sequence means require quantized latents. Fit the plan again.")
        if site.is_shared and (site.key.groups != 1 or site.key.tiers != site.value.tiers):
            raise FhoptError(
                f"{site.site.name}: keys and values must share one latent head and its bit groups. Fit the plan again."
            )
        if site.segment:
            _check_segment(site, pages)
        if site.sketch is not None:
            _check_sketch(site.site.name, site.key, site.sketch)
    if pages is not None:
        _check_pages(sites, window, pages)


def _check_segment(site: SitePlan, pages: PagePlan | None) -> None:
    """Raise FhoptError if keys cannot be relative to segments."""
    if not site.site.rotates or site.site.slides or not site.key.tiers:
        raise FhoptError(
            f"{site.site.name}: segments require quantized keys with RoPE, which this site does not have. Fit the "
            "plan again."
        )
    if not 0 < site.segment <= MAX_SEGMENT or site.segment % MIN_SEGMENT:
        raise FhoptError(
            f"{site.site.name} has segments of {site.segment} tokens; expected a multiple of {MIN_SEGMENT}. "
            "Fit the plan again."
        )
    if pages is not None:
        raise no_pages()


def _check_pages(sites: Sequence[SitePlan], window: ResidualWindow, pages: PagePlan) -> None:
    if pages.tokens < 1 or window.block % pages.tokens:
        raise FhoptError(
            f"a page size of {pages.tokens} tokens is invalid; expected a divisor of the plan's block, {window.block}."
        )
    if not len(pages.shares) == len(pages.masses) == len(sites):
        raise FhoptError(
            f"pages have {len(pages.shares)} shares and {len(pages.masses)} masses; expected {len(sites)} of "
            "each, one per site. Calibrate pages again."
        )
    if not all(0 < x <= 1 for x in (*pages.shares, *pages.masses, pages.limit)) or pages.least < 0:
        raise FhoptError(
            f"{pages} is out of range; expected shares, masses and limit above 0 and at most 1, and least of at "
            "least 0. Calibrate pages again."
        )
    if len(pages.lifts) not in (0, len(sites)) or not all(0 <= x < math.inf for x in pages.lifts):
        raise FhoptError(
            f"pages have lifts {pages.lifts}; expected {len(sites)} numbers of at least 0, one per site, or "
            "none. Calibrate pages again."
        )
    _check_fill(sites, pages)
    for site, share in zip(sites, pages.shares, strict=True):
        if share < 1 and site.site.kind != "self":
            raise FhoptError(
                f"{site.site.name} is cross-attention, which attends to all pages; expected a share of 1. Drop it."
            )
        if share < 1 and site.sketch is None:
            raise FhoptError(f"{site.site.name} has no sketches to select pages by. Calibrate pages for this plan.")


def _check_fill(sites: Sequence[SitePlan], pages: PagePlan) -> None:
    if not pages.fill:
        return
    filled, expected = [len(heads) for heads in pages.fill], [site.site.heads for site in sites]
    if filled != expected or not all(0 <= x < math.inf for heads in pages.fill for x in heads):
        raise FhoptError(
            f"PagePlan.fill has entries for {filled} heads; expected numbers of at least 0 for {expected}. "
            "Calibrate pages again."
        )
    if pages.limit < 1:
        raise FhoptError("PagePlan.limit and PagePlan.fill are mutually exclusive. Drop fill.")


def _check_sketch(name: str, key: SidePlan, sketch: SketchPlan) -> None:
    groups, width = key.groups, key.width
    shapes = tuple(sketch.channels.shape), tuple(sketch.mean.shape), tuple(sketch.deviation.shape)
    expected = (groups, sketch.width), (groups, width), (groups, width)
    if shapes != expected or sketch.channels.dtype != torch.int64:
        raise FhoptError(f"{name}: sketches have shapes {shapes}; expected {expected}. Calibrate pages again.")
    for tier in sketch.tiers:
        is_width = tier.width >= 1 and tier.width % TIER_QUANTUM == 0
        if tier.bits not in SKETCH_BITS or not is_width or not MIN_STEP <= tier.step <= MAX_STEP:
            raise FhoptError(
                f"{name}: sketches have {tier}; expected a width of {TIER_QUANTUM}k, bits of {SKETCH_BITS}, and a step "
                f"of {MIN_STEP:g} to {MAX_STEP:g}. Calibrate pages again."
            )
    if not bool(((sketch.channels >= 0) & (sketch.channels < width)).all()):
        raise FhoptError(f"{name}: sketches name channels beyond the latent's {width}. Calibrate pages again.")
    numbers = (sketch.mean, sketch.deviation)
    is_bounded = all(x.dtype in BASIS_DTYPES and float(x.abs().max()) <= MAX_BASIS for x in numbers)
    if not is_bounded or float(sketch.deviation.min()) < MIN_DEVIATION:
        raise FhoptError(
            f"{name}: sketches have invalid means or deviations; expected finite means, and deviations of at "
            f"least {MIN_DEVIATION:g}. Calibrate pages again."
        )


def _check_sides(plan: SitePlan) -> None:
    name, heads, dims = plan.site.name, plan.site.kv_heads, (plan.site.key_dim, plan.site.value_dim)
    read = (sum(dims), 0) if plan.is_shared else dims
    encoded = [heads, heads]
    if plan.gather is not None:
        encoded = [part.stop - part.start for part in (plan.gather.key_heads, plan.gather.value_heads)]
    _check_side(f"{name}.key", plan.key, (encoded[0], read[0]), (heads, dims[0]))
    _check_side(f"{name}.value", plan.value, (encoded[1], read[1]), (heads, dims[1]))


def _check_side(name: str, side: SidePlan, encoded: tuple[int, int], decoded: tuple[int, int]) -> None:
    """Check the bases and bit groups of one side.

    encoded, decoded: (heads, head size) of encoder input and decoder output.
    """
    shapes = tuple(side.encode.shape), tuple(side.decode.shape)
    if side.encode.dim() != 3 or 0 in shapes[0][:2] or encoded[0] % shapes[0][0]:
        raise FhoptError(
            f"{name}: bases have shapes {shapes}; expected [J, R, channels] in encode, with J a divisor of "
            f"{encoded[0]}. Fit the plan again."
        )
    groups, width = side.groups, side.width
    expected = (groups, width, encoded[0] // groups * encoded[1]), (*decoded, width)
    if shapes != expected:
        raise FhoptError(f"{name}: bases have shapes {shapes}; expected {expected}. Fit the plan again.")
    for part in (side.encode, side.decode):
        if part.dtype not in BASIS_DTYPES:
            raise FhoptError(f"{name}: bases are {part.dtype}; expected float32 or float64. Fit the plan again.")
        if part.numel() and not float(part.abs().max()) <= MAX_BASIS:
            raise FhoptError(
                f"{name}: bases have non-finite values or values above {MAX_BASIS:g}; expected finite values "
                "up to it. Fit the plan again."
            )
    _check_tiers(name, side)


def _check_tiers(name: str, side: SidePlan) -> None:
    """Check the bit groups of one side."""
    for tier in side.tiers:
        if tier.bits not in SUPPORTED_BITS or tier.width < 1 or tier.width % TIER_QUANTUM:
            raise FhoptError(
                f"{name}: the bit groups have {tier}; expected widths of {TIER_QUANTUM}k with bits of "
                f"{SUPPORTED_BITS}. Fit the plan again."
            )
        if not is_step(tier.bits, tier.step):
            raise FhoptError(
                f"{name}: the quantization steps of {tier} are invalid; expected {MIN_STEP:g} to "
                f"{MAX_STEP:g}, or {-MAX_TRELLIS_STEP:g} to {-MIN_STEP:g} for trellis codes of {TRELLIS_BITS} "
                "bits. Fit the plan again."
            )
    covered = sum(tier.width for tier in side.tiers)
    if side.tiers and covered != side.width:
        raise FhoptError(f"{name}: bit groups cover {covered} channels; expected {side.width}. Fit the plan again.")
