"""Moments from which calibrated codecs are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import tiny_gpt2, tiny_llama, token_ids
from transformers import DynamicCache

from benchmarks.quality.methods.calibration_moments import (
    attention_moments,
    from_token_rows,
    head_moments,
    token_moments,
    token_rows,
)

SINKS = 4


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama("eager")


def test_token_rows_are_inverted() -> None:
    x = torch.randn(3, 2, 4, 5, 8)
    assert token_rows(x).shape == (2, 5, 96) and torch.equal(from_token_rows(token_rows(x), 3, 4), x)


def test_moments_of_tokens_are_those_of_all_concatenated_heads(llama: Any) -> None:
    ids = token_ids(3, 40)
    keys, values = token_moments(llama, ids, SINKS)
    heads = head_moments(llama, ids, SINKS)
    assert keys.covariance.shape == (64, 64) and keys.sample.shape == (3 * 36, 64)
    whole = values.covariance + values.mean.outer(values.mean)
    torch.testing.assert_close(whole[16:32, 16:32] * 108, heads[0][1][1], rtol=1e-4, atol=1e-4)  # float32 sums
    torch.testing.assert_close(values.sample.double().mean(0), values.mean, rtol=1e-4, atol=1e-5)
    # rotation preserves the norm of a head's key
    lengths = torch.stack([key.diagonal(dim1=1, dim2=2).sum(1) for key, _ in heads]).flatten()
    whole = keys.covariance + keys.mean.outer(keys.mean)
    torch.testing.assert_close(whole.diagonal().view(4, 16).sum(1) * 108, lengths, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_moments_of_attention_agree_with_a_slow_reference(llama: Any) -> None:
    ids = token_ids(1, 24)
    found = attention_moments(llama, ids, SINKS)[1]
    cache = DynamicCache()
    weights = llama(ids, past_key_values=cache, output_attentions=True).attentions[1][0].double()  # [H, S, T]
    values = cache.layers[1].values[0].double()
    projection = llama.model.layers[1].self_attn.o_proj.weight.double()  # [E, H D]
    expected = torch.zeros(2, 16, 16, dtype=torch.float64)
    for head in range(4):
        own = projection[:, head * 16 : (head + 1) * 16]
        expected[head // 2] += own.T @ own * weights[head, :, SINKS:].square().sum()
    torch.testing.assert_close(found.value_weights, expected, rtol=1e-4, atol=1e-6)
    assert found.key_weights.shape == (2, 16) and bool((found.key_weights > 0).all())
    scored = found.scored_values.diagonal(dim1=1, dim2=2).sum(1)
    assert bool((scored > 0).all()) and values.shape == (2, 24, 16)


@torch.no_grad()
def test_weights_of_keys_predict_the_output_error() -> None:
    """Compare with the mean squared change of a layer's output when one channel of all keys has a little noise."""
    model, ids, channel, size = tiny_gpt2(), token_ids(1, 40), 5, 1e-3
    weight = float(attention_moments(model, ids, 0)[0].key_weights[:, channel].sum())
    module = model.transformer.h[0].attn
    outputs: list[torch.Tensor] = []
    module.register_forward_hook(lambda m, i, output: outputs.append(output[0].double()))
    model(ids)
    bias = 64 + torch.arange(4) * 16 + channel  # this channel in the keys of all heads
    changes = []
    for _ in range(60):
        noise = torch.randn(1, 40, 4) * size
        hook = module.c_attn.register_forward_hook(lambda m, i, output, noise=noise: output.index_add(2, bias, noise))
        model(ids)
        hook.remove()
        changes.append(float((outputs[-1] - outputs[0]).square().sum()))
    expected = weight * size**2
    # 60 draws of 160 elements; heads are summed in the output, and the weights assume them independent
    assert sum(changes) / 60 == pytest.approx(expected, rel=0.2)
