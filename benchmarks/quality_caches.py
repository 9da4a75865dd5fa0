"""KV caches that benchmarks/quality.py measures: plans, and other methods of like size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from competitors import (
    PACKAGES,
    Competitor,
    Kivi,
    QuantizedBlocks,
    RoundToNearest,
    Schedule,
    Shape,
    Transformers,
    head_moments,
    low_rank,
    rank_for,
)
from quality_measurement import COUNTED_AT, OURS, Implementation, progress_bar
from recording import screen
from rich.progress import track
from torch import Tensor

from fhopt.calibration import options as calibration_options
from fhopt.calibration import run
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens


def load_plans(folder: Path, ratios: Iterable[float]) -> dict[float, LatentPlan]:
    """Load the plans `folder`/8x and so on. Raises FhoptError when one is absent."""
    return {ratio: LatentPlan.load(folder / f"{ratio:g}x") for ratio in ratios}


def fit_plans(
    loaded: LoadedModel, ratios: Iterable[float], options: calibration_options.FitOptions
) -> dict[float, LatentPlan]:
    """Fit a plan for each ratio, from statistics that are collected once."""
    with progress_bar("calibrate") as bar:
        measured = run.measure(loaded, options, lambda stage, done, total: bar(done, total))
    return {
        ratio: run.plan_for(measured, dataclasses.replace(options, ratio=ratio))
        for ratio in track(ratios, "fit", transient=True)
    }


def ours(plans: dict[float, LatentPlan]) -> list[Implementation]:
    """Return the plans as implementations. Raises FhoptError when they do not keep the same tokens exact."""
    if len({(p.sinks, p.recent, p.block) for p in plans.values()}) > 1:
        raise FhoptError("the plans differ in sinks, recent or block; expected the same exact tokens in all of them.")
    return [
        Implementation(OURS, OURS, plan.cache_bytes(COUNTED_AT), plan.ratio(COUNTED_AT), plan=plan)
        for plan in plans.values()
    ]


def rivals(
    loaded: LoadedModel, plans: dict[float, LatentPlan], options: calibration_options.FitOptions, quick: bool
) -> list[Implementation]:
    """Return the other methods, with the exact tokens of the plans; without those whose package is missing."""
    plan = next(iter(plans.values()))
    schedule = Schedule(plan.sinks, plan.recent, plan.block)
    shape = Shape.of(loaded.language_model())
    methods: list[Competitor] = [QuantizedBlocks(Kivi(bits), schedule) for bits in ((2,) if quick else (4, 3, 2))]
    if not quick:
        methods += [QuantizedBlocks(RoundToNearest(bits), schedule) for bits in (8, 4)]
        for backend in PACKAGES:
            methods += _installed([Transformers(backend, bits, schedule.first_step) for bits in (4, 2)])
    ranks = {rank_for(ratio, shape, schedule, COUNTED_AT) for ratio in plans}
    moments = _moments(loaded, options, plan.sinks)
    methods += [QuantizedBlocks(low_rank(moments, rank), schedule) for rank in sorted(ranks, reverse=True)]
    exact = COUNTED_AT * shape.exact_token_bytes
    sizes = [rival.cache_bytes(shape, COUNTED_AT) for rival in methods]
    pairs = zip(methods, sizes, strict=True)
    return [Implementation(r.name, r.family, size, exact / size, rival=r) for r, size in pairs]


def _installed(methods: Iterable[Transformers]) -> list[Transformers]:
    there = []
    for rival in methods:
        if rival.missing is None:
            there.append(rival)
        else:
            screen().print(rival.missing, markup=False)
    return there


def _moments(loaded: LoadedModel, options: calibration_options.FitOptions, sinks: int) -> list[tuple[Tensor, Tensor]]:
    """Collect second moments of each head on the tokens that calibrate the plans."""
    ids = tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)
    with progress_bar("second moments") as bar:
        return head_moments(loaded.language_model(), ids, sinks, lambda done: bar(done, len(ids)))
