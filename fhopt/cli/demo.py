"""Command `fhopt demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from fhopt.cli.app import main
from fhopt.cli.options import json_option, output_console, print_json, progress_bar
from fhopt.errors import FhoptError
from fhopt.planning.request import CALIBRATING

# Stages and shares of the time
SHARES = {"loading": 1.0} | CALIBRATING | {"perplexity": 5.0, "speed": 3.0, "report": 2.0}


@main.command()
@click.option("--ratio", type=float, default=4.0, show_default=True, help="Compression ratio of the 16-bit KV cache.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the plan and the report.",
)
@json_option
def demo(ratio: float, out: Path, as_json: bool) -> None:
    """Run the demo on SmolLM2-135M: find attention, fit a plan, generate with it, and measure."""
    from fhopt.files import check_writable
    from fhopt.fitting.choices import AUTO, BITS, check_options
    from fhopt.models.model_files import check_model

    check_options(ratio, AUTO, BITS)
    check_model("demo")
    _check_extras()
    check_writable(out)

    from fhopt.cli.demo_run import run_demo

    console = output_console(as_json)
    with progress_bar(as_json, SHARES) as progress:
        result = run_demo(out, ratio, console, progress)
    if as_json:
        print_json(result)
    else:
        console.print(
            f"plan:   {result['plan_path']}\nreport: {result['report_path']}", soft_wrap=True, highlight=False
        )
        console.print(f"done in {result['seconds']:.0f} s, including {result['report_seconds']:.1f} s for the report.")


def _check_extras() -> None:
    """Raise FhoptError if a package that the demo needs is not installed, before anything is imported."""
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise FhoptError(
            f"{', '.join(absent)}: not installed; the demo needs the extra demo. Install it with: pip install "
            "'fhopt[demo]'"
        )


_NEEDED = ("transformers", "accelerate", "gguf", "jinja2", "pygraphviz", "vl_convert")
