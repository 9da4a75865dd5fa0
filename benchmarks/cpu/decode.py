"""Benchmark of SmolLM2 decode steps on a CPU at 8,192 cached tokens: latents against every exact implementation.

    python -m benchmarks.cpu.decode --plan 4x --plan 8x         results/decode.json and .png; about 25 minutes
    python -m benchmarks.cpu.decode --tokens 640 --tokens 2048  other contexts; decode-contexts.json and .png
    python -m benchmarks.cpu.decode --quick                     1,024 tokens, float32, plain 4 bits (also QUICK=1)

A case is a batch size and a dtype. The implementations of a case run in one process, interleaved: a round is a few
decode steps of each, and the result is the median over all decode steps of an implementation. Their caches hold the
same tokens: one prompt is prefilled once with the full-precision cache, and its keys and values are copied into every
cache. Exact implementations share one static cache.

`best_exact` is the fastest of those that a user of transformers can choose: attention "sdpa" or "eager", compiled by
inductor or not, inductor's pattern matcher on or off, weights frozen (and repacked for the matmuls) or not. `grouped`,
compiled without the pattern matcher, is what a user could write by hand (queries that share a kv head become rows of
one matmul); it is listed in addition. For fhopt, "growing" (dynamic cache) is what `apply` and `generate` do, in eager
mode; "static" and "exact" are compiled.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import fhopt
from benchmarks.palette import TEXT, color_of, describe, plain
from benchmarks.recording import ResultsFile, Row, is_quick, record
from fhopt.cache.report import cache_bytes
from fhopt.hf.apply import latent_cache
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument
from fhopt.ops import attention as ops_attention
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens as texts_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

TOKENS = 8192
SPARE = 512  # positions of static caches after the prompt
WARM, STEPS, ROUNDS = 3, 2, 6
RATIOS = (4.0, 8.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALTERNATIVES = ("eager", "inductor", "inductor, no pattern matcher")
PROMISED = {1: 1.3, 8: 3.0}


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend with the fastest plain torch: q [B,H,S,D] as [B,G,H/G*S,D] against k, v [B,G,T,D], nothing repeated."""
    logits = ops_attention.grouped_scores(query * kwargs["scaling"], key)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask[..., : key.shape[2]], float("-inf"))
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
    return ops_attention.grouped_mix(weights, value).transpose(1, 2).contiguous(), None


@dataclass
class DecodeContender:
    """One implementation of decoding. `call`: the model, compiled or not; `cache`: shared if `rewind` is set."""

    name: str
    call: Callable[..., Any]
    cache: Any
    token: Tensor  # [B, 1]
    rewind: int = 0  # length to which the cache is reset before each step
    seconds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def step(self, argument: str) -> float:
        """Return seconds of one decode step."""
        if self.rewind:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.rewind)
        start = time.perf_counter()
        self.call(self.token, **{argument: self.cache}, use_cache=True)
        return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------- caches


@torch.no_grad()
def prompt_cache(loaded: LoadedModel, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [1,G,T,D] of every layer for real text."""
    model = loaded.language_model()
    ids = texts_tokens.held_out_ids(loaded.tokenizer, ("topics",), count=1, length=tokens)
    cache = DynamicCache(config=model.config)
    for part in ids.split(1024, 1):
        model(part, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def fill(cache: Any, prompt: list[tuple[Tensor, Tensor]], batch: int, dtype: torch.dtype) -> Any:
    """Copy the prompt into a cache, once per sequence."""
    for index, pair in enumerate(prompt):
        cache.update(*[x.to(dtype).repeat(batch, 1, 1, 1) for x in pair], index)
    return cache


# --------------------------------------------------------------------------------------------------- contenders


def contenders(
    loaded: LoadedModel, plans: Sequence[LatentPlan], prompt: list[tuple[Tensor, Tensor]], batch: int,
    dtype: torch.dtype,
) -> list[DecodeContender]:  # fmt: skip
    """Return every implementation of a case, its cache filled."""
    tokens = prompt[0][0].shape[2]
    base = copy.deepcopy(loaded.language_model()).to(dtype).eval()
    token = torch.full((batch, 1), 42)
    exact = fill(StaticCache(base.config, tokens + SPARE), prompt, batch, dtype)
    shared = dict(cache=exact, token=token, rewind=tokens)
    made = []
    for attention in ("sdpa", "eager", "grouped"):
        model = _with_attention(base, attention)
        plain, no_matcher = _compiled(model), _compiled(model, options={"pattern_matcher": False})
        frozen = _compiled(model, options={"pattern_matcher": False, "freezing": True})
        if attention == "grouped":
            made.append(DecodeContender("grouped by hand, inductor", no_matcher, **shared))
            continue
        if attention == "sdpa":  # eager attention takes 3 s per decode step at batch 8
            made.append(DecodeContender("eager, sdpa", model, **shared))
            made.append(DecodeContender("inductor, sdpa", plain, **shared))
        else:  # the matcher would convert it to sdpa, and has nothing to match in sdpa
            made.append(DecodeContender("inductor, no pattern matcher, eager", no_matcher, **shared))
            made.append(DecodeContender("inductor, frozen, eager", frozen, **shared))
    made.append(DecodeContender("fhopt exact", _flashhead(_with_attention(base, "sdpa"), {"ratio": 1}), **shared))
    for plan in plans:
        for fixed in (False, True) if plan is plans[0] else (False,):
            model = fhopt.apply(copy.deepcopy(base), plan)
            held = fill(latent_cache(model, max_cache_len=tokens + SPARE if fixed else None), prompt, batch, dtype)
            name = f"fhopt {plan.provenance.get('ratio', 4):.3g}x, " + ("static" if fixed else "growing")
            made.append(DecodeContender(name, _flashhead(model, {}) if fixed else fhopt.prepare(model), held, token))
    return made


def _with_attention(model: Any, attention: str) -> Any:
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the weights are shared
    copied.set_attn_implementation(attention)
    return copied


def _flashhead(model: Any, options: dict[str, Any]) -> Any:
    return _compiled(model, backend="flashhead", options=options or {"ratio": 1})


def _compiled(model: Any, **options: Any) -> Callable[..., Any]:
    """Compile a model as a separate code object.

    Dynamo tries all compiled versions of one code object before it reaches the one it calls: with ten models of one
    class, that cost the last one 15 ms per step. A user has one model.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, **options)


