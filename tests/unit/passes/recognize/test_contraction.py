"""Contractions in every spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fhopt.models.capture import capture
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape
from fhopt.passes.recognize.contraction import Contraction, parse_einsum, read_contraction

Q, K = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)

SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "matmul": (lambda a, b: a @ b.transpose(-1, -2), Q, K),
    "mT": (lambda a, b: torch.matmul(a, b.mT), Q, K),
    "permuted on both sides": (lambda a, b: a.permute(1, 0, 2, 3) @ b.permute(1, 0, 3, 2), Q, K),
    "batch broadcast": (lambda a, b: a @ b.mT, Q, K[:1]),
    "heads broadcast": (lambda a, b: a @ b.mT, Q, K[:, :1]),
    "bmm": (lambda a, b: torch.bmm(a, b.mT), Q[0], K[0]),
    "einsum": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), Q, K),
    "einsum with spaces": (lambda a, b: torch.einsum("b h i d, b h j d -> b h i j", a, b), Q, K),
    "einsum with an ellipsis": (lambda a, b: torch.einsum("...id,...jd->...ij", a, b), Q, K),
    "einsum without a result": (lambda a, b: torch.einsum("id,jd", a, b), Q[0, 0], K[0, 0]),
    "einsum of lists": (lambda a, b: torch.einsum(a, [0, 1, 2], b, [0, 3, 2], [0, 1, 3]), Q[0], K[0]),
    "product and sum": (lambda a, b: (a[..., None, :] * b[..., None, :, :]).sum(-1), Q, K),
    "product and sum, kept": (lambda a, b: (a[..., None, :] * b[..., None, :, :]).sum(-1, keepdim=True), Q, K),
    "vecdot": (lambda a, b: torch.linalg.vecdot(a[..., None, :], b[..., None, :, :]), Q, K),
    "vecdot over another axis": (lambda a, b: torch.linalg.vecdot(a.mT[..., None], b.mT[..., None, :], dim=-3), Q, K),
    "linalg.matmul": (lambda a, b: torch.linalg.matmul(a, b.mT), Q, K),
    "inner": (lambda a, b: torch.inner(a, b), Q, K),
    "inner with a vector": (lambda a, b: torch.inner(a, b), Q, K[0, 0, 0]),
    "linear": (lambda a, b: torch.nn.functional.linear(a, b), Q, K[0, 0]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([3], [1])), Q, K[0, 0]),
}


class Product(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a * 1, b * 1)


def as_einsum(found: Contraction, left: Tensor, right: Tensor) -> Tensor:
    """Compute the contraction as an einsum of its labels, without broadcast axes of size one."""
    sides = []
    for tensor, axes in ((left, found.left_axes), (right, found.right_axes)):
        for position in reversed(range(len(axes))):
            tensor = tensor if axes[position] else tensor.select(position, 0)
        sides.append((tensor, [x for x in axes if x]))
    letters = {x: chr(97 + i) for i, x in enumerate(dict.fromkeys(x for _, axes in sides for x in axes))}
    terms = ["".join(letters[x] for x in axes) for _, axes in sides]
    result_term = "".join(letters[x] for x in found.axes if x)
    result = torch.einsum(f"{terms[0]},{terms[1]}->{result_term}", *(t for t, _ in sides))
    for position, label in enumerate(found.axes):
        result = result if label else result.unsqueeze(position)
    return result


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_labels_describe_the_computation(name: str) -> None:
    function, a, b = SPELLINGS[name]
    program = capture(Product(function), (a, b)).program
    (found,) = [c for c in map(read_contraction, program.graph.nodes) if c is not None]
    base = Evaluator(program)
    values = {n: torch.randn(example_shape(n), dtype=torch.float64) for n in (found.left, found.right)}
    expected = Region(base, values, found.node).run(values)
    torch.testing.assert_close(as_einsum(found, values[found.left], values[found.right]), expected)


@pytest.mark.parametrize("equation", ["ii,ij->j", "aa,ab->b"])
def test_diagonals_are_not_supported(equation: str) -> None:
    assert parse_einsum(equation, [2, 2]) is None
