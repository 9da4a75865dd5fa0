// Scores of a tile of keys as words of 16 bits, with AVX2.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "word_codes.h"

namespace {

#if WORDS

// A query of floats in the order of channels -> its parts, and what one stands for. What the middle of all codes adds
// to a logit: by all digits but the lowest, and by the lowest. All channels have the same digits.
void to_parts(const Kernel& k, const float* query, int, int8_t* to, float& unit, float& middle, float& lowest, float&) {
    const int count = k.key.layout.count(), padded = 2 * k.key_dwords;
    int16_t* parts = reinterpret_cast<int16_t*>(to);
    float largest = 0, none = 0;
    for (int i = 0; i < count; i++) {
        const float q = query[k.key.layout.codes[i].channel] * k.key_factor[i];
        largest = std::max(largest, std::abs(q));
        none += q * 0.0f;  // NaN stays NaN
    }
    const float inverse = largest > 1e-30f ? 256 * LARGEST / largest : 0.0f;
    __m256 sum = {}, low = {};
    for (int i = 0; i < padded; i += 16) {
        alignas(32) float q[16] = {};
        for (int n = 0; n < std::min(count - i, 16); n++) {
            q[n] = query[k.key.layout.codes[i + n].channel] * k.key_factor[i + n] * inverse;
        }
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(q)), b = _mm256_cvtps_epi32(_mm256_load_ps(q + 8));
        store_words(a, b, parts + padded + i, parts + i);
        for (int n = i; n < i + 16; n += 8) {
            sum += floats_of_words(parts + padded + n) * _mm256_loadu_ps(k.key_middle.data() + n);
            low += floats_of_words(parts + n) * _mm256_loadu_ps(k.key_middle.data() + n);
        }
    }
    unit = largest / (256 * LARGEST) + none;
    middle = sum_of(sum) * unit * 256;
    lowest = sum_of(low) * unit;
}

// Parts of queries of `rows` rows from `row` on, [2, pairs] of each -> [2, pairs, ROWS] of each block of them.
void arrange_queries(const Attention&, int64_t row, int rows, Scratch& s) {
    const Kernel& k = s.kernel;
    const int64_t dwords = k.key_dwords;
    const auto* from = reinterpret_cast<const int32_t*>(s.parts) + 2 * (s.rows + row) * dwords;
    for_blocks_of_rows<MAX_KEY_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        auto* to = reinterpret_cast<int32_t*>(s.parts) + 2 * (row + first) * dwords;
        for (int r = 0; r < ROWS; r++, from += 2 * dwords) {
            for (int i = 0; i < 2 * dwords; i++) to[i * ROWS + r] = from[i];
        }
    });
}

// Tokens of keys at once: 8 for each vector, as many as there are registers for sums.
constexpr int vectors_of_keys(int rows) { return rows <= 4 ? 2 : 1; }

// Adds the codes of a run of keys times a part of queries [pairs, ROWS] to sums.
template <Form FORM, int HIGH, int LOW, int ROWS, int VECTORS>
INLINE void add_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                    __m256i (&to)[ROWS][VECTORS]) {
    constexpr int COUNT = 16 / HIGH >> int(FORM);
    constexpr Form LOWER = LOW == 0 ? FOUR_BYTES : COUNT * LOW == 8 ? TWO_BYTES : ONE_BYTE;
    __m256i sums[ROWS][VECTORS];
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = to[r][v];
    UNROLL(1) for (const Group& g : run.groups) {
        __m256i high[VECTORS], low[VECTORS];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            high[v] = in_words<FORM>(load_words(dwords + v * lanes + g.high), g.high_at);
            low[v] = LOW ? in_words<LOWER>(load_words(dwords + v * lanes + g.low), g.low_at) : high[v];
        }
        for_counts<COUNT>([&](auto k) {
            constexpr int K = decltype(k)::value;
            __m256i codes[VECTORS];
            UNROLL(2) for (int v = 0; v < VECTORS; v++) codes[v] = code_of<HIGH, LOW, K>(high[v], low[v]);
            UNROLL(10) for (int r = 0; r < ROWS; r++) {
                const __m256i q = _mm256_set1_epi32(query[ROWS * K + r]);
                UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], codes[v], q);
            }
        });
        query += ROWS * COUNT;
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) to[r][v] = sums[r][v];
}

