// Rows of a tile of quantized values and their scales, and which digits count.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention_part.h"

namespace {

// ------------------------------------------------------------------------------------------------ rows of a tile

#if INTEGER

// Rows of 16 tokens: SIDE_BY_SIDE of them lie one behind the other.
struct Sixteen {
    const uint8_t* runs[16 / SIDE_BY_SIDE];
    int64_t stride;

    INLINE const uint8_t* operator[](int i) const { return runs[i / SIDE_BY_SIDE] + i % SIDE_BY_SIDE * stride; }
};

// Queries of 16 bits have 9 or 12 of precision: two digits, 15 bits, are more, and weights have no more then. Of
// queries of 32 bits the third digit counts.
//
// Weights of a tile have two parts where the largest is at most 1/SMALL of all so far: rounding to 2^-16 of it then
// moves the output by about 2^-16 / SMALL * sqrt(TILE) of a latent. Where it counts for more, they have three.
constexpr float SMALL = 256;

// How many channels are multiplied by all digits of `rows` queries, and by all of their weights; others by one. Of one
// row unpacking takes longest.
INLINE int fine_keys(const Attention& a, int rows, const Kernel& k) {
    return a.digits == 2 && rows > 1 ? k.key_fine : 4 * k.key_dwords;
}
INLINE int fine_values(const Attention& a, const Kernel& k) {
    return a.digits == 2 ? k.value_fine : 16 * k.value_vectors;
}

// Into the second-level cache, rows of `count` tokens.
INLINE void fetch(const Side& side, const uint8_t* row, int64_t stride, int count) {
    const bool dense = stride <= side.reach;  // one row behind the other
    const int64_t bytes = dense ? count * stride : side.bytes, end = dense ? stride : count * stride;
    for (int64_t from = 0; from < end; from += stride) {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + from + byte, 0, 2);
    }
}

// `count` rows of a tile from token t on are copied to where there is room behind them, the last one again up to 16.
void copy_rows(const Side& side, const Rows& rows, const Part& p, int64_t j, int64_t t, int count, uint8_t* room) {
    for (int i = 0; i < 16; i++, room += side.reach) {
        std::memcpy(room, row_at<uint8_t>(rows, p.b, j, p.listed.at(t + std::min(i, count - 1))), side.bytes);
    }
}

// Where 16 tokens of a tile are, from t on, the last one again behind the end. What comes later is fetched, if
// `fetches` says so: rows, or what the call names. Rows may be read in whole blocks of 64 bytes.
INLINE Sixteen rows_of(const Attention& a, const Side& side, const Rows& rows, const Part& p, int64_t j, int64_t begin,
                       int t, int tokens, bool fetches, Scratch& s) {
    const int64_t from = begin + t, stride = rows.token;
    const auto at = [&](int64_t token) { return row_at<uint8_t>(rows, p.b, j, token); };
    if (fetches && a.later_count) s.later.fetch(), fetches = false;
    if (fetches && !p.listed.pages) fetch(side, at(from + side.ahead), stride, 16);
    for (int i = 0; fetches && p.listed.pages && i < std::min(tokens - t, 16); i += SIDE_BY_SIDE) {
        fetch(side, at(p.listed.ahead(from + i, side.ahead)), stride, SIDE_BY_SIDE);
    }
    if (tokens - t >= 16) {
        const Sixteen z = {{at(p.listed.at(from)), at(p.listed.at(from + SIDE_BY_SIDE))}, stride};
        if (z[15] + side.reach <= at(a.tokens - 1) + side.bytes) return z;
    }
    copy_rows(side, rows, p, j, from, std::min(tokens - t, 16), s.room);
    return {{s.room, s.room + SIDE_BY_SIDE * side.reach}, side.reach};
}

// The scales of a tile as floats. Later ones are fetched: nothing else foresees where those of pages are.
INLINE void load_scales(const Side& side, const Rows& scales, const Part& p, int64_t j, int64_t begin, int tokens,
                        Scratch& s) {
    std::fill_n(s.scale + whole_vectors(tokens) - 16, 16, 0.0f);  // weights of no token are 0 times it
    int t = 0;
    if (!p.listed.pages && scales.token == 1) {
        const uint16_t* scale = row_at<uint16_t>(scales, p.b, j, begin);
        for (; t + LANES <= tokens; t += LANES) {
            __builtin_prefetch(scale + t + side.ahead, 0, 2);
            store(s.scale + t, Float16::load(scale + t));
        }
    }
    for (; t < tokens; t += SIDE_BY_SIDE) {
        const uint16_t* scale = row_at<uint16_t>(scales, p.b, j, p.listed.at(begin + t));
        __builtin_prefetch(row_at<uint16_t>(scales, p.b, j, p.listed.ahead(begin + t, side.ahead)), 0, 2);
        const int last = std::min(tokens - t, SIDE_BY_SIDE) - 1;
        if (scales.token == 1 && last == SIDE_BY_SIDE - 1) {
            _mm256_store_ps(s.scale + t, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale))));
        } else {
            for (int i = 0; i <= last; i++) s.scale[t + i] = from_float16(scale[i * scales.token]);
        }
    }
}

// The lowest digit of queries counts for tokens whose weight may be more than 1/MINOR of all so far: without it a logit
// is off by some 2^-15 of what its largest products are, and the output by that times the root of the largest weight.
constexpr float MINOR = 256;

// Of each of `rows` rows the largest logit for which it does not count.
INLINE void set_limits(const Attention& a, int64_t row, int rows, Scratch& s) {
    const bool all = s.kernel.softcap || a.mask_kind == ADDITIVE_MASK;  // logits are not yet what the softmax sees
    for (int64_t r = row; r < row + rows; r++) {
        s.limits[r] = all ? -INF : s.states[r].top + std::log2(s.states[r].total / MINOR);
    }
}

// Whether no logit of ROWS rows and `count` tokens from t on is larger.
template <int ROWS>
INLINE bool are_minor(int64_t row, int t, int count, const Scratch& s) {
    Floats top = Floats{} - INF;
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        for (int i = t; i < t + count; i += LANES) {
            const Floats over = load(s.logits + (row + r) * TILE + i) - s.limits[row + r];
            top = over > top ? over : top;
        }
    }
    return !(largest_of(top) > 0.0f);
}

#else

template <class... T>
void score_codes(const T&...) {}
template <class... T>
void mix_codes(const T&...) {}
template <class... T>
int fine_keys(const T&...) {
    return 0;
}
template <class... T>
void to_parts(const T&...) {}
template <class... T>
void arrange_queries(const T&...) {}

#endif

}  // namespace
