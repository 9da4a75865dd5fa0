"""Candidate bases: one per layout that a site may get in a plan.

Layouts compete by KL, and for a device also by time. All query heads multiply a latent that they share, so with 8 kv
heads a shared latent takes a CPU three to five times as long as per-head latents; a GPU is not slower. For a GPU, slow
layouts are excluded here. For a CPU, fhopt/fitting/fast_choice.py trades KL for time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from fhopt.errors import FhoptError
from fhopt.fitting.bases import Basis, CandidateBases, fit_basis, fit_joint
from fhopt.fitting.choices import AUTO
from fhopt.fitting.statistics import SiteStatistics
from fhopt.hardware import this_cpu
from fhopt.hardware.devices import Device, find_device, layout_time
from fhopt.plan.site import AttentionSite

COMPETING = ("band", "identity")  # choices of "auto"
SLOWER = 1.5  # on a GPU, exclude layouts slower than the fastest by more than this factor
SLOW = 1.7  # warn the user from this factor on
USED = 0.6  # share of a basis's channels that get bits at 4x to 8x


def fit_bases(
    statistics: Mapping[str, SiteStatistics], layout: str = AUTO, *, context: int, tokens: int = 8192,
    device: str | None = None,
) -> CandidateBases:  # fmt: skip
    """Fit the bases of every site in the layouts that may be chosen.

    context: tokens of a calibration sequence. tokens: target context length of the plan. device: what the plan will run
    on (`hardware.devices.DEVICES`); with one, "auto" also considers latents per head, and excludes layouts that are
    slow on a GPU. Raises FhoptError if `input` is requested and a site does not support it, or the device is unknown.
    """
    bases = fit_layouts(statistics, _competing(layout, device), context=context, tokens=tokens)
    return select_bases(bases, {name: s.site for name, s in statistics.items()}, layout, tokens=tokens, device=device)


def fit_layouts(
    statistics: Mapping[str, SiteStatistics], layouts: Iterable[str], *, context: int, tokens: int
) -> CandidateBases:
    """Fit the bases of every site in each of `layouts`; `input` only for sites that support it. Else as `fit_bases`."""
    asked = tuple(dict.fromkeys(layouts))
    bases: dict[str, dict[str, tuple[Basis, ...]]] = {}
    for name, s in statistics.items():
        joint = fit_joint(s) if "input" in asked else None
        bases[name] = {"input": (joint,)} if joint is not None else {}
        for which in asked:
            if which != "input":
                bases[name][which] = tuple(fit_basis(s, side, which, tokens, context) for side in ("key", "value"))
    return bases


def select_bases(
    bases: CandidateBases, sites: Mapping[str, AttentionSite], layout: str = AUTO, *, tokens: int = 8192,
    device: str | None = None,
) -> CandidateBases:  # fmt: skip
    """Select the bases that may be chosen, by the rules of `fit_bases`; sites by name.

    Raises FhoptError if a requested layout was not fitted, or a site does not support it.
    """
    chosen: dict[str, dict[str, tuple[Basis, ...]]] = {}
    fitted = {which for layouts in bases.values() for which in layouts}
    for name, layouts in bases.items():
        chosen[name] = {which: sides for which, sides in layouts.items() if which in _competing(layout, device)}
        if layout == AUTO and device is not None and (target := find_device(device)).kind == "gpu":
            chosen[name] = _fast_enough(chosen[name], sites[name], target, tokens)
        if not chosen[name]:
            raise no_joint_basis(sites[name]) if layout == "input" else _not_fitted(layout, fitted)
    return chosen


def _competing(layout: str, device: str | None) -> tuple[str, ...]:
    if layout != AUTO:
        return (layout,)
    return ("input", *COMPETING) if device is None else ("input", *COMPETING, "head")


def is_slow(site: AttentionSite, tokens: int) -> bool:
    """Return whether a latent shared by all heads takes this CPU more than `SLOW` times as long as per-head latents.

    Depends only on the CPU's vector unit: uses the entry of the device table with the same one. False if torch has a
    GPU.
    """
    if torch.cuda.is_available():
        return False

    def seconds(groups: int) -> float:
        widths = [int(USED * site.kv_heads * size / groups) for size in (site.key_dim, site.value_dim)]
        return _seconds(find_device(this_cpu.closest_cpu()), site, groups, widths, tokens)

    return seconds(1) > SLOW * seconds(site.kv_heads)


def _not_fitted(layout: str, fitted: Iterable[str]) -> FhoptError:
    return FhoptError(
        f"the statistics have no bases of the layout {layout}; expected one of {', '.join(sorted(fitted))}. Calibrate "
        f"again with --layout {layout}."
    )


def _fast_enough(
    layouts: Mapping[str, tuple[Basis, ...]], site: AttentionSite, device: Device, tokens: int
) -> dict[str, tuple[Basis, ...]]:
    """Return the layouts of a site that are not much slower than the fastest; always includes `identity`."""

    def seconds(layout: str) -> float:
        share = 1.0 if layout == "identity" else USED
        widths = [int(share * basis.encode.shape[1]) for basis in layouts[layout]]
        return _seconds(device, site, layouts[layout][0].groups, widths, tokens)

    times = {layout: seconds(layout) for layout in layouts}
    limit = SLOWER * min(times.values())
    return {layout: sides for layout, sides in layouts.items() if layout == "identity" or times[layout] <= limit}


def _seconds(device: Device, site: AttentionSite, groups: int, widths: Sequence[int], tokens: int) -> float:
    """Estimate the time of attention at a quarter of the bytes of 16-bit keys and values.

    groups: latent heads. widths: channels of each, of keys and of values, or of a latent that serves both.
    """
    size = site.exact_numbers_per_token / 2 / groups
    return layout_time(device, site.heads, groups, widths[0], widths[-1], size, tokens, shared=len(widths) == 1)


def no_joint_basis(site: AttentionSite) -> FhoptError:
    """Build the error for a site that does not support the layout `input`."""
    why = "its keys rotate" if site.rope is not None else "they are as wide as their input, or the input is too wide"
    return FhoptError(
        f"{site.name}: layout `input` requires keys and values that are projections of one narrower input "
        f"({why}). Use another layout."
    )
