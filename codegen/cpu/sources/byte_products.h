// Products of bytes, four to a lane.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

INLINE Ints16 bytes_at(const uint8_t* p) {
    Ints16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE int32_t four_at(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// sums[i] += sum over k < 4 of byte k of codes[i] (unsigned) times byte k of h (signed).
INLINE Ints16 add_products(Ints16 sums, Ints16 codes, int32_t h) {
#if defined(__AVX512VNNI__)
    return (Ints16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(h));
#else
    for (int k = 0; k < 4; k++) sums += (codes >> 8 * k & 255) * int32_t(int8_t(h >> 8 * k));
    return sums;
#endif
}

// The same for codes below 16.
INLINE Ints16 add_small_products(Ints16 sums, Ints16 codes, int32_t h) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    __m256i halves[2], added[2];
    std::memcpy(halves, &codes, sizeof codes);
    std::memcpy(added, &sums, sizeof sums);
    for (int i = 0; i < 2; i++) {  // pairs are at most 2 * 15 * 127
        const __m256i pairs = _mm256_maddubs_epi16(halves[i], _mm256_set1_epi32(h));
        added[i] = _mm256_add_epi32(added[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    std::memcpy(&sums, added, sizeof sums);
    return sums;
#else
    return add_products(sums, codes, h);
#endif
}

INLINE Ints16 low_halves(Ints16 x) { return x & 0x0f0f0f0f; }
INLINE Ints16 high_halves(Ints16 x) { return x >> 4 & 0x0f0f0f0f; }

}  // namespace
