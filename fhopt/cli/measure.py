"""Commands that measure: `fhopt eval`, `fhopt cost`, `fhopt device`, `fhopt kernels`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.arguments import DEVICE, MODEL, PLAN, TEXT
from fhopt.cli.options import (
    DTYPES,
    busy,
    fails_together,
    json_option,
    output_console,
    placement_options,
    print_json,
    progress_bar,
)
from fhopt.errors import FhoptError
from fhopt.hardware.devices import SHOWN

if TYPE_CHECKING:
    from torch import Tensor

    from fhopt.evaluation.tasks import Cell, TaskResult
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.plan.cache_size import CacheSize
    from fhopt.plan.latent_plan import LatentPlan


@main.command("eval")
@click.argument("model", type=MODEL)
@click.option(
    "--plan",
    "plan_path",
    type=PLAN,
    help="Plan to compare with the full-precision KV cache. [default: none]",
)
@click.option(
    "--data",
    "texts",
    type=TEXT,
    multiple=True,
    default=("topics", "source"),
    show_default=True,
    help="Text to measure perplexity on, as in fit; repeatable.",
)
@click.option(
    "--tasks",
    default="perplexity",
    show_default=True,
    help="Comma-separated tasks: perplexity, passkey, copy, digits, arithmetic (together: all); niah_single, "
    "niah_multikey, niah_multivalue, variable_tracking, common_words, question, json_extraction, long_copy "
    "(together: ruler).",
)
@click.option(
    "--items",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Items per task, context length and needle depth.",
)
@click.option(
    "--lengths",
    default="512,1024,2048",
    show_default=True,
    help="Context lengths of the tasks in tokens, comma-separated.",
)
@click.option(
    "--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences per text for perplexity."
)
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the tasks.")
@click.option("--record", is_flag=True, help="Record the results in the plan's quality card.")
@placement_options
@json_option
@fails_together
def evaluate(
    model: str, plan_path: Path | None, texts: tuple[str, ...], tasks: str, items: int, lengths: str, sequences: int,
    context: int, seed: int, record: bool, device_map: str | None, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODEL's perplexity and tasks with the full-precision KV cache and with a plan, with 95% CIs.

    Perplexity is measured on the second half of each text. The tasks test what compression degrades first: recall of
    strings and numbers from far back in the context. MODEL must be a causal language model with a tokenizer. Under
    torchrun the processes share the sequences and items. For models larger than one device: --device-map.
    """
    from fhopt.evaluation.task_choice import parse_tasks, read_lengths

    if record and plan_path is None:
        raise FhoptError("--record requires a plan; expected --plan PLAN. Add it, or drop --record.")
    chosen, cells = parse_tasks(tasks), read_lengths(lengths)

    from fhopt.parallel.device_map import placement

    where = placement(device_map)

    import torch

    from fhopt.evaluation.tasks import TaskOptions, check_items, run_tasks, write_items
    from fhopt.inspection.measured_tables import evaluation_tables
    from fhopt.models.cache_layers import measured_layers
    from fhopt.models.loader import load_model
    from fhopt.models.model_facts import check_length
    from fhopt.models.rewritten_folder import save_again
    from fhopt.parallel import collectives
    from fhopt.plan.cache_size import cache_size
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.plan.quality_card import with_measured

    plan = LatentPlan.load(plan_path) if plan_path else None
    kept = {"sinks": plan.sinks, "window": plan.window.capacity} if plan else {}
    with busy("loading", as_json):
        loaded = load_model(model, getattr(torch, dtype), where)
    network = loaded.language_model()
    asked = [name for name in chosen if name != "perplexity"]
    written = write_items(loaded.tokenizer, asked, TaskOptions(cells, items, seed, **kept)) if asked else {}
    ids = _test_ids(loaded, texts, sequences, context) if "perplexity" in chosen else {}
    check_items(network, written)
    if ids:
        check_length(network, context - 1)
    with progress_bar(as_json, dict.fromkeys(chosen, 1.0)) as progress:
        progress(chosen[0], 0, 1)
        perplexity = _perplexities(network, ids, plan, progress)
        results = run_tasks(network, written, plan, progress, shared=True) if asked else {}
    if collectives.leave() > 0:  # only the first process prints the results
        return
    size = cache_size(plan, layers=measured_layers(network)) if plan else None
    result = _evaluation(loaded.name, size, perplexity, results)
    if record and plan is not None and plan_path is not None:
        save_again(with_measured(plan, result["perplexity"], result["tasks"]), plan_path)
    if as_json:
        print_json(result)
        return
    output_console(as_json).print(evaluation_tables(result))


