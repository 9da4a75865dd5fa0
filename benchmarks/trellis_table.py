"""Measure what trellis codes leave of Gaussian numbers, and train their table.

    python benchmarks/trellis_table.py              the figures of fhopt/fitting/codes.py, of the table that is in use
    python benchmarks/trellis_table.py --train      another table, trained as that one was; a minute or two

A table gives each window of 8 bits a value, at all numbers of bits a channel. It begins as quantiles of a Gaussian in
an order that is linear over bits, drawn at random among those in which, at each number of bits, what follows one state
is spread over the whole range, and so is what leads to one. Then values move to the means of the numbers that are
encoded by them (Lloyd's algorithm). The best of `DRAWN` orders is trained to the end.
"""

from __future__ import annotations

import math

import click
import torch
from recording import screen
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fhopt.fitting import codes
from fhopt.fitting.allocation import DISTORTION
from fhopt.ops import trellis
from fhopt.plan.site_plan import TRELLIS_BITS

WINDOWS = 1 << trellis.WINDOW
DRAWN, FIRST_ROUNDS, ROUNDS = 40, 3, 15  # orders; rounds of Lloyd's algorithm for each, and for the best
WEIGHTS = {1: 1.0, 2: 3.0, 3: 10.0, 4: 30.0}  # of errors by bits, which are a third for each more
WIDTH = 64  # channels of a bit group


def gaussian(rows: int, width: int, seed: int) -> Tensor:
    """Return numbers of unit variance."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def is_invertible(matrix: Tensor) -> bool:
    """Return whether a matrix of bits has an inverse over bits."""
    rows = matrix.clone()
    for i in range(len(rows)):
        pivots = [r for r in range(i, len(rows)) if rows[r, i]]
        if not pivots:
            return False
        rows[[i, pivots[0]]] = rows[[pivots[0], i]]
        for r in range(len(rows)):
            if r != i and rows[r, i]:
                rows[r] = (rows[r] + rows[i]) % 2
    return True


def drawn_order(seed: int) -> Tensor:
    """Return the quantile [256] of each window."""
    generator, size = torch.Generator().manual_seed(seed), trellis.WINDOW
    while True:
        matrix = torch.randint(
            0, 2, (size, size), generator=generator
        )  # high-order bits of quantiles, of windows first
        spreads = (is_invertible(part) for b in TRELLIS_BITS for part in (matrix[:b, :b], matrix[:b, size - b :]))
        if is_invertible(matrix) and all(spreads):
            break
    places = torch.arange(size - 1, -1, -1)
    bits = torch.arange(WINDOWS)[:, None] >> places & 1
    return ((bits @ matrix.T % 2) << places).sum(-1)


def trained(values: Tensor, steps: dict[int, float], rounds: int, rows: int) -> Tensor:
    """Move `values` [256] to what is encoded by them; `steps`, factors by bits, follow."""
    for _ in range(rounds):
        sums, weights = torch.zeros(WINDOWS), torch.zeros(WINDOWS)
        for bits, weight in WEIGHTS.items():
            x = gaussian(rows, WIDTH, bits)
            windows, step = trellis.search(x, bits, steps[bits] * values).flatten(), steps[bits]
            sums.scatter_add_(0, windows, weight * step * x.flatten())
            weights.scatter_add_(0, windows, torch.full((x.numel(),), weight * step**2))
            kept = values[windows]
            steps[bits] = float((x.flatten() * kept).sum() / (kept * kept).sum())
        values = torch.where(weights > 0, sums / weights.clamp_min(1e-9), values)
    return values


def errors(values: Tensor, steps: dict[int, float], rows: int) -> float:
    """Return the sum of the logarithms of what is left at each number of bits."""
    x, total = gaussian(rows, WIDTH, 0), 0.0
    for bits in TRELLIS_BITS:
        kept = steps[bits] * values[trellis.search(x, bits, steps[bits] * values)]
        total += math.log(float((x - kept).square().mean()))
    return total


def train() -> str:
    """Train a table; return it in hexadecimal."""
    quantiles = math.sqrt(2) * torch.erfinv((2 * torch.arange(WINDOWS) + 1) / WINDOWS - 1)
    found = []
    for seed in track(range(DRAWN), "orders", transient=True):
        steps = dict.fromkeys(TRELLIS_BITS, 1.0)
        values = trained(quantiles[drawn_order(seed)], steps, FIRST_ROUNDS, 100)
        found.append((errors(values, steps, 100), seed, values, steps))
    _, _, values, steps = min(found, key=lambda each: each[:2])
    values = trained(values, steps, ROUNDS, 400)
    unit = float(values.abs().max()) / 127.5
    return bytes((values / unit + 127.5).round().clamp(0, 255).int().tolist()).hex()


def best_step(x: Tensor, bits: int, values: Tensor) -> float:
    """Return the step in which x [n, W] is encoded with the least error."""

    def left(step: float) -> float:
        return float((x - step * values[trellis.closed(x, bits, step * values)]).square().mean())

    return min((codes.STEP[bits] * (0.8 + 0.04 * i) for i in range(12)), key=left)


@click.command()
@click.option("--train", "trains", is_flag=True, help="Train a table and measure it, in place of the one in use.")
def main(trains: bool) -> None:
    """Print what trellis codes leave of a unit Gaussian, beside the best uniform quantizer."""
    text = train() if trains else trellis.TABLE
    values = torch.tensor(list(bytes.fromhex(text)), dtype=torch.float32) - 127.5
    if trains:
        click.echo(text)
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
