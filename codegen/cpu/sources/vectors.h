// Vectors of floats by compiler extensions, and numbers of 16 bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

#include "compiler_macros.h"

namespace {

// ------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 2;
#else
constexpr int LANES = 4, MAX_ROWS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));  // 8 channels: every tier is a multiple of them
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));  // used where LANES is 16
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint64_t Words8 __attribute__((vector_size(64)));
typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

INLINE Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline float dot(const float* x, const float* y, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i] * y[i];
    return sum;
}

INLINE Floats4 load4(const float* p) {
    Floats4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class F>
INLINE Floats4 fold(Floats v, F f) {
    Floats4 parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) parts[0] = f(parts[0], parts[i]);
    return parts[0];
}

INLINE Floats4 fold_sum(Floats v) {
    return fold(v, [](Floats4 a, Floats4 b) { return a + b; });
}

INLINE float sum_of_four(Floats4 s) { return (s[0] + s[2]) + (s[1] + s[3]); }

INLINE float sum_of(Floats v) { return sum_of_four(fold_sum(v)); }

INLINE float largest_of(Floats v) {
    const Floats4 s = fold(v, [](Floats4 a, Floats4 b) { return a > b ? a : b; });
    return std::max(std::max(s[0], s[1]), std::max(s[2], s[3]));
}

INLINE Floats4 sums_of_four(Floats4 p, Floats4 q, Floats4 r, Floats4 s) {
    const Floats4 pq = SHUFFLE(Ints4, p, q, 0, 4, 1, 5) + SHUFFLE(Ints4, p, q, 2, 6, 3, 7);
    const Floats4 rs = SHUFFLE(Ints4, r, s, 0, 4, 1, 5) + SHUFFLE(Ints4, r, s, 2, 6, 3, 7);
    return SHUFFLE(Ints4, pq, rs, 0, 1, 4, 5) + SHUFFLE(Ints4, pq, rs, 2, 3, 6, 7);
}

INLINE Floats4 sums_of(Floats a, Floats b, Floats c, Floats d) {
    return sums_of_four(fold_sum(a), fold_sum(b), fold_sum(c), fold_sum(d));
}

// A float of these bits; a float16 as a float.
INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_float16(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#endif
    const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
    const float finite = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent, also of subnormals
    const float x = magnitude < 0x7c00 ? finite : from_bits(magnitude << 13 | 0x7f800000);
    return sign ? -x : x;
}

// LANES numbers of memory as floats.
struct Float32 {
    typedef float Number;
    static INLINE Floats load(const Number* p) { return ::load(p); }
};

struct BFloat16 {
    typedef uint16_t Number;
    static INLINE Floats load(const Number* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // which GCC does not find by itself
        const __m256i halves8 = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return (Floats)_mm256_slli_epi32(halves8, 16);
#endif
        typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
        Halves halves;
        std::memcpy(&halves, p, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Ints) << 16);
    }
};

struct Float16 {
    typedef uint16_t Number;
    static INLINE Floats load(const Number* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        float x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = from_float16(p[i]);
        return ::load(x);
#endif
    }
};

}  // namespace
