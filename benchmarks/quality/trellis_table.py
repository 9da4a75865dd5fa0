"""Error of trellis codes on Gaussian data, and a search for their tables.

    python -m benchmarks.quality.trellis_table              the values in fhopt/fitting/codes.py, for the tables in use
    python -m benchmarks.quality.trellis_table --search 60  other tables, searched for that many minutes

A window's value is LEVELS[h ^ ORDER[l]] + OFFSETS[l], where l and h are its low-order and its high-order half. For an
order, the means of the samples encoded by each window give levels and offsets by least squares (Lloyd's algorithm, all
bit widths at once). Orders and starts are searched by simulated annealing: an entry is redrawn, two are exchanged, or
values are perturbed; the result is accepted if its error is lower, or by chance. The tables in use are the better of
two runs of 80,000 such moves each, made in C++ within seven minutes; this file makes a few per second.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace

import click
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.recording import screen
from fhopt.fitting import codes
from fhopt.fitting.allocation import DISTORTION
from fhopt.ops import trellis
from fhopt.plan.site_plan import TRELLIS_BITS

WINDOWS, HALF = 1 << trellis.WINDOW, 1 << trellis.WINDOW // 2
LOW, HIGH = torch.arange(WINDOWS) % HALF, torch.arange(WINDOWS) // HALF
WEIGHTS = {1: 1.0, 2: 3.0, 3: 10.0, 4: 30.0}  # of errors by bits: each extra bit divides the error by three
WIDTH = 64  # channels of a bit group
ROWS = 224  # of samples to evaluate a move
FIRST = 0.15  # share of the time for drawing starts
HOT, COLD = 0.025, 1e-4  # temperatures, of the sum of logarithms of errors


def gaussian(rows: int, width: int, seed: int) -> Tensor:
    """Return samples of unit variance."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Tables:
    """ORDER [16], OFFSETS and LEVELS [16 + 16] as floats, and their step at each bit width."""

    order: Tensor
    numbers: Tensor
    steps: dict[int, float]
    score: float = math.inf  # sum of the logarithms of errors

    def values(self) -> Tensor:
        """Return the value of each window, float32 [256]."""
        return (self.numbers[LOW] + self.numbers[HALF + (HIGH ^ self.order[LOW])]).float()


def settled(tables: Tables, rounds: int) -> Tables:
    """Set the table entries to the means of the samples they encode; measure the error."""
    numbers, steps = tables.numbers, dict(tables.steps)
    entries = torch.zeros(WINDOWS, 2 * HALF, dtype=torch.float64)
    entries.scatter_(1, torch.stack([LOW, HALF + (HIGH ^ tables.order[LOW])], 1), 1.0)
    score = 0.0
    for i in range(rounds + 1):
        values, score = replace(tables, numbers=numbers).values(), 0.0
        sums, weights = torch.zeros(WINDOWS, dtype=torch.float64), torch.zeros(WINDOWS, dtype=torch.float64)
        for bits, weight in WEIGHTS.items():
            x, step = gaussian(ROWS, WIDTH, bits), steps[bits]
            windows = trellis.viterbi_search(x, bits, step * values).flatten()
            kept, wanted = values[windows].double(), x.flatten().double()
            score += math.log(float((wanted - step * kept).square().mean()))
            sums.scatter_add_(0, windows, weight * step * wanted)
            weights.scatter_add_(0, windows, torch.full_like(wanted, weight * step**2))
            steps[bits] = float((wanted * kept).sum() / (kept * kept).sum())
        if i < rounds:
            ridge = 1e-5 * weights.mean() * torch.eye(2 * HALF, dtype=torch.float64)
            products = entries.T @ (weights[:, None] * entries) + ridge
            numbers = torch.linalg.solve(products, entries.T @ sums + ridge @ numbers)
    return Tables(tables.order, numbers, steps, score)


