//: What a kernel is made for, as tables. Part of attention.cpp.
// Rows are fetched so many bytes before they are read, into the second-level cache: more lines can be under way to it
// than to the first, and memory answers within the time of some KB of rows.
constexpr int FETCHED = 16384;

enum Stored : int64_t { FLOAT32, BFLOAT16, FLOAT16 };  // numbers of rows that are not quantized

// A bit group: 16 bits are float16, not codes.
struct Tier {
    int64_t bits, width;
    double step;
};

#include "byte_layout.h"

constexpr int MOST_TOKENS = 256;  // of a tile

// Rows of keys or of values.
struct Side {
    std::vector<Tier> tiers;  // none: not quantized
    Stored stored;
    int width, pad, bytes, element;  // R; floats of an unpacked row, whole vectors; of a row; of what strides count
    int reach;                       // bytes of whole blocks of a row
    int ahead;                       // rows between the one that is read and the one that is fetched
    bool scaled, in_place, integer;  // a token has a scale; rows can be read as they are; codes are multiplied as bytes
    std::vector<float> step, middle;  // [pad]: what a code is multiplied with, and the code that stands for 0
    Layout layout;

    Side(const Tier* given, int64_t count, int64_t R, int64_t type, bool values)
        : tiers(given, given + count), stored(count ? FLOAT32 : Stored(type)), width(int(R)), pad(padded(width)),
          bytes(0), element(count               ? 1
                            : stored == FLOAT32 ? 4
                                                : 2),
          scaled(false), in_place(!count && width % LANES == 0), step(pad), middle(pad) {
        int bit = 0, channel = 0;
        for (const Tier& tier : tiers) {
            const int bits = int(tier.bits);
            layout.add(bits, int(tier.width), bit, channel);
            for (int i = 0; i < tier.width; i++, channel++) {
                step[channel] = bits < 16 ? float(tier.step) : 1.0f;
                middle[channel] = bits < 16 ? 0.5f * ((1 << bits) - 1) : 0.0f;
            }
            bit += bits * int(tier.width);
            scaled |= bits < 16;
        }
        if (!count) std::fill(step.begin(), step.end(), 1.0f);
        bytes = count ? bit / 8 : width * element;
        reach = (bytes + 63) / 64 * 64;
        ahead = std::max(FETCHED / std::max(bytes, 1) / 16 * 16, 16);
        integer = INTEGER && scaled && !(values && layout.halves());
        if (!integer) return;
        layout.take_apart(values, bytes);
        for (int i = 0; values && i < layout.count(); i++) {  // codes as bytes are shifted
            const Code& code = layout.codes[i];
            step[code.channel] /= float(1 << code.shift());
            middle[code.channel] *= float(1 << code.shift());
        }
    }
};

struct Kernel {
    Side key, value;
    bool softcap, pairs;  // pairs: keys in bfloat16 are multiplied as they are
    int key_vectors, value_vectors, key_dwords;  // of bytes, of a token's codes; key_dwords in whole vectors
    int floats, codes, halves;  // of a token in a tile: floats, bytes, float16 channels
    int stride, tokens;  // of a tile: floats from row to row, and how many rows it has
    std::vector<float> key_factor, key_middle;  // [4 key_dwords]: what brings a query to a code's byte, its middle

    Kernel(const Side& k, const Side& v, bool capped) : key(k), value(v), softcap(capped), pairs(false) {
#if defined(__AVX512BF16__)
        pairs = key.in_place && key.stored == BFLOAT16 && key.pad % 32 == 0;
#endif
        key_vectors = key.layout.count() / 4;
        value_vectors = (value.layout.count() + 15) / 16;
        key_dwords = (key_vectors + 15) / 16 * 16;
        key_factor.resize(4 * key_dwords);
        key_middle.resize(4 * key_dwords);
        for (int i = 0; i < key.layout.count(); i++) {
            const Code& code = key.layout.codes[i];
            key_factor[i] = 1.0f / float(1 << code.shift());
            key_middle[i] = key.middle[code.channel] * float(1 << code.shift());
        }
        floats = std::max(key.integer ? 0 : key.pad, value.integer ? 0 : value.pad);
        codes = std::max(key.integer ? 4 * key_vectors : 0, value.integer ? 16 * value_vectors : 0);
        halves = key.integer ? key.layout.halves() : 0;
        stride = floats + 16;  // a power of two would put all rows on the same cache sets
        const int bytes = std::max(std::max(4 * floats, codes + 4 * halves), 1);
        tokens = std::clamp(24576 / bytes / 16 * 16, 16, floats ? 64 : MOST_TOKENS);  // stay in the first-level cache
    }
};
