"""Commands that create plans: `fhopt calibrate`, `fhopt fit`."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import DEVICE, MODEL, STATISTICS, TEXT
from fhopt.cli.options import (
    busy,
    calibration_dtype,
    calibration_options,
    calibration_placement_options,
    fails_together,
    json_option,
    output_console,
    print_json,
    progress_bar,
    resumable,
)
from fhopt.errors import FhoptError
from fhopt.fitting.codes import AUTO, CHOICES
from fhopt.planning.request import CALIBRATING

NOT_EXPORTED = (  # printed before a calibration, which takes minutes
    "The plan will be for generate() and serving. Exported programs and torch.compile graphs need --mean-tokens 0."
)

if TYPE_CHECKING:
    from fhopt.evaluation.statistics import Comparison
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.planning.pipeline import FittedPlan
    from fhopt.planning.request import PlanRequest


@main.command()
@click.argument("model", type=MODEL)
@calibration_options
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    default=("input", "band", "identity", "head"),
    show_default=True,
    help="Layout that plans may use; repeatable: band, freq, head, identity, input.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Statistics file to write.")
@calibration_placement_options
@json_option
@fails_together
def calibrate_command(
    model: str, layouts: tuple[str, ...], out: Path, device_map: str | None, dtype: str, as_json: bool, **options: Any
) -> None:
    """Calibrate MODEL on text and write statistics, from which plans of any ratio are fitted in seconds.

    Fit plans with: fhopt fit --statistics FILE --ratio 8 -o PLAN. The same command resumes an interrupted calibration.
    Under torchrun the processes share it. For models larger than one device: --device-map.
    """
    from fhopt.calibration.options import FitOptions
    from fhopt.calibration.statistics_header import check_file
    from fhopt.fitting.choices import check_layouts

    out, began = Path(os.path.abspath(out)), time.monotonic()
    chosen = FitOptions(checkpoint=out.with_name(f".{out.name}.calibration"), **options)
    chosen.check()
    check_layouts(layouts)
    check_file(out)

    from fhopt.parallel.device_map import placement

    where, dtype = placement(device_map), calibration_dtype(model, dtype, device_map)

    import torch

    from fhopt.calibration.statistics_file import save_statistics
    from fhopt.inspection.progress_file import ProgressFile, beside
    from fhopt.models.loader import load_model
    from fhopt.parallel import collectives
    from fhopt.planning.pipeline import calibrate_source, text_source
    from fhopt.system import peak_megabytes

    with busy("loading", as_json):
        loaded = load_model(model, getattr(torch, dtype), where)
    with (
        resumable(out.with_name(f".{out.name}.calibration")),
        progress_bar(as_json, CALIBRATING) as shown,
        ProgressFile(beside(out)).kept(shown) as progress,
    ):
        shown("finding attention", 0, 1)
        measured = calibrate_source(text_source(loaded), chosen, progress, layouts)
        if collectives.leave() > 0:  # only the first process writes
            return
        took = {"seconds": round(time.monotonic() - began, 1), "peak_megabytes": round(peak_megabytes())}
        save_statistics(measured.with_provenance(calibration=took | {"dtype": dtype}), out)
    about: dict[str, Any] = {
        "dtype": dtype,
        "sites": len(measured.sites),
        "tokens": measured.provenance["tokens"],
        "layouts": list(layouts),
    }
    if as_json:
        print_json({"statistics_path": str(out), "bytes": out.stat().st_size, "dtype": dtype} | about | took)
        return
    output_console(as_json).print(
        f"{about['tokens']:,} tokens in {took['seconds']:.0f} s in {dtype}, peak memory "
        f"{took['peak_megabytes']:,} MB\nstatistics of {about['sites']} sites written to {out} "
        f"({out.stat().st_size / 1e6:.0f} MB)",
        soft_wrap=True,
        highlight=False,
    )


@main.command()
@click.argument("model", type=MODEL, required=False)
@click.option(
    "--statistics",
    "statistics_file",
    type=STATISTICS,
    help="Statistics file of `fhopt calibrate`; skips calibration. Only --max-loss and --pages then need MODEL.",
)
@calibration_options
@click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    help="Compression ratio of the 16-bit KV cache, in layers that cache all tokens. [default: 4]",
)
@click.option(
    "--bytes-per-token",
    type=float,
    help="KV cache bytes per token of these layers, instead of --ratio; scales, sinks and residual window included.",
)
@click.option(
    "--max-loss", help="Max perplexity increase, such as 1%, instead of --ratio: finds the smallest plan within it."
)
@click.option(
    "--gate-data",
    "gate_texts",
    type=TEXT,
    multiple=True,
    help="Text for --max-loss, which is measured on its second half.",
)
@click.option(
    "--layout", default="auto", show_default=True, help="Latent layout: auto, band, freq, head, identity or input."
)
@click.option(
    "--device",
    type=DEVICE,
    help="Target device, as in cost. On CPUs, trades some quality for faster attention; on GPUs, excludes slow "
    "layouts and bit widths.",
)
@click.option(
    "--kernel-shapes",
    type=click.IntRange(min=1),
    help="Max number of distinct kernels: fewer compile faster, at some loss of quality. [default: 4 for GPUs]",
)
@click.option(
    "--code",
    type=click.Choice(CHOICES),
    default=AUTO,
    show_default=True,
    help="Quantizer for latents. trellis: lower error at high compression, CPU only. auto: trellis at 5x and above.",
)
@click.option(
    "--window-bits",
    type=click.Choice(["8", "16"]),
    default="8",
    show_default=True,
    help="Bit width of the residual window.",
)
@click.option(
    "--pages",
    help="Page selection: average share of quantized tokens that a decode step attends to, such as 1/8. [default: all]",
)
@click.option(
    "--mass",
    help="Page selection: select as few pages as cover this share of the attention weight on average, such as 99%.",
)
@click.option(
    "--keep-statistics",
    "kept",
    type=click.Path(path_type=Path),
    help="Also write the statistics to this file, from which --statistics fits plans of other sizes in seconds.",
)
@click.option("--explain", type=click.Path(path_type=Path), help="File of a plot of spectrum, bits and sensitivity.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the plan to.")
@calibration_placement_options
@json_option
@click.pass_context
@fails_together
def fit_command(
    invoked: click.Context, model: str | None, statistics_file: Path | None, ratios: tuple[float, ...],
    bytes_per_token: float | None, max_loss: str | None, gate_texts: tuple[str, ...], window_bits: str,
    pages: str | None, mass: str | None, kept: Path | None, explain: Path | None, out: Path, device_map: str | None,
    dtype: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Calibrate MODEL on text and write a plan.

    The same command resumes an interrupted calibration. Under torchrun the processes share the calibration. For models
    larger than one device: --device-map. With --statistics nothing is calibrated.
    """
    from fhopt.planning.request import read_request

    out = Path(os.path.abspath(out))
    options |= {"window_bits": int(window_bits), "checkpoint": out.with_name(f".{out.name}.calibration")}
    request = read_request(
        ratio=ratios, bytes_per_token=bytes_per_token, max_loss=max_loss, gate_texts=gate_texts, pages=pages, mass=mass,
        statistics=statistics_file, options=options, given={name for name in options if _is_given(invoked, name)},
    )  # fmt: skip
    _check_places(out, explain, kept)
    if model is None and request.needs_model:
        raise FhoptError(
            "MODEL is missing; expected a model, or --statistics FILE without --max-loss and --pages. Try: "
            "fhopt fit demo -o PLAN."
        )

    from fhopt.parallel.device_map import placement

    where = placement(device_map)

    import torch

    from fhopt.calibration.statistics_file import save_statistics
    from fhopt.fitting.choices import AUTO
    from fhopt.inspection.plots import explain_plan
    from fhopt.models.loader import load_model

    loaded = None
    if model is not None and request.needs_model:
        with busy("loading", as_json):
            dtype = calibration_dtype(model, dtype, device_map, is_measured=request.runs_model)
            loaded = load_model(model, getattr(torch, dtype), where)
    with resumable(options["checkpoint"]):
        fitted = _fitted(loaded, request, dtype, beside=out, as_json=as_json)
    if fitted is None:  # another process writes
        return
    fitted.plan.save(out)
    if kept is not None:
        save_statistics(fitted.calibration, kept)
    if explain is not None:
        explain_plan(fitted.calibration, fitted.plan, explain)
    tokens = request.options.tokens
    _show_plan(fitted.plan, tokens, out, fitted.trials, as_json)
    if request.options.layout == AUTO and request.options.device is None:
        _show_device(fitted.plan, tokens, as_json)


