"""Which pages of a cache matter to a query: the weight of each by the sketches of its tokens, as one C++ file for CPUs.

    x[t] = constant + sum_c w_c u_c[t]        page[p] = log sum over t in p of exp(x[t])

The codes u are all that is read. Sixteen tokens are reckoned at a time, a token in each lane: their rows are fetched as
words of 32 bits, a channel's codes are cut out of them by the same shift in all lanes, and serve all query heads that
share the latent head. `fhopt.pages` says what the numbers mean, and has the reference.

Letters: B batch, J latent heads, M query rows of a latent head, T tokens, P pages, r channels of a sketch.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from fhopt.codegen.build import CompileError, load

TILE = 16  # tokens; pages are a multiple of it
MOST_BYTES = 256  # of a row of codes
log = logging.getLogger(__name__)


@functools.cache
def _compiled() -> ctypes._NamedFuncPointer | None:
    """The compiled function; None where it cannot be compiled."""
    try:
        function = load("page_logits", TEXT).page_logits
    except CompileError as error:
        log.info("%s Pages are weighed by torch.", error)
        return None
    function.argtypes, function.restype = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 12, None
    return function


def page_logits(
    weights: Tensor, constant: Tensor, codes: Tensor, bits: int, page_tokens: int, length: int
) -> Tensor | None:
    """Log of the weight of each page: float32 [B,J,M,P], -inf for pages from `length` on; None where it cannot be done.

    weights float32 [B,J,M,r] of the codes as they are, constant float32 [B,J,M]; codes uint8 [B,J,T,bytes].
    """
    function = _compiled()
    if function is None or page_tokens % TILE or bits not in (2, 3, 4):
        return None
    if codes.shape[3] * 8 != weights.shape[3] * bits or codes.shape[3] > MOST_BYTES:
        return None
    (b, j, m, r), tokens = weights.shape, codes.shape[2]
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    out = weights.new_empty((b, j, m, -(-tokens // page_tokens)))
    weights, constant = weights.contiguous(), constant.contiguous()
    addresses = (x.data_ptr() for x in (weights, constant, codes, out))
    sizes = (b, j, m, r, min(tokens, length), tokens, page_tokens, bits)
    function(*addresses, *sizes, *codes.stride()[:3], torch.get_num_threads())
    return out


TEXT = r"""// page_logits
//
// The weight of each page of a cache by the sketches of its tokens:
//
//     x[t] = constant + sum_c w[c] u[c][t]        page[p] = log sum over t in p of exp(x[t])
//
//     weights [B,J,M,r]   constant [B,J,M]   codes [B,J,T,bytes]   ->   page [B,J,M,P]
//
//     B batch, J latent heads, M query rows of a latent head, T tokens, P pages, r channels of a sketch
//
// A row of codes is bit planes, as the packed latents are: 2 bits are one plane, 3 are planes of 2 and 1, 4 are one. A
// lane is a token: 16 rows are fetched as words of 32 bits, and a channel's codes are cut out of all of them at once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

constexpr int TILE = 16;   // tokens, one a lane
constexpr int HEADS = 4;   // query rows at a time
constexpr int WORDS = 64;  // that a row of codes may have
typedef float Floats __attribute__((vector_size(4 * TILE)));
typedef int32_t Ints __attribute__((vector_size(4 * TILE)));
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Sizes {
    int64_t batch, latent_heads, rows, channels, length, tokens, page_tokens, stride_b, stride_j, stride_t, row_bytes;
};

