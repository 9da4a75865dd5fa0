// Weights in the blocks of GGUF files, as numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "gguf_formats.h"
#include "products.h"

namespace {

// ------------------------------------------------------------------------------------------------ blocks
//
// A row of a weight is blocks of 32 or 256 numbers. 32 numbers of a block are a group:
//
//     w = scale * code + offset      a scale and an offset for each 16 numbers of it, or for all 32
//
// Codes are unsigned, or signed. The layouts are those of ggml (struct block_q4_0 and others of ggml-common.h), with
// eight rows of a weight side by side: four bytes of codes of each row, one row behind the other, are a vector, in
// which every sum belongs to a row of its own; numbers of a block's head stand eight in a row, too. What is left of
// the rows behind the last eight stands as in the file.

constexpr int GROUP = 32;  // numbers of a group

typedef uint8_t Codes __attribute__((vector_size(32)));

// Where the bytes of a block stand among those of eight rows: of the first row, and from one row to the next.
template <Format FORMAT>
struct Places {
    static constexpr int64_t BYTES = size_of(FORMAT).bytes;
    int64_t first[BYTES] = {}, step[BYTES] = {};

    constexpr Places() {
        for (int64_t at = 0; at < BYTES; at++) {
            const FormatField field = field_of(FORMAT, at);
            const int64_t of_field = at - field.begin;
            first[at] = EIGHT * (field.begin + of_field / field.unit * field.unit) + of_field % field.unit;
            step[at] = field.unit;
        }
    }
};

template <Format FORMAT>
constexpr Places<FORMAT> PLACES;

INLINE Codes codes_at(const uint8_t* p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof codes);
    return codes;
}

// Bytes shifted to the right, or with a negative count to the left, of which the bits of a mask are kept.
INLINE Codes bits_of(Codes x, int count, uint8_t mask) {
    typedef uint16_t Words __attribute__((vector_size(32)));
    return (Codes)(count >= 0 ? (Words)x >> count : (Words)x << -count) & mask;
}

// Four codes of a group of each of eight rows, WORD of eight: bytes from `at` of a block on, or the lower halves of 16
// of these and then the upper ones.
template <int WORD>
struct Word {
    const uint8_t* blocks;

    INLINE Codes bytes(int at) const { return codes_at(blocks + EIGHT * (at + 4 * WORD)); }
    INLINE Codes nibbles(int at) const {
        return bits_of(codes_at(blocks + EIGHT * (at + 4 * (WORD % 4))), WORD / 4 * 4, 15);
    }
};

// Float16 numbers of the heads of eight blocks; eight bytes or signed bytes, of these or others.
INLINE Floats8 halves_at(const uint8_t* blocks, int at) {
    Halves8 halves;
    std::memcpy(&halves, blocks + EIGHT * at, sizeof halves);
#if defined(__AVX2__)
    return (Floats8)_mm256_cvtph_ps((__m128i)halves);
#else
    Floats8 x;
    for (int i = 0; i < EIGHT; i++) x[i] = from_float16(halves[i]);
    return x;
#endif
}

template <class Byte>
INLINE Ints8 bytes_at(const uint8_t* blocks, int at) {
    typedef Byte Eight __attribute__((vector_size(8)));
    Eight eight;
    std::memcpy(&eight, blocks + EIGHT * at, sizeof eight);
#if defined(__AVX2__)  // which GCC does not find by itself
    const __m128i loaded = _mm_cvtsi64_si128((int64_t)eight);
    return (Ints8)(std::is_signed_v<Byte> ? _mm256_cvtepi8_epi32(loaded) : _mm256_cvtepu8_epi32(loaded));
#else
    return __builtin_convertvector(eight, Ints8);
#endif
}

// sum + x * w, as `add_product`.
INLINE Floats8 add_eight(Floats8 sum, Floats8 x, Floats8 w) {
#if defined(__FMA__)
    return (Floats8)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return sum + x * w;
#endif
}

INLINE Floats8 as_floats(Ints8 x) { return __builtin_convertvector(x, Floats8); }

// Of IQ4: `kvalues_iq4nl` of ggml-common.h.
alignas(16) constexpr int8_t FOUR_BIT_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};

INLINE Codes four_bit_levels(Codes at) {
#if defined(__AVX2__)
    const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(FOUR_BIT_LEVELS));
    return (Codes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), (__m256i)at);
#else
    Codes levels;
    for (int i = 0; i < 32; i++) levels[i] = uint8_t(FOUR_BIT_LEVELS[at[i]]);
    return levels;
#endif
}

// Scales and offsets of eight rows, for a group or half of one.
struct Scales {
    Floats8 scale, offset;
};

// What formats have in common, unless they say otherwise. PARTS: scales of a group. OFFSET: there are offsets.
// MAX_CODE: the largest magnitude of a code. CHUNK: groups whose codes stand in the same bytes, or one; AT is one of
// these. PART of `scales` is one of a block.
struct Plain {
    static constexpr int PARTS = 1, MAX_CODE = 15, CHUNK = 1;
    static constexpr bool SIGNED = false, OFFSET = true;
};

