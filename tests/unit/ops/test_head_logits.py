"""fhopt::head_logits: all logits from the reference, or the kernel's if one is registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.ops import registry
from fhopt.ops.head_logits import head_logits

M, C, V = 3, 8, 20


def arguments(counts: Tensor) -> list[Any]:
    tensors = [torch.randn(M, C), torch.randn(V, C), torch.randn(V), torch.zeros(V, C // 2), None]
    options: list[list[float]] = [[8, 4], [1.0, 1.0], [1, 0, 9, 0], [0.0], [0]]
    return [*tensors, torch.zeros(C), torch.zeros(2, C), torch.zeros(2), counts, *options]


def test_the_reference_computes_all_logits_and_counts_hidden_states_as_dense() -> None:
    before, counts = registry.use("head_logits", "cpu", None), torch.tensor([1, 0, 7])
    try:
        hidden, weight, bias, *others = arguments(counts)
        torch.testing.assert_close(head_logits(hidden, weight, bias, *others), hidden @ weight.T + bias)
    finally:
        registry.use("head_logits", "cpu", before)
    assert counts.tolist() == [1 + M, M, 7]


def test_a_registered_kernel_runs_instead_of_the_reference() -> None:
    def twos(hidden: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return hidden.new_full((len(hidden), len(weight)), 2.0)

    before = registry.use("head_logits", "cpu", twos)
    try:
        assert head_logits(*arguments(torch.zeros(3, dtype=torch.int64))).tolist() == [[2.0] * V] * M
    finally:
        registry.use("head_logits", "cpu", before)
