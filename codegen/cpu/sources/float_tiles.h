// Scores and mixes of a tile of rows as floats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_part.h"
#include "unpack_rows.h"

namespace {

// ------------------------------------------------------------------------------------------------ two products

// Rows of a tile, `stride` numbers apart: as they are stored, or unpacked to floats. While one is read, the one of
// `next` is fetched, where there is any.
template <class Stored>
struct Tile {
    const typename Stored::Number* rows;
    int64_t stride;
    const typename Stored::Number* next;

    INLINE Floats at(int64_t t, int i) const { return Stored::load(rows + t * stride + i); }
    INLINE void fetch(int64_t t, int i) const {
        if (next && i * sizeof *rows % 64 == 0) __builtin_prefetch(next + t * stride + i, 0, 2);
    }
};

// logits[r][t] = q[r] . z[t] for ROWS rows and a multiple of TOKENS tokens.
template <int ROWS, int TOKENS, class Stored>
void score(const float* __restrict q, int pad, const Tile<Stored> z, int tokens, float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < pad; i += LANES) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const Floats zk = z.at(t + k, i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) sums[r][k] += load(q + r * pad + i) * zk;
            }
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(2) for (int k = 0; k < TOKENS; k += 4) {
                store(logits + r * TILE + t + k, sums_of(sums[r][k], sums[r][k + 1], sums[r][k + 2], sums[r][k + 3]));
            }
        }
    }
}

// The same for keys and queries in bfloat16, 32 products at a time: these are exact, and sums are of float32.
#if defined(__AVX512BF16__)
template <int ROWS, int TOKENS>
void score_pairs(const uint16_t* __restrict q, int pad, const Tile<BFloat16> z, int tokens, float factor,
                 float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < pad; i += 32) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const __m512i zk = _mm512_loadu_si512(z.rows + (t + k) * z.stride + i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) {
                    const __m512i qr = _mm512_loadu_si512(q + r * pad + i);
                    sums[r][k] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][k], (__m512bh)qr, (__m512bh)zk);
                }
            }
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(2) for (int k = 0; k < TOKENS; k += 4) {
                const Floats4 four = sums_of(sums[r][k], sums[r][k + 1], sums[r][k + 2], sums[r][k + 3]);
                store(logits + r * TILE + t + k, four * factor);
            }
        }
    }
}
#endif

// states[r].sum[c] += sum_t weights[r][t] (z[t][c] - middle[c]) for ROWS rows and VECTORS vectors of channels, given
// totals[r] = sum_t weights[r][t]. No middle: they are 0.
template <int ROWS, int VECTORS, class Stored>
INLINE void mix_channels(const float* __restrict weights, const float* __restrict totals, const float* middle,
                         const Tile<Stored> z, int tokens, State* __restrict states, int channel) {
    Floats sums[ROWS][VECTORS];
    UNROLL(4) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            const int c = channel + v * LANES;
            sums[r][v] = load(states[r].sum + c);
            if (middle) sums[r][v] -= totals[r] * load(middle + c);
        }
    }
    UNROLL(4) for (int t = 0; t < tokens; t++) {
        Floats zt[VECTORS];
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            zt[v] = z.at(t, channel + v * LANES);
            z.fetch(t, channel + v * LANES);
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(8) for (int v = 0; v < VECTORS; v++) sums[r][v] += weights[r * TILE + t] * zt[v];
        }
    }
    UNROLL(4) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) store(states[r].sum + channel + v * LANES, sums[r][v]);
    }
}

// All channels, as many of 4 (for a single row of 8) vectors at once as there are, then what is left.
template <int ROWS, class Stored>
void mix(const float* weights, const float* totals, const float* middle, int pad, const Tile<Stored> z, int tokens,
         State* states) {
    constexpr int VECTORS = ROWS == 1 ? 8 : 4;
    const int all = pad / LANES, rest = all % VECTORS;
    for (int v = 0; v + VECTORS <= all; v += VECTORS) {
        mix_channels<ROWS, VECTORS>(weights, totals, middle, z, tokens, states, v * LANES);
    }
    with_count<VECTORS - 1>(rest, [&](auto count) {
        mix_channels<ROWS, decltype(count)::value>(weights, totals, middle, z, tokens, states, (all - rest) * LANES);
    });
}

