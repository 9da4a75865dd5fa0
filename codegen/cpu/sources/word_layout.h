// Where quantized values of a row go as words of 16 bits, with AVX2. word_codes.h takes them apart.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "byte_layout.h"

namespace {

// ------------------------------------------------------------------------------------------------ codes as words
//
// With AVX2, codes are multiplied as words of 16 bits, two products and their sum to a lane of 32. What they are
// multiplied with becomes q = unit * (q0 + 256 q1), where q1 is a word.
//
//     keys      a vector of codes:  2 channels of 8 tokens   times a part of q[r]:  2 channels, the same for all lanes
//     values    a vector of codes:  1 channel of 16 tokens   times a part of w[r]:  16 tokens
//
// Rows are transposed as they are stored, 16 bytes at a time: a lane then has four bytes (keys) or two (values) of a
// plane of bits. A shift and a mask give a vector of codes at the upper end of a byte, and their bits of a second plane
// come from another lane. Planes are read from their own first byte on, so that none shares a lane with another.
//
// Trellis codes become bytes first: rows are copied, and behind each is put what its rings stand for, as a bit group of
// 8 bits would be stored.

#if WORDS

// Codes of a lane of keys: in four bytes; in two, which are brought to its two words; in one, of which they are halves.
enum Form { FOUR_BYTES, TWO_BYTES, ONE_BYTE };

constexpr int MAX_PAIRS = 128;  // 256 products of a word and a byte are below 2^31

// A transposed lane with codes, and the one with their lower bits, from byte (keys) or bit (values) `at` on.
struct Group {
    int high, high_at, low, low_at;
};

// Groups whose codes have as many bits, as many of them in a word of a lane.
struct Run {
    int bits, count;
    Form form;
    bool follows_floats;  // sums so far become floats first: they might not fit 32 bits
    std::vector<Group> groups;

    bool is_like(const Run& other) const { return bits == other.bits && count == other.count && form == other.form; }
};

// A ring of trellis codes from a byte of the row on, and where what they stand for is put.
struct Ring {
    int bits, width, byte, at;
};

// Codes of a row in the order in which they are multiplied, its float16 channels, and how it is taken apart.
struct Layout {
    struct Bits {
        int bits, width, bit, channel;
        bool is_trellis;
    };

    std::vector<Bits> tiers;
    std::vector<Code> codes;
    std::vector<int> half_channel, half_pieces;  // of float16 channels; the pieces that they are in, eight in each
    std::vector<int> pieces;  // of 16 bytes of a row: where they begin
    std::vector<Run> runs;
    std::vector<Ring> rings;
    int looked_up = 0;  // bytes of a row with what its rings stand for, if it has any
    int added = 0;  // pairs of codes of keys since sums became floats

    int count() const { return int(codes.size()); }
    int halves() const { return int(half_channel.size()); }
    int read() const { return *std::max_element(pieces.begin(), pieces.end()) + 16; }
    int reach(int bytes) const { return rings.empty() ? std::max(bytes, read()) : bytes + 32; }
    // Transposed rows: of values those of a tile, of which a quarter at most is in use at a time; of keys 16.
    int bytes_of_token(bool values) const { return values ? 4 * int(pieces.size()) : 0; }
    int bytes_of_tile(bool values, int tokens) const { return 16 * int(pieces.size()) * (values ? tokens : 16); }

    void add(int bits, int width, int bit, int channel, bool is_trellis) {
        tiers.push_back({bits, width, bit, channel, is_trellis});
        for (int i = 0; i < width && bits == 16; i++) half_channel.push_back(channel + i);
    }
    void take_apart(bool values, int bytes) {
        int at = (bytes + 31) / 32 * 32;
        for (Bits& tier : tiers) {
            if (!tier.is_trellis) continue;
            rings.push_back({tier.bits, tier.width, tier.bit / 8, at});
            tier.bits = 8, tier.bit = 8 * at;
            at += (tier.width + 31) / 32 * 32;
        }
        for (const Bits& tier : tiers) {
            for (int i = 0; i < tier.width;) {
                if (tier.bits == 16) half_pieces.push_back(lane(tier.bit / 8 + 2 * i, 16)), i += 8;
                else i += values ? add_words(tier, i) : add_dwords(tier, i);
            }
        }
        if (!rings.empty()) looked_up = (std::max(at, read()) + 31) / 32 * 32;
    }
    // The lane of `size` bytes that begins at a byte of the row, among those of all pieces.
    int lane(int byte, int size) {
        const int lanes = 16 / size;
        for (int i = 0; i < int(pieces.size()); i++) {
            const int at = byte - pieces[i];
            if (at >= 0 && at < 16 && at % size == 0) return i * lanes + at / size;
        }
        pieces.push_back(byte);
        return int(pieces.size() - 1) * lanes;
    }
    void add(const Group& group, int bits, Form form, int count) {
        added += count;
        const Run run = {bits, count, form, added > MAX_PAIRS, {}};
        if (runs.empty() || run.follows_floats || !run.is_like(runs.back())) runs.push_back(run);
        if (run.follows_floats) added = count;
        runs.back().groups.push_back(group);
    }
    static Code code(const Bits& tier, int i) {
        const int high = high_bits(tier.bits), low = tier.bits - high;
        return {tier.channel + i, high, tier.bit + i * high, low, tier.bit + tier.width * high + i * low};
    }
    // Values: the codes of a word from channel i on. How many there are.
    int add_words(const Bits& tier, int i) {
        const Code first = code(tier, 0), here = code(tier, i);
        const auto word = [&](int from, int bit) { return lane(from / 8 + (bit - from) / 16 * 2, 2); };
        const int count = std::min(16 / here.high, tier.width - i);
        // clang-format off
        const Group group = {word(first.high_bit, here.high_bit), 0,
                             first.low ? word(first.low_bit, here.low_bit) : 0, (here.low_bit - first.low_bit) % 16};
        // clang-format on
        add(group, tier.bits, FOUR_BYTES, count);
        for (int k = 0; k < count; k++) codes.push_back(code(tier, i + k));
        return count;
    }
    // Keys: those of a dword. A vector has codes k and k + count of them.
    int add_dwords(const Bits& tier, int i) {
        const Code first = code(tier, 0), here = code(tier, i);
        const auto dword = [&](int from, int bit) { return lane(from / 8 + (bit - from) / 32 * 4, 4); };
        const auto at = [&](int from, int bit) { return (bit - from) / 8 % 4; };
        const int most = 32 / here.high, left = tier.width - i;
        const Form form = left >= most ? FOUR_BYTES : 2 * left >= most ? TWO_BYTES : ONE_BYTE;
        const int count = most >> int(form) >> 1;
        // clang-format off
        const Group group = {dword(first.high_bit, here.high_bit), at(first.high_bit, here.high_bit),
                             first.low ? dword(first.low_bit, here.low_bit) : 0, at(first.low_bit, here.low_bit)};
        // clang-format on
        add(group, tier.bits, form, count);
        for (int k = 0; k < count; k++) codes.insert(codes.end(), {code(tier, i + k), code(tier, i + k + count)});
        return 2 * count;
    }
};

#endif

}  // namespace
