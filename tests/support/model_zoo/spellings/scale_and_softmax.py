"""Spellings of the scale and of the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.functional import weight
from model_zoo.spellings.blocks import LOWEST, SCALE, B, C, D, H, Spellings, T, attend, scores, split

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core()
def scale_on_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scale queries before the matmul: OPT, Whisper, fairseq."""
    return ((q * SCALE) @ k.mT).softmax(-1) @ v


@core()
def scale_on_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divide keys after their transpose."""
    return (q @ (k.transpose(-1, -2) / D**0.5)).softmax(-1) @ v


@core()
def scale_on_both(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """D**-0.25 on each side, for the range of half precision: Whisper by OpenAI, GLIDE."""
    return torch.softmax((q * D**-0.25) @ (k * D**-0.25).mT, -1) @ v


@core()
def scale_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mul_ on the scores, using its result."""
    return (q @ k.mT).mul_(SCALE).softmax(-1) @ v


@core()
def scale_by_augmented_division(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scores /= sqrt(D)`: Falcon."""
    scored = q @ k.mT
    scored /= math.sqrt(D)
    return scored.softmax(-1) @ v


@core()
def scale_by_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divide by the root of a tensor made in the graph: GPT-J, course notes."""
    return ((q @ k.mT) / torch.sqrt(torch.tensor(k.shape[-1], dtype=torch.float32))).softmax(-1) @ v


@core(has=dict(scale=lambda: torch.tensor([float(D)]).sqrt()))
def scale_by_buffer(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divide by a buffer of one number: GPT-J's scale_attn, many tutorials."""
    return (torch.matmul(q, k.mT) / m.scale).softmax(-1) @ v


@whole(has=dict(w_q=weight(C, C, fan=C * D)))
def scale_in_weight(m: Any, x: Tensor) -> Tensor:
    """No explicit scale: folded into W_q, or into the initialization as in T5."""
    _, k, v = m.split(x)
    return m.join((split(F.linear(x, m.w_q)) @ k.mT).softmax(-1) @ v)


@core(has=dict(temperature=lambda: nn.Parameter(torch.full((H, 1, 1), 3.0) + torch.arange(H).view(H, 1, 1))))
def learned_temperature(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention with a learned factor per head."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)) * m.temperature).softmax(-1) @ v


@core(has=dict(logit_scale=lambda: nn.Parameter(torch.full((H, 1, 1), math.log(4.0)))))
def learned_temperature_in_logarithms(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention with a clamped exponential of a learned number per head: Swin v2."""
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (cosine * torch.clamp(m.logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


@core(has=dict(logarithms=lambda: (torch.arange(T) + 2.0).log()))
def scale_by_position(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scale queries by the logarithm of their position: Qwen's log-n scaling, Llama 4."""
    return attend(q * m.logarithms[:, None], k, v, is_causal=True)


@core()
def softmax_over_axis_3(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Count the axis from the front."""
    return F.softmax(scores(q, k), dim=3) @ v


@core()
def softmax_in_float32(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """dtype=float32, then type_as: Llama's habit."""
    return torch.softmax(scores(q, k), dim=-1, dtype=torch.float32).type_as(q) @ v


@core()
def softmax_after_float(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """.float() before and .to() after: llama's reference code."""
    return F.softmax(scores(q, k).float(), dim=-1).to(v.dtype) @ v


@core(has=dict(softmax=lambda: nn.Softmax(dim=-1)))
def softmax_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.Softmax: Swin, Segformer, SAGAN."""
    return m.softmax(scores(q, k)) @ v


@core()
def softmax_out_of_log_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """log_softmax().exp()."""
    return F.log_softmax(scores(q, k), dim=-1).exp() @ v


@core()
def softmax_by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - max) over its sum."""
    s = scores(q, k)
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@core(sites=0, reason="overflow for large scores")
def softmax_by_hand_without_maximum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s) over its sum, without subtracting the maximum: lessons."""
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@core()
def softmax_of_base_2(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp2 with log2(e) in the scale, as in kernels."""
    s = (q @ k.mT) * (SCALE * math.log2(math.e))
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@core()
def softmax_by_logsumexp(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - logsumexp(s)), as in the backward pass of flash attention."""
    s = scores(q, k)
    return (s - s.logsumexp(dim=-1, keepdim=True)).exp() @ v


@core()
def softmax_of_centred_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Subtract the maximum before a softmax, which does so itself: early GPT-NeoX, CogView."""
    s = scores(q, k)
    return (s - s.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1) @ v


@core()
def softmax_divided_at_the_end(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divide after the second contraction: the online softmax of flash attention, in one block."""
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@core(sites=0, reason="overflow for large scores")
def softmax_plus_one(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s) / (1 + sum): a sink of logit zero, "softmax off by one"."""
    e = scores(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@core()
def softmax_plus_one_stable(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute exp(s) / (1 + sum) with the maximum clamped to at least zero."""
    s = scores(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / ((-top).exp() + e.sum(-1, keepdim=True))) @ v


@core()
def softmax_with_padded_column(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Append a sink logit of zero as a column, and drop it afterwards."""
    return F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


@core(has=dict(sinks=weight(H, fan=1)))
def learned_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Append a learned sink logit per head, and drop its column after the softmax: gpt-oss."""
    s = scores(q, k).masked_fill(~m.triangle, LOWEST)
    joined = torch.cat([s, m.sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1] @ v


@core()
def softmax_without_nan(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nan_to_num for fully masked rows."""
    return torch.nan_to_num(scores(q, k).masked_fill(~m.triangle, -math.inf).softmax(-1)) @ v