def _fitted(
    loaded: LoadedModel | None, request: PlanRequest, dtype: str, *, beside: Path, as_json: bool
) -> FittedPlan | None:
    """Run the pipeline, and show and record its progress next to the plan; None in all processes but the first."""
    from fhopt.inspection import progress_file
    from fhopt.planning.pipeline import fit_in_first_process, text_source

    source = text_source(loaded)
    if not as_json and request.calibration is None and request.options.mean_tokens and not request.options.is_lossless:
        click.echo(NOT_EXPORTED, err=True)
    shares = (CALIBRATING if request.calibration is None else {}) | {"plan": 1.0}
    shares |= ({"gate": 10.0} if request.gate else {}) | ({"pages": 10.0} if request.pages else {})
    kept = progress_file.ProgressFile(progress_file.beside(beside))
    with progress_bar(as_json, shares) as shown, kept.kept(shown) as progress:
        shown("finding attention" if request.calibration is None else "plan", 0, 1)
        return fit_in_first_process(source, request, progress, calibration={"dtype": dtype})


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE


def _check_places(out: Path, picture: Path | None, kept: Path | None) -> None:
    """Raise FhoptError if a plan, its plot or its statistics cannot be written."""
    from fhopt.calibration.statistics_header import check_file
    from fhopt.files import check_picture, check_writable
    from fhopt.models.model_files import check_plan_place

    check_plan_place(out)
    check_writable(out.parent)
    if picture is not None:
        check_picture(picture)
    if kept is not None:
        check_file(kept)


