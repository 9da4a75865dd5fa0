// Mixes of a tile of values as words of 16 bits, with AVX2.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "word_codes.h"

namespace {

#if WORDS

// Weights of a tile of values times the tokens' scales, as words and where they count as the bytes below.
INLINE void split_weights(int64_t row, int whole, int64_t digits, Scratch& s) {
    float* w = s.logits + row * TILE;
    __m256 top = {}, sum = {};
    for (int t = 0; t < whole; t += 8) {
        const __m256 scaled = _mm256_load_ps(w + t) * _mm256_load_ps(s.scale + t);
        _mm256_store_ps(w + t, scaled);
        sum += scaled;
        top = _mm256_max_ps(scaled, top);
    }
    const float largest = largest_of(top);
    State& state = s.states[row];
    Split& split = s.splits[row];
    state.mass += sum_of(sum);
    split.low = digits > 2 && !(largest * SMALL <= state.mass);
    const float limit = split.low ? 256 * LARGEST : LARGEST, inverse = largest > 1e-30f ? limit / largest : 0.0f;
    int16_t* parts = reinterpret_cast<int16_t*>(s.weights) + 2 * row * TILE;
    Ints8 total = {};
    for (int t = 0; t < whole; t += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(w + t) * inverse);
        const __m256i b = _mm256_cvtps_epi32(_mm256_load_ps(w + t + 8) * inverse);
        total += (Ints8)a + (Ints8)b;
        store_words(a, b, parts + TILE + t, split.low ? parts + t : nullptr);
    }
    split.unit = largest / limit;
    int32_t whole_total = 0;
    UNROLL(8) for (int i = 0; i < 8; i++) whole_total += total[i];
    split.total = float(whole_total);
}

// Of each 128 bits of x and y, two sums of two lanes of x and y each.
INLINE __m256i sums_of_dwords(__m256i x, __m256i y) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}

// Codes K and K + 1 of all words of a tile, `low` bits `at` in a word, times weights: to sums [rows, 2, R_V].
template <int HIGH, int LOW, int K, int ROWS>
INLINE void multiply_values(const __m256i* high, const __m256i* low, __m128i at, const int16_t* weights, int vectors,
                            int pad, int32_t* to) {
    __m256i sums[ROWS][2];
    UNROLL(5) for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = __m256i{};
    UNROLL(1) for (int t = 0; t < vectors; t++) {
        const __m256i x = load_words(high + t), y = LOW ? _mm256_srl_epi16(load_words(low + t), at) : x;
        const __m256i a = code_of<HIGH, LOW, K>(x, y), b = code_of<HIGH, LOW, K + 1>(x, y);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const __m256i w = load_words(weights + 2 * r * TILE + 16 * t);
            sums[r][0] = add_products(sums[r][0], a, w);
            sums[r][1] = add_products(sums[r][1], b, w);
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r += 2) {
        const int other = std::min(r + 1, ROWS - 1);
        const __m256i x = sums_of_dwords(sums[r][0], sums[r][1]), y = sums_of_dwords(sums[other][0], sums[other][1]);
        const __m256i z = _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * r * pad), four);
        if (other == r) continue;
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * other * pad), _mm_unpackhi_epi64(four, four));
    }
}

// The codes of a run of values from a channel on, times a part of weights.
template <int HIGH, int LOW, int ROWS>
void mix_run(const Run& run, const __m256i* words, const int16_t* weights, int vectors, int pad, int32_t* sums) {
    for (const Group& g : run.groups) {
        const __m128i at = _mm_cvtsi32_si128(g.low_at);
        const __m256i *high = words + g.high * vectors, *low = words + g.low * vectors;
        for_counts<8 / HIGH>([&](auto k) {
            constexpr int K = 2 * decltype(k)::value;
            if (K >= run.count) return;
            multiply_values<HIGH, LOW, K, ROWS>(high, low, at, weights, vectors, pad, sums + K);
        });
        sums += run.count;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const Kernel& k = s.kernel;
    const Layout& layout = k.value.layout;
    const int whole = whole_vectors(tokens), vectors = whole / 16;
    __m256i* words = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    for (int t = 0; t < vectors; t++) {
        const Sixteen z = looked_up(k.value, rows_of(a, k.value, a.value, p, j, begin, 16 * t, tokens, true, s), s);
        __m256i* to = words + t;
        for (const int piece : layout.pieces) {
            transpose_words(z, piece, vectors, to);
            to += 8 * vectors;
        }
    }
    for (int r = 0; r < rows; r++) split_weights(row + r, whole, a.digits, s);
    for_blocks_of_rows<MAX_VALUE_ROWS>(rows, [&](int first, auto block) {
        constexpr int ROWS = decltype(block)::value;
        const int16_t* weights = reinterpret_cast<const int16_t*>(s.weights) + 2 * (row + first) * TILE;
        int32_t* sums = s.products + 2 * (row + first) * k.value.pad;
        bool any = false;
        for (int r = 0; r < ROWS; r++) any |= s.splits[row + first + r].low;
        for (const Run& run : layout.runs) {
            with_planes(run.bits, [&](auto high, auto low) {
                constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
                const int pad = k.value.pad;
                mix_run<HIGH, LOW, ROWS>(run, words, weights + TILE, vectors, pad, sums + pad);
                if (any) mix_run<HIGH, LOW, ROWS>(run, words, weights, vectors, pad, sums);
            });
            sums += run.count * int(run.groups.size());
        }
    });
    for (int64_t r = row; r < row + rows; r++) {
        const Split& split = s.splits[r];
        const int32_t *low = s.products + 2 * r * k.value.pad, *high = low + k.value.pad;
        float* sum = s.states[r].sum;
        for (int c = 0; c < k.value.width; c += 8) {
            __m256 x = _mm256_cvtepi32_ps(load_words(high + c));
            if (split.low) x = x * 256.0f + _mm256_cvtepi32_ps(load_words(low + c));
            const __m256 middle = _mm256_loadu_ps(k.value.middle.data() + c);
            _mm256_store_ps(sum + c, _mm256_load_ps(sum + c) + (x - split.total * middle) * split.unit);
        }
    }
}

#endif

}  // namespace
