"""The canonical operations, as `torch.library` ops with an eager reference and a fake.

    fhopt::attention         q [B,H,S,D]    k [B,G,T,D]  v [B,G,T,E]            -> o [B,H,S,E]
    fhopt::latent_attention  q~ [B,H,S,R_K] z_K [B,J,T,..] z_V [B,J',T,..]      -> o~ [B,H,S,R_V], lse [B,H,S]
    fhopt::pack              z [...,R]                                          -> codes [...,bytes], scale [...]
    fhopt::unpack            codes, scale                                       -> z [...,R]

Latent attention *is* grouped-query attention over J latent heads, so the exact part of a cache (sinks, window, fresh
tokens) runs through the same op with uncoded keys and values; parts are merged by log-sum-exp (`merge`).

A row of codes holds its tiers one after the other, each tier as bit planes. Their widths are the powers of two that sum
to the tier's bits, widest first, and the widest holds the high-order bits: 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2 bits are
two planes; 1, 2, 4 and 8 bits are one. A plane holds its part of all codes of the tier, low-order codes first within a
byte, and starts on a whole byte: kernels only meet lanes of 1, 2, 4 and 8 bits. The codes 5, 3, 0, 0, 0, 0, 0, 4 of 3
bits are 10|1, 01|1, 00|0, ..., 10|0, hence

    plane of 2 bits  00000110 10000000      plane of 1 bit  00000011

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.spec import SidePlan

_LIB = torch.library.Library("fhopt", "DEF")
_LIB.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? sinks=None, *, float scale, "
    "bool is_causal=False, float softcap=0.0, float dropout=0.0) -> Tensor"
)
_LIB.define("pack(Tensor latent, int[] bits, int[] widths, float[] steps) -> (Tensor, Tensor)")
_LIB.define("unpack(Tensor codes, Tensor scale, int[] bits, int[] widths, float[] steps) -> Tensor")
_LIB.define(
    "latent_attention(Tensor query, Tensor key, Tensor? key_scale, Tensor value, Tensor? value_scale, Tensor? mask, *, "
    "int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, "
    "float scale, float softcap=0.0, Tensor? lengths=None, Tensor? pages=None, int page_tokens=0) -> (Tensor, Tensor)"
)

TierArguments = tuple[list[int], list[int], list[float]]  # bits, widths, steps of a side; empty: uncoded
LatentKernel = Callable[..., tuple[Tensor, Tensor]]
PackKernels = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]  # of `pack` and of `unpack`


# --------------------------------------------------------------------------------------------------- masks


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add to logits: bool (True = may attend) becomes 0 and -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool [S, T]: query i may see key j where j <= i + T - S (the last query sees everything)."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


def within(lengths: Tensor | None, tokens: int, mask: Tensor | None) -> Tensor | None:
    """`mask` [B,H,S,T] restricted to the first `lengths` (int64, [B] or one number) of T = `tokens` tokens."""
    if lengths is None:
        return mask
    seen = torch.arange(tokens, device=lengths.device) < lengths.reshape(-1, 1, 1, 1)
    return seen if mask is None else restricted(mask, seen)


def listed(pages: Tensor | None, page_tokens: int, heads: int, tokens: int, mask: Tensor | None) -> Tensor | None:
    """`mask` [B,H,S,T] restricted to the tokens of listed pages.

    pages, integers [B,U,N]: page p is the tokens from p * page_tokens on, -1 is none; query head h reads list h*U//H.
    Raises ValueError for pages without tokens, or of units that query heads cannot be shared out to.
    """
    if pages is None:
        return mask
    if page_tokens < 1 or heads % pages.shape[1]:
        raise ValueError(
            f"pages {tuple(pages.shape)} of {page_tokens} tokens for {heads} query heads; expected [B, U, N], U a "
            "divisor of the heads, and pages of at least one token."
        )
    count = -(-tokens // page_tokens)
    places = torch.where(pages < 0, count, pages).long()  # the last for what is no page
    chosen = torch.zeros((*pages.shape[:2], count + 1), dtype=torch.bool, device=pages.device).scatter_(2, places, True)
    seen = chosen[..., :count].repeat_interleave(page_tokens, 2)[..., :tokens]
    seen = seen.repeat_interleave(heads // pages.shape[1], 1).unsqueeze(2)  # [B, H, 1, T]
    return seen if mask is None else restricted(mask, seen)


def blank_scores(
    left: Tensor, right: Tensor, left_axes: Sequence[str], right_axes: Sequence[str], axes: Sequence[str]
) -> Tensor:
    """Zeros of the shape of a contraction of `left` and `right` (labels as in `passes.contraction`), in no memory."""
    sizes = dict((*zip(left_axes, left.shape, strict=True), *zip(right_axes, right.shape, strict=True)))
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.new_zeros((), dtype=dtype).expand([sizes[x] if x else 1 for x in axes])


# --------------------------------------------------------------------------------------------------- fhopt::attention


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    dropout: float = 0.0,
    fused: bool = True,
) -> Tensor:
    """softmax(cap(scale q k^T) + mask) v with grouped kv heads; differentiable. Shapes in the module docstring.

    `is_causal` aligns the first query with the first key, as `F.scaled_dot_product_attention` does. `sinks`,
    broadcastable to [B,H,S,n], are n further logits that take weight and give nothing (attention sinks, softmax plus
    one). fused: False, never by `F.scaled_dot_product_attention` (see `passes.lower`). Raises ValueError when H is
    not a multiple of G.
    """
    heads, groups = query.shape[1], key.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} kv heads")
    if fused and softcap == 0.0 and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=heads != groups
        )
    if is_causal:
        triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = triangle if mask is None else restricted(mask, triangle)
    logits = grouped_scores(query * scale, key)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = additive(mask, logits.dtype)
    logits = logits if bias is None else logits + bias
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(logits.dtype).expand(*logits.shape[:3], -1)), -1)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    weights = _softmax(exact)[0][..., : key.shape[2]].to(query.dtype)
    weights = torch.dropout(weights, dropout, dropout > 0)
    return grouped_mix(weights, value)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """q [B,H,S,D] . k [B,G,T,D] -> [B,H,S,T]: the H/G query heads of a kv head become extra queries."""
    b, h, s, d = query.shape
    g, t = key.shape[1], key.shape[2]
    grouped = query.reshape(b, g, h // g * s, d)
    return torch.matmul(grouped, key.transpose(-1, -2)).reshape(b, h, s, t)


def grouped_mix(weights: Tensor, value: Tensor) -> Tensor:
    """p [B,H,S,T] . v [B,G,T,E] -> [B,H,S,E]."""
    b, h, s, t = weights.shape
    g, e = value.shape[1], value.shape[3]
    return torch.matmul(weights.reshape(b, g, h // g * s, t), value).reshape(b, h, s, e)


# --------------------------------------------------------------------------------------------------- pack and unpack


def pack_reference(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Round latents to codes. latent [..., R] -> codes uint8 [..., sum(bits*widths)/8], scale float16 [...].

    The scale of a token is the root mean square of its channels with fewer than 16 bits. Codes are stored as bit planes
    (module docstring), channels of 16 bits as float16 bytes.
    """
    x = latent.to(torch.float32)
    coded = [i for i, b in enumerate(bits) if b < 16]
    parts = list(x.split(list(widths), -1))
    scale = x.new_zeros(x.shape[:-1])
    if coded:
        energy = sum((parts[i] ** 2).sum(-1) for i in coded)
        scale = torch.sqrt((energy / sum(widths[i] for i in coded)).double()).float()  # correctly rounded
    scale = scale.clamp(2.0**-14, 65504.0).to(torch.float16)
    inverse = scale.to(torch.float32).reciprocal().unsqueeze(-1)
    rows = [
        _half_bytes(part) if b == 16 else integer_bytes(part * inverse, b, step)
        for part, b, step in zip(parts, bits, steps, strict=True)
    ]
    return torch.cat(rows, -1), scale


