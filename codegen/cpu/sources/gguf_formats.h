// The formats of blocks in GGUF files whose products have a kernel.

#pragma once

#include <cstdint>

#include "format_tables.h"
#include "skinny_call.h"

namespace {

constexpr FormatSize size_of(int64_t format) {
    for (const FormatSize& size : SIZES) {
        if (size.format == format) return size;
    }
    return {};
}

// The field of a block that a byte belongs to.
constexpr FormatField field_of(Format format, int64_t at) {
    for (const FormatField& field : FIELDS) {
        if (field.format == format && field.begin <= at && at < field.end) return field;
    }
    return {};
}

}  // namespace
