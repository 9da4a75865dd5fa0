// Codes of rows as words of 16 bits, with AVX2.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "quantized_rows.h"

namespace {

#if WORDS

// To each of 8 sums, two words of codes times two others. As instructions of their own: given intrinsics, GCC keeps
// some of the sums in memory.
INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i factors) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(factors));
    return sum;
#else
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(factors));
    return sum;
#endif
}

INLINE __m256i load_words(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// 16 bytes of two rows.
INLINE __m256i two_rows(const uint8_t* a, const uint8_t* b) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 16 bytes of 8 rows -> out[i]: dword i of each.
INLINE void transpose_dwords(const uint8_t* rows, int64_t stride, __m256i* out) {
    __m256i x[4];
    UNROLL(4) for (int i = 0; i < 4; i++) x[i] = two_rows(rows + i * stride, rows + (i + 4) * stride);
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
}

// 16 bytes of 16 rows -> out[i]: word i of each, `step` vectors from one to the next.
INLINE void transpose_words(const Sixteen& rows, int offset, int64_t step, __m256i* out) {
    __m256i x[8], y[8];
    UNROLL(8) for (int i = 0; i < 8; i++) x[i] = two_rows(rows[i] + offset, rows[i + 8] + offset);
    UNROLL(4) for (int i = 0; i < 4; i++) {
        y[i] = _mm256_unpacklo_epi16(x[2 * i], x[2 * i + 1]), y[i + 4] = _mm256_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    UNROLL(2) for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(y[i], y[i + 1]), b = _mm256_unpackhi_epi32(y[i], y[i + 1]);
        const __m256i c = _mm256_unpacklo_epi32(y[i + 2], y[i + 3]), d = _mm256_unpackhi_epi32(y[i + 2], y[i + 3]);
        _mm256_store_si256(out + i * step, _mm256_unpacklo_epi64(a, c));
        _mm256_store_si256(out + (i + 1) * step, _mm256_unpackhi_epi64(a, c));
        _mm256_store_si256(out + (i + 2) * step, _mm256_unpacklo_epi64(b, d));
        _mm256_store_si256(out + (i + 3) * step, _mm256_unpackhi_epi64(b, d));
    }
}

INLINE __m256i in_both_halves(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
}

// What 32 windows stand for.
INLINE __m256i codes_of_windows(__m256i windows, __m256i levels, __m256i offsets, __m256i order) {
    const __m256i half = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(windows, half), high = _mm256_and_si256(_mm256_srli_epi16(windows, 4), half);
    const __m256i level = _mm256_shuffle_epi8(levels, _mm256_xor_si256(high, _mm256_shuffle_epi8(order, low)));
    return _mm256_add_epi8(level, _mm256_shuffle_epi8(offsets, low));
}

// What a ring stands for in 16 rows, `step` bytes from one to the next.
void look_up(const Ring& ring, const Sixteen& rows, uint8_t* to, int64_t step) {
    const __m256i levels = in_both_halves(LEVELS), offsets = in_both_halves(OFFSETS), order = in_both_halves(ORDER);
    const Spread& its = SPREADS[ring.bits - 1];
    const __m256i first = in_both_halves(its.bytes[0]), second = in_both_halves(its.bytes[1]);
    const __m256i factor = in_both_halves(its.factor[0]), factor_of_second = in_both_halves(its.factor[1]);
    const int last = ring.bits * ring.width / 8 - 1;
    UNROLL(1) for (int t = 0; t < 16; t++, to += step) {
        const uint8_t* row = rows[t] + ring.byte;
        const __m128i begin = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        __m128i low = _mm_insert_epi8(_mm_slli_si128(begin, 1), row[last], 0);
        UNROLL(1) for (int i = 0; i < ring.width; i += 32) {
            const uint8_t* from = row + i / 8 * ring.bits - 1;
            if (i) low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * ring.bits));
            const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            const __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, first), factor);
            const __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, second), factor_of_second);
            const __m256i windows = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            const __m256i codes = codes_of_windows(windows, levels, offsets, order);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), codes);
        }
    }
}

// Rows as they are taken apart: with what their trellis codes stand for, if they have any.
INLINE Sixteen looked_up(const Side& side, const Sixteen& rows, Scratch& s) {
    const int64_t step = side.layout.looked_up;
    if (!step) return rows;
    UNROLL(1) for (int t = 0; t < 16; t++) {
        for (int i = 0; i < side.bytes; i += 32) {
            const auto* from = reinterpret_cast<const __m256i*>(rows[t] + i);
            _mm256_store_si256(reinterpret_cast<__m256i*>(s.looked_up + t * step + i), _mm256_loadu_si256(from));
        }
    }
    for (const Ring& ring : side.layout.rings) look_up(ring, rows, s.looked_up + ring.at, step);
    return {{s.looked_up, s.looked_up + SIDE_BY_SIDE * step}, step};
}

