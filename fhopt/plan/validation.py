"""Checks of a plan: shapes, bits, finiteness, names. Raises FhoptError."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fhopt.errors import FhoptError
from fhopt.plan.site_plan import (
    LAYOUTS,
    LEAST_SEGMENT,
    MOST_SEGMENT,
    SKETCH_BITS,
    SUPPORTED_BITS,
    TIER_QUANTUM,
    TRELLIS_BITS,
    PagePlan,
    SidePlan,
    SitePlan,
    SketchPlan,
    no_pages,
)

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan


def check_plan(plan: LatentPlan) -> None:
    """Check that a plan can be what it says. Raises FhoptError."""
    if not plan.sites:
        raise FhoptError("the plan has no sites; expected at least one. Was attention found in the model?")
    if len({s.site.name for s in plan.sites}) < len(plan.sites):
        raise FhoptError("two sites of the plan have the same name. Fit the plan again.")
    _ = plan.window  # raises for numbers that cannot be
    if plan.mean_tokens < 0:
        raise FhoptError(f"the plan has means of {plan.mean_tokens} tokens; expected 0 (none) or more. Fit it again.")
    for site in plan.sites:
        if site.layout not in LAYOUTS:
            raise FhoptError(f"{site.site.name} has the layout {site.layout!r}; expected one of {', '.join(LAYOUTS)}.")
        _check_sides(site)
        if plan.mean_tokens and not (site.key.tiers and site.value.tiers):
            raise FhoptError(f"{site.site.name}: means are of quantized latents, and these are not. Fit again.")
        if site.is_shared and (site.key.groups != 1 or site.key.tiers != site.value.tiers):
            raise FhoptError(
                f"{site.site.name}: keys and values must share one latent head and its bit groups. Fit again."
            )
        if site.segment:
            _check_segment(site, plan)
        if site.sketch is not None:
            _check_sketch(site.site.name, site.key, site.sketch)
    if plan.pages is not None:
        _check_pages(plan, plan.pages)


def _check_segment(site: SitePlan, plan: LatentPlan) -> None:
    """Raise FhoptError where keys cannot be relative to segments."""
    if not site.site.turns or site.site.slides or not site.key.tiers:
        raise FhoptError(f"{site.site.name}: only quantized keys that turn are relative to segments. Fit again.")
    if not 0 < site.segment <= MOST_SEGMENT or site.segment % LEAST_SEGMENT:
        raise FhoptError(
            f"{site.site.name} has segments of {site.segment} tokens; expected a multiple of {LEAST_SEGMENT}. Fit it "
            "again."
        )
    if plan.pages is not None:
        raise no_pages()


def _check_pages(plan: LatentPlan, pages: PagePlan) -> None:
    if pages.tokens < 1 or plan.block % pages.tokens:
        raise FhoptError(f"pages of {pages.tokens} tokens: expected a divisor of the plan's block, {plan.block}.")
    if not len(pages.shares) == len(pages.masses) == len(plan.sites):
        raise FhoptError(
            f"pages for {len(pages.shares)} and {len(pages.masses)} sites, the plan has {len(plan.sites)}. Calibrate "
            "them again."
        )
    if not all(0 < x <= 1 for x in (*pages.shares, *pages.masses, pages.limit)) or pages.least < 0:
        raise FhoptError(f"{pages}: expected shares, masses and the limit above 0 and at most 1, and least from 0 on.")
    if len(pages.lifts) not in (0, len(plan.sites)) or not all(0 <= x < math.inf for x in pages.lifts):
        raise FhoptError(
            f"pages have lifts {pages.lifts}; expected numbers from 0 on for {len(plan.sites)} sites, or none. "
            "Calibrate pages again."
        )
    _check_fill(plan, pages)
    for site, share in zip(plan.sites, pages.shares, strict=True):
        if share < 1 and site.site.kind != "self":
            raise FhoptError(f"{site.site.name} reads an encoder, all of it; expected a share of 1. Leave it out.")
        if share < 1 and site.sketch is None:
            raise FhoptError(f"{site.site.name} has no sketches to select pages by. Calibrate pages for this plan.")


def _check_fill(plan: LatentPlan, pages: PagePlan) -> None:
    if not pages.fill:
        return
    filled, expected = [len(heads) for heads in pages.fill], [site.site.heads for site in plan.sites]
    if filled != expected or not all(0 <= x < math.inf for heads in pages.fill for x in heads):
        raise FhoptError(
            f"pages are filled for {filled} heads; expected numbers from 0 on for {expected}. Calibrate pages again."
        )
    if pages.limit < 1:
        raise FhoptError("pages with a limit are read or bounded, not filled; expected one of both. Leave fill out.")


def _check_sketch(name: str, key: SidePlan, sketch: SketchPlan) -> None:
    groups, width = key.groups, key.width
    shapes = tuple(sketch.channels.shape), tuple(sketch.mean.shape), tuple(sketch.deviation.shape)
    expected = (groups, sketch.width), (groups, width), (groups, width)
    if shapes != expected or sketch.channels.dtype != torch.int64:
        raise FhoptError(f"{name}: sketches have shapes {shapes}, expected {expected}. Calibrate pages again.")
    for tier in sketch.tiers:
        if tier.bits not in SKETCH_BITS or tier.width < 1 or tier.width % TIER_QUANTUM or not 0 < tier.step < math.inf:
            raise FhoptError(f"{name}: sketches of {tier}; expected a width of {TIER_QUANTUM}k, bits of {SKETCH_BITS}.")
    if not bool(((sketch.channels >= 0) & (sketch.channels < width)).all()):
        raise FhoptError(f"{name}: sketches name channels beyond the {width} that there are. Calibrate pages again.")
    if not (sketch.mean.isfinite().all() and sketch.deviation.isfinite().all() and (sketch.deviation > 0).all()):
        raise FhoptError(f"{name}: sketches have deviations that are no positive numbers. Calibrate pages again.")


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

    encoded, decoded: (heads, numbers of each) that the encoder matrices read, and that the decoder matrices give.
    """
    groups, width = side.groups, side.width
    expected = (groups, width, encoded[0] // groups * encoded[1]), (*decoded, width)
    shapes = tuple(side.encode.shape), tuple(side.decode.shape)
    if shapes != expected:
        raise FhoptError(f"{name}: bases have shapes {shapes}, expected {expected}. Fit the plan again.")
    if not (side.encode.is_floating_point() and side.decode.is_floating_point()):
        raise FhoptError(f"{name}: bases of {side.encode.dtype} and {side.decode.dtype}; expected floats. Fit again.")
    if not (side.encode.isfinite().all() and side.decode.isfinite().all()):
        raise FhoptError(f"{name}: bases hold non-finite numbers. Fit the plan again.")
    if any(t.bits not in SUPPORTED_BITS or t.width < 1 or t.width % TIER_QUANTUM for t in side.tiers):
        raise FhoptError(
            f"{name}: bit groups {side.tiers} are not widths of {TIER_QUANTUM}k with bits of {SUPPORTED_BITS}. "
            "Fit the plan again."
        )
    if not all(t.bits == 16 or 0 < abs(t.step) < math.inf for t in side.tiers):
        raise FhoptError(f"{name}: quantization steps of {side.tiers} are not numbers but 0. Fit the plan again.")
    if any(t.is_trellis and t.bits not in TRELLIS_BITS for t in side.tiers):
        raise FhoptError(f"{name}: trellis codes of {side.tiers}; expected bits of {TRELLIS_BITS}. Fit the plan again.")
    if side.tiers and sum(t.width for t in side.tiers) != width:
        raise FhoptError(
            f"{name}: bit groups cover {sum(t.width for t in side.tiers)} channels of {width}. Fit the plan again."
        )
