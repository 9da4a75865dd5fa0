"""Benchmark of calibration size: quality of plans by the number of calibration tokens, and fitting time.

    python -m benchmarks.quality.calibration_curve           SmolLM2: benchmarks/results/calibration_curve.json, .png
    python -m benchmarks.quality.calibration_curve --model FOLDER --dtype bfloat16 --texts FILE ...
    python -m benchmarks.quality.calibration_curve --quick   two short calibrations, one text (also QUICK=1)

Half of the sequences of 1,024 tokens fit the bases, the others choose the bits, as by default. Plans are measured with
real caches on texts from domains not used for calibration (measurement.py). A case is "<model>, <dtype>/<tokens>";
results of other models and dtypes from earlier runs stay in the file.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.palette import FHOPT, FHOPT_TINTS, describe, plain
from benchmarks.quality.caches import ours
from benchmarks.quality.measurement import TEXTS, QualityResult, QualityText, measure, progress_bar, read_texts
from benchmarks.recording import ResultsFile, Row, is_quick, kept_rows, record, table
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import plan_from_calibration
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.planning.pipeline import calibrate_source, text_source

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

NAME = "calibration_curve"
COUNTS = (2, 4, 8, 12, 16, 20, 40)  # calibration sequences
RATIOS = (4.0, 8.0)
DEFAULT = FitOptions()


def options_for(sequences: int, quick: bool) -> FitOptions:
    """Return the default options with `sequences` sequences in total."""
    first = max(1, round(sequences * DEFAULT.sequences / (DEFAULT.sequences + DEFAULT.rate_sequences)))
    options = replace(DEFAULT, sequences=first, rate_sequences=sequences - first)
    return replace(options, context=256, recent=64, sequences=5) if quick else options


def measure_count(loaded: LoadedModel, case: str, options: FitOptions, texts: list[QualityText]) -> list[Row]:
    """Calibrate once, fit plans of every ratio, and measure them on the texts."""
    began = time.monotonic()
    with progress_bar(f"calibrate {case}") as bar:
        measured = calibrate_source(text_source(loaded), options, lambda stage, done, total: bar(done, total))
    seconds = time.monotonic() - began
    plans = {ratio: plan_from_calibration(measured, replace(options, ratio=ratio)) for ratio in RATIOS}
    results = measure(loaded.language_model(), ours(plans), texts, next(iter(plans.values())))
    name = f"{case}/{(options.sequences + options.rate_sequences) * options.context}"
    rows = [Row(name, "calibration", "seconds", seconds, "s")]
    return rows + [row for result in results for row in _rows(name, result)]


def _rows(case: str, result: QualityResult) -> list[Row]:
    impl = f"fhopt@{result.impl.ratio:.3g}x"
    worst = max(c.kl for text, c in result.by_text.items() if text.is_unseen)
    return [
        Row(case, impl, "kl_nats", result.mean.kl, "nats"),
        Row(case, impl, "worst_kl_nats", worst, "nats"),
        Row(case, impl, "perplexity_increase", result.mean.increase_percent, "%"),
    ]


@click.command()
@click.option("--model", default="demo", show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--texts", multiple=True, metavar="TEXT", help="A further text: a file, a folder, or a built-in name.")
@click.option("--context", default=1024, show_default=True, help="Tokens of each text.")
@click.option("--count", "counts", type=int, multiple=True, help="Calibration sequences; 2 to 40 when not given.")
@click.option("--quick", is_flag=True, help="A small version, of under a minute.")
def main(model: str, dtype: str, texts: tuple[str, ...], context: int, counts: tuple[int, ...], quick: bool) -> None:
    """Measure plans by the number of calibration tokens."""
    quick = quick or is_quick()
    try:
        loaded = load_model(model, getattr(torch, dtype))
        case = f"{loaded.name}, {dtype}"
        context = min(context, 512) if quick else context
        names = [name for name in (*TEXTS, *texts) if name not in DEFAULT.texts]
        read = read_texts(loaded, names[:1] if quick else names, DEFAULT.texts, context, with_seen=False)
        rows = []
        for count in counts or ((2,) if quick else COUNTS):
            rows += measure_count(loaded, case, options_for(count, quick), read)
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    whole = rows if quick else kept_rows(NAME, lambda measured: measured.startswith(f"{case}/")) + rows
    record(f"{NAME}-quick" if quick else NAME, whole, draw, table(NAME, rows))


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot KL against calibration tokens, a line per plan."""
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in results.of("kl_nats"):
        case, _, tokens = row.case.rpartition("/")
        lines.setdefault((case, row.impl), []).append((int(tokens), row.value))
    curves = {key: sorted(points) for key, points in lines.items() if len(points) > 1} or lines
    for (case, impl), points in curves.items():
        size = impl.partition("@")[2]
        axes.plot(*zip(*points, strict=True), marker="o", color=FHOPT_TINTS.get(size, FHOPT))
        axes.annotate(f"{size}, {case}", points[-1], (6, 0), textcoords="offset points", fontsize=8, va="center")
    counts = sorted({count for points in curves.values() for count, _ in points})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set(xlabel="calibration tokens", ylabel="KL divergence from the full-precision cache, nats/token", ylim=0)
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    plain(axes)
    enough = max(next(n for n, kl in points if kl <= 1.1 * min(kl for _, kl in points)) for points in curves.values())
    about = "mean over held-out text domains of 1,024 tokens"
    describe(figure, f"{enough:,} calibration tokens come within 10% of the lowest KL", about, results)


if __name__ == "__main__":
    main()
