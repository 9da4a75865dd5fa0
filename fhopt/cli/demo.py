"""The command `fhopt demo`."""

from __future__ import annotations

from pathlib import Path

import click

from fhopt.cli.app import main
from fhopt.cli.options import json_option, output_console, print_json, progress_bar


@main.command()
@click.option("--ratio", type=float, default=4.0, show_default=True, help="Compression of the 16-bit KV cache.")
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
    from fhopt.fitting.choices import AUTO, BITS, check_options
    from fhopt.models.model_files import check_model

    check_options(ratio, AUTO, BITS)
    check_model("demo")

    from fhopt.cli.demo_run import run_demo

    console = output_console(as_json)
    with progress_bar(as_json) as progress:
        result = run_demo(out, ratio, console, progress)
    if as_json:
        print_json(result)
    else:
        console.print(
            f"plan:   {result['plan_path']}\nreport: {result['report_path']}", soft_wrap=True, highlight=False
        )
        console.print(f"done in {result['seconds']:.0f} s, of which {result['report_seconds']:.1f} s for the report.")
