"""Plain-torch reference functions of opaque composites, one each; `decompose` traces them.

A function takes the arguments of its composite under the same names and returns its results, or the leading ones that
it can compute. `Miss` says which option has no plain form. Nothing here is approximate: results differ from the
composite's only in rounding order.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import functools
import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fhopt.errors import Miss

Composite = Callable[..., "Tensor | tuple[Tensor | None, ...]"]


# --------------------------------------------------------------------------------------------------- torch.nn blocks


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute multi-head attention: [B, S, E] -> [B, S, E], weights. A fully masked row is NaN, as in the composite."""
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(x, weight, bias) for x, weight, bias in parts)
    q, k, v = (x.view(*x.shape[:-1], num_head, embed_dim // num_head).transpose(1, 2) for x in projected)  # [B,H,S,D]
    scores = (q / math.sqrt(embed_dim // num_head)) @ k.transpose(-2, -1)  # [B, H, S, S]
    if mask is not None:
        scores = scores.masked_fill(_forbidden(mask, mask_type), -math.inf)
    weights = scores.softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(query.shape)  # [B, S, E]
    output = F.linear(mixed, proj_weight, proj_bias)
    if not need_weights:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


def _forbidden(mask: Tensor, mask_type: int | None) -> Tensor:
    """Return where the mask forbids attention (True), bool; in a numeric mask, every value but 0 forbids."""
    forbidden = mask.to(torch.bool)
    if mask_type == 1:  # keys: [B, S]
        return forbidden.view(forbidden.shape[0], 1, 1, forbidden.shape[1])
    return forbidden  # 0: [S, S]; 2: [B, H, S, S]


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Compute an encoder layer, [B, S, E] -> [B, S, E]: attention and feed-forward, each with residual and norm."""

    def attend(x: Tensor) -> Tensor:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        attended, _ = native_multi_head_attention(
            x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type
        )
        return attended

    def feed_forward(x: Tensor) -> Tensor:
        x = F.linear(x, ffn_weight_1, ffn_bias_1)
        gelu = "tanh" if x.is_cuda else "none"  # the composite's epilogue on CUDA is the tanh form
        return F.linear(F.gelu(x, approximate=gelu) if use_gelu else F.relu(x), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


# --------------------------------------------------------------------------------------------------- contractions


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """Compute alpha batch1 batch2 + beta input. With beta 0 the input is ignored, even if it is NaN."""
    product = torch.bmm(batch1, batch2)
    product = product if _is(alpha, 1) else product * alpha
    if _is(beta, 0):
        return product
    return product + (input if _is(beta, 1) else input * beta)


def chain_matmul(*matrices: Tensor, out: None = None) -> Tensor:
    """Compute the product of matrices from left to right."""
    return functools.reduce(torch.matmul, matrices)


def multi_dot(tensors: Sequence[Tensor], *, out: None = None) -> Tensor:
    """Compute the product of matrices, of vectors at its ends, from left to right."""
    return chain_matmul(*tensors)


def normalize(input: Tensor, p: float = 1.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """Divide by the sum of absolute values, as F.normalize does for p = 1."""
    return input / input.abs().sum(dim, keepdim=True).clamp_min(eps)


def _is(number: Any, expected: int) -> bool:
    """Return whether a number equals `expected`, without a guard on a symbol."""
    return isinstance(number, (int, float)) and number == expected


def einsum(equation: Any, *operands: Any, tensors: Any = None, path: Any = None) -> Tensor:
    """Contract operands pairwise from left to right: "bhst,bhtd,hde->bse" mixes values, then projects."""
    if not isinstance(equation, str):
        raise Miss("einsum has lists of axis numbers; expected an equation")
    if tensors is None:
        tensors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    terms, output = _labels(equation, [t.dim() for t in tensors])
    result, term = tensors[0], terms[0]
    for i in range(1, len(tensors)):
        needed = {*output, *"".join(terms[i + 1 :])}
        last = i == len(tensors) - 1
        kept = output if last else "".join(c for c in dict.fromkeys(term + terms[i]) if c in needed)
        result, term = torch.einsum(f"{term},{terms[i]}->{kept}", result, tensors[i]), kept
    return result


def _labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Return the labels of each operand and of the result, with an ellipsis and an implicit result written out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(term) + 3 if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    spare = [c for c in string.ascii_letters if c not in equation]
    batch = "".join(spare[: max(hidden)])
    terms = [t.replace("...", batch[len(batch) - n :]) for t, n in zip(terms, hidden, strict=True)]
    if arrow:
        return terms, output.replace("...", batch)
    once = (c for c, n in Counter("".join(terms)).items() if n == 1 and c not in batch)
    return terms, batch + "".join(sorted(once))


# --------------------------------------------------------------------------------------------------- attention calls


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_mask: Tensor | None = None,
    compute_log_sumexp: bool = False,
    return_debug_mask: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor]:
    """Compute `F.scaled_dot_product_attention` for the operators it dispatches to: their first result."""
    if dropout_mask is not None:
        raise Miss("a dropout mask is passed; expected a dropout probability")
    mask = attn_bias if attn_mask is None else attn_mask
    return (_sdpa(query, key, value, mask, dropout_p, is_causal, scale),)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Compute attention [B, H, S, D], with kv heads repeated if there are fewer."""
    grouped = bool(q.dim() > 3 and q.shape[-3] != k.shape[-3])  # for symbolic sizes this comparison adds a guard
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """Compute FlashAttention-2: [B, S, H, D] x [B, T, G, D] -> [B, S, H, D]; the last query attends to the last key."""
    if return_attn_probs:
        raise Miss("the attention probabilities are requested; expected only the output")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D]
    left, right = window_size[0], 0 if causal else window_size[1]
    if not softcap and alibi_slopes is None:
        triangle = bool(left < 0 and right == 0) and _is_square(q, k)
        allowed = None if triangle else _band(_distance(q, k), left, right)
        return _sdpa(q, k, v, allowed, dropout_p, triangle, softmax_scale).transpose(1, 2)
    scores = _scores(q, k) * (1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale)  # [B, H, S, T]
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    if alibi_slopes is not None:  # [H] or [B, H]
        scores = scores - alibi_slopes[..., None, None] * _distance(q, k).abs()
    allowed = _band(_distance(q, k), left, right)
    scores = scores if allowed is None else torch.where(allowed, scores, -math.inf)
    weights = F.dropout(torch._safe_softmax(scores, -1).to(q.dtype), dropout_p, dropout_p > 0)
    return (weights @ _repeated(v, q)).transpose(1, 2)


def _is_square(q: Tensor, k: Tensor) -> bool:
    """Return whether the numbers of queries and keys are equal, without a guard on a symbol."""
    return isinstance(q.shape[2], int) and isinstance(k.shape[2], int) and q.shape[2] == k.shape[2]


def _distance(q: Tensor, k: Tensor, from_the_end: bool = True) -> Tensor:
    """Return key position minus query position, [S, T], aligned at the last (or the first) query and key."""
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(queries, device=q.device) + (keys - queries if from_the_end else 0)
    return torch.arange(keys, device=q.device) - position[:, None]


def _band(distance: Tensor, left: int, right: int) -> Tensor | None:
    """Return the keys a query may attend to, bool [S, T]: `left` before it to `right` after it; negative: no limit."""
    if left < 0:
        return distance <= right if right >= 0 else None
    return (distance >= -left) & (distance <= right) if right >= 0 else distance >= -left


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Repeat kv heads for the query heads: [B, G, T, D] -> [B, H, T, D]."""
    repeats = q.shape[1] // t.shape[1]
    return t if repeats == 1 else t.repeat_interleave(repeats, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Compute q k^T [B, H, S, T] in at least float32."""
    precision = torch.promote_types(q.dtype, torch.float32)
    return q.to(precision) @ _repeated(k, q).to(precision).transpose(-2, -1)


def flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor]:  # fmt: skip
    """Compute the registered form of `flash_attn_func`: its first result."""
    window = (window_size_left, window_size_right)
    return (flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes),)


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, attn_bias: Tensor | None = None,
    dropout_p: float = 0.0, custom_mask_type: int = 0, scale: float | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, compute_log_sumexp: bool = False, compute_logsumexp: bool = False, **rest: Any,
) -> tuple[Tensor]:  # fmt: skip
    """Compute xFormers attention, [B, S, H, D] -> [B, S, H, D].

    custom_mask_type: 0 none, 1 causal, aligned at the first query and key, 2 causal, aligned at the last ones.
    """
    passed = [name for name, option in rest.items() if option is not None]
    if passed:
        raise Miss(f"{passed[0]} is passed; expected sequences of equal length without a window")
    if query.dim() != 4:
        raise Miss(f"operands have rank {query.dim()}; expected 4: [batch, tokens, heads, head size]")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = attn_bias if bias is None else bias
    causal = mask is None and (custom_mask_type == 1 or (custom_mask_type == 2 and _is_square(q, k)))
    if custom_mask_type and not causal:
        allowed = _distance(q, k, custom_mask_type == 2) <= 0
        mask = allowed if mask is None else torch.where(allowed, mask, -math.inf)
    return (_sdpa(q, k, v, mask, dropout_p, causal, scale).transpose(1, 2),)


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False, **quantisation: Any,
) -> Tensor:  # fmt: skip
    """Compute SageAttention without its rounding. Layouts: HND [B, H, S, D], NHD [B, S, H, D]."""
    if return_lse:
        raise Miss("the log-sum-exp is requested; expected only the output")
    if quantisation.get("attn_mask") is not None:
        raise Miss("a mask is passed; expected none")
    tokens_first = tensor_layout == "NHD"
    q, k, v = (t.transpose(1, 2) if tokens_first else t for t in (q, k, v))
    if is_causal and q.shape[2] != k.shape[2]:
        raise Miss(f"causal attention of {q.shape[2]} queries on {k.shape[2]} keys; expected equal numbers")
    out = _sdpa(q, k, v, None, 0.0, is_causal, sm_scale)
    return out.transpose(1, 2) if tokens_first else out


