"""The command line. Every command takes `--json`: one object on standard output and nothing else there.

A mistake of the user's ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fhopt import __version__
from fhopt.errors import FhoptError, PassError

if TYPE_CHECKING:
    from torch import Tensor

    from fhopt.gate import Gate
    from fhopt.models import LoadedModel
    from fhopt.plans import Entry
    from fhopt.spec import LatentPlan

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


def _is_first() -> bool:
    """True for the process that speaks, of those that torchrun has started; for any other process too."""
    return int(os.environ.get("RANK", "0")) == 0


def _together(command: Callable[..., None]) -> Callable[..., None]:
    """Under torchrun, what fails in one process ends all of them with its error, which the first one prints."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return command(*args, **kwargs)
        from fhopt.gathering import OtherFailed, together

        try:
            with together():
                return command(*args, **kwargs)
        except OtherFailed:
            if _is_first():
                raise
            raise SystemExit(2) from None

    return run


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
    is_seen = sys.stderr.isatty() and _is_first() and not as_json
    with Progress(*columns, console=Console(stderr=True), disable=not is_seen) as bar:
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
        console.print(f"done in {result['seconds']:.0f} s, of which the report took {result['report_seconds']:.1f}.")


def _placed(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where a model's weights go, and in what dtype."""
    spread = click.option(
        "--device-map",
        help="Where the weights go: auto, cpu, cuda, or a JSON file of modules and devices. [default: cpu]",
    )
    dtype = click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        default="float32",
        show_default=True,
        help="Of the model while it is read.",
    )
    return spread(dtype(command))


