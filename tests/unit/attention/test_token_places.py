"""Places of tokens in caches of left-padded sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhopt.attention.token_places import TokenPlaces

NUMBERS = [[3, 2], [0, 4], [1, 4], [9, 4], [4, 4], [2, 0], [5, 1]]  # padding and attention sinks of seven sequences


def places(*numbers: list[int], reach: int = 13) -> TokenPlaces:
    return TokenPlaces(torch.tensor(numbers).unsqueeze(1), reach)


def exchanged(padding: int, sinks: int, tokens: int) -> list[int]:
    order = list(range(tokens))
    for i in range(sinks):
        order[i], order[padding + i] = order[padding + i], order[i]
    return order


def test_first_tokens_after_the_padding_are_in_the_first_places() -> None:
    assert places([3, 2], reach=7).tokens().tolist() == [[3, 4, 2, 0, 1, 5, 6]]


def test_places_are_those_of_one_exchange_after_another() -> None:
    found = places(*NUMBERS, reach=15).tokens().tolist()
    assert found == [exchanged(numbers[0], numbers[1], 15) for numbers in NUMBERS]


@pytest.mark.parametrize("dim", [-1, 2])
def test_the_way_back_is_the_inverse(dim: int) -> None:
    order = places(*NUMBERS)
    x = torch.randn(7, 2, 20, 20)
    moved = order.by_place(x, dim)
    assert torch.equal(order.by_position(moved, dim), x)
    for row, numbers in enumerate(NUMBERS):
        own = x[row : row + 1].index_select(dim, torch.tensor(exchanged(numbers[0], numbers[1], 20)))
        assert torch.equal(moved[row : row + 1], own)


@pytest.mark.parametrize("x", [torch.arange(20), torch.randn(3, 20), torch.rand(1, 1, 3, 20) > 0.5])
def test_values_shared_by_all_sequences_are_reordered_for_each(x: Tensor) -> None:
    order = places(*NUMBERS)
    whole = x.reshape(1, 1, -1, 20).expand(7, -1, -1, -1)
    assert torch.equal(order.by_place(x), order.by_place(whole))
