"""Redraw the plots of benchmarks/results from its JSON files, without a measurement.

python -m benchmarks.plots                all of them
python -m benchmarks.plots decode peers   these
"""

from __future__ import annotations

import click

from benchmarks.cpu import decode
from benchmarks.engines import report as engines_report
from benchmarks.gpu import report as gpu_report
from benchmarks.quality import calibration_curve, contexts, healing
from benchmarks.quality import report as quality_report
from benchmarks.recording import RESULTS, Draw, plot
from benchmarks.serving import plans_in_vllm
from benchmarks.zoo import compiled, curated, finding_time

PLOTS: dict[str, Draw] = {
    "calibration_curve": calibration_curve.draw,
    "compiled-zoo-traced": compiled.draw,
    "decode": decode.draw,
    "decode-contexts": decode.draw,
    "finding": finding_time.draw,
    "gpu": gpu_report.draw,
    "healing": healing.draw,
    "peers": engines_report.draw,
    "quality": quality_report.draw,
    "quality-Qwen2.5-Coder-1.5B-Instruct": quality_report.draw,
    "quality-Qwen2.5-Coder-1.5B-Instruct-float32": quality_report.draw,
    "quality-SmolLM2-135M-Instruct": quality_report.draw,
    "quality_contexts": contexts.draw,
    "serving": plans_in_vllm.draw,
    "zoo": curated.draw,
}  # by results file


def measured() -> list[str]:
    """Return the names of plots whose results file exists."""
    return [name for name in PLOTS if (RESULTS / f"{name}.json").exists()]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME]...")
def main(names: tuple[str, ...]) -> None:
    """Redraw the plots of the results files NAME, all if none is named."""
    if unknown := sorted({*names} - {*PLOTS}):
        raise click.BadParameter(f"{', '.join(unknown)} has no plot; expected one of {', '.join(PLOTS)}.")
    for name in names or measured():
        click.echo(plot(name, PLOTS[name]))


if __name__ == "__main__":
    main()
