"""Search of the rows of a language-model head on GPUs: one Triton kernel for bounds, and torch operations.

    bounds_kernel   quantized rows, hidden states in 8 bits -> estimates and upper bounds of all logits [M, V]
    search          the rows with the largest bounds, exactly; certain if no other bound reaches the k-th of them

The kernel uses the blocks of cpu/lm_head.py unchanged: a 32-bit word has four 8-bit coordinates of a row, or eight
4-bit ones, and the same word of 16 rows is contiguous. Integer matmuls on tensor cores are exact, so the bounds hold
for the same reason as on a CPU. Nothing synchronizes with the device: `Candidates.counts` marks the hidden states left
to the dense head.

Letters: M hidden states, C their width, R width of the basis, V vocabulary, N rows that are computed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fhopt.codegen.cpu.lm_head import BLOCK, Candidates, Codes, Search

BLOCK_M, ROWS, STEP = 16, 64, 32  # hidden states, rows and words per matmul of a program
SCORED = 256  # N: exactly computed rows per hidden state, at least `keep`
UNIT = 2.0**-24  # float32 rounding unit
_jit: Callable[..., Any] = triton.jit


def search_head_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes, options: Search
) -> Candidates:
    """Search candidates for hidden [M, C] and weight [V, C] of one type on a GPU, over all rows regardless of `probes`.

    `budget` rows, at most 256 (or `keep`), are computed exactly. counts: -1 if that is too few to be certain. `margin`
    and `softcap` only lower the threshold of certainty, as on a CPU.
    """
    estimates, bounds = bound(hidden, weight, bias, codes)
    count = min(max(min(options.budget, SCORED), options.keep), codes.vocabulary)
    reach = bounds.topk(min(count + 1, codes.vocabulary), dim=1)  # [M, N + 1]
    ids = reach.indices[:, :count]
    rows = weight[ids].float()  # [M, N, C]
    values = torch.matmul(rows, hidden.float().unsqueeze(2)).squeeze(2)
    values = (values if bias is None else values + bias[ids].float()).to(weight.dtype).float()
    values, ids = _ordered(values, ids)
    least = _lowest_tie(values[:, options.keep - 1], weight.dtype, options.softcap) - options.margin
    certain = bounds.isfinite().any(1) & values.isfinite().all(1)
    if count < codes.vocabulary:
        certain &= reach.values[:, count] < least
    counts = torch.where(certain, count, -1).to(torch.int32)
    logits = torch.full_like(bounds, -math.inf).scatter(1, ids, values).to(weight.dtype) if options.logits else None
    candidates = Candidates(ids.to(torch.int32), values, counts, logits=logits)
    return replace(candidates, estimates=estimates, bounds=bounds) if options.bounds else candidates


def _ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by decreasing value, ties in vocabulary order."""
    by_id = ids.sort(dim=1)
    ordered = values.gather(1, by_id.indices).sort(dim=1, descending=True, stable=True)
    return ordered.values, by_id.values.gather(1, ordered.indices)


def _lowest_tie(top: Tensor, dtype: torch.dtype, softcap: float) -> Tensor:
    """Compute the smallest logit that may equal `top` after rounding, capping and rounding again."""
    unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    plain = top - unit * top.abs()
    if softcap <= 0:
        return plain
    capped = torch.tanh(top.double() / softcap)
    return torch.minimum((softcap * torch.atanh((capped - 2 * unit * capped.abs()).clamp_min(-1))).float(), plain)


# --------------------------------------------------------------------------------------------------- bounds


def bound(hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes) -> tuple[Tensor, Tensor]:
    """Compute (estimates, upper bounds) [M, V], float32, of logits of hidden [M, C]; not finite for large h."""
    count, slots = len(hidden), codes.codes.shape[0] * BLOCK
    coded, about = quantize_hidden(hidden, codes)
    results = [hidden.new_empty(count, codes.vocabulary, dtype=torch.float32) for _ in range(2)]
    grid = (triton.cdiv(slots, ROWS), triton.cdiv(count, BLOCK_M))
    with torch.cuda.device_of(hidden):
        bounds_kernel[grid](
            codes.codes.view(torch.int32), coded, about, *results,
            count, slots, codes.vocabulary, codes.codes.shape[1] // 4, codes.lead, codes.rank,
            BLOCK_M, ROWS, STEP,
        )  # fmt: skip
    if bias is not None:
        for x in results:
            x += bias.float()
        results[1] += UNIT * 4 * results[0].abs()
    return results[0], results[1]