COMPOSITES: dict[str, Composite] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,  # Python code: tracing it gives its operations
    "_native_multi_head_attention": native_multi_head_attention,
    "_transformer_encoder_layer_fwd": transformer_encoder_layer,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "chain_matmul": chain_matmul,
    "linalg_multi_dot": multi_dot,
    "normalize": normalize,  # for p = 1, see `decompose`
    "softmin": F.softmin,
    "_scaled_dot_product_flash_attention_for_cpu": scaled_dot_product,
    "_scaled_dot_product_flash_attention": scaled_dot_product,
    "_scaled_dot_product_efficient_attention": scaled_dot_product,
    "_scaled_dot_product_cudnn_attention": scaled_dot_product,
    "_scaled_dot_product_attention_math": scaled_dot_product,
    "_scaled_dot_product_fused_attention_overrideable": scaled_dot_product,
    "_efficient_attention_forward": efficient_attention,
    "flash_attn::_flash_attn_forward": flash_attn_forward,
    "flash_attn::flash_attn_func": flash_attn_func,
    "xformers::efficient_attention_forward": efficient_attention,
    "xformers::efficient_attention_forward_cutlass": efficient_attention,
    "xformers::efficient_attention_forward_ck": efficient_attention,
    "sageattention::sageattn": sageattn,
}
"""Composite -> what it computes. Torch's own have bare names, those of other packages `package::name`."""
