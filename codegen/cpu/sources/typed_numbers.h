// Numbers whose type is known when they are read.

#pragma once

#include <cstdint>
#include <cstring>

#include "number_types.h"
#include "products.h"
#include "rows.h"

namespace {

// ------------------------------------------------------------------------------------------------ types

void to_floats(const uint8_t* from, Type type, int64_t count, float* to) {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    if (type == FLOAT32) std::memcpy(to, from, count * sizeof *to);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = from_bits(uint32_t(halves[i]) << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_float16(halves[i]);
}

void from_floats(const float* from, Type type, int64_t count, uint8_t* to) {
    auto* halves = reinterpret_cast<uint16_t*>(to);
    if (type == FLOAT32) std::memcpy(to, from, count * sizeof *from);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) halves[i] = to_float16(from[i]);
}

constexpr int64_t bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

inline const uint8_t* typed_row_at(const Rows& rows, Type type, int64_t b, int64_t h, int64_t t) {
    return row_at<const uint8_t>(rows, 0, 0, 0) + (b * rows.batch + h * rows.head + t * rows.token) * bytes_of(type);
}

}  // namespace
