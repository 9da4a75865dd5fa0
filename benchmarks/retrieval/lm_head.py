"""Benchmark of the retrieval head against the dense head on a CPU: time, bytes, agreement, certificates.

    python -m benchmarks.retrieval.lm_head          benchmarks/results/retrieval_head.json; about 20 minutes
    python -m benchmarks.retrieval.lm_head --quick  few positions and a small random head (also QUICK=1)

Cases: the head of SmolLM2 (49,152 x 576) in float32 and bfloat16, with its hidden states on text that was not used for
calibration, and a random head of 131,072 x 2,048 with random hidden states, which have no structure that a basis or
clusters could use. The time is from hidden states to the arg-max. The implementations of a case are interleaved, and
between two calls 64 MB of other memory are loaded, as a model's layers would be, so that no weight is in the CPU cache.
The baseline is the fastest dense head: torch's, inductor's, inductor's with frozen weights, or `fhopt::linear_kernel`.

Agreement is with the arg-max of torch's dense head in the same dtype, over held-out positions, 16 at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import click
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.recording import Row, is_quick, record, screen
from fhopt.codegen.cpu.lm_head import search_head
from fhopt.lm_head.fitting import HeadOptions, find_head, fit_head, fit_weight, hidden_states, site_for
from fhopt.lm_head.head import Head
from fhopt.lm_head.module import dense
from fhopt.models.loader import load_model
from fhopt.texts import tokens

TEXTS = ("topics", "source", "docstrings")
BATCHES = (1, 4, 16)
POSITIONS, CONTEXT, ROUNDS = 5120, 512, 15
SWEPT = 1 << 24  # float32 elements loaded between two calls
AT_ONCE = 16

Contender = Callable[[Tensor], Tensor]  # hidden [M, C] -> ids [M]


@dataclass(frozen=True)
class HeadCase:
    """A head and hidden states [N, C] that were not used for its calibration."""

    name: str
    weight: Tensor
    hidden: Tensor
    head: Head


def smollm2(dtype: torch.dtype, positions: int) -> HeadCase:
    """Return the head of the demo's model, and its hidden states on the second halves of three texts."""
    loaded = load_model("demo", dtype)
    head = fit_head(loaded, HeadOptions())
    captured = loaded.capture(CONTEXT)
    ids = tokens.held_out_ids(loaded.tokenizer, TEXTS, count=positions // CONTEXT, length=CONTEXT)
    hidden = hidden_states(captured, find_head(captured), ids).to(dtype)
    weight = dict(loaded.language_model().named_parameters())[head.site.weight].detach()
    return HeadCase(f"SmolLM2 49,152 x 576 {_name(dtype)}", weight, hidden, head)


def random_head(vocabulary: int, width: int, dtype: torch.dtype, positions: int) -> HeadCase:
    """Return a head whose rows and hidden states are independent Gaussian samples."""
    generator = torch.Generator().manual_seed(7)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    hidden = torch.randn(positions, width, generator=generator).to(dtype)
    head = fit_weight(site_for(weight), weight, options=HeadOptions(iterations=2))
    return HeadCase(f"random {vocabulary:,} x {width:,} {_name(dtype)}", weight, hidden, head)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- contenders


def dense_contenders(case: HeadCase) -> dict[str, Contender]:
    """Return every dense head."""
    linear = nn.Linear(case.weight.shape[1], case.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(case.weight, requires_grad=False)
    linear.eval()
    return {
        "torch, F.linear": lambda x: F.linear(x, case.weight).argmax(-1),
        "inductor": torch.compile(lambda x: linear(x).argmax(-1), dynamic=False),
        "inductor, frozen weight": _frozen(linear),
        "fhopt, dense": lambda x: dense(x, case.weight, None).argmax(-1),
    }


def _frozen(linear: nn.Linear) -> Contender:
    compiled = torch.compile(lambda x: linear(x).argmax(-1), dynamic=False, options={"freezing": True})
    return lambda x: compiled(x)


def searching(case: HeadCase, probes: int) -> Contender:
    """Return the retrieval head, with the dense head as fallback."""
    options = case.head.search(probes=probes)

    def run(x: Tensor) -> Tensor:
        results = search_head(x, case.weight, None, case.head.codes, options)
        ids = results.ids[:, 0].long()
        left = (results.counts < 0).nonzero().flatten()
        if len(left):
            ids[left] = dense(x[left], case.weight, None).argmax(-1)
        return ids

    return run


def ours(case: HeadCase) -> dict[str, Contender]:
    """Return the retrieval head with a certificate, and with fitted clusters."""
    results = {"fhopt, certain": searching(case, 0)}
    if case.head.probes < case.head.clusters:
        results[f"fhopt, {case.head.probes} of {case.head.clusters} clusters"] = searching(case, -1)
    return results


# --------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def times(case: HeadCase, batch: int, rounds: int) -> list[Row]:
    """Measure milliseconds of every implementation, medians of interleaved calls."""
    dense = dense_contenders(case)
    contenders = dense | ours(case)
    swept = torch.zeros(SWEPT)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        for turn in range(rounds + 2):
            x = case.hidden[turn * batch : (turn + 1) * batch]
            for name, run in contenders.items():
                swept.sum()
                start = time.perf_counter()
                run(x)
                seconds[name].append(time.perf_counter() - start)
    milliseconds = {name: 1e3 * statistics.median(results[2:]) for name, results in seconds.items()}
    best = min(milliseconds[name] for name in dense)
    label = f"{case.name}, batch {batch}"
    return [Row(label, n, "time_ms", v, "ms", baseline=best, ratio=best / v) for n, v in milliseconds.items()]


@torch.no_grad()
def agreement(case: HeadCase) -> list[Row]:
    """Measure the shares of positions with torch's arg-max and with a certificate, and the rows and bytes loaded."""
    parts = case.hidden.split(AT_ONCE)
    expected = torch.cat([F.linear(x, case.weight).argmax(-1) for x in parts])
    rows = []
    for name, run in ours(case).items():
        results = torch.cat([run(x) for x in parts])
        same = 100 * float((results == expected).double().mean())
        rows.append(Row(case.name, name, "agreement_percent", same, "%"))
    counts = torch.cat([search_head(x, case.weight, None, case.head.codes, case.head.search()).counts for x in parts])
    certain = counts >= 0
    exact = float(counts[certain].double().mean())
    read = case.head.bytes_read + exact * case.weight.shape[1] * case.weight.element_size()
    figures = [
        ("certified_percent", 100 * float(certain.double().mean()), "%"),
        ("exact_rows", exact, "rows"),
        ("exact_rows_99_percent", float(counts.double().quantile(0.99)), "rows"),
    ]
    rows += [Row(case.name, "fhopt, certain", metric, value, unit) for metric, value, unit in figures]
    dense = case.head.dense_bytes
    rows.append(Row(case.name, "fhopt, certain", "bytes", read, "bytes", baseline=dense, ratio=dense / read))
    return rows


def measure(case: HeadCase, rounds: int, batches: Sequence[int] = BATCHES) -> list[Row]:
    """Measure all rows of a case."""
    rows = agreement(case)
    for batch in batches:
        rows += times(case, batch, rounds)
    return rows


def summary(rows: Sequence[Row]) -> Table:
    """Format times, a line per case and batch."""
    timed = [row for row in rows if row.metric == "time_ms"]
    impls = list(dict.fromkeys(_kind(row) for row in timed))
    table = Table(title="milliseconds to the arg-max (speed-up over the best dense head)", title_justify="left")
    for heading in ("case", *impls):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in dict.fromkeys(row.case for row in timed):
        cells = {_kind(row): f"{row.value:.2f} ({row.ratio:.2f}x)" for row in timed if row.case == case}
        table.add_row(case, *(cells.get(impl, "") for impl in impls))
    return table


def _kind(row: Row) -> str:
    """Return the name of the implementation without the number of clusters."""
    return "fhopt, some clusters" if "clusters" in row.impl else row.impl


@click.command()
@click.option("--quick", is_flag=True, help="Few positions and a small random head.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(quick: bool, threads: int) -> None:
    """Measure, and write benchmarks/results/retrieval_head.json."""
    torch.set_num_threads(threads)
    quick = quick or is_quick()
    makers: list[Callable[[], HeadCase]] = [lambda: smollm2(torch.float32, CONTEXT if quick else POSITIONS)]
    if quick:
        makers.append(lambda: random_head(8192, 512, torch.float32, CONTEXT))
    else:
        makers.append(lambda: smollm2(torch.bfloat16, POSITIONS))
        makers += [_random(dtype) for dtype in (torch.float32, torch.bfloat16)]
    rows: list[Row] = []
    for make in makers:
        results = measure(make(), 5 if quick else ROUNDS)
        rows += [replace(row, case=f"{row.case}, {threads} threads") if threads > 1 else row for row in results]
        screen().print(summary(results))
    record("retrieval_head", rows, summary=summary(rows))


def _random(dtype: torch.dtype) -> Callable[[], HeadCase]:
    return lambda: random_head(131_072, 2_048, dtype, POSITIONS)


if __name__ == "__main__":
    main()
