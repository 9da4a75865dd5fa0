"""Soak test: generate 200,000 tokens with latent caches through every cache operation, and compare with a reference.

    python -m benchmarks.soak.suite               benchmarks/results/soak.json; fails if a promise breaks
    python -m benchmarks.soak.suite --quick       a twentieth of the tokens (also QUICK=1)
    python -m benchmarks.soak.suite --minutes 60  the same mixed with generate(), repeatedly: endurance.json

A small model samples tokens one by one, in batches, mixed with prefill of several tokens, crops (short ones and ones
deep into quantized blocks), reordered, repeated and selected sequences, and resets. After every call the logits of the
latent cache are compared with those of `Reference`, which stores all keys and values as ordinary tensors and replaces a
token by its dequantized value when it is quantized. Models and latents are float64, so that rounding noise cannot
change a quantized value. One run is in float32, with the compiled kernels: there rounding may differ, the caches
diverge from then on, and only the memory is checked.

Promises: logits within 1e-4; no drift (the last quarter of a run is as close as the first); bytes never above the
formula and the spare capacity; constant memory of the process. With --minutes, memory is measured after each lap
through all variants, with the same models in all laps: the run fails if the slope of a straight line through the laps
after the warm-up is above 1 MB per hour by more than two of its standard errors.
"""

from __future__ import annotations

import sys

import click
import torch

from benchmarks.recording import Row, is_quick, record
from benchmarks.soak.endurance import endure
from benchmarks.soak.runs import VARIANTS, Course, broken, drift, growth, run


def rows_of(name: str, course: Course) -> list[Row]:
    """Return the results of one run."""
    figures = (
        ("tokens", course.tokens[-1], ""),
        ("largest_logit_difference", max(course.apart), ""),
        ("last_quarter_over_first", drift(course), "x"),
        ("bytes_over_allowed", max(course.over), "x"),
        ("process_growth", growth(course), "bytes"),
        ("tokens_per_second", course.tokens[-1] / course.seconds, "1/s"),
    )
    return [Row(name, "fhopt", metric, float(value), unit) for metric, value, unit in figures]


@click.command()
@click.option("--quick", is_flag=True, help="A twentieth of the tokens.")
@click.option("--minutes", type=float, help="Repeat for so long, and monitor the memory of the process.")
def main(quick: bool, minutes: float | None) -> None:
    """Run every variant; exit status 1 if a promise is broken."""
    torch.set_num_threads(1)
    if minutes is not None:
        problems = endure(minutes)
        click.echo("; ".join(problems) or "every promise holds")
        sys.exit(bool(problems))
    share = 20 if quick or is_quick() else 1
    courses: dict[str, Course] = {}
    failed = False
    for variant in VARIANTS:
        course = courses[variant.name] = run(variant, variant.tokens // share)
        failed |= bool(problems := broken(variant, course))
        click.echo(f"{variant.name}: {'; '.join(problems) or 'every promise holds'}")
    rows = [row for name, course in courses.items() for row in rows_of(name, course)]
    record("soak", rows)
    sys.exit(failed)


if __name__ == "__main__":
    main()
