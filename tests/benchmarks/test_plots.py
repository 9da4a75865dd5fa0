"""Plots of the committed results: drawn from the current files, and labeled with what their data say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import plots, recording
from benchmarks.cpu import decode
from benchmarks.palette import FHOPT
from benchmarks.recording import RESULTS, ResultsFile, Row, data_hash, read

MACHINE = {"cpu": "a CPU", "cpu_capability": "AVX2", "threads": 1, "gpu": None}


def drawn(name: str) -> Figure:
    """Draw the plot of a committed results file."""
    figure = Figure(layout="constrained")
    plots.PLOTS[name](figure, read(name))
    return figure


def test_every_committed_picture_can_be_redrawn() -> None:
    assert {path.stem for path in RESULTS.glob("*.png")} == {*plots.measured()}


@pytest.mark.parametrize("name", plots.measured())
def test_a_picture_is_drawn_from_the_current_results(name: str) -> None:
    with Image.open(RESULTS / f"{name}.png") as picture:
        assert picture.info["Source"] == data_hash(name), f"redraw it: python -m benchmarks.plots {name}"


@pytest.mark.parametrize("name", plots.measured())
def test_a_plot_has_title_caption_with_hardware_and_axis_labels(name: str) -> None:
    figure = drawn(name)
    assert figure.get_suptitle() and "\n" not in figure.get_suptitle()
    assert read(name).hardware in " ".join(figure.get_supxlabel().split())
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("name", ["decode", "decode-contexts"])
def test_the_speedup_axis_names_the_row_that_is_the_baseline(name: str) -> None:
    results = read(name)
    cases = list(dict.fromkeys(row.case for row in results.of("step_ms")))
    for axes, case in zip(drawn(name).axes, cases, strict=True):
        (baseline,) = (row for row in results.of("step_ms") if row.case == case and row.value == row.baseline)
        assert baseline.impl.startswith(decode.ALTERNATIVES)
        assert axes.get_xlabel().startswith(f"speedup over {decode.in_plot(baseline.impl)}".replace(",\n", ", "))
        assert "fastest in transformers" in axes.get_xlabel()


def test_only_fhopt_has_its_color() -> None:
    rows = tuple(
        Row("batch 1", impl, "step_ms", value, "ms", 4.0, 4.0 / value)
        for impl, value in {"eager, sdpa": 4.0, "grouped by hand, inductor": 2.0, "fhopt exact": 1.0}.items()
    )
    figure = Figure(layout="constrained")
    decode.draw(figure, ResultsFile("decode", MACHINE, {}, "", rows))
    colors = [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches]
    assert [color == FHOPT for color in colors] == [False, False, True]


def test_a_picture_of_older_results_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    rows = [Row("batch 1", impl, "step_ms", 4.0, "ms", 4.0, 1.0) for impl in ("eager, sdpa", "fhopt exact")]
    recording.write("decode", rows)
    path = recording.plot("decode", decode.draw)
    assert path is not None
    with Image.open(path) as picture:
        before = picture.info["Source"]
    recording.write("decode", [rows[0], dataclasses.replace(rows[1], value=5.0)])
    assert before != data_hash("decode")
