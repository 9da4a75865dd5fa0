"""Candidate bases: those of every layout that a site may get in a plan.

Layouts compete by loss, and for a device not at any price in time: a latent that is shared by all heads is multiplied
by the queries of each of them, so with 8 kv heads it takes a CPU three to five times as long as a latent for each. A
GPU does not feel it. For a GPU what would be slow is left out here; for a CPU loss is weighed against time in
fhopt/fitting/fast_choice.py.
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

COMPETING = ("band", "identity")  # what "auto" chooses from
SLOWER = 1.5  # layouts that take a GPU more than so many times the fastest one's time do not compete
SLOW = 1.7  # from so many times on a user is told
USED = 0.6  # share of the channels of a basis that get bits, at 4x to 8x


def fit_bases(
    statistics: Mapping[str, SiteStatistics], layout: str = AUTO, *, context: int, tokens: int = 8192,
    device: str | None = None,
) -> CandidateBases:  # fmt: skip
    """Fit the bases of every site in the layouts that may be chosen.

    context: tokens of a calibration sequence. tokens: length of context that the plan is made for. device: what the
    plan will run on (`hardware.devices.DEVICES`): "auto" has latents per head to choose from then, too, and leaves out
    what would be slow on a GPU. Raises FhoptError when the layout `input` is asked for and a site has none, or the
    device is unknown.
    """
    bases = fit_layouts(statistics, _competing(layout, device), context=context, tokens=tokens)
    return select_bases(bases, {name: s.site for name, s in statistics.items()}, layout, tokens=tokens, device=device)


def fit_layouts(
    statistics: Mapping[str, SiteStatistics], layouts: Iterable[str], *, context: int, tokens: int
) -> CandidateBases:
    """Fit the bases of every site in each of `layouts`; of `input`, where a site has it. Else as `fit_bases`."""
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
    """Return of `bases` those that may be chosen from, as `fit_bases` does; sites by name.

    Raises FhoptError when a layout is asked for that was not fitted, or that a site does not have.
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
    """Return whether a latent that all heads share takes this CPU more than `SLOW` times as long as one for each.

    Only its vector unit counts, by which the table of devices has one that is like it. False where torch has a GPU.
    """
    if torch.cuda.is_available():
        return False

    def seconds(groups: int) -> float:
        widths = [int(USED * site.kv_heads * size / groups) for size in (site.key_dim, site.value_dim)]
        return _seconds(find_device(this_cpu.most_alike()), site, groups, widths, tokens)

    return seconds(1) > SLOW * seconds(site.kv_heads)


def _not_fitted(layout: str, fitted: Iterable[str]) -> FhoptError:
    return FhoptError(
        f"the statistics have no bases of the layout {layout}; expected one of {', '.join(sorted(fitted))}. Calibrate "
        f"again with --layout {layout}."
    )


def _fast_enough(
    layouts: Mapping[str, tuple[Basis, ...]], site: AttentionSite, device: Device, tokens: int
) -> dict[str, tuple[Basis, ...]]:
    """Return the layouts of a site that are not much slower than the fastest; `identity` always stays."""

    def seconds(layout: str) -> float:
        share = 1.0 if layout == "identity" else USED
        widths = [int(share * basis.encode.shape[1]) for basis in layouts[layout]]
        return _seconds(device, site, layouts[layout][0].groups, widths, tokens)

    times = {layout: seconds(layout) for layout in layouts}
    limit = SLOWER * min(times.values())
    return {layout: sides for layout, sides in layouts.items() if layout == "identity" or times[layout] <= limit}


def _seconds(device: Device, site: AttentionSite, groups: int, widths: Sequence[int], tokens: int) -> float:
    """Estimate the time of attention at a quarter of the bytes of 16-bit keys and values.

    groups: latent heads. widths: channels of each, of keys and of values, or of rows that serve both.
    """
    size = site.exact_numbers_per_token / 2 / groups
    return layout_time(device, site.heads, groups, widths[0], widths[-1], size, tokens, shared=len(widths) == 1)


def no_joint_basis(site: AttentionSite) -> FhoptError:
    """Return the error of a site that cannot have the layout `input`."""
    why = "its keys rotate" if site.rope is not None else "they are as wide as their input, or it is too wide"
    return FhoptError(
        f"{site.name}: keys and values are not maps of one input half as wide ({why}); the layout `input` needs that. "
        "Use another layout."
    )
