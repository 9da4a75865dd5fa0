"""KV caches that benchmarks/quality/perplexity.py measures: plans, and other methods of similar size."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from rich.progress import track
from torch import Tensor

from benchmarks.quality.baselines import CalibratedModel, offered
from benchmarks.quality.measurement import COUNTED_AT, OURS, Implementation, progress_bar
from benchmarks.recording import screen
from fhopt.calibration import options as calibration_options
from fhopt.calibration.run import plan_from_calibration
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.pipeline import calibrate_source, text_source
from fhopt.texts import tokens


def load_plans(folder: Path, ratios: Iterable[float]) -> dict[float, LatentPlan]:
    """Load the plans `folder`/8x and so on. Raises FhoptError if one is missing."""
    return {ratio: LatentPlan.load(folder / f"{ratio:g}x") for ratio in ratios}


def fit_plans(
    loaded: LoadedModel, ratios: Iterable[float], options: calibration_options.FitOptions
) -> dict[float, LatentPlan]:
    """Fit a plan for each ratio, from statistics collected once."""
    with progress_bar("calibrate") as bar:
        measured = calibrate_source(text_source(loaded), options, lambda stage, done, total: bar(done, total))
    return {
        ratio: plan_from_calibration(measured, dataclasses.replace(options, ratio=ratio))
        for ratio in track(ratios, "fit", transient=True)
    }


def ours(plans: dict[float, LatentPlan]) -> list[Implementation]:
    """Return the plans as implementations. Raises FhoptError if their full-precision tokens differ."""
    if len({(p.sinks, p.recent, p.block) for p in plans.values()}) > 1:
        raise FhoptError("the plans differ in sinks, recent or block; expected the same exact tokens in all of them.")
    return [
        Implementation(OURS, OURS, plan.cache_bytes(COUNTED_AT), plan.ratio(COUNTED_AT), plan=plan)
        for plan in plans.values()
    ]


def baseline_caches(
    loaded: LoadedModel, plans: dict[float, LatentPlan], options: calibration_options.FitOptions, quick: bool,
    wanted: Collection[str] = (),
) -> list[Implementation]:  # fmt: skip
    """Return the other methods, with the full-precision tokens of the plans, and print the skipped ones and why.

    wanted: families or names, all if empty. Raises FhoptError for an unknown one.
    """

    def read_ids() -> Tensor:
        """Return the calibration tokens of the plans."""
        return tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)

    field = CalibratedModel(loaded.language_model(), plans, read_ids)
    methods, left_out = offered(field, wanted, quick)
    for baseline in left_out:
        screen().print(str(baseline), markup=False)
    exact = COUNTED_AT * field.shape.exact_token_bytes
    sizes = [baseline.cache_bytes(field.shape, COUNTED_AT) for baseline in methods]
    pairs = zip(methods, sizes, strict=True)
    return [Implementation(r.name, r.family, size, exact / size, baseline=r) for r, size in pairs]
