"""fhopt::attend_latents: its schema, its shapes, and its implementation in fhopt/attention/attend.py."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fhopt.attention.attend import attend_latents_reference
from fhopt.ops.attention import attention_reference
from fhopt.ops.cache_operands import CacheOperands

B, H, G, N, V, D, E, R = 2, 4, 2, 5, 3, 8, 6, 4
NO_GROUPS: dict[str, list[Any]] = {
    f"{side}_{part}": [] for side in ("key", "value") for part in ("bits", "widths", "steps")
}


def operands(quantized: int) -> list[Any]:
    """Return full-precision tokens and unquantized latents of `quantized` tokens; no masks, means or rotation."""
    exact = torch.randn(B, H, 1, D), torch.randn(B, G, N, D), torch.randn(B, G, N, E)
    key = torch.randn(B, G, quantized, R), None, torch.randn(G, D, R)
    value = torch.randn(B, G, quantized, R), None, torch.randn(G, E, R)
    return [*exact, *key, *value, *[None] * 4, *[None] * 4, *[None] * 4, 0]


def run(*given: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.fhopt.attend_latents(*given, **NO_GROUPS, scale=0.3)
    return output


def test_it_equals_attention_on_exact_tokens_and_decoded_latents() -> None:
    query, key, value, key_rows, _, key_decode, value_rows, _, value_decode, *others = operands(V)
    decoded = key_rows @ key_decode.mT, value_rows @ value_decode.mT
    keys, values = torch.cat([key, decoded[0]], 2), torch.cat([value, decoded[1]], 2)
    expected = attention_reference(query, keys, values, None, scale=0.3)
    output = run(query, key, value, key_rows, None, key_decode, value_rows, None, value_decode, *others)
    torch.testing.assert_close(output, expected)


def test_a_graph_infers_the_shape_of_its_output() -> None:
    with FakeTensorMode():
        output = run(*operands(V))
    assert output.shape == (B, H, 1, E) == run(*operands(V)).shape


def test_the_reference_has_the_keywords_of_the_schema() -> None:
    schema = torch.ops.fhopt.attend_latents.default._schema.arguments
    parameters = inspect.signature(attend_latents_reference).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [a.name for a in schema] == [*CacheOperands._fields, *keywords]
    assert [a.name for a in schema if a.kwarg_only] == keywords
