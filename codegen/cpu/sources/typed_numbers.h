// Numbers whose type is known when they are read.

#pragma once

#include <cstdint>
#include <cstring>

#include "number_types.h"
#include "products.h"
#include "rows.h"

namespace {

// ------------------------------------------------------------------------------------------------ types

// Returns f(T()), T of products.h.
template <class F>
INLINE auto with_type(Type type, F f) {
    if (type == BFLOAT16) return f(OfBFloat16());
    return type == FLOAT16 ? f(OfFloat16()) : f(OfFloat32());
}

void to_floats(const uint8_t* from, Type type, int64_t count, float* to) {
    if (type == FLOAT32) return void(std::memcpy(to, from, count * sizeof *to));  // also from where none is aligned
    with_type(type, [&](auto t) {
        typedef decltype(t) T;
        const auto* numbers = reinterpret_cast<const typename T::Element*>(from);
        for (int64_t i = 0; i < count; i++) to[i] = T::number(numbers[i]);
    });
}

void from_floats(const float* from, Type type, int64_t count, uint8_t* to) {
    if (type == FLOAT32) return void(std::memcpy(to, from, count * sizeof *from));
    with_type(type, [&](auto t) {
        typedef decltype(t) T;
        auto* numbers = reinterpret_cast<typename T::Element*>(to);
        for (int64_t i = 0; i < count; i++) numbers[i] = T::rounded(from[i]);
    });
}

// Numbers as those of a type.
void round_to(Type type, int64_t count, float* x) {
    with_type(type, [&](auto t) {
        typedef decltype(t) T;
        for (int64_t i = 0; i < count; i++) x[i] = T::number(T::rounded(x[i]));
    });
}

constexpr int64_t bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

inline const uint8_t* typed_row_at(const Rows& rows, Type type, int64_t b, int64_t h, int64_t t) {
    return row_at<const uint8_t>(rows, 0, 0, 0) + (b * rows.batch + h * rows.head + t * rows.token) * bytes_of(type);
}

}  // namespace
