"""A model with a retrieval head has the logits of the dense one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_heads import applied, made, skewed, weights
from needs import covering, needs_compiler
from small_models import tiny_gpt2, tiny_llama, token_ids
from torch import nn

from fhopt.codegen.cpu import lm_head
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.errors import FhoptError
from fhopt.lm_head import head_report, unapply_head
from fhopt.lm_head.install import applied_head
from fhopt.lm_head.module import RetrievalHead, dense, stamp_of

pytestmark = needs_compiler


@covering(1, make={"llama": tiny_llama, "gpt2": tiny_gpt2}, dtype=[torch.float32, torch.bfloat16])
def test_generation_equals_that_of_the_dense_head(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    prompt = token_ids(3, 12)
    options: dict[str, Any] = dict(max_new_tokens=25, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, **options)
    applied(model)
    assert torch.equal(model.generate(prompt, **options), expected)
    report = head_report(model)
    assert report.rows >= 60 and report.certified > 0.9
    assert report.dense_rows == round((1 - report.certified) * report.rows)
    unapply_head(model)
    assert type(model.get_output_embeddings()) is nn.Linear and torch.equal(model.generate(prompt, **options), expected)


def test_sampling_among_the_largest_equals_that_of_the_dense_head() -> None:
    model, prompt = tiny_llama(), token_ids(2, 12)
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, top_k=10, top_p=0.9, temperature=1.3)
    torch.manual_seed(7)
    expected = model.generate(prompt, **options)
    applied(model, keep=10)
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_are_below_the_certain_logits_and_close_to_their_own(dtype: torch.dtype) -> None:
    weight, hidden = weights("random", 400, 64, dtype), torch.randn(6, 64).to(dtype)
    head = made(weight, bits="8")
    logits = RetrievalHead(head, weight, None, keep=3, estimates=True)(hidden)
    exact = dense(hidden, weight, None)
    assert torch.equal(logits.topk(3).indices, exact.topk(3).indices)
    assert torch.equal(logits.topk(3).values, exact.topk(3).values)
    assert bool(logits.isfinite().all())
    assert float((logits - exact).float().abs().max()) < 0.03 * float(exact.float().std() * 4)
    normalisers = logits.float().logsumexp(-1) - exact.float().logsumexp(-1)
    assert float(normalisers.abs().max()) < 0.03


def test_beams_with_estimates_equal_those_of_the_dense_head() -> None:
    model, prompt = tiny_llama(), token_ids(1, 12)
    options: dict[str, Any] = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    expected = model.generate(prompt, **options)
    applied(model, keep=6, estimates=True)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert head_report(model).rows >= 8 * 3 - 2


@torch.no_grad()
@pytest.mark.parametrize("batch", [*range(1, 6), 16, 17, 40])
def test_any_batch_has_the_logits_of_the_dense_head(batch: int) -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None, keep=4), torch.randn(batch, 1, 24)
    logits, exact = module(hidden), F.linear(hidden, weight)
    assert logits.shape == exact.shape
    assert torch.equal(logits.topk(4).indices, exact.topk(4).indices)
    known = logits > -math.inf
    torch.testing.assert_close(logits[known], exact[known], rtol=1e-5, atol=1e-6)  # sums in another order
    report = module.report()
    assert report.rows == (batch if batch <= MAX_ROWS else 0)


@torch.no_grad()
def test_a_compiled_graph_has_the_same_logits_and_counts() -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None), torch.randn(3, 24)
    expected = module(hidden)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(hidden), expected) and module.report().rows == 6


@pytest.mark.slow
def test_a_model_compiled_as_a_whole_generates_the_same() -> None:
    model, prompt = tiny_llama(), token_ids(1, 12)
    with torch.no_grad():
        expected = model(prompt).logits[:, -1].argmax(-1)
        applied(model)
        compiled: Any = torch.compile(model, fullgraph=True)
        found = compiled(prompt, logits_to_keep=1).logits[:, -1].argmax(-1)
    assert torch.equal(found, expected) and applied_head(model).report().rows == 1


def test_gradients_go_through_the_dense_head() -> None:
    layer, x = nn.Linear(24, 97, bias=False), torch.randn(2, 24, requires_grad=True)
    module = RetrievalHead(made(layer.weight.detach()), layer.weight, None)
    module(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, -1))


@torch.no_grad()
def test_a_changed_weight_uses_the_dense_head() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module, hidden = RetrievalHead(made(weight.detach()), weight, None), torch.randn(2, 24)
    module(hidden)
    weight.mul_(-1)
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().dense_rows == 2


@torch.no_grad()
def test_other_values_in_the_same_parameter_are_noticed() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module, hidden = RetrievalHead(made(weight.detach()), weight, None), torch.randn(2, 24)
    weight.data = torch.randn(97, 24)  # the version stays the same
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().dense_rows == 2


@torch.no_grad()
def test_a_model_of_another_dtype_uses_the_dense_head_and_its_codes_are_unchanged() -> None:
    weight = nn.Parameter(weights("random", 97, 24), requires_grad=False)
    module = RetrievalHead(made(weight.detach(), skewed(50, 24)), weight, None).to(torch.bfloat16)
    hidden = torch.randn(2, 24).bfloat16()
    assert torch.equal(module(hidden), dense(hidden, module.weight, None)) and module.report().dense_rows == 2
    assert module.centre.dtype == module.radii.dtype == torch.float32
    moved = RetrievalHead(made(weights("random", 97, 24)), nn.Parameter(weights("random", 97, 24)), None).to("cpu")
    assert moved.stamp == stamp_of(moved.weight)


@torch.no_grad()
def test_without_a_compiler_the_head_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("random", 97, 24)
    module, hidden = RetrievalHead(made(weight), weight, None), torch.randn(2, 24)
    monkeypatch.setattr(lm_head, "LIBRARY", replace(lm_head.LIBRARY, bind=lambda _: None))
    assert torch.equal(module(hidden), dense(hidden, weight, None)) and module.report().certified == 0


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 9, "budget": 8}, {"margin": -1.0}, {"probes": 99}])
def test_invalid_searches_are_refused(options: dict[str, Any]) -> None:
    weight = weights("random", 97, 24)
    with pytest.raises(FhoptError, match=next(iter(options))):
        RetrievalHead(made(weight), weight, None, **options)
