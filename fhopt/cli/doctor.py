"""Command `fhopt doctor`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import MODEL
from fhopt.cli.options import DTYPES, json_option, output_console, print_json, progress_bar

if TYPE_CHECKING:
    from fhopt.hardware.this_machine import Machine
    from fhopt.inspection.prospects import Placement, Prospects


@main.command()
@click.argument("model", type=MODEL, required=False)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights and of the full-precision KV cache.",
)
@json_option
def doctor(model: str | None, dtype: str, as_json: bool) -> None:
    """Check CPU features, memory bandwidth, compiler and GPUs, and suggest a fix for anything slow or missing.

    With MODEL, also estimates what a plan gains here: bytes, contexts that fit in memory, speed. The exit code is
    always 0.
    """
    from fhopt.hardware.this_machine import examine, findings
    from fhopt.inspection.doctor_tables import machine_report, prospects_report

    machine = examine()
    found = findings(machine)
    console = output_console(as_json)
    console.print(machine_report(machine, found))
    made = None if model is None else _prospects(model, machine, dtype, as_json)
    if as_json:
        about = {"machine": asdict(machine), "findings": [asdict(one) for one in found]}
        print_json(about | {"model": asdict(made) if made is not None else None})
    elif made is not None:
        console.print("", prospects_report(made))


def _prospects(model: str, machine: Machine, dtype: str, as_json: bool) -> Prospects:
    from fhopt.hardware.cost_model import ITEMSIZES
    from fhopt.inspection.prospects import prospects
    from fhopt.models.loader import load_model
    from fhopt.models.sites import find_sites

    with progress_bar(as_json, transient=True) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("finding attention", 0, 1)
        return prospects(loaded, find_sites(loaded), _places(machine), ITEMSIZES[dtype])


def _places(machine: Machine) -> list[Placement]:
    """Return this CPU, with the rates that `fhopt device` stores, and the GPUs that the cost model knows."""
    from fhopt.hardware.devices import find_device
    from fhopt.inspection.prospects import Placement

    cpu = replace(find_device("here"), name="CPU")
    places = [Placement(cpu, round(1e9 * machine.free_gb))]
    return places + [Placement(find_device(g.device), round(1e9 * g.free_gb)) for g in machine.gpus if g.device]