// 2^x for x of at most 0, to 2e-7 relative; 0 below -126.
static inline Floats power(Floats x) {
    x = x < -126.0f ? Floats{} - 126.0f : x;
    Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // towards zero: to the nearest, of negative numbers
    Floats f = x - __builtin_convertvector(whole, Floats);
    Floats y = Floats{} + 1.540353039338161e-4f;
    y = y * f + 1.333355814642844e-3f;
    y = y * f + 9.618129107628477e-3f;
    y = y * f + 5.550410866482158e-2f;
    y = y * f + 2.402265069591007e-1f;
    y = y * f + 6.931471805599453e-1f;
    y = y * f + 1.0f;
    Ints exponent = (whole + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return y * scale;
}

// All lanes brought together by `join`, half of them at a time.
template <class Join>
static inline float folded(Floats x, Join join) {
    float lanes[TILE];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int n = TILE / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = join(lanes[i], lanes[i + n]);
    return lanes[0];
}

// Words of the rows from token `first` on, of which `count` may be read whole; zeros for the others.
template <int COUNT_ALL>
static inline void fetch(const uint8_t* rows, int64_t stride, int64_t bytes, int count, Ints* words) {
    const int64_t needed = (bytes + 3) / 4;
    if (COUNT_ALL) {
        for (int64_t k = 0; k < needed; k++) {
            int32_t lanes[TILE];
            for (int t = 0; t < TILE; t++) std::memcpy(&lanes[t], rows + t * stride + 4 * k, 4);
            std::memcpy(&words[k], lanes, sizeof lanes);
        }
        return;
    }
    for (int64_t k = 0; k < needed; k++) words[k] = Ints{};
    for (int t = 0; t < count; t++)
        for (int64_t k = 0; k < needed; k++) {
            int32_t word = 0;
            std::memcpy(&word, rows + t * stride + 4 * k, size_t(std::min<int64_t>(4, bytes - 4 * k)));
            words[k][t] = word;
        }
}

// The codes of channel c of r as floats.
template <int BITS>
static inline Floats codes_of(const Ints* words, int64_t c, int64_t r) {
    constexpr int HIGH = BITS == 3 ? 2 : BITS;
    int64_t bit = c * HIGH;
    Ints code = (words[bit / 32] >> int(bit % 32)) & ((1 << HIGH) - 1);
    if (BITS == 3) {
        bit = 2 * r + c;
        code = (code << 1) | ((words[bit / 32] >> int(bit % 32)) & 1);
    }
    return __builtin_convertvector(code, Floats);
}

// One page for HEADS query rows from `row` on, of which `rows` are there.
template <int BITS>
static void page(
    const Sizes& s, const float* weights, const float* constant, const uint8_t* codes, int64_t number, int rows,
    float* out, int64_t out_stride
) {
    Floats top[HEADS], sum[HEADS];
    for (int h = 0; h < HEADS; h++) top[h] = Floats{} + LOWEST, sum[h] = Floats{};
    const int64_t begin = number * s.page_tokens, end = std::min(begin + s.page_tokens, s.length);
    for (int64_t t = begin; t < end; t += TILE) {
        Ints words[WORDS];
        const int count = int(std::min<int64_t>(TILE, end - t));
        const uint8_t* at = codes + t * s.stride_t;
        const bool whole = t + TILE < s.tokens;  // what is read beyond a row is another one
        if (whole) fetch<1>(at, s.stride_t, s.row_bytes, TILE, words);
        else fetch<0>(at, s.stride_t, s.row_bytes, count, words);
        Floats x[HEADS] = {};
        for (int64_t c = 0; c < s.channels; c++) {
            const Floats u = codes_of<BITS>(words, c, s.channels);
            for (int h = 0; h < HEADS; h++) x[h] += weights[(h < rows ? h : 0) * s.channels + c] * u;
        }
        Ints lane;
        for (int i = 0; i < TILE; i++) lane[i] = i;
        for (int h = 0; h < HEADS; h++) {
            const Floats y = lane < count ? x[h] * 1.4426950408889634f : Floats{} + LOWEST;
            const Floats one = lane < count ? Floats{} + 1.0f : Floats{};
            if (t == begin) {  // and the last one, of small pages
                top[h] = y;
                sum[h] = one;
                continue;
            }
            const Floats higher = y > top[h] ? y : top[h];
            const Floats base = higher == LOWEST ? Floats{} : higher;
            sum[h] = sum[h] * power(top[h] - base) + power(y - base) * one;
            top[h] = higher;
        }
    }
    for (int h = 0; h < rows; h++) {
        const float highest = folded(top[h], [](float a, float b) { return a > b ? a : b; });
        const Floats parts = sum[h] * power(top[h] - (highest > LOWEST ? highest : 0.0f));
        const float total = folded(parts, [](float a, float b) { return a + b; });
        const float sum_log2 = highest + std::log2(total);
        out[h * out_stride] = highest > LOWEST ? constant[h] + 0.6931471805599453f * sum_log2 : LOWEST;
    }
}

template <int BITS>
static void pages(
    const Sizes& s, const float* weights, const float* constant, const uint8_t* codes, float* out, int threads
) {
    const int64_t count = (s.tokens + s.page_tokens - 1) / s.page_tokens;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t unit = 0; unit < s.batch * s.latent_heads; unit++)
        for (int64_t number = 0; number < count; number++) {
            const int64_t b = unit / s.latent_heads, j = unit % s.latent_heads;
            const uint8_t* rows = codes + b * s.stride_b + j * s.stride_j;
            for (int64_t m = 0; m < s.rows; m += HEADS) {
                const int64_t row = unit * s.rows + m;
                const int here = int(std::min<int64_t>(HEADS, s.rows - m));
                page<BITS>(
                    s, weights + row * s.channels, constant + row, rows, number, here, out + row * count + number, count
                );
            }
        }
}

extern "C" void page_logits(
    const float* weights, const float* constant, const uint8_t* codes, float* out, int64_t batch, int64_t latent_heads,
    int64_t rows, int64_t channels, int64_t length, int64_t tokens, int64_t page_tokens, int64_t bits, int64_t stride_b,
    int64_t stride_j, int64_t stride_t, int64_t threads
) {
    const Sizes s{batch, latent_heads, rows, channels, length, tokens, page_tokens, stride_b, stride_j, stride_t,
                  channels * bits / 8};
    const auto function = bits == 2 ? pages<2> : bits == 3 ? pages<3> : pages<4>;
    function(s, weights, constant, codes, out, int(threads));
}
"""
