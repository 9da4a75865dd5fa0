"""Function transforms in a compiled graph: their contents are not rewritten, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_twice import compiled_twice, explanations
from needs import sampled
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fhopt.passes.graph.nodes import op_name
from fhopt.passes.graph.transforms import scope_of, transform_scopes, transformed_nodes

T, D = 9, 16
WEIGHTS = tuple(torch.randn(D, D, generator=torch.Generator().manual_seed(i)) / 4 for i in range(3))
GRADIENT, TANGENT, MAP = "torch.func.grad, vjp or jacrev", "torch.func.jvp or jacfwd", "torch.vmap"
EXPECTED = "; expected attention outside of function transforms"


def attention(x: Tensor) -> Tensor:
    q, k, v = (x @ w for w in WEIGHTS)
    return (q @ k.mT).softmax(-1) @ v


def energy(x: Tensor) -> Tensor:
    return attention(x).square().sum()


def grad(x: Tensor) -> Tensor:
    return torch.func.grad(energy)(x)


def grad_and_attention(x: Tensor) -> Tensor:
    return torch.func.grad(energy)(x) + attention(x)


def vjp(x: Tensor) -> Any:
    pulled = torch.func.vjp(attention, x)
    return pulled[1](pulled[0])[0]


def jacrev(x: Tensor) -> Tensor:
    return torch.func.jacrev(lambda y: attention(y).sum(0))(x[0])


def jvp(x: Tensor) -> Any:
    return torch.func.jvp(attention, (x,), (x * 2,))


def jacfwd(x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda y: attention(y).sum(0))(x[0])


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(attention)(x)


def in_place(x: Tensor) -> Tensor:
    def value(y: Tensor) -> Tensor:
        z = y * 2
        z[:, 1:] = y[:, :-1] * 3
        return attention(z.mul_(0.5)).square().sum()

    return torch.func.grad(value)(x)


def of_a_sum(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: attention(torch.baddbmm(y, y, y.mT @ y / 8)).square().sum())(x)


def inputs() -> tuple[Tensor]:
    return (torch.randn(2, T, D),)


@pytest.mark.parametrize(
    ("function", "names"),
    sampled([
        (grad, [GRADIENT]), (grad_and_attention, [GRADIENT]), (vjp, [GRADIENT]), (jacrev, [GRADIENT]), (jvp, [TANGENT]),
        (jacfwd, [TANGENT, MAP]), (mapped, [MAP]), (in_place, [GRADIENT]), (of_a_sum, [GRADIENT]),
    ], 3),
)  # fmt: skip
def test_attention_inside_a_transform_is_not_rewritten(function: Callable[[Tensor], Any], names: list[str]) -> None:
    sites = compiled_twice(function, inputs(), inputs())
    assert explanations(sites) == [f"it runs inside {' and '.join(names)}{EXPECTED}"] * 2
    assert len(sites) == (4 if function is grad_and_attention else 2)


def test_a_composite_inside_a_transform_is_not_rewritten() -> None:
    layer = nn.MultiheadAttention(D, 2, batch_first=True).eval().requires_grad_(False)
    sites = compiled_twice(
        lambda x: torch.vmap(lambda y: layer(y[None], y[None], y[None])[0][0])(x), inputs(), inputs(), gradients=False
    )
    assert explanations(sites) == ["multi_head_attention_forward runs inside torch.vmap; expected it outside"]


def masked_by_map(x: Tensor) -> Tensor:
    at = torch.arange(T)
    mask = torch.vmap(torch.vmap(torch.ge, (None, 0)), (0, None))(at, at)
    q, k, v = (x @ w for w in WEIGHTS)
    return (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v


def biased_by_gradient(x: Tensor) -> Tensor:
    bias = torch.func.grad(lambda y: (y**3).sum())(x[..., :T])
    q, k, v = (x @ w for w in WEIGHTS)
    return (q @ k.mT + bias).softmax(-1) @ v


def written_around_map(x: Tensor) -> Tensor:
    y = torch.vmap(lambda row: (row * 2)[:, None].squeeze(1))(x).clone()
    y[:, 0] = 1
    return attention(torch.vmap(lambda row: row.flip(0))(y)) + y


@pytest.mark.parametrize("function", [masked_by_map, biased_by_gradient, written_around_map])
def test_attention_after_a_transform_is_found(function: Callable[[Tensor], Tensor]) -> None:
    sites = compiled_twice(function, inputs(), inputs())
    assert [site.how for site in sites] == ["torch", "torch"]


def test_scores_computed_inside_a_transform_are_not_rewritten() -> None:
    def function(x: Tensor) -> Tensor:
        q, k, v = (x @ w for w in WEIGHTS)
        return torch.vmap(lambda a, b: a @ b.mT)(q, k).softmax(-1) @ v

    reasons = explanations(compiled_twice(function, inputs(), inputs()))
    assert reasons == ["a part of it runs inside torch.vmap; expected all of it outside"] * 2


def test_linear_layers_inside_a_transform_stay_differentiable() -> None:
    layer = nn.Linear(2048, 2048).requires_grad_(False)  # large enough for fhopt's kernel
    x, y = torch.randn(4, 2048), torch.randn(4, 2048)
    for function in (
        lambda x: torch.func.grad(lambda y: layer(y).square().sum())(x),
        lambda x: torch.func.jvp(layer, (x,), (x.cos(),))[1],
    ):
        compiled_twice(function, (x,), (y,), gradients=False)


def graphs_of(function: Callable[..., Any], *inputs: Tensor) -> list[fx.Graph]:
    found: list[fx.Graph] = []

    def keep(module: fx.GraphModule, _: list[Any]) -> Any:
        found.append(module.graph)
        return module.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep)(*inputs)
    return found


def test_a_scope_reaches_from_beginning_to_end() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(torch.vmap(torch.vmap(torch.sin))(x.exp())) + torch.func.jvp(torch.cos, (x,), (x,))[1]

    (graph,) = graphs_of(function, torch.randn(2, 3))
    first, second = transform_scopes(graph)
    assert (first.name, first.only_maps) == (MAP, True) and (second.name, second.only_maps) == (TANGENT, False)
    inside = transformed_nodes(graph)
    assert {op_name(n): n in inside for n in graph.nodes if op_name(n) in {"sin", "cos", "relu", "exp"}} == {
        "exp": False, "sin": True, "relu": False, "cos": True,
    }  # fmt: skip
    assert all((scope_of(n) is not None) == (n in inside) for n in graph.nodes)
