"""Benchmark of single-token attention on a CPU: latents against every implementation in torch.

    python -m benchmarks.cpu.attention              benchmarks/results/attention.json, .png and .md; about 25 minutes
    python -m benchmarks.cpu.attention --quick      one shape, 4,096 tokens (also QUICK=1): attention-quick.*
    python -m benchmarks.cpu.attention --threads 1  and --shape, --tokens, --batch, --dtype: a subset of the cases

A case is a head shape, a number of cached tokens, a batch size, a dtype and a number of threads. Its implementations
run in one process, interleaved; the result is the median of their calls. Keys, values and quantized values are random,
since latency does not depend on them. Before timing, each implementation is compared with float64 on the same values.

    torch    scaled_dot_product_attention as models call it; the queries of a kv head as rows of one query; two batched
             matmuls and a softmax, eager, by inductor, and by inductor without its pattern matcher; flex_attention
    fhopt    one latent per kv head: unquantized keys and values ("full"), half of the channels ("half width", also in
             float16 if keys and values are float32), and quantized latents at several compression ratios, scales
             included, with bits from a decaying spectrum like calibrated ones

The baseline of a case is the fastest implementation in torch. Bytes are those of the keys and values, or of the packed
latents, that a call loads; GB/s are compared with a copy on the same threads, counting loads and stores.

Letters: B batch, H query heads, G kv heads, T tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import torch
from rich.progress import Progress

from benchmarks import recording
from benchmarks.cpu.attention_contenders import AttentionContender, contenders
from benchmarks.cpu.attention_report import COPY, line, promised, summary
from benchmarks.cpu.attention_shapes import BATCHES, DTYPES, SHAPES, TOKENS, AttentionCase, cases
from benchmarks.recording import Row, is_quick, record
from fhopt.codegen.dispatch import register_kernels
from fhopt.hardware import this_cpu

SECONDS, MIN_CALLS, MAX_CALLS = 0.5, 5, 30  # total time per contender, min and max calls
# Inputs have a standard deviation of about 1, and outputs are averages of them. Torch rounds weights to bfloat16.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-3}


@torch.no_grad()
def measure(case: AttentionCase, seconds: float) -> list[AttentionContender]:
    """Check each implementation, then time them interleaved. Failed ones record their error."""
    torch.set_num_threads(case.threads)
    torch._dynamo.reset()
    torch.manual_seed(0)
    measured = []
    for one, reference in contenders(case):
        measured.append(one)
        try:
            output, expected = one.attend().double(), reference()
        except Exception as error:
            one.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        difference = float((output - expected).abs().max())
        if not difference <= TOLERANCES[DTYPES[case.dtype]]:
            one.error = f"differs from float64 by {difference:.1e}"
    able = [one for one in measured if not one.error]
    first = {one.name: min(one.call() for _ in range(2)) for one in able}
    counts = {name: min(MAX_CALLS, max(MIN_CALLS, math.ceil(seconds / t))) for name, t in first.items()}
    for turn in range(max(counts.values())):
        for one in able:
            if turn < counts[one.name]:
                one.seconds.append(one.call())
    return measured


def rows_of(case: AttentionCase, measured: Sequence[AttentionContender], copy_gb_s: float) -> list[Row]:
    """Return milliseconds with the fastest torch implementation as baseline, bytes loaded, and the GB/s of a copy."""
    able = [one for one in measured if one.seconds]
    best = min(one.time_ms for one in able if not one.ours)
    rows = [Row(case.name, COPY, "gb_s", copy_gb_s, "GB/s")]
    for one in able:
        rows.append(Row(case.name, one.name, "time_ms", one.time_ms, "ms", best, best / one.time_ms))
        rows.append(Row(case.name, one.name, "bytes", one.size, "bytes", case.exact_bytes, case.exact_bytes / one.size))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="One shape, 4,096 tokens, under a minute; also QUICK=1.")
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, default=tuple(SHAPES))
@click.option("--tokens", type=int, multiple=True, default=TOKENS, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=BATCHES, show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=tuple(DTYPES))
@click.option("--threads", type=int, multiple=True, help="Default: 1, and all cores.")
@click.option("--out", default="attention", show_default=True, help="Name of the files of results.")
def main(
    quick: bool, shapes: tuple[str, ...], tokens: tuple[int, ...], batches: tuple[int, ...], dtypes: tuple[str, ...],
    threads: tuple[int, ...], out: str,
) -> None:  # fmt: skip
    """Benchmark single-token attention on this CPU."""
    quick = quick or is_quick()
    if quick:
        shapes, tokens, batches, out = ("GQA 9/3x64",), (4096,), (1,), "attention-quick"
    register_kernels()
    torch._dynamo.config.recompile_limit = 1024
    threads = threads or tuple(dict.fromkeys((1, torch.get_num_threads())))
    chosen, left_out = cases(shapes, tokens, batches, dtypes, threads)
    copies = {n: this_cpu.measure_copy(n) for n in threads}
    rows: list[Row] = []
    with Progress(console=recording.screen()) as progress:
        for case in progress.track(chosen, description="attention"):
            measured = measure(case, 0.2 if quick else SECONDS)
            rows += rows_of(case, measured, copies[case.threads])
            left_out += [f"{case.name}: {one.name} ({one.error})" for one in measured if one.error]
            progress.console.print(line(case, rows), markup=False)
    left_out.append("llama.cpp (llama-cpp-python has no wheel: it would be a build of another project)")
    record(out, rows, summary=summary(rows))
    for what, target, speedup in promised(rows):
        click.echo(f"{what}: {speedup:.2f}x, target {target:.1f}x")
    for what in left_out:
        click.echo(f"left out: {what}", err=True)


if __name__ == "__main__":
    main()
