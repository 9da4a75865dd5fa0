"""SnapKV and Expected Attention: which tokens are retained, and their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baseline_caches import SCHEDULE, exact_logits, read, relative_error
from small_models import tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from benchmarks.quality.methods.evicting_caches import Eviction, ExpectedAttention, SnapKV, share_for
from benchmarks.quality.methods.quantized_caches import CacheShape, Schedule
from benchmarks.quality.methods.rotary_embedding import Rotary

SMOLLM2 = CacheShape(layers=30, kv_heads=3, head_dim=64)
AT = 8192
SCORERS = [SnapKV, ExpectedAttention]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def eviction(scorer: Any, share: float, schedule: Schedule = SCHEDULE) -> Eviction:
    return Eviction("some", scorer, schedule, share, 8)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_retaining_all_tokens_changes_nothing(scorer: Any, make: Any) -> None:
    model, ids = make(), token_ids(1, 170)
    found, cache = read(model, eviction(scorer, 1.0), ids)
    torch.testing.assert_close(found, exact_logits(model, ids), rtol=1e-4, atol=1e-4)  # float32 sums
    assert cache.layers[0].keys.shape[2] == cache.get_seq_length() == 170


@pytest.mark.parametrize("scorer", SCORERS)
def test_fewer_tokens_increase_the_loss(llama: Any, scorer: Any) -> None:
    ids = token_ids(1, 298)
    expected = exact_logits(llama, ids)
    errors = [relative_error(read(llama, eviction(scorer, share), ids)[0], expected) for share in (0.1, 0.5, 0.9)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("scorer", SCORERS)
def test_retained_tokens_are_exact_and_in_order_and_the_bytes_are_theirs(llama: Any, scorer: Any) -> None:
    ids = token_ids(1, 298)
    baseline = eviction(scorer, 0.3)
    _, cache = read(llama, baseline, ids)
    _, whole = read(llama, eviction(scorer, 1.0), ids)
    layer, exact = cache.layers[0], whole.layers[0]  # the first layer's inputs do not depend on a cache
    passed = SCHEDULE.quantized(298)
    held = layer.keys.shape[2]
    assert passed == 256 and held == round(0.3 * 256) + 298 - 256
    shape = CacheShape.of(llama)
    # two 16-bit elements, which have 32 bits in this test
    assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) // 2 == baseline.cache_bytes(shape, 298)
    for head in range(2):
        distance = (layer.keys[0, head][:, None] - exact.keys[0, head]).abs().amax(2)
        at = distance.argmin(1)
        assert float(distance.amin(1).max()) < 1e-5 and bool((at.diff() > 0).all())
        assert at[:4].tolist() == [0, 1, 2, 3] and at[-38:].tolist() == list(range(260, 298))


def test_a_call_of_one_token_attends_to_the_retained_tokens(llama: Any) -> None:
    """Compare token-by-token decoding with attention on the retained tokens."""
    ids = token_ids(1, 210)
    baseline = eviction(SnapKV, 0.2)
    _, cache = read(llama, baseline, ids)
    held = cache.layers[0].keys.shape[2]
    with torch.no_grad(), baseline.reading(llama):
        one = llama(ids[:, -1:], past_key_values=cache).logits
    assert cache.get_seq_length() == 211 and cache.layers[0].keys.shape[2] == held + 1 and bool(one.isfinite().all())


def test_snapkv_scores_are_the_weights_of_the_last_queries() -> None:
    scorer = SnapKV(Rotary(None), Schedule(recent=8))
    queries = torch.randn(1, 4, 12, 16)
    scorer.observe(queries[:, :, :5], 0)
    scorer.observe(queries[:, :, 5:], 5)
    keys = torch.randn(1, 2, 12, 16)
    found = scorer.scores(keys, keys, 0.25)
    expected = torch.zeros(2, 12)
    for head in range(4):
        for query in range(4, 12):
            weights = (keys[0, head // 2, : query + 1] @ queries[0, head, query] * 0.25).softmax(0)
            expected[head // 2, : query + 1] += weights / 16  # 8 queries of 2 heads
    pooled = torch.stack([expected[:, max(0, i - 2) : i + 3].mean(1) for i in range(12)], 1)
    torch.testing.assert_close(found[0], pooled, rtol=1e-4, atol=1e-6)


def expected_attention(queries: Tensor, rotary: Rotary, sinks: int = 0) -> ExpectedAttention:
    scorer = ExpectedAttention(rotary, Schedule(sinks=sinks))
    scorer.observe(queries[:, :, :100], 0)
    scorer.observe(queries[:, :, 100:], 100)
    return scorer


def test_expected_attention_is_the_mean_over_normal_queries() -> None:
    """exp(k m s + k C k s^2 / 2) is the mean of exp(k q s) over normal q: compare with the mean over samples."""
    queries = torch.randn(1, 2, 4000, 8) * 0.5 + torch.randn(1, 2, 1, 8)
    keys, values = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    found = expected_attention(queries, Rotary(None)).scores(keys, values, 0.35)
    drawn = (queries @ keys.mT * 0.35).exp().mean(2)  # [B, H, T]
    expected = (drawn / drawn.sum(-1, keepdim=True)).mean(1, keepdim=True) * values.norm(dim=-1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)  # 4,000 samples


def test_expected_attention_rotates_queries_to_the_next_positions(llama: Any) -> None:
    rotary = Rotary.of(llama)
    base = torch.randn(1, 4, 1, 16).expand(1, 4, 200, 16)
    queries = rotary.redo(base, torch.arange(200))  # equal before rotation
    keys, values = torch.randn(1, 2, 30, 16), torch.ones(1, 2, 30, 16)
    found = expected_attention(queries, rotary).scores(keys, values, 0.25)
    mean = rotary.redo(base[:, :, :1].expand(1, 4, 512, 16), torch.arange(200, 712)).mean(2)
    weights = (mean.unflatten(1, (2, 2)) @ keys.mT * 0.25).softmax(-1).mean(2)
    torch.testing.assert_close(found, weights * 4, rtol=1e-3, atol=1e-5)  # the norm of 16 ones


def test_queries_of_sinks_are_excluded_from_expected_attention() -> None:
    queries = torch.randn(1, 2, 150, 8)
    other = queries.clone()
    other[:, :, :4] = 1e3
    keys = torch.randn(1, 1, 20, 8)
    first, second = (expected_attention(q, Rotary(None), 4).scores(keys, keys, 0.3) for q in (queries, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("ratio", [3.2, 8, 12])
def test_the_share_gives_the_bytes_of_a_plan(ratio: float) -> None:
    target = int(AT * SMOLLM2.exact_token_bytes / ratio)
    share = share_for(target, SMOLLM2, Schedule(), AT)
    assert share is not None
    held = eviction(SnapKV, share, Schedule()).cache_bytes(SMOLLM2, AT)
    assert target <= held < target + SMOLLM2.exact_token_bytes


def test_a_plan_smaller_than_the_window_has_no_share() -> None:
    assert share_for(AT * SMOLLM2.exact_token_bytes // 100, SMOLLM2, Schedule(recent=256), AT) is None
