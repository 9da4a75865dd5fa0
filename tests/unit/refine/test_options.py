"""Options of healing and of a loss target, checked without torch."""

from __future__ import annotations

import math

import pytest
from imports import imported_by

from fhopt.errors import FhoptError
from fhopt.refine.options import Gate, HealOptions, read_loss


def test_losses_are_shares() -> None:
    assert read_loss("1%") == 0.01
    with pytest.raises(FhoptError, match="max_loss 'low' is invalid"):
        read_loss("low")
    with pytest.raises(FhoptError, match="is invalid"):
        Gate(math.nan).check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (HealOptions(context=1), "expected a context of at least 2"),
        (HealOptions(tokens=1), "make 0 sequences"),
        (HealOptions(ridge=math.inf), "expected a finite number"),
    ],
)
def test_an_invalid_healing_is_refused(options: HealOptions, reason: str) -> None:
    with pytest.raises(FhoptError, match=reason):
        options.check()


def test_they_need_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.refine.options")