# --------------------------------------------------------------------------------------------------- measurement


def measure(implementations: list[DecodeContender], argument: str, rounds: int) -> None:
    """Time decode steps of all implementations, interleaved."""
    for one in implementations:
        for _ in range(WARM):
            one.step(argument)
    click.echo("compiled, measuring", err=True)
    for _ in range(rounds):
        for one in implementations:
            one.step(argument)  # warm-up: other implementations have evicted its data and guards from the CPU caches
            one.seconds += [one.step(argument) for _ in range(STEPS)]


def rows_of(case: str, batch: int, implementations: list[DecodeContender]) -> list[Row]:
    """Return milliseconds per decode step with the fastest alternative as baseline; tok/s; bytes of the KV cache."""
    times = {one.name: 1e3 * statistics.median(one.seconds) for one in implementations}
    best = min(t for name, t in times.items() if name.startswith(ALTERNATIVES))  # of those in transformers
    rows = []
    for one in implementations:
        time_ms = times[one.name]
        rows.append(Row(case, one.name, "step_ms", time_ms, "ms", baseline=best, ratio=best / time_ms))
        rows.append(Row(case, one.name, "tokens_per_second", 1e3 * batch / time_ms, "1/s"))
        rows.append(Row(case, one.name, "cache_bytes", cache_bytes(one.cache), "bytes"))
    return rows


