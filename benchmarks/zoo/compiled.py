"""Compilation of the test zoo with `backend="flashhead", options={"ratio": 1}`, versus eager and plain inductor.

    python -m benchmarks.zoo.compiled              everything: benchmarks/results/compiled-zoo.json and .png
    python -m benchmarks.zoo.compiled --only gpt2  tasks whose label contains gpt2; writes nothing
    python -m benchmarks.zoo.compiled --quick      a sample (also QUICK=1)
    python -m benchmarks.zoo.compiled --traced     Dynamo and AOTAutograd unchanged, but no C++ is generated

A task is one use of one model, run twice if a second call might recompile:

    no_grad        the entry's call                          train          outputs, gradients of all parameters, a step
    dynamic cache  9 tokens, then 4 single ones              static cache   9 tokens, then 4 single ones
    lengths        four lengths, dynamic=True                growing        dynamic cache, dynamic=True
    batches        two batch sizes, dynamic=True             layers         each layer compiled separately
    long           4 tokens at a context of 300              checkpoints    train, activations recomputed
    weights        the attention weights are outputs too     left padding   train, rows that attend to nothing
    bfloat16, autocast    train

The exit status is 1 if results differ, if there are more graphs or breaks than with inductor, or if a graph was given
up.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import click
import torch
from rich.progress import track
from rich.table import Table
from torch import nn
from torch._dynamo.utils import counters

import fhopt
from benchmarks.palette import FHOPT, OTHER, TEXT, describe, plain
from benchmarks.recording import ResultsFile, Row, is_quick, record, screen
from benchmarks.zoo.compiled_modes import train
from benchmarks.zoo.compiled_results import TOLERANCE, CompiledResult, CompilerResult, ZooTask
from benchmarks.zoo.compiled_tasks import tasks
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

SAMPLE = 7  # in a quick run, one in this many tasks
METRICS: dict[str, tuple[str, Callable[[list[float]], float], str]] = {  # unit, over several tasks, form
    "max_error": ("relative", max, ".0e"),
    "max_gradient_error": ("relative", max, ".0e"),
    "graphs": ("", sum, ".0f"),
    "breaks": ("", sum, ".0f"),
    "sites": ("", sum, ".0f"),
    "seconds": ("s", sum, ".0f"),
}
COMPILERS: dict[str, dict[str, Any] | None] = {  # arguments of torch.compile
    "eager": None,
    "inductor": {},
    "flashhead": {"backend": "flashhead", "options": {"ratio": 1}},
}


def check(task: ZooTask) -> CompiledResult:
    """Run the task with every compiler; an exception is recorded as a `refusal`."""
    seen = {name: _see(task, options) for name, options in COMPILERS.items()}
    if task.exact is not None:
        seen["float32"] = _see(replace(task, build=task.exact, run=train), None)
    return CompiledResult(task, seen)


def _see(task: ZooTask, options: dict[str, Any] | None) -> CompilerResult:
    torch._dynamo.reset()
    counters.clear()
    start, seen = time.perf_counter(), CompilerResult()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            case = task.build()
            torch.manual_seed(0)
            compiled = _compiled(case.module, task, options)
            seen = task.run(compiled, case)
            seen.sites = _sites(compiled)
        except Exception as error:  # torch may raise anything for a model that it cannot run or differentiate
            seen.refusal = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    seen.graphs = counters["stats"]["unique_graphs"]
    seen.breaks = sum(counters["graph_break"].values())
    seen.given_up = [str(w.message) for w in said if "fhopt" in str(w.message)]
    seen.seconds = time.perf_counter() - start
    return seen


def _compiled(module: nn.Module, task: ZooTask, options: dict[str, Any] | None) -> Any:
    if options is None:
        return module
    if not task.by_layers:
        return torch.compile(module, dynamic=task.dynamic, **options)
    for stack in (part for part in module.modules() if isinstance(part, nn.ModuleList)):
        for layer in stack:
            layer.compile(dynamic=task.dynamic, **options)
        break  # those of an encoder, if there is one
    return module


def _sites(compiled: Any) -> int:
    try:
        graphs = fhopt.report(compiled).graphs
    except FhoptError:  # of another compiler
        return 0
    return sum(site.how != "not rewritten" for graph in graphs for site in graph.sites)


def traced() -> AbstractContextManager[Any]:
    """Make inductor, and backends that call it, stop after AOTAutograd and run its graphs unchanged."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_fx(module: Any, inputs: Any, **options: Any) -> Any:
        return aot_eager(module, inputs)

    return mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx)


@click.command()
@click.option("--only", metavar="NAME", help="Only tasks whose label contains NAME; writes no files.")
@click.option("--quick", is_flag=True, help="A sample, of one task in seven.")
@click.option("--traced", "is_traced", is_flag=True, help="Generate no C++: both compilers stop after AOTAutograd.")
def main(only: str | None, quick: bool, is_traced: bool) -> None:
    """Compile every model of the zoo, and compare with eager mode and plain inductor."""
    _be_quiet()
    chosen = [task for task in tasks() if only is None or only in task.label]
    if not chosen:
        raise click.BadParameter(f"no task has {only!r} in its label.", param_hint="--only")
    if quick or is_quick():
        chosen = chosen[::SAMPLE]
    with traced() if is_traced else nullcontext():
        results = list(_checked(chosen))
    if only is None:
        name = "compiled-zoo-traced" if is_traced else "compiled-zoo"
        record(name, rows(results), draw, summary(results))
    else:
        screen().print(summary(results))
    failed = [result for result in results if result.failures]
    for result in failed:
        print(f"{result.task.label}: {'; '.join(result.failures)}")
    sys.exit(1 if failed else 0)


