// Keys that are relative to segments: how queries turn to read them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cache_call.h"

namespace {

// Whether channels of one frequency after the other stand side by side, as most models have them.
inline bool is_in_runs(const Turning& turning) {
    const int64_t *pairs = turning.pairs, frequencies = turning.frequencies;
    for (int64_t f = 1; f < frequencies; f++) {
        if (pairs[f] != pairs[0] + f || pairs[frequencies + f] != pairs[frequencies] + f) return false;
    }
    return frequencies > 0;
}

inline void rotate(const Turning& turning, const float* x, int64_t size, int64_t number, float* to, int64_t b = 0,
                   bool runs = false) {
    const int64_t *pairs = turning.pairs, frequencies = turning.frequencies;
    std::copy(x, x + size, to);
    const float *cos = turning.phases + b * turning.sequence + number * 2 * frequencies, *sin = cos + frequencies;
    if (runs) {
        const float *real = x + pairs[0], *imaginary = x + pairs[frequencies];
        float* __restrict first = to + pairs[0];
        float* __restrict second = to + pairs[frequencies];
        for (int64_t f = 0; f < frequencies; f++) {
            first[f] = real[f] * cos[f] - imaginary[f] * sin[f];
            second[f] = imaginary[f] * cos[f] + real[f] * sin[f];
        }
        return;
    }
    for (int64_t f = 0; f < frequencies; f++) {
        const int64_t real = pairs[f], imaginary = pairs[frequencies + f];
        to[real] = x[real] * cos[f] - x[imaginary] * sin[f];
        to[imaginary] = x[imaginary] * cos[f] + x[real] * sin[f];
    }
}

}  // namespace
