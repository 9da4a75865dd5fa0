"""Benchmark of page selection at one page in eight: quality and savings, against the same plan with all pages.

    python -m benchmarks.retrieval.page_selection                  results/retrieval*.json, a file per part
    python -m benchmarks.retrieval.page_selection --quick          a short context, one text, few items (also QUICK=1)
    python -m benchmarks.retrieval.page_selection --plan FOLDER    this fitted plan, with or without pages
    python -m benchmarks.retrieval.page_selection --part operator  perplexity, tasks or operator; repeatable

Perplexity is measured on the last tokens of texts that were not used for calibration: the tokens before them are a
prompt; each later query selects its pages as in token-by-token decoding. Tasks ask for strings far back in the context,
for all strings of a text that qualify. Bytes are those of the KV cache that attention of one more token loads. The
operator is timed separately, on random quantized values: attention on given pages; and page selection by sketches,
attention, and value-mean fill together.
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
from torch import Tensor

from benchmarks.cpu.attention_contenders import spectrum_tiers
from benchmarks.cpu.attention_shapes import SHAPES
from benchmarks.recording import Row, is_quick, record
from fhopt.attention.cache_view import SideRows
from fhopt.attention.operands import PartMasks
from fhopt.attention.paged import attend_single_query, mean_values
from fhopt.attention.sketches import PageIndex, Sketcher
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.calibration.options import FitOptions
from fhopt.codegen import dispatch
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, paired, step_bounds, switched
from fhopt.evaluation.tasks import TASKS, Item, TaskOptions, check_items, score_answer, write_items
from fhopt.hardware.this_cpu import closest_cpu
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument, check_length
from fhopt.ops import algebra, page_selection
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SketchPlan
from fhopt.planning.pipeline import fit_to_text
from fhopt.refine import page_budget, page_options, page_sketches
from fhopt.system import cores
from fhopt.texts import tokens as texts_tokens

TEXTS = ("source", "docstrings", "scripture")
CALIBRATION = ("topics", "source")  # first halves; measurements use second halves
SHARE = 1 / 8
PROMPT = 512  # prompt tokens per prefill call
DENSE, PAGED = "all pages", "one page in eight"
TORCH = "keys and values, torch"  # two batched matmuls: the fastest in torch (benchmarks/cpu/attention.py)
SHAPE, RATIO, ROUNDS = "GQA 32/8x128", 4, 31
PAGE_TOKENS = page_options.PagingOptions.tokens


# --------------------------------------------------------------------------------------------------- quality


@torch.inference_mode()
def perplexities(loaded: LoadedModel, plan: LatentPlan, text: str, context: int, tail: int) -> list[Row]:
    """Yield perplexity of the last `tail` tokens with all and with selected pages, KL, and bytes per decode step."""
    model, what = loaded.language_model(), f"the second half of {text!r}"
    ids = texts_tokens.sequences(
        loaded.tokenizer, texts_tokens.halves(texts_tokens.read_text(text))[1], count=1, length=context + 1, what=what
    )
    dense, name = replace(plan, pages=None), cache_argument(model)
    steps = [(start, stop) for start, stop in step_bounds(context, plan) if start >= context - tail]
    parts = []
    with switched(model, dense):
        caches = [new_cache(model, dense), new_cache(model, plan, each_query=False)]
        for cache in caches:
            for part in ids[:, : steps[0][0]].split(PROMPT, 1):
                model(part, **{name: cache}, use_cache=True, logits_to_keep=1)
            for layer in cache.layers:
                layer.each_query = True
        for start, stop in steps:
            every, selected = (model(ids[:, start:stop], **{name: c}, use_cache=True).logits[0] for c in caches)
            same = (every.argmax(-1) == selected.argmax(-1)).double()
            parts.append(torch.cat([paired(every, selected, ids[0, start + 1 :]), same[None]]))
    return _rows_of(torch.cat(parts, -1), caches, f"{text}, {context:,} tokens, last {tail:,}")


def _rows_of(costs: Tensor, caches: list[Any], case: str) -> list[Row]:
    """Return rows from costs [4, tokens]: with all pages, with selected ones, KL, same most likely token."""
    baseline = float(costs[0].mean().exp())
    difference = costs[1] - costs[0]
    error = 100 * float(difference.std()) / len(difference) ** 0.5
    rows = [
        Row(case, PAGED, "loss_rise", 100 * float(difference.mean().expm1()), "%"),
        Row(case, PAGED, "standard_error", error, "%"),
        Row(case, PAGED, "kl", float(costs[2].mean()), "nats"),
        Row(case, PAGED, "same_token", 100 * float(costs[3].mean()), "%"),
    ]
    held = sum(row["dense_step_bytes"] for row in caches[0].report())
    for impl, cost, cache in zip((DENSE, PAGED), costs[:2].mean(-1).exp().tolist(), caches, strict=True):
        read = sum(row["step_bytes"] for row in cache.report())
        rows.append(Row(case, impl, "perplexity", cost, "", baseline=baseline, ratio=cost / baseline))
        rows.append(Row(case, impl, "step_bytes", read, "bytes", baseline=held, ratio=held / read))
    return rows


def left_out(plan: LatentPlan) -> list[Row]:
    """Return the mean attention weight of unselected pages, as measured by calibration."""
    shares = plan.provenance["pages"]["left_out"]
    mean = sum(shares.values()) / max(1, len(shares))
    return [Row("calibration, mean of layers", PAGED, "weight_left_out", mean, "")]


def task_rates(loaded: LoadedModel, plan: LatentPlan, tasks: tuple[str, ...], length: int, items: int) -> Iterator[Row]:
    """Yield the share of correct answers, and their likelihood, with all and with selected pages."""
    model = loaded.language_model()
    options = TaskOptions((length,), items, sinks=plan.sinks, window=plan.window.capacity)
    for task in tasks:
        enough = replace(options, items=items if len(TASKS[task].depths) > 1 else 5 * items)
        written = write_items(loaded.tokenizer, [task], enough)
        check_items(model, written)
        items_of_all = [item for some in written[task].values() for item in some]
        check_length(
            model, max(item.question + len(q) + len(a) - 1 for item in items_of_all for q, a in item.questions)
        )
        with switched(model, plan):
            known = [answers(model, plan, item) for item in items_of_all]
        case = f"{task}, {length:,} tokens, {len(known)} texts, {sum(map(len, known))} questions"
        yield from _rates(case, known)


def _rates(case: str, known: list[list[dict[str, tuple[bool, float]]]]) -> Iterator[Row]:
    """Yield rates of answers from (correct, log-probability per token) by text and implementation.

    Questions about one text are grouped: errors are those of text means.
    """
    every_answer = [answer for some in known for answer in some]
    rates = {impl: statistics.fmean(answer[impl][0] for answer in every_answer) for impl in (DENSE, PAGED)}
    for impl, rate in rates.items():
        log_prob = statistics.fmean(answer[impl][1] for answer in every_answer)
        yield Row(case, impl, "right", rate, "", baseline=rates[DENSE])
        yield Row(case, impl, "log_prob", log_prob, "nats")
    for name, at, unit in (("log_prob_error", 1, "nats"), ("right_error", 0, "")):
        changes = [statistics.fmean(answer[PAGED][at] - answer[DENSE][at] for answer in some) for some in known]
        yield Row(case, PAGED, name, statistics.stdev(changes) / len(changes) ** 0.5, unit)
    for name, has, lacks in (("gained", PAGED, DENSE), ("lost", DENSE, PAGED)):
        yield Row(case, PAGED, name, float(sum(a[has][0] and not a[lacks][0] for a in every_answer)), "questions")


@torch.inference_mode()
def answers(model: Any, plan: LatentPlan, item: Item) -> list[dict[str, tuple[bool, float]]]:
    """Return per question about a text whether the answer is the most likely one, and its log-probability per token.

    Questions and answers select pages; everything before is a prompt, prefilled once without selection.
    """
    name, cache = cache_argument(model), new_cache(model, plan, each_query=False)
    for piece in torch.tensor([item.context[: item.question]]).split(PROMPT, 1):
        model(piece, **{name: cache}, use_cache=True, logits_to_keep=1)
    return [_asked(model, cache, question, answer) for question, answer in item.questions]


def _asked(model: Any, cache: Any, question: tuple[int, ...], answer: tuple[int, ...]) -> dict[str, tuple[bool, float]]:
    out = {}
    for impl in (DENSE, PAGED):
        own = copy.deepcopy(cache)
        for layer in own.layers:
            if isinstance(layer, LatentLayer):
                layer.each_query = True
                layer.share = 1.0 if impl == DENSE else layer.share
        ids = torch.tensor([[*question, *answer[:-1]]])
        logits = model(ids, **{cache_argument(model): own}, use_cache=True).logits[0, -len(answer) :]
        right, log_prob = score_answer(logits.double().log_softmax(-1), answer).tolist()
        out[impl] = bool(right), log_prob
    return out


# --------------------------------------------------------------------------------------------------- operator


def operator(tokens: int) -> list[Row]:
    """Time attention of one token on `tokens` quantized ones: all pages, listed ones, and with page selection."""
    dispatch.register_kernels()
    heads, groups, dim = SHAPES[SHAPE]
    query, calls, sizes = torch.randn(1, heads, 1, dim), {}, {}
    tiers = spectrum_tiers(dim, dim * 4 // RATIO - 2)
    row, width = sum(b * w for b, w, _ in tiers) // 8, sum(w for _, w, _ in tiers)
    packed = [torch.randint(0, 256, (1, groups, tokens, row), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(1, groups, tokens).add(0.5).to(torch.float16) for _ in range(2)]
    table = algebra.BitGroups(*map(list, zip(*tiers, strict=True)))
    options: dict[str, Any] = algebra.group_options(table, table) | dict(scale=dim**-0.5)
    operands: Any = (query[..., :width].contiguous(), packed[0], scales[0], packed[1], scales[1], None)
    near = torch.zeros(1, heads, 1)
    key, value = (SideRows(table, *rows, torch.zeros(0)) for rows in zip(packed, scales, strict=True))
    mean = mean_values(operands[0], key, value, None, None, PAGE_TOKENS)  # a cache stores it until it quantizes a block
    index = _index(groups, table[0], table[1], tokens)
    drawn = torch.rand(1, groups, 1, index.count).topk(index.most, -1).indices
    selected = torch.zeros(1, groups, 1, index.count, dtype=torch.bool).scatter(-1, drawn, True)
    lists = page_selection.page_lists(selected.squeeze(2), index.most)

    def read(which: Tensor | None) -> tuple[Tensor, Tensor]:
        listed = {} if which is None else dict(pages=which, page_tokens=PAGE_TOKENS)
        return torch.ops.fhopt.latent_attention(*operands, **options, **listed)

    def select() -> Tensor:
        return attend_single_query(operands[0], key, value, index, PartMasks(), near, mean, scale=dim**-0.5)[0]

    exact = [torch.randn(groups, tokens, dim) for _ in range(2)]

    def by_torch() -> Tensor:
        rows = query.reshape(groups, heads // groups, dim)
        return ((rows @ exact[0].mT) * dim**-0.5).softmax(-1) @ exact[1]

    calls = {DENSE: lambda: read(None)[0], "one page in eight, listed": lambda: read(lists)[0], PAGED: select}
    calls[TORCH] = by_torch
    every = sum(x.numel() * x.element_size() for x in (*packed, *scales))
    sizes = {DENSE: every, "one page in eight, listed": every * index.most // index.count}
    sizes[TORCH] = sum(x.nbytes for x in exact)
    sizes[PAGED] = sizes["one page in eight, listed"] + sum(x.nbytes for x in index.rows if x is not None)
    times = timed(calls)
    rows = []
    for impl, time_ms in times.items():
        case = f"{SHAPE}, T={tokens}, B=1, {RATIO}x codes, threads: {torch.get_num_threads()}"
        rows.append(Row(case, impl, "time_ms", time_ms, "ms", baseline=times[DENSE], ratio=times[DENSE] / time_ms))
        rows.append(Row(case, impl, "step_bytes", sizes[impl], "bytes", baseline=every, ratio=every / sizes[impl]))
    return rows


def _index(groups: int, bits: Sequence[int], widths: Sequence[int], tokens: int) -> PageIndex:
    """Return random sketches, in bit groups for latents whose variance is four times higher per additional bit."""
    variances = torch.cat([torch.full((w,), 4.0**b) for b, w in zip(bits, widths, strict=True)])
    tiers, width = page_sketches.sketch_tiers(variances, page_options.PagingOptions.sketch), len(variances)
    kept = sum(tier.width for tier in tiers)
    channels = torch.arange(kept).expand(groups, kept).contiguous()
    plan = SketchPlan(channels, torch.zeros(groups, width), torch.ones(groups, width), tiers)
    sketcher = Sketcher.on(plan, torch.device("cpu"))
    packed = torch.randint(0, 256, (1, groups, tokens, plan.row_bytes), dtype=torch.uint8)
    rows = packed, torch.rand(1, groups, tokens).add(0.5).to(torch.float16), None
    numbers = PAGE_TOKENS, SHARE, 1.0, 0.0, 0, 1.0, groups, False, torch.zeros(4, dtype=torch.int64)
    return PageIndex(sketcher, rows, *numbers, fill=torch.zeros(SHAPES[SHAPE][0]))


def timed(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return median milliseconds of each call, measured interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(x) for name, x in seconds.items()}


# --------------------------------------------------------------------------------------------------- command


def paged_plan(loaded: LoadedModel, path: Path | None, quick: bool) -> LatentPlan:
    """Return the plan with page selection, calibrated now if it has none."""
    small: dict[str, Any] = dict(sequences=2, rate_sequences=1) if quick else {}
    plan = LatentPlan.load(path) if path else fit_to_text(loaded, FitOptions(device=closest_cpu(), **small)).plan
    if plan.pages is not None:
        return plan
    sized: dict[str, Any] = dict(sequences=1, context=2048) if quick else {}
    return page_budget.calibrate_pages(
        loaded, plan, page_options.PagingOptions(share=SHARE, texts=CALIBRATION, **sized)
    )


PARTS = {"perplexity": "retrieval", "tasks": "retrieval_tasks", "operator": "retrieval_operator"}  # and their files


def measured(
    part: str, plan: Callable[[], tuple[LoadedModel, LatentPlan]], texts: tuple[str, ...], contexts: tuple[int, ...],
    tail: int, items: int, length: int, tokens: int,
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows of one part."""
    if part == "perplexity":
        yield from left_out(plan()[1])
        for context in contexts:
            for text in texts:
                yield from perplexities(*plan(), text, context, tail)
    if part == "tasks":
        yield from task_rates(*plan(), ("passkey", "copy", "digits"), length, items)
    before = torch.get_num_threads()
    for threads in sorted({1, cores()}) if part == "operator" else ():
        torch.set_num_threads(threads)
        yield from operator(tokens)
    torch.set_num_threads(before)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A small version; also QUICK=1.")
