// Calls with numbers that the compiler knows.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "compiler_macros.h"

namespace {

template <class F, int... I>
INLINE void with_count([[maybe_unused]] int64_t count, [[maybe_unused]] F f, std::integer_sequence<int, I...>) {
    ((count == I + 1 ? f(std::integral_constant<int, I + 1>()) : void()), ...);
}

// Calls f(count) with `count` as a compile-time number of at most MAX; of 0 there is no call.
template <int MAX, class F>
INLINE void with_count(int64_t count, F f) {
    with_count(count, f, std::make_integer_sequence<int, MAX>());
}

template <class F, int... I>
INLINE void for_counts(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// Calls f(i) with each i < COUNT as a compile-time number.
template <int COUNT, class F>
INLINE void for_counts(F f) {
    for_counts(f, std::make_integer_sequence<int, COUNT>());
}

}  // namespace
