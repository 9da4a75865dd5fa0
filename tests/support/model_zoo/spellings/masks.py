"""Spellings of masks, biases, softcap and dropout of the scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.functional import weight
from model_zoo.spellings.blocks import (
    LOWEST,
    WINDOW,
    WINDOWS,
    B,
    C,
    H,
    Spellings,
    T,
    attend,
    float_triangle,
    packs,
    scores,
    table_index,
    with_padding,
)

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core(has=dict(mask=float_triangle))
def mask_added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add a float mask: most of transformers' eager code."""
    return (scores(q, k) + m.mask).softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_as_first_addend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add scores to a mask, which is the first operand."""
    return (m.mask[None, None] + scores(q, k)).softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_added_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scores += mask`: T5."""
    s = scores(q, k)
    s += m.mask
    return s.softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_added_and_clamped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Clamp sums of masks to the least finite number: OPT, XGLM."""
    least = torch.tensor(torch.finfo(q.dtype).min)
    return torch.max(scores(q, k) + m.mask, least).softmax(-1) @ v


@core()
def masked_fill_with_infinity(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill(~allowed, -inf): nanoGPT."""
    return scores(q, k).masked_fill(m.triangle == 0, float("-inf")).softmax(-1) @ v


@core()
def masked_fill_with_least(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill with the least finite number: DistilBERT, x-transformers."""
    return scores(q, k).masked_fill(~m.triangle, -torch.finfo(q.dtype).max).softmax(-1) @ v


@core()
def where_allowed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """where(allowed, scores, -1e30): JAX habits."""
    return torch.where(m.triangle, scores(q, k), -1e30).softmax(-1) @ v


@core()
def where_forbidden(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """where(forbidden, -inf, scores)."""
    return torch.where(~m.triangle, float("-inf"), scores(q, k)).softmax(-1) @ v


@core()
def where_with_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fill with a tensor without axes: GPT-2 in transformers."""
    value = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(m.triangle, scores(q, k).to(q.dtype), value).softmax(-1) @ v


@core()
def masked_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill_ whose result is not used."""
    s = scores(q, k)
    s.masked_fill_(~m.triangle, float("-inf"))
    return s.softmax(-1) @ v


@core()
def masked_by_assignment(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Assign at the places of a bool mask."""
    s = scores(q, k)
    s[:, :, ~m.triangle] = float("-inf")
    return s.softmax(-1) @ v


@core(sites=0, has=dict(ones=lambda: torch.ones(1, 1, T, T).tril()))
def mask_multiplied_and_subtracted(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute s * m - 1e10 * (1 - m) with m of zeros and ones: GPT-2's first release."""
    return (scores(q, k) * m.ones - 1e10 * (1 - m.ones)).softmax(-1) @ v


@core(sites=0)
def masked_exponentials(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multiply the exponentials by the mask before they are summed."""
    e = scores(q, k).exp() * m.triangle
    return (e / e.sum(-1, keepdim=True)) @ v


@core(has=dict(bias=lambda: torch.tril(torch.ones(2 * T, 2 * T)).view(1, 1, 2 * T, 2 * T)))
def triangle_buffer_sliced(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slice a buffer made for the maximum length: minGPT, GPT-2."""
    return scores(q, k).masked_fill(m.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1) @ v


@core()
def causal_from_positions(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compare positions in the graph."""
    position = torch.arange(T, device=q.device)
    return scores(q, k).masked_fill(position[None, :] > position[:, None], -1e9).softmax(-1) @ v


@core()
def causal_from_triu(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.full(-inf).triu(1), added: llama's reference code."""
    return (scores(q, k) + torch.full((T, T), float("-inf")).triu(diagonal=1)).softmax(-1) @ v


@core()
def sliding_window(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Make a causal band of four keys in the graph: Mistral, Gemma."""
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    return attend(q, k, v, attn_mask=(distance >= 0) & (distance < 4))


@core(inputs=with_padding)
def key_padding(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Mask padding by keep [B, T]: [B, 1, 1, T] on the scores."""
    return scores(q, k).masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1) @ v


@core(inputs=with_padding)
def key_padding_as_extended_mask(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """(1 - keep) * least, added: BERT's extended attention mask."""
    extended = (1.0 - keep.unsqueeze(1).unsqueeze(2).to(q.dtype)) * LOWEST
    return (scores(q, k) + extended).softmax(-1) @ v


@core(inputs=with_padding)
def padding_and_causal(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Apply two masks in sequence."""
    s = scores(q, k).masked_fill(~m.triangle, -1e9)
    return s.masked_fill(~keep[:, None, None, :], -1e9).softmax(-1) @ v


@core(has=dict(packs=packs))
def packed_sequences(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Several texts packed into one sequence: a block-diagonal mask from their numbers."""
    same = m.packs[:, None] == m.packs[None, :]
    return attend(q, k, v, attn_mask=same & m.triangle)


@core()
def alibi_in_the_graph(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute slopes and distances in the graph: MPT, Bloom."""
    slopes = torch.pow(2.0, -torch.arange(1, H + 1, dtype=torch.float32) * 8.0 / H)
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    s = scores(q, k) + slopes.view(1, H, 1, 1) * distance
    return s.masked_fill(~m.triangle, LOWEST).softmax(-1) @ v


@core(has=dict(table=weight(2 * T - 1, H, fan=1), index=table_index))
def relative_bias_table(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gather a learned bias per head and distance by an index: Swin, BEiT."""
    bias = m.table[m.index.view(-1)].view(T, T, -1).permute(2, 0, 1).contiguous()
    return (scores(q, k) + bias.unsqueeze(0)).softmax(-1) @ v


@core(has=dict(table=weight(2 * T - 1, H, fan=1)))
def relative_bias_embedding(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Look up a learned bias as an embedding of distances that the graph computes: T5."""
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    bias = F.embedding(distance + T - 1, m.table).permute([2, 0, 1]).unsqueeze(0)
    return attend(q, k, v, attn_mask=bias)


def window_mask() -> Tensor:
    near = torch.zeros(WINDOWS, WINDOW, WINDOW)
    near[-1, :2, 2:] = near[-1, 2:, :2] = -100.0
    return near  # [windows, N, N]: the last window holds two neighborhoods


@core(has=dict(mask=window_mask), inputs=lambda: (torch.randn(B * WINDOWS, WINDOW, C),))
def mask_added_after_view(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Split windows from the batch for the addition, then merge them: Swin."""
    s = scores(q, k).view(B, WINDOWS, H, WINDOW, WINDOW) + m.mask.unsqueeze(1).unsqueeze(0)
    return s.view(-1, H, WINDOW, WINDOW).softmax(-1) @ v


@core()
def softcap(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tanh(s / cap) * cap: Gemma 2, Grok."""
    s = torch.tanh(scores(q, k) / 2.0) * 2.0
    return s.masked_fill(~m.triangle, LOWEST).softmax(-1) @ v


@core(has=dict(drop=lambda: nn.Dropout(0.1)))
def dropout_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.Dropout on the weights, in evaluation."""
    return m.drop(F.softmax(scores(q, k), dim=-1)) @ v


@core(has=dict(heights=weight(H, fan=1)))
def learned_distance_decay(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add a learned slope per head times the logarithm of the distance: KERPLE."""
    distance = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).clamp(min=0)
    bias = -m.heights.abs().view(H, 1, 1) * torch.log1p(distance)
    return (scores(q, k) + bias).masked_fill(~m.triangle, -1e9).softmax(-1) @ v


@whole(has=dict(gate=lambda: nn.Linear(C, H)))
def forget_gate(m: Any, x: Tensor) -> Tensor:
    """Add a bias from accumulated gates of the tokens between query and key: the Forgetting Transformer."""
    q, k, v = m.split(x)
    past = F.logsigmoid(m.gate(x)).cumsum(1).transpose(1, 2)  # [B, H, T]
    bias = (past[..., :, None] - past[..., None, :]).masked_fill(~m.triangle, float("-inf"))
    return m.join(attend(q, k, v, attn_mask=bias))
