"""Commands of inspection: `fhopt inspect`, `fhopt explain`, `fhopt report`, `fhopt view`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import COMING_PLAN, MODEL, PLAN
from fhopt.cli.options import device_option, json_option, output_console, print_json, progress_bar
from fhopt.errors import FhoptError
from fhopt.files import EXPLORER_GRAPH, GRAPHS, check_graph, check_writable


@main.command()
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_path", type=PLAN, help="Plan to show for each site.")
@click.option("--site", help="Show all facts of one site, with formulas.")
@click.option(
    "--graph", type=click.Path(path_type=Path), help="Graph file to write: .dot, .svg, .graphml, .json or .fhopt."
)
@click.option(
    "--stage", help="Pass after which --graph is written, or input, or all. [default: normalize; with a plan: absorb]"
)
@device_option
@json_option
def inspect_command(
    model: str, plan_path: Path | None, site: str | None, graph: Path | None, stage: str | None,
    devices: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """List MODEL's attention sites, the bits of a plan, and attention that is not rewritten.

    A .fhopt file stores the graph after each pass, for Model Explorer.

    Columns: keys and values: channels of a latent head x mean bits; nats: expected KL per token; faster from, DEVICE:
    break-even context length (roofline).
    """
    if stage is not None and graph is None:
        raise FhoptError("--stage requires --graph; expected both. Add --graph FILE, or drop --stage.")
    if graph is not None:
        check_graph(graph, (*GRAPHS, EXPLORER_GRAPH))

    from fhopt.inspection import facts
    from fhopt.inspection.graph_files import write_graphs
    from fhopt.inspection.snapshots import Snapshots
    from fhopt.inspection.tables import inspection_tables
    from fhopt.models.loader import load_model
    from fhopt.models.sites import find_sites
    from fhopt.passes import pipeline
    from fhopt.plan.latent_plan import LatentPlan

    plan, seen = LatentPlan.load(plan_path) if plan_path else None, Snapshots(keep_networks=True)
    with progress_bar(as_json) as progress, seen.taking() if graph is not None else nullcontext():
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("finding attention", 0, 1)
        outcome = find_sites(loaded)
        result = facts.site_facts(loaded, outcome, plan, devices)
        if site is not None:
            site = result.site(site).site.name
        if graph is not None and plan is not None:
            pipeline.optimize(outcome, plan)
    written = []
    if graph is not None:
        written = write_graphs(seen, graph, result, stage or ("absorb" if plan else "normalize"), site)
    if as_json:
        print_json(result.as_json() | ({"graphs": [str(path) for path in written]} if written else {}))
        return
    console = output_console(as_json)
    console.print(inspection_tables(result, site))
    for path in written:
        console.print(f"graph written to {path}", soft_wrap=True, highlight=False, markup=False)


@main.command()
@click.argument("model", type=MODEL)
@json_option
def explain(model: str, as_json: bool) -> None:
    """Explain how attention in MODEL was recognized, and why other attention is not rewritten.

    Each kind of attention is shown with its certificate: the nodes that are replaced, the rule by which each keeps the
    result for all values, and the check by execution.
    """
    from fhopt.inspection.tables import missed_table, proofs_text
    from fhopt.models.loader import load_model
    from fhopt.models.sites import explain_sites

    with progress_bar(as_json) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("finding attention", 0, 1)
        outcome = explain_sites(loaded)
    if as_json:
        proofs = {name: asdict(proof) for name, proof in outcome.proofs.items()}
        missed = [asdict(m) for m in outcome.missed]
        print_json({"sites_found": len(outcome.sites), "missed": missed, "certificates": proofs})
        return
    console = output_console(as_json)
    console.print(proofs_text(outcome.proofs), soft_wrap=True, highlight=False, markup=False)
    if outcome.missed:
        console.print(missed_table(outcome.missed))
    console.print(f"{len(outcome.sites)} sites found, {len(outcome.missed)} candidates not rewritten.")


@main.command()
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_path", type=PLAN, help="Plan to show for each site.")
@device_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
@json_option
def report_command(model: str, plan_path: Path | None, devices: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Write a report of MODEL and its plan as one HTML file that opens offline.

    It shows each site before and after, spectra, bits, sensitivity, loss versus bytes, rooflines, the generated
    kernels, the changes of each pass, and attention that is not rewritten. --json prints all its data.
    """
    check_writable(Path(os.path.abspath(out)).parent)

    from fhopt.inspection import html_report as pages
    from fhopt.models.loader import load_model
    from fhopt.plan.latent_plan import LatentPlan

    pages.check_report_packages()
    plan = LatentPlan.load(plan_path) if plan_path else None
    with progress_bar(as_json, {"loading": 1.0, "report": 2.0}) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("report", 0, 1)
        made = pages.build_report(loaded, plan, devices=devices)
        pages.write(made, out)
    if as_json:
        print_json({"report_path": str(out)} | made.as_json())
    else:
        click.echo(f"report written to {out}")


@main.command()
@click.argument("model", type=MODEL)
@click.option(
    "--plan", "plan_path", type=COMING_PLAN, help="Plan to show; a running `fhopt fit` may still be writing it."
)
@device_option
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[default: any free port]")
@click.option("--open/--no-open", "opens", default=True, show_default=True, help="Open a browser window.")
def view(model: str, plan_path: Path | None, devices: tuple[str, ...], port: int, opens: bool) -> None:
    """Show MODEL's report in a browser, and the progress of a running `fhopt fit`.

    The report is rebuilt when the plan changes.
    """
    import webbrowser

    from fhopt.inspection import html_report as pages
    from fhopt.inspection import server
    from fhopt.models.loader import load_model
    from fhopt.plan.latent_plan import LatentPlan

    def make(has_plan: bool) -> str:
        plan = LatentPlan.load(plan_path) if plan_path is not None and has_plan else None
        return pages.page(pages.build_report(load_model(model), plan, devices=devices))

    pages.check_report_packages()
    server.check_server_packages()
    listening = server.listen(port)
    address = f"http://{server.HOST}:{listening.getsockname()[1]}/"
    click.echo(f"{address} shows {model}; stop with Ctrl-C")
    if opens:
        webbrowser.open(address)
    server.serve_report(server.Viewer(make, Path(os.path.abspath(plan_path)) if plan_path else None), listening)
