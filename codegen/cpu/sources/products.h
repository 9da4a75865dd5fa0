// Products of rows of a weight, in the type that the weight has. Files that multiply with it get the same bits: the
// order of a sum depends on neither the rows nor the columns.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// ------------------------------------------------------------------------------------------------ numbers

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const float magnitude = std::abs(x);
    if (x != x) return uint16_t(sign | 0x7e00);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
    const float step = magnitude < 0x1p-14f ? 0x1p-24f : std::ldexp(1.0f, std::ilogb(magnitude) - 10);
    const float whole = std::nearbyint(magnitude / step) * step;  // on the grid of float16
    uint32_t there;
    std::memcpy(&there, &whole, sizeof there);
    if (whole < 0x1p-14f) return uint16_t(sign | uint16_t(whole * 0x1p24f));
    return uint16_t(sign | (((there >> 23) - 112) << 10 | (there >> 13 & 0x3ff)));
#endif
}

// sum + x * w, rounded once where the CPU can: compilers would choose so for some numbers of rows and not for others.
INLINE Floats add_product(Floats sum, Floats x, Floats w) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return sum + x * w;
#endif
}

INLINE float add_product(float sum, float x, float w) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(x, w, sum);
#else
    return sum + x * w;
#endif
}

// What differs between types: how STEP numbers of the weight and of the input are read, and multiplied.
template <class Stored>
struct Floating {
    typedef typename Stored::Number Element, Weight;  // of input and output, of the weight
    typedef float Input;
    typedef Floats Vector;
    static constexpr int STEP = LANES;

    static INLINE int64_t place(int64_t k) { return k; }  // of the k-th number of a row of the input
    static INLINE Vector weight(const Element* p) { return Stored::load(p); }
    static INLINE Vector input(const Input* p) { return load(p); }
    static INLINE Floats add(Floats sum, Vector x, Vector w) { return add_product(sum, x, w); }
};

INLINE Floats floats_of_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Floats x;
    for (int i = 0; i < LANES; i++) x[i] = p[i];
    return x;
#endif
}

struct OfFloat32 : Floating<Float32> {
    static INLINE float number(Element x) { return x; }
    static INLINE Element rounded(float x) { return x; }
    static INLINE Input prepared(Element x) { return x; }
};

struct OfBFloat16 : Floating<BFloat16> {
    static INLINE float number(Element x) { return from_bits(uint32_t(x) << 16); }
    static INLINE Element rounded(float x) { return to_bfloat16(x); }
    static INLINE Input prepared(Element x) { return number(x); }
};

#if defined(__AVX512BF16__)
struct OfBFloat16Pairs : OfBFloat16 {
    typedef uint16_t Input;
    typedef __m512i Vector;
    static constexpr int STEP = 32;

    static INLINE Vector weight(const Element* p) { return _mm512_loadu_si512(p); }
    static INLINE Vector input(const Input* p) { return _mm512_loadu_si512(p); }
    static INLINE Floats add(Floats sum, Vector x, Vector w) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }
    static INLINE Input prepared(Element x) { return x; }
};
#else
// The even and the odd numbers of 2 LANES: no number moves to another lane, which costs more than to multiply.
struct OfBFloat16Pairs : OfBFloat16 {
    struct Vector {
        Floats even, odd;
    };
    static constexpr int STEP = 2 * LANES;

    static INLINE int64_t place(int64_t k) { return k / STEP * STEP + k % 2 * LANES + k % STEP / 2; }
    static INLINE Vector weight(const Element* p) {
        Ints pairs;
        std::memcpy(&pairs, p, sizeof pairs);
        return {(Floats)(pairs << 16), (Floats)(pairs & int32_t(0xffff0000))};
    }
    static INLINE Vector input(const Input* p) { return {load(p), load(p + LANES)}; }
    static INLINE Floats add(Floats sum, Vector x, Vector w) {
        return add_product(add_product(sum, x.even, w.even), x.odd, w.odd);
    }
};
#endif

struct OfFloat16 : Floating<Float16> {
    static INLINE float number(Element x) { return from_float16(x); }
    static INLINE Element rounded(float x) { return to_float16(x); }
    static INLINE Input prepared(Element x) { return number(x); }
};

// Weights of signed bytes; input and output are those of T.
template <class T>
struct OfBytes : T {
    typedef int8_t Weight;

    static INLINE typename T::Vector weight(const Weight* p) { return floats_of_bytes(p); }
};

// ------------------------------------------------------------------------------------------------ a block

constexpr int BLOCK_ROWS = 8;  // rows of the input that are multiplied at once

constexpr int columns_for(int rows) {  // as many sums as registers hold beside what is read
    return std::clamp((LANES == 16 ? 24 : 10) / rows, 1, 8);
}

// Rows of the weight are `weight_row` apart; those of the next call, which only several rows of input fetch ahead, are
// `next` behind these.
template <class T, int ROWS, int COLUMNS>
INLINE void multiply(const typename T::Input* input, int64_t stride, const typename T::Weight* weight,
                     int64_t weight_row, int64_t next, int64_t width, float* sums) {
    Floats sum[ROWS][COLUMNS] = {};
    // clang-format off
    const auto add = [&](int64_t i, const typename T::Vector (&w)[COLUMNS]) {
        // clang-format on
        UNROLL(8) for (int r = 0; r < ROWS; r++) {
            const auto x = T::input(input + r * stride + i);
            UNROLL(8) for (int c = 0; c < COLUMNS; c++) sum[r][c] = T::add(sum[r][c], x, w[c]);
        }
    };
    const int64_t whole = width / T::STEP * T::STEP;
    if (ROWS == 1) {  // a weight is used once: it needs no register of its own
        UNROLL(1) for (int64_t i = 0; i < whole; i += T::STEP) {
            const auto x = T::input(input + i);
            UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
                sum[0][c] = T::add(sum[0][c], x, T::weight(weight + c * weight_row + i));
            }
        }
    }
    UNROLL(1) for (int64_t i = ROWS == 1 ? whole : 0; i < whole; i += T::STEP) {
        typename T::Vector w[COLUMNS];
        UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
            w[c] = T::weight(weight + c * weight_row + i);
            // Into the second-level cache; of one row of input the CPU's own prefetching is faster.
            __builtin_prefetch(weight + c * weight_row + next + i, 0, 2);
        }
        add(i, w);
    }
    if (whole < width) {
        typename T::Vector w[COLUMNS];
        UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
            typename T::Weight rest[T::STEP] = {};
            std::memcpy(rest, weight + c * weight_row + whole, (width - whole) * sizeof *rest);
            w[c] = T::weight(rest);
        }
        add(whole, w);
    }
    constexpr int ALL = ROWS * COLUMNS;
    const Floats* all = &sum[0][0];
    UNROLL(8) for (int i = 0; i + 4 <= ALL; i += 4) {
        store(sums + i, sums_of(all[i], all[i + 1], all[i + 2], all[i + 3]));
    }
    UNROLL(4) for (int i = ALL / 4 * 4; i < ALL; i++) sums[i] = sum_of(all[i]);
}

}  // namespace
