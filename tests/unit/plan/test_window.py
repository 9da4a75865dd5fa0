"""The residual window: token and byte counts, and invalid numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.plan.cache_size import window_bytes
from fhopt.plan.window import ResidualWindow

SIZES = st.builds(ResidualWindow, st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 16]))


@given(window=SIZES, tokens=st.integers(0, 60))
def test_blocks_are_quantized_once_they_are_older_than_the_recent_tokens(window: ResidualWindow, tokens: int) -> None:
    quantized = 0
    for length in range(tokens + 1):
        if length - window.sinks - quantized >= window.capacity:
            quantized += window.block
    assert window.quantized_tokens(tokens) == quantized
    assert int(window.quantized_tokens(torch.tensor(tokens))) == quantized
    first, newest, packed = window.split(tokens)
    assert (first, packed) == (min(tokens, window.sinks), quantized) and first + newest + packed == tokens
    assert (quantized > 0) == (tokens >= window.first_length)


@pytest.mark.parametrize("numbers", [(-1, 8, 8), (4, 0, 8), (4, 8, 0), (4, 8, 8, 4)])
def test_invalid_numbers_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(FhoptError, match=r"sinks=.*, window_bits=.* is invalid; expected sinks of at least 0"):
        ResidualWindow(*numbers)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_plan_has_the_window_of_its_four_fields(bits: int, llama: FittedModel) -> None:
    plan = llama.plan(4, window_bits=bits)
    assert plan.window == ResidualWindow(plan.sinks, plan.recent, plan.block, bits)
    assert replace(plan, recent=24).window.recent == 24
    tokens = plan.window.first_length + 3
    packed = plan.window.quantized_tokens(tokens) * sum(site.token_bytes() for site in plan.sites)
    assert plan.cache_bytes(tokens) == packed + window_bytes(plan.window, tokens, plan.sites)
    if bits == 16:
        exact = sum(2 * site.site.exact_numbers_per_token for site in plan.sites)
        assert window_bytes(plan.window, tokens, plan.sites) == exact * (tokens - plan.block)
