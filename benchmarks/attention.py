"""Measure attention of one new token on a CPU: latents against every implementation in torch.

    python benchmarks/attention.py               benchmarks/results/attention.json, .png and .md; about 25 minutes
    python benchmarks/attention.py --quick       one shape, 4,096 tokens (also QUICK=1): attention-quick.*
    python benchmarks/attention.py --threads 1   and --shape, --tokens, --batch, --dtype: a part of the cases

A case is a shape of heads, a number of cached tokens, a batch, a dtype and a number of threads. Its implementations run
in one process and alternate; the result is the median of their calls. Keys, values and quantized values are random, as
time does not depend on them. Before it is timed, each implementation is compared with float64 on the same numbers.

    torch    scaled_dot_product_attention as models call it; the queries of a kv head as rows of one query; two batched
             products and a softmax, eager, by inductor, and by inductor without its pattern matcher; flex_attention
    fhopt    a latent for each kv head: unquantized keys and values ("full"), half of the channels ("half width", also
             in float16 where keys and values are float32), and quantized latents of so many times fewer bytes, scales
             included, with bits from a spectrum that falls as calibrated ones do

The baseline of a case is the fastest implementation in torch. Bytes are those of the keys and values, or of the packed
latents, that a call reads; GB/s are compared with those of a copy on the same threads, reads and writes both counted.

Letters: B batch, H query heads, G kv heads, T tokens, D head size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import psutil
import recording
import torch
import torch.nn.functional as F
from recording import Row, is_quick, record
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fhopt.codegen.dispatch import install
from fhopt.codegen.tiers import Tiers
from fhopt.hardware import this_cpu
from fhopt.ops import algebra, attention, latent_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

Attend = Callable[[], Tensor]

SHAPES = {"MHA 32x128": (32, 32, 128), "GQA 32/8x128": (32, 8, 128), "GQA 9/3x64": (9, 3, 64)}
TOKENS = (4096, 16384, 32768)
BATCHES = (1, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RATIOS = {"float32": (4, 8, 16), "bfloat16": (2, 4, 8)}  # quantized values have 8 bits at most
SECONDS, LEAST, MOST = 0.5, 5, 30  # of all calls of a contender, and how many there are
SHARE = 0.5  # of the free memory that a case may take
FALL = 9.0  # bits between the loudest and the faintest channel of a spectrum
# Numbers have a deviation of about 1, and an output is an average of them. Ways of torch round weights to bfloat16.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-3}
PROMISES = {  # times the best of torch, at 32,768 tokens, batch 1, on either number of threads
    ("GQA 32/8x128", "float32", "8x"): 5.0,
    ("GQA 32/8x128", "bfloat16", "8x"): 4.0,
    ("GQA 32/8x128", "float32", "4x"): 5.0,
    ("GQA 32/8x128", "float32", "half width, float16"): 5.0,
    ("MHA 32x128", "float32", "8x"): 5.0,
    ("MHA 32x128", "bfloat16", "8x"): 5.0,
    ("MHA 32x128", "float32", "full"): 1.2,
    ("MHA 32x128", "bfloat16", "full"): 1.2,
    ("GQA 32/8x128", "float32", "full"): 1.2,
    ("GQA 32/8x128", "bfloat16", "full"): 1.2,
}


@dataclass(frozen=True)
class Case:
    """What is asked for."""

    shape: str
    tokens: int
    batch: int
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        """Return the name of the case in the results."""
        plural = "thread" if self.threads == 1 else "threads"
        return f"{self.shape}, T={self.tokens}, B={self.batch}, {self.dtype}, {self.threads} {plural}"

    @property
    def exact_bytes(self) -> int:
        """Of keys and values."""
        _, groups, dim = SHAPES[self.shape]
        return 2 * self.batch * groups * self.tokens * dim * DTYPES[self.dtype].itemsize


@dataclass
class Contender:
    """One implementation. `size`: bytes that a call reads. `error`: why it cannot run, or how its result is wrong."""

    name: str
    attend: Attend
    size: int
    ours: bool = False
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    def call(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.attend()
        return time.perf_counter() - start

    @property
    def time_ms(self) -> float:
        """Median."""
        return 1e3 * statistics.median(self.seconds)


# --------------------------------------------------------------------------------------------------- ours


def spectrum_tiers(dim: int, size: int) -> Tiers:
    """Return bit groups of a packed latent of at most `size` bytes: water-filling of a spectrum that falls by FALL.

    Eight channels at a time get the bits that are left between their level and the water, 0 to 6 or 8.
    """
    levels = [FALL * (1 - i / (dim // 8 - 1)) for i in range(dim // 8)]

    def bits(water: float) -> list[int]:
        wanted = [round(max(0.0, level - water)) for level in levels]
        return [8 if b > 6 else b for b in wanted]

    water = next(w / 64 for w in range(-512, 640) if sum(bits(w / 64)) <= size)
    counts = {b: bits(water).count(b) for b in sorted(set(bits(water)), reverse=True) if b}
    return tuple((b, 8 * n, 3.5 / 2**b) for b, n in counts.items())


def coded(case: Case, ratio: int, query: Tensor) -> tuple[Contender, Callable[[], Tensor]]:
    """Return attention on quantized latents of `ratio` times fewer bytes, and the reference."""
    _, groups, dim = SHAPES[case.shape]
    side = dim * query.element_size() // ratio - 2  # a scale has two
    tiers = spectrum_tiers(dim, side)
    row, width = sum(b * w for b, w, _ in tiers) // 8, sum(w for _, w, _ in tiers)
    shape = (case.batch, groups, case.tokens)
    codes = [torch.randint(0, 256, (*shape, row), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(shape).add(0.5).to(torch.float16) for _ in range(2)]
    table = algebra.BitGroups(*map(list, zip(*tiers, strict=True)))
    options: dict[str, Any] = algebra.group_options(table, table) | dict(scale=dim**-0.5)
    absorbed = query[..., :width].contiguous()
    operands: Any = (absorbed, codes[0], scales[0], codes[1], scales[1], None)

    def attend() -> Tensor:
        return torch.ops.fhopt.latent_attention(*operands, **options)[0]

    def reference() -> Tensor:
        exact = (absorbed.double(), *operands[1:])
        return latent_attention.latent_attention_reference(*exact, **options)[0]

    size = sum(x.numel() * x.element_size() for x in (*codes, *scales))
    return Contender(f"fhopt {ratio}x", attend, size, ours=True), reference


def uncoded(name: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Contender, Callable[[], Tensor]]:
    """Latents as numbers, and the reference."""
    options: dict[str, Any] = algebra.uncoded_options() | dict(scale=key.shape[-1] ** -0.5)

    def attend() -> Tensor:
        return torch.ops.fhopt.latent_attention(query, key, None, value, None, None, **options)[0]

    size = 2 * key.numel() * key.element_size()
    return Contender(name, attend, size, ours=True), lambda: exact_attention(query, key, value)


# --------------------------------------------------------------------------------------------------- torch's


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In float64, one sequence at a time."""
    return torch.cat([_exact(*[x.double() for x in rows]) for rows in _sequences(query, key, value)])