def cases(quick: bool, batches: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (batch, dtype) of each case."""
    if quick:
        yield 1, "float32"
        return
    for dtype in dtypes:
        for batch in batches:
            yield batch, dtype


# --------------------------------------------------------------------------------------------------- output


def summary(rows: list[Row]) -> Table:
    """Format a row per implementation, a column per case: milliseconds, speedup over the fastest in transformers."""
    shown = [row for row in rows if row.metric == "step_ms"]
    names, columns = (list(dict.fromkeys(getattr(row, key) for row in shown)) for key in ("impl", "case"))
    out = Table(
        title="decode step: ms (speed-up over the fastest implementation in transformers)", title_justify="left"
    )
    out.add_column("", overflow="fold")
    for case in columns:
        out.add_column(case, justify="right")
    for name in names:
        by_case = {row.case: row for row in shown if row.impl == name}
        out.add_row(
            name, *[f"{by_case[c].value:.1f} ({by_case[c].ratio:.2f}x)" if c in by_case else "" for c in columns]
        )
    return out


SHOWN = {
    "eager, sdpa": "transformers, SDPA",
    "inductor, sdpa": "transformers, SDPA, torch.compile",
    "inductor, no pattern matcher, eager": "transformers, eager attention,\ntorch.compile",
    "inductor, frozen, eager": "transformers, eager attention,\ntorch.compile, frozen weights",
    "grouped by hand, inductor": "hand-written grouped attention,\ntorch.compile",
    "fhopt exact": "fhopt exact, compiled",
}  # names of implementations in the plot; others by `in_plot`


def in_plot(impl: str) -> str:
    """Return the name of an implementation in the plot."""
    eager, compiled = ", eager mode, dynamic cache", ", compiled, static cache"
    return SHOWN.get(impl, impl.replace(", growing", eager).replace(", static", compiled))


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot speedups over the baseline of the rows as bars, a panel per case, with milliseconds per decode step."""
    shown = results.of("step_ms")
    columns = list(dict.fromkeys(row.case for row in shown))
    across = min(2, len(columns))
    panels = figure.subplots(math.ceil(len(columns) / across), across, squeeze=False, sharey=True, sharex=True).ravel()
    figure.set_size_inches(5.0 + 3.5 * across, 4.2 * math.ceil(len(columns) / across))
    for panel, case in zip(panels, columns, strict=False):
        bars = [row for row in shown if row.case == case]
        speedups = [row.ratio or 0.0 for row in bars]
        drawn = panel.barh([in_plot(row.impl) for row in bars], speedups, color=[color_of(row.impl) for row in bars])
        panel.bar_label(drawn, [f"{row.value:.1f} ms" for row in bars], padding=3, fontsize=7.5)
        panel.axvline(1.0, color=TEXT, linewidth=0.8, linestyle=":")
        panel.set_title(case, fontsize=9)
        fastest = next(row.impl for row in bars if row.ratio == 1.0)
        panel.set_xlabel(
            f"speedup over {in_plot(fastest)}\n(the fastest in transformers)".replace(",\n", ", "), fontsize=8
        )
        panel.tick_params(labelsize=8)
        panel.margins(x=0.25)
        plain(panel)
    panels[0].invert_yaxis()
    best = [max(row.ratio or 0.0 for row in shown if (row.case, row.impl[:5]) == (case, "fhopt")) for case in columns]
    gain = " to ".join(dict.fromkeys(f"{gain:.1f}x" for gain in (min(best), max(best))))
    about = (
        "SmolLM2-135M-Instruct, median decode step, implementations interleaved; batch, dtype and context: panel titles"
    )
    describe(
        figure,
        f"With fhopt's fastest plan a decode step is {gain} faster than the fastest in transformers",
        about,
        results,
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A small version of under a minute; also QUICK=1.")
@click.option(
    "--plan", "plan_paths", type=click.Path(path_type=Path), multiple=True,
    help="A fitted plan; repeatable. Without one, 4x and 8x plans are fitted.",
)  # fmt: skip
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=tuple(DTYPES))
@click.option("--rounds", type=int, default=ROUNDS, show_default=True)
@click.option("--tokens", "contexts", type=int, multiple=True, default=(TOKENS,), show_default=True)
def main(
    quick: bool, plan_paths: tuple[Path, ...], batches: tuple[int, ...], dtypes: tuple[str, ...], rounds: int,
    contexts: tuple[int, ...],
) -> None:  # fmt: skip
    """Benchmark decoding at a long context."""
    quick = quick or is_quick()
    contexts = (1024,) if quick else contexts
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code object of one class
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    loaded = load_model("demo")
    plans = [LatentPlan.load(path) for path in plan_paths] or _fitted(loaded, quick)
    whole = prompt_cache(loaded, max(contexts))
    name = "decode-quick" if quick else "decode" if contexts == (TOKENS,) else "decode-contexts"
    rows: list[Row] = []
    for tokens, (batch, dtype) in itertools.product(contexts, cases(quick, batches, dtypes)):
        prompt = [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in whole]
        implementations = contenders(loaded, plans, prompt, batch, DTYPES[dtype])
        measure(implementations, cache_argument(loaded.language_model()), 2 if quick else rounds)
        rows += rows_of(f"batch {batch}, {dtype}, {tokens:,} tokens", batch, implementations)
        click.echo(summary_line(rows[-1].case, rows), err=True)
        record(name, rows, draw, summary(rows))
        del implementations
        gc.collect()
        torch._dynamo.reset()


def summary_line(case: str, rows: list[Row]) -> str:
    """Format the results of a case in one line."""
    here = {row.impl: row for row in rows if row.case == case and row.metric == "step_ms"}
    return f"{case}: " + ", ".join(f"{name} {row.value:.1f} ms ({row.ratio:.2f}x)" for name, row in here.items())


def _fitted(loaded: LoadedModel, quick: bool) -> list[LatentPlan]:
    """Fit plans as `fhopt fit` does; quick ones for the current CPU type."""
    from fhopt.calibration.options import FitOptions
    from fhopt.hardware.this_cpu import closest_cpu
    from fhopt.planning.pipeline import fit_to_text

    if quick:
        return [fit_to_text(loaded, FitOptions(device=closest_cpu(), sequences=2, rate_sequences=1)).plan]
    return [fit_to_text(loaded, FitOptions(ratio=ratio)).plan for ratio in RATIOS]


if __name__ == "__main__":
    main()