def _test_ids(loaded: LoadedModel, texts: tuple[str, ...], sequences: int, context: int) -> dict[str, Tensor]:
    """Return the token ids [sequences, context] of the test half of each text."""
    from fhopt.texts import tokens as texts_tokens

    return {
        text: texts_tokens.sequences(
            loaded.tokenizer,
            texts_tokens.halves(texts_tokens.read_text(text))[1],
            count=sequences,
            length=context,
            what=f"the second half of {text!r}",
        )
        for text in texts
    }


def _evaluation(
    model: str, size: CacheSize | None, perplexity: dict[str, dict[str, Any]],
    tasks: Mapping[str, Mapping[Cell | None, TaskResult]],
) -> dict[str, Any]:  # fmt: skip
    """Convert results to JSON types: of each text, and of each task as a whole (None) and by length and depth."""
    return {
        "model": model,
        "ratio": size.compressed_ratio if size else None,
        "whole_ratio": size.ratio if size else None,
        "perplexity": perplexity,
        "tasks": {
            task: asdict(by_cell[None])
            | {"cells": [{"length": cell[0], "depth": cell[1], **asdict(r)} for cell, r in by_cell.items() if cell]}
            for task, by_cell in tasks.items()
        },
    }


def _perplexities(
    network: Any, ids: dict[str, Tensor], plan: LatentPlan | None, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, Any]]:
    """Evaluate each text: the exact model versus the plan, or only the exact model."""
    from fhopt.evaluation.perplexity import score, token_costs

    results: dict[str, dict[str, Any]] = {}
    total, done = sum(len(rows) for rows in ids.values()), 0

    def count(sequences: int) -> None:
        nonlocal done
        done = min(total, done + sequences)
        progress("perplexity", done, total)

    for text, rows in ids.items():
        if plan:
            results[text] = asdict(token_costs(network, rows, plan, count, shared=True).compare())
        else:
            exact = score(network, rows, None, count, shared=True)
            results[text] = {"exact": exact.perplexity, "tokens": exact.tokens}
    return results


