"""Options of a retrieval head, checked without torch."""

from __future__ import annotations

import pytest
from imports import imported_by

from fhopt.errors import FhoptError
from fhopt.lm_head.options import HeadOptions


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (HeadOptions(bits="3"), "bits '3' is invalid"),
        (HeadOptions(clusters=0), "clusters is 0"),
        (HeadOptions(sequences=0), "sequences is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: HeadOptions, reason: str) -> None:
    with pytest.raises(FhoptError, match=reason):
        options.check()


def test_they_need_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.lm_head.options")
