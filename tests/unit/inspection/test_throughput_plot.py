"""The plot of `fhopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest

from fhopt.errors import FhoptError
from fhopt.inspection.throughput_plot import PANELS, plot_throughput


def result(*batches: int) -> dict[str, Any]:
    fields = {field: 10.0 for field, _, _ in PANELS}
    rows = [{"context": c, "batch": b, "cache": name, **fields} for b in batches for c in (512, 2048) for name in "ep"]
    about = dict(model="m", dtype="float32", weights_in_blocks=True, device="cpu", rounds=3)
    return about | {"rows": rows}


@pytest.mark.parametrize("batches", [(1,), (1, 4)])
def test_a_line_is_drawn_for_each_cache_and_batch(
    batches: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text, not as outlines
    svg = plot_throughput(result(*batches), tmp_path / "plot.svg").read_text()
    for _, title, _ in PANELS:
        assert f">{title}</text>" in svg
    assert "m: float32, block-quantized weights on cpu, medians of 3 rounds" in svg
    assert (">p, batch 4</text>" in svg) == (len(batches) > 1) and ">2,048</text>" in svg


def test_an_unknown_image_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match=r"expected one that ends in \.png"):
        plot_throughput(result(1), tmp_path / "plot.txt")
