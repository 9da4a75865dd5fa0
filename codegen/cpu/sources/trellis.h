// Values of trellis codes, see fhopt/ops/trellis.py.

#pragma once

#include <cstdint>

#include "compiler_macros.h"
#include "trellis_tables.h"

namespace {

// ------------------------------------------------------------------------------------------------ trellis codes
//
// A bit group of b bits and W channels with a trellis code is a ring of W b bits. The code of channel c is that of a
// table at bits (c + 1) b - 8 ... (c + 1) b - 1 of the ring, its window. Of a window with low-order half l and
// high-order half h that is LEVELS[h ^ ORDER[l]] + OFFSETS[l].

constexpr int WINDOW = 8;

struct Table {
    alignas(64) uint8_t code[1 << WINDOW] = {};

    constexpr Table() {
        for (int w = 0; w < 1 << WINDOW; w++) code[w] = uint8_t(LEVELS[w / 16 ^ ORDER[w % 16]] + OFFSETS[w % 16]);
    }
    constexpr const uint8_t& operator[](int window) const { return code[window]; }
};

constexpr Table TRELLIS;

// The bits of 8 channels from a multiple of 8 on, and before them the byte in which their windows begin.
INLINE uint64_t bits_of_eight(const uint8_t* ring, int64_t bytes, int bits, int64_t channel) {
    const uint8_t* from = ring + channel / 8 * bits;
    uint64_t word = channel ? from[-1] : ring[bytes - 1];
    for (int i = 0; i < bits; i++) word |= uint64_t(from[i]) << 8 * (i + 1);
    return word;
}

// Window i of these.
INLINE int window_of(uint64_t word, int bits, int i) { return int(word >> (i + 1) * bits & 255); }

}  // namespace
