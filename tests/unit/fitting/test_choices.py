"""Choices of a fit, checked without torch."""

from __future__ import annotations

import math

import pytest
from imports import imported_by

from fhopt.errors import FhoptError
from fhopt.fitting import choices


@pytest.mark.parametrize("ratio", [0.5, 1000.0, math.nan, math.inf, -1.0])
def test_an_invalid_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(FhoptError, match="is invalid; expected a number from 1"):
        choices.check_options(ratio, choices.AUTO, choices.BITS)


def test_invalid_layouts_and_bits_are_refused() -> None:
    with pytest.raises(FhoptError, match="layout 'x' is unknown"):
        choices.check_layouts(["x"])
    with pytest.raises(FhoptError, match=r"bits \[7\] are invalid"):
        choices.check_options(4.0, choices.AUTO, (7,))
    with pytest.raises(FhoptError, match="have no kernel for h100"):
        choices.check_options(4.0, choices.AUTO, (3,), "h100")


def test_a_device_has_its_grain() -> None:
    assert choices.grain_of(choices.BITS, "h100") == choices.Grain(choices.GPU_BITS, choices.PLANE)
    assert choices.grain_of((4, 2), None).least == 16


def test_they_need_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.fitting.choices", "fhopt.calibration.options", "fhopt.refine.page_options")
