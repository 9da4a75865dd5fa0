"""Style of all plots: fhopt in one color, the rest in grays; the finding as title, what was measured as caption."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from benchmarks.recording import ResultsFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

FHOPT = "#d1490c"
FHOPT_TINTS = {"exact": "#f3b391", "4x": "#e5804f", "8x": FHOPT}  # shades of the one color, by size
OTHER = "#a3a8b0"
TEXT = "#52565e"
OTHERS = ("#2f6db5", "#3f8f5b", "#7b5ea7", "#8a6d1f", "#2b8f96", "#a8477f")  # to distinguish single methods


def color_of(impl: str) -> str:
    """Return the color of an implementation."""
    return FHOPT if impl.startswith("fhopt") else OTHER


def describe(figure: Figure, finding: str, about: str, results: ResultsFile) -> None:
    """Set the title to the finding, and the caption to what was measured and on which hardware."""
    figure.suptitle(finding, x=0.01, ha="left", fontsize=11, fontweight="bold")
    caption = textwrap.fill(f"{about}; {results.hardware}", int(17 * figure.get_figwidth()))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color=TEXT)


def plain(axes: Any) -> None:
    """Remove the box around a panel, except for its axes."""
    axes.spines[["top", "right"]].set_visible(False)


def sorted_bars(axes: Any, values: dict[str, float], label: str, show: str = "{:,.0f}") -> None:
    """Draw horizontal bars, longest on top, with their values at the ends."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    names = [name for name, _ in ordered]
    bars = axes.barh(names, [value for _, value in ordered], color=[color_of(name) for name in names])
    axes.bar_label(bars, [show.format(value) for _, value in ordered], padding=3, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel(label, fontsize=8)
    plain(axes)