@main.command()
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_path", type=PLAN, help="Plan to estimate. [default: hypothetical ratios 2, 4 and 8]")
@click.option(
    "--device",
    "names",
    type=DEVICE,
    multiple=True,
    default=SHOWN,
    show_default=True,
    help="Device; repeatable. Also h200, a100-80, a10, l4, 4090, b200, mi300x, edge, cpu:THREADS, cpu-avx2, here.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8192,),
    show_default=True,
    help="Cached tokens; repeatable.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights and of the full-precision KV cache.",
)
@json_option
def cost(
    model: str, plan_path: Path | None, names: tuple[str, ...], tokens: tuple[int, ...], batch: int, dtype: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Estimate MODEL's decode time per device with a roofline model, and the break-even context length of latents."""
    from fhopt.hardware.cost_model import ITEMSIZES, RATIOS, compare, hypothetical_cost, model_cost, pretty
    from fhopt.hardware.devices import find_device
    from fhopt.inspection.measured_tables import cost_tables
    from fhopt.models.loader import load_model
    from fhopt.models.model_facts import decoder_sites, encoder_path
    from fhopt.models.sites import find_sites
    from fhopt.plan.fingerprint import check_fingerprint
    from fhopt.plan.latent_plan import LatentPlan

    devices = [find_device(name) for name in names]
    plan = LatentPlan.load(plan_path) if plan_path else None
    with progress_bar(as_json) as progress:
        progress("loading", 0, 1)
        loaded = load_model(model)
        progress("finding attention", 0, 1)
        sites = decoder_sites(find_sites(loaded).sites.values(), encoder_path(loaded.module))
    weights = loaded.weights()
    parameters, itemsize = sum({w.data_ptr(): w.numel() for w in weights.values()}.values()), ITEMSIZES[dtype]
    costs = {"exact": model_cost(sites, parameters=parameters, itemsize=itemsize)}
    if plan:
        check_fingerprint(plan, weights, loaded.name)
        costs["plan"] = model_cost(sites, plan, parameters=parameters, itemsize=itemsize)
    else:
        for ratio in RATIOS:
            costs[f"{ratio}x"] = hypothetical_cost(sites, ratio, parameters=parameters, itemsize=itemsize)
    comparison = compare(costs, devices, tokens, batch)
    if as_json:
        formulas = {n: {"bytes": pretty(c.bytes), "operations": pretty(c.operations)} for n, c in costs.items()}
        about = {"model": loaded.name, "parameters": parameters, "batch": batch, "dtype": dtype}
        print_json(about | {"hypothetical": plan is None, "formulas": formulas} | asdict(comparison))
        return
    console = output_console(as_json)
    title = (
        f"One decode step of attention in {loaded.name}: batch {batch}, {dtype}, peak bandwidth and throughput of "
        "the devices"
    )
    console.print(cost_tables(costs, comparison, title))
    if plan is None:
        console.print(
            "2x, 4x and 8x are hypothetical plans: bytes divided by the ratio, heads and widths unchanged. "
            "For a real plan: fhopt fit MODEL -o PLAN, then --plan PLAN.",
            highlight=False,
        )


@main.command()
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    help="Number of threads; repeatable. [default: 1, and all cores]",
)
@click.option("--again", is_flag=True, help="Measure again and replace the stored results.")
@json_option
def device(threads: tuple[int, ...], again: bool, as_json: bool) -> None:
    """Measure this machine's CPU once, in a few seconds, for `--device here` in other commands."""
    from fhopt.system import cores

    counts = threads or tuple(dict.fromkeys((1, cores())))
    if max(counts) > cores():
        raise FhoptError(
            f"--threads {max(counts)} exceeds the number of cores; expected at most {cores()}. Use fewer threads."
        )

    from fhopt.codegen.build import describe_kernels
    from fhopt.hardware import this_cpu
    from fhopt.inspection.measured_tables import machine_table

    results = [this_cpu.measure_cpu(n) if again else this_cpu.measured(n) for n in counts]
    kernels = describe_kernels()
    if as_json:
        print_json({"kernels": kernels, "measured": [asdict(one) for one in results]})
        return
    console = output_console(as_json)
    console.print(machine_table(results))
    console.print(f"Kernels: {kernels}.", highlight=False)


@main.command()
@click.argument("plan_path", metavar="PLAN", type=PLAN)
@click.option(
    "--device", type=DEVICE, required=True, help="Target device, as in cost; for a CPU, C++ kernels are written."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size.")
@click.option("--queries", type=click.IntRange(min=1), default=1, show_default=True, help="New tokens per sequence.")
@click.option("--tokens", type=click.IntRange(min=1), default=32_768, show_default=True, help="Cached tokens.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Dtype of queries and of unquantized latents.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Configurations to compile if the default does not fit, a few seconds each; 0 tries all of them for all "
    "kernels.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the files to.")
@json_option
def kernels(plan_path: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write the generated kernels of PLAN, and a table of the bytes they load and the resources they use.

    GPU kernels are compiled to find their resources; no GPU is needed.
    """
    from fhopt.hardware.kernel_table import Options, rejected_table, terminal_table, write_kernels
    from fhopt.plan.latent_plan import LatentPlan

    plan = LatentPlan.load(plan_path)
    with progress_bar(as_json, {"compile": 2.0, "compile more": 1.0}) as progress:
        progress("compile", 0, 1)
        made = write_kernels(plan, Path(os.path.abspath(out)), Options(**options), progress)
    if as_json:
        print_json({"folder": str(out)} | made.as_json())
        return
    console = output_console(as_json)
    console.print(terminal_table(made))
    if any(row.rejected for row in made.rows):
        console.print(rejected_table(made))
    console.print(f"{len(made.files)} files and kernels.md written to {out}", soft_wrap=True, highlight=False)
