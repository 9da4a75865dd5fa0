// Where quantized values of a row go as bytes, if not as words. byte_codes.h takes them apart.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "trellis.h"
#include "unpack_rows.h"

namespace {

// ------------------------------------------------------------------------------------------------ codes as bytes
//
// With AVX-512 VNNI codes are multiplied as bytes, four products and their sum to a lane; not so uncoded sides, values
// with float16 channels, and all with -DFHOPT_FLOAT. What codes are multiplied with becomes a sum of signed bytes:
// q = unit * (q0 + 256 q1 + 65536 q2), a weight likewise.
//
//     keys      a vector of codes:  4 channels of 16 tokens   times a part of q[r]:  4 channels, the same for all lanes
//       one r   a vector of codes:  64 channels of a token    times a part of q:     64 channels
//     values    a vector of codes:  16 channels of 4 tokens   times a part of w[r]:  4 tokens, the same for all lanes
//
// A row is taken apart 64 channels, a slice, at a time: its bytes are brought to the eight bytes of those channels that
// have bits in them, then the bits of each channel to the upper end of its own byte, once for each plane of bits. That
// a code b is then 2^(8-b) times itself is folded into the query or the output. Of a trellis code the bits are a
// window, which is looked up in tables of 16 bytes. Where few queries of 16 bits share codes, 2 or 3, their parts are
// arranged as [dword, part, r], and codes are multiplied before they leave the registers.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && \
    !defined(FHOPT_FLOAT)
#define BYTES true
#else
#define BYTES false
#endif
// AVX-512 without VBMI is left out where this is compiled (codegen/compiler.py), so that words are multiplied.
#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__) && !defined(FHOPT_FLOAT)
#define WORDS true
#else
#define WORDS false
#endif
#define INTEGER (BYTES || WORDS)

// A code of a row: in its first plane it has `high` bits from bit `high_bit` of the row on, `low` in its second.
// A trellis code: its window from `high_bit` on, which goes on in the byte `next`.
struct Code {
    int channel, high, high_bit, low, low_bit;
    int trellis = 0, next = -1;  // bits of a trellis code

    int precision() const { return trellis ? trellis : bits(); }  // of what it stands for
    int bits() const { return high + low; }
    int shift() const { return 8 - bits(); }  // of the code in its byte
};

#if !WORDS

// What it takes to bring codes of a row to bytes: they are bytes, in order; they come from one block of 64 bytes of the
// row or from several, and have one plane or two. The greater of two kinds serves both.
enum Kind { WHOLE, ONE_HIGH, ONE_LOW, ONE_TRELLIS, MANY_HIGH, MANY_LOW, MANY_TRELLIS };

constexpr bool is_many(Kind kind) { return kind >= MANY_HIGH; }
constexpr int depth_of(Kind kind) { return is_many(kind) ? kind - MANY_HIGH + ONE_HIGH : kind; }
constexpr Kind either(Kind a, Kind b) {
    const int deeper = std::max(depth_of(a), depth_of(b));
    return Kind(is_many(a) || is_many(b) ? std::max(deeper - ONE_HIGH, 0) + MANY_HIGH : deeper);
}

// How 64 codes of a row come to 64 bytes. `source`: the byte of the row, -1 for none, that each byte of eight is; of
// these eight bytes each code then takes the bits from `from` on that `keep` keeps, of its first and second plane.
struct Slice {
    // 64 bytes of a row from `offset` on, fewer where it ends, and which of them goes where.
    struct Block {
        alignas(64) uint8_t index[64];
        uint64_t mask;  // bytes of the slice that are from here
        int offset;
    };

    alignas(64) uint8_t from[2][64] = {}, keep[2][64] = {};
    int source[64];
    std::vector<Block> blocks;
    bool has_low = false;  // codes have a second plane
    uint64_t looked = 0;  // which bytes are windows of a trellis code
    Kind kind = WHOLE;

