"""Fitting of the plans that benchmarks/engines/compare.py measures, in a separate process because of its memory use.

    python -m benchmarks.engines.fit_plans MODEL FOLDER NAME [--quick]  writes FOLDER/NAME

NAME: `exact`, which needs no calibration, or a ratio, such as `4x`. --quick: 4 bits for every channel, uncalibrated.
The 4x and 8x plans are fitted together, to one calibration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.cpu import memory
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import plan_from_calibration
from fhopt.fitting import fit_plan
from fhopt.hardware.this_cpu import closest_cpu
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.sites import find_sites
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.pipeline import calibrate_source, text_source

RATIOS = (4.0, 8.0)  # fitted together: calibration dominates the time


def fitted(loaded: LoadedModel, ratios: tuple[float, ...]) -> dict[str, LatentPlan]:
    """Fit plans of several ratios to one calibration, by name."""
    options = FitOptions(ratio=ratios[0], device=closest_cpu())
    calibration = calibrate_source(text_source(loaded), options)
    return {f"{ratio:g}x": plan_from_calibration(calibration, replace(options, ratio=ratio)) for ratio in ratios}


def plans(loaded: LoadedModel, name: str, quick: bool) -> dict[str, LatentPlan]:
    """Return the plan of this name, and those fitted along with it."""
    if name == "exact":
        return {name: fit_plan.exact_plan(find_sites(loaded).sites.values())}
    if quick:
        return {name: memory.plain_plan(loaded)}
    ratio = float(name.removesuffix("x"))
    return fitted(loaded, RATIOS if ratio in RATIOS else (ratio,))


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--quick", is_flag=True, help="4 bits for every number, without calibration.")
def main(model: str, folder: Path, name: str, quick: bool) -> None:
    """Write the plan NAME of MODEL into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for known, plan in plans(load_model(model), name, quick).items():
        plan.save(folder / known)


if __name__ == "__main__":
    main()
