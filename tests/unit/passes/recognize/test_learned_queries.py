"""Queries that are a parameter: found with their heads; routers are not rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_twice import compiled_twice, explanations
from needs import sampled
from torch import Tensor, nn
from torch.nn import functional as F

from fhopt.models.capture import capture
from fhopt.passes import pipeline

B, T, S, H, D = 2, 9, 3, 4, 8
WIDTH = H * D


class Pooling(nn.Module):
    """Attention of parameter queries to projected tokens, in the spelling `form`."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor], *queries: int) -> None:
        super().__init__()
        self.form, self.queries = form, nn.Parameter(torch.randn(queries))
        self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def joined(m: Any, mixed: Tensor) -> Tensor:
    result: Tensor = m.o(mixed.transpose(1, 2).flatten(2))
    return result


def by_head(m: Any, x: Tensor) -> Tensor:
    return joined(m, (m.queries @ heads(m.k(x)).mT * 0.3).softmax(-1) @ heads(m.v(x)))


def expanded(m: Any, x: Tensor) -> Tensor:
    queries = m.queries.expand(x.shape[0], -1, -1, -1)
    return joined(m, (queries @ heads(m.k(x)).mT * 0.3).softmax(-1) @ heads(m.v(x)))


def normed_keys(m: Any, x: Tensor) -> Tensor:
    return joined(m, (m.queries @ m.norm(heads(m.k(x))).mT).softmax(-1) @ heads(m.v(x)))


def by_einsum(m: Any, x: Tensor) -> Tensor:
    weights = torch.einsum("hsd,bhtd->bhst", m.queries, heads(m.k(x))).softmax(-1)
    return joined(m, torch.einsum("bhst,bhtd->bhsd", weights, heads(m.v(x))))


def of_one_head(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.o((m.queries @ m.k(x).mT * 0.2).softmax(-1) @ m.v(x))
    return result


def keys_on_the_left(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.o((m.k(x) @ m.queries.mT * 0.2).softmax(1).mT @ m.v(x))
    return result


def by_linear(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.o((F.linear(m.k(x), m.queries) * 0.2).transpose(1, 2).softmax(-1) @ m.v(x))
    return result


def inputs() -> tuple[Tensor]:
    return (torch.randn(B, T, WIDTH),)


@pytest.mark.parametrize(
    ("form", "queries"),
    sampled([
        (by_head, (H, S, D)), (by_head, (1, H, S, D)), (expanded, (1, H, S, D)),
        (normed_keys, (H, S, D)), (by_einsum, (H, S, D)), (of_one_head, (S, WIDTH)), (keys_on_the_left, (S, WIDTH)),
        (by_linear, (S, WIDTH)),
    ], 3),
)  # fmt: skip
def test_attention_of_learned_queries_is_found(form: Callable[[Any, Tensor], Tensor], queries: tuple[int, ...]) -> None:
    module = Pooling(form, *queries).eval()
    sites = compiled_twice(module, inputs(), inputs())
    assert len(sites) == 2 and all(site.how in ("torch", "absorbed") for site in sites)
    outcome = pipeline.find_attentions(capture(module, inputs()).program)
    (site,) = outcome.sites.values()
    assert site.projections == {"q": ("queries",), "k": ("k.weight",), "v": ("v.weight",), "o": ("o.weight",)}
    single = form in (of_one_head, keys_on_the_left, by_linear)
    assert (site.heads, site.kv_heads, site.key_dim) == ((1, 1, WIDTH) if single else (H, H, D))


def router(m: Any, x: Tensor) -> Tensor:
    return F.linear(m.k(x), m.queries).softmax(-1) @ m.queries


def of_raw_tokens(m: Any, x: Tensor) -> Tensor:
    return (m.queries @ x.mT * 0.2).softmax(-1) @ x


@pytest.mark.parametrize("form", [router, of_raw_tokens])
def test_a_softmax_over_a_projection_is_not_rewritten(form: Callable[[Any, Tensor], Tensor]) -> None:
    reasons = explanations(compiled_twice(Pooling(form, S, WIDTH).eval(), inputs(), inputs()))
    reason = "it is over the projection by queries; expected a matmul of queries and keys"
    assert len(reasons) == 2 and all(reason in r for r in reasons)


def test_queries_shared_by_heads_are_not_rewritten() -> None:
    reasons = explanations(compiled_twice(Pooling(by_head, S, D).eval(), inputs(), inputs()))
    assert reasons == ["the heads of the keys share their learned queries; expected queries of each head"] * 2
