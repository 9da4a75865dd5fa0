"""Plots of a plan, drawn by matplotlib: spectrum and bits of the channels of each layer, sensitivity, size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fhopt.calibration.run import Calibration
from fhopt.errors import FhoptError
from fhopt.files import appearing, check_picture
from fhopt.fitting.allocation import channel_nats
from fhopt.plan.expected_loss import expected_loss
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import TIER_QUANTUM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Matrix = NDArray[np.float64]
SIDES = ("keys", "values")


def explain_plan(calibration: Calibration, plan: LatentPlan, path: Path) -> Path:
    """Draw spectrum, bits and sensitivity of each layer to `path` (.png, .svg or .pdf). Raises FhoptError."""
    check_picture(path)
    from matplotlib.figure import Figure

    figure, expected = Figure(figsize=(12, 11), layout="constrained"), expected_loss(plan)
    axes = figure.subplots(3, 2)
    for column, side in enumerate(SIDES):
        _spectrum(figure, axes[0][column], calibration, plan, column)
        _bits(figure, axes[1][column], plan, column)
        axes[0][column].set_title(f"spectrum of {side}: KL of dropping a channel (nats/token)")
        axes[1][column].set_title(f"bits per channel of {side}")
    _sensitivity(axes[2][0], calibration, plan)
    _size(axes[2][1], plan)
    figure.suptitle(
        f"{plan.provenance.get('model', 'plan')}: {plan.ratio():.2f}x, "
        f"expected loss {expected.words if expected else 'unknown'}"
    )
    save_figure(figure, path)
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, atomically. Raises FhoptError."""
    try:
        with appearing(path) as staging:
            figure.savefig(staging, dpi=120)
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error}. Choose a writable .png, .svg or .pdf file.") from error


def _grid(rows: list[list[float]]) -> Matrix:
    """Stack rows of different length into one matrix, padded with NaN."""
    width = max(map(len, rows))
    return np.array([row + [np.nan] * (width - len(row)) for row in rows])


def _spectrum(figure: Figure, axes: Axes, calibration: Calibration, plan: LatentPlan, column: int) -> None:
    from matplotlib.colors import LogNorm  # type: ignore[import-not-found, unused-ignore]

    rows = []
    for site in plan.sites:
        basis = calibration.bases[site.site.name][site.layout][0 if site.is_shared else column]
        rows.append((0.5 * basis.variance.sum(0)).tolist())
    matrix = _grid(rows)
    top = float(np.nanmax(matrix))
    image = axes.imshow(
        np.maximum(matrix, top * 1e-8), aspect="auto", norm=LogNorm(top * 1e-8, top), interpolation="nearest"
    )
    figure.colorbar(image, ax=axes)
    axes.set(xlabel="channel, by decreasing KL", ylabel="site")


def _bits(figure: Figure, axes: Axes, plan: LatentPlan, column: int) -> None:
    rows = [
        [float(tier.bits) for tier in side.tiers for _ in range(tier.width // TIER_QUANTUM)] or [16.0]
        for side in ((s.key, s.value)[column] for s in plan.sites)
    ]
    image = axes.imshow(_grid(rows), aspect="auto", interpolation="nearest", vmin=0, vmax=8, cmap="viridis")
    figure.colorbar(image, ax=axes)
    axes.set(xlabel=f"chunk of {TIER_QUANTUM} channels (blank: 0 bits)", ylabel="site")


def _sensitivity(axes: Axes, calibration: Calibration, plan: LatentPlan) -> None:
    """Plot for each site the expected KL of keys and values with 2 bits in every channel, measured in calibration."""
    position = np.arange(len(plan.sites))
    for column, side in enumerate(SIDES):
        heights = []
        for site in plan.sites:
            at = 0 if site.is_shared else column
            basis = calibration.bases[site.site.name][site.layout][at]
            costs = calibration.costs.get((site.site.name, site.layout, at))
            heights.append(float(channel_nats(basis, costs, 2).sum()))
        axes.bar(position + (column - 0.5) * 0.4, heights, 0.4, label=side)
    axes.set(
        yscale="log",
        xlabel="site",
        ylabel="nats/token",
        title="sensitivity: expected loss with 2 bits in every channel",
    )
    axes.legend()


def _size(axes: Axes, plan: LatentPlan) -> None:
    position = np.arange(len(plan.sites))
    bottom = np.zeros(len(plan.sites))
    for side, sizes in zip(SIDES, _sizes(plan), strict=True):
        axes.bar(position, sizes, bottom=bottom, label=side)
        bottom += sizes
    axes.set(xlabel="site", ylabel="bytes per quantized token", title="size of each site")
    axes.legend()


def _sizes(plan: LatentPlan) -> tuple[Any, Any]:
    keys = np.array([s.key.token_bytes() for s in plan.sites], dtype=np.float64)
    return keys, np.array([s.token_bytes() for s in plan.sites], dtype=np.float64) - keys
