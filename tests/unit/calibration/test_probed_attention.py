"""Attention that exposes gradients, against autograd and against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fhopt.calibration import probed_attention
from fhopt.ops import masks


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def padded(queries: int, keys: int) -> Tensor:
    """A causal mask; the first sequence begins with 6 tokens of padding, whose queries are fully masked."""
    mask = causal(queries, keys).repeat(2, 1, 1, 1)
    mask[0, :, :, :6] = False
    return mask


BLIND = (torch.arange(20) == 4).unsqueeze(-1)  # a fully masked query


def numbers(queries: int, keys: int) -> Tensor:
    return torch.randn(1, 4, queries, keys).masked_fill(~causal(queries, keys), -math.inf)


MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "causal": causal,
    "bidirectional": lambda queries, keys: None,
    "padded": padded,
    "numbers": numbers,
    "one for all queries": lambda queries, keys: torch.arange(keys) < keys - 3,
    "one for all keys": lambda queries, keys: torch.randn(2, 1, queries, 1).masked_fill(BLIND, -math.inf),
    "window": lambda queries, keys: causal(queries, keys) & ~causal(queries, keys).tril(keys - queries - 6),
}


@pytest.mark.parametrize("keys", [20, 33])
@pytest.mark.parametrize("rows", [7, 128])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("kind", MASKS)
def test_the_probe_gives_the_gradients_that_reach_far_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, kind: str, softcap: float, extra: int, rows: int, keys: int
) -> None:
    """Compare with autograd through an explicit perturbation of quantized tokens, in float64, tile by tile."""
    monkeypatch.setattr(probed_attention, "QUERIES", rows)
    sizes = (4, 20, 16), (2, keys, 16), (2, keys, 8)
    q, k, v = (torch.randn(2, heads, tokens, dim, dtype=torch.float64) for heads, tokens, dim in sizes)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    mask = MASKS[kind](20, keys)
    bias = probed_attention.additive_mask(mask, q)
    sinks = torch.randn(1, 4, 1, extra, dtype=torch.float64) if extra else None
    _, far = masks.split_mask(q, k, None, False, 2, 5)
    seen: list[Tensor] = []
    tiles: list[tuple[Tensor, Tensor]] = []

    def observe(*tensors: Tensor) -> probed_attention.OnGradients:
        seen.extend(tensors)
        return lambda *gradients: tiles.append(gradients)

    probe: Any = probed_attention.ProbedAttention
    out = probe.apply(q, k, v, probed_attention.tiled(q, k, bias, far), sinks, 0.3, softcap, observe)
    weight = torch.randn_like(out)
    own = torch.autograd.grad((out * weight).sum(), (q, k, v))

    dk, dv = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
    expected = _attention(q, (k, dk), (v, dv), bias, sinks, far, softcap)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(out, expected)
    assert torch.equal(seen[0], k) and torch.equal(seen[1], v)
    for probed_gradient, gradient in zip(own, gradients, strict=True):
        torch.testing.assert_close(probed_gradient, gradient)
    given = iter(tiles)
    for start in range(0, 20, rows):
        part = expected[:, :, start : start + rows] * weight[:, :, start : start + rows]
        wanted = torch.autograd.grad(part.sum(), (dk, dv), retain_graph=True)
        if any(gradient.any() for gradient in wanted):
            for probed_gradient, gradient in zip(next(given), wanted, strict=True):
                reached = probed_gradient.shape[2]
                torch.testing.assert_close(probed_gradient, gradient[:, :, :reached])
                assert not gradient[:, :, reached:].any()
    assert not any(gradient.any() for rest in given for gradient in rest)


def _attention(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], bias: Tensor | None, sinks: Tensor | None,
    far: Tensor, softcap: float,
) -> Tensor:  # fmt: skip
    """Attend step by step; quantized keys and values are (value, change), those in the window only values."""
    (k, dk), (v, dv) = ([x.repeat_interleave(2, 1) for x in pair] for pair in (keys, values))
    logits = torch.where(far, q @ (k + dk).mT, q @ k.mT) * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits if bias is None else logits + bias
    hidden = logits == -math.inf
    blind = hidden.all(-1, keepdim=True) if sinks is None else torch.zeros_like(hidden[..., :1])
    logits = logits.masked_fill(blind, 0.0)
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(2, 4, 20, -1)], -1)
    p = logits.softmax(-1)[..., : far.shape[-1]].masked_fill(blind, 0.0)
    return (p * far) @ (v + dv) + (p * ~far) @ v
