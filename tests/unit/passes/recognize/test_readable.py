"""Unsupported tensors: complex, sparse, nested or without elements; each is not rewritten, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_twice import compiled_twice, explanations
from needs import covering
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fhopt.errors import Miss
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.readable import check_readable, left_out

B, H, T, D = 2, 4, 9, 8


def operands(b: int = B, h: int = H, s: int = T, t: int = T, d: int = D, e: int = D) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, h, s, d), torch.randn(b, h, t, d), torch.randn(b, h, t, e)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def by_real_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (as_complex(q) @ as_complex(k).mH).real.softmax(-1) @ v


def by_magnitude(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (as_complex(q) @ as_complex(k).mH).abs().softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhsd,bhtd->bhst", as_complex(q), as_complex(k).conj())
    return scores.real.softmax(-1) @ v


@pytest.mark.parametrize("function", [by_real_part, by_magnitude, by_einsum])
def test_complex_queries_and_keys_are_not_rewritten(function: Callable[..., Tensor]) -> None:
    reasons = explanations(compiled_twice(function, operands(), operands()))
    assert len(reasons) == 2
    assert all("has the dtype complex64; expected real floating-point numbers" in r for r in reasons)


def test_complex_values_are_not_rewritten() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.view_as_real((q @ k.mT).softmax(-1).to(torch.complex64) @ as_complex(v))

    reasons = explanations(compiled_twice(function, operands(), operands()))
    assert len(reasons) == 2 and all("has the dtype complex64" in r for r in reasons)


def test_sparse_tensors_are_not_rewritten() -> None:
    graph = fx.Graph()
    scores = graph.placeholder("scores")
    weights = graph.call_method("softmax", (scores, -1))
    scores.meta["example_value"] = weights.meta["example_value"] = torch.eye(3).to_sparse()
    with pytest.raises(Miss, match="softmax has the layout torch"):
        check_readable(weights)


def block_attention(x: Tensor) -> Tensor:
    return x


def test_calls_named_like_attention_are_explained() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("softmax", (x, -1))
    unknown = graph.call_function(block_attention, (y,))
    graph.output(graph.call_method("relu", (unknown,)))
    (miss,) = left_out(Program(fx.GraphModule({}, graph), {"x": None}), [y])
    assert miss.node is unknown
    assert miss.reason == "calls of block_attention are not supported; expected softmax or scaled_dot_product_attention"


def test_integer_queries_and_keys_are_not_rewritten() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * 8).int() @ (k * 8).int().mT / 64).softmax(-1) @ v

    reasons = explanations(compiled_twice(function, operands(), operands(), gradients=False))
    assert reasons == ["int_1 has the dtype int32; expected real floating-point numbers"]


def test_dequantized_8_bit_operands_are_rewritten() -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).float()

    (site,) = compiled_twice(
        lambda q, k, v: (rounded(q) @ rounded(k).mT).softmax(-1) @ v, operands(), operands(), gradients=False
    )
    assert site.how == "torch"


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def by_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.3).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_a_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


@covering(
    1, function={f.__name__: f for f in (spelled_out, by_exponentials, by_a_call)}, axis=["b", "h", "s", "t", "d", "e"]
)
def test_an_attention_without_elements_is_not_rewritten(function: Callable[..., Tensor], axis: str) -> None:
    size: dict[str, Any] = {axis: 0}
    reasons = explanations(compiled_twice(function, operands(**size), operands(**size)))
    assert len(reasons) == 2 and all("so no elements; expected some" in r for r in reasons)


class Jagged(nn.Module):
    """Attention on jagged tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(H * D, H * D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, [H, D]).transpose(1, 2) for p in self.projections)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2).values()


def jagged(*lengths: int) -> tuple[Tensor]:
    return (torch.nested.as_nested_tensor([torch.randn(n, H * D) for n in lengths], layout=torch.jagged),)


def test_attention_of_jagged_tensors_is_explained() -> None:
    sites = compiled_twice(Jagged().eval(), jagged(9, 5), jagged(4, 7), gradients=False)
    reason = "attention on nested tensors is not rewritten; expected dense, padded tensors"
    assert explanations(sites) and set(explanations(sites)) == {reason}
