"""Attention and masks via transformers' interface, without latents: sink logits, refused options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.hf.attention_interface import _mask, latent_attention_forward
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
    with pytest.raises(FhoptError, match="attention on latents does not support output_attentions"):
        latent_attention_forward(MODULE, *tensors(1), None, output_attentions=True)


# --------------------------------------------------------------------------------------------------- masks


def mask_of(**changed: Any) -> Any:
    """Request a mask as transformers does, for 20 tokens after 12."""
    from transformers.masking_utils import causal_mask_function

    given = dict(batch_size=2, q_length=20, kv_length=32, q_offset=12, mask_function=causal_mask_function)
    return _mask(**given | changed)


@pytest.mark.parametrize("padding", [None, torch.ones(2, 32, dtype=torch.bool)])
def test_a_chunk_after_a_cache_has_no_mask_if_it_is_only_causal(padding: torch.Tensor | None) -> None:
    assert mask_of(attention_mask=padding) is None


def test_a_mask_may_be_requested_by_positional_arguments() -> None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    found = inspect.signature(sdpa_mask).bind(2, 20, 32, 12).arguments
    assert found == dict(batch_size=2, q_length=20, kv_length=32, q_offset=12), "the order of its parameters"
    assert _mask(2, 20, 32, 12, mask_function=causal_mask_function) is None
    assert _mask(2, 20, 40, 12, mask_function=causal_mask_function).shape[-2:] == (20, 40)


@pytest.mark.parametrize("case", ["padding", "window", "function", "places", "not to be left out"])
def test_other_masks_are_those_of_transformers(case: str) -> None:
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    changed: dict[str, Any] = {
        "padding": {"attention_mask": torch.arange(32).expand(2, -1) > 3},
        "window": {"mask_function": sliding_window_causal_mask_function(8), "local_size": 8},
        "function": {"mask_function": lambda b, h, q, k: k <= q + 1},
        "places": {"kv_length": 40},
        "not to be left out": {"allow_is_causal_skip": False},
    }[case]
    given = dict(batch_size=2, q_length=20, kv_length=32, q_offset=12) | changed
    found = mask_of(**changed)
    assert found is not None
    if case not in ("places", "padding", "not to be left out"):
        assert torch.equal(found, sdpa_mask(**given))
    assert found.shape[-2:] == (20, given["kv_length"])
