"""Batches that run out before a plan can be made."""

from __future__ import annotations

import pytest
from interrupted_calibration import measure
from small_models import Fitted

from fhopt.errors import FhoptError


def test_no_batch_at_all_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="no calibration batch"):
        measure(llama.captured, count=0)


def test_batches_that_leave_none_to_choose_bits_by_are_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="bits are chosen by others"):
        measure(llama.captured, count=6)