def _be_quiet() -> None:
    """Use one thread (the models are tiny) and no network, and silence torch and transformers."""
    import logging

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("torch").setLevel(logging.CRITICAL)


def _checked(chosen: Sequence[ZooTask]) -> Iterator[CompiledResult]:
    """Yield results one by one; compiled graphs are cyclic, and freed only by garbage collection."""
    for number, task in enumerate(track(chosen, "compiled", transient=True)):
        yield check(task)
        if number % 20 == 19:
            gc.collect()


def compared(results: Iterable[CompiledResult]) -> list[CompiledResult]:
    """Return the results that can be compared."""
    return [result for result in results if not result.excuse]


def rows(results: Iterable[CompiledResult]) -> list[Row]:
    """Return results of each mode and family, over the tasks that eager and inductor support.

    The baseline is inductor's; for `tasks` it is their number, and the value is the number compared.
    """
    found = []
    for (mode, family), members in _groups(results).items():
        case, known = f"{family}/{mode.replace(' ', '_')}", compared(members)
        found.append(Row(case, "flashhead", "tasks", len(known), "", baseline=len(members)))
        for metric, (unit, over, _) in METRICS.items():
            of = [r for r in known if metric != "max_gradient_error" or _has_gradients(r)]
            if of:
                ours, theirs = (over([r.figure(metric, c) for r in of]) for c in ("flashhead", "inductor"))
                found.append(Row(case, "flashhead", metric, ours, unit, baseline=theirs))
    return found


def _has_gradients(result: CompiledResult) -> bool:
    """Return whether there are gradients, and inductor's equal those of eager mode."""
    return bool(result.seen["eager"].gradients) and math.isfinite(result.figure("max_gradient_error", "inductor"))


def _groups(results: Iterable[CompiledResult]) -> dict[tuple[str, str], list[CompiledResult]]:
    groups: dict[tuple[str, str], list[CompiledResult]] = {}
    for result in results:
        groups.setdefault((result.task.mode, result.task.entry.family), []).append(result)
    return groups


def summary(results: Iterable[CompiledResult]) -> Table:
    """Format a line per mode and family."""
    groups = _groups(results)
    table = Table(title="The zoo, compiled (fhopt / inductor)", title_justify="left")
    for heading in ("task", "family"):
        table.add_column(heading)
    for heading in ("compared", "as promised", *METRICS):
        table.add_column(heading.replace("_", " "), justify="right")
    for (mode, family), members in groups.items():
        known = compared(members)
        figures = (_both(known, metric) for metric in METRICS)
        promised = sum(not result.failures for result in known)
        table.add_row(mode, family, f"{len(known)}/{len(members)}", str(promised), *figures)
    return table


def _both(results: Sequence[CompiledResult], metric: str) -> str:
    """Format a metric of flashhead and of inductor, over all results."""
    _, over, form = METRICS[metric]
    figures = ([r.figure(metric, c) for r in results if not r.seen[c].refusal] for c in ("flashhead", "inductor"))
    return " / ".join(format(over(of), form) if of else "-" for of in figures)


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot the largest differences of outputs and gradients from eager mode for each use, flashhead and inductor."""
    figure.set_size_inches(10, 6.5)
    panels = figure.subplots(1, 2, sharey=True)
    cases = sorted(
        {row.case for row in results.of("max_error")}, key=lambda case: (not is_half(case), case), reverse=True
    )
    labels = [case.replace("_", " ") + (" (16-bit)" if is_half(case) else "") for case in cases]
    names = {"max_error": "outputs", "max_gradient_error": "gradients"}
    for panel, (metric, name) in zip(panels, names.items(), strict=True):
        rows = {row.case: row for row in results.of(metric)}
        at = [index for index, case in enumerate(cases) if case in rows]
        shown = [rows[cases[index]] for index in at]
        for color, values, label, size in (
            (OTHER, [row.baseline or 0.0 for row in shown], "inductor", 50),
            (FHOPT, [row.value for row in shown], "fhopt", 18),
        ):
            panel.scatter([max(value, MIN_ERROR) for value in values], at, size, color, label=label, zorder=2)
        panel.axvline(TOLERANCE, color=TEXT, linestyle=":", linewidth=1, label="tolerance in float32")
        panel.set_yticks(range(len(cases)), labels, fontsize=7.5)
        panel.set(xscale="log", title=name, xlabel=f"largest relative difference from eager mode (0: {MIN_ERROR:.0e})")
        panel.grid(alpha=0.2)
        plain(panel)
    panels[0].legend(frameon=False, fontsize=8)
    worst = max(row.value for row in results.of("max_error") if not is_half(row.case))
    count = sum(int(row.value) for row in results.of("tasks"))
    about = f"{count:,} tasks on tiny random models, ratio 1; 16-bit tasks round differently"
    describe(figure, f"Compiled with fhopt, float32 outputs match eager mode to {worst:.0e}", about, results)


MIN_ERROR = 1e-9  # smaller differences are drawn as this one


def is_half(case: str) -> bool:
    """Return whether the tasks of a case round to 16 bits."""
    return case.endswith(("/bfloat16", "/autocast"))


if __name__ == "__main__":
    main()
