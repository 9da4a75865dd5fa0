"""Allocation of a page budget to the layers of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length
from fhopt.plan.cache_size import recorded_layers, sliding_windows
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import PagePlan, SitePlan, no_pages
from fhopt.progress import Progress, silent
from fhopt.refine.page_options import PagingOptions
from fhopt.refine.page_probes import ALL, LIFTS, MASSES, Curves, measure_pages
from fhopt.refine.page_sketches import with_sketches
from fhopt.texts import tokens as texts_tokens

ECHO_COSTS = "echo_costs"  # provenance key for costs on the repeated-token probe; its value is part of saved plans

# --------------------------------------------------------------------------------------------------- budgets


def allocate_lifts(curves: Mapping[str, Curves], sites: Sequence[SitePlan], share: float) -> dict[str, int]:
    """Choose one of LIFTS, or ALL, for each site, such that on average `share` of quantized tokens' bytes is loaded.

    Starts from half the share and then takes the step with the largest reduction of cost per byte; with fewer pages
    than half, the measurements say little about longer contexts. Sites that were not measured load all their pages,
    which count. Returns indices into LIFTS. Raises FhoptError if the minimum of the sites exceeds the budget.
    """
    size = {site.site.name: site.token_bytes() for site in sites}
    now = {name: _first(c, share / 2) if c.count else ALL for name, c in curves.items()}
    now |= {name: ALL for name in size if name not in now}
    budget, used = share * sum(size.values()), sum(size[n] * _share(curves.get(n), now[n]) for n in size)
    if used > budget * (1 + 1e-9):
        raise FhoptError(
            f"pages {share:g} is too small; expected at least {used / sum(size.values()):.3g} of the bytes. "
            "Raise --pages."
        )
    while gains := [
        gain for n in size if now[n] < ALL for gain in _gains(curves[n], now[n], size[n], budget - used, n)
    ]:
        _, name, at = max(gains)
        used += size[name] * (curves[name].share(at) - curves[name].share(now[name]))
        now[name] = at
    return now


def _share(curves: Curves | None, at: int) -> float:
    return 1.0 if curves is None else curves.share(at)


def _first(curves: Curves, share: float) -> int:
    """Return the index of the lowest lift whose share of pages is at most `share`; the highest lift if none is."""
    return max([i for i in range(len(LIFTS)) if curves.share(i) <= share], default=0)


def _gains(curves: Curves, now: int, size: int, room: float, name: str) -> list[tuple[float, str, int]]:
    """Return (reduction of cost per byte, name, index) for all lower LIFTS of a site, and ALL, that fit into `room`."""
    steps = [(n, size * (curves.share(n) - curves.share(now))) for n in range(now + 1, ALL + 1)]
    fits = [(n, more) for n, more in steps if 0 < more <= room * (1 + 1e-9)]
    return [((curves.loss(now) - curves.loss(n)) / more, name, n) for n, more in fits]


def with_pages(plan: LatentPlan, curves: Mapping[str, Curves], options: PagingOptions) -> LatentPlan:
    """Return the plan with page selection from the curves, and the weight left out as provenance. Raises FhoptError."""
    slides = sliding_windows([s.site for s in plan.sites], recorded_layers(plan))
    lift_of = allocate_lifts(curves, [s for s in plan.sites if not slides[s.site.name]], options.share)
    lift_of |= {name: ALL for name, window in slides.items() if window}
    names = [site.site.name for site in plan.sites]
    masses = dict.fromkeys(names, 1.0)
    measured = {name: curves[name] for name in names if name in curves and curves[name].count}
    if options.mass is not None:
        masses |= {name: MASSES[c.mass_for(1 - options.mass)] for name, c in measured.items()}
    shares = tuple(1.0 if lift_of[name] == ALL else options.room for name in names)
    lifts = tuple(0.0 if lift_of[name] == ALL else LIFTS[lift_of[name]] for name in names)
    fill = tuple(curves[s.site.name].fill if s.site.name in measured else (0.0,) * s.site.heads for s in plan.sites)
    kept = tuple(masses[n] for n in names)
    paged = PagePlan(
        options.tokens, shares, kept, options.least, options.limit, fill if options.limit == 1 else (), lifts
    )
    record = {
        "share": options.share,
        "mass": options.mass,
        "read": {name: c.share(lift_of[name]) for name, c in measured.items()},
        "left_out": {name: c.left_out(lift_of[name]) for name, c in measured.items()},
        "costs": {name: c.cost for name, c in measured.items()},
        ECHO_COSTS: {name: c.repeated.cost for name, c in measured.items() if c.repeated is not None},
    }
    return replace(plan, pages=paged).with_provenance(pages=record)


def calibrate_pages(
    loaded: LoadedModel, plan: LatentPlan, options: PagingOptions, progress: Progress = silent
) -> LatentPlan:
    """Return the plan with page selection, calibrated on the first halves of the texts. Raises FhoptError."""
    options.check(plan.block, plan.window.first_length)
    if plan.segment:
        raise no_pages()
    model = loaded.language_model()
    check_length(model, options.context)
    ids = texts_tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)
    done, total = 0, 2 + len(ids) + 2 * sum(site.site.kind == "self" for site in plan.sites)

    def count(parts: int) -> None:
        nonlocal done
        done += parts
        progress("pages", done, total)

    sketched = with_sketches(model, plan, ids, options.sketch)
    count(1)
    return with_pages(sketched, measure_pages(model, sketched, ids, options, count), options)
