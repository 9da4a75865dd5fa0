"""Implementation of `fhopt demo`: find attention, fit a plan, generate with it, and measure, on SmolLM2-135M."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fhopt import progress as fhopt_progress
from fhopt.calibration import options as calibration_options
from fhopt.evaluation import decode_speed
from fhopt.evaluation.perplexity import token_costs
from fhopt.evaluation.statistics import Comparison
from fhopt.files import check_writable
from fhopt.hardware.this_cpu import closest_cpu
from fhopt.hf.apply import apply, unapply
from fhopt.inspection import html_report
from fhopt.inspection.measured_tables import summary_table
from fhopt.inspection.tables import plan_table, sites_table
from fhopt.models.loader import load_model
from fhopt.plan.quality_card import with_measured
from fhopt.planning.pipeline import fit_to_text
from fhopt.texts import tokens

TEXTS = ("topics", "source")  # their second halves are not used for calibration
CONTEXT = 2048  # for perplexity
SPEED_CONTEXTS = (512, 2048, 8000)  # the last is the model's limit
SEQUENCES, RATE_SEQUENCES = 7, 5  # enough for this model: benchmarks/quality/calibration_curve.py
QUESTION = "What is the capital of France? Answer in one sentence."
COUNTED_AT = 8192


def run_demo(
    out: Path, ratio: float, console: Console, progress: fhopt_progress.Progress = fhopt_progress.silent
) -> dict[str, Any]:
    """Run the demo, write plan and report into `out`, and return the results that `fhopt demo --json` prints."""
    start = time.perf_counter()
    options = calibration_options.FitOptions(
        ratio=ratio, sequences=SEQUENCES, rate_sequences=RATE_SEQUENCES, device=closest_cpu()
    )  # speed is measured on this CPU
    options.check()
    html_report.check_report_packages()
    check_writable(out)
    progress("loading", 0, 1)
    loaded = load_model("demo")
    model = loaded.language_model()
    console.print(f"1. {loaded.name} is loaded ({sum(p.numel() for p in model.parameters()):,} parameters).")
    progress("finding attention", 0, 1)
    fitted = fit_to_text(loaded, options, progress)
    plan, outcome = fitted.plan, fitted.calibration.outcome
    assert outcome is not None, "a calibration that was not read from a file has one"
    console.print(sites_table(outcome.sites.values()))
    console.print(f"2. {len(outcome.sites)} attention sites found, {len(outcome.missed)} candidates not rewritten.")
    console.print(plan_table(plan))
    plan_path = plan.save(out / "plan")
    console.print(f"3. A {plan.ratio(COUNTED_AT):.2f}x plan is fitted and saved.")
    texts = _perplexities(loaded, plan, progress)
    plan = with_measured(plan, {name: asdict(one) for name, one in texts.items()}, {})
    plan.save(plan_path)
    result = _measure(loaded, plan, progress)
    result["perplexity"] = {name: {"exact": one.exact, "plan": one.plan} for name, one in texts.items()}
    result |= {"model": loaded.name, "sites_found": len(outcome.sites), "ratio": plan.ratio(COUNTED_AT)}
    result["plan_path"] = str(plan_path)
    result["report_path"] = str(out / "report.html")
    result["seconds"] = time.perf_counter() - start
    progress("report", 0, 1)
    writing = time.perf_counter()
    html_report.write(replace(html_report.build_report(loaded, plan), measured=result), out / "report.html")
    result["report_seconds"] = time.perf_counter() - writing
    console.print(summary_table(result))
    for name in ("exact", "plan"):
        console.print(f"answer, {name}: {result['answer'][name]}", soft_wrap=True, highlight=False)
    console.print(demo_summary(result), soft_wrap=True, highlight=False)
    return result


def demo_summary(result: dict[str, Any]) -> str:
    """Summarize the plan in one line: how much smaller and faster, from which context, and if the answer differs."""
    speeds = {int(n): speed["plan"] / speed["exact"] for n, speed in result["speed_by_context"].items()}
    longest = max(speeds)
    pays = result["break_even_tokens"]
    since = "at no measured length" if pays is None else f"from {pays:,} tokens"
    answers = result["answer"]
    same = "the same answer" if answers["exact"] == answers["plan"] else "another answer"
    change = max(values["plan"] / values["exact"] - 1 for values in result["perplexity"].values())
    return (
        f"{result['ratio']:.2f}x smaller; {speeds[longest]:.2f}x the speed at {longest:,} tokens (faster {since}); "
        f"{same}, perplexity at most {change:+.2%}; longer greedy text usually differs from some token on."
    )


def measured_break_even(speeds: Mapping[int, Mapping[str, float]]) -> int | None:
    """Return the shortest measured context from which the plan is at least as fast; None if it never is."""
    pays = None
    for length in sorted(speeds, reverse=True):
        if speeds[length]["plan"] < speeds[length]["exact"]:
            break
        pays = length
    return pays


def _unseen(loaded: Any, name: str, length: int) -> Tensor:
    """Return the first tokens [1, length] of the half of a text that is not used for calibration."""
    half = tokens.halves(tokens.read_text(name))[1]
    return tokens.sequences(loaded.tokenizer, half, count=1, length=length, what=f"text {name!r}")


def _perplexities(loaded: Any, plan: Any, progress: fhopt_progress.Progress) -> dict[str, Comparison]:
    """Measure each of TEXTS with the full-precision KV cache and with latents."""
    found = {}
    for done, name in enumerate(TEXTS):
        progress("perplexity", done, len(TEXTS))
        found[name] = token_costs(loaded.language_model(), _unseen(loaded, name, CONTEXT), plan).compare()
    progress("perplexity", len(TEXTS), len(TEXTS))
    return found


def _measure(loaded: Any, plan: Any, progress: fhopt_progress.Progress) -> dict[str, Any]:
    """Measure answer, bytes and speed, with the full-precision KV cache and with latents."""
    model, tokenizer = loaded.language_model(), loaded.tokenizer
    notes = tokenizer.decode(_unseen(loaded, "topics", CONTEXT)[0][:600])
    answers = {}
    progress("speed", 0, 1)
    for kind, used in (("exact", None), ("plan", plan)):
        (apply(model, plan) if used is not None else unapply(model))
        answers[kind] = decode_speed.answer(model, tokenizer, QUESTION, context=f"{notes}\n\n")
    prompt = _unseen(loaded, "topics", SPEED_CONTEXTS[-1])[0]
    speed = decode_speed.decode_speed(model, plan, prompt, SPEED_CONTEXTS)
    exact = plan.exact_token_bytes()
    return {
        "bytes_counted_at_tokens": COUNTED_AT,
        "bytes_per_token": {"exact": exact, "plan": plan.cache_bytes(COUNTED_AT) / COUNTED_AT},
        "dtype": str(model.dtype).removeprefix("torch."),
        "decode_tokens": SPEED_CONTEXTS[-1],
        "cache_nbytes": speed["bytes"],
        "tokens_per_second": {k: speed[k] for k in ("exact", "plan")},
        "speed_by_context": {str(length): of_both for length, of_both in speed["contexts"].items()},
        "break_even_tokens": measured_break_even(speed["contexts"]),
        "answer": answers,
        "threads": torch.get_num_threads(),
    }
