"""A layer's decode step on a serving engine's blocks, as Triton kernels; lengths and tables stay on the GPU.

    write_kernel            the new token: its row of the recent window, attention sinks, the mean of first tokens
    encode_blocks_kernel    its packed latents, of keys and of values; those of first tokens once their mean is known
    attention_kernel        of the generated file (attention.py), three times: packed latents, recent window, sinks
    join_kernel             merges them by log-sum-exp, adds means, expands

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
    sinks: tl.tensor, means_from: tl.tensor,
    size: tl.tensor,  # D
    x_b: tl.tensor, x_h: tl.tensor,  # strides
    window_b: tl.tensor, window_h: tl.tensor, window_t: tl.tensor,
    scale_b: tl.tensor, scale_h: tl.tensor, scale_t: tl.tensor,
    first_b: tl.tensor, first_h: tl.tensor, first_t: tl.tensor,
    means_b: tl.tensor, means_h: tl.tensor, window_table_b: tl.tensor, first_table_b: tl.tensor,
    PAGE: tl.constexpr,  # tokens per block of the window
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, padded
) -> None:  # fmt: skip
    """Write the new token of one kv head to the recent window and the sinks, and the mean once it is complete."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(lengths + b).to(tl.int32) - 1
    d = tl.arange(0, BLOCK_D)
    real = d < size
    token = tl.load(x + b * x_b + h * x_h + d, mask=real, other=0.0)
    table, page = window_table + b * window_table_b, tl.load(first_table + b * first_table_b).to(tl.int64)
    block = tl.load(table + position // PAGE, mask=position >= 0, other=0).to(tl.int64)
    row = window + block * window_b + h * window_h + position % PAGE * window_t
    stored = token.to(tl.float32)  # the value that the window stores
    if window_scale is None:
        if block != 0:
            tl.store(row + d, token, mask=real)
    else:
        code, scale, stored = round_to_bytes(stored, real)
        if block != 0:
            tl.store(row + d, code.to(tl.uint8), mask=real)
            tl.store(window_scale + block * scale_b + h * scale_h + position % PAGE * scale_t, scale)
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
            rows = (window, window_b, window_h, window_t, window_scale, scale_b, scale_h, scale_t)
            total = add_window(stored, rows, table, h, sinks, position, d, real, PAGE, BLOCK_T)
            tl.store(mean, tl.div_rn(total, tl.zeros_like(total) + (means_from - sinks)), mask=real)


@_jit
def round_to_bytes(x: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Quantize a row x [D] to 8 bits: its codes as floats, its scale, and the values that these represent."""
    most = tl.max(tl.abs(x), 0)
    scale = limited(tl.div_rn(most, 127.5), 2.0**-24, 65504.0).to(tl.float16)
    half = scale.to(tl.float32)
    code = tl.floor(tl.div_rn(x, tl.zeros_like(x) + half) + 128.0)
    code = tl.minimum(tl.maximum(code, 0.0), 255.0)
    return code, scale, tl.where(real, (code - 127.5) * half, 0.0)


@_jit
def add_window(
    total: tl.tensor, window: tl.tensor, table: tl.tensor, h: tl.tensor, start: tl.tensor, end: tl.tensor,
    d: tl.tensor, real: tl.tensor, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add to a total [D] the rows of the recent window at positions from `start` to before `end` of one sequence.

    window: a tuple: rows and their strides, scales and their strides, as arguments of `write_kernel`.
    """
    window_rows, window_b, window_h, window_t, window_scale, scale_b, scale_h, scale_t = window
    for first in range(start, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        here = t < end
        blocks = tl.load(table + t // PAGE, mask=here, other=0).to(tl.int64)
        rows = window_rows + blocks * window_b + h * window_h + t % PAGE * window_t
        y = tl.load(rows[:, None] + d[None, :], mask=here[:, None] & real[None, :], other=0).to(tl.float32)
        if window_scale is not None:
            scales = window_scale + blocks * scale_b + h * scale_h + t % PAGE * scale_t
            y = (y - 127.5) * tl.load(scales, mask=here, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(tl.where(here[:, None], y, 0.0), 0)
    return total


@_jit_entry
def encode_blocks_kernel(
    x: tl.tensor,  # new keys or values [B, G, D]
    x_window: tl.tensor, x_window_scale: tl.tensor,  # recent window, as in write_kernel
    x_means: tl.tensor,  # float32 [pages, G, D]; None: the plan has none
    x_size: tl.tensor,  # D
    x_b: tl.tensor, x_h: tl.tensor, x_window_b: tl.tensor, x_window_h: tl.tensor, x_window_t: tl.tensor,  # strides
    x_scale_b: tl.tensor, x_scale_h: tl.tensor, x_scale_t: tl.tensor, x_means_b: tl.tensor, x_means_h: tl.tensor,
    y: tl.tensor,  # new values if keys (x) and values share a latent; None: it encodes only x
    y_window: tl.tensor, y_window_scale: tl.tensor, y_means: tl.tensor, y_size: tl.tensor,
    y_b: tl.tensor, y_h: tl.tensor, y_window_b: tl.tensor, y_window_h: tl.tensor, y_window_t: tl.tensor,
    y_scale_b: tl.tensor, y_scale_h: tl.tensor, y_scale_t: tl.tensor, y_means_b: tl.tensor, y_means_h: tl.tensor,
    basis: tl.tensor,  # float32 [J, R, n * (x_size + y_size)]
    codes: tl.tensor,  # packed latents uint8 [blocks, J, PAGE, bytes], or unquantized [blocks, J, PAGE, R]
    scale: tl.tensor,  # float16 [blocks, J, PAGE]; None: latents are not quantized
    tiers: tl.tensor,  # int32 [tiers, 5]; None: likewise
    lengths: tl.tensor,  # int32 [B]
    table: tl.tensor,  # int32 [B, blocks], of packed latents
    window_table: tl.tensor, first_table: tl.tensor,
    count: tl.tensor, tier_count: tl.tensor,  # count: B
    coded: tl.tensor,  # channels with fewer than 16 bits, at least 1; R without tiers
    heads: tl.tensor,  # n
    sinks: tl.tensor, means_from: tl.tensor, basis_j: tl.tensor, basis_r: tl.tensor,
    codes_b: tl.tensor, codes_j: tl.tensor, codes_t: tl.tensor,
    scale_b: tl.tensor, scale_j: tl.tensor, scale_t: tl.tensor,
    table_b: tl.tensor, window_table_b: tl.tensor, first_table_b: tl.tensor,
    PAGE: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Encode in one latent head the new tokens of BLOCK_T sequences.

    With means, tokens before the mean is known are not encoded; a further program per sequence encodes them from the
    recent window in the step whose new token completes the mean.
    """
    j, tiles = tl.program_id(1).to(tl.int64), tl.cdiv(count, BLOCK_T)
    inputs = (
        (x, x_window, x_window_scale, x_means, x_size, x_b, x_h, x_window_b, x_window_h, x_window_t,
         x_scale_b, x_scale_h, x_scale_t, x_means_b, x_means_h),
        (y, y_window, y_window_scale, y_means, y_size, y_b, y_h, y_window_b, y_window_h, y_window_t,
         y_scale_b, y_scale_h, y_scale_t, y_means_b, y_means_h),
    )  # fmt: skip
    basis_h = x_size
    if y is not None:
        basis_h += y_size
    encoder = (basis + j * basis_j, basis_h, basis_r, heads, tiers, tier_count, coded)
    latents = (table, table_b, codes, codes_b, codes_j, codes_t, scale, scale_b, scale_j, scale_t)
    sequences = (lengths, count, means_from, first_table, first_table_b)
    if tl.program_id(0) < tiles:
        encode_new_tokens(inputs, encoder, latents, sequences, PAGE, BLOCK_T, BLOCK_G, BLOCK_D)
    elif x_means is not None:
        window_blocks = (window_table, window_table_b)
        encode_first_tokens(
            inputs, encoder, latents, sequences, window_blocks, sinks, PAGE, WINDOW_PAGE, BLOCK_T, BLOCK_G, BLOCK_D
        )


@_jit
def encode_new_tokens(
    inputs: tl.tensor, encoder: tl.tensor, latents: tl.tensor, sequences: tl.tensor,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Encode the new tokens of BLOCK_T sequences, unless a mean is not known yet.

    Tuples of arguments of `encode_blocks_kernel`: inputs: those of x and of y. encoder: its basis, and what
    `encode_rows.project` takes with it. latents: block table, rows and scales. sequences: lengths, their number, and
    where the first tokens' means are.
    """
    x, y = inputs
    table, table_b = latents[0], latents[1]
    lengths, count, means_from, first_table, first_table_b = sequences
    group = tl.program_id(1).to(tl.int64) * encoder[3]
    b = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T], sequences
    position = tl.load(lengths + b, mask=b < count, other=0).to(tl.int32) - 1
    live = (position >= 0) & (position >= means_from)
    page = tl.load(first_table + b * first_table_b, mask=live, other=0).to(tl.int64)
    first = new_tokens(x, b, group, page)
    second = None
    if y[0] is not None:
        second = new_tokens(y, b, group, page)
    block = tl.load(table + b * table_b + position // PAGE, mask=live, other=0).to(tl.int64)
    encode_rows(first, second, encoder, latents, block, position % PAGE, live, BLOCK_T, BLOCK_G, BLOCK_D)


@_jit
def encode_first_tokens(
    inputs: tl.tensor, encoder: tl.tensor, latents: tl.tensor, sequences: tl.tensor, window_blocks: tl.tensor,
    sinks: tl.tensor, PAGE: tl.constexpr, WINDOW_PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Encode the first tokens of a sequence from the recent window, if the new token completes their mean.

    window_blocks: block table of the window and its stride; other tuples: as in `encode_new_tokens`.
    """
    x, y = inputs
    table, table_b = latents[0], latents[1]
    lengths, count, means_from, first_table, first_table_b = sequences
    window_table, window_table_b = window_blocks
    group = tl.program_id(1).to(tl.int64) * encoder[3]
    b = tl.program_id(0).to(tl.int64) - tl.cdiv(count, BLOCK_T)
    if tl.load(lengths + b) == means_from:
        page = tl.load(first_table + b * first_table_b).to(tl.int64)
        for start in range(sinks, means_from, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)  # [T], positions
            real, place = t < means_from, t % WINDOW_PAGE
            source = tl.load(window_table + b * window_table_b + t // WINDOW_PAGE, mask=real, other=0).to(tl.int64)
            first = window_tokens(x, source, place, group, page)
            second = None
            if y[0] is not None:
                second = window_tokens(y, source, place, group, page)
            block = tl.load(table + b * table_b + t // PAGE, mask=real, other=0).to(tl.int64)
            encode_rows(first, second, encoder, latents, block, t % PAGE, real, BLOCK_T, BLOCK_G, BLOCK_D)


@_jit
def new_tokens(x: tl.tensor, b: tl.tensor, group: tl.tensor, page: tl.tensor) -> tl.tensor:
    """Return new keys or values of sequences b [T] in the form that `encode_rows.project` takes."""
    new, _, _, means, size, x_b, x_h, _, _, _, _, _, _, means_b, means_h = x
    rows = new + b * x_b + group * x_h
    if means is None:
        return rows, None, None, x_h, 0, 0, size
    else:  # noqa: RET505  Triton parses past a return
        return rows, None, means + page * means_b + group * means_h, x_h, 0, means_h, size


@_jit
def window_tokens(x: tl.tensor, block: tl.tensor, place: tl.tensor, group: tl.tensor, page: tl.tensor) -> tl.tensor:
    """Return keys or values at `place` [T] of blocks [T] of the recent window in the same form."""
    _, window, scale, means, size, _, _, window_b, window_h, window_t, scale_b, scale_h, scale_t, means_b, means_h = x
    rows = window + block * window_b + group * window_h + place * window_t
    mean = means + page * means_b + group * means_h + block * 0
    if scale is None:
        return rows, None, mean, window_h, 0, means_h, size
    else:  # noqa: RET505  Triton parses past a return
        scales = scale + block * scale_b + group * scale_h + place * scale_t
        return rows, scales, mean, window_h, scale_h, means_h, size


@_jit
def encode_rows(
    x: tl.tensor, y: tl.tensor, encoder: tl.tensor, latents: tl.tensor, block: tl.tensor, place: tl.tensor,
    live: tl.tensor, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Encode `live` tokens [T] into their rows at `place` of blocks: quantized with scales, or in the rows' type.

    x, y: as in `encode_rows.project`; encoder, latents: as in `encode_new_tokens`. Block 0 gets nothing.
    """
    bases, basis_h, basis_r, heads, tiers, tier_count, coded = encoder
    _, _, codes, codes_b, codes_j, codes_t, scale, scale_b, scale_j, scale_t = latents
    j, here = tl.program_id(1).to(tl.int64), live & (block != 0)
    row = codes + block * codes_b + j * codes_j + place * codes_t
    if tiers is not None:
        half = scales_of(
            x, y, bases, basis_h, basis_r, heads, tiers, tier_count, coded, live, BLOCK_T, BLOCK_G, BLOCK_D
        )
        tl.store(scale + (block * scale_b + j * scale_j + place * scale_t), half, mask=here)
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
    far: tl.tensor, far_lse: tl.tensor,  # of packed latents [B, H, 1, R]; float32 [B, H, 1]
    near: tl.tensor, near_lse: tl.tensor,  # of the recent window [B, H, 1, E]
    first: tl.tensor, first_lse: tl.tensor,  # of attention sinks [B, H, 1, E]; None: no sinks
    query: tl.tensor,  # [B, H, D]
    key_means: tl.tensor,  # float32 [pages, G, D], subtracted before encoding; None: not subtracted
    value_means: tl.tensor,
    first_table: tl.tensor,  # int32 [B, 1 or more]
    decode: tl.tensor,  # of values [G, E, R]
    output: tl.tensor,  # [B, H, E]
    scale: tl.tensor,
    shared: tl.tensor, key_size: tl.tensor, size: tl.tensor, width: tl.tensor,  # M, D, E, R
    query_b: tl.tensor, query_h: tl.tensor, output_b: tl.tensor, output_h: tl.tensor,  # strides
    decode_h: tl.tensor, decode_e: tl.tensor, key_means_b: tl.tensor, key_means_h: tl.tensor,
    value_means_b: tl.tensor, value_means_h: tl.tensor, first_table_b: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the parts of a kv head's queries by log-sum-exp, for BLOCK_E channels."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m, e = tl.arange(0, BLOCK_M), tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside, real = m < shared, e < size
    head = g * shared + m
    row = b * tl.num_programs(1) * shared + head  # [M]

    far_sum = tl.load(far_lse + row, mask=inside, other=-float("inf"))
    near_sum = tl.load(near_lse + row, mask=inside, other=-float("inf"))
    has_far = tl.max(far_sum, 0) > -float("inf")  # else there may be no mean, and its memory is undefined
    page = tl.load(first_table + b * first_table_b).to(tl.int64)
    if key_means is not None:
        queries, mean = query + b * query_b + head[:, None] * query_h, key_means + page * key_means_b + g * key_means_h
        far_sum += scale * products_with(mean, queries, inside, key_size, has_far, BLOCK_M, BLOCK_D)
    top = tl.maximum(far_sum, near_sum)
    if first is not None:
        first_sum = tl.load(first_lse + row, mask=inside, other=-float("inf"))
        top = tl.maximum(top, first_sum)
    top = tl.where(top == -float("inf"), 0.0, top)
    far_weight, near_weight = tl.exp(far_sum - top), tl.exp(near_sum - top)
    total = far_weight + near_weight

    decoders = decode + g * decode_h + e[None, :] * decode_e
    x = expanded(far + row[:, None] * width, decoders, inside, real, width, BLOCK_R)
    if value_means is not None:
        mean = value_means + page * value_means_b + g * value_means_h + e
        x += tl.load(mean, mask=e < tl.where(has_far, size, 0), other=0.0)[None, :]
    x = x * far_weight[:, None]
    both, at = inside[:, None] & real[None, :], row[:, None] * size + e[None, :]  # [M, E]
    x += tl.load(near + at, mask=both, other=0.0).to(tl.float32) * near_weight[:, None]
    if first is not None:
        weight = tl.exp(first_sum - top)
        total += weight
        x += tl.load(first + at, mask=both, other=0.0).to(tl.float32) * weight[:, None]
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(total == 0.0, 1.0, total)[:, None])
    to = output + b * output_b + head[:, None] * output_h + e[None, :]
    tl.store(to, x.to(output.dtype.element_ty), mask=both)


@_jit
def products_with(
    mean: tl.tensor, queries: tl.tensor, inside: tl.tensor, size: tl.tensor, has_mean: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the dot products of queries with a mean, float32 [M]: of addresses [M, 1] and of one, size D."""
    result = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(queries + d[None, :], mask=inside[:, None] & (d < size)[None, :], other=0.0)
        known = tl.load(mean + d, mask=d < tl.where(has_mean, size, 0), other=0.0)
        result += tl.sum(q.to(tl.float32) * known[None, :], 1)
    return result


@_jit
def expanded(
    latents: tl.tensor, decode: tl.tensor, inside: tl.tensor, real: tl.tensor, width: tl.tensor, BLOCK_R: tl.constexpr
) -> tl.tensor:
    """Decode latents, addresses [M, 1], with decoders, addresses [1, E]: float32 [M, E]."""
    x = tl.zeros([inside.shape[0], real.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        z = tl.load(latents + r[None, :], mask=inside[:, None] & (r < width)[None, :], other=0.0)
        known = tl.load(decode + r[:, None], mask=real[None, :] & (r < width)[:, None], other=0.0)
        x = tl.dot(z, known, x, input_precision="ieee")
    return x
