"""The algebra of latents: encode, decode, absorb, merge by log-sum-exp, and the arguments of ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fhopt.ops.attention import safe_softmax
from fhopt.plan.site_plan import SidePlan

TierArguments = tuple[list[int], list[int], list[float]]  # bits, widths, steps of a side; empty: uncoded


def page_logits(logits: Tensor, tokens: int) -> Tensor:
    """Log of the weight of each page: [B,H,S,T] -> [B,H,S,P]; the last page may be short."""
    short = -logits.shape[-1] % tokens
    padded = torch.nn.functional.pad(logits, (0, short), value=-math.inf) if short else logits
    return padded.unflatten(-1, (-1, tokens)).logsumexp(-1)


# --------------------------------------------------------------------------------------------------- building blocks


def encode(x: Tensor, basis: Tensor) -> Tensor:
    """x [B,G,T,D] -> z [B,J,T,R] with basis [J,R,n*D]: the n = G/J heads of a latent head, side by side."""
    b, g, t, d = x.shape
    j = basis.shape[0]
    rows = x.reshape(b, j, g // j, t, d).transpose(2, 3).reshape(b, j, t, g // j * d)
    return torch.matmul(rows, basis.to(x.dtype).transpose(-1, -2))


def decode(z: Tensor, basis: Tensor) -> Tensor:
    """z [B,J,T,R] -> x [B,G,T,D] with basis [G,D,R]: what the encoder kept of keys or values."""
    groups = basis.shape[0] // z.shape[1]
    return torch.matmul(z.repeat_interleave(groups, 1), basis.to(z.dtype).transpose(-1, -2))


def absorb(query: Tensor, basis: Tensor) -> Tensor:
    """q [B,H,S,D] -> q~ [B,H,S,R] = D_K^T q with basis [G,D,R], so that q~ . z = q . (D_K z)."""
    b, h, s, d = query.shape
    g, _, r = basis.shape
    return torch.matmul(query.reshape(b, g, h // g * s, d), basis.to(query.dtype)).reshape(b, h, s, r)


def expand(output: Tensor, basis: Tensor) -> Tensor:
    """o~ [B,H,S,R] -> o [B,H,S,D] = D_V o~ with basis [G,D,R]."""
    b, h, s, r = output.shape
    g, d, _ = basis.shape
    grouped = output.reshape(b, g, h // g * s, r)
    return torch.matmul(grouped, basis.to(output.dtype).transpose(-1, -2)).reshape(b, h, s, d)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Join attention over disjoint sets of keys: [(o [B,H,S,D], lse [B,H,S]), ...] -> o, by log-sum-exp."""
    weights, _ = safe_softmax(torch.stack([lse for _, lse in parts], -1))  # [B, H, S, parts]
    outputs = [o * weights[..., i : i + 1].to(o.dtype) for i, (o, _) in enumerate(parts)]
    return sum(outputs[1:], outputs[0])


def first(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The first of two results, as a graph node can name it."""
    return pair[0]


def second(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The second of two results."""
    return pair[1]


def pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two results as one node."""
    return left, right


def tier_arguments(side: SidePlan | None) -> TierArguments:
    """The op arguments (bits, widths, steps) of a side; three empty lists for uncoded latents."""
    tiers = side.tiers if side is not None else ()
    return [t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers]


def latent_options(key: SidePlan | None, value: SidePlan | None) -> dict[str, object]:
    """Keyword arguments of `fhopt::latent_attention` for the tiers of a site; None: exact keys and values."""
    return tier_options(tier_arguments(key), tier_arguments(value))


def tier_options(key: TierArguments, value: TierArguments) -> dict[str, object]:
    """The same from what `tier_arguments` gave."""
    (kb, kw, ks), (vb, vw, vs) = key, value
    return dict(key_bits=kb, key_widths=kw, key_steps=ks, value_bits=vb, value_widths=vw, value_steps=vs)
