"""Attention via transformers' interface, without latents: masks, sink logits, refused options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.hf.attention_interface import latent_attention_forward
from fhopt.ops.attention import attention_reference
from fhopt.ops.masks import causal_mask

MODULE = torch.nn.Module()
HEADS, KV_HEADS, TOKENS, SIZE = 4, 2, 9, 8


def tensors(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, 1, KV_HEADS, TOKENS, SIZE)
    return torch.randn(1, HEADS, queries, SIZE), key, value


@pytest.mark.parametrize("queries", [1, 3, TOKENS])
def test_without_a_mask_the_last_query_attends_to_all_tokens(queries: int) -> None:
    query, key, value = tensors(queries)
    output, weights = latent_attention_forward(MODULE, query, key, value, None)
    mask = causal_mask(queries, TOKENS, query.device)
    expected = attention_reference(query, key, value, mask, scale=SIZE**-0.5)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


def test_sink_logits_take_weight_and_add_no_value() -> None:
    query, key, value = tensors(3)
    plain, _ = latent_attention_forward(MODULE, query, key, value, None)
    nothing, _ = latent_attention_forward(MODULE, query, key, value, None, s_aux=torch.full((HEADS,), -1e4))
    everything, _ = latent_attention_forward(MODULE, query, key, value, None, s_aux=torch.full((HEADS,), 1e4))
    torch.testing.assert_close(nothing, plain)
    torch.testing.assert_close(everything, torch.zeros_like(plain))


def test_options_that_attention_on_latents_lacks_are_refused() -> None:
    with pytest.raises(FhoptError, match="attention on latents has no output_attentions"):
        latent_attention_forward(MODULE, *tensors(1), None, output_attentions=True)
