// Codes of rows as bytes, and their products, with AVX-512 VNNI.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "quantized_rows.h"

namespace {

#if BYTES

// What takes a slice apart, in registers.
template <Kind KIND>
struct Taken {
    static constexpr bool MANY = is_many(KIND), LOW = depth_of(KIND) >= ONE_LOW, LOOKED = depth_of(KIND) == ONE_TRELLIS;
    const Slice::Block *block, *end;
    __m512i index, from[2], keep[2], levels, offsets, order;
    __mmask64 looked;
    int offset;

    INLINE explicit Taken(const Slice& slice) : block(slice.blocks.data()), end(block + slice.blocks.size()) {
        index = _mm512_load_si512(block->index);
        offset = block->offset;
        UNROLL(2) for (int i = 0; i < 1 + LOW; i++) {
            from[i] = _mm512_load_si512(slice.from[i]);
            keep[i] = _mm512_load_si512(slice.keep[i]);
        }
        looked = slice.looked;
        if (!LOOKED) return;
        const auto in_each_quarter = [](const void* p) {
            return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p)));
        };
        levels = in_each_quarter(LEVELS), offsets = in_each_quarter(OFFSETS), order = in_each_quarter(ORDER);
    }
    // The bytes of a row; what no code needs is arbitrary.
    INLINE __m512i bytes_of(const uint8_t* row) const {
        if (!MANY) return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(row + offset));
        __m512i out = {};
        for (const Slice::Block* b = block; b < end; b++) {
            const __m512i bytes = _mm512_loadu_si512(row + b->offset);
            out |= _mm512_maskz_permutexvar_epi8(b->mask, _mm512_load_si512(b->index), bytes);
        }
        return out;
    }
    INLINE __m512i codes_of(const uint8_t* row) const {
        if (KIND == WHOLE) return _mm512_loadu_si512(row + offset);
        const __m512i bytes = bytes_of(row);
        const __m512i high = _mm512_multishift_epi64_epi8(from[0], bytes) & keep[0];
        if (!LOW) return high;
        const __m512i codes = high | (_mm512_multishift_epi64_epi8(from[1], bytes) & keep[1]);
        return LOOKED ? _mm512_mask_mov_epi8(codes, looked, looked_up(high)) : codes;
    }
    // The codes of windows. Tables of 16 stand in every quarter, so that bits 4 and 5 of an index do not count.
    INLINE __m512i looked_up(__m512i window) const {
        const __m512i high = _mm512_srli_epi16(window, 4) ^ _mm512_permutexvar_epi8(window, order);
        return _mm512_add_epi8(_mm512_permutexvar_epi8(high, levels), _mm512_permutexvar_epi8(window, offsets));
    }
};

// Calls f(kind) with a compile-time kind of slices.
template <class F>
INLINE auto with_kind(Kind kind, F f) {
    switch (kind) {
        case WHOLE: return f(std::integral_constant<Kind, WHOLE>());
        case ONE_HIGH: return f(std::integral_constant<Kind, ONE_HIGH>());
        case ONE_LOW: return f(std::integral_constant<Kind, ONE_LOW>());
        case ONE_TRELLIS: return f(std::integral_constant<Kind, ONE_TRELLIS>());
        case MANY_HIGH: return f(std::integral_constant<Kind, MANY_HIGH>());
        case MANY_LOW: return f(std::integral_constant<Kind, MANY_LOW>());
        default: return f(std::integral_constant<Kind, MANY_TRELLIS>());
    }
}

// Calls f(taken), whose type says of what kind the slice is.
template <class F>
INLINE void with_slice(const Slice& slice, F f) {
    with_kind(slice.kind, [&](auto kind) { f(Taken<decltype(kind)::value>(slice)); });
}

// x[i] = dwords of token i  ->  x[i] = dword i of 16 tokens
INLINE void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    UNROLL(4) for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    UNROLL(4) for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// Bytes of token i  ->  out[i]: of each 16 bytes of the tokens 4 i ... 4 i + 3, a dword for each with the four tokens
INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd), out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(high_ab, high_cd), out[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

// 16 tokens of keys -> codes [vectors of 4 channels].
INLINE void unpack_keys(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.key_vectors;
    for (const Slice& slice : k.key.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i x[16];
            UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.codes_of(rows[t]);
            transpose(x);
            UNROLL(16) for (int i = 0; i < 16; i++) if (i < left) _mm512_store_si512(codes + i, x[i]);
        });
        codes += 16;
        left -= 16;
    }
}

