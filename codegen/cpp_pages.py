"""Which pages of a cache a query reads: the weight of each by the sketches of its tokens, as one C++ file for CPUs.

    x[t] = constant + scale[t] sum_c w_c u_c[t]        weight[p] = sum over t in p of exp(x[t])

The codes u and their scales are all that is read. Sixteen tokens are reckoned at a time, a token in each lane: their
rows are turned into words of four codes a lane, and multiplied with the query in 8 bits, for all query heads that share
the latent head. Then either the logs of the weights are the result, or the pages of each unit that weigh most.
`fhopt.pages` says what the numbers mean, and has the reference.

Letters: B batch, J latent heads, M query rows of a latent head, T tokens, P pages, r channels of a sketch, U units, N
pages of a list.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fhopt.codegen.build import CompileError, load
from fhopt.codegen.cpp_vectors import BYTES, EXPONENTIAL, VECTORS
from fhopt.page_ops import FEWEST, Choice, Threshold

TILE = 16  # tokens; pages are a multiple of it
MOST_TOKENS = 1024  # of a page
MOST_WORDS = 64  # of four bytes of codes, of a token
log = logging.getLogger(__name__)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int64) for name in (
            "batch", "heads", "rows", "channels", "words", "tokens", "length", "page_tokens", "threads", "code_b",
            "code_j", "code_t", "scale_b", "scale_j", "mask_b", "mask_t", "units", "most", "read", "pages", "fewest",
        )],
        ("mass", ctypes.c_double),
        ("lift", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in (
            "weights", "constant", "codes", "scales", "mask", "word_bits", "word_channels", "word_steps", "near",
            "estimates", "lists", "odds", "counts",
        )],
    )  # fmt: skip


@functools.cache
def _compiled() -> ctypes._NamedFuncPointer | None:
    """The compiled function; None where it cannot be compiled."""
    try:
        function = load("choose_pages", TEXT).choose_pages
    except CompileError as error:
        log.info("%s Pages are weighed by torch.", error)
        return None
    function.argtypes, function.restype = (ctypes.POINTER(_Arguments),), None
    return function


def weigh_pages(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, mask: Tensor | None, length: int, choice: Choice | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Log of the weight of each page, float32 [B,J,M,P], -inf where it has no token; or, with a choice, lists of the
    pages that weigh most, int32 [B,U,N], the log odds of what they leave out, float32 [B,J,M], and their counts.

    weights float32 [B,J,M,r], constant float32 [B,J,M]; codes uint8 [B,J,T,bytes] in tiers of `bits`, `widths` and
    `steps`; scales float16 [B,J,T]. mask bool, [1 or B, 1, 1, T]: tokens that count, of the first `length`. The query
    is rounded to 8 bits, which moves the logit of a token by up to 1/254 of the largest weight, times the sum of its
    codes. None where the kernel does not serve.
    """
    function = _compiled()
    words = _words(tuple(bits), tuple(widths), tuple(steps))
    if function is None or words is None or page_tokens % TILE or page_tokens > MOST_TOKENS:
        return None
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1)):
        return None
    (b, j, m, r), tokens = weights.shape, codes.shape[2]
    if codes.shape[3] != 4 * len(words[0]) or r != sum(widths):
        return None
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    scales = scales if scales.stride(2) == 1 else scales.contiguous()
    out = (
        (weights.new_empty((b, j, m, -(-tokens // page_tokens))),)
        if choice is None
        else (
            codes.new_empty((b, choice.units, choice.most), dtype=torch.int32),
            weights.new_empty((b, j, m)),
            codes.new_empty(4, dtype=torch.int64),
        )
    )
    mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    given = choice or Choice(1, 0, 0, Threshold(1.0, 0.0, 0), None)
    near = None if given.near is None else given.near.to(torch.float32).contiguous()
    kept = weights.contiguous(), constant.contiguous(), codes, scales, mask, *words, near
    pointers = [None if x is None else x.data_ptr() for x in kept]
    places = [x.data_ptr() for x in out]
    results = (*places, None, None, None) if choice is None else (None, *places)
    arguments = _Arguments(
        b, j, m, r, len(words[0]), tokens, min(tokens, length), page_tokens, torch.get_num_threads(),
        *codes.stride()[:3], *scales.stride()[:2], *mask_strides, given.units, given.most, given.read,
        int(given.threshold.pages), FEWEST, given.threshold.mass, given.threshold.lift, *pointers, *results,
    )  # fmt: skip
    function(ctypes.byref(arguments))
    return out


@functools.cache
def _words(
    bits: tuple[int, ...], widths: tuple[int, ...], steps: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of each word of a row: bits of its codes, the first of its channels, step. None for rows that are not words."""
    sizes = [b * w // 8 for b, w in zip(bits, widths, strict=True)]
    if any(b not in (2, 4) or size % 4 for b, size in zip(bits, sizes, strict=True)):
        return None
    codes = [32 // b for b, size in zip(bits, sizes, strict=True) for _ in range(size // 4)]
    if not 0 < len(codes) <= MOST_WORDS:
        return None
    counts = torch.tensor(codes)
    each = [s for s, size in zip(steps, sizes, strict=True) for _ in range(size // 4)]
    return (32 // counts).to(torch.int32), (counts.cumsum(0) - counts).to(torch.int32), torch.tensor(each)


TEXT = (
    r"""// choose_pages
//
// The weight of each page of a cache by the sketches of its tokens, and the pages that weigh most:
//
//     x[t] = constant + scale[t] sum_c w[c] u[c][t]        weight[p] = sum over t in p of exp(x[t])
//
//     weights [B,J,M,r]   constant [B,J,M]   codes [B,J,T,bytes]   scale [B,J,T]
//     ->  log weight [B,J,M,P]   or   lists of pages [B,U,N], ascending, -1 behind them, and
//                                     log of the weight of the pages that are not listed over that of those that are
//
//     B batch, J latent heads, M query rows of a latent head, T tokens, P pages, r channels of a sketch, U units
//
// A lane is a token: words of four bytes of 16 rows, a row each, are cut into codes, each kind four to a lane, and
// multiplied with the query's weights in 8 bits. Weights are kept in base 2, relative to the largest logit of a run of
// pages, so that no logarithm is needed for a choice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

"""
    + VECTORS
    + BYTES
    + EXPONENTIAL
    + r"""
// ------------------------------------------------------------------------------------------------ arguments

struct Arguments {
    int64_t batch, heads, rows, channels, words, tokens, length, page_tokens, threads;
    int64_t code_b, code_j, code_t, scale_b, scale_j, mask_b, mask_t;
    int64_t units, most, read;
    int64_t pages, fewest;       // that there are to choose from; that are listed however little they weigh
    double mass, lift;
    const float *weights, *constant;
    const uint8_t* codes;
    const uint16_t* scales;
    const uint8_t* mask;         // or null
    const int32_t *word_bits, *word_channels;
    const float* word_steps;
    const float* near;           // [B,J,M]: log of the weight of what is read in any case; or null
    float* estimates;            // or null
    int32_t* lists;              // or null
    float* odds;                 // [B,J,M], where there are lists
    int64_t* counts;             // likewise, [4]: lists, 0, pages in them, pages that they were chosen from
};

constexpr int TILE = 16;         // tokens, one a lane
constexpr int HEADS = 4;         // query rows at a time
constexpr int WORDS = 64;        // that a row may have
constexpr int AHEAD = 256;       // tokens that are fetched into the cache before they are needed
constexpr int RUN = 1024;        // tokens that are weighed against the same largest logit

// The query rows of one latent head, as they are multiplied.
struct Query {
    int8_t codes[HEADS][WORDS][4][4];  // of a word, of each shift: what its four bytes are multiplied by
    float step[HEADS], offset[HEADS];
};

void prepare(const Arguments& a, const float* weights, int rows, Query& q) {
    std::memset(q.codes, 0, sizeof q.codes);
    for (int h = 0; h < rows; h++) {
        const float* w = weights + h * a.channels;
        float top = 0;
        for (int64_t k = 0; k < a.words; k++) {
            const float* of = w + a.word_channels[k];
            for (int i = 0; i < 32 / a.word_bits[k]; i++) top = std::max(top, std::abs(of[i] * a.word_steps[k]));
        }
        const float inverse = top > 1e-30f ? 127 / top : 0;
        double offset = 0;
        for (int64_t k = 0; k < a.words; k++) {
            const int bits = a.word_bits[k], each = 8 / bits;
            for (int m = 0; m < 4; m++) {
                for (int i = 0; i < each; i++) {
                    const float x = w[a.word_channels[k] + m * each + i] * a.word_steps[k];
                    const int8_t code = int8_t(std::nearbyint(x * inverse));
                    q.codes[h][k][i][m] = code;
                    offset -= 0.5 * ((1 << bits) - 1) * code;
                }
            }
        }
        q.step[h] = top > 1e-30f ? float(LOG2E) * top / 127 : 0;
        q.offset[h] = float(offset);
    }
}

// ------------------------------------------------------------------------------------------------ a tile

// Words of `count` rows, each in a lane; zeros for the others.
struct AnyRows {
    static constexpr int W = 0;  // words of a row, where that is known
    const Arguments& a;

    INLINE void operator()(const uint8_t* rows, int64_t, int count, Ints16* words) const {
        int32_t lanes[WORDS][TILE];
        if (count < TILE) std::memset(lanes, 0, sizeof *lanes * a.words);
        for (int t = 0; t < count; t++) {
            for (int64_t k = 0; k < a.words; k++) std::memcpy(&lanes[k][t], rows + t * a.code_t + 4 * k, 4);
        }
        std::memcpy(words, lanes, sizeof *words * a.words);
    }
};

#if defined(__AVX512F__)
// The same for rows that lie one behind the other: 16 of them are W vectors.
template <int WORDS_OF_ROW>
struct WholeRows {
    static constexpr int W = WORDS_OF_ROW;
    AnyRows any;
    __m512i index[W][W];

    explicit WholeRows(const Arguments& a) : any{a} {
        for (int k = 0; k < W; k++) {
            for (int s = 1; s < W; s++) {
                int32_t lanes[16];
                for (int t = 0; t < 16; t++) {
                    const int from = (W * t + k) / 16, lane = (W * t + k) % 16;
                    lanes[t] = from == s ? 16 + lane : s == 1 && from == 0 ? lane : t;
                }
                index[k][s] = _mm512_loadu_si512(lanes);
            }
        }
    }

    INLINE void operator()(const uint8_t* rows, int64_t first, int count, Ints16* words) const {
        if (first + TILE > any.a.tokens) return any(rows, first, count, words);
        __m512i parts[W];
        UNROLL(8) for (int s = 0; s < W; s++) parts[s] = _mm512_loadu_si512(rows + 64 * s);
        UNROLL(8) for (int k = 0; k < W; k++) {
            __m512i word = parts[0];
            UNROLL(8) for (int s = 1; s < W; s++) word = _mm512_permutex2var_epi32(word, index[k][s], parts[s]);
            words[k] = (Ints16)word;
        }
    }
};
#endif

template <int ROWS, int TILES, int W>
INLINE void products(const Arguments& a, const Query& q, const Ints16 (*words)[WORDS], Ints16 (*sums)[ROWS]) {
    Ints16 sum[TILES][ROWS] = {};
    const int count = W ? W : int(a.words);
    UNROLL(8) for (int k = 0; k < count; k++) {
        const auto add = [&](int i, auto cut) {
            Ints16 codes[TILES];
            for (int n = 0; n < TILES; n++) codes[n] = cut(words[n][k]);
            UNROLL(4) for (int h = 0; h < ROWS; h++) {
                const int32_t weights = four_at(q.codes[h][k][i]);
                for (int n = 0; n < TILES; n++) sum[n][h] = add_products(sum[n][h], codes[n], weights);
            }
        };
        if (a.word_bits[k] == 4) {
            add(0, [](Ints16 x) { return low_halves(x); });
            add(1, [](Ints16 x) { return high_halves(x); });
        } else {
            add(0, [](Ints16 x) { return x & 0x03030303; });
            add(1, [](Ints16 x) { return x >> 2 & 0x03030303; });
            add(2, [](Ints16 x) { return x >> 4 & 0x03030303; });
            add(3, [](Ints16 x) { return x >> 6 & 0x03030303; });
        }
    }
    std::memcpy(sums, sum, sizeof sum);
}

// ------------------------------------------------------------------------------------------------ weights

// What weighing leaves: of each row, weights of its pages relative to the largest logit of their run.
struct Weights {
    std::vector<float> pages;    // [B,J,M,P]
    std::vector<float> tops;     // [B,J,M,runs], in base 2
    int64_t count, runs, pages_of_run;
};

INLINE Floats16 scales_at(const uint16_t* p, int count) {
    uint16_t halves[TILE];
    if (count == TILE) std::memcpy(halves, p, sizeof halves);
    else for (int t = 0; t < TILE; t++) halves[t] = t < count ? p[t] : 0;
    float lanes[TILE];
    for (int i = 0; i < TILE; i += LANES) store(lanes + i, Float16::load(halves + i));
    Floats16 scales;
    std::memcpy(&scales, lanes, sizeof scales);
    return scales;
}

// Logits of TILES tiles for ROWS rows, -inf for tokens that do not count, into x[h * RUN].
template <int ROWS, int TILES, class Fetch>
INLINE void tiles(const Arguments& a, const Query& q, int64_t b, int64_t j, int64_t first, float* x,
                  const Fetch& fetched) {
    Ints16 words[TILES][WORDS], sums[TILES][ROWS];
    const int count = int(std::min<int64_t>(TILE * TILES, a.length - first));  // several tiles are whole
    const uint8_t* rows = a.codes + b * a.code_b + j * a.code_j + first * a.code_t;
    const uint16_t* scales = a.scales + b * a.scale_b + j * a.scale_j + first;
    for (int64_t i = 0; i < TILES * TILE * a.code_t; i += 64) __builtin_prefetch(rows + AHEAD * a.code_t + i, 0, 3);
    __builtin_prefetch(scales + AHEAD, 0, 3);
    for (int n = 0; n < TILES; n++) {
        fetched(rows + n * TILE * a.code_t, first + n * TILE, std::min(TILE, count), words[n]);
    }
    products<ROWS, TILES, Fetch::W>(a, q, words, sums);
    for (int n = 0; n < TILES; n++) {
        const Floats16 scale = scales_at(scales + n * TILE, std::min(TILE, count));
        UNROLL(4) for (int h = 0; h < ROWS; h++) {
            const Floats16 logits = (__builtin_convertvector(sums[n][h], Floats16) + q.offset[h]) * (scale * q.step[h]);
            store(x + h * RUN + n * TILE, logits);
        }
    }
    if (count == TILE * TILES && !a.mask) return;
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_b + first * a.mask_t : nullptr;
    for (int t = 0; t < TILE * TILES; t++) {
        const bool counts = t < count && (!mask || mask[t * a.mask_t]);
        for (int h = 0; h < ROWS && !counts; h++) x[h * RUN + t] = -INF;
    }
}

// Pages of one run, for ROWS rows from `row` on.
template <int ROWS, class Fetch>
void run(const Arguments& a, const Query& q, int64_t b, int64_t j, int64_t row, int64_t r, Weights& out,
         const Fetch& fetched) {
    alignas(64) float x[ROWS * RUN];
    const int64_t begin = r * out.pages_of_run * a.page_tokens;
    const int64_t end = std::min(begin + out.pages_of_run * a.page_tokens, a.length);
    int64_t t = begin;
    for (; t + 2 * TILE <= end; t += 2 * TILE) tiles<ROWS, 2>(a, q, b, j, t, x + (t - begin), fetched);
    for (; t < end; t += TILE) tiles<ROWS, 1>(a, q, b, j, t, x + (t - begin), fetched);
    const int64_t size = (end - begin + TILE - 1) / TILE * TILE;
    const int64_t first = r * out.pages_of_run, last = std::min(first + out.pages_of_run, out.count);
    for (int h = 0; h < ROWS; h++) {
        float* logits = x + h * RUN;
        Floats highest = Floats{} - INF;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats v = load(logits + i);
            highest = v > highest ? v : highest;
        }
        const float top = largest_of(highest), base = top == -INF ? 0 : top;
        const int64_t of = (b * a.heads + j) * a.rows + row + h;
        out.tops[of * out.runs + r] = top;
        UNROLL(4) for (int64_t i = 0; i < size; i += LANES) store(logits + i, exp2(load(logits + i) - base));
        const auto sum = [&](int64_t p) {
            const int64_t from = (p - first) * a.page_tokens, to = std::min(from + a.page_tokens, size);
            Floats sum{};
            for (int64_t i = from; i < to; i += LANES) sum += load(logits + i);
            return sum;
        };
        float* weights = &out.pages[of * out.count];
        int64_t p = first;
        for (; p + 4 <= last; p += 4) store(weights + p, sums_of(sum(p), sum(p + 1), sum(p + 2), sum(p + 3)));
        for (; p < last; p++) weights[p] = sum_of(sum(p));
    }
}

template <class Fetch>
void weigh(const Arguments& a, Weights& out, const Fetch& fetched) {
    const int64_t groups = (a.rows + HEADS - 1) / HEADS, all = a.batch * a.heads * groups;
    std::vector<Query> queries(all);
    for (int64_t i = 0; i < all; i++) {
        const int64_t row = i / groups * a.rows + i % groups * HEADS;
        const int rows = int(std::min<int64_t>(HEADS, a.rows - i % groups * HEADS));
        prepare(a, a.weights + row * a.channels, rows, queries[i]);
    }
#pragma omp parallel for collapse(2) num_threads(a.threads) if (a.threads > 1) schedule(static)
    for (int64_t i = 0; i < all; i++) {
        for (int64_t r = 0; r < out.runs; r++) {
            const int64_t b = i / groups / a.heads, j = i / groups % a.heads, row = i % groups * HEADS;
            const Query& q = queries[i];
            switch (std::min<int64_t>(HEADS, a.rows - row)) {
                case 1: run<1>(a, q, b, j, row, r, out, fetched); break;
                case 2: run<2>(a, q, b, j, row, r, out, fetched); break;
                case 3: run<3>(a, q, b, j, row, r, out, fetched); break;
                default: run<4>(a, q, b, j, row, r, out, fetched);
            }
        }
    }
}

void weigh(const Arguments& a, Weights& out) {
#if defined(__AVX512F__)
    switch (a.code_t == 4 * a.words ? a.words : 0) {
        case 2: return weigh(a, out, WholeRows<2>(a));
        case 3: return weigh(a, out, WholeRows<3>(a));
        case 4: return weigh(a, out, WholeRows<4>(a));
        case 5: return weigh(a, out, WholeRows<5>(a));
        case 6: return weigh(a, out, WholeRows<6>(a));
        default: break;
    }
#endif
    weigh(a, out, AnyRows{a});
}

// ------------------------------------------------------------------------------------------------ the choice

// Log of the weight that a row expects of pages that are not listed over that of those that are.
float odds_left_out(const Weights& w, int64_t m, const int32_t* list, int64_t listed) {
    const float *tops = &w.tops[m * w.runs], *pages = &w.pages[m * w.count];
    const float top = *std::max_element(tops, tops + w.runs);
    double left = 0, read = 0;
    for (int64_t r = 0, i = 0; r < w.runs; r++) {
        const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
        float of_list = 0, others = 0;
        for (int64_t p = from; p < to; p++) {
            const int64_t next = i < listed ? std::min<int64_t>(list[i], to) : to;
            for (; p < next; p++) others += pages[p];
            if (p < to) of_list += pages[p], i++;
        }
        const double factor = tops[r] == -INF ? 0 : std::exp2(double(tops[r]) - top);
        left += factor * others;
        read += factor * of_list;
    }
    return left > 0 && read > 0 ? float(LN2 * std::log2(left / read)) : -INF;
}

// What a unit expects of each page: the mean over its rows of the page's share in all weight, near included.
std::vector<float> expected(const Arguments& a, const Weights& w, int64_t first, int64_t rows) {
    std::vector<float> share(w.count, 0.0f);
    for (int64_t m = first; m < first + rows; m++) {
        const float *tops = &w.tops[m * w.runs], *pages = &w.pages[m * w.count];
        const double highest = *std::max_element(tops, tops + w.runs);
        if (highest == -INF) continue;
        const double near = a.near ? (double(a.near[m]) - a.constant[m]) / LN2 : -INF;  // in base 2, as tops are
        const double top = std::max(highest, near);
        std::vector<double> factors(w.runs);
        double total = std::exp2(near - top);
        for (int64_t r = 0; r < w.runs; r++) {
            const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
            factors[r] = tops[r] == -INF ? 0 : std::exp2(double(tops[r]) - top);
            float sum = 0;
            for (int64_t p = from; p < to; p++) sum += pages[p];
            total += factors[r] * sum;
        }
        for (int64_t r = 0; r < w.runs; r++) {
            const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
            const float factor = float(factors[r] / total / rows);
            for (int64_t p = from; p < to; p++) share[p] += factor * pages[p];
        }
    }
    return share;
}

// How many of the first `room` pages by weight are needed, so that the others have at most 1 - mass of it.
int64_t needed_for(double mass, std::vector<float> share, int64_t room) {
    const double all = std::accumulate(share.begin(), share.end(), 0.0);
    std::partial_sort(share.begin(), share.begin() + room, share.end(), std::greater<float>());
    double before = 0;
    int64_t needed = 0;
    while (needed < room && all - before > 1 - mass) before += share[needed++];
    return needed;
}

// The pages of one list: those of the largest share, as many as there is room for and as weigh enough.
void choose(const Arguments& a, const Weights& w, int64_t unit, int32_t* list) {
    const int64_t rows = a.heads / a.units * a.rows, first = unit * rows;
    const std::vector<float> share = expected(a, w, first, rows);
    int64_t kept = std::min({a.read, a.most, w.count}), found = 0;
    const float enough = a.lift > 0 ? float(a.lift / a.pages) : 0;
    const int64_t weighty = std::count_if(share.begin(), share.end(), [=](float x) { return x >= enough; });
    if (a.lift > 0) kept = std::min(kept, std::max(weighty, a.fewest));
    if (a.mass < 1) kept = needed_for(a.mass, share, kept);
    float least = kept == 0 ? INF : 0;
    if (kept > 0 && kept == weighty) {
        least = enough;
    } else if (kept > 0 && kept < w.count) {
        std::vector<float> best = share;
        std::nth_element(best.begin(), best.begin() + kept - 1, best.end(), std::greater<float>());
        least = best[kept - 1];
    }
    const int64_t more = std::count_if(share.begin(), share.end(), [=](float x) { return x > least; });
    int64_t ties = kept - more;  // places that are left for pages of the least weight
    for (int64_t p = 0; p < w.count && found < kept; p++) {
        if (share[p] <= 0 || share[p] < least) continue;
        if (share[p] == least && ties-- <= 0) continue;
        list[found++] = int32_t(p);
    }
    std::fill(list + found, list + a.most, -1);
    for (int64_t m = first; m < first + rows; m++) a.odds[m] = odds_left_out(w, m, list, found);
}

}  // namespace

extern "C" void choose_pages(const Arguments* given) {
    const Arguments& a = *given;
    static thread_local Weights kept;  // and its memory with it
    Weights& w = kept;
    w.count = (a.tokens + a.page_tokens - 1) / a.page_tokens;
    w.pages_of_run = RUN / a.page_tokens;
    w.runs = (w.count + w.pages_of_run - 1) / w.pages_of_run;
    const int64_t all = a.batch * a.heads * a.rows;
    w.pages.resize(all * w.count);
    w.tops.resize(all * w.runs);
    weigh(a, w);
    for (int64_t i = 0; a.estimates && i < all * w.count; i++) {
        const int64_t row = i / w.count, r = i % w.count / w.pages_of_run;
        const float sum = w.tops[row * w.runs + r] + std::log2(w.pages[i]);
        a.estimates[i] = w.pages[i] > 0 ? a.constant[row] + float(LN2) * sum : -INF;
    }
    const int64_t units = a.lists ? a.batch * a.units : 0;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
    for (int64_t u = 0; u < units; u++) choose(a, w, u, a.lists + u * a.most);
    if (!a.lists) return;
    int32_t* end = a.lists + units * a.most;
    const int64_t listed = std::count_if(a.lists, end, [](int32_t p) { return p >= 0; });
    const int64_t counts[4] = {units, 0, listed, units * a.pages};
    std::copy(counts, counts + 4, a.counts);
}
"""
)
