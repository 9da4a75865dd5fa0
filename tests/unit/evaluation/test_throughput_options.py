"""Contexts that fit a model."""

from __future__ import annotations

import pytest

from fhopt.errors import FhoptError
from fhopt.evaluation.throughput_options import CONTEXTS, ThroughputOptions


def test_default_contexts_end_with_the_model() -> None:
    assert ThroughputOptions().within(None).contexts == ThroughputOptions().within(9000).contexts == CONTEXTS
    assert ThroughputOptions().within(4096).contexts == (512, 2048, 4096)
    assert ThroughputOptions().within(200).contexts == (200,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ThroughputOptions((9000,)), "a context of 9000 tokens is too long; expected at most 4096"),
        (ThroughputOptions((64,)), "no room for a prompt"),
        (ThroughputOptions(decode=0), "0 tokens to generate"),
        (ThroughputOptions(rounds=-2), "-2 rounds"),
        (ThroughputOptions(seed=-1), "seed -1"),
        (ThroughputOptions(decode=5000), "a context of 512 tokens has no room"),
    ],
)
def test_invalid_numbers_are_refused(options: ThroughputOptions, message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        options.check()
        options.within(4096)