// Their float16 channels as floats [channels, TILE].
INLINE void unpack_halves(const Kernel& k, const Sixteen& rows, float* halves) {
    int left = k.halves / 2;
    for (const Slice& slice : k.key.layout.half_slices) {
        const Taken<MANY_HIGH> taken(slice);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.bytes_of(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < 16; i++) {
            if (i >= left) continue;
            float* out = halves + 2 * i * TILE;
            _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[i])));
            _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16))));
        }
        halves += 32 * TILE;
        left -= 16;
    }
}

// 4 tokens of values, from `first` of 16 on -> codes of a slice, [4 vectors of 16 channels].
template <class T>
INLINE void unpack_slice(const T& taken, const Sixteen& rows, int first, __m512i* codes) {
    __m512i x[4];
    UNROLL(4) for (int t = 0; t < 4; t++) x[t] = taken.codes_of(rows[first + t]);
    interleave(x[0], x[1], x[2], x[3], codes);
}

// 16 tokens of values -> codes [4, vectors of 16 channels].
INLINE void unpack_values(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.value_vectors;
    for (const Slice& slice : k.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            UNROLL(4) for (int t = 0; t < 4; t++) {
                __m512i mixed[4];
                unpack_slice(taken, rows, 4 * t, mixed);
                UNROLL(4) for (int i = 0; i < 4; i++) {
                    if (i < left) _mm512_store_si512(codes + t * k.value_vectors + i, mixed[i]);
                }
            }
        });
        codes += 4;
        left -= 4;
    }
}

constexpr int MAX_BYTE_ROWS = 5;  // 15 sums of 3 parts; with more rows at once only the compiler has more to do

// Vectors at once: enough sums to keep the multipliers busy, no more than registers hold.
constexpr int vectors_for(int rows, int parts) { return std::clamp(24 / (rows * parts), 1, 4); }

// To each of 16 sums, four bytes of codes times four signed bytes, which are the same for all. As an instruction of its
// own: given the intrinsic, GCC copies each sum back and forth.
INLINE __m512i add_products(__m512i sum, __m512i codes, const int32_t& factor) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(factor));
    return sum;
}

INLINE __m512i add_products(__m512i sum, __m512i codes, __m512i factors) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(factors));
    return sum;
}

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], `step` and `next` vectors of codes from one i or v to the
// next, `width` factors from one part to the next.
template <int ROWS, int VECTORS, int PARTS>
INLINE void multiply(const __m512i* codes, int64_t step, int64_t next, const int32_t* factors, int64_t width, int count,
                     __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * step + v * next);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(3) for (int part = 0; part < PARTS; part++) {
                const int32_t& factor = factors[(3 * r + part) * width + i];
                UNROLL(4) for (int v = 0; v < VECTORS; v++) {
                    sums[r][v][part] = add_products(sums[r][v][part], z[v], factor);
                }
            }
        }
    }
}

template <int PARTS>
INLINE Floats16 joined(const __m512i (&parts)[PARTS]) {
    Floats16 sum = __builtin_convertvector((Ints16)parts[PARTS - 1], Floats16);
    UNROLL(2) for (int i = PARTS - 2; i >= 0; i--) {
        sum = sum * 256.0f + __builtin_convertvector((Ints16)parts[i], Floats16);
    }
    return sum;
}

// The largest integer that PARTS signed bytes make is a little more.
constexpr float largest_integer(int parts) { return parts == 3 ? 8355000.0f : parts == 2 ? 32500.0f : 127.0f; }

// 16 integers as PARTS times 16 signed bytes: digits of base 256.
template <int PARTS>
INLINE void store_parts(Ints16 x, int8_t* out, int64_t stride) {
    constexpr int half = PARTS == 3 ? 0x808080 : PARTS == 2 ? 0x8080 : 0x80;
    const __m512i digits = (__m512i)((x + half) ^ half);
    UNROLL(3) for (int i = 0; i < PARTS; i++) {
        _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8 * i)));
    }
}

// Few rows share codes: these are multiplied while they are in registers. Sums of at most so many rows leave room for
// the codes of 16 tokens.
constexpr int FEW_ROWS = 3;

INLINE bool are_few(const Attention& a, int rows) { return a.digits == 2 && rows > 1 && rows <= FEW_ROWS; }

#endif

}  // namespace