def _sequences(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*[x.split(1) for x in tensors], strict=True)


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = attention.grouped_scores(query * key.shape[-1] ** -0.5, key)
    return attention.grouped_mix(torch.softmax(logits, -1), value)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products and a softmax, queries of a kv head as rows."""
    b, h, s, d = query.shape
    g = key.shape[1]
    rows = query.reshape(b * g, h // g * s, d) * d**-0.5
    weights = torch.softmax(torch.bmm(rows, key.reshape(b * g, -1, d).transpose(1, 2)), -1, dtype=torch.float32)
    return torch.bmm(weights.to(value.dtype), value.reshape(b * g, -1, d)).reshape(b, h, s, d)


def torch_ways(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[str, Attend]]:
    """Yield (name, call) of the implementations in torch."""
    b, h, s, d = query.shape
    g = key.shape[1]
    shared: dict[str, Any] = dict(enable_gqa=True) if h != g else {}
    yield "sdpa", lambda: F.scaled_dot_product_attention(query, key, value, **shared)
    if h != g:
        rows = query.reshape(b, g, h // g * s, d)
        yield "sdpa, heads as queries", lambda: F.scaled_dot_product_attention(rows, key, value).reshape(b, h, s, d)
    yield "bmm", lambda: products(query, key, value)
    plain = torch.compile(products, dynamic=False)
    unmatched = torch.compile(products, dynamic=False, options={"pattern_matcher": False})
    yield "bmm, inductor", lambda: plain(query, key, value)
    yield "bmm, inductor, no pattern matcher", lambda: unmatched(query, key, value)
    flex = torch.compile(flex_attention, dynamic=False)
    yield "flex_attention", lambda: flex(query, key, value, **shared)


# --------------------------------------------------------------------------------------------------- measuring


def contenders(case: Case) -> Iterator[tuple[Contender, Callable[[], Tensor]]]:
    """Yield all implementations of a case, each with its reference in float64."""
    heads, groups, dim = SHAPES[case.shape]
    dtype = DTYPES[case.dtype]
    query = torch.randn(case.batch, heads, 1, dim).to(dtype)
    key, value = (torch.randn(case.batch, groups, case.tokens, dim).to(dtype) for _ in range(2))
    reference = exact_attention(query, key, value)
    for name, attend in torch_ways(query, key, value):
        yield Contender(name, attend, case.exact_bytes), lambda: reference
    yield uncoded("fhopt full", query, key, value)
    half = [x[..., : dim // 2].contiguous() for x in (query, key, value)]
    yield uncoded("fhopt half width", *half)
    if dtype == torch.float32:
        yield uncoded("fhopt half width, float16", half[0], *[x.half() for x in half[1:]])
    for ratio in RATIOS[case.dtype]:
        yield coded(case, ratio, query)


@torch.no_grad()
def measure(case: Case, seconds: float) -> list[Contender]:
    """Check each implementation, then time them alternately. Those that fail keep their error."""
    torch.set_num_threads(case.threads)
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = []
    for one, reference in contenders(case):
        found.append(one)
        try:
            output, wanted = one.attend().double(), reference()
        except Exception as error:
            one.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        difference = float((output - wanted).abs().max())
        if not difference <= TOLERANCES[DTYPES[case.dtype]]:
            one.error = f"differs from float64 by {difference:.1e}"
    able = [one for one in found if not one.error]
    first = {one.name: min(one.call() for _ in range(2)) for one in able}
    counts = {name: min(MOST, max(LEAST, math.ceil(seconds / t))) for name, t in first.items()}
    for turn in range(max(counts.values())):
        for one in able:
            if turn < counts[one.name]:
                one.seconds.append(one.call())
    return found


def rows_of(case: Case, found: Sequence[Contender], copy_gb_s: float) -> list[Row]:
    """Return milliseconds against the fastest implementation in torch, GB/s against a copy."""
    able = [one for one in found if one.seconds]
    best = min(one.time_ms for one in able if not one.ours)
    rows = []
    for one in able:
        against = dict(baseline=best, ratio=best / one.time_ms)
        rows.append(Row(case.name, one.name, "time_ms", one.time_ms, "ms", **against))
        speed = one.size / one.time_ms / 1e6
        rows.append(Row(case.name, one.name, "gb_s", speed, "GB/s", baseline=copy_gb_s, ratio=speed / copy_gb_s))
        rows.append(Row(case.name, one.name, "bytes", one.size, "bytes", case.exact_bytes, case.exact_bytes / one.size))
    return rows


def cases(
    shapes: Sequence[str], tokens: Sequence[int], batches: Sequence[int], dtypes: Sequence[str], threads: Sequence[int]
) -> tuple[list[Case], list[str]]:
    """Return the cases that fit into memory, and a line on each that does not."""
    fitting, left_out = [], []
    available = psutil.virtual_memory().available
    for shape in shapes:
        for count in tokens:
            for batch in batches:
                for dtype in dtypes:
                    made = [Case(shape, count, batch, dtype, n) for n in threads]
                    needed = 3.3 * made[0].exact_bytes  # latents, and copies that inductor and flex make
                    if needed <= SHARE * available:
                        fitting += made
                    else:
                        left_out += [f"{case.name}: needs {needed / 1e9:.0f} GB" for case in made]
    return fitting, left_out


# --------------------------------------------------------------------------------------------------- what is shown


def promised(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(what, promised, measured) of the promises whose cases were measured."""
    out = []
    for row in rows:
        shape, tokens, batch, dtype, _ = row.case.split(", ")
        wanted = PROMISES.get((shape, dtype, row.impl.removeprefix("fhopt ")))
        if row.metric == "time_ms" and wanted and (tokens, batch) == ("T=32768", "B=1") and row.ratio:
            out.append((f"{row.case}: {row.impl}", wanted, row.ratio))
    return out


