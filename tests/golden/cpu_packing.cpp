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
//
// Build: c++ -O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

typedef float Floats __attribute__((vector_size(32)));  // 8 channels
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(8)));

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

INLINE Floats clamp(Floats x, float low, float high) {  // NaN becomes `low`
    x = x > low ? x : Floats{} + low;
    return x < high ? x : Floats{} + high;
}

// ------------------------------------------------------------------------------------------------ trellis codes
//
// A bit group of b bits and W channels with a trellis code is a ring of W b bits. The code of channel c is that of a
// table at bits (c + 1) b - 8 ... (c + 1) b - 1 of the ring, its window. Of a window with low-order half l and
// high-order half h that is LEVELS[h ^ ORDER[l]] + OFFSETS[l].

constexpr int WINDOW = 8;
alignas(16) constexpr uint8_t LEVELS[16] = {74, 0, 122, 154, 143, 132, 90, 82, 106, 98, 55, 45, 34, 65, 186, 114};
alignas(16) constexpr uint8_t OFFSETS[16] = {31, 27, 27, 47, 29, 49, 36, 33, 41, 23, 19, 41, 53, 69, 0, 15};
alignas(16) constexpr uint8_t ORDER[16] = {9, 13, 5, 1, 3, 13, 15, 1, 9, 1, 13, 5, 6, 9, 1, 8};

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
// ------------------------------------------------------------------------------------------------ search of a trellis
//
// The Viterbi algorithm: a state is the WINDOW - BITS newest bits, of which each window, 2^BITS of them, leads to one.
// The cost of a window is its error's square. Sums are made in the order of fhopt/ops/trellis.py, and of equal costs
// the first counts.

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

constexpr int WINDOWS = 1 << WINDOW;
constexpr int AROUND = 12;          // channels on either side of the seam that the first search sees
constexpr float FARTHEST = 1024;    // numbers are searched for up to so many steps
constexpr float UNREACHED = 1e30f;  // cost of a state in which no ring may begin

INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// Of 16 numbers, those at even places and those at odd ones.
INLINE Floats even_of(Floats a, Floats b) { return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
INLINE Floats odd_of(Floats a, Floats b) { return PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }

// Window s 2^BITS + r leads to state s, from state i 2^BITS + r, where i = s mod GROUPS. For each r, 8 states of a
// vector come from 8 others (1 and 2 bits: states stand in their order, and are taken apart by r) or from the same one
// (3 and 4 bits: a vector has states that differ by multiples of GROUPS).
template <int BITS>
struct Trellis {
    static constexpr int BRANCHES = 1 << BITS, STATES = WINDOWS >> BITS, GROUPS = STATES / BRANCHES;

    // Where the cost of a state stands.
    static constexpr int place(int state) { return BITS == 3 ? state % 4 * 8 + state / 4 : state; }

    // Values of windows in steps: in their order, and by r and the place of the state that they lead to.
    struct Values {
        alignas(64) float value[WINDOWS], by_branch[BRANCHES][STATES];

        Values() {
            for (int w = 0; w < WINDOWS; w++) {
                value[w] = float(TRELLIS[w]) - 127.5f;
                by_branch[w % BRANCHES][place(w / BRANCHES)] = value[w];
            }
        }
    };

    static inline const Values values;

    // Costs before a channel by r, [BRANCHES, GROUPS].
    static INLINE void take_apart(const float* before, Floats (&parts)[BRANCHES][std::max(GROUPS / 8, 1)]) {
        if constexpr (BITS == 1) {
            for (int v = 0; v < GROUPS / 8; v++) {
                const Floats a = load<Floats>(before + 16 * v), b = load<Floats>(before + 16 * v + 8);
                parts[0][v] = even_of(a, b), parts[1][v] = odd_of(a, b);
            }
        } else if constexpr (BITS == 2) {
            Floats even[4], odd[4];
            for (int v = 0; v < 4; v++) {
                const Floats a = load<Floats>(before + 16 * v), b = load<Floats>(before + 16 * v + 8);
                even[v] = even_of(a, b), odd[v] = odd_of(a, b);
            }
            for (int v = 0; v < 2; v++) {
                parts[0][v] = even_of(even[2 * v], even[2 * v + 1]), parts[2][v] = odd_of(even[2 * v], even[2 * v + 1]);
                parts[1][v] = even_of(odd[2 * v], odd[2 * v + 1]), parts[3][v] = odd_of(odd[2 * v], odd[2 * v + 1]);
            }
        }
    }

    // Costs of states behind one more channel, from those before it.
    static INLINE void step(const float* before, float x, float* after) {
        Floats parts[BRANCHES][std::max(GROUPS / 8, 1)];
        take_apart(before, parts);
        for (int v = 0; v < STATES / 8; v++) {
            Floats least;
            for (int r = 0; r < BRANCHES; r++) {
                const Floats error = x - load<Floats>(values.by_branch[r] + 8 * v), square = error * error;
                Floats cost;
                if constexpr (BITS <= 2) cost = parts[r][v % (GROUPS / 8)] + square;
                else cost = before[place((BITS == 3 ? v : 0) * BRANCHES + r)] + square;
                least = r ? lesser(cost, least) : cost;
            }
            store(after + 8 * v, least);
        }
    }

    // The window of the channel between costs `before` and a state.
    static INLINE int window(const float* before, float x, int state) {
        const int first = state * BRANCHES, from = first & (STATES - 1);
        alignas(32) float costs[BRANCHES];
        for (int r = 0; r < BRANCHES; r++) {
            const float error = x - values.value[first + r];
            costs[r] = before[place(from + r)] + error * error;
        }
        if constexpr (BITS >= 3) return first + first_of_least(costs);
        int found = 0;
        for (int r = 1; r < BRANCHES; r++) found = costs[r] < costs[found] ? r : found;
        return first + found;
    }

    // The first of the least of 8 or 16 numbers.
    static INLINE int first_of_least(const float* costs) {
        const Floats low = load<Floats>(costs), high = load<Floats>(costs + (BRANCHES - 8));
        Floats least = lesser(low, high);
        least = lesser(least, PICK(least, least, 4, 5, 6, 7, 0, 1, 2, 3));
        least = lesser(least, PICK(least, least, 2, 3, 0, 1, 6, 7, 4, 5));
        least = lesser(least, PICK(least, least, 1, 0, 3, 2, 5, 4, 7, 6));
#if defined(__AVX__)
        const auto places = [&](Floats x) {
            return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)least, _CMP_EQ_OQ)));
        };
        return __builtin_ctz(places(low) | places(high) << (BRANCHES - 8));
#else
        int found = 0;
        while (costs[found] != least[0]) found++;
        return found;
#endif
    }

    // The windows of least error for x [width] from channel `first` on, from any state to any, or from the state
    // `closed` to itself. costs [width + 1, STATES].
    static void search(const float* x, int64_t width, int closed, float* costs, uint8_t* found, int64_t first = 0) {
        std::fill_n(costs, STATES, closed < 0 ? 0.0f : UNREACHED);
        if (closed >= 0) costs[place(closed)] = 0;
        for (int64_t c = 0; c < width; c++) step(costs + c * STATES, x[c], costs + (c + 1) * STATES);
        const float* last = costs + width * STATES;
        int state = std::max(closed, 0);
        for (int s = 1; closed < 0 && s < STATES; s++) state = last[place(s)] < last[place(state)] ? s : state;
        for (int64_t c = width - 1; c >= first; c--) {
            found[c] = uint8_t(window(costs + c * STATES, x[c], state));
            state = found[c] & (STATES - 1);
        }
    }

    // x [width], a multiple of 8 -> a ring
    static void encode(const float* x, int64_t width, uint8_t* ring) {
        const int64_t around = std::min<int64_t>(AROUND, width / 2);
        thread_local std::vector<float> costs;
        thread_local std::vector<uint8_t> found;
        if (costs.size() < size_t(width + 1) * STATES) costs.resize((width + 1) * STATES);
        if (found.size() < size_t(width)) found.resize(width);
        float seam[2 * AROUND];
        std::copy_n(x + width - around, around, seam);
        std::copy_n(x, around, seam + around);
        search(seam, 2 * around, -1, costs.data(), found.data(), around - 1);
        search(x, width, found[around - 1] >> BITS, costs.data(), found.data());
        for (int64_t i = 0; i < width; i += 8) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= uint64_t(found[i + j] >> (WINDOW - BITS)) << j * BITS;
            std::memcpy(ring + i / 8 * BITS, &word, BITS);
        }
    }
};

