"""Sampling from bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_heads import made, weights
from needs import needs_compiler
from torch import Tensor

from fhopt.codegen.cpu.lm_head import search
from fhopt.errors import FhoptError
from fhopt.lm_head.module import RetrievalHead
from fhopt.lm_head.sampling import log_probabilities, sample, top_k

pytestmark = needs_compiler


def module_for(softcap: float = 0.0, scale: float = 1.0) -> tuple[RetrievalHead, Tensor, Tensor]:
    """(head of 800 rows, hidden states [4, 32], their finished logits in float64)."""
    weight, hidden = weights("random", 800, 32), 0.5 * torch.randn(4, 32)
    head = made(weight)
    head = replace(head, site=replace(head.site, softcap=softcap, scale=scale))
    logits = scale * F.linear(hidden.double(), weight.double())
    return RetrievalHead(head, weight, None), hidden, softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (5.0, 1.0), (0.0, 0.25), (5.0, 2.0)])
def test_the_largest_logits_are_finished(softcap: float, scale: float) -> None:
    module, hidden, exact = module_for(softcap, scale)
    logits, ids = top_k(module, hidden, 5)
    assert torch.equal(ids, exact.topk(5).indices)
    torch.testing.assert_close(logits.double(), exact.topk(5).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (5.0, 2.0)])
def test_log_probabilities_are_within_their_bounds(softcap: float, scale: float) -> None:
    module, hidden, exact = module_for(softcap, scale)
    for tokens in (exact.argmax(-1), torch.tensor([0, 100, 200, 799])):
        log_p = exact.log_softmax(-1)[torch.arange(4), tokens]
        low, high = log_probabilities(module, hidden, tokens)
        assert bool((low <= log_p + 1e-5).all()) and bool((log_p <= high + 1e-5).all())
        equal = log_probabilities(module, hidden, tokens, exact=True)
        assert torch.equal(*equal)
        torch.testing.assert_close(equal[0].double(), log_p, rtol=1e-5, atol=1e-5)


def test_what_is_missing_is_at_most_what_is_said() -> None:
    module, hidden, exact = module_for()
    for temperature in (0.7, 1.0, 1.5):
        found = sample(module, hidden, temperature)
        computed = search(hidden, module.weight, None, module.head.codes, module.search_with(keep=64, budget=800))
        p = (exact / temperature).softmax(-1)
        for m, count in enumerate(computed.counts.tolist()):
            outside = 1 - float(p[m, computed.ids[m, :count].long()].sum())
            assert 0 <= outside <= float(found.missing[m]) + 1e-6


def test_samples_have_the_probabilities_of_the_dense_head() -> None:
    module, hidden, exact = module_for()
    generator = torch.Generator().manual_seed(0)
    draws = [sample(module, hidden[:1], top_k=4, top_p=0.95, generator=generator) for _ in range(2000)]
    best = exact[0].topk(4)
    p = best.values.softmax(-1)
    kept = int((p.cumsum(-1) < 0.95).sum()) + 1
    p = p[:kept] / p[:kept].sum()
    ids = torch.cat([d.ids for d in draws])
    shares = torch.stack([(ids == token).double().mean() for token in best.indices[:kept]])
    assert float(shares.sum()) == pytest.approx(1.0)
    assert bool(((shares - p).abs() <= 4 * (p * (1 - p) / 2000).sqrt() + 1e-9).all())  # 4 standard errors
    drawn = {int(d.ids): float(d.log_probabilities) for d in draws}
    for token, probability in zip(best.indices[:kept].tolist(), p.tolist(), strict=True):
        if token in drawn:
            assert drawn[token] == pytest.approx(math.log(probability), abs=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    module, hidden, _ = module_for()
    with pytest.raises(FhoptError, match="expected a positive temperature"):
        sample(module, hidden, **options)