def summary(rows: Sequence[Row]) -> Table:
    """Format a row a case, a column an implementation: milliseconds, speed-up over torch, share of a copy's GB/s."""
    names = list(dict.fromkeys(row.impl for row in rows))
    found = {(row.case, row.impl, row.metric): row for row in rows}
    out = Table(title="attention of one token: ms (speed-up over the fastest of torch, share of a copy's GB/s)")
    out.add_column("", overflow="fold")
    for name in names:
        out.add_column(name, justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        cells = []
        for name in names:
            time_ms, speed = found.get((case, name, "time_ms")), found.get((case, name, "gb_s"))
            cells.append(
                f"{time_ms.value:.3g} ({time_ms.ratio:.2f}x, {100 * (speed.ratio or 0):.0f} %)"
                if time_ms and speed
                else ""
            )
        out.add_row(case, *cells)
    return out


def markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """Return the page of results: a table a shape and dtype, skipped cases, and the promises."""
    versions, about = recording.versions(), recording.machine()
    found = {(row.case, row.impl, row.metric): row for row in rows}
    names = list(dict.fromkeys(row.impl for row in rows))
    every = list(dict.fromkeys(row.case for row in rows))
    text = [
        "# Attention of one token on a CPU",
        "",
        f"`make bench-attention` on {about['cpu']} ({about['cpu_capability']}, {about['cores']} cores), "
        f"torch {versions['torch']}. Milliseconds a call, and the speed-up over the fastest implementation in torch. "
        "Implementations in torch read the same keys and values; bytes of latents include their scales. "
        "The implementations are described in [benchmarks/attention.py](../benchmarks/attention.py).",
    ]
    for group in dict.fromkeys(_group(case) for case in every):
        here = [case for case in every if _group(case) == group]
        labels = [", ".join(_label(case)) for case in here]
        text += ["", f"## {group}", "", "| | " + " | ".join(labels) + " |", "|---|" + "---|" * len(here)]
        for name in names:
            cells = [_cell(found, case, name) for case in here]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        copies = [next(r.baseline or 0.0 for r in rows if r.case == c and r.metric == "gb_s") for c in here]
        text.append("| a copy, GB/s | " + " | ".join(f"{x:.0f}" for x in copies) + " |")
    if left_out:
        text += ["", "Left out: " + "; ".join(left_out) + "."]
    text += ["", "## Promises, T=32768, B=1", "", "| | promised | measured |", "|---|---|---|"]
    text += [f"| {what} | {wanted:.1f}x | {measured:.2f}x |" for what, wanted, measured in promised(rows)]
    return "\n".join(text) + "\n"


def _group(case: str) -> str:
    shape, _, _, dtype, _ = case.split(", ")
    return f"{shape}, {dtype}"


def _label(case: str) -> tuple[str, str, str]:
    _, tokens, batch, _, threads = case.split(", ")
    return tokens, batch, threads


def _cell(found: dict[tuple[str, str, str], Row], case: str, name: str) -> str:
    time_ms, speed = found.get((case, name, "time_ms")), found.get((case, name, "gb_s"))
    if time_ms is None or speed is None:
        return "-"
    text = f"{time_ms.value:.3g} ({time_ms.ratio:.2f}x)"
    return f"{text}, {speed.value:.0f} GB/s" if name.startswith("fhopt") else text


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw speed-ups over torch, a panel a shape and dtype, at the longest context, a bar an implementation."""
    shown = [row for row in rows if row.metric == "time_ms"]
    longest = max(int(row.case.split(", ")[1][2:]) for row in shown)
    shown = [row for row in shown if f"T={longest}," in row.case and ", B=1, " in row.case]
    groups = list(dict.fromkeys(_group(row.case) for row in shown))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(row.impl for row in shown))
    threads = list(dict.fromkeys(_label(row.case)[2] for row in shown))
    height = 0.8 / len(threads)
    for panel, group in zip(panels, groups, strict=True):
        for index, count in enumerate(threads):
            bars = {r.impl: r for r in shown if _group(r.case) == group and _label(r.case)[2] == count}
            at = [i + height * (index - (len(threads) - 1) / 2) for i, name in enumerate(names) if name in bars]
            values = [bars[name].ratio or 0.0 for name in names if name in bars]
            panel.barh(at, values, height, label=count)
        panel.axvline(1.0, color="gray", linewidth=0.8, linestyle=":")
        panel.set_title(group.replace(", ", "\n"), fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7)
    figure.supxlabel(f"speed-up over the fastest implementation in torch, T={longest:,}, B=1", fontsize=9)


# --------------------------------------------------------------------------------------------------- command


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
    """Measure attention of one new token on this CPU."""
    quick = quick or is_quick()
    if quick:
        shapes, tokens, batches, out = ("GQA 9/3x64",), (4096,), (1,), "attention-quick"
    install()
    torch._dynamo.config.recompile_limit = 1024
    threads = threads or tuple(dict.fromkeys((1, torch.get_num_threads())))
    chosen, left_out = cases(shapes, tokens, batches, dtypes, threads)
    copies = {n: this_cpu.measure_copy(n) for n in threads}
    rows: list[Row] = []
    with Progress(console=recording.screen()) as progress:
        for case in progress.track(chosen, description="attention"):
            found = measure(case, 0.2 if quick else SECONDS)
            rows += rows_of(case, found, copies[case.threads])
            left_out += [f"{case.name}: {one.name} ({one.error})" for one in found if one.error]
            progress.console.print(line(case, rows), markup=False)
    left_out.append("llama.cpp (llama-cpp-python has no wheel: it would be a build of another project)")
    record(out, rows, lambda figure: draw(figure, rows), summary(rows))
    page = recording.RESULTS / f"{out}.md" if out != "attention" else recording.ROOT / "docs" / "attention.md"
    page.write_text(markdown(rows, left_out), encoding="utf-8")
    for what in left_out:
        click.echo(f"left out: {what}", err=True)


def line(case: Case, rows: Sequence[Row]) -> str:
    """Format the results of a case in one line."""
    here = [row for row in rows if row.case == case.name and row.metric == "time_ms"]
    return f"{case.name}: " + ", ".join(f"{row.impl} {row.value:.3g} ({row.ratio:.2f}x)" for row in here)


if __name__ == "__main__":
    main()
