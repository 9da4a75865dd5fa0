"""Strides of an attention's result, if they are observable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_twice import compiled_twice
from needs import sampled
from torch import Tensor, fx, nn

from fhopt.backend.compile import last_outcome
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.passes.recognize.result_strides import in_order, memory_order

H, D, T = 4, 8, 12
LONG = 300  # number of keys from which few queries use a kernel


class _Block(nn.Module):
    """Attention of the last `queries` tokens, with `after` applied to its result [B, H, S, D]."""

    def __init__(self, after: Callable[[Tensor], Any], queries: int = T, fused: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        self.after, self.queries, self.fused = after, queries, fused

    def forward(self, x: Tensor) -> Any:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        q = q[:, :, -self.queries :]
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * 0.3).softmax(-1) @ v
        return self.after(out)


def returned(o: Tensor) -> Tensor:
    return o


def viewed(o: Tensor) -> Tensor:
    return o.view(o.shape[0], -1)


def viewed_later(o: Tensor) -> Tensor:
    return torch.sigmoid(o * 2).view(o.shape[0], -1)


def in_parts(o: Tensor) -> tuple[Tensor, ...]:
    return o.chunk(2, -1)


def added(o: Tensor) -> Tensor:
    return o.transpose(1, 2) + 1


def tokens_first(o: Tensor) -> Tensor:
    return o.transpose(1, 2).reshape(o.shape[0], -1, H * D)


def strides(result: Any) -> list[tuple[int, ...]]:
    return [t.stride() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("after", "queries", "dynamic"),
    [
        *((after, T, False) for after in (returned, viewed, viewed_later, in_parts, added, tokens_first)),
        (returned, 1, False), (viewed, 1, True), (viewed, T, True), (added, T, True),
    ],
)  # fmt: skip
def test_exact_mode_preserves_the_strides_of_outputs(
    after: Callable[[Tensor], Any], queries: int, dynamic: bool
) -> None:
    tokens = LONG if queries == 1 else T
    module, x = _Block(after, queries).eval(), torch.randn(2, tokens, H * D)
    compiled = torch.compile(module, backend="flashhead", options={"ratio": 1}, dynamic=dynamic)
    with torch.no_grad():
        expected, found = module(x), compiled(x)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.lowered) + len(outcome.compressed) == 1
    assert strides(found) == strides(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def kept_orders(module: nn.Module, x: Tensor) -> list[fx.Node]:
    captured = capture(module, (x,))
    outcome = pipeline.find_attentions(captured.program)
    assert len(outcome.sites) == 1
    return [n for n in captured.program.graph.nodes if n.target is in_order]


def test_no_order_is_enforced_before_a_copy() -> None:
    assert kept_orders(_Block(tokens_first).eval(), torch.randn(2, T, H * D)) == []
    (kept,) = kept_orders(_Block(viewed).eval(), torch.randn(2, T, H * D))
    assert kept.args[1] == [0, 1, 2, 3]


def test_a_fused_kernel_keeps_its_own_order() -> None:
    (kept,) = kept_orders(_Block(returned, fused=True).eval(), torch.randn(2, T, H * D))
    assert kept.args[1] == [0, 2, 1, 3]


def test_strides_of_a_tensor_in_order() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 0, 2]):
        found = in_order(tensor, order)
        assert torch.equal(found, tensor) and memory_order(found) == order
    assert in_order(tensor, [0, 1, 2, 3]).data_ptr() == tensor.data_ptr()


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (heads(q) @ heads(k).mT).softmax(-1) @ heads(v)


RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda o: F.dropout(o, 0.4, training=True),
    "after another step": lambda o: F.dropout(o.sigmoid() * 2, 0.4, training=True),
    "alpha dropout": lambda o: F.alpha_dropout(o, 0.4, training=True),
    "bernoulli": lambda o: torch.bernoulli(o.sigmoid()),
    "in place": lambda o: o * torch.empty_like(o).uniform_(),
    "drawn like it": lambda o: o + torch.rand_like(o) + torch.randn_like(o),
    "normal": lambda o: torch.normal(o, 1.0),
    "rrelu": lambda o: F.rrelu(o, training=True),
    "noise": lambda o: o + torch.poisson(o.abs()),
}


@pytest.mark.parametrize("after", sampled(RANDOM.values(), 3), ids=RANDOM)
def test_random_numbers_are_drawn_in_the_order_of_the_original(after: Callable[[Tensor], Any]) -> None:
    x, y, z = (torch.randn(2, T, H * D) for _ in range(3))
    sites = compiled_twice(lambda q, k, v: tokens_first(after(weighted(q, k, v))), (x, y, z), (y, z, x))
    assert [site.how for site in sites] == ["torch", "torch"]


def inactive(o: Tensor) -> Tensor:
    return F.dropout(o, 0.4, training=False).transpose(1, 2).reshape(-1)


def test_inactive_dropout_has_no_order() -> None:
    assert kept_orders(_Block(inactive).eval(), torch.randn(2, T, H * D)) == []
