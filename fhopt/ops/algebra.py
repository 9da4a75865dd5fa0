"""The algebra of latents: encode, decode, absorb, expand, merge by log-sum-exp; bit groups as op arguments.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.ops.attention import safe_softmax
from fhopt.plan.site_plan import BitGroup, SidePlan
from fhopt.system import multiplies_by_loops

# --------------------------------------------------------------------------------------------------- building blocks


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for matmuls of `dtype`: float32 for 16-bit dtypes without a native GEMM on this CPU."""
    by_loops = device.type == "cpu" and not torch.compiler.is_compiling() and multiplies_by_loops(dtype)
    return torch.float32 if by_loops else dtype


def encode(x: Tensor, basis: Tensor) -> Tensor:
    """Encode keys or values x [B,G,T,D] to latents z [B,J,T,R].

    basis [J,R,n*D]: the n = G/J heads of a latent head, concatenated.
    """
    b, g, t, d = x.shape
    j = basis.shape[0]
    rows = x.reshape(b, j, g // j, t, d).transpose(2, 3).reshape(b, j, t, g // j * d)
    return torch.matmul(rows, basis.to(x.dtype).transpose(-1, -2))


def decode(z: Tensor, basis: Tensor) -> Tensor:
    """Decode latents z [B,J,T,R] to approximate keys or values x [B,G,T,D], with basis [G,D,R]."""
    groups = basis.shape[0] // z.shape[1]
    return torch.matmul(z.repeat_interleave(groups, 1), basis.to(z.dtype).transpose(-1, -2))


def absorb(query: Tensor, basis: Tensor) -> Tensor:
    """Absorb the decoder of keys into queries: q [B,H,S,D] -> q~ [B,H,S,R] = D_K^T q, so that q~ . z = q . (D_K z).

    basis [G,D,R].
    """
    b, h, s, d = query.shape
    g, _, r = basis.shape
    return torch.matmul(query.reshape(b, g, h // g * s, d), basis.to(query.dtype)).reshape(b, h, s, r)


def expand(output: Tensor, basis: Tensor) -> Tensor:
    """Expand latent outputs by the decoder of values: o~ [B,H,S,R] -> o [B,H,S,D] = D_V o~, with basis [G,D,R]."""
    b, h, s, r = output.shape
    g, d, _ = basis.shape
    grouped = output.reshape(b, g, h // g * s, r)
    return torch.matmul(grouped, basis.to(output.dtype).transpose(-1, -2)).reshape(b, h, s, d)


def mean_logits(query: Tensor, mean: Tensor) -> Tensor:
    """Compute the logit contribution of a mean of keys [B,G,1,D]: q . m, [B,H,S]."""
    b, h, s, d = query.shape
    grouped = query.reshape(b, mean.shape[1], h // mean.shape[1] * s, d).to(mean.dtype)
    return torch.matmul(grouped, mean.mT).reshape(b, h, s)


def counted_from_mean(lse: Tensor, query: Tensor, mean: Tensor | None, scale: float) -> Tensor:
    """Convert a log weight [B,H,S] to the reference of logits that exclude the mean of keys [B,G,1,D]."""
    return lse if mean is None else lse - scale * mean_logits(query, mean).to(lse.dtype)


def mean_outputs(mean: Tensor, heads: int) -> Tensor:
    """Compute the output contribution of a mean of values [B,G,1,E] for H = `heads` query heads: [B,H,1,E]."""
    return mean.repeat_interleave(heads // mean.shape[1], 1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge attention over disjoint sets of keys by log-sum-exp: [(o [B,H,S,D], lse [B,H,S]), ...] -> o [B,H,S,D]."""
    weights, _ = safe_softmax(torch.stack([lse for _, lse in parts], -1))  # [B, H, S, parts]
    outputs = [o * weights[..., i : i + 1].to(o.dtype) for i, (o, _) in enumerate(parts)]
    return sum(outputs[1:], outputs[0])


def first(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the first of two results, as a graph node."""
    return pair[0]


def second(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the second of two results, as a graph node."""
    return pair[1]


def pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two results as one graph node."""
    return left, right


# --------------------------------------------------------------------------------------------------- bit groups


class BitGroups(NamedTuple):
    """Bit groups of one side as op arguments, one entry per group; empty lists: unquantized latents.

    bits: per quantized value; widths: channels of the group; steps: quantization steps as shares of a token's scale.
    """

    bits: list[int]
    widths: list[int]
    steps: list[float]

    @staticmethod
    def of(tiers: Sequence[BitGroup]) -> BitGroups:
        """Convert a plan's bit groups to op arguments."""
        return BitGroups([t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers])


def bit_groups(side: SidePlan | None) -> BitGroups:
    """Return the bit groups of a side of a plan; None: unquantized keys or values, without groups."""
    return BitGroups.of(side.tiers if side is not None else ())


def group_options(key: BitGroups, value: BitGroups) -> dict[str, Any]:
    """Return the bit-group keyword arguments of `fhopt::latent_attention` and similar ops, for both sides."""
    (kb, kw, ks), (vb, vw, vs) = key, value
    return dict(key_bits=kb, key_widths=kw, key_steps=ks, value_bits=vb, value_widths=vw, value_steps=vs)


def uncoded_options() -> dict[str, Any]:
    """Return the bit-group keyword arguments of `fhopt::latent_attention` for unquantized keys and values."""
    return group_options(bit_groups(None), bit_groups(None))