template <int ROWS, int VECTORS>
INLINE void add_any_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                        __m256i (&sums)[ROWS][VECTORS]) {
    with_planes(run.bits, [&](auto high, auto low) {
        constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
        if (run.form == FOUR_BYTES) return add_run<FOUR_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        if constexpr (HIGH <= 2) {
            if (run.form == TWO_BYTES) return add_run<TWO_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        }
        if constexpr (HIGH == 1) add_run<ONE_BYTE, HIGH, LOW>(run, dwords, lanes, query, sums);
    });
}

// Products of a part of queries with codes of 8 VECTORS tokens.
template <int ROWS, int VECTORS>
INLINE void products_of_keys(const Kernel& k, const Scratch& s, int64_t row, int part, int vector,
                             __m256 (&x)[ROWS][VECTORS]) {
    const auto* query = reinterpret_cast<const int32_t*>(s.parts) + (2 * row + part * ROWS) * k.key_dwords;
    const int lanes = 4 * int(k.key.layout.pieces.size());
    const auto* dwords = reinterpret_cast<const __m256i*>(s.codes) + vector * lanes;
    __m256i sums[ROWS][VECTORS];
    const auto for_all = [&](auto f) {
        UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) f(x[r][v], sums[r][v]);
    };
    for_all([](__m256& x, __m256i& sum) { x = __m256{}, sum = __m256i{}; });
    for (const Run& run : k.key.layout.runs) {
        if (run.follows_floats) {
            for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum), sum = __m256i{}; });
        }
        add_any_run<ROWS, VECTORS>(run, dwords, lanes, query, sums);
        query += ROWS * run.count * int(run.groups.size());
    }
    for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum); });
}

// Logits without the lowest bytes of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int vector, Scratch& s) {
    const Kernel& k = s.kernel;
    __m256 x[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(k, s, row, 1, vector, x);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (x[r][v] * (s.unit[row + r] * 256) - s.middle[row + r]) * _mm256_load_ps(s.scale + t + 8 * v);
        }
    }
    for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            const __m256 half = _mm256_load_ps(s.halves + i * TILE + t + 8 * v);
            UNROLL(10) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
        }
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) _mm256_store_ps(s.logits + (row + r) * TILE + t + 8 * v, x[r][v]);
    }
}

// What the lowest bytes add to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, int vector, Scratch& s) {
    __m256 sums[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(s.kernel, s, row, 0, vector, sums);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 8 * v;
            const __m256 more = sums[r][v] * s.unit[row + r] - s.lowest[row + r];
            _mm256_store_ps(x, _mm256_load_ps(x) + more * _mm256_load_ps(s.scale + t + 8 * v));
        }
    }
}

// One of both for 16 tokens.
template <int ROWS>
void score_sixteen(int64_t row, int t, bool low, Scratch& s) {
    constexpr int VECTORS = vectors_of_keys(ROWS);
    UNROLL(1) for (int v = 0; v < 2; v += VECTORS) {
        if (low) score_low<ROWS, VECTORS>(row, t + 8 * v, v, s);
        else score_high<ROWS, VECTORS>(row, t + 8 * v, v, s);
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    __m256i* dwords = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s), s);
        unpack_keys(k.key.layout, z, dwords, s.halves + t);
        for_blocks_of_rows<MAX_KEY_ROWS>(
            rows, [&](int first, auto count) { score_sixteen<decltype(count)::value>(row + first, t, false, s); });
    }
    if (a.digits == 2) return;
    set_limits(a, row, rows, s);
    for (int t = 0; t < whole; t += 16) {
        bool are_there = false;
        for_blocks_of_rows<MAX_KEY_ROWS>(rows, [&](int first, auto count) {
            constexpr int ROWS = decltype(count)::value;
            if (are_minor<ROWS>(row + first, t, 16, s)) return;
            const auto z = [&] {
                return looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s), s);
            };
            if (!are_there) unpack_keys(k.key.layout, z(), dwords, s.halves + t);
            are_there = true;
            score_sixteen<ROWS>(row + first, t, true, s);
        });
    }
}

#endif

}  // namespace
