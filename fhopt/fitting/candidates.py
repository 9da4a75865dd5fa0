"""Candidate bases: those of every layout that a site may get in a plan."""

from __future__ import annotations

from collections.abc import Mapping

from fhopt.errors import FhoptError
from fhopt.fitting.allocation import AUTO
from fhopt.fitting.bases import Basis, CandidateBases, fit_basis, fit_joint
from fhopt.fitting.statistics import SiteStatistics
from fhopt.hardware.devices import Device, find_device, layout_time
from fhopt.plan.site import AttentionSite

COMPETING = ("band", "identity")  # what "auto" chooses from
SLOWER = 1.5  # for a device, layouts that take more than this many times the fastest one's time do not compete
USED = 0.6  # share of the channels of a basis that get bits, at 4x to 8x


def fit_bases(
    statistics: Mapping[str, SiteStatistics], layout: str = AUTO, *, context: int, tokens: int = 8192,
    device: str | None = None,
) -> CandidateBases:  # fmt: skip
    """Fit the bases of every site in the layouts that may be chosen.

    context: tokens of a calibration sequence. tokens: length of context that the plan is made for. With a `device`
    (`hardware.devices.DEVICES`), "auto" has latents per head to choose from too, and leaves out what would be slow
    there: one latent for many heads means more arithmetic, which a CPU feels and a GPU does not. Raises FhoptError when
    the layout `input` is asked for and a site has none, or the device is unknown.
    """
    bases: dict[str, dict[str, tuple[Basis, ...]]] = {}
    target = None if device is None else find_device(device)
    competing = COMPETING if target is None else (*COMPETING, "head")
    for name, s in statistics.items():
        joint = fit_joint(s) if layout in (AUTO, "input") else None
        if layout == "input" and joint is None:
            raise no_joint_basis(s.site)
        bases[name] = {"input": (joint,)} if joint is not None else {}
        for which in competing if layout == AUTO else {layout} - {"input"}:
            sides = (fit_basis(s, side, which, tokens, context) for side in ("key", "value"))
            bases[name][which] = tuple(sides)
        if layout == AUTO and target is not None:
            bases[name] = _fast_enough(bases[name], s.site, target, tokens)
    return bases


def _fast_enough(
    layouts: Mapping[str, tuple[Basis, ...]], site: AttentionSite, device: Device, tokens: int
) -> dict[str, tuple[Basis, ...]]:
    """Return the layouts of a site that are not much slower than the fastest; `identity` always stays.

    Times are those at a quarter of the bytes of 16-bit keys and values.
    """
    total = site.exact_numbers_per_token / 2  # bytes: 16-bit numbers, four times smaller

    def seconds(layout: str) -> float:
        share = 1.0 if layout == "identity" else USED
        widths = [int(share * basis.encode.shape[1]) for basis in layouts[layout]]
        groups = layouts[layout][0].groups
        shared = len(widths) == 1
        return layout_time(device, site.heads, groups, widths[0], widths[-1], total / groups, tokens, shared=shared)

    times = {layout: seconds(layout) for layout in layouts}
    limit = SLOWER * min(times.values())
    return {layout: sides for layout, sides in layouts.items() if layout == "identity" or times[layout] <= limit}


def no_joint_basis(site: AttentionSite) -> FhoptError:
    """Return the error of a site that cannot have the layout `input`."""
    why = "its keys rotate" if site.rope is not None else "they are as wide as their input, or it is too wide"
    return FhoptError(
        f"{site.name}: keys and values are not maps of one input half as wide ({why}); the layout `input` needs that. "
        "Use another layout."
    )
