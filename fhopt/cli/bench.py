"""Command `fhopt bench`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.options import (
    INTERRUPTED,
    blocks_option,
    json_option,
    output_console,
    placement_options,
    print_json,
    progress_bar,
    read_counts,
)
from fhopt.cli.text_model import TextModel, interruptible, load_text_model, read_model_plan

if TYPE_CHECKING:
    from fhopt.evaluation.throughput import Throughput
    from fhopt.evaluation.throughput_options import ThroughputOptions
    from fhopt.plan.latent_plan import LatentPlan


@main.command()
@click.argument("model")
@click.option(
    "--plan",
    "plan_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Plan to compare with the full-precision KV cache; repeatable. [default: the plan of a rewritten folder, "
    "else none]",
)
@click.option("--contexts", help="Context lengths, comma-separated. [default: 512,2048,8192, up to the model's limit]")
@click.option("--batches", default="1", show_default=True, help="Batch sizes, comma-separated.")
@click.option("--decode", type=int, default=64, show_default=True, help="Decode steps to time per context.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Measurement rounds; the median is reported.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the tokens.")
@click.option("--parts", is_flag=True, help="Also print a time breakdown of one decode step.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File of a plot: .png, .svg or .pdf.")
@placement_options
@blocks_option
@json_option
def bench(
    model: str, plan_paths: tuple[Path, ...], contexts: str | None, batches: str, decode: int, rounds: int, seed: int,
    parts: bool, out: Path | None, device_map: str | None, dtype: str, keep_blocks: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure prefill and decode throughput and KV cache bytes, with the full-precision KV cache and with plans.

    Each context is a prompt of random tokens, the same for all KV caches, followed by decode steps. Ctrl-C stops and
    prints the complete contexts.
    """
    from fhopt.evaluation.throughput_options import ThroughputOptions
    from fhopt.files import check_picture

    out = None if out is None else Path(os.path.abspath(out))
    with interruptible():
        lengths = None if contexts is None else read_counts(contexts, "--contexts")
        chosen = ThroughputOptions(lengths, read_counts(batches, "--batches"), decode, rounds, seed)
        _check(model, chosen)
        if out is not None:
            check_picture(out)
        plans = _read_plans(model, plan_paths)
        opened = load_text_model(model, dtype, device_map, None, as_json, keep_blocks)
        from fhopt.models.model_facts import positions_of

        chosen = _limited(chosen, positions_of(opened.network))
        rows, is_complete = _measure(opened.network, plans, chosen, as_json)
    result = _about(opened, dtype, keep_blocks, chosen) | {"complete": is_complete, "rows": _compared(rows)}
    _show(result, out if rows else None, as_json, parts)
    if not is_complete:
        raise SystemExit(INTERRUPTED)


def _check(model: str, chosen: ThroughputOptions) -> None:
    """Raise FhoptError for invalid options, as far as the files of MODEL show."""
    from fhopt.models.model_name import check_text_model, stored_facts

    check_text_model(model)
    chosen.check()
    chosen.within(stored_facts(model).positions)


def _read_plans(model: str, paths: tuple[Path, ...]) -> dict[str, LatentPlan | None]:
    """Return the KV caches to measure by name: full precision, and that of each plan. Raises FhoptError."""
    plans: dict[str, LatentPlan | None] = {"exact": None}
    names = [path.name for path in paths]
    for path in paths:
        name = path.name if names.count(path.name) == 1 and path.name not in ("", *plans) else str(path)
        plans[f"plan {name}" if name in plans else name] = read_model_plan(model, path)
    own = None if paths else read_model_plan(model, None)
    return plans if own is None else plans | {"plan": own}


def _limited(chosen: ThroughputOptions, positions: int | None) -> ThroughputOptions:
    """Return the options with contexts that fit the model, and report truncated ones. Raises FhoptError."""
    from fhopt.evaluation.throughput_options import CONTEXTS

    limited = chosen.within(positions)
    if chosen.contexts is None and limited.contexts != CONTEXTS:
        kept = ", ".join(f"{context:,}" for context in limited.contexts or ())
        click.echo(f"the model has {positions:,} positions; contexts: {kept}", err=True)
    return limited


def _measure(
    network: Any, plans: dict[str, LatentPlan | None], chosen: ThroughputOptions, as_json: bool
) -> tuple[list[Throughput], bool]:
    """Return the results, and whether they are complete: Ctrl-C ends the measurement."""
    from fhopt.evaluation.throughput import measure_throughput

    rows: list[Throughput] = []
    try:
        with progress_bar(as_json, {"bench": 1.0}) as progress:
            for results in measure_throughput(network, plans, chosen, progress):
                rows += results
    except KeyboardInterrupt:
        return rows, False
    return rows, True


def _about(opened: TextModel, dtype: str, keep_blocks: bool, chosen: ThroughputOptions) -> dict[str, Any]:
    """Return the conditions of the results, as JSON values."""
    import torch

    device, threads = opened.network.device, torch.get_num_threads()
    on_cpu = device.type == "cpu"
    return {
        "model": opened.name,
        "dtype": dtype,
        "weights_in_blocks": keep_blocks,
        "device": f"cpu, {threads} thread{'s' * (threads > 1)}" if on_cpu else torch.cuda.get_device_name(device),
        **{name: getattr(chosen, name) for name in ("contexts", "batches", "decode", "rounds", "seed")},
    }


def _compared(rows: list[Throughput]) -> list[dict[str, Any]]:
    """Return results as JSON values, each with its gains over the full-precision cache at its context and batch."""
    exact = {(row.context, row.batch): row for row in rows if row.cache == "exact"}
    return [_row(row, exact[row.context, row.batch]) for row in rows]


def _row(row: Throughput, exact: Throughput) -> dict[str, Any]:
    return {
        "context": row.context,
        "batch": row.batch,
        "cache": row.cache,
        "prefill_tokens_per_second": row.prefill_rate,
        "decode_tokens_per_second": row.decode_rate,
        "time_to_first_token_s": row.first_token_seconds,
        "cache_bytes": row.cache_bytes,
        "exact_cache_bytes": row.exact_cache_bytes,
        "prefill_speedup": row.prefill_rate / exact.prefill_rate,
        "decode_speedup": row.decode_rate / exact.decode_rate,
        "ratio": row.exact_cache_bytes / row.cache_bytes,
        "step_milliseconds": None if row.parts is None else asdict(row.parts),
        "layers_counted": row.layers_counted,
    }


def _show(result: dict[str, Any], out: Path | None, as_json: bool, parts: bool) -> None:
    """Print the results, optionally with the time breakdown of a step, and plot them to `out`."""
    from fhopt.inspection.measured_tables import parts_table, throughput_table
    from fhopt.inspection.throughput_plot import plot_throughput

    if out is not None:
        plot_throughput(result, out)
    if as_json:
        print_json(result | {"plot_path": str(out) if out else None})
        return
    console = output_console(as_json)
    if result["rows"]:
        console.print(throughput_table(result))
        if parts:
            console.print(parts_table(result))
    if not result["complete"]:
        click.echo("stopped; incomplete contexts are omitted", err=True)
    if out is not None:
        console.print(f"plot written to {out}", soft_wrap=True, highlight=False)
