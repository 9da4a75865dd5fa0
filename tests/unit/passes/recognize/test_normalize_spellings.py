"""Rare spellings of the matmuls and the softmax: rewritten, or listed with a reason; none is missed silently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled_twice import compiled_twice, explanations
from torch import Tensor
from torch.nn import functional as F

T, D = 9, 8


def tensors(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*batch, T, D), torch.randn(*batch, T, D), torch.randn(*batch, T, D)


def vecdot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :]).softmax(-1) @ v


def linalg_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v)


def softmin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmin(q @ -k.mT, -1) @ v


def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.inner(torch.inner(q, k).softmax(-1), v.mT)


def chain_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.chain_matmul(torch.chain_matmul(q, k.mT).softmax(-1), v)


def multi_dot_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.multi_dot([q, k.mT @ k / 8, k.mT]).softmax(-1) @ v


def multi_dot_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.multi_dot([(q @ k.mT).softmax(-1), v, v.mT @ v])


@pytest.mark.parametrize("function", [vecdot, linalg_matmul, softmin])
def test_rare_spellings_of_a_batch_are_found(function: Callable[..., Tensor]) -> None:
    sites = compiled_twice(function, tensors(2, 4), tensors(2, 4))
    assert [site.how for site in sites] == ["torch", "torch"]


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("function", [inner, chain_matmul, multi_dot_of_scores, multi_dot_of_values])
def test_rare_spellings_of_matrices_are_found(function: Callable[..., Tensor]) -> None:
    sites = compiled_twice(function, tensors(), tensors())
    assert [site.how for site in sites] == ["torch", "torch"]


def by_a_norm(e: Tensor) -> Tensor:
    return e / torch.linalg.vector_norm(e, 1, -1, keepdim=True)


def by_a_product_with_ones(e: Tensor) -> Tensor:
    return e / (e @ torch.ones(T, 1))


def by_their_length(e: Tensor) -> Tensor:
    return F.normalize(e, p=2, dim=-1)


@pytest.mark.parametrize("weights", [by_a_norm, by_a_product_with_ones, by_their_length])
def test_exponentials_without_a_sum_are_explained(weights: Callable[[Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights((q @ k.mT * 0.3).exp()) @ v

    reasons = explanations(compiled_twice(function, tensors(2, 4), tensors(2, 4)))
    assert len(reasons) == 2 and all(r.startswith("no sum of the exponentials divides them") for r in reasons)


def test_randomly_drawn_weights_are_explained() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.gumbel_softmax(q @ k.mT, dim=-1) @ v

    reasons = explanations(compiled_twice(function, tensors(2, 4), tensors(2, 4)))
    assert (
        reasons == ["calls of gumbel_softmax are not supported; expected softmax or scaled_dot_product_attention"] * 2
    )


def test_exponentials_of_a_projection_are_not_mentioned() -> None:
    layer = torch.nn.Linear(D, D)
    assert compiled_twice(lambda q, k, v: layer(q).exp() @ k.mT @ v, tensors(2, 4), tensors(2, 4)) == []