void write_ring(const float* x, int64_t width, int bits, uint8_t* ring) {
    switch (bits) {
        case 1: return Trellis<1>::encode(x, width, ring);
        case 2: return Trellis<2>::encode(x, width, ring);
        case 3: return Trellis<3>::encode(x, width, ring);
        default: return Trellis<4>::encode(x, width, ring);
    }
}
// ------------------------------------------------------------------------------------------------ arguments

struct Tier {
    int64_t bits, width;
    double step;  // negative: a trellis code, of steps of this magnitude
};

struct Rows {
    uint8_t* data;
    int64_t batch, head, token;  // strides in elements; the last dimension is dense

    template <class T>
    T* at(int64_t b, int64_t j, int64_t t) const {
        return reinterpret_cast<T*>(data) + b * batch + j * head + t * token;
    }
};

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

struct Arguments {
    int64_t batch, heads, tokens, threads;
    Type type;  // of the latents
    const Tier* tiers;
    int64_t count, width;  // of tiers; R
    Rows latent;           // [B,J,T,R]
    Rows codes;            // uint8 [B,J,T,bytes]
    Rows scale;            // float16 [B,J,T]
};

// Calls f(b, j, t) for all rows, each of which is so much work, on as many threads as there is work for.
template <class F>
void for_rows(const Arguments& a, int64_t work, F f) {
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

template <int WIDTH> struct Plane;  // 8 codes in a bit plane: WIDTH bytes
template <> struct Plane<8> { typedef uint64_t Word; };
template <> struct Plane<4> { typedef uint32_t Word; };
template <> struct Plane<2> { typedef uint16_t Word; };
template <> struct Plane<1> { typedef uint8_t Word; };

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
uint16_t scale_of(const Arguments& a, const T* z) {
    float sum = 0;
    int64_t coded = 0;
    for (int64_t i = 0; i < a.count; z += a.tiers[i++].width) {
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
void pack_row(const Arguments& a, const T* z, uint8_t* row, uint16_t* scale) {
    *scale = scale_of(a, z);
    const float inverse = 1.0f / from_float16(Halves{} + *scale)[0];
    for (int64_t i = 0; i < a.count; i++) {
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
void pack_rows(const Arguments& a) {
    int64_t work = 0;
    for (int64_t i = 0; i < a.count; i++) work += a.tiers[i].width * (a.tiers[i].step < 0 ? SEARCH : 1);
    for_rows(a, work, [&a](int64_t b, int64_t j, int64_t t) {
        pack_row(a, a.latent.at<const T>(b, j, t), a.codes.at<uint8_t>(b, j, t), a.scale.at<uint16_t>(b, j, t));
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

void unpack_row(const Arguments& a, const uint8_t* row, uint16_t half, float* z) {
    const float scale = from_float16(Halves{} + half)[0];
    for (int64_t i = 0; i < a.count; i++) {
        const Tier& tier = a.tiers[i];
        if (tier.bits == 16) read_halves(row, tier.width, z);
        else if (tier.step < 0) read_trellis(row, tier, scale, z);
        else read_codes(row, tier, scale, z);
        row += tier.width * tier.bits / 8;
        z += tier.width;
    }
}

}  // namespace

extern "C" void pack(const Arguments* arguments) {
    const Arguments& a = *arguments;
    switch (a.type) {
        case FLOAT32: return pack_rows<float>(a);
        case BFLOAT16: return pack_rows<BFloat16>(a);
        case FLOAT16: return pack_rows<Float16>(a);
    }
}

extern "C" void unpack(const Arguments* arguments) {
    const Arguments& a = *arguments;
    for_rows(a, a.width, [&a](int64_t b, int64_t j, int64_t t) {
        unpack_row(a, a.codes.at<uint8_t>(b, j, t), *a.scale.at<uint16_t>(b, j, t), a.latent.at<float>(b, j, t));
    });
}
