"""Heads computed outside a module are intercepted and searched."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from needs import needs_compiler
from torch import Tensor, nn

from fhopt.lm_head import apply_head, head_report, intercept, unapply_head
from fhopt.lm_head.fitting import find_head, fit_weight
from fhopt.lm_head.head import Head
from fhopt.models.capture import capture

pytestmark = needs_compiler

Finish = Callable[["_Words", Tensor], Tensor]


class _Words(nn.Module):
    """A model that computes logits in its own forward."""

    def __init__(self, finish: Finish) -> None:
        super().__init__()
        self.embedding, self.finish = nn.Embedding(60, 16), finish
        self.shift = nn.Parameter(torch.randn(60))

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self, self.embedding(ids).tanh())


WRITTEN: dict[str, Finish] = {
    "functional": lambda m, x: F.linear(x, m.embedding.weight),
    "with a bias": lambda m, x: F.linear(x, m.embedding.weight, bias=m.shift),
    "product": lambda m, x: x @ m.embedding.weight.T,
    "matmul": lambda m, x: torch.matmul(x, m.embedding.weight.transpose(0, 1)),
    "flat": lambda m, x: torch.mm(x.flatten(0, 1), m.embedding.weight.t()).unflatten(0, x.shape[:2]),
    "addmm": lambda m, x: torch.addmm(m.shift, x.flatten(0, 1), m.embedding.weight.t()).unflatten(0, x.shape[:2]),
    "einsum": lambda m, x: torch.einsum("btc,vc->btv", x, m.embedding.weight),
    "einsum, turned": lambda m, x: torch.einsum("vc, ...c -> ...v", m.embedding.weight, x),
    "capped": lambda m, x: 5 * torch.tanh(0.5 * (x @ m.embedding.weight.mT) / 5),
}


def written(name: str, **options: Any) -> tuple[_Words, _Words, Head]:
    """Return a model, a copy with its head applied, and that head."""
    model = _Words(WRITTEN[name]).requires_grad_(False)
    site = find_head(capture(model, (torch.randint(0, 60, (1, 4)),)))
    head = fit_weight(site, model.embedding.weight, model.shift if site.bias else None)
    plain = copy.deepcopy(model)
    apply_head(model, head, **options)
    return plain, model, head


@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_a_head_outside_a_module_is_searched(name: str) -> None:
    plain, model, _ = written(name, keep=3)
    ids = torch.randint(0, 60, (2, 5))
    logits, expected = model(ids), plain(ids)
    assert torch.equal(logits.topk(3).indices, expected.topk(3).indices)
    known = logits > logits.amin()
    assert 30 <= int(known.sum()) < known.numel()
    torch.testing.assert_close(logits[known], expected[known], rtol=1e-5, atol=1e-5)
    assert head_report(model).rows == 10 and model.state_dict().keys() == plain.state_dict().keys()
    unapply_head(model)
    assert torch.equal(model(ids), expected)


@torch.no_grad()
def test_an_intercepted_head_affects_nothing_else() -> None:
    """Other matmuls, calls after an error, copies, which have their own weights, and another weight."""
    plain, model, _ = written("product")
    ids = torch.randint(0, 60, (1, 3))
    with pytest.raises(IndexError):
        model(ids + 60)
    x = torch.randn(3, 16)
    assert torch.equal(x @ model.embedding.weight.T, x @ plain.embedding.weight.T) and head_report(model).rows == 0
    twin = copy.deepcopy(model)
    twin.embedding.weight.zero_()
    assert not twin(ids).any() and head_report(model).rows == 0
    unapply_head(twin)
    assert bool((model(ids) == -math.inf).any()) and head_report(model).rows == 3
    assert not (twin(ids) == -math.inf).any()
    replaced = nn.Parameter(torch.zeros(60, 16), requires_grad=False)
    model.embedding.weight = replaced
    assert not model(ids).any() and head_report(model).rows == 3


def test_intercepted_heads_search_in_several_threads() -> None:
    plain, model, _ = written("einsum")
    prompts = [torch.randint(0, 60, (1, 4)) for _ in range(16)]

    def best(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).argmax(-1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(best, prompts))
    assert all(torch.equal(a, plain(ids).argmax(-1)) for a, ids in zip(found, prompts, strict=True))
    assert head_report(model).rows == 64


@torch.no_grad()
def test_an_intercepted_head_is_dense_in_compiled_graphs() -> None:
    plain, model, _ = written("functional")
    ids = torch.randint(0, 60, (1, 4))
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids), plain(ids), rtol=1e-5, atol=1e-6)
    assert head_report(model).rows == 0


@torch.no_grad()
def test_an_unrecognized_matmul_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    intercept._warn_unrecognized.cache_clear()
    model = _Words(lambda m, x: (x.unsqueeze(-2) * m.embedding.weight).sum(-1)).requires_grad_(False)
    site = find_head(capture(_Words(WRITTEN["product"]), (torch.randint(0, 60, (1, 4)),)))
    apply_head(model, fit_weight(site, model.embedding.weight))
    with caplog.at_level(logging.WARNING, "fhopt"):
        for _ in range(2):
            model(torch.randint(0, 60, (1, 4)))
    assert len([r for r in caplog.records if "its head stays dense" in r.message]) == 1
