// The weights of pages: codes of sketches times queries in 8 bits, a token in each lane.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"
#include "byte_products.h"
#include "exponential.h"
#include "page_call.h"

namespace {

constexpr int TILE = 16;         // tokens, one a lane
constexpr int HEADS = 4;         // query rows at a time
constexpr int WORDS = MAX_SKETCH_WORDS;  // that a row may have
constexpr int AHEAD = 256;       // tokens that are fetched into the cache before they are needed
constexpr int RUN = MAX_PAGE_TOKENS;  // tokens that are weighed against the same largest logit

// The query rows of one latent head, as they are multiplied.
struct Query {
    int8_t codes[HEADS][WORDS][4][4];  // of a word, of each shift: what its four bytes are multiplied by
    float step[HEADS], offset[HEADS];
};

void prepare(const Sketches& a, const float* weights, int rows, Query& q) {
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
    const Sketches& a;

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

    explicit WholeRows(const Sketches& a) : any{a} {
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
INLINE void products(const Sketches& a, const Query& q, const Ints16 (*words)[WORDS], Ints16 (*sums)[ROWS]) {
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
    // clang-format off
    if (count == TILE) std::memcpy(halves, p, sizeof halves);
    else for (int t = 0; t < TILE; t++) halves[t] = t < count ? p[t] : 0;
    // clang-format on
    float lanes[TILE];
    for (int i = 0; i < TILE; i += LANES) store(lanes + i, Float16::load(halves + i));
    Floats16 scales;
    std::memcpy(&scales, lanes, sizeof scales);
    return scales;
}

// Logits of TILES tiles for ROWS rows, -inf for tokens that do not count, into x[h * RUN].
template <int ROWS, int TILES, class Fetch>
INLINE void tiles(const Sketches& a, const Query& q, int64_t b, int64_t j, int64_t first, float* x,
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
void run(const Sketches& a, const Query& q, int64_t b, int64_t j, int64_t row, int64_t r, Weights& out,
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
            Floats4 rest{};  // of pages that are no whole vectors
            int64_t i = from;
            for (; i + LANES <= to; i += LANES) sum += load(logits + i);
            for (; i < to; i += 4) rest += load4(logits + i);
            return fold_sum(sum) + rest;
        };
        float* weights = &out.pages[of * out.count];
        int64_t p = first;
        for (; p + 4 <= last; p += 4) store(weights + p, sums_of_four(sum(p), sum(p + 1), sum(p + 2), sum(p + 3)));
        for (; p < last; p++) weights[p] = sum_of_four(sum(p));
    }
}

template <class Fetch>
void weigh(const Sketches& a, Weights& out, const Fetch& fetched) {
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

void weigh(const Sketches& a, Weights& out) {
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

}  // namespace
