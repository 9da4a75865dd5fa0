"""The signature of a call: numbers by value, tensors by shape and type, masks by one element more than the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fhopt.decode.signature import CallSignature, cache_of

LENGTH = 70


def _call(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    named = dict(
        input_ids=torch.zeros(1, 1, dtype=torch.long), attention_mask=mask, use_cache=True, cache=DynamicCache()
    )
    return named | changes


def test_a_call_with_more_cached_tokens_fits() -> None:
    signature = CallSignature((), _call(), LENGTH)
    longer = torch.ones(1, LENGTH + 9, dtype=torch.long)
    assert signature.fits((), _call(), LENGTH)
    assert signature.fits((), _call(attention_mask=longer, input_ids=torch.ones(1, 1, dtype=torch.long)), LENGTH + 8)
    assert not signature.fits((), _call(attention_mask=longer), LENGTH)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False},
        {"use_cache": 1},
        {"attention_mask": None},
        {"input_ids": torch.zeros(2, 1, dtype=torch.long)},
        {"input_ids": torch.zeros(1, 1, dtype=torch.int32)},
        {"cache": None},
        {"cache": object()},
        {"position_ids": None},
        {"attention_mask": {"full_attention": torch.ones(1, LENGTH + 1)}},
    ],
)
def test_other_arguments_do_not_fit(changes: dict[str, Any]) -> None:
    assert not CallSignature((), _call(), LENGTH).fits((), _call(**changes), LENGTH)


def test_positions_and_containers_are_compared() -> None:
    ids = torch.zeros(1, 1, dtype=torch.long)
    signature = CallSignature((ids,), {"embeddings": (ids, ids)}, LENGTH)
    assert signature.fits((ids,), {"embeddings": (ids, ids)}, LENGTH)
    assert not signature.fits((), {"input_ids": ids, "embeddings": (ids, ids)}, LENGTH)
    assert not signature.fits((ids,), {"embeddings": (ids,)}, LENGTH)
    assert not signature.fits((ids,), {"embeddings": [ids, ids]}, LENGTH)


def test_the_cache_is_found_among_the_arguments() -> None:
    call = _call()
    assert cache_of((), call) is call["cache"] and cache_of((1,), {"x": None}) is None
