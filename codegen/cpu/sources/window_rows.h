// Rows of a residual window in 8 bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// ------------------------------------------------------------------------------------------------ a window of 8 bits

// x[n], less `mean`, as 8-bit values with one scale, as fhopt.ops.packing.round_rows does. Half: of one float.
template <class T, class Half>
void round_row(const T* x, const float* mean, int64_t n, uint8_t* codes, Half& scale) {
    constexpr int AT_ONCE = 16;
    float most[AT_ONCE] = {}, none[AT_ONCE] = {};  // NaN where x has one
    const auto look_at = [&](int64_t i, int lane) {
        const float difference = std::abs(mean ? float(x[i]) - mean[i] : float(x[i]));
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
    scale = Half(std::clamp(largest / 127.5f, 0x1p-24f, 65504.0f) + unknown);
    const float step = float(scale);
    for (int64_t i = 0; i < n; i++) {
        const float level = std::floor((mean ? float(x[i]) - mean[i] : float(x[i])) / step + 128.0f);
        codes[i] = uint8_t(level > 0 ? std::min(level, 255.0f) : 0.0f);
    }
}

}  // namespace