def drawn(draw: random.Random) -> Tables:
    """Return random initial tables, whose values have unit variance."""
    order = torch.tensor([draw.randrange(HALF) for _ in range(HALF)])
    spread = 0.05 + 0.95 * draw.random()
    numbers = torch.tensor([draw.gauss(0, spread if i < HALF else 1) for i in range(2 * HALF)], dtype=torch.float64)
    values = Tables(order, numbers, {}).values().double()
    numbers = (numbers - values.mean() * (torch.arange(2 * HALF) >= HALF)) / values.std()
    return settled(Tables(order, numbers, dict.fromkeys(TRELLIS_BITS, 1.0)), 3)


def moved(tables: Tables, draw: random.Random) -> Tables:
    """Return a random neighbor of the tables."""
    order, numbers = tables.order.clone(), tables.numbers.clone()
    i, j, kind = draw.randrange(HALF), draw.randrange(HALF), draw.random()
    if kind < 0.225:
        order[i] = draw.randrange(HALF)
    elif kind < 0.45:
        order[[i, j]] = order[[j, i]]
    elif kind < 0.7:
        first = HALF * draw.randrange(2)
        numbers[[first + i, first + j]] = numbers[[first + j, first + i]]
    elif kind < 0.85:
        numbers[HALF * draw.randrange(2) + i] += 0.3 * draw.gauss(0, 1)
    else:
        numbers += 0.05 * torch.tensor([draw.gauss(0, 1) for _ in range(2 * HALF)], dtype=torch.float64)
    return settled(replace(tables, order=order, numbers=numbers), 1)


def searched(seconds: float, seed: int) -> Tables:
    """Search for tables."""
    draw, begin = random.Random(seed), time.monotonic()
    best = drawn(draw)
    while time.monotonic() - begin < FIRST * seconds:
        best = min(best, drawn(draw), key=lambda each: each.score)
    now = best
    while (spent := time.monotonic() - begin) < seconds:
        heat = HOT * (1 - spent / seconds) ** 1.5 + COLD
        other = moved(now, draw)
        if other.score < now.score or draw.random() < math.exp((now.score - other.score) / heat):
            now = other
        best = min(best, now, key=lambda each: each.score)
    return best


def as_bytes(tables: Tables) -> tuple[list[int], list[int], list[int]]:
    """Return ORDER, LEVELS and OFFSETS as bytes; 127.5 represents 0."""
    offsets, levels = tables.numbers[:HALF], tables.numbers[HALF:]
    unit = float(tables.values().abs().max()) / 127.0  # sums of rounded values stay bytes
    levels = ((levels + offsets.min()) / unit + 127.5).round().int()
    return tables.order.tolist(), levels.tolist(), ((offsets - offsets.min()) / unit).round().int().tolist()


def best_step(x: Tensor, bits: int, values: Tensor) -> float:
    """Return the step that encodes x [n, W] with the smallest error."""

    def left(step: float) -> float:
        return float((x - step * values[trellis.closed(x, bits, step * values)]).square().mean())

    return min((codes.STEP[bits] * (0.8 + 0.04 * i) for i in range(12)), key=left)


@click.command()
@click.option("--search", "minutes", type=float, help="Search for tables for so long, and measure them.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
def main(minutes: float | None, seed: int) -> None:
    """Print the error of trellis codes on a unit Gaussian, next to the best uniform quantizer's."""
    values = trellis.window_values(torch.device("cpu"))
    if minutes is not None:
        order, levels, offsets = as_bytes(searched(60 * minutes, seed))
        click.echo(f"LEVELS = {tuple(levels)}\nOFFSETS = {tuple(offsets)}\nORDER = {tuple(order)}")
        values = trellis.values_of(levels, offsets, order)
    out = Table("bits", "error", "of a uniform quantizer's", "of the least possible", "step", "1 / E[r x]")
    x = gaussian(400, WIDTH, 0)
    for bits in TRELLIS_BITS:
        step = best_step(x, bits, values)
        kept = step * values[trellis.closed(x, bits, step * values)]
        left = float((x - kept).square().mean())
        gain = float((x * x).mean() / (x * kept).mean())
        cells = left, left / DISTORTION[bits], left * 4**bits, step, gain
        out.add_row(str(bits), *(f"{cell:.4g}" for cell in cells))
    screen().print(out)


if __name__ == "__main__":
    main()