def rounded(x: Tensor, bits: int, step: float) -> Tensor:
    """Numbers as a mid-rise quantiser of `bits` bits and this step leaves them; the token scale is the caller's."""
    half = 2 ** (bits - 1)
    return (torch.floor(x / step).clamp(-half, half - 1) + 0.5) * step


def _half_bytes(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).to(torch.float16).contiguous().view(torch.uint8)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that hold a tier of `bits` < 16 bits, widest (high-order bits) first: 6 -> (4, 2)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def integer_bytes(x: Tensor, bits: int, step: float) -> Tensor:
    """Uniform mid-rise quantiser, then bit planes. x [..., W] -> uint8 [..., W*bits/8]."""
    levels = 2**bits
    codes = (torch.floor(x / step) + levels // 2).clamp(0, levels - 1).to(torch.uint8)
    widths = planes(bits)
    rows = [_plane_bytes(codes >> sum(widths[i + 1 :]), width) for i, width in enumerate(widths)]
    return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def _plane_bytes(codes: Tensor, width: int) -> Tensor:
    """The low `width` bits of each code, 8/width codes to a byte. uint8 [..., W] -> uint8 [..., W*width/8]."""
    if width == 8:
        return codes
    lanes = (codes & (2**width - 1)).unflatten(-1, (-1, 8 // width))
    out = lanes[..., 0]
    for lane in range(1, 8 // width):
        out = out | (lanes[..., lane] << (width * lane))
    return out


def unpack_reference(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    """Inverse of `pack_reference` up to rounding: codes uint8 [..., bytes], scale [...] -> float32 [..., R]."""
    unit = unscaled(codes, bits, widths, steps)
    factors = scale.to(torch.float32).unsqueeze(-1)
    if all(b < 16 for b in bits):
        return unit * factors
    parts = unit.split(list(widths), -1)
    return torch.cat([p if b == 16 else p * factors for p, b in zip(parts, bits, strict=True)], -1)


def unscaled(codes: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    """Codes as float32 [..., R] without the token scale: (u - (2^bits - 1)/2) * step, or the float16 value."""
    rows = codes.split([w * b // 8 for w, b in zip(widths, bits, strict=True)], -1)
    parts = [_values(row, b, step) for row, b, step in zip(rows, bits, steps, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _values(row: Tensor, bits: int, step: float) -> Tensor:
    if bits == 16:  # copied: a view must start at an even byte, and a row that 3 bits or so come before may not
        return row.clone(memory_format=torch.contiguous_format).view(torch.float16).to(torch.float32)
    return (_codes(row, bits).to(torch.float32) - (2**bits - 1) / 2) * step


def _codes(row: Tensor, bits: int) -> Tensor:
    """Bit planes -> codes. uint8 [..., W*bits/8] -> uint8 [..., W]."""
    widths = planes(bits)
    sizes = [row.shape[-1] // bits * width for width in widths]
    codes, *rest = [_lanes(plane, width) for plane, width in zip(row.split(sizes, -1), widths, strict=True)]
    for plane, width in zip(rest, widths[1:], strict=True):
        codes = codes << width | plane
    return codes


def _lanes(plane: Tensor, width: int) -> Tensor:
    """Inverse of `_plane_bytes`. uint8 [..., W*width/8] -> uint8 [..., W]."""
    if width == 8:
        return plane
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    return ((plane.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(-2)


def _pack_fake(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    size = sum(b * w for b, w in zip(bits, widths, strict=True)) // 8
    shape = latent.shape[:-1]
    return latent.new_empty((*shape, size), dtype=torch.uint8), latent.new_empty(shape, dtype=torch.float16)


def _unpack_fake(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], sum(widths)), dtype=torch.float32)


def _pack(latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    kernels = _PACK_KERNELS.get(latent.device.type, _PACK_REFERENCE)
    return kernels[0](latent, bits, widths, steps)


def _unpack(codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    kernels = _PACK_KERNELS.get(codes.device.type, _PACK_REFERENCE)
    return kernels[1](codes, scale, bits, widths, steps)


_PACK_REFERENCE: PackKernels = (pack_reference, unpack_reference)
_PACK_KERNELS: dict[str, PackKernels] = {}


def use_pack_kernels(device_type: str, kernels: PackKernels | None) -> PackKernels | None:
    """Run these kernels (signatures of `pack_reference` and `unpack_reference`) for that device type; None: those two.

    Returns what was used before, None for the reference.
    """
    before = _PACK_KERNELS.pop(device_type, None)
    if kernels is not None:
        _PACK_KERNELS[device_type] = kernels
    return before


# --------------------------------------------------------------------------------------------------- latent attention


def latent_attention_reference(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    key_bits: Sequence[int],
    key_widths: Sequence[int],
    key_steps: Sequence[float],
    value_bits: Sequence[int],
    value_widths: Sequence[int],
    value_steps: Sequence[float],
    scale: float,
    softcap: float = 0.0,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    page_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention on latents; keys and values are never rebuilt.

    query [B,H,S,R_K] (absorbed); key uint8 codes [B,J,T,bytes] with key_scale [B,J,T], or uncoded [B,J,T,R_K] with no
    bits and no scale; value likewise with its own J; mask bool or additive, broadcastable to [B,H,S,T]; lengths int64,
    [B] or one number: only so many first tokens may be attended to. pages int32 [B,U,N], U a divisor of both J: only
    tokens of listed pages may be, page p being the `page_tokens` tokens from p * page_tokens on. Query head h goes by
    list h*U//H; numbers ascend, each once, and -1 at the end of a list is no page.
    Returns o~ [B,H,S,R_V] in the dtype of query and lse [B,H,S] float32 (float64 for queries of float64, which are
    reckoned in it): the log of the sum of exponentials, -inf (and o~ = 0) where a query may attend to nothing.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    mask = within(lengths, key.shape[2], listed(pages, page_tokens, query.shape[1], key.shape[2], mask))
    z_k, k_factor = _operand(key, key_scale, key_bits, key_widths, key_steps, query.dtype)
    z_v, v_factor = _operand(value, value_scale, value_bits, value_widths, value_steps, query.dtype)
    logits = grouped_scores((query * scale).to(z_k.dtype), z_k).to(exact)
    if k_factor is not None:
        logits = logits * _per_head(k_factor, query.shape[1])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = additive(mask, exact)
    if bias is not None:
        logits = logits + bias
    weights, lse = _softmax(logits)
    if v_factor is not None:
        weights = weights * _per_head(v_factor, query.shape[1])
    return grouped_mix(weights.to(z_v.dtype), z_v).to(query.dtype), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, lse) over the last axis; a row of -inf gives zeros and -inf, and no NaN in the backward pass."""
    if not logits.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -math.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    powers = torch.exp(logits - top)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = (total.log() + top).masked_fill(empty, -math.inf).squeeze(-1)
    return powers / total, lse


def _operand(
    rows: Tensor, scale: Tensor | None, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Latents to multiply, and the factor per token that may be applied to the product instead of to them."""
    if not bits:
        return rows, None
    if any(b == 16 for b in bits) or scale is None or dtype == torch.float64:
        assert scale is not None, "coded latents need a scale"
        latents = unpack_reference(rows, scale, bits, widths, steps)
        return (latents.double() if dtype == torch.float64 else latents), None
    return unscaled(rows, bits, widths, steps), scale.to(torch.float32)


def _per_head(factor: Tensor, heads: int) -> Tensor:
    """[B, J, T] -> [B, H, 1, T]."""
    return factor.repeat_interleave(heads // factor.shape[1], 1).unsqueeze(2)


def _latent_attention_fake(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    value_widths: Sequence[int],
    **_: object,
) -> tuple[Tensor, Tensor]:
    width = sum(value_widths) if value_widths else value.shape[-1]
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], width)), query.new_empty(query.shape[:3], dtype=exact)


def _latent_attention(
    query: Tensor, *args: Tensor | None, pages: Tensor | None = None, page_tokens: int = 0, **options: object
) -> tuple[Tensor, Tensor]:
    kernel = _KERNELS.get(query.device.type, latent_attention_reference)
    if pages is not None:
        options |= dict(pages=pages, page_tokens=page_tokens)
    return kernel(query, *args, **options)


_KERNELS: dict[str, LatentKernel] = {}


def learns(*tensors: Tensor | None) -> bool:
    """True where a gradient is asked for. Ops have none in compiled graphs: their references are called then."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def latent_attention(
    query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
    mask: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fhopt::latent_attention`, or its reference where a gradient is asked for."""
    run: Any = latent_attention_reference if learns(query, key, value, mask) else torch.ops.fhopt.latent_attention
    found: tuple[Tensor, Tensor] = run(query, key, key_scale, value, value_scale, mask, **options)
    return found


def use_kernel(device_type: str, kernel: LatentKernel | None) -> LatentKernel | None:
    """Run `kernel` (signature of `latent_attention_reference`) for that device type; None: the reference.

    It is given `pages` and `page_tokens` only where there is a list. Returns what was used before, None for the
    reference.
    """
    before = _KERNELS.pop(device_type, None)
    if kernel is not None:
        _KERNELS[device_type] = kernel
    return before


def page_logits(logits: Tensor, tokens: int) -> Tensor:
    """Log of the weight of each page: [B,H,S,T] -> [B,H,S,P]; the last page may be short."""
    short = -logits.shape[-1] % tokens
    padded = torch.nn.functional.pad(logits, (0, short), value=-math.inf) if short else logits
    return padded.unflatten(-1, (-1, tokens)).logsumexp(-1)


_LIB.impl("attention", attention_reference, "CompositeImplicitAutograd")
_LIB.impl("pack", _pack, "CompositeExplicitAutograd")
_LIB.impl("unpack", _unpack, "CompositeExplicitAutograd")
_LIB.impl("latent_attention", _latent_attention, "CompositeExplicitAutograd")
for _name in ("pack", "unpack"):
    _LIB.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # no gradient goes through codes
torch.library.register_fake("fhopt::pack", _pack_fake, lib=_LIB)
torch.library.register_fake("fhopt::unpack", _unpack_fake, lib=_LIB)
torch.library.register_fake("fhopt::latent_attention", _latent_attention_fake, lib=_LIB)


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
    weights, _ = _softmax(torch.stack([lse for _, lse in parts], -1))  # [B, H, S, parts]
    outputs = [o * weights[..., i : i + 1].to(o.dtype) for i, (o, _) in enumerate(parts)]
    return sum(outputs[1:], outputs[0])


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers as rows of one tier of 8 bits and step 1. x [B,G,T,D] -> codes uint8 [B,G,T,D], scale float16 [B,G,T].

    A row's scale is its largest magnitude / 127.5, at least the least float16, so that a row of zeros has one too. No
    number moves by more than half a scale. Attention reads such rows as they are. No gradient goes through them.
    """
    x = x.detach().to(torch.float32)
    scale = (x.abs().amax(-1) / 127.5).clamp(2.0**-24, 65504.0).to(torch.float16)
    codes = torch.floor(x / scale.unsqueeze(-1) + 128).clamp_(0, 255)
    return codes.to(torch.uint8), scale


def unround_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `round_rows` up to rounding: codes uint8 [B,G,T,D], scale [B,G,T] -> [B,G,T,D] of `dtype`."""
    return ((codes.to(torch.float32) - 127.5) * scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def straight_through(latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    """Latents [..., R] as coding leaves them, in the dtype they came in; the gradient passes as if nothing was done."""
    with torch.no_grad():
        codes, scale = torch.ops.fhopt.pack(latent.detach(), list(bits), list(widths), list(steps))
        rounded = torch.ops.fhopt.unpack(codes, scale, list(bits), list(widths), list(steps)).to(latent.dtype)
    return latent + (rounded - latent).detach()


def first(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The first of two results, as a graph node can name it."""
    return pair[0]


def second(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The second of two results."""
    return pair[1]


def pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two results as one node."""
    return left, right


def total_mask(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """One mask for q [B,H,S,D] on k [B,G,T,D] from a mask and a flag; causal means j <= i, as SDPA has it."""
    if not is_causal:
        return mask
    triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return triangle if mask is None else restricted(mask, triangle)


def split_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """(near, far) masks for keys that stay exact and keys that are seen through latents.

    Query i stands at key position p = i + T - S. Exact: the first `sinks` keys and those with |p - j| < recent.
    """
    queries, keys = query.shape[2], key.shape[2]
    position = torch.arange(queries, device=query.device).unsqueeze(1) + (keys - queries)
    column = torch.arange(keys, device=query.device).unsqueeze(0)
    near = (column < sinks) | ((position - column).abs() < recent)  # [S, T]
    allowed = total_mask(query, key, mask, is_causal)
    return (near, ~near) if allowed is None else (restricted(allowed, near), restricted(allowed, ~near))


def restricted(mask: Tensor, allowed: Tensor) -> Tensor:
    """A bool or additive mask restricted to `allowed` (bool)."""
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)


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
