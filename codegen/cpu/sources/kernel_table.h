// What a kernel is made for, as tables.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "byte_layout.h"
#include "kernel_call.h"
#include "vectors.h"
#include "word_layout.h"

namespace {

// Rows are fetched so many bytes before they are read, into the second-level cache: more lines can be under way to it
// than to the first, and memory answers within the time of some KB of rows.
constexpr int FETCHED = 16384;

inline bool is_trellis(const Tier& tier) { return tier.bits < 16 && tier.step < 0; }

// The code that stands for 0.
inline float middle_of(const Tier& tier) {
    return tier.bits < 16 ? 0.5f * ((1 << (is_trellis(tier) ? 8 : tier.bits)) - 1) : 0.0f;
}

constexpr int MAX_TOKENS = 256;  // of a tile
// From one row of logits to the next: more than a tile's tokens, since a power of two would put all rows on the same
// cache sets.
constexpr int TILE = MAX_TOKENS + 16;

// Rows of keys or of values.
struct Side {
    std::vector<Tier> tiers;  // none: not quantized
    Type stored;  // of numbers that are not quantized

    int width, pad, bytes, element;  // R; floats of an unpacked row, whole vectors; of a row; of what strides count
    int reach;                       // bytes from the begin of a row to the end of what may be read with it
    int ahead;                       // rows between the one that is read and the one that is fetched
    bool scaled, in_place, integer;  // a token has a scale; rows can be read as they are; codes are multiplied as bytes
    std::vector<float> step, middle;  // [pad]: what a code is multiplied with, and the code that stands for 0
    Layout layout;

    Side(const Tier* given, int64_t count, int64_t R, int64_t type, bool values)
        : tiers(given, given + count), stored(count ? FLOAT32 : Type(type)), width(int(R)), pad(padded(width)),
          bytes(0), element(count               ? 1
                            : stored == FLOAT32 ? 4
                                                : 2),
          scaled(false), in_place(!count && width % LANES == 0), step(pad), middle(pad) {
        int bit = 0, channel = 0;
        for (const Tier& tier : tiers) {
            const int bits = int(tier.bits);
            layout.add(bits, int(tier.width), bit, channel, is_trellis(tier));
            for (int i = 0; i < tier.width; i++, channel++) {
                step[channel] = bits < 16 ? float(std::abs(tier.step)) : 1.0f;
                middle[channel] = middle_of(tier);
            }
            bit += bits * int(tier.width);
            scaled |= bits < 16;
        }
        if (!count) std::fill(step.begin(), step.end(), 1.0f);
        bytes = count ? bit / 8 : width * element;
        reach = bytes;
        ahead = std::max(FETCHED / std::max(bytes, 1) / 16 * 16, 16);
        integer = INTEGER && scaled && !(values && layout.halves());
        if (!integer) return;
        layout.take_apart(values, bytes);
        reach = layout.reach(bytes);
        for (int i = 0; values && i < layout.count(); i++) {  // codes as bytes are shifted
            const Code& code = layout.codes[i];
            step[code.channel] /= float(1 << code.shift());
            middle[code.channel] *= float(1 << code.shift());
        }
    }
};

// Where 16 bits are asked for, codes of so few bits are multiplied by one byte of a query or of a weight: what that
// rounds away is little beside what quantization did. A code of step d is off by d / sqrt(12) deviations of its
// channel. A byte of a query is off by m / (127 sqrt(12)), m the largest of its coarse channels, some 4 times a typical
// one: with 5 bits, d = 0.24, the variance of what logits are off by grows by 2 percent. Weights of a tile of 128
// tokens are off by w sqrt(128) / (127 sqrt(12)), w the largest of them, codes by w d / sqrt(12) or more: with 4 bits,
// d = 0.40, the variance grows by 5 percent at most where tokens have nothing in common, by less the more tokens are
// attended to; by twice as much with a trellis code of 4 bits, which errs half as much. What they have in common is
// kept: weights are rounded so that their sum stays.
constexpr int COARSE_KEY = 5, COARSE_VALUE = 4;

int fine_channels(const Layout& layout, int coarse) {
    int fine = 0;
    for (int i = 0; i < layout.count(); i++) {
        if (layout.codes[i].precision() > coarse) fine = (i / 16 + 1) * 16;
    }
    return fine;
}

struct Kernel {
    Side key, value;
    bool softcap, pairs;  // pairs: keys in bfloat16 are multiplied as they are
    int key_vectors, value_vectors, key_dwords;  // of a token's codes; key_dwords in whole vectors
    int floats, codes, halves;  // of a token in a tile floats, of a tile bytes for codes, of a token float16 channels
    int stride, tokens;  // of a tile: floats from row to row, and how many rows it has
    std::vector<float> key_factor,
        key_middle;  // [channels of key_dwords]: what brings a query to a code's byte, its middle
    bool in_order;  // codes of keys are of channels one behind the other
    int key_fine, value_fine;  // channels up to the last of more bits than COARSE_..., whole vectors

    Kernel(const Side& k, const Side& v, bool capped)
        : key(k), value(v), softcap(capped), pairs(false), in_order(true) {
#if defined(__AVX512BF16__)
        pairs = key.in_place && key.stored == BFLOAT16 && key.pad % 32 == 0;
#endif
        constexpr int CHANNELS = WORDS ? 2 : 4;  // of a lane of keys
        key_vectors = key.layout.count() / CHANNELS;
        value_vectors = (value.layout.count() + 15) / 16;
        key_dwords = (key_vectors + 15) / 16 * 16;
        key_factor.resize(CHANNELS * key_dwords);
        key_middle.resize(CHANNELS * key_dwords);
        for (int i = 0; i < key.layout.count(); i++) {
            const Code& code = key.layout.codes[i];
            in_order &= code.channel == key.layout.codes[0].channel + i;
            key_factor[i] = 1.0f / float(1 << code.shift());
            key_middle[i] = key.middle[code.channel] * float(1 << code.shift());
        }
        key_fine = fine_channels(key.layout, COARSE_KEY);
        value_fine = fine_channels(value.layout, COARSE_VALUE);
        floats = std::max(key.integer ? 0 : key.pad, value.integer ? 0 : value.pad);
        const int key_bytes = key.integer ? key.layout.bytes_of_token(false) : 0;
        const int bytes = std::max(key_bytes, value.integer ? value.layout.bytes_of_token(true) : 0);
        halves = key.integer ? key.layout.halves() : 0;
        stride = floats + 16;  // a power of two would put all rows on the same cache sets
        const int most = std::max(std::max(4 * floats, bytes + 4 * halves), 1);
        tokens = std::clamp(24576 / most / 16 * 16, 16, floats ? 64 : MAX_TOKENS);  // stay in the first-level cache
        codes = std::max(key.integer ? key.layout.bytes_of_tile(false, tokens) : 0,
                         value.integer ? value.layout.bytes_of_tile(true, tokens) : 0);
    }
};

INLINE const Kernel& kernel_of(const Attention& a) { return *static_cast<const Kernel*>(a.kernel); }

}  // namespace