def _show_device(plan: LatentPlan, tokens: int, as_json: bool) -> None:
    """Report layouts that were chosen by KL only and are slow on a CPU."""
    from fhopt.fitting.candidates import SLOW, is_slow
    from fhopt.hardware.this_cpu import closest_cpu

    slow = sum(len(site.key.encode) == 1 and is_slow(site.site, tokens) for site in plan.sites)
    if slow and not as_json:
        output_console(as_json).print(
            f"{slow} of {len(plan.sites)} sites share one latent across all kv heads, which makes attention "
                f"on this CPU more than {SLOW:g}x slower than one latent per head. Refit for this CPU: --device "
                f"{closest_cpu()}; for a GPU: --device h100.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def _show_plan(plan: LatentPlan, tokens: int, out: Path, tried: dict[float, Comparison], as_json: bool) -> None:
    """Print a plan, with sizes at its target context of `tokens` tokens."""
    from fhopt.fitting.fast_choice import TIME
    from fhopt.inspection.tables import plan_table
    from fhopt.plan.cache_size import cache_size
    from fhopt.plan.expected_loss import EXPECTED, calibration_warning, expected_loss
    from fhopt.plan.window import COUNTED_AT

    size, ratio = cache_size(plan, tokens), plan.ratio(tokens)
    trials = {f"{tried_ratio:.4g}": asdict(loss) for tried_ratio, loss in sorted(tried.items())}
    if as_json:
        about = {
            "plan_path": str(out),
            "sites": len(plan.sites),
            "ratio": ratio,
            "tokens": tokens,
            "digest": plan.digest(),
        }
        more = {"predicted_nats": plan.provenance["predicted_nats"], "expected_loss": plan.provenance.get(EXPECTED)}
        more |= {"trellis": plan.has_trellis, "trials": trials, "warning": calibration_warning(plan)}
        more |= {"time": plan.provenance.get(TIME)}
        print_json(about | more | {"whole_ratio": size.ratio, "cache": size.as_json()})
        return
    console = output_console(as_json)
    console.print(plan_table(plan))
    if loss := expected_loss(plan):
        console.print(f"expected loss: {loss.words}", highlight=False, soft_wrap=True)
    if warning := calibration_warning(plan):
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)
    for name, trial in trials.items():
        low, high = trial["increase_percent_ci"]
        console.print(f"{name}x: perplexity {trial['increase_percent']:+.2f}% ({low:+.2f} to {high:+.2f})")
    if shared := plan.provenance.get("kernel_shapes"):
        more = plan.provenance["predicted_nats"] / shared["predicted_nats_without"] - 1
        console.print(f"at most {shared['most']} kernel shapes: expected loss {100 * more:+.0f}%", highlight=False)
    if timed := plan.provenance.get(TIME):
        more = plan.provenance["predicted_nats"] / timed["predicted_nats_without"] - 1
        console.print(
            f"for {timed['device']}: attention {1 / timed['share']:.2f}x faster, expected loss "
                f"{100 * more:+.0f}%, versus the plan of this size with the lowest loss",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if plan.has_trellis:
        console.print(
            "trellis codes run only on CPUs; for GPUs and exports, refit with --code uniform", highlight=False
        )
    context = "" if tokens == COUNTED_AT else f" at {tokens:,} tokens"
    console.print(
        f"{ratio:.2f}x plan{context} for {len(plan.sites)} sites written to {out}", soft_wrap=True, highlight=False
    )
    if size.exact_layers:
        console.print(f"{size.exact_layers} layers stay in full precision. Whole model: {size.words}", highlight=False)
