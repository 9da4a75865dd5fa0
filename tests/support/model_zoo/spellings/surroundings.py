"""Spellings of the code around core attention: loops, gates, layouts, extra keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.functional import weight
from model_zoo.spellings.blocks import SCALE, WINDOW, WINDOWS, B, C, D, H, Spellings, T, attend, scores, tokens

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@whole(sites=H, heads=1, kv_heads=1)
def loop_over_heads(m: Any, x: Tensor) -> Tensor:
    """Loop over heads in Python and concatenate the results: one site per head."""
    q, k, v = m.q(x).chunk(H, -1), m.k(x).chunk(H, -1), m.v(x).chunk(H, -1)
    return m.o(torch.cat([scores(q[h], k[h]).softmax(-1) @ v[h] for h in range(H)], dim=-1))


@whole(has=dict(gate=lambda: nn.Linear(C, C)))
def gated_output(m: Any, x: Tensor) -> Tensor:
    """Compute o * sigmoid(gate(x)) before the output projection: AlphaFold, Qwen3-Next."""
    o = attend(*m.split(x)).transpose(1, 2).reshape(B, T, C)
    return m.o(o * torch.sigmoid(m.gate(x)))


@whole()
def no_output_projection(m: Any, x: Tensor) -> Tensor:
    """Concatenate heads and add them to the input."""
    return x + attend(*m.split(x)).transpose(1, 2).flatten(2)


@whole()
def weights_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention weights as a second output: need_weights, output_attentions."""
    q, k, v = m.split(x)
    weights = scores(q, k).softmax(-1)
    return m.join(weights @ v), weights


@whole(inputs=lambda: (torch.randn(T, B, C),))
def sequence_first(m: Any, x: Tensor) -> Tensor:
    """[T, B, C] and heads in the batch by view and transpose: fairseq."""
    q, k, v = (p(x).contiguous().view(T, B * H, D).transpose(0, 1) for p in (m.q, m.k, m.v))
    weights = F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1)
    return m.o(torch.bmm(weights, v).transpose(0, 1).contiguous().view(T, B, C))


@whole(inputs=lambda: (torch.randn(T, C),))
def without_batch(m: Any, x: Tensor) -> Tensor:
    """One sequence [T, C], heads in front: [H, T, D]."""
    q, k, v = (p(x).view(T, H, D).transpose(0, 1) for p in (m.q, m.k, m.v))
    return m.o((scores(q, k).softmax(-1) @ v).transpose(0, 1).reshape(T, C))


@core()
def autocast_switched_off(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keep float32 under autocast in a region: GPT-2's reordered attention, diffusion models."""
    with torch.autocast("cpu", enabled=False):
        return scores(q.float(), k.float()).softmax(-1) @ v.float()


@whole(inputs=lambda: (torch.randn(B, WINDOWS, WINDOW, C),))
def along_one_axis(m: Any, x: Tensor) -> Tensor:
    """[B, R, H, T, D]: two batch axes, tokens attend within their row."""
    q, k, v = (p(x).view(B, WINDOWS, WINDOW, H, D).transpose(2, 3) for p in (m.q, m.k, m.v))
    return m.o((scores(q, k).softmax(-1) @ v).transpose(2, 3).flatten(-2))


@whole(has=dict(pair=lambda: nn.Linear(6, H, bias=False)), inputs=lambda: (*tokens(), torch.randn(B, T, T, 6)))
def pair_bias(m: Any, x: Tensor, pairs: Tensor) -> Tensor:
    """Add a bias per head, projected from a table of pairs: AlphaFold, Graphormer."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    s = torch.einsum("bqhc,bkhc->bhqk", q * SCALE, k) + m.pair(pairs).permute(0, 3, 1, 2)
    return m.o(torch.einsum("bhqk,bkhc->bqhc", torch.softmax(s, -1), v).reshape(B, T, C))


@core(has=dict(memory=weight(2, H, 3, D, fan=1)))
def learned_prefix(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Prepend learned keys and values to those of the text: prefix tuning, persistent memory."""
    k = torch.cat([m.memory[0].expand(B, -1, -1, -1), k], dim=2)
    return attend(q, k, torch.cat([m.memory[1].expand(B, -1, -1, -1), v], dim=2))


@core()
def zero_key(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Append a key and a value of zeros: add_zero_attn of nn.MultiheadAttention."""
    k = torch.cat([k, torch.zeros(B, H, 1, D)], dim=2)
    return attend(q, k, F.pad(v, (0, 0, 0, 1)))
