"""Repetition of soak runs in laps, with a memory-growth estimate from the memory after each lap."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch

from benchmarks.recording import Row, process_bytes, record
from benchmarks.soak.runs import VARIANTS, VOCABULARY, broken, prepared, run

LAP, MIN_LAPS, WARM = 1200, 8, 0.25  # tokens per variant and lap; min laps; share of warm-up laps
MAX_SLOPE = 1e6  # bytes per hour
GENERATED: tuple[dict[str, Any], ...] = (
    {"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False},
    {"do_sample": False, "prompt_lookup_num_tokens": 3}, {"do_sample": False, "cache_implementation": "static"},
)  # fmt: skip


@dataclass(frozen=True)
class Lap:
    """State after one lap: minutes and tokens since the beginning, bytes of the process, broken promises."""

    minutes: float
    tokens: int
    resident: int
    broken: tuple[str, ...]


def laps(minutes: float) -> Iterator[Lap]:
    """Yield laps through all variants, until the time is over and there are enough for a slope."""
    made = {variant.name: prepared(variant) for variant in VARIANTS}
    start, tokens, count = time.perf_counter(), 0, 0
    while count < MIN_LAPS or time.perf_counter() - start < 60 * minutes:
        problems: list[str] = []
        for variant in VARIANTS:
            course = run(variant, LAP, seed=count, made=made[variant.name])
            problems += [f"{variant.name}: {words}" for words in broken(variant, course, is_long=False)]
            tokens += course.tokens[-1] + generate(made[variant.name][0], seed=count)
        count += 1
        yield Lap((time.perf_counter() - start) / 60, tokens, process_bytes(), tuple(problems))


def generate(model: Any, seed: int) -> int:
    """Generate tokens in every mode of `generate`, and return their number."""
    torch.manual_seed(seed)
    tokens = 0
    for way in GENERATED:
        batch = 1 if "prompt_lookup_num_tokens" in way else 2
        ids = torch.randint(VOCABULARY, (batch, 60))
        tokens += model.generate(ids, max_new_tokens=40, min_new_tokens=40, **way).numel() - ids.numel()
    return tokens


def slope(course: list[Lap]) -> tuple[float, float]:
    """Return the growth of the process in bytes per hour and its standard error, by least squares after warm-up."""
    kept = course[int(WARM * len(course)) :]
    hours, sizes = [lap.minutes / 60 for lap in kept], [float(lap.resident) for lap in kept]
    spread = sum((x - statistics.fmean(hours)) ** 2 for x in hours)
    line = statistics.linear_regression(hours, sizes)
    rest = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(hours, sizes, strict=True))
    return line.slope, math.sqrt(rest / (len(kept) - 2) / spread)


def endured(course: list[Lap]) -> list[str]:
    """Return the promises broken in any lap, and the one about memory, in words."""
    gained, error = slope(course)
    problems = [f"lap {number}: {words}" for number, lap in enumerate(course) for words in lap.broken]
    if gained - 2 * error > MAX_SLOPE:
        problems.append(f"the process grows by {gained / 1e6:.2f} MB an hour (standard error {error / 1e6:.2f})")
    return problems


def endure(minutes: float) -> list[str]:
    """Run laps, print the memory after each, record the results; return the broken promises."""
    course: list[Lap] = []
    for lap in laps(minutes):
        course.append(lap)
        click.echo(f"{lap.minutes:6.1f} min {lap.tokens:9,} tokens {lap.resident / 1e6:8.2f} MB")
    gained, error = slope(course)
    click.echo(f"slope: {gained / 1e6:+.3f} MB an hour, standard error {error / 1e6:.3f}")
    figures = (
        ("minutes", course[-1].minutes, "min"),
        ("tokens", course[-1].tokens, ""),
        ("resident_first", course[0].resident, "bytes"),
        ("resident_last", course[-1].resident, "bytes"),
        ("slope", gained, "bytes/h"),
        ("slope_error", error, "bytes/h"),
    )
    rows = [Row("mixed generation", "fhopt", metric, float(value), unit) for metric, value, unit in figures]
    record("endurance", rows)
    return endured(course)