    Slice() {
        for (int& byte : source) byte = -1;
    }
    int slot(int to, int byte) {  // of a byte of the row among the eight around `to`
        int i = to / 8 * 8;
        while (source[i] >= 0 && source[i] != byte) i++;
        source[i] = byte;
        return i % 8;
    }
    void put(int to, int plane, int bits, int bit, int shift) {
        if (bits == 0) return;
        from[plane][to] = uint8_t((8 * slot(to, bit / 8) + bit % 8 - shift) & 63);
        keep[plane][to] = uint8_t(((1 << bits) - 1) << shift);
        has_low |= plane == 1;
    }
    int slot_of_two(int to, int byte, int next) {  // of bytes that stand side by side
        const int first = to / 8 * 8;
        int i = first;
        while (source[i] >= 0 && (source[i] != byte || source[i + 1] != next)) i++;
        if (source[i] < 0 && i > first && source[i - 1] == byte) i--;
        source[i] = byte, source[i + 1] = next;
        return i % 8;
    }
    void put_window(int to, const Code& code) {
        from[0][to] = uint8_t(8 * slot_of_two(to, code.high_bit / 8, code.next) + code.high_bit % 8);
        keep[0][to] = 255;
        looked |= uint64_t(1) << to;
    }
    void put(int to, const Code& code) {
        if (code.trellis) return put_window(to, code);
        put(to, 0, code.high, code.high_bit, code.shift() + code.low);
        put(to, 1, code.low, code.low_bit, code.shift());
    }
    // Once all codes have been put: which blocks of a row of so many bytes are read.
    void settle(int bytes) {
        for (int offset = 0; offset < bytes; offset += 64) {
            Block block = {};
            block.offset = offset;
            for (int to = 0; to < 64; to++) {
                if (source[to] < offset || source[to] >= offset + 64) continue;
                block.index[to] = uint8_t(source[to] - offset);
                block.mask |= uint64_t(1) << to;
            }
            if (block.mask) blocks.push_back(block);
        }
        kind = looked ? ONE_TRELLIS : has_low ? ONE_LOW : WHOLE;
        if (blocks.size() > 1) kind = either(MANY_HIGH, kind);
        for (int i = 0; i < 64 && kind == WHOLE; i++) {
            const bool whole = keep[0][i] == 255 && from[0][i] == 8 * (i % 8) && blocks[0].index[i] == i;
            if (source[i] >= 0 && !whole) kind = ONE_HIGH;
        }
    }
};

// Codes and float16 channels of a row, and how a row is taken apart.
struct Layout {
    std::vector<Code> codes;
    std::vector<int> half_channel, half_byte;  // of float16 channels
    std::vector<Slice> slices, half_slices;  // of codes, of float16 channels
    Kind kind = WHOLE;  // serves all slices of codes
    static constexpr int looked_up = 0;  // bytes of a row with what its rings stand for: none is kept

    int count() const { return int(codes.size()); }
    int halves() const { return int(half_channel.size()); }
    int reach(int bytes) const { return (bytes + 63) / 64 * 64; }  // whole blocks of a row are read
    int bytes_of_token(bool values) const { return values ? (count() + 15) / 16 * 16 : count(); }  // in a tile
    int bytes_of_tile(bool values, int tokens) const { return tokens * bytes_of_token(values); }

    void add_trellis(int bits, int width, int bit, int channel) {
        const int first = bit / 8, bytes = width * bits / 8;
        for (int i = 0; i < width; i++) {
            const int window = ((i + 1) * bits + 8 * bytes - WINDOW) % (8 * bytes), byte = window / 8;
            codes.push_back({channel + i, 8, bit + window, 0, 0, bits, first + (byte + 1) % bytes});
        }
    }
    void add(int bits, int width, int bit, int channel, bool is_trellis) {
        if (is_trellis) return add_trellis(bits, width, bit, channel);
        const int high = high_bits(bits), low = bits - high;
        for (int i = 0; i < width; i++) {
            if (bits < 16) codes.push_back({channel + i, high, bit + i * high, low, bit + width * high + i * low});
            if (bits == 16) half_channel.push_back(channel + i), half_byte.push_back(bit / 8 + 2 * i);
        }
    }
    // Keys: byte i of a slice is its channel i, so that a dword has four channels. Values: where `interleave` makes
    // vectors of 16 channels of them. Float16 channels: 32 to a slice.
    void take_apart(bool interleaved, int bytes) {
        slices.resize((codes.size() + 63) / 64);
        for (int i = 0; i < count(); i++) {
            slices[i / 64].put(interleaved ? i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4 : i % 64, codes[i]);
        }
        half_slices.resize((2 * halves() + 63) / 64);
        for (int i = 0; i < 2 * halves(); i++) half_slices[i / 64].source[i % 64] = half_byte[i / 2] + i % 2;
        for (Slice& slice : slices) {
            slice.settle(bytes);
            kind = either(kind, slice.kind);
        }
        for (Slice& slice : half_slices) slice.settle(bytes);
    }
};

#endif

}  // namespace
