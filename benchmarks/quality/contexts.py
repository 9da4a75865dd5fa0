"""Quality of default plans by context length, measured while decoding.

    python -m benchmarks.quality.contexts                 SmolLM2: benchmarks/results/quality_contexts.json and .png
    python -m benchmarks.quality.contexts --model FOLDER  another model; its results are added to the file
    python -m benchmarks.quality.contexts --quick         short contexts, one window, 4x (also QUICK=1)

A window of held-out text ends with the scored tokens, so that every context length is measured on the same tokens: the
context is the text just before them. It is processed in blocks, each query attending to what it would attend to while
decoding. Then the scored tokens follow, `--chunk` at a time: each call appends to the cache, quantizes the block that
leaves the recent window, and attends. The full-precision cache gets the same calls. Intervals: a bootstrap over blocks
of 64 scored tokens of all windows.

A context that exceeds the model's positions is named and left out. A case is "<model>, <dtype>/<context>"; results of
other models and dtypes from earlier runs stay in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor

from benchmarks.palette import FHOPT, FHOPT_TINTS, describe, plain
from benchmarks.quality.caches import fit_plans
from benchmarks.quality.measurement import progress_bar
from benchmarks.recording import ResultsFile, Row, is_quick, kept_rows, record, screen, table
from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, paired, read_steps, switched
from fhopt.evaluation.statistics import Comparison, TokenCosts
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument, positions_of
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

NAME = "quality_contexts"
CONTEXTS = (600, 1500, 3000, 6000, 16000)
RATIOS = (4.0, 8.0)
TEXTS = ("topics", "source", "docstrings", "scripture")  # their second halves; plans are fitted to first halves
WINDOWS, SCORED = 8, 256
QUICK_CONTEXTS, QUICK_SCORED, QUICK_RATIOS = (336, 600), 64, (4.0,)
METRICS = {"kl": "nats/token", "increase_percent": "%"}  # attributes of `Comparison`


@torch.inference_mode()
def decoded_costs(
    model: Any, ids: Tensor, context: int, plan: LatentPlan, chunk: int = 1,
    progress: Callable[[int], None] = lambda n: None,
) -> TokenCosts:  # fmt: skip
    """Measure the costs of the tokens of ids [N, T] after `context`, decoded `chunk` at a time with both caches."""
    name, rows = cache_argument(model), []
    with switched(model, plan):
        for sequence in ids:
            caches = [new_cache(model, None), new_cache(model, plan)]
            for _ in read_steps(model, sequence[None, :context], caches, plan, first=context):
                pass
            parts = []
            for start in range(context, len(sequence) - 1, chunk):
                fed = sequence[None, start : min(start + chunk, len(sequence) - 1)]
                exact, planned = (model(fed, **{name: cache}, use_cache=True).logits[0] for cache in caches)
                parts.append(paired(exact, planned, sequence[start + 1 :]))
            rows.append(torch.cat(parts, -1))
            progress(1)
    return TokenCosts(*torch.stack(rows, 1))


def windows(loaded: LoadedModel, texts: Sequence[str], count: int, length: int) -> Tensor:
    """Return held-out token ids [count, length], interleaved over the texts that are installed and long enough."""
    able = []
    for text in texts:
        try:
            tokens.held_out_ids(loaded.tokenizer, (text,), count=-(-count // len(texts)), length=length)
            able.append(text)
        except FhoptError as error:
            screen().print(f"{text} is left out: {error}", markup=False)
    return tokens.held_out_ids(loaded.tokenizer, able, count=count, length=length)


def able_contexts(model: Any, contexts: Sequence[int], scored: int) -> list[int]:
    """Return the contexts that the model has positions for, and name the others."""
    positions = positions_of(model)
    able = [context for context in contexts if positions is None or context + scored <= positions]
    for context in sorted({*contexts} - {*able}):
        screen().print(
            f"a {context:,}-token context is left out: the model has {positions:,} positions. Measure it on another: "
            "--model.",
            markup=False,
        )
    if not able:
        raise FhoptError(f"no context fits the model's {positions} positions; expected a shorter one. Use --context.")
    return able


def rows_of(case: str, plan: str, costs: TokenCosts) -> list[Row]:
    """Return the rows of a plan at one context length."""
    found: Comparison = costs.compare()
    rows = [Row(case, plan, "windows", float(len(costs.kl)), ""), Row(case, plan, "tokens", float(found.tokens), "")]
    for metric, unit in METRICS.items():
        rows.append(Row(case, plan, metric, getattr(found, metric), unit))
        ends = zip(("low", "high"), getattr(found, f"{metric}_ci") or (), strict=False)
        rows += [Row(case, plan, f"{metric}_{end}", value, unit) for end, value in ends]
    return rows


def measure(
    loaded: LoadedModel, plans: dict[float, LatentPlan], ids: Tensor, contexts: Sequence[int], scored: int, chunk: int
) -> list[Row]:
    """Measure every plan at every context length, on the same scored tokens: the last of ids [N, T]."""
    model, rows = loaded.language_model(), []
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for context in contexts:
        for ratio, plan in plans.items():
            case, impl, done = f"{loaded.name}, {dtype}/{context}", f"fhopt {ratio:g}x", 0
            with progress_bar(f"{case} {impl}") as bar:

                def advance(count: int, bar: Callable[[int, int], None] = bar) -> None:
                    nonlocal done
                    bar(done := done + count, len(ids))

                costs = decoded_costs(model, ids[:, -(context + scored) :], context, plan, chunk, advance)
            rows += rows_of(case, impl, costs)
            screen().print(f"{case} {impl}: KL {costs.compare().kl:.5f} nats/token", markup=False)
    return rows


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot KL and perplexity increase over the context length, a line per plan and model, with 95% intervals."""
    found = {(row.case, row.impl, row.metric): row.value for row in results.rows}
    labels = {"kl": "KL divergence, nats/token", "increase_percent": "perplexity increase, %"}
    cases = list(dict.fromkeys(row.case for row in results.rows))
    models = list(dict.fromkeys(case.rpartition("/")[0] for case in cases))
    figure.set_size_inches(10, 4)
    for axes, (metric, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for style, model in zip(("-", "--", ":"), models, strict=False):
            for impl in dict.fromkeys(row.impl for row in results.of(metric)):
                here = [case for case in cases if case.startswith(f"{model}/") and (case, impl, metric) in found]
                at, values = [int(case.rpartition("/")[2]) for case in here], [found[c, impl, metric] for c in here]
                ends = [[found.get((c, impl, f"{metric}_{end}"), v) for c, v in zip(here, values, strict=True)]
                        for end in ("low", "high")]  # fmt: skip
                errors = [[abs(e - v) for e, v in zip(side, values, strict=True)] for side in ends]
                color = FHOPT_TINTS.get(impl.split()[-1], FHOPT)
                axes.errorbar(at, values, errors, color=color, linestyle=style, marker="o", markersize=4, capsize=2)
                last = f"{impl.split()[-1]}" + (f", {model}" if len(models) > 1 else "")
                axes.annotate(last, (at[-1], values[-1]), (7, 0), textcoords="offset points", fontsize=8, va="center")
        contexts = sorted({int(case.rpartition("/")[2]) for case in cases})
        axes.set(xscale="log", xlabel="context length, tokens", ylabel=label)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.margins(x=0.15)
        plain(axes)
    four = [row.value for row in results.of("kl") if row.impl == "fhopt 4x"]
    low, high = (f"{value:.4f}" for value in (min(four, default=0.0), max(four, default=0.0)))
    windows_count, scored = (max(row.value for row in results.of(metric)) for metric in ("windows", "tokens"))
    count = f"{windows_count:.0f} windows, {scored:,.0f}"
    about = f"{'; '.join(models)}; default plans, token-by-token decoding, {count} held-out tokens, 95% intervals"
    describe(
        figure, f"KL divergence of 4x plans while decoding: {low} to {high} nats/token at every context", about, results
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="demo", show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--context", "contexts", type=int, multiple=True, default=CONTEXTS, show_default=True, help="Repeatable.")
@click.option("--text", "texts", multiple=True, default=TEXTS, show_default=True, help="A file or a built-in name.")
@click.option("--windows", "count", type=click.IntRange(min=1), default=WINDOWS, show_default=True)
@click.option("--scored", default=SCORED, show_default=True, help="Decoded tokens per window.")
@click.option("--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Tokens per decode call.")
@click.option("--quick", is_flag=True, help="A small version, of about a minute; also QUICK=1.")
def main(
    model: str, dtype: str, contexts: tuple[int, ...], texts: tuple[str, ...], count: int, scored: int, chunk: int,
    quick: bool,
) -> None:  # fmt: skip
    """Measure default plans by context length while decoding, and write the results."""
    quick, options = quick or is_quick(), FitOptions()
    if quick:
        options = replace(options, sequences=5, rate_sequences=2, context=256, recent=64)
        contexts, texts, count, scored = QUICK_CONTEXTS, texts[:1], 1, QUICK_SCORED
    try:
        loaded = load_model(model, getattr(torch, dtype))
        able = able_contexts(loaded.language_model(), contexts, scored)
        ids = windows(loaded, texts, count, max(able) + scored)
        plans = fit_plans(loaded, QUICK_RATIOS if quick else RATIOS, options)
        rows = measure(loaded, plans, ids, able, scored, chunk)
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    measured, name = {row.case for row in rows}, f"{NAME}-quick" if quick else NAME
    record(name, [*kept_rows(name, measured.__contains__), *rows], draw, table(name, rows))


if __name__ == "__main__":
    main()
