"""A layer's decode step on a serving engine's blocks, as Triton kernels; lengths and tables stay on the GPU.

    write_kernel        the new token: its row of the recent window, attention sinks, the mean of first tokens
    encode_kernel       its packed latents, of keys and of values; those of first tokens once their mean is known
    attention_kernel    of the generated file (attention.py), three times: packed latents, recent window, sinks
    join_kernel         merges them by log-sum-exp, adds means, expands

Position p of a sequence is in block table[sequence][p // size], at slot p % size. A sequence of `length` tokens has its
new one at position length - 1. Each program derives from the length it loads which tokens are sinks, recent or latent,
and whether a mean is due: no shape, grid or argument depends on a length, so a step may be captured in a CUDA graph and
replayed for other lengths and tables in the same memory. Sequences of length 0 are padding: they write nothing, and
their output is 0. Nothing is written to block 0, the null block.

Letters: B sequences, H query heads, G kv heads, J latent heads, M = H/G, n = G/J, D and E head size of keys and values,
R latent width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fhopt.codegen.gpu.encode_rows import project, scales_of, store_codes
from fhopt.codegen.gpu.packing import limited

_jit: Callable[..., Any] = triton.jit
_jit_entry: Callable[..., Any] = triton.jit(do_not_specialize=("count", "tier_count", "coded", "sinks", "means_from"))


@_jit_entry
def write_kernel(
    x: tl.tensor,  # keys or values [B, G, D]
    lengths: tl.tensor,  # int32 [B]
    window: tl.tensor,  # rows [blocks, G, PAGE, D]: uint8, or unquantized
    window_scale: tl.tensor,  # float16 [blocks, G, PAGE]; None: rows are unquantized
    first: tl.tensor,  # attention sinks [pages, G, sinks, D]
    means: tl.tensor,  # float32 [pages, G, D]; None: the plan has none
    window_table: tl.tensor,  # int32 [B, blocks]
    first_table: tl.tensor,  # int32 [B, 1 or more]
    sinks: tl.tensor,
    means_from: tl.tensor,
    size: tl.tensor,  # D
    x_b: tl.tensor,  # strides
    x_h: tl.tensor,
    window_b: tl.tensor,
    window_h: tl.tensor,
    window_t: tl.tensor,
    scale_b: tl.tensor,
    scale_h: tl.tensor,
    scale_t: tl.tensor,
    first_b: tl.tensor,
    first_h: tl.tensor,
    first_t: tl.tensor,
    means_b: tl.tensor,
    means_h: tl.tensor,
    window_table_b: tl.tensor,
    first_table_b: tl.tensor,
    PAGE: tl.constexpr,  # tokens per block of the window
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, padded
) -> None:
    """Write the new token of one kv head to the recent window and the sinks, and the mean once it is complete."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(lengths + b).to(tl.int32) - 1
    d = tl.arange(0, BLOCK_D)
    real = d < size
    token = tl.load(x + b * x_b + h * x_h + d, mask=real, other=0.0)
    table, page = window_table + b * window_table_b, tl.load(first_table + b * first_table_b).to(tl.int64)
    block = tl.load(table + position // PAGE, mask=position >= 0, other=0).to(tl.int64)
    row = window + block * window_b + h * window_h + position % PAGE * window_t
    kept = token.to(tl.float32)  # the value that the window stores
    if window_scale is None:
        if block != 0:
            tl.store(row + d, token, mask=real)
    else:
        most = tl.max(tl.abs(kept), 0)
        scale = limited(tl.div_rn(most, 127.5), 2.0**-24, 65504.0).to(tl.float16)
        half = scale.to(tl.float32)
        code = tl.floor(tl.div_rn(kept, tl.zeros_like(kept) + half) + 128.0)
        code = tl.minimum(tl.maximum(code, 0.0), 255.0)
        if block != 0:
            tl.store(row + d, code.to(tl.uint8), mask=real)
            tl.store(window_scale + block * scale_b + h * scale_h + position % PAGE * scale_t, scale)
        kept = tl.where(real, (code - 127.5) * half, 0.0)

    if (position >= 0) & (position < sinks) & (page != 0):
        sink = first + page * first_b + h * first_h + position * first_t + d
        tl.store(sink, token, mask=real)
        if position == 0:  # the block may hold another sequence's data
            for i in range(1, sinks):
                tl.store(sink + i * first_t, tl.zeros_like(token), mask=real)
    if means is not None:
        mean = means + page * means_b + h * means_h + d
        if (position == 0) & (page != 0):
            tl.store(mean, tl.zeros([BLOCK_D], tl.float32), mask=real)
        if (position == means_from - 1) & (page != 0):
            for start in range(sinks, position, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)
                here = t < position
                blocks = tl.load(table + t // PAGE, mask=here, other=0).to(tl.int64)
                rows = window + blocks * window_b + h * window_h + t % PAGE * window_t
                y = tl.load(rows[:, None] + d[None, :], mask=here[:, None] & real[None, :], other=0).to(tl.float32)
                if window_scale is not None:
                    scales = window_scale + blocks * scale_b + h * scale_h + t % PAGE * scale_t
                    y = (y - 127.5) * tl.load(scales, mask=here, other=0.0).to(tl.float32)[:, None]
                kept += tl.sum(tl.where(here[:, None], y, 0.0), 0)
            tl.store(mean, tl.div_rn(kept, tl.zeros_like(kept) + (means_from - sinks)), mask=real)


@_jit_entry
def encode_blocks_kernel(
    x: tl.tensor,  # new keys or values [B, G, D]
    x_window: tl.tensor,  # rows of the recent window, as in write_kernel
    x_window_scale: tl.tensor,
    x_means: tl.tensor,  # float32 [pages, G, D]; None: the plan has none
    x_size: tl.tensor,  # D
    x_b: tl.tensor,  # strides
    x_h: tl.tensor,
    x_window_b: tl.tensor,
    x_window_h: tl.tensor,
    x_window_t: tl.tensor,
    x_scale_b: tl.tensor,
    x_scale_h: tl.tensor,
    x_scale_t: tl.tensor,
    x_means_b: tl.tensor,
    x_means_h: tl.tensor,
    y: tl.tensor,  # new values if keys (x) and values share a latent; None: it encodes only x
    y_window: tl.tensor,
    y_window_scale: tl.tensor,
    y_means: tl.tensor,
    y_size: tl.tensor,
    y_b: tl.tensor,
    y_h: tl.tensor,
    y_window_b: tl.tensor,
    y_window_h: tl.tensor,
    y_window_t: tl.tensor,
    y_scale_b: tl.tensor,
    y_scale_h: tl.tensor,
    y_scale_t: tl.tensor,
    y_means_b: tl.tensor,
    y_means_h: tl.tensor,
    basis: tl.tensor,  # float32 [J, R, n * (x_size + y_size)]
    codes: tl.tensor,  # packed latents uint8 [blocks, J, PAGE, bytes], or unquantized [blocks, J, PAGE, R]
    scale: tl.tensor,  # float16 [blocks, J, PAGE]; None: latents are not quantized
    tiers: tl.tensor,  # int32 [tiers, 5]; None: likewise
    lengths: tl.tensor,  # int32 [B]
    table: tl.tensor,  # int32 [B, blocks], of packed latents
    window_table: tl.tensor,
    first_table: tl.tensor,
    count: tl.tensor,  # B
    tier_count: tl.tensor,
    coded: tl.tensor,  # channels with fewer than 16 bits, at least 1; R without tiers
    heads: tl.tensor,  # n
    sinks: tl.tensor,
    means_from: tl.tensor,
    basis_j: tl.tensor,
    basis_r: tl.tensor,
    codes_b: tl.tensor,
    codes_j: tl.tensor,
    codes_t: tl.tensor,
    scale_b: tl.tensor,
    scale_j: tl.tensor,
    scale_t: tl.tensor,
    table_b: tl.tensor,
    window_table_b: tl.tensor,
    first_table_b: tl.tensor,
    PAGE: tl.constexpr,
    WINDOW_PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Encode in one latent head the new tokens of BLOCK_T sequences.

    With means, tokens before the mean is known are not encoded; a further program per sequence encodes them from the
    recent window in the step whose new token completes the mean.
    """
    j, tiles = tl.program_id(1).to(tl.int64), tl.cdiv(count, BLOCK_T)
    bases, group = basis + j * basis_j, j * heads
    basis_h = x_size
    if y is not None:
        basis_h += y_size
    if tl.program_id(0) < tiles:
        b = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T], sequences
        position = tl.load(lengths + b, mask=b < count, other=0).to(tl.int32) - 1
        live = (position >= 0) & (position >= means_from)
        page = tl.load(first_table + b * first_table_b, mask=live, other=0).to(tl.int64)
        first = new_tokens(x, x_means, x_size, x_b, x_h, x_means_b, x_means_h, b, group, page)
        second = None
        if y is not None:
            second = new_tokens(y, y_means, y_size, y_b, y_h, y_means_b, y_means_h, b, group, page)
        block = tl.load(table + b * table_b + position // PAGE, mask=live, other=0).to(tl.int64)
        encode_rows(
            first, second, bases, basis_h, basis_r, heads, tiers, tier_count, coded,
            codes + block * codes_b + j * codes_j + position % PAGE * codes_t, scale,
            block * scale_b + j * scale_j + position % PAGE * scale_t, live, live & (block != 0), BLOCK_T, BLOCK_G,
            BLOCK_D,
        )  # fmt: skip
    elif x_means is not None:
        one = tl.program_id(0).to(tl.int64) - tiles
        if tl.load(lengths + one) == means_from:
            its_page = tl.load(first_table + one * first_table_b).to(tl.int64)
            for start in range(sinks, means_from, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)  # [T], positions
                real, at_t = t < means_from, t % WINDOW_PAGE
                held = tl.load(window_table + one * window_table_b + t // WINDOW_PAGE, mask=real, other=0).to(tl.int64)
                old = window_tokens(
                    x_window, x_window_scale, x_means, x_size, x_window_b, x_window_h, x_window_t, x_scale_b, x_scale_h,
                    x_scale_t, x_means_b, x_means_h, held, at_t, group, its_page,
                )  # fmt: skip
                beside = None
                if y is not None:
                    beside = window_tokens(
                        y_window, y_window_scale, y_means, y_size, y_window_b, y_window_h, y_window_t, y_scale_b,
                        y_scale_h, y_scale_t, y_means_b, y_means_h, held, at_t, group, its_page,
                    )  # fmt: skip
                to = tl.load(table + one * table_b + t // PAGE, mask=real, other=0).to(tl.int64)
                encode_rows(
                    old, beside, bases, basis_h, basis_r, heads, tiers, tier_count, coded,
                    codes + to * codes_b + j * codes_j + t % PAGE * codes_t, scale,
                    to * scale_b + j * scale_j + t % PAGE * scale_t, real, real & (to != 0), BLOCK_T, BLOCK_G, BLOCK_D,
                )  # fmt: skip


@_jit
def new_tokens(
    x: tl.tensor,
    means: tl.tensor,
    size: tl.tensor,
    x_b: tl.tensor,
    x_h: tl.tensor,
    means_b: tl.tensor,
    means_h: tl.tensor,
    b: tl.tensor,
    group: tl.tensor,
    page: tl.tensor,
) -> tl.tensor:
    """Return new keys or values of sequences b [T] in the form that `encode_rows.project` takes."""
    rows = x + b * x_b + group * x_h
    if means is None:
        return rows, None, None, x_h, 0, 0, size
    else:  # noqa: RET505  Triton parses past a return
        return rows, None, means + page * means_b + group * means_h, x_h, 0, means_h, size


@_jit
def window_tokens(
    window: tl.tensor,
    scale: tl.tensor,
    means: tl.tensor,
    size: tl.tensor,
    window_b: tl.tensor,
    window_h: tl.tensor,
    window_t: tl.tensor,
    scale_b: tl.tensor,
    scale_h: tl.tensor,
    scale_t: tl.tensor,
    means_b: tl.tensor,
    means_h: tl.tensor,
    block: tl.tensor,
    place: tl.tensor,
    group: tl.tensor,
    page: tl.tensor,
) -> tl.tensor:
    """Return keys or values at `place` [T] of blocks [T] of the recent window in the same form."""
    rows = window + block * window_b + group * window_h + place * window_t
    mean = means + page * means_b + group * means_h + block * 0
    if scale is None:
        return rows, None, mean, window_h, 0, means_h, size
    else:  # noqa: RET505  Triton parses past a return
        scales = scale + block * scale_b + group * scale_h + place * scale_t
        return rows, scales, mean, window_h, scale_h, means_h, size


@_jit
def encode_rows(
    x: tl.tensor,
    y: tl.tensor,
    bases: tl.tensor,
    basis_h: tl.tensor,
    basis_r: tl.tensor,
    heads: tl.tensor,
    tiers: tl.tensor,
    tier_count: tl.tensor,
    coded: tl.tensor,
    row: tl.tensor,
    scale: tl.tensor,
    at: tl.tensor,
    live: tl.tensor,
    here: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Encode tokens [T] into their rows: quantized, with scales `at` their slots, or unquantized in the rows' type."""
    if tiers is not None:
        half = scales_of(
            x, y, bases, basis_h, basis_r, heads, tiers, tier_count, coded, live, BLOCK_T, BLOCK_G, BLOCK_D
        )
        tl.store(scale + at, half, mask=here)
        store_codes(
            x, y, bases, basis_h, basis_r, heads, tiers, tier_count, half, row, live, here, BLOCK_T, BLOCK_G, BLOCK_D
        )
    else:
        for first in range(0, tl.cdiv(coded, 8), BLOCK_G):
            z = project(x, y, bases, basis_h, basis_r, heads, 0, first, coded, live, BLOCK_T, BLOCK_G, BLOCK_D)
            c = 8 * first + tl.arange(0, 8 * BLOCK_G)
            z = tl.reshape(z, [BLOCK_T, 8 * BLOCK_G]).to(row.dtype.element_ty)
            tl.store(row[:, None] + c[None, :], z, mask=here[:, None] & (c < coded)[None, :])


@_jit
def join_kernel(
    far: tl.tensor,  # of packed latents [B, H, 1, R]
    far_lse: tl.tensor,  # float32 [B, H, 1]
    near: tl.tensor,  # of the recent window [B, H, 1, E]
    near_lse: tl.tensor,
    first: tl.tensor,  # of attention sinks [B, H, 1, E]; None: no sinks
    first_lse: tl.tensor,
    query: tl.tensor,  # [B, H, D]
    key_means: tl.tensor,  # float32 [pages, G, D], subtracted before encoding; None: not subtracted
    value_means: tl.tensor,
    first_table: tl.tensor,  # int32 [B, 1 or more]
    decode: tl.tensor,  # of values [G, E, R]
    output: tl.tensor,  # [B, H, E]
    scale: tl.tensor,
    shared: tl.tensor,  # M
    key_size: tl.tensor,  # D
    size: tl.tensor,  # E
    width: tl.tensor,  # R
    query_b: tl.tensor,  # strides
    query_h: tl.tensor,
    output_b: tl.tensor,
    output_h: tl.tensor,
    decode_h: tl.tensor,
    decode_e: tl.tensor,
    key_means_b: tl.tensor,
    key_means_h: tl.tensor,
    value_means_b: tl.tensor,
    value_means_h: tl.tensor,
    first_table_b: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Merge the parts of a kv head's queries by log-sum-exp, for BLOCK_E channels."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m, e = tl.arange(0, BLOCK_M), tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside, real = m < shared, e < size
    head = g * shared + m
    row = b * tl.num_programs(1) * shared + head  # [M]
    both = inside[:, None] & real[None, :]  # [M, E]

    far_sum = tl.load(far_lse + row, mask=inside, other=-float("inf"))
    near_sum = tl.load(near_lse + row, mask=inside, other=-float("inf"))
    top = tl.maximum(far_sum, near_sum)
    has_far = tl.max(far_sum, 0) > -float("inf")  # else there may be no mean, and its memory is undefined
    mean_size = tl.where(has_far, size, 0)
    page = tl.load(first_table + b * first_table_b).to(tl.int64)
    if key_means is not None:
        shift = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, key_size, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            held = inside[:, None] & (d < key_size)[None, :]
            q = tl.load(query + b * query_b + head[:, None] * query_h + d[None, :], mask=held, other=0.0)
            mean = key_means + page * key_means_b + g * key_means_h + d
            shift += tl.sum(
                q.to(tl.float32) * tl.load(mean, mask=d < tl.where(has_far, key_size, 0), other=0.0)[None, :], 1
            )
        far_sum += scale * shift
        top = tl.maximum(far_sum, near_sum)
    if first is not None:
        first_sum = tl.load(first_lse + row, mask=inside, other=-float("inf"))
        top = tl.maximum(top, first_sum)
    top = tl.where(top == -float("inf"), 0.0, top)
    far_weight, near_weight = tl.exp(far_sum - top), tl.exp(near_sum - top)
    total = far_weight + near_weight

    x = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, width, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        some = inside[:, None] & (r < width)[None, :]
        z = tl.load(far + row[:, None] * width + r[None, :], mask=some, other=0.0)
        basis = decode + g * decode_h + e[None, :] * decode_e + r[:, None]
        x = tl.dot(z, tl.load(basis, mask=real[None, :] & (r < width)[:, None], other=0.0), x, input_precision="ieee")
    if value_means is not None:
        mean = value_means + page * value_means_b + g * value_means_h + e
        x += tl.load(mean, mask=e < mean_size, other=0.0)[None, :]
    x = x * far_weight[:, None]
    y = tl.load(near + row[:, None] * size + e[None, :], mask=both, other=0.0).to(tl.float32)
    x += y * near_weight[:, None]
    if first is not None:
        weight = tl.exp(first_sum - top)
        total += weight
        y = tl.load(first + row[:, None] * size + e[None, :], mask=both, other=0.0).to(tl.float32)
        x += y * weight[:, None]
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(total == 0.0, 1.0, total)[:, None])
    to = output + b * output_b + head[:, None] * output_h + e[None, :]
    tl.store(to, x.to(output.dtype.element_ty), mask=both)
