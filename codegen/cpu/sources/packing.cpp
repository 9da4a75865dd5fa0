// pack
//
// Latents as codes and back, on a CPU, for any tiers:
//
//     s    = sqrt(mean z[c]^2), over the channels with fewer than 16 bits; a float16 in [2^-14, 65504]
//     u[c] = clamp(floor(z[c] / s / step) + 2^(b-1), 0, 2^b - 1)          a channel of b < 16 bits
//     z[c] = (u[c] - (2^b - 1)/2) * step * s                              and back
//
// A tier with a negative step has a trellis code: a ring of bits, of which windows are looked up.
//
//     z [B,J,T,R]   ->   codes [B,J,T,bytes]   s [B,J,T]   ->   z [B,J,T,R]
//
//     B batch, J latent heads, T tokens, R channels of a latent.
//
// A channel of 16 bits is a float16 without scale.
// A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
// one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
//
// All of it is done on 8 channels at once, since the width of every tier is a multiple of 8. Their codes are the bytes
// of one word, low-order byte first; the bits of a plane are cut out of it and moved together by shifts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "trellis.h"
#include "trellis_search.h"
#include "vectors_of_8.h"
#include "pack_call.h"
#include "rows.h"

namespace {

// Calls f(b, j, t) for all rows, each of which is so much work, on as many threads as there is work for.
template <class F>
void for_rows(const Pack& a, int64_t work, F f) {
    const int64_t rows = a.batch * a.heads * a.tokens;
    const int threads = int(std::clamp<int64_t>(rows * work / 50000, 1, a.threads));  // one is worth about 10 us
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) f(i / (a.heads * a.tokens), i / a.tokens % a.heads, i % a.tokens);
}

// ------------------------------------------------------------------------------------------------ floats of 2 bytes

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

INLINE Floats floats(const float* z) { return load<Floats>(z); }

INLINE Floats floats(const BFloat16* z) { return (Floats)(__builtin_convertvector(load<Halves>(z), Bits) << 16); }

INLINE Floats from_float16(Halves z) {
    const Bits half = __builtin_convertvector(z, Bits);
    const Bits magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
    const Floats finite = (Floats)magnitude * 0x1p112f;  // moves the exponent, also of subnormals
    return (Floats)(sign | (magnitude < 0x0f800000 ? (Bits)finite : magnitude | 0x7f800000));
}

INLINE Floats floats(const Float16* z) { return from_float16(load<Halves>(z)); }

// Rounded to the nearest, ties to even; magnitudes of at most 65504, or NaN.
INLINE Halves to_float16(Floats x) {
    const Bits sign = (Bits)x & 0x80000000, magnitude = (Bits)x ^ sign;
    const Bits normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Bits tiny = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000;  // the sum is rounded to multiples of 2^-24
    const Bits half = magnitude < 0x38800000 ? tiny : magnitude > 0x7f800000 ? Bits{} + 0x7e00 : normal;
    return __builtin_convertvector(half | sign >> 16, Halves);
}

// ------------------------------------------------------------------------------------------------ bit planes

// Ones at the `bits` low-order places of every `period` bits.
constexpr uint64_t every(int period, int bits) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++) mask |= uint64_t(i % period < bits) << i;
    return mask;
}

// The low-order WIDTH bits of 8 bytes, side by side: neighbours are joined three times.
template <int WIDTH>
INLINE uint64_t gathered(uint64_t x) {
    constexpr int GAP = 8 - WIDTH;
    x &= every(8, WIDTH);
    x = (x | x >> GAP) & every(16, 2 * WIDTH);
    x = (x | x >> 2 * GAP) & every(32, 4 * WIDTH);
    return x | x >> 4 * GAP;
}

// Its inverse.
template <int WIDTH>
INLINE uint64_t spread(uint64_t x) {
    constexpr int GAP = 8 - WIDTH;
    x = (x | x << 4 * GAP) & every(32, 4 * WIDTH);
    x = (x | x << 2 * GAP) & every(16, 2 * WIDTH);
    return (x | x << GAP) & every(8, WIDTH);
}

// clang-format off
template <int WIDTH> struct Plane;  // 8 codes in a bit plane: WIDTH bytes
template <> struct Plane<8> { typedef uint64_t Word; };
template <> struct Plane<4> { typedef uint32_t Word; };
template <> struct Plane<2> { typedef uint16_t Word; };
template <> struct Plane<1> { typedef uint8_t Word; };
// clang-format on

