// Rows in 8 bits of a residual window.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cache_parts.h"
#include "rows.h"
#include "typed_numbers.h"

namespace {

// x[n], less `mean`, as 8-bit values with one float16 scale, as fhopt.ops.packing.round_rows does.
inline void round_row(const float* x, const float* mean, int64_t n, uint8_t* codes, uint16_t& scale) {
    constexpr int AT_ONCE = 16;
    float most[AT_ONCE] = {}, none[AT_ONCE] = {};  // NaN where x has one
    const auto look_at = [&](int64_t i, int lane) {
        const float difference = std::abs(mean ? x[i] - mean[i] : x[i]);
        most[lane] = difference > most[lane] ? difference : most[lane];
        none[lane] += difference == difference ? 0.0f : difference;
    };
    const int64_t whole = n / AT_ONCE * AT_ONCE;
    for (int64_t i = 0; i < whole; i += AT_ONCE) {
        for (int lane = 0; lane < AT_ONCE; lane++) look_at(i + lane, lane);
    }
    for (int64_t i = whole; i < n; i++) look_at(i, int(i - whole));
    float largest = 0, unknown = 0;
    for (int lane = 0; lane < AT_ONCE; lane++) {
        largest = std::max(largest, most[lane]);
        unknown += none[lane];
    }
    scale = to_float16(std::clamp(largest / 127.5f, 0x1p-24f, 65504.0f) + unknown);
    const float step = from_float16(scale);
    for (int64_t i = 0; i < n; i++) {
        const float level = std::floor((mean ? x[i] - mean[i] : x[i]) / step + 128.0f);
        codes[i] = uint8_t(level > 0 ? std::min(level, 255.0f) : 0.0f);
    }
}

// Tokens x [B,H,T,D] of a type, less their means, as rows of 8 bits: codes [B,H,T,D] and scales [B,H,T], from token
// `at` on. sizes: B, H, T, D.
inline void round_tokens(Type type, const Rows& x, const int64_t (&sizes)[4], const CacheMean& means, const Rows& codes,
                         const Rows& scales, int64_t at, int64_t threads) {
    const int64_t heads = sizes[1], tokens = sizes[2], size = sizes[3];
#pragma omp parallel for num_threads(int(threads)) if (threads > 1)
    for (int64_t i = 0; i < sizes[0] * tokens * heads; i++) {
        static thread_local std::vector<float> numbers;
        if (int64_t(numbers.size()) < size) numbers.resize(size);
        const int64_t b = i / (tokens * heads), t = i / heads % tokens, h = i % heads;
        to_floats(typed_row_at(x, type, b, h, t), type, size, numbers.data());
        round_row(numbers.data(), mean_of(means, b, h), size, row_at<uint8_t>(codes, b, h, at + t),
                  *row_at<uint16_t>(scales, b, h, at + t));
    }
}

// Rows of 8 bits as the numbers of a type that they stand for.
inline void unround_row(const uint8_t* codes, float scale, const float* mean, int64_t n, Type type, float* x) {
    for (int64_t i = 0; i < n; i++) x[i] = (float(codes[i]) - 127.5f) * scale + (mean ? mean[i] : 0.0f);
    round_to(type, n, x);
}

}  // namespace
