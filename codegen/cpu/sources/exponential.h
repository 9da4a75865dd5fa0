// Powers of two, and what is made of them.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

// 2^f for f in [-1/2, 1/2].
INLINE Floats power_of_2(Floats f) {
    Floats y = f * 0.00015353361f + 0.0013398874f;
    y = y * f + 0.0096184374f;
    y = y * f + 0.0555033247f;
    y = y * f + 0.2402264791f;
    y = y * f + 0.6931472029f;
    return y * f + 1.0f;
}

// 2^x to 1e-7, for x <= 0; 0 below 2^-126.
INLINE Floats exp2(Floats x) {
#if defined(__AVX512F__)
    const __m512 least = _mm512_max_ps((__m512)x, _mm512_set1_ps(-150.0f));
    const __m512 whole = _mm512_roundscale_ps(least, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats part = (Floats)_mm512_sub_ps(least, whole);  // [-1/2, 1/2]
    return (Floats)_mm512_scalef_ps((__m512)power_of_2(part), whole);
#else
    constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const Floats low = x < -126.0f ? Floats{} - 126.0f : x;
    const Floats shifted = low + ROUND;
    const Floats part = low - (shifted - ROUND);  // [-1/2, 1/2]
    const Ints power = ((Ints)shifted - (Ints)(Floats{} + ROUND) + 127) << 23;
    return x < -126.0f ? Floats{} : power_of_2(part) * (Floats)power;
#endif
}

// To the accuracy of exp2.
INLINE Floats tanh(Floats x) {
    const Floats e = exp2((x < 0.0f ? x : -x) * float(2 * LOG2E));
    const Floats t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}

// log(total 2^top); -inf where nothing was added.
inline float log_sum_exp(float top, float total) { return float((double(top) + std::log2(double(total))) * LN2); }

}  // namespace
