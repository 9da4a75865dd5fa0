//: Values of trellis codes, see fhopt/ops/trellis.py. Needs <cstdint>; stands in an anonymous namespace.
// ------------------------------------------------------------------------------------------------ trellis codes
//
// A bit group of b bits and W channels with a trellis code is a ring of W b bits. The code of channel c is that of a
// table at bits (c + 1) b - 8 ... (c + 1) b - 1 of the ring, its window.

constexpr int WINDOW = 8;
// clang-format off
alignas(64) constexpr uint8_t TRELLIS[1 << WINDOW] = {
$trellis
};
// clang-format on

// The bits of 8 channels from a multiple of 8 on, and before them the byte in which their windows begin.
INLINE uint64_t bits_of_eight(const uint8_t* ring, int64_t bytes, int bits, int64_t channel) {
    const uint8_t* from = ring + channel / 8 * bits;
    uint64_t word = channel ? from[-1] : ring[bytes - 1];
    for (int i = 0; i < bits; i++) word |= uint64_t(from[i]) << 8 * (i + 1);
    return word;
}

// Window i of these.
INLINE int window_of(uint64_t word, int bits, int i) { return int(word >> (i + 1) * bits & 255); }