device_option = click.option(
    "--device", "devices", multiple=True, default=("h100", "cpu"), show_default=True,
    help="For break-even contexts and rooflines, as in cost; repeatable.",
)  # fmt: skip


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Show this plan beside the sites.")
@click.option("--site", help="All about one site, formulas too.")
@click.option("--graph", type=click.Path(path_type=Path), help="Write the graph: .dot, .svg, .graphml, .json; .fhopt.")
@click.option(
    "--stage", help="Graph after this pass, input, or all: a file for each. [default: normalize; with a plan: absorb]"
)
@device_option
@json_option
def inspect(
    model: str, plan_path: Path | None, site: str | None, graph: Path | None, stage: str | None,
    devices: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """List the attention sites of MODEL: one row each, what a plan does to them, and what was left alone.

    A .fhopt file holds the graphs after all passes, for Model Explorer.
    nats: what the fit expects to lose per token. pays from: cached tokens from which on a plan is faster, by roofline.
    """
    from fhopt import passes, seeing
    from fhopt.models import load_model
    from fhopt.pipeline import find_sites
    from fhopt.seeing.snapshots import Snapshots, check_graph, write_graphs
    from fhopt.spec import LatentPlan
    from fhopt.tables import inspection_tables

    if stage is not None and graph is None:
        raise FhoptError("--stage chooses the graph that --graph writes; expected both, or --graph alone.")
    if graph is not None:
        check_graph(graph)
    plan, seen = LatentPlan.load(plan_path) if plan_path else None, Snapshots(keep_networks=True)
    loaded = load_model(model)
    with seen.taking() if graph is not None else nullcontext():
        outcome = find_sites(loaded)
        found = seeing.inspect(loaded, outcome, plan, devices)
        if site is not None:
            found.site(site)
        if graph is not None and plan is not None:
            passes.optimize(outcome, plan)
    written = []
    if graph is not None:
        written = write_graphs(seen, graph, found, stage or ("absorb" if plan else "normalize"), site)
    if as_json:
        _print_json(found.as_json() | ({"graphs": [str(path) for path in written]} if written else {}))
        return
    console = _console(as_json)
    console.print(inspection_tables(found, site))
    for path in written:
        console.print(f"graph written to {path}", soft_wrap=True, highlight=False, markup=False)


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
    "--data",
    "texts",
    multiple=True,
    default=("topics",),
    show_default=True,
    help="Calibration text: file, folder, JSONL, dataset on disk, or topics, source, license, docstrings; repeatable.",
)
@click.option("--ratio", type=float, help="How many times smaller than a 16-bit cache. [default: 4]")
@click.option("--bytes-per-token", type=float, help="The size instead, all counted.")
@click.option("--max-loss", help="The smallest plan whose perplexity rises by at most this, such as 1%.")
@click.option(
    "--gate-data", "gate_texts", multiple=True, help="Text to measure --max-loss on; its second half is read."
)
@click.option("--layout", default="auto", show_default=True, help="auto, band, freq, head, identity or input.")
@click.option(
    "--device",
    help="What it will run on (as in cost): leaves out layouts, and for GPUs mixes of bits, that are slow there.",
)
@click.option("--sequences", type=int, default=12, show_default=True, help="Calibration sequences for the bases.")
@click.option("--rate-sequences", type=int, default=8, show_default=True, help="More of them, for the bits.")
@click.option("--context", type=int, default=1024, show_default=True, help="Tokens of each.")
@click.option("--tokens", type=int, default=8192, show_default=True, help="Context that the plan is made for.")
@click.option("--recent", type=int, default=128, show_default=True, help="Newest tokens that are never in latents.")
@click.option("--window-bits", type=click.Choice(["8", "16"]), default="8", show_default=True, help="Of those.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--pages", help="Share of the sealed tokens that a step reads on average, such as 1/8. [default: all]")
@click.option("--mass", help="Read less where that keeps this share of attention's weight, such as 99%, on average.")
@click.option("--explain", type=click.Path(path_type=Path), help="Draw spectrum, bits and sensitivity to this file.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the plan.")
@_placed
@json_option
@_together
def fit(
    model: str, ratio: float | None, bytes_per_token: float | None, max_loss: str | None, gate_texts: tuple[str, ...],
    window_bits: str, pages: str | None, mass: str | None, explain: Path | None, out: Path, device_map: str | None,
    dtype: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Calibrate MODEL on text and write a plan.

    An interrupted calibration goes on where it was when the same command is given again. Under torchrun the processes
    share the calibration; models larger than one device: --device-map.
    """
    import torch

    from fhopt import gate, gathering, paging
    from fhopt.evaluate import Comparison
    from fhopt.models import load_model
    from fhopt.pipeline import FitOptions, measure, plan_for
    from fhopt.placing import placement
    from fhopt.plots import explain_plan
    from fhopt.seeing.progress import ProgressFile, beside

    out = Path(os.path.abspath(out))
    if sum(given is not None for given in (ratio, bytes_per_token, max_loss)) > 1:
        raise FhoptError("--ratio, --bytes-per-token and --max-loss each choose the size; expected one of them.")
    limit = _read_gate(max_loss, gate_texts)
    checkpoint = out.with_name(f".{out.name}.calibration")
    chosen = FitOptions(
        ratio=4.0 if ratio is None else ratio, window_bits=int(window_bits), checkpoint=checkpoint, **options
    )
    chosen.check()
    paged = paging.read_options(pages, mass, chosen.texts)
    exact = chosen.sinks + chosen.recent + chosen.block
    if paged is not None:
        paged.check(chosen.block, exact)
    _check_places(out, explain)
    loaded = load_model(model, getattr(torch, dtype), placement(device_map))
    paged = None if paged is None else paging.for_model(loaded, paged, chosen.block, exact)
    held_out = gate.held_out(loaded, chosen, limit) if limit is not None else None
    with _progress(as_json) as shown, ProgressFile(beside(out)).kept(shown) as progress:
        measured = measure(loaded, chosen, progress)
        if gathering.leave() > 0:  # the first process writes
            return
        if bytes_per_token is not None:
            chosen = replace(chosen, ratio=_ratio_of(measured, bytes_per_token))
            chosen.check()
        if limit is None or held_out is None:
            plan, trials = plan_for(measured, chosen), dict[float, Comparison]()
        else:
            plan, trials = gate.smallest_plan(loaded, measured, chosen, limit, held_out, progress)
        plan = plan if paged is None else paging.calibrate(loaded, plan, paged, progress)
    plan.save(out)
    if explain is not None:
        explain_plan(measured, plan, explain)
    _show_plan(plan, out, {f"{r:.4g}": asdict(c) for r, c in sorted(trials.items())}, as_json)


def _read_gate(max_loss: str | None, texts: tuple[str, ...]) -> Gate | None:
    """What --max-loss and --gate-data ask for. Raises FhoptError."""
    from fhopt.gate import Gate, parse_share

    if max_loss is None:
        if texts:
            raise FhoptError("--gate-data is what --max-loss is measured on; expected both or neither.")
        return None
    limit = Gate(parse_share(max_loss), texts)
    limit.check()
    return limit


def _check_places(out: Path, picture: Path | None) -> None:
    """Raise FhoptError where a plan, or the picture of one, cannot be written."""
    from fhopt.files import check_folder, check_writable
    from fhopt.plots import check_picture
    from fhopt.spec import PLAN_FILES

    check_folder(out, PLAN_FILES)
    check_writable(out.parent)
    if picture is not None:
        check_picture(picture)


def _ratio_of(measured: Any, bytes_per_token: float) -> float:
    exact = 2 * sum(s.site.exact_numbers_per_token for s in measured.statistics.values())
    if not 0 < bytes_per_token <= exact:
        raise FhoptError(
            f"{bytes_per_token:g} bytes per token is not possible; expected at most {exact:,} (the exact cache)."
        )
    return float(exact / bytes_per_token)


def _show_plan(plan: LatentPlan, out: Path, trials: dict[str, Any], as_json: bool) -> None:
    from fhopt.tables import plan_table

    if as_json:
        about = {"plan_path": str(out), "sites": len(plan.sites), "ratio": plan.ratio(), "digest": plan.digest()}
        _print_json(about | {"predicted_nats": plan.provenance["predicted_nats"], "trials": trials})
        return
    console = _console(as_json)
    console.print(plan_table(plan))
    for ratio, found in trials.items():
        low, high = found["increase_percent_ci"]
        console.print(f"{ratio}x: perplexity {found['increase_percent']:+.2f} % ({low:+.2f} to {high:+.2f})")
    console.print(
        f"{plan.ratio():.2f}x plan for {len(plan.sites)} sites written to {out}", soft_wrap=True, highlight=False
    )


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="The plan to start from.")
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics",),
    show_default=True,
    help="Text to read, as in fit; repeatable. Its second half is measured on.",
)
@click.option("--tokens", type=int, default=50_000, show_default=True, help="To read, each once.")
@click.option("--context", type=int, default=1024, show_default=True, help="Tokens of a sequence.")
@click.option("--ridge", type=float, help="How strongly decoders are drawn to those of the plan.")
@click.option("--held-out", type=int, default=2, show_default=True, help="Sequences to measure on.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="File that an interrupted healing goes on from. [default: beside the plan that is written]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="float32",
    show_default=True,
    help="Of the model; the plan stays as it is.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the healed plan.")
@json_option
def heal(
    model: str, plan_path: Path, ridge: float | None, checkpoint: Path | None, dtype: str, out: Path,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Solve for the decoders with which MODEL reads text as it does without a plan, and write a plan of the same size.

    An interrupted healing goes on where it was when the same command is given again. MODEL must be a causal language
    model with a tokenizer.
    """
    import torch

    from fhopt.files import check_folder, check_writable
    from fhopt.healing import HealOptions
    from fhopt.healing import heal as improve
    from fhopt.models import load_model
    from fhopt.spec import PLAN_FILES, LatentPlan

    out = Path(os.path.abspath(out))
    chosen = HealOptions(checkpoint=checkpoint or out.with_name(f".{out.name}.healing"), **options)
    chosen = chosen if ridge is None else replace(chosen, ridge=ridge)
    chosen.check()
    plan = LatentPlan.load(plan_path)
    chosen.check_plan(plan)
    check_folder(out, PLAN_FILES)
    loaded = load_model(model, getattr(torch, dtype))
    loaded.language_model()
    check_writable(out.parent)
    with _progress(as_json) as progress:
        healed = improve(loaded, plan, chosen, progress)
    healed.save(out)
    _show_healed(healed, out, as_json)


def _show_healed(plan: LatentPlan, out: Path, as_json: bool) -> None:
    told = plan.provenance["healing"]
    if as_json:
        about = {"plan_path": str(out), "sites": len(plan.sites), "ratio": plan.ratio(), "digest": plan.digest()}
        _print_json(about | {"healing": told})
        return
    before, after = told["before"], told["after"]
    console = _console(as_json)
    console.print(
        f"{told['tokens']:,} tokens read, measured on {after['tokens']:,} others:\n"
        f"KL from the exact model {before['kl']:.4g} -> {after['kl']:.4g} nats per token\n"
        f"increase of perplexity  {before['increase_percent']:+.2f} -> {after['increase_percent']:+.2f} %",
        highlight=False,
    )
    console.print(f"{plan.ratio():.2f}x plan written to {out}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("model")
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics",),
    show_default=True,
    help="Text to read, as in fit; repeatable. Its second half is measured on.",
)
@click.option("--sequences", type=int, default=8, show_default=True, help="To see hidden states in.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens of each.")
@click.option("--clusters", type=int, help="Of rows. [default: one for 64 rows]")
@click.option("--bits", default="auto", show_default=True, help="4, 8, or auto: the mix that reads least.")
@click.option("--held-out", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens to measure on.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="float32",
    show_default=True,
    help="Of the model; the head serves the model in this one.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the head.")
@json_option
def head(model: str, held_out: int, dtype: str, out: Path, as_json: bool, **options: Any) -> None:
    """Code the language-model head of MODEL, so that finding the largest logits reads few of its bytes.

    The largest logits are certain, whatever the hidden state is. In Python: fhopt.head.apply(model, Head.load(FOLDER)).
    """
    import torch

    from fhopt.files import check_folder, check_writable
    from fhopt.head import FILES, fit
    from fhopt.head_fitting import HeadOptions
    from fhopt.head_measuring import measure
    from fhopt.models import load_model

    out = Path(os.path.abspath(out))
    chosen = HeadOptions(**options)
    chosen.check()
    check_folder(out, FILES)
    check_writable(out.parent)
    loaded = load_model(model, getattr(torch, dtype))
    with _progress(as_json) as progress:
        made = fit(loaded, chosen, progress)
        found = measure(loaded, made, chosen.texts, held_out, min(chosen.context, held_out))
    made.save(out)
    if as_json:
        about = {"head_path": str(out), "site": asdict(made.site), "fitted": made.about, "clusters": made.clusters}
        _print_json(about | {"probes": made.probes, "measured": asdict(found)})
        return
    console = _console(as_json)
    console.print(
        f"{made.site.weight}: {made.site.vocabulary:,} x {made.site.width:,}, {dtype}\n"
        f"{found.certified_percent:.2f} % of {found.positions:,} held-out tokens decided with certainty, "
        f"{found.agreement_percent:.2f} % as the dense head\n"
        f"bytes read for a token {found.dense_bytes_per_row:,} -> {found.bytes_per_row:,.0f}, "
        f"time {found.dense_time_ms:.2f} -> {found.time_ms:.2f} ms on {found.threads} threads\n"
        f"without certainty, {made.probes} of {made.clusters} clusters: {found.probed_agreement_percent:.2f} %",
        highlight=False,
    )
    console.print(f"head written to {out}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="What to cache.")
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text to measure the loss on, for the model card, as in eval; repeatable.",
)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure the loss, which takes a while.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="To measure on, per text.")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of each.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights. [default: as they are; float32 where MODEL is no Hugging Face folder]",
)
@click.option("--shard-size", default="5GB", show_default=True, help="Of files of weights that are not copied.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["folder", "pt2"]),
    default="folder",
    show_default=True,
    help="A model folder, or programs with latents as state that run without fhopt: a decode step, or any module.",
)
@click.option("--aot/--no-aot", default=True, show_default=True, help="pt2: also compile them, which takes minutes.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@json_option
def rewrite(
    model: str, plan_path: Path, texts: tuple[str, ...], measure: bool, sequences: int, context: int,
    dtype: str | None, shard_size: str, kind: str, aot: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL and its plan as one folder, to be opened by fhopt.load, by transformers, and as the exact original.

    Weights stay as they are: those of a Hugging Face folder are copied. MODEL must generate text, but for --format pt2.
    """
    import torch

    from fhopt import exporting, exporting_modules, rewriting
    from fhopt.models import folder_of, load_model
    from fhopt.spec import LatentPlan

    out, source = Path(os.path.abspath(out)), folder_of(model)
    plan = LatentPlan.load(plan_path)
    own = rewriting.stored_dtype(source) if source else None
    if kind == "pt2":
        exporting.check_out(out, exporting.DESCRIPTION, exporting_modules.DESCRIPTION)
    loaded = load_model(model, getattr(torch, dtype) if dtype else own or torch.float32)
    if kind == "pt2":
        is_decoder = loaded.tokenizer is not None and hasattr(loaded.module, "generate")
        write = exporting.write_programs if is_decoder else exporting_modules.write_module
        write(loaded, plan, out, compiled=aot)
        _print_json({"path": str(out)}) if as_json else click.echo(f"programs written to {out}")
        return
    rewriting.check(loaded, plan, out, source)
    with _progress(as_json) as progress:
        losses = rewriting.losses(loaded, plan, texts if measure else (), sequences, context, progress)
    written = rewriting.rewrite(loaded, plan, out, source, shard_size, losses)
    if as_json:
        _print_json(asdict(written) | {"path": str(out), "digest": plan.digest(), "ratio": plan.ratio()})
        return
    console = _console(as_json)
    for text, found in losses.items():
        console.print(f"{text}: perplexity {found.exact:.4f} -> {found.plan:.4f} ({found.increase_percent:+.2f} %)")
    console.print(
        f"{written.total_bytes:,} bytes written to {out}: {written.weight_bytes:,} of weights, {written.plan_bytes:,} "
        "of the plan.",
        soft_wrap=True,
        highlight=False,
    )


@main.command("eval")
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Without one, the exact model alone.")
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text for perplexity, as in fit; repeatable.",
)
@click.option(
    "--tasks",
    default="perplexity",
    show_default=True,
    help="Some of perplexity, passkey, copy, digits, arithmetic, all, with commas between.",
)
@click.option(
    "--items", type=click.IntRange(min=1), default=5, show_default=True, help="Per task, length and depth of a needle."
)
@click.option("--lengths", default="512,1024,2048", show_default=True, help="Tokens of the tasks' contexts.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="For perplexity.")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of each.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the tasks.")
@_placed
@json_option
@_together
def evaluate(
    model: str, plan_path: Path | None, texts: tuple[str, ...], tasks: str, items: int, lengths: str, sequences: int,
    context: int, seed: int, device_map: str | None, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Perplexity and tasks of MODEL with its exact cache and with the plan's, with 95 % intervals.

    Perplexity is taken on the test half of each text. The tasks ask for what compressed attention loses first: strings
    and numbers that stand far back. MODEL must be a causal language model with a tokenizer. Under torchrun the
    processes share the sequences and items; models larger than one device: --device-map.
    """
    import torch

    from fhopt import gathering
    from fhopt.evaluate import check_length
    from fhopt.models import load_model
    from fhopt.placing import placement
    from fhopt.spec import LatentPlan
    from fhopt.tables import evaluation_tables
    from fhopt.tasks import TaskOptions, check_items, choose, read_lengths, run_tasks, write_items

    chosen, cells = choose(tasks), read_lengths(lengths)
    plan = LatentPlan.load(plan_path) if plan_path else None
    kept = {"sinks": plan.sinks, "window": plan.window} if plan else {}
    loaded = load_model(model, getattr(torch, dtype), placement(device_map))
    network = loaded.language_model()
    asked = [name for name in chosen if name != "perplexity"]
    written = write_items(loaded.tokenizer, asked, TaskOptions(cells, items, seed, **kept)) if asked else {}
    ids = _test_ids(loaded, texts, sequences, context) if "perplexity" in chosen else {}
    check_items(network, written)
    if ids:
        check_length(network, context - 1)
    with _progress(as_json) as progress:
        perplexity = _perplexities(network, ids, plan, progress)
        results = run_tasks(network, written, plan, progress, shared=True) if asked else {}
    if gathering.leave() > 0:  # the first process tells what all have found
        return
    result = {
        "model": loaded.name,
        "ratio": plan.ratio() if plan else None,
        "perplexity": perplexity,
        "tasks": {
            task: asdict(found.pop(None))
            | {"cells": [{"length": cell[0], "depth": cell[1], **asdict(r)} for cell, r in found.items() if cell]}
            for task, found in results.items()
        },
    }
    if as_json:
        _print_json(result)
        return
    _console(as_json).print(evaluation_tables(result))


def _test_ids(loaded: LoadedModel, texts: tuple[str, ...], sequences: int, context: int) -> dict[str, Tensor]:
    """Token ids [sequences, context] of the test half of each text."""
    from fhopt import data

    return {
        text: data.sequences(
            loaded.tokenizer,
            data.halves(data.read_text(text))[1],
            count=sequences,
            length=context,
            what=f"the second half of {text!r}",
        )
        for text in texts
    }


def _perplexities(
    network: Any, ids: dict[str, Tensor], plan: LatentPlan | None, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, Any]]:
    """Of each text: the exact model against the plan, or the exact model alone."""
    from fhopt.evaluate import score, token_costs

    found: dict[str, dict[str, Any]] = {}
    total, done = sum(len(rows) for rows in ids.values()), 0

    def count(sequences: int) -> None:
        nonlocal done
        done = min(total, done + sequences)
        progress("perplexity", done, total)

    for text, rows in ids.items():
        if plan:
            found[text] = asdict(token_costs(network, rows, plan, count, shared=True).compare())
        else:
            exact = score(network, rows, None, count, shared=True)
            found[text] = {"exact": exact.perplexity, "tokens": exact.tokens}
    return found


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path))
@device_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The HTML file to write.")
@json_option
def report(model: str, plan_path: Path | None, devices: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Write what was found in MODEL, and its plan, as one HTML file that opens without a network.

    Each site is drawn before and after; spectra, bits, sensitivity, loss against bytes, rooflines, the generated
    kernels, what each pass changed, and what was left alone. Every number in it is in --json.
    """
    from fhopt.files import check_writable
    from fhopt.models import load_model
    from fhopt.seeing import report as pages
    from fhopt.spec import LatentPlan

    pages.check_installed()
    plan = LatentPlan.load(plan_path) if plan_path else None
    check_writable(Path(os.path.abspath(out)).parent)
    made = pages.build(load_model(model), plan, devices=devices)
    pages.write(made, out)
    if as_json:
        _print_json({"report_path": str(out)} | made.as_json())
    else:
        click.echo(f"report written to {out}")


@main.command()
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="A plan, also one that is being fitted.")
@device_option
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[default: any that is free]")
@click.option("--open/--no-open", "opens", default=True, show_default=True, help="Open a browser.")
def view(model: str, plan_path: Path | None, devices: tuple[str, ...], port: int, opens: bool) -> None:
    """Show the report of MODEL in a browser, on this machine alone, and how far a running `fhopt fit` of PLAN is.

    When the plan is there, or another than before, the report is made anew.
    """
    import webbrowser

    from fhopt.models import load_model
    from fhopt.seeing import report as pages
    from fhopt.seeing import server
    from fhopt.spec import LatentPlan

    def make(has_plan: bool) -> str:
        plan = LatentPlan.load(plan_path) if plan_path is not None and has_plan else None
        return pages.page(pages.build(load_model(model), plan, devices=devices))

    pages.check_installed()
    server.check_installed()
    listening = server.listen(port)
    address = f"http://{server.HOST}:{listening.getsockname()[1]}/"
    click.echo(f"{address} shows {model}; end with Ctrl-C")
    if opens:
        webbrowser.open(address)
    server.serve(server.Viewer(make, Path(os.path.abspath(plan_path)) if plan_path else None), listening)


@main.command()
@click.argument("model")
@click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="Without one, ratios 2, 4 and 8 are assumed."
)
@click.option(
    "--device",
    "names",
    multiple=True,
    default=("h100", "cpu"),
    show_default=True,
    help="Also h200, a100-80, a10, l4, 4090, b200, mi300x, edge, cpu:THREADS, here; repeatable.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8192,),
    show_default=True,
    help="Cached tokens; repeatable.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of weights and exact keys and values.",
)
@json_option
def cost(
    model: str, plan_path: Path | None, names: tuple[str, ...], tokens: tuple[int, ...], batch: int, dtype: str,
    as_json: bool,
) -> None:  # fmt: skip
    """What a decode step of MODEL costs on devices by their peak figures, and from which context on latents pay."""
    from fhopt.cost import ITEMSIZES, RATIOS, compare, hypothetical_cost, model_cost, pretty
    from fhopt.fitting import check_model
    from fhopt.machine import find_device
    from fhopt.models import load_model
    from fhopt.pipeline import find_sites
    from fhopt.spec import LatentPlan
    from fhopt.tables import cost_tables

    devices = [find_device(name) for name in names]
    plan = LatentPlan.load(plan_path) if plan_path else None
    loaded = load_model(model)
    sites = list(find_sites(loaded).sites.values())
    weights = _weights(loaded)
    parameters, itemsize = sum({w.data_ptr(): w.numel() for w in weights.values()}.values()), ITEMSIZES[dtype]
    costs = {"exact": model_cost(sites, parameters=parameters, itemsize=itemsize)}
    if plan:
        check_model(plan, weights, loaded.name)
        costs["plan"] = model_cost(sites, plan, parameters=parameters, itemsize=itemsize)
    else:
        for ratio in RATIOS:
            costs[f"{ratio}x"] = hypothetical_cost(sites, ratio, parameters=parameters, itemsize=itemsize)
    comparison = compare(costs, devices, tokens, batch)
    if as_json:
        formulas = {n: {"bytes": pretty(c.bytes), "operations": pretty(c.operations)} for n, c in costs.items()}
        about = {"model": loaded.name, "parameters": parameters, "batch": batch, "dtype": dtype}
        _print_json(about | {"hypothetical": plan is None, "formulas": formulas} | asdict(comparison))
        return
    console = _console(as_json)
    title = f"One decode step of attention in {loaded.name}: batch {batch}, {dtype}, peak figures of the devices"
    console.print(cost_tables(costs, comparison, title))
    if plan is None:
        console.print(
            "2x, 4x and 8x are hypothetical: bytes divided, heads and widths as they are. For a real plan: "
            "fhopt fit MODEL -o PLAN, then --plan PLAN.",
            highlight=False,
        )


@main.command()
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="Default: 1, and all cores; repeatable.")
@click.option("--again", is_flag=True, help="Measure anew.")
@json_option
def device(threads: tuple[int, ...], again: bool, as_json: bool) -> None:
    """What this machine's CPU can do: `--device here` in other commands. Measured once, in some seconds."""
    from fhopt import machine
    from fhopt.codegen.compiler import vector_unit
    from fhopt.system import cores
    from fhopt.tables import machine_table

    counts = threads or tuple(dict.fromkeys((1, cores())))
    if max(counts) > cores():
        raise FhoptError(f"{max(counts)} threads were asked for; expected at most {cores()}, the cores here.")
    found = [machine.measure(n) if again else machine.measured(n) for n in counts]
    kernels = vector_unit()
    if as_json:
        _print_json({"kernels": kernels, "measured": [asdict(one) for one in found]})
        return
    console = _console(as_json)
    console.print(machine_table(found))
    console.print(f"Kernels: {kernels}.", highlight=False)


@main.command()
@click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--device", required=True, help="What it will run on, as in cost; for a CPU, C++.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--queries", type=click.IntRange(min=1), default=1, show_default=True, help="New tokens of each.")
@click.option("--tokens", type=click.IntRange(min=1), default=32_768, show_default=True, help="Cached tokens.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of queries and of uncoded latents.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Configurations to compile where a kernel's default does not fit, some seconds each; 0: all, of all kernels.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@json_option
def kernels(plan_path: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write the generated kernels of PLAN, and a table of what they read and what they need of a device.

    Kernels for GPUs are compiled to see what they need; there need not be a GPU.
    """
    from fhopt.kernels import Options, rejected_table, table, write_kernels
    from fhopt.spec import LatentPlan

    plan = LatentPlan.load(plan_path)
    with _progress(as_json) as progress:
        made = write_kernels(plan, Path(os.path.abspath(out)), Options(**options), progress)
    if as_json:
        _print_json({"folder": str(out)} | made.as_json())
        return
    console = _console(as_json)
    console.print(table(made))
    if any(row.rejected for row in made.rows):
        console.print(rejected_table(made))
    console.print(f"{len(made.files)} files and kernels.md written to {out}", soft_wrap=True, highlight=False)


@main.group(invoke_without_command=True)
@click.pass_context
@json_option
def plans(context: click.Context, as_json: bool) -> None:
    """Plans that are kept on this machine: list them, or fit, add, find, verify and prune them.

    In other commands: --plan "$(fhopt plans path NAME)".
    """
    if context.invoked_subcommand is None:
        from fhopt.plans import entries

        _show_plans(entries(), as_json)


def _show_plans(found: list[Entry], as_json: bool) -> None:
    from fhopt.plans import table

    if as_json:
        _print_json({"plans": [asdict(e) | {"path": str(e.path)} for e in found]})
    else:
        _console(as_json).print(table(found))


@plans.command("fit")
@click.argument("model")
@click.option("--ratio", "ratios", type=float, multiple=True, default=(4.0, 8.0), show_default=True, help="Repeatable.")
@click.option("--data", "texts", multiple=True, default=("topics",), show_default=True, help="As in fit; repeatable.")
@click.option("--device", help="What it will run on, as in fit.")
@click.option("--sequences", type=int, default=12, show_default=True, help="Calibration sequences for the bases.")
@click.option("--rate-sequences", type=int, default=8, show_default=True, help="More of them, for the bits.")
@click.option("--context", type=int, default=1024, show_default=True, help="Tokens of each.")
@click.option("--tokens", type=int, default=8192, show_default=True, help="Context that the plans are made for.")
@json_option
def fit_plans(model: str, ratios: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Fit plans of several ratios for MODEL from one calibration, and keep them.

    What was fitted before is not fitted again, and a calibration that was interrupted goes on.
    """
    from fhopt.models import load_model
    from fhopt.pipeline import FitOptions
    from fhopt.plans import fit_ratios

    chosen = FitOptions(**options)
    with _progress(as_json) as progress:
        found = fit_ratios(load_model(model), chosen, ratios, progress)
    _show_plans(found, as_json)


@plans.command("add")
@click.argument("paths", metavar="PLAN...", type=click.Path(path_type=Path), nargs=-1, required=True)
@json_option
def add_plans(paths: tuple[Path, ...], as_json: bool) -> None:
    """Keep copies of plans that `fhopt fit` wrote."""
    from fhopt.plans import add
    from fhopt.spec import LatentPlan

    _show_plans([add(LatentPlan.load(path)) for path in paths], as_json)


@plans.command("path")
@click.argument("name")
@json_option
def plan_path(name: str, as_json: bool) -> None:
    """The folder of the plan whose name or digest begins with NAME."""
    from fhopt.plans import find

    found = find(name)
    if as_json:
        _print_json(asdict(found) | {"path": str(found.path)})
    else:
        click.echo(found.path)


@plans.command("verify")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--model", help="Also say which plans were fitted to another model.")
@json_option
def verify_plans(names: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Read all bytes of plans and say which cannot be used; exit code 1 where there are such."""
    from fhopt.models import load_model
    from fhopt.plans import entries, find, verify

    loaded = load_model(model) if model else None
    checked = [verify(e, loaded) for e in ([find(n) for n in names] if names else entries())]
    _show_plans(checked, as_json)
    if any(e.fault for e in checked):
        raise SystemExit(1)


@plans.command("prune")
@click.option("--keep", type=click.IntRange(min=0), help="Keep only the newest so many plans of each model.")
@click.option("--dry-run", is_flag=True, help="Remove nothing, only tell.")
@json_option
def prune_plans(keep: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove damaged plans and what interrupted commands left behind more than a day ago."""
    from fhopt.plans import prune

    done = prune(keep, dry_run)
    if as_json:
        _print_json(asdict(done) | {"dry_run": dry_run})
        return
    for name in done.names:
        click.echo(name)
    told = "would be removed" if dry_run else "removed"
    click.echo(f"{len(done.names)} {told}, {done.nbytes / 1e6:.1f} MB.")


@main.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--target",
    required=True,
    help="mlir; a device of IREE: iree-cpu, iree-vulkan, iree-cuda, iree-rocm, iree-metal; or vllm, sglang.",
)
@click.option("--arch", default="", help="As IREE names it: aarch64:cortex-a76, sm_90, gfx942... [default: usual ones]")
@click.option("--dialect", type=click.Choice(["linalg", "torch"]), default="linalg", show_default=True)
@click.option("--bytecode", is_flag=True, help="MLIR as bytecode, not text.")
@click.option(
    "--kv-lora-rank",
    "rank",
    type=click.IntRange(min=1),
    help="vllm, sglang: cut the plan to a latent of so many numbers and one rotated key. [default: as it is]",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for it. [default: FOLDER-TARGET]")
@json_option
def export_step(
    folder: Path, target: str, arch: str, dialect: str, bytecode: bool, rank: int | None, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """A decode step of the rewritten model in FOLDER as MLIR or as a module of IREE, weights beside it.

    The latents are state that the caller keeps. Needs the extra mlir.

    For vllm and sglang: a checkpoint of DeepSeek's kind with the plan in its projections; or, of a plan that changes
    nothing but bits, what to serve the original with.
    """
    from fhopt.exporting_deepseek import ENGINES
    from fhopt.exporting_mlir import Target, export
    from fhopt.models import load_model
    from fhopt.rewritten import read_folder

    out = Path(os.path.abspath(out or folder.with_name(f"{folder.name}-{target}")))
    if target in ENGINES:
        if arch or bytecode or dialect != "linalg":
            raise FhoptError("--arch, --dialect and --bytecode are of MLIR; expected none of them with this target.")
        _export_checkpoint(folder, target, rank, out, as_json)
        return
    if rank is not None:
        raise FhoptError(f"--kv-lora-rank is of {' and '.join(ENGINES)}; expected it with one of these targets.")
    chosen = Target(target, arch, dialect, bytecode)
    chosen.check()
    plan = read_folder(folder).plan
    export(load_model(str(folder)), plan, chosen, out)
    files = {p.name: p.stat().st_size for p in sorted(out.iterdir()) if p.is_file()}
    if as_json:
        _print_json({"path": str(out), "files": files})
        return
    for name, size in files.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"written to {out}")


def _export_checkpoint(folder: Path, target: str, rank: int | None, out: Path, as_json: bool) -> None:
    """For a serving engine: a checkpoint, or what to serve the original with."""
    from fhopt import mla, rewriting
    from fhopt.exporting_deepseek import ENGINES, export
    from fhopt.models import load_model
    from fhopt.rewritten import read_folder

    plan, engine, made = read_folder(folder).plan, ENGINES[target], None
    plan = plan if rank is None else mla.cut(plan, rank)
    if not mla.is_coded_at_full_width(plan):
        made = export(load_model(str(folder)), plan, out, engine, folder, rewriting.stored_dtype(folder))
    dtype = engine.cache_dtypes["auto" if made else mla.cache_dtype(plan)]
    command = engine.serve.format(path=out if made else "ORIGINAL", dtype=dtype)
    if as_json:
        written = asdict(made) | {"path": str(out)} if made else None
        _print_json({"checkpoint": written, "kv_cache_dtype": dtype, "command": command})
        return
    if made:
        click.echo(
            f"{made.token_bytes:,} bytes a token in 16 bits (exact {made.exact_token_bytes:,}); logits are the plan's "
            f"to {made.error:.1e} of the largest\nwritten to {out}"
        )
    else:
        click.echo("Nothing is written: the plan changes bits alone, and engines do that to the original.")
    click.echo(command)


@main.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def verify_step(folder: Path, as_json: bool) -> None:
    """Prove from its code that the step in FOLDER never makes keys or values of its latents, and what a token takes.

    FOLDER was written by `fhopt export`, or by `fhopt rewrite`: then its step is lowered here. Exit code 1 where
    something does not hold. Needs the extra mlir.
    """
    from fhopt.verifying import verify_folder

    found = verify_folder(folder)
    if as_json:
        _print_json(asdict(found))
    else:
        click.echo(
            f"multiplications: {found.macs}, T sealed tokens\n"
            f"a token takes {found.bytes_per_token:,} bytes (exact {found.exact_bytes_per_token:,}), "
            f"{found.macs_per_token:,} multiplications\n"
            f"largest float tensor: {found.largest_per_token:,} numbers per token"
        )
        for fault in found.faults:
            click.echo(f"FAULT: {fault}")
        click.echo(f"{len(found.faults)} faults." if found.faults else "No key or value is ever rebuilt.")
    if found.faults:
        raise SystemExit(1)


def _weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """Parameters of the module, or of the exported program, by name."""
    owner = loaded.module if loaded.module is not None else loaded.program
    assert owner is not None
    return dict(owner.named_parameters())


if __name__ == "__main__":
    main()
