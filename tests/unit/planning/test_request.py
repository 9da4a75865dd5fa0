"""Fit requests: one size, compatible options, shares as numbers or text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import fhopt
from fhopt.errors import FhoptError
from fhopt.planning.request import read_request


def test_a_misspelled_option_of_python_is_answered_with_the_nearest_name() -> None:
    for name, nearest in (("max_los", "max_loss"), ("batchs", "batches"), ("sequnces", "sequences")):
        with pytest.raises(FhoptError, match=f"{name!r} is not an option of a fit; expected {nearest!r}"):
            fhopt.fit(None, **{name: 1})  # type: ignore[arg-type]


def read(given: tuple[str, ...] = (), options: dict[str, Any] | None = None, **values: Any) -> Any:
    return read_request(options=options or {}, given=given, **values)


def test_the_default_is_a_ratio_of_4() -> None:
    request = read()
    assert request.options.ratio == 4.0 and request.gate is None and request.pages is None
    assert request.needs_model and not request.runs_model


def test_numbers_and_texts_are_parsed_identically() -> None:
    assert read(max_loss=0.01).gate == read(max_loss="1%").gate
    assert read(pages=0.125, mass=0.99).pages == read(pages="1/8", mass="99%").pages
    assert read(pages="1/8").options.segment == 0  # pages apply to whole sequences
    assert read(ratio=8).options.ratio == read(ratio=(8.0,)).options.ratio == 8.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(ratio=4, max_loss=0.01), "mutually exclusive"),
        (dict(ratio=4, bytes_per_token=100.0), "mutually exclusive"),
        (dict(ratio=(4, 8)), "was passed 2 times"),
        (dict(gate_texts=("topics",)), "gate_data requires max_loss"),
        (dict(max_loss=0.01, pages=0.5), "without page selection"),
        (dict(max_loss="much"), "is invalid; expected a share"),
        (dict(max_loss=object()), "is invalid; expected a share"),
        (dict(max_loss=float("nan")), "is invalid"),
        (dict(pages=[1]), "is not a share"),
        (dict(pages=0.125, options={"segment": 512}), "segments"),
        (dict(options={"sinsk": 4}), "'sinsk' is not an option of a fit; expected 'sinks'"),
        (dict(options={"sinks": -1}), "sinks"),
        (dict(statistics="none.stats", given=("sinks",)), "--sinks and --statistics are mutually exclusive"),
        (dict(statistics="none.stats", given=("texts",)), "--data and --statistics are mutually exclusive"),
        (dict(statistics="none.stats"), "none.stats"),
    ],
)
def test_incompatible_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        read(**values)


def test_the_number_of_sequences_counts_only_for_texts() -> None:
    few = {"sequences": 1, "context": 200}
    with pytest.raises(FhoptError, match="more or longer sequences"):
        read(options=few)
    assert read(options=few, has_texts=False).options.sequences == 1


def test_options_are_checked_without_torch() -> None:
    code = "import sys, fhopt.planning.request; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
