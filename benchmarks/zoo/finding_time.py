"""Benchmark of attention detection: relative to the time of torch.compile, and by model size.

    python -m benchmarks.zoo.finding_time          writes benchmarks/results/finding.json and finding.png
    python -m benchmarks.zoo.finding_time --quick  fewer layers, a small model instead of SmolLM2 (also QUICK=1)

`compile` is the first call of `torch.compile(model)` with inductor and empty caches, minus a second call; `find` is all
of fhopt's processing of the captured graph, numerical checks included.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import torch

from benchmarks.palette import FHOPT, FHOPT_TINTS, describe, plain
from benchmarks.recording import ResultsFile, Row, is_quick, record
from fhopt.models.capture import capture
from fhopt.passes import pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

REPEATS = 3
MAX_PERCENT = 15.0


def llama(layers: int, implementation: str) -> torch.nn.Module:
    """Build a Llama of SmolLM2's shape with `layers` layers and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def finding_seconds(model: torch.nn.Module, ids: torch.Tensor) -> tuple[int, int, float]:
    """Return (nodes, sites, median seconds of `passes.find`) on fresh captures."""
    seconds, nodes, sites = [], 0, 0
    for _ in range(REPEATS):
        program = capture(model, (), {"input_ids": ids, "use_cache": False}).program
        nodes = len(program.graph.nodes)
        start = time.perf_counter()
        sites = len(pipeline.find_attentions(program).sites)
        seconds.append(time.perf_counter() - start)
    return nodes, sites, statistics.median(seconds)


def compile_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Measure the seconds that torch.compile adds to a first call, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.config.force_disable_caches = True
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, dynamic=False)
        times = []
        with torch.no_grad():
            for _ in range(2):
                start = time.perf_counter()
                compiled(input_ids=ids, use_cache=False)
                times.append(time.perf_counter() - start)
    torch._dynamo.reset()
    return times[0] - times[1]


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot seconds over nodes, a line per attention implementation."""
    axes = figure.subplots()
    nodes = {row.case: row.value for row in results.of("nodes")}
    for name, color in (("sdpa", FHOPT), ("eager", FHOPT_TINTS["exact"])):
        rows = [row for row in results.of("seconds_find") if f"-{name}-" in row.case and row.case in nodes]
        points = sorted((nodes[row.case], row.value) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", color=color)
        axes.annotate(f"{name} attention", points[-1], (6, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set(xlabel="nodes of the captured graph", ylabel="detection time, s", ylim=0)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    plain(axes)
    percent = max((row.value for row in results.of("percent_of_compile")), default=math.nan)
    about = "Llama with 2 to 32 layers of the size of SmolLM2's, random weights, median of 3 captures"
    finding = f"Detection takes {percent:.0f}% of the time of torch.compile, and grows linearly with the graph"
    describe(figure, finding, about, results)


@click.command()
@click.option("--quick", is_flag=True, help="A small version, of under a minute.")
def main(quick: bool) -> None:
    """Measure, write the results, and exit with status 1 if detection takes more than 15 % of compilation."""
    torch.set_num_threads(1)
    quick = quick or is_quick()
    rows = growth((2, 4, 8) if quick else (2, 4, 8, 16, 32))
    if quick:
        model, name = llama(4, "sdpa"), "llama of 4 layers"
    else:
        from fhopt.models.loader import load_model

        loaded = load_model("demo")
        assert loaded.module is not None
        model, name = loaded.module, loaded.name
    ids = torch.arange(1, 129).unsqueeze(0)
    _, sites, find = finding_seconds(model, ids)
    whole = compile_seconds(model, ids)
    percent = 100 * find / whole
    rows += [
        Row(f"{name}@128", "find", "seconds_find", find, "s", whole, whole / find),
        Row(f"{name}@128", "torch.compile", "seconds_compile", whole, "s"),
        Row(f"{name}@128", "find", "percent_of_compile", percent, "%"),
        Row(f"{name}@128", "find", "sites_found", sites, ""),
    ]
    record("finding", rows, draw)
    sys.exit(percent > MAX_PERCENT)


def growth(layers: Sequence[int]) -> list[Row]:
    """Measure seconds for increasing numbers of layers, and per node, which is constant if the cost is linear."""
    rows: list[Row] = []
    ids = torch.arange(128).unsqueeze(0)
    for implementation in ("sdpa", "eager"):
        for count in layers:
            nodes, sites, seconds = finding_seconds(llama(count, implementation), ids)
            assert sites == count
            case = f"llama-{implementation}-{count} layers"
            rows += [
                Row(case, "find", "nodes", nodes, ""),
                Row(case, "find", "seconds_find", seconds, "s"),
                Row(case, "find", "time_per_node", 1e6 * seconds / nodes, "us"),
            ]
    return rows


if __name__ == "__main__":
    main()