def quantize_hidden(hidden: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Quantize hidden states: h' int8 [M, R], and float32 [M, 10], the kernel's other data per hidden state.

    The columns: offset, slack, steps of both bit groups, half their sums, norms, rounding errors.
    """
    h = hidden.double()
    turned = torch.nn.functional.pad(h, (0, codes.rank - h.shape[1])) if codes.transform is None else (
        h @ codes.transform.double().T
    )  # fmt: skip
    parts, columns = [], list[Tensor]()
    for part in turned.split([codes.lead, codes.rank - codes.lead], 1):
        top = part.abs().amax(1) if part.shape[1] else turned.new_zeros(len(turned))
        step = (top / 127).float().double()
        whole = (part / step.clamp_min(1e-30).unsqueeze(1)).round().clamp(-127, 127).nan_to_num()
        lost = (part - whole * step.unsqueeze(1)).norm(dim=1) + 32 * UNIT * part.norm(dim=1)
        parts.append(whole.to(torch.int8))
        columns += [step, whole.sum(1) / 2, part.norm(dim=1), lost]
    offset, terms = h @ codes.centre.double(), h.shape[1] / 4 + 32
    slack = 2 * terms * UNIT * h.norm(dim=1) * codes.largest + 8 * UNIT * offset.abs()
    step1, sum1, norm1, lost1, step2, sum2, norm2, lost2 = columns
    grown = [x * (1 + 2**-20) for x in (norm1, norm2, lost1, lost2)]
    about = torch.stack([offset, slack, step1, step2, sum1, sum2, *grown], 1)
    return torch.cat(parts, 1).contiguous(), about.float().contiguous()


@_jit
def bounds_kernel(
    codes: tl.tensor,  # int32 [blocks, words]
    hidden: tl.tensor,  # int8 [M, R]
    about: tl.tensor,  # float32 [M, 10], from `quantize_hidden`
    estimates: tl.tensor,  # float32 [M, V]
    bounds: tl.tensor,  # float32 [M, V]
    count: tl.tensor,  # M
    slots: tl.tensor,  # 16 per block
    vocabulary: tl.tensor,  # V
    words: tl.tensor,
    lead: tl.tensor,
    rank: tl.tensor,  # R
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Bound the logits of ROWS slots of the blocks `codes` for BLOCK_M hidden states: estimates and bounds [M, V]."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    there, asked = slot < slots, m < count
    block = (slot // 16).to(tl.int64) * words
    at = codes + block + slot % 16
    states = hidden + m.to(tl.int64) * rank
    first = add_bytes(tl.zeros([ROWS, BLOCK_M], tl.int32), at, states, there, asked, lead // 4, STEP)
    second = tl.zeros([ROWS, BLOCK_M], tl.int32)
    second = add_halves(second, at + lead * 4, states + lead, there, asked, (rank - lead) // 8, STEP)
    numbers = (codes + block + lead * 4 + (rank - lead) * 2).to(tl.pointer_type(tl.bfloat16)) + slot % 16
    query = about + m * 10
    offset, slack = tl.load(query, mask=asked, other=0.0), tl.load(query + 1, mask=asked, other=0.0)
    half1, half2 = tl.load(query + 4, mask=asked, other=0.0), tl.load(query + 5, mask=asked, other=0.0)
    estimate = tl.zeros([ROWS, BLOCK_M], tl.float32) + offset[None, :]
    scale1 = tl.load(numbers, mask=there, other=0.0).to(tl.float32)
    scale2 = tl.load(numbers + 16, mask=there, other=0.0).to(tl.float32)
    step1, step2 = tl.load(query + 2, mask=asked, other=0.0), tl.load(query + 3, mask=asked, other=0.0)
    estimate += scale1[:, None] * step1[None, :] * (first.to(tl.float32) + half1[None, :])
    estimate += scale2[:, None] * step2[None, :] * (second.to(tl.float32) - 15.0 * half2[None, :])
    reach = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for k in tl.static_range(4):  # errors of both tiers, then norms
        number = tl.load(numbers + 32 + 16 * k, mask=there, other=0.0).to(tl.float32)
        reach += number[:, None] * tl.load(query + 6 + k, mask=asked, other=0.0)[None, :]
    upper = estimate + reach * 1.0000153 + tl.abs(estimate) * 4.8e-7 + slack[None, :]
    row = tl.load(codes + block + lead * 4 + (rank - lead) * 2 + 48 + slot % 16, mask=there, other=-1)
    to = m[None, :].to(tl.int64) * vocabulary + row[:, None]
    kept = (row >= 0)[:, None] & asked[None, :]
    tl.store(estimates + to, estimate, mask=kept)
    tl.store(bounds + to, upper, mask=kept)


@_jit
def add_bytes(
    total: tl.tensor,
    at: tl.tensor,
    states: tl.tensor,
    there: tl.tensor,
    asked: tl.tensor,
    words: tl.tensor,
    STEP: tl.constexpr,
) -> tl.tensor:
    """Add dot products of hidden states with 8-bit coordinates, u - 128, to integers `total` [ROWS, BLOCK_M]."""
    for start in range(0, words, STEP):
        group = start + tl.arange(0, STEP)  # [STEP]
        inside = group < words
        word = tl.load(at[:, None] + group[None, :] * 16, mask=there[:, None] & inside[None, :], other=0)
        for k in tl.static_range(4):
            u = (((word >> (8 * k)) & 255) - 128).to(tl.int8)  # [ROWS, STEP]
            h = tl.load(states[None, :] + group[:, None] * 4 + k, mask=inside[:, None] & asked[None, :], other=0)
            total = tl.dot(u, h, total)
    return total


@_jit
def add_halves(
    total: tl.tensor,
    at: tl.tensor,
    states: tl.tensor,
    there: tl.tensor,
    asked: tl.tensor,
    words: tl.tensor,
    STEP: tl.constexpr,
) -> tl.tensor:
    """Add dot products of hidden states with 4-bit coordinates, u, to integers `total` [ROWS, BLOCK_M]."""
    for start in range(0, words, STEP):
        group = start + tl.arange(0, STEP)  # [STEP]
        inside = group < words
        word = tl.load(at[:, None] + group[None, :] * 16, mask=there[:, None] & inside[None, :], other=0)
        for k in tl.static_range(8):
            u = ((word >> (8 * (k % 4) + 4 * (k // 4))) & 15).to(tl.int8)  # [ROWS, STEP]
            h = tl.load(states[None, :] + group[:, None] * 8 + k, mask=inside[:, None] & asked[None, :], other=0)
            total = tl.dot(u, h, total)
    return total
