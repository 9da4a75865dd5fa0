"""Commands of the store of converted models: `fhopt models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.options import json_option, output_console, print_json

if TYPE_CHECKING:
    from fhopt.models.converted_models import Converted


@main.group(invoke_without_command=True)
@click.pass_context
@json_option
def models(context: click.Context, as_json: bool) -> None:
    """List the models that were converted from GGUF files, or prune them.

    A GGUF file is converted by the first command that names it, and kept up to FHOPT_MODELS_GB gigabytes of such models
    (20; 0 keeps none). Those that were used longest ago make room.
    """
    if context.invoked_subcommand is not None:
        return

    from fhopt.models.converted_models import converted_models, limit_bytes, models_folder

    found, limit = converted_models(), limit_bytes()
    if as_json:
        print_json({"models": _rows(found), "folder": str(models_folder()), "limit_bytes": limit})
        return

    from fhopt.inspection.tables import light_table

    total = sum(c.nbytes for c in found)
    table = light_table(f"Converted models in {models_folder()}: {total / 1e9:.1f} of {limit / 1e9:g} GB")
    table.add_column("name", overflow="fold")
    table.add_column("GB", justify="right")
    for one in found:
        table.add_row(one.name, f"{one.nbytes / 1e9:.2f}")
    output_console(as_json).print(table)


@models.command("prune")
@click.option("--all", "is_all", is_flag=True, help="Remove all of them.")
@json_option
def prune_models(is_all: bool, as_json: bool) -> None:
    """Remove converted models beyond FHOPT_MODELS_GB, and what interrupted commands left more than a day ago."""
    from fhopt.models.converted_models import prune_converted

    removed = prune_converted(0 if is_all else None)
    if as_json:
        print_json({"models": _rows(removed)})
        return
    for one in removed:
        click.echo(one.name)
    click.echo(f"{len(removed)} removed, {sum(c.nbytes for c in removed) / 1e9:.1f} GB.")


def _rows(found: list[Converted]) -> list[dict[str, Any]]:
    return [{"name": c.name, "path": str(c.path), "nbytes": c.nbytes, "used": c.used} for c in found]
