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
    """List or prune the models converted from GGUF files.

    The first command that names a GGUF file converts it and stores the result, up to FHOPT_MODELS_GB gigabytes in total
    (default 20; 0 stores none). The least recently used models are removed first.
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
@click.option("--all", "is_all", is_flag=True, help="Remove all converted models.")
@json_option
def prune_models(is_all: bool, as_json: bool) -> None:
    """Remove converted models beyond FHOPT_MODELS_GB, and old leftovers."""
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
