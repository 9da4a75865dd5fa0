"""The command line. Every command takes `--json`: one object on standard output and nothing else there.

A mistake of the user's ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fhopt import __version__
from fhopt.errors import FhoptError, PassError

PIPED_WIDTH = 120  # columns where there is no terminal to ask

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


class _Commands(click.Group):
    """Turns FhoptError into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
        try:
            return super().invoke(ctx)
        except (FhoptError, PassError) as error:
            message = " ".join(str(error).split())
            click.echo(f"fhopt: {message}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fhopt")
def main() -> None:
    """Find attention in any PyTorch model, shrink its cache to latents, and measure what it cost.

    MODEL is `demo`, a Hugging Face folder, a GGUF file, a .pt2 program, or python.module:function.
    """


def _console(as_json: bool) -> Console:
    """People read standard output; with --json it belongs to the program that reads it."""
    console = Console(stderr=as_json, quiet=as_json)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on standard error."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json or not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield report


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, sort_keys=True))


@main.command()
@click.option("--ratio", type=float, default=4.0, show_default=True, help="How many times smaller than a 16-bit cache.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the plan and the report.",
)
@json_option
def demo(ratio: float, out: Path, as_json: bool) -> None:
    """The main job on SmolLM2-135M: find, fit, cache, measure."""
    from fhopt.demo import run_demo

    console = _console(as_json)
    with _progress(as_json) as progress:
        result = run_demo(out, ratio, console, progress)
    if as_json:
        _print_json(result)
    else:
        console.print(
            f"plan:   {result['plan_path']}\nreport: {result['report_path']}", soft_wrap=True, highlight=False
        )
        console.print(f"done in {result['seconds']:.0f} s.")


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Show this plan beside the sites.")
@json_option
def inspect(model: str, plan_path: Path | None, as_json: bool) -> None:
    """List the attention sites of MODEL: one row each, and what was left alone."""
    from fhopt.fitting import describe
    from fhopt.models import load_model
    from fhopt.pipeline import find_sites
    from fhopt.spec import LatentPlan
    from fhopt.tables import missed_table, plan_table, sites_table

    plan = LatentPlan.load(plan_path) if plan_path else None
    outcome = find_sites(load_model(model))
    if as_json:
        rows = {"sites": [asdict(s) for s in outcome.sites.values()], "missed": [asdict(m) for m in outcome.missed]}
        _print_json(rows | ({"plan": describe(plan)} if plan else {}))
        return
    console = _console(as_json)
    console.print(sites_table(outcome.sites.values()))
    if plan:
        console.print(plan_table(plan))
    if outcome.missed:
        console.print(missed_table(outcome.missed))


@main.command()
@click.argument("model")
@json_option
def explain(model: str, as_json: bool) -> None:
    """Say why candidates in MODEL were left alone: how far each came, the reason, the source line."""
    from fhopt.models import load_model
    from fhopt.pipeline import explain_sites
    from fhopt.tables import missed_table

    outcome = explain_sites(load_model(model))
    if as_json:
        _print_json({"sites_found": len(outcome.sites), "missed": [asdict(m) for m in outcome.missed]})
        return
    console = _console(as_json)
    if outcome.missed:
        console.print(missed_table(outcome.missed))
    console.print(f"{len(outcome.sites)} sites found, {len(outcome.missed)} candidates left alone.")


@main.command()
@click.argument("model")
@click.option(
    "--data", "text", default="topics", show_default=True, help="Text file, folder, or topics, source, license."
)
@click.option("--ratio", type=float, default=4.0, show_default=True, help="How many times smaller than a 16-bit cache.")
@click.option("--layout", default="freq", show_default=True, help="freq or identity.")
@click.option("--sequences", type=int, default=16, show_default=True, help="Calibration sequences.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens of each.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the plan.")
@json_option
def fit(model: str, text: str, out: Path, as_json: bool, **options: Any) -> None:
    """Calibrate MODEL on text and write a plan."""
    from fhopt.models import load_model
    from fhopt.pipeline import FitOptions
    from fhopt.pipeline import fit as run_fit
    from fhopt.spec import PLAN_FILES, check_folder
    from fhopt.tables import plan_table

    chosen = FitOptions(text=text, **options)
    chosen.check()
    check_folder(out, PLAN_FILES)
    loaded = load_model(model)
    with _progress(as_json) as progress:
        plan, outcome = run_fit(loaded, chosen, progress)
    plan.save(out)
    if as_json:
        _print_json(
            {"plan_path": str(out), "sites": len(outcome.sites), "ratio": plan.ratio(), "digest": plan.digest()}
        )
        return
    console = _console(as_json)
    console.print(plan_table(plan))
    console.print(
        f"{plan.ratio():.2f}x plan for {len(plan.sites)} sites written to {out}", soft_wrap=True, highlight=False
    )


@main.command("eval")
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True)
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text, as in fit; repeatable.",
)
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True)
@json_option
def evaluate(model: str, plan_path: Path, texts: tuple[str, ...], sequences: int, context: int, as_json: bool) -> None:
    """Perplexity of MODEL with its exact cache and with the plan's, on the test half of each text."""
    from fhopt import data
    from fhopt.applying import apply, unapply
    from fhopt.evaluate import score
    from fhopt.models import load_model
    from fhopt.spec import LatentPlan

    plan = LatentPlan.load(plan_path)
    loaded = load_model(model)
    network = loaded.language_model()
    ids = {
        t: data.sequences(
            loaded.tokenizer,
            data.halves(data.read_text(t))[1],
            count=sequences,
            length=context,
            what=f"the second half of {t!r}",
        )
        for t in texts
    }
    exact = {t: score(network, rows, None).perplexity for t, rows in ids.items()}
    apply(network, plan)
    coded = {t: score(network, rows, plan).perplexity for t, rows in ids.items()}
    unapply(network)
    result = {
        t: {"exact": exact[t], "plan": coded[t], "increase_percent": 100 * (coded[t] / exact[t] - 1)} for t in texts
    }
    if as_json:
        _print_json({"perplexity": result, "ratio": plan.ratio()})
        return
    for name, row in result.items():
        click.echo(f"{name}: {row['exact']:.4f} exact, {row['plan']:.4f} plan, {row['increase_percent']:+.2f} %")


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The HTML file to write.")
@json_option
def report(model: str, plan_path: Path | None, out: Path, as_json: bool) -> None:
    """Write what was found in MODEL, and its plan, as one HTML file."""
    from fhopt.models import load_model
    from fhopt.pipeline import find_sites
    from fhopt.reporting import write_report
    from fhopt.spec import LatentPlan

    plan = LatentPlan.load(plan_path) if plan_path else None
    write_report(out, find_sites(load_model(model)), plan)
    if as_json:
        _print_json({"report_path": str(out)})
    else:
        click.echo(f"report written to {out}")


if __name__ == "__main__":
    main()