@click.option("--plan", "path", type=click.Path(path_type=Path), help="A fitted plan, with or without pages.")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice([*PARTS]), help="Repeatable; all where none is named."
)
@click.option("--text", "texts", multiple=True, default=TEXTS, show_default=True, help="Repeatable.")
@click.option("--context", "contexts", type=int, multiple=True, default=(2048, 8192), show_default=True)
@click.option("--tail", type=click.IntRange(min=256), default=1024, show_default=True, help="Tokens that count.")
@click.option(
    "--items",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Texts per depth of the passkey; of other tasks five times as many.",
)
@click.option("--length", type=int, default=8064, show_default=True, help="Tokens of the tasks' contexts.")
@click.option("--tokens", type=int, default=32_768, show_default=True, help="That the operator attends to.")
def main(
    quick: bool, path: Path | None, parts: tuple[str, ...], texts: tuple[str, ...], contexts: tuple[int, ...],
    tail: int, items: int, length: int, tokens: int,
) -> None:  # fmt: skip
    """Measure page selection, and write a file for each part."""
    quick = quick or is_quick()
    if quick:
        texts, contexts, tail, items, length, tokens = texts[:1], (1536,), 512, 1, 1024, 8192

    @functools.cache
    def plan() -> tuple[LoadedModel, LatentPlan]:
        loaded = load_model("demo")
        return loaded, paged_plan(loaded, path, quick)

    for part in parts or PARTS:
        rows = []
        try:
            for row in measured(part, plan, texts, contexts, tail, items, length, tokens):
                rows.append(row)
                click.echo(f"{row.case}: {row.impl}, {row.metric} {row.value:.5g}", err=True)
        except FhoptError as error:
            raise click.ClickException(str(error)) from error
        record(PARTS[part] + ("-quick" if quick else ""), rows)


if __name__ == "__main__":
    main()