// Words shifted to the left, or with a negative count to the right.
template <int COUNT>
INLINE __m256i shifted(__m256i x) {
    if constexpr (COUNT == 0) return x;
    else if constexpr (COUNT > 0) return _mm256_slli_epi16(x, COUNT);
    else return _mm256_srli_epi16(x, -COUNT);
}

// Code K of each word of `high`, with its lower bits from `low`, at the upper end of a byte.
template <int HIGH, int LOW, int K>
INLINE __m256i code_of(__m256i high, __m256i low) {
    constexpr int TOP = 8 - HIGH, NEXT = TOP - LOW;
    const __m256i code = shifted<TOP - HIGH * K>(high) & _mm256_set1_epi16(((1 << HIGH) - 1) << TOP);
    if constexpr (LOW == 0) return code;
    else return code | (shifted<NEXT - LOW * K>(low) & _mm256_set1_epi16(((1 << LOW) - 1) << NEXT));
}

// Where bytes of both words of four dwords come from: byte `at` of each and the next one, or the same one.
#define SPREAD_BYTES(a, b) {a, 128, b, 128, a + 4, 128, b + 4, 128, a + 8, 128, b + 8, 128, a + 12, 128, b + 12, 128}
alignas(16) constexpr uint8_t SPREAD[2][4][16] = {
    {SPREAD_BYTES(0, 1), SPREAD_BYTES(1, 2), SPREAD_BYTES(2, 3), SPREAD_BYTES(3, 3)},
    {SPREAD_BYTES(0, 0), SPREAD_BYTES(1, 1), SPREAD_BYTES(2, 2), SPREAD_BYTES(3, 3)},
};

// A dword of keys in its form: codes in both words.
template <Form FORM>
INLINE __m256i in_words(__m256i x, int at) {
    if constexpr (FORM == FOUR_BYTES) return x;
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD[FORM == ONE_BYTE][at]));
    x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(bytes));
    if constexpr (FORM == TWO_BYTES) return x;
    return _mm256_blend_epi16(x, _mm256_srli_epi16(x, 4), 0xaa);
}

// Calls f(bits of the first plane, of the second).
template <class F>
INLINE void with_planes(int bits, F f) {
    const auto call = [&](auto high, auto low) { f(high, low); };
    typedef std::integral_constant<int, 0> None;
    typedef std::integral_constant<int, 1> One;
    typedef std::integral_constant<int, 2> Two;
    typedef std::integral_constant<int, 4> Four;
    switch (bits) {
        case 1: return call(One(), None());
        case 2: return call(Two(), None());
        case 3: return call(Two(), One());
        case 4: return call(Four(), None());
        case 5: return call(Four(), One());
        case 6: return call(Four(), Two());
        default: return call(std::integral_constant<int, 8>(), None());
    }
}

// 16 tokens of keys -> dwords [2, 4 pieces], and halves [channels, TILE] of float16 channels.
INLINE void unpack_keys(const Layout& layout, const Sixteen& rows, __m256i* dwords, float* halves) {
    for (int v = 0; v < 16; v += 8, halves += 8) {
        for (const int piece : layout.pieces) {
            transpose_dwords(rows[v] + piece, rows.stride, dwords);
            dwords += 4;
        }
        float* half = halves;
        for (const int piece : layout.half_pieces) {
            UNROLL(4) for (int i = 0; i < 4; i++, half += 2 * TILE) {
                const __m256i x = load_words(dwords + 4 * (piece - int(layout.pieces.size())) + i);
                const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(x, 16);
                const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
                _mm256_store_ps(half, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
                _mm256_store_ps(half + TILE, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
            }
        }
    }
}

constexpr int MAX_KEY_ROWS = 10, MAX_VALUE_ROWS = 5;  // with sums of all there are registers for codes

constexpr float LARGEST = 32600.0f;  // the largest word, and 1/256 of the largest number that has a byte below

// 16 integers as words, and where `low` is not null as the signed bytes below them.
INLINE void store_words(__m256i a, __m256i b, int16_t* high, int16_t* low) {
    const auto joined = [](__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8); };
    if (low) {
        const __m256i byte = _mm256_set1_epi32(255), half = _mm256_set1_epi32(128);
        const __m256i bytes = joined(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        const __m256i digits = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(low), digits);
        a = _mm256_srai_epi32(_mm256_add_epi32(a, half), 8), b = _mm256_srai_epi32(_mm256_add_epi32(b, half), 8);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), joined(a, b));
}

INLINE __m256 floats_of_words(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

#endif

}  // namespace
