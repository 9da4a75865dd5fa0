"""Commands of the plan store: `fhopt plans`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import DEVICE, MODEL, PLAN
from fhopt.cli.options import (
    busy,
    calibration_options,
    json_option,
    output_console,
    print_json,
    progress_bar,
)
from fhopt.fitting.codes import AUTO, CHOICES
from fhopt.planning.request import CALIBRATING

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.planning.plan_store import StoredPlan


@main.group(invoke_without_command=True)
@click.pass_context
@json_option
def plans(context: click.Context, as_json: bool) -> None:
    """List the plans stored on this machine, or fit, add, find, verify and prune them.

    In other commands: --plan "$(fhopt plans path NAME)".
    """
    if context.invoked_subcommand is None:
        from fhopt.planning.plan_store import stored_plans

        _show_plans(stored_plans(), as_json)


def _show_plans(results: list[StoredPlan], as_json: bool) -> None:
    from fhopt.planning.plan_store import stored_plans_table

    if as_json:
        print_json({"plans": [asdict(e) | {"path": str(e.path)} for e in results]})
    else:
        output_console(as_json).print(stored_plans_table(results))


@plans.command("fit")
@click.argument("model", type=MODEL)
@click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    default=(4.0, 8.0),
    show_default=True,
    help="Compression ratio of the 16-bit KV cache; repeatable.",
)
@calibration_options
@click.option("--device", type=DEVICE, help="Target device, as in fit.")
@click.option(
    "--code", type=click.Choice(CHOICES), default=AUTO, show_default=True, help="Quantizer for latents, as in fit."
)
@json_option
def fit_plans(model: str, ratios: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Fit and store plans of several ratios from one calibration.

    Plans already stored are not refitted. The same command resumes an interrupted calibration.
    """
    from fhopt.calibration.options import FitOptions

    chosen = FitOptions(**options)
    for ratio in ratios:
        replace(chosen, ratio=ratio).check()

    from fhopt.models.loader import load_model
    from fhopt.planning.plan_store import fit_ratios

    with progress_bar(as_json, {"loading": 1.0} | CALIBRATING) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("finding attention", 0, 1)
        result = fit_ratios(loaded, chosen, ratios, progress)
    _show_plans(result, as_json)


@plans.command("add")
@click.argument("paths", metavar="PLAN...", type=PLAN, nargs=-1, required=True)
@json_option
def add_plans(paths: tuple[Path, ...], as_json: bool) -> None:
    """Store copies of plans that `fhopt fit` wrote."""
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.planning.plan_store import add

    _show_plans([add(LatentPlan.load(path)) for path in paths], as_json)


@plans.command("path")
@click.argument("name")
@json_option
def plan_path(name: str, as_json: bool) -> None:
    """Print the folder of the plan whose name or digest begins with NAME."""
    from fhopt.planning.plan_store import find_plan

    result = find_plan(name)
    if as_json:
        print_json(asdict(result) | {"path": str(result.path)})
    else:
        click.echo(result.path)


@plans.command("verify")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--model", type=MODEL, help="Also report plans that were not fitted to this model.")
@json_option
def verify_plans(names: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Check plans for damage; the exit code is 1 if any is damaged."""
    from fhopt.planning.plan_store import find_plan, stored_plans, verify_plan

    asked = [find_plan(n) for n in names] if names else stored_plans()
    loaded = _loaded(model, as_json) if model else None
    checked = [verify_plan(e, loaded) for e in asked]
    _show_plans(checked, as_json)
    if any(e.fault for e in checked):
        raise SystemExit(1)


def _loaded(model: str, as_json: bool) -> LoadedModel:
    from fhopt.models.loader import load_model

    with busy("loading", as_json):
        return load_model(model)


@plans.command("prune")
@click.option("--keep", type=click.IntRange(min=0), help="Keep only the N newest plans of each model.")
@click.option("--dry-run", is_flag=True, help="List what would be removed, and remove nothing.")
@json_option
def prune_command(keep: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove damaged plans, and leftover files over a day old."""
    from fhopt.planning.plan_store import prune_plans

    done = prune_plans(keep, dry_run)
    if as_json:
        print_json(asdict(done) | {"dry_run": dry_run})
        return
    for name in done.names:
        click.echo(name)
    action = "would be removed" if dry_run else "removed"
    click.echo(f"{len(done.names)} {action}, {done.nbytes / 1e6:.1f} MB.")