// `words` hold 8 codes each; `shift` low-order bits of a code belong to planes that follow.
template <int WIDTH>
INLINE void write_plane(const uint64_t* words, int64_t count, int shift, uint8_t* plane) {
    typedef typename Plane<WIDTH>::Word Word;
    for (int64_t i = 0; i < count; i++) store(plane + i * WIDTH, Word(gathered<WIDTH>(words[i] >> shift)));
}

template <int WIDTH>
INLINE void read_plane(const uint8_t* plane, int64_t count, int shift, uint64_t* words) {
    typedef typename Plane<WIDTH>::Word Word;
    for (int64_t i = 0; i < count; i++) words[i] |= spread<WIDTH>(load<Word>(plane + i * WIDTH)) << shift;
}

// Some codes of a tier: `count` words of 8, the first of them word `first` of the `all` words of the tier.
constexpr int64_t CHUNK = 64;

void write_planes(const uint64_t* words, int64_t first, int64_t count, int64_t all, int bits, uint8_t* row) {
    if (bits & 8) write_plane<8>(words, count, bits & 7, row + first * 8);
    if (bits & 4) write_plane<4>(words, count, bits & 3, row + first * 4 + all * (bits & 8));
    if (bits & 2) write_plane<2>(words, count, bits & 1, row + first * 2 + all * (bits & 12));
    if (bits & 1) write_plane<1>(words, count, 0, row + first + all * (bits & 14));
}

void read_planes(const uint8_t* row, int64_t first, int64_t count, int64_t all, int bits, uint64_t* words) {
    std::fill(words, words + count, 0);
    if (bits & 8) read_plane<8>(row + first * 8, count, bits & 7, words);
    if (bits & 4) read_plane<4>(row + first * 4 + all * (bits & 8), count, bits & 3, words);
    if (bits & 2) read_plane<2>(row + first * 2 + all * (bits & 12), count, bits & 1, words);
    if (bits & 1) read_plane<1>(row + first + all * (bits & 14), count, 0, words);
}

// ------------------------------------------------------------------------------------------------ pack

// Sum of squares in the order of torch.sum on x86: 4 vectors of running sums, set aside every 16 rounds.
template <class T>
float energy(const T* z, int64_t width) {
    Floats sums[4] = {}, aside[4] = {};
    const int64_t whole = width / 32 * 32;
    for (int64_t i = 0; i < whole; i += 32) {
        for (int v = 0; v < 4; v++) {
            const Floats x = floats(z + i + 8 * v);
            sums[v] += x * x;
        }
        if (i / 32 % 16 == 15) {
            for (int v = 0; v < 4; v++) aside[v] += sums[v], sums[v] = Floats{};
        }
    }
    for (int v = 0; v < 4; v++) sums[v] += aside[v];
    for (int64_t i = whole; i < width; i += 8) {
        const Floats x = floats(z + i);
        sums[0] += x * x;
    }
    const Floats all = sums[0] + sums[1] + sums[2] + sums[3];
    float total = 0;
    for (int i = 0; i < 8; i++) total += all[i];
    return total;
}

template <class T>
uint16_t scale_of(const Pack& a, const T* z) {
    float sum = 0;
    int64_t coded = 0;
    for (int64_t i = 0; i < a.tier_count; z += a.tiers[i++].width) {
        if (a.tiers[i].bits == 16) continue;
        sum += energy(z, a.tiers[i].width);
        coded += a.tiers[i].width;
    }
    const float scale = coded ? std::sqrt(sum / float(coded)) : 0.0f;
    return to_float16(Floats{} + (scale < 0x1p-14f ? 0x1p-14f : scale > 65504.0f ? 65504.0f : scale))[0];
}

// clamp(floor(x) + half, 0, 2 half - 1), 8 codes in a word.
INLINE uint64_t codes_of(Floats x, float half) {
    x = clamp(x, -half, half - 1);
    Ints u = __builtin_convertvector(x, Ints);  // towards 0
    u += (Ints)(__builtin_convertvector(u, Floats) > x);  // true is -1: downwards
    const Bytes codes = __builtin_convertvector(u + int32_t(half), Bytes);
    return load<uint64_t>(&codes);
}

template <class T>
void write_codes(const T* z, const Tier& tier, float inverse, uint8_t* row) {
    const float half = float(1 << (tier.bits - 1)), step = float(tier.step);
    const int64_t all = tier.width / 8;
    uint64_t words[CHUNK];
    for (int64_t first = 0; first < all; first += CHUNK) {
        const int64_t count = std::min(CHUNK, all - first);
        for (int64_t i = 0; i < count; i++) words[i] = codes_of(floats(z + 8 * (first + i)) * inverse / step, half);
        write_planes(words, first, count, all, int(tier.bits), row);
    }
}

