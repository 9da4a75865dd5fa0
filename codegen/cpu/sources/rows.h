// Where a row of numbers is.

#pragma once

#include <cstdint>

#include "kernel_call.h"

namespace {

template <class T>
T* row_at(const Rows& rows, int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(const_cast<void*>(rows.data)) + b * rows.batch + h * rows.head + t * rows.token;
}

}  // namespace
