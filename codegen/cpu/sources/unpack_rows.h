// Rows of latents as floats.

#pragma once

#include <cstdint>
#include <cstring>

#include "trellis.h"
#include "vectors.h"

namespace {

// ------------------------------------------------------------------------------------------------ from rows to floats

// 8 or 16 channels of a bit plane, in channel order: V is Ints8 or Ints16.
template <class V, int BITS>
INLINE V lanes_of(const uint8_t* plane) {
    if constexpr (BITS == 8) {
#if defined(__AVX2__)  // which GCC does not find by itself
        if constexpr (sizeof(V) == sizeof(Ints8)) {
            return (V)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane)));
        }
#endif
        typedef uint8_t Bytes __attribute__((vector_size(sizeof(V) / 4)));
        Bytes bytes;
        std::memcpy(&bytes, plane, sizeof bytes);
        return __builtin_convertvector(bytes, V);
    } else if constexpr (sizeof(V) == sizeof(Ints8)) {
        constexpr V shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
        int32_t word = 0;
        std::memcpy(&word, plane, BITS);
        return ((V{} + word) >> shifts) & ((1 << BITS) - 1);
    } else if constexpr (BITS == 4) {
        constexpr V shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
        uint64_t word;
        std::memcpy(&word, plane, 8);
        const V halves = (V)(Words8{} + word);
        return (SHUFFLE(V, halves, halves, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1) >> shifts) & 15;
    } else {
        // clang-format off
        constexpr V shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS, 8 * BITS, 9 * BITS,
                              10 * BITS, 11 * BITS, 12 * BITS, 13 * BITS, 14 * BITS, 15 * BITS};
        // clang-format on
        int32_t word = 0;
        std::memcpy(&word, plane, 2 * BITS);
        return ((V{} + word) >> shifts) & ((1 << BITS) - 1);
    }
}

// Codes as floats: HIGH bits of each in one bit plane and, where LOW is not 0, the LOW bits below them in another.
template <class V, class F, int HIGH, int LOW>
INLINE void copy_lanes(const uint8_t* high, const uint8_t* low, float* z) {
    V codes = lanes_of<V, HIGH>(high);
    if constexpr (LOW > 0) codes = codes << LOW | lanes_of<V, LOW>(low);
    store(z, __builtin_convertvector(codes, F));
}

constexpr int high_bits(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }  // of the first plane

// A tier: 16 channels at once where a vector holds them, then what is left, 8 at once.
template <int BITS>
INLINE void copy_codes(const uint8_t* row, int width, float* z) {
    constexpr int HIGH = high_bits(BITS), LOW = BITS - HIGH;
    const uint8_t* low = row + width / 8 * HIGH;
    int i = 0;
    if constexpr (LANES == 16) {
        UNROLL(2) for (; i + 16 <= width; i += 16) {
            copy_lanes<Ints16, Floats16, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
        }
    }
    UNROLL(2) for (; i < width; i += 8) {
        copy_lanes<Ints8, Floats8, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
    }
}

// Float16 channels beside coded ones are divided by the scale with which the sum over all channels is multiplied.
INLINE void copy_float16(const uint8_t* row, int width, float* z, float factor = 1.0f) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= width; i += 8) {
        const Floats8 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i)));
        store(z + i, x * factor);
    }
#endif
    for (; i < width; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_float16(half) * factor;
    }
}

// Where windows of 16 channels of a ring come from, whose bits begin in the second of 16 bytes: for each of two times 8
// channels the two bytes that have the window, and the factor that brings it to the upper of them.
struct Spread {
    alignas(16) uint8_t bytes[2][16] = {};
    alignas(16) uint16_t factor[2][8] = {};

    constexpr explicit Spread(int bits) {
        for (int i = 0; i < 16; i++) {
            const int bit = (i + 1) * bits;
            bytes[i / 8][i % 8 * 2] = uint8_t(bit / 8), bytes[i / 8][i % 8 * 2 + 1] = uint8_t(bit / 8 + 1);
            factor[i / 8][i % 8] = uint16_t(1 << (8 - bit % 8));
        }
    }
};

[[maybe_unused]] constexpr Spread SPREADS[] = {Spread(1), Spread(2), Spread(3), Spread(4)};

#if defined(__SSSE3__) || (defined(__aarch64__) && !defined(__clang__))
// Bytes `at` of 16, all of them below 16.
INLINE Bytes16 picked(Bytes16 from, Bytes16 at) {
#if defined(__SSSE3__)
    return (Bytes16)_mm_shuffle_epi8((__m128i)from, (__m128i)at);
#else
    return __builtin_shuffle(from, at);
#endif
}

template <class V, class T>
INLINE V vector_of(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// A tier with a trellis code: 8 windows at once, each in a word of 16 bits.
INLINE void copy_trellis(const uint8_t* row, int bits, int width, float* z) {
    const Spread& its = SPREADS[bits - 1];
    const Bytes16 from = vector_of<Bytes16>(its.bytes[0]), levels = vector_of<Bytes16>(LEVELS);
    const Bytes16 offsets = vector_of<Bytes16>(OFFSETS), order = vector_of<Bytes16>(ORDER);
    const Halves8 factor = vector_of<Halves8>(its.factor[0]);
    for (int i = 0; i < width; i += 8) {
        const Words2 word = {bits_of_eight(row, width * bits / 8, bits, i), 0};
        const Halves8 windows = (Halves8)picked((Bytes16)word, from) * factor >> 8;
        const Halves8 low = windows & 15, high = windows >> 4;
        const Bytes16 level = picked(levels, (Bytes16)high ^ picked(order, (Bytes16)low));
        const Halves8 codes = (Halves8)(level + picked(offsets, (Bytes16)low)) & 255;
        store(z + i, __builtin_convertvector(codes, Floats8));
    }
}
#else
// A tier with a trellis code.
INLINE void copy_trellis(const uint8_t* row, int bits, int width, float* z) {
    for (int i = 0; i < width; i += 8) {
        const uint64_t word = bits_of_eight(row, width * bits / 8, bits, i);
        for (int j = 0; j < 8; j++) z[i + j] = float(TRELLIS[window_of(word, bits, j)]);
    }
}
#endif

INLINE void copy_bfloat16(const uint8_t* row, int width, float* z) {
    for (int i = 0; i < width; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_bits(uint32_t(half) << 16);
    }
}

}  // namespace