// A row that is not quantized, as floats.
INLINE void unpack_floats(const Side& side, const uint8_t* row, float* z) {
    if (side.stored == FLOAT32) std::memcpy(z, row, 4 * side.width);
    if (side.stored == BFLOAT16) copy_bfloat16(row, side.width, z);
    if (side.stored == FLOAT16) copy_float16(row, side.width, z);
}

// A quantized row: codes as floats.
INLINE void unpack_codes(const Side& side, const uint8_t* row, float scale, float* z) {
    for (const Tier& tier : side.tiers) {
        const int width = int(tier.width);
        switch (is_trellis(tier) ? 0 : tier.bits) {
            case 0: copy_trellis(row, int(tier.bits), width, z); break;
            case 1: copy_codes<1>(row, width, z); break;
            case 2: copy_codes<2>(row, width, z); break;
            case 3: copy_codes<3>(row, width, z); break;
            case 4: copy_codes<4>(row, width, z); break;
            case 5: copy_codes<5>(row, width, z); break;
            case 6: copy_codes<6>(row, width, z); break;
            case 8: copy_codes<8>(row, width, z); break;
            default: copy_float16(row, width, z, side.scaled ? 1 / scale : 1.0f);
        }
        row += width * tier.bits / 8;
        z += width;
    }
}

template <class Stored, class F>
INLINE void with_rows(const uint8_t* row, const uint8_t* next, int64_t stride, F f) {
    typedef typename Stored::Number Number;
    f(Tile<Stored>{reinterpret_cast<const Number*>(row), stride, reinterpret_cast<const Number*>(next)});
}

// Calls f(tile) with the rows of a tile: where they are, or unpacked into the scratch.
template <class F>
INLINE void with_tile(const Side& side, const Rows& rows, const Rows& scales, const Part& p, int64_t j, int64_t begin,
                      int tokens, Scratch& s, F f) {
    const uint8_t* head = static_cast<const uint8_t*>(rows.data) + (p.b * rows.batch + j * rows.head) * side.element;
    const int64_t stride = rows.token * side.element;
    const int tile = s.kernel.tokens;
    if (side.in_place && tokens == whole_vectors(tokens) && p.listed.is_run(begin, tokens)) {
        const int distance = p.listed.pages ? (side.ahead + tile - 1) / tile * tile : side.ahead;
        const uint8_t* row = head + p.listed.at(begin) * stride;
        const uint8_t* next = head + p.listed.ahead(begin, distance) * stride;
        if (side.stored == FLOAT32) return with_rows<Float32>(row, next, rows.token, f);
        if (side.stored == BFLOAT16) return with_rows<BFloat16>(row, next, rows.token, f);
        return with_rows<Float16>(row, next, rows.token, f);
    }
    if (!s.cleared) std::fill(s.tile, s.tile + tile * s.kernel.stride, 0.0f);
    s.cleared = true;
    for (int t = 0; t < tokens; t++) {
        const int64_t token = p.listed.at(begin + t), ahead = p.listed.ahead(begin + t, side.ahead);
        for (int i = 0; i < side.bytes; i += 64) __builtin_prefetch(head + ahead * stride + i, 0, 2);
        if (side.scaled) {
            s.scale[t] = from_float16(*row_at<uint16_t>(scales, p.b, j, token));
            if (t % SIDE_BY_SIDE == 0) __builtin_prefetch(row_at<uint16_t>(scales, p.b, j, ahead), 0, 2);
        }
        float* z = s.tile + t * s.kernel.stride;
        if (side.tiers.empty()) unpack_floats(side, head + token * stride, z);
        else unpack_codes(side, head + token * stride, s.scale[t], z);
    }
    std::fill(s.scale + tokens, s.scale + whole_vectors(tokens), 0.0f);  // weights of no token are 0 times it
    f(Tile<Float32>{s.tile, s.kernel.stride, nullptr});
}

}  // namespace