template <class T>
void write_trellis(const T* z, const Tier& tier, float inverse, uint8_t* row) {
    std::vector<float> x(tier.width);
    const float step = float(-tier.step);
    for (int64_t i = 0; i < tier.width; i += 8) {
        store(x.data() + i, clamp(floats(z + i) * inverse / step, -FARTHEST, FARTHEST));
    }
    write_ring(x.data(), tier.width, int(tier.bits), row);
}

template <class T>
void write_halves(const T* z, int64_t width, uint8_t* row) {
    for (int64_t i = 0; i < width; i += 8) {
        const Floats x = floats(z + i), kept = clamp(x, -65504.0f, 65504.0f);
        store(row + 2 * i, to_float16(x != x ? x : kept));
    }
}

template <class T>
void pack_row(const Pack& a, const T* z, uint8_t* row, uint16_t* scale) {
    *scale = scale_of(a, z);
    const float inverse = 1.0f / from_float16(Halves{} + *scale)[0];
    for (int64_t i = 0; i < a.tier_count; i++) {
        const Tier& tier = a.tiers[i];
        if (tier.bits == 16) write_halves(z, tier.width, row);
        else if (tier.step < 0) write_trellis(z, tier, inverse, row);
        else write_codes(z, tier, inverse, row);
        z += tier.width;
        row += tier.width * tier.bits / 8;
    }
}

// The search of a trellis code takes as long as rounding so many numbers.
constexpr int64_t SEARCH = 200;

template <class T>
void pack_rows(const Pack& a) {
    int64_t work = 0;
    for (int64_t i = 0; i < a.tier_count; i++) work += a.tiers[i].width * (a.tiers[i].step < 0 ? SEARCH : 1);
    for_rows(a, work, [&a](int64_t b, int64_t j, int64_t t) {
        pack_row(a, row_at<const T>(a.latent, b, j, t), row_at<uint8_t>(a.codes, b, j, t),
                 row_at<uint16_t>(a.scale, b, j, t));
    });
}

// ------------------------------------------------------------------------------------------------ unpack

INLINE void read_codes(const uint8_t* row, const Tier& tier, float scale, float* z) {
    const float middle = 0.5f * float((1 << tier.bits) - 1), step = float(tier.step);
    const int64_t all = tier.width / 8;
    uint64_t words[CHUNK];
    for (int64_t first = 0; first < all; first += CHUNK) {
        const int64_t count = std::min(CHUNK, all - first);
        read_planes(row, first, count, all, int(tier.bits), words);
        for (int64_t i = 0; i < count; i++) {
            const Floats codes = __builtin_convertvector(load<Bytes>(words + i), Floats);
            store(z + 8 * (first + i), (codes - middle) * step * scale);
        }
    }
}

INLINE void read_trellis(const uint8_t* row, const Tier& tier, float scale, float* z) {
    const float step = float(-tier.step);
    const int bits = int(tier.bits);
    const int64_t bytes = tier.width * bits / 8;
    for (int64_t i = 0; i < tier.width; i += 8) {
        const uint64_t word = bits_of_eight(row, bytes, bits, i);
        for (int j = 0; j < 8; j++) z[i + j] = (float(TRELLIS[window_of(word, bits, j)]) - 127.5f) * step * scale;
    }
}

INLINE void read_halves(const uint8_t* row, int64_t width, float* z) {
    for (int64_t i = 0; i < width; i += 8) store(z + i, from_float16(load<Halves>(row + 2 * i)));
}

void unpack_row(const Pack& a, const uint8_t* row, uint16_t half, float* z) {
    const float scale = from_float16(Halves{} + half)[0];
    for (int64_t i = 0; i < a.tier_count; i++) {
        const Tier& tier = a.tiers[i];
        if (tier.bits == 16) read_halves(row, tier.width, z);
        else if (tier.step < 0) read_trellis(row, tier, scale, z);
        else read_codes(row, tier, scale, z);
        row += tier.width * tier.bits / 8;
        z += tier.width;
    }
}

}  // namespace

extern "C" void pack(const Pack* arguments) {
    const Pack& a = *arguments;
    switch (a.type) {
        case FLOAT32: return pack_rows<float>(a);
        case BFLOAT16: return pack_rows<BFloat16>(a);
        case FLOAT16: return pack_rows<Float16>(a);
    }
}

extern "C" void unpack(const Pack* arguments) {
    const Pack& a = *arguments;
    for_rows(a, a.width, [&a](int64_t b, int64_t j, int64_t t) {
        unpack_row(a, row_at<uint8_t>(a.codes, b, j, t), *row_at<uint16_t>(a.scale, b, j, t),
                   row_at<float>(a.latent, b, j, t));
    });
}