struct OfQ4_0 : Plain {
    static constexpr Format FORMAT = Q4_0;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        const Floats8 factor = halves_at(b, 0);
        return {factor, factor * -8.0f};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int) {
        return b.nibbles(2);
    }
};

struct OfQ4_1 : Plain {
    static constexpr Format FORMAT = Q4_1;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        return {halves_at(b, 0), halves_at(b, 2)};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int) {
        return b.nibbles(4);
    }
};

struct OfQ8_0 : Plain {
    static constexpr Format FORMAT = Q8_0;
    static constexpr int MAX_CODE = 128;
    static constexpr bool SIGNED = true, OFFSET = false;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        return {halves_at(b, 0), Floats8{}};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int) {
        return b.bytes(2);
    }
};

struct OfIQ4_NL : OfQ8_0 {
    static constexpr Format FORMAT = IQ4_NL;
    static constexpr int MAX_CODE = 127;
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int) {
        return four_bit_levels(b.nibbles(2));
    }
};

struct OfQ4_K : Plain {
    static constexpr Format FORMAT = Q4_K;
    static constexpr int CHUNK = 2;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {  // of 6 bits; upper bits of the last four stand with the first four
        Ints8 scale = bytes_at<uint8_t>(b, 4 + PART % 4), offset = bytes_at<uint8_t>(b, 8 + PART % 4);
        if constexpr (PART < 4) {
            scale &= 63, offset &= 63;
        } else {
            const Ints8 lower = bytes_at<uint8_t>(b, 8 + PART);
            scale = (lower & 15) | (scale >> 6 << 4), offset = lower >> 4 | offset >> 6 << 4;
        }
        return {as_floats(scale) * halves_at(b, 0), as_floats(offset) * -halves_at(b, 2)};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int chunk) {
        return bits_of(b.bytes(16 + 32 * chunk), AT * 4, 15);
    }
};

struct OfQ5_K : OfQ4_K {
    static constexpr Format FORMAT = Q5_K;
    static constexpr int MAX_CODE = 31, CHUNK = 8;
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int) {
        return bits_of(b.bytes(48 + AT / 2 * 32), AT % 2 * 4, 15) | bits_of(b.bytes(16), AT - 4, 16);
    }
};

struct OfQ6_K : Plain {
    static constexpr Format FORMAT = Q6_K;
    static constexpr int PARTS = 2, MAX_CODE = 63, CHUNK = 4;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        const Floats8 scale = as_floats(bytes_at<int8_t>(b, 192 + PART)) * halves_at(b, 208);
        return {scale, scale * -32.0f};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int chunk) {
        const Codes both = b.bytes(64 * chunk + 32 * (AT % 2)), upper = b.bytes(128 + 32 * chunk);
        return bits_of(both, AT / 2 * 4, 15) | bits_of(upper, 2 * AT - 4, 48);
    }
};

struct OfQ2_K : Plain {
    static constexpr Format FORMAT = Q2_K;
    static constexpr int PARTS = 2, MAX_CODE = 3, CHUNK = 4;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        const Ints8 both = bytes_at<uint8_t>(b, PART);
        return {as_floats(both & 15) * halves_at(b, 80), as_floats(both >> 4) * -halves_at(b, 82)};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int chunk) {
        return bits_of(b.bytes(16 + 32 * chunk), AT * 2, 3);
    }
};

struct OfQ3_K : Plain {
    static constexpr Format FORMAT = Q3_K;
    static constexpr int PARTS = 2, MAX_CODE = 7, CHUNK = 4;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        const Ints8 lower = bytes_at<uint8_t>(b, 96 + PART % 8) >> PART / 8 * 4 & 15;
        const Ints8 upper = bytes_at<uint8_t>(b, 104 + PART % 4) >> PART / 4 * 2 & 3;
        const Floats8 scale = as_floats((lower | upper << 4) - 32) * halves_at(b, 108);
        return {scale, scale * -4.0f};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int chunk) {
        return bits_of(b.bytes(32 + 32 * chunk), AT * 2, 3) | bits_of(b.bytes(0), 4 * chunk + AT, 1) << 2;
    }
};

struct OfIQ4_XS : Plain {
    static constexpr Format FORMAT = IQ4_XS;
    static constexpr int MAX_CODE = 127;
    static constexpr bool SIGNED = true, OFFSET = false;
    template <int PART>
    static INLINE Scales scales(const uint8_t* b) {
        Halves8 sixteen;
        std::memcpy(&sixteen, b + EIGHT * 2, sizeof sixteen);
        const Ints8 upper = __builtin_convertvector(sixteen, Ints8) >> 2 * PART & 3;
        const Ints8 lower = bytes_at<uint8_t>(b, 4 + PART / 2) >> PART % 2 * 4 & 15;
        return {as_floats((lower | upper << 4) - 32) * halves_at(b, 0), Floats8{}};
    }
    template <int AT, int WORD>
    static INLINE Codes codes(Word<WORD> b, int chunk) {
        return four_bit_levels(b.nibbles(8 + 16 * chunk));
    }
};

}  // namespace
