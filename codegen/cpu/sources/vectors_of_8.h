// Vectors of 8 channels, whatever the vector unit: every bit group is a multiple of them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "compiler_macros.h"

namespace {

typedef float Floats __attribute__((vector_size(32)));  // 8 channels
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(8)));

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

INLINE Floats clamp(Floats x, float low, float high) {  // NaN becomes `low`
    x = x > low ? x : Floats{} + low;
    return x < high ? x : Floats{} + high;
}

}  // namespace
