"""The report of compiled attentions."""

from __future__ import annotations

import pytest
import torch

import fhopt
from fhopt.errors import FhoptError


def test_a_report_before_the_first_call_says_what_to_do() -> None:
    with pytest.raises(FhoptError, match="call the model once"):
        fhopt.report(torch.nn.Linear(2, 2))
