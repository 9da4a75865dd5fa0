"""Benchmark of quality against bytes: plans and other small KV caches, on the same tokens and full-precision tokens.

    python -m benchmarks.quality.perplexity                 benchmarks/results/quality.json and .png
    python -m benchmarks.quality.perplexity --quick         one short text, one ratio, two methods (also QUICK=1)
    python -m benchmarks.quality.perplexity --plans FOLDER  saved plans FOLDER/8x, ... instead of calibration
    python -m benchmarks.quality.perplexity --model FOLDER  another model: benchmarks/results/quality-NAME.json
    python -m benchmarks.quality.perplexity --kept ...      plans only, other methods from the model's results file

Quality is measured against the full-precision cache: perplexity increase, and KL(exact || other) of the next token. The
full-precision model processes each text once; its log-probabilities are stored; every other cache gets the same calls.
Bytes are counted at 8,192 tokens, everything included: quantized values, scales, zero points, attention sinks, recent
window (methods/quantized_caches.py has the formulas, or says where they are). Plans and other methods are fitted to the
same calibration tokens; the mean is over held-out domains, and the other half of the calibration text is reported
separately. Methods that cannot run are named with the reason.

Other methods have fixed sizes. A plan is compared with each method's smallest size that is at least as large.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import click
import torch

from benchmarks.quality.baselines import check_families
from benchmarks.quality.caches import baseline_caches, fit_plans, load_plans, ours
from benchmarks.quality.comparison import rows
from benchmarks.quality.former_results import check_kept, kept_results
from benchmarks.quality.measurement import TEXTS, exact_perplexity, measure, read_texts
from benchmarks.quality.report import contest_table, draw, summary
from benchmarks.recording import is_quick, record, screen
from fhopt.calibration import options as calibration_options
from fhopt.errors import FhoptError
from fhopt.models.loader import load_model

RATIOS = (3.2, 4.0, 5.3, 8.0, 12.0)
CONTEXT = 2048
QUICK_CONTEXT, QUICK_RATIO = 512, 8.0


@click.command()
@click.option("--ratio", "ratios", type=float, multiple=True, help="Sizes of plans; 3.2, 4, 5.3, 8, 12 when not given.")
@click.option("--texts", multiple=True, metavar="TEXT", help="A further text: a file, a folder, or a built-in name.")
@click.option("--plans", type=click.Path(path_type=Path), metavar="FOLDER", help="Saved plans: FOLDER/8x and so on.")
@click.option(
    "--data", multiple=True, metavar="TEXT", help="Calibration text; topics when not given for the demo model."
)
@click.option("--model", default="demo", show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--context", default=CONTEXT, show_default=True, help="Tokens of each text.")
@click.option(
    "--baseline", "families", multiple=True, help="Another method, such as kivi or kivi-3bit; all when not given."
)
@click.option("--kept", is_flag=True, help="Measure plans only; other methods are those of the former file.")
@click.option("--quick", is_flag=True, help="A small version, of under a minute.")
def main(
    ratios: tuple[float, ...], texts: tuple[str, ...], plans: Path | None, model: str, dtype: str, context: int,
    families: tuple[str, ...], data: tuple[str, ...], kept: bool, quick: bool,
) -> None:  # fmt: skip
    """Measure plans and other methods on a model, SmolLM2-135M-Instruct by default, and write the results."""
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )  # ninja: quanto
    quick = quick or is_quick()
    options = calibration_options.FitOptions()
    if data or model == "demo":  # the demo model is measured on domains that did not calibrate
        options = dataclasses.replace(options, texts=data or ("topics",))
    if quick:
        options = dataclasses.replace(options, sequences=5, rate_sequences=2, context=256, recent=64)
        context = min(context, QUICK_CONTEXT)
    try:
        check_families(families)
        loaded = load_model(model, getattr(torch, dtype))
        chosen = tuple(sorted(ratios)) or ((QUICK_RATIO,) if quick else RATIOS)
        read = read_texts(loaded, (TEXTS[:1] if quick else TEXTS) + texts, options.texts, context, with_seen=not quick)
        fitted = load_plans(plans, chosen) if plans is not None else fit_plans(loaded, chosen, options)
        impls = ours(fitted) + ([] if kept else baseline_caches(loaded, fitted, options, quick, families))
        name = "quality" if model == "demo" else f"quality-{Path(model).name.removesuffix('.gguf')}"
        first = next(iter(fitted.values()))
        if kept:  # check before the slow part
            check_kept(name, {text.name: exact_perplexity(loaded.language_model(), text, first) for text in read})
        results = measure(loaded.language_model(), impls, read, first)
        results += kept_results(name, results) if kept else []
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    record(name, rows(results), draw, summary(results))
    screen().print(contest_table(results))


if __name__ == "__main__":
    main()
