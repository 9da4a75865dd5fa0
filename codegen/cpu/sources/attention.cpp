// Latent attention for any kind of latent, on a CPU:
//
//     x[t] = cap(scale * q . z_K[t]) + mask[t]      cap(x) = softcap tanh(x / softcap), or x
//     lse  = log sum_t exp(x[t])
//     o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked
//
//     q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]
//
//     B batch, H query heads, J latent heads (H/J query heads read one; keys and values may differ in J), S queries,
//     T tokens, R channels of a latent.
//
// What differs from kind to kind (bit groups, widths, softcap) is a table, `Kernel`, which `new_kernel` makes once and
// every call points to: no plan needs a compiler. Loops over bit groups stand outside of loops over tokens, or choose
// between unpackings of whole groups.
//
// A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
// $planes
// With a negative step it has a trellis code: 8 bits of a ring of bits are looked up, u is a code of 8 bits then.
//
// Codes are multiplied as they are: steps go into the query and the output, the middle (2^b - 1)/2 is subtracted from
// whole sums, and the token's scale multiplies its logit and its weight. Products are
// of floats or, with AVX-512 VNNI, of bytes or, with AVX2, of words of 16 bits.
//
// Work is cut into parts: (batch, query heads that share latents, some queries, a range of tokens). A part walks over
// its tokens in tiles that fit the first-level cache, and passes over those that are masked whole: unpack a tile of
// keys once, score it with all rows (query head x query), update the running softmax, unpack the values of the same
// tokens, mix. Ranges of tokens are then merged by their log-sum-exp. Logits are kept in base 2: exp2 is cheaper than
// exp.
//
// Build: c++ -O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "vectors.h"

// ------------------------------------------------------------------------------------------------ from rows to floats

// 8 or 16 channels of a bit plane, in channel order: V is Ints8 or Ints16.
template <class V, int BITS>
INLINE V lanes_of(const uint8_t* plane) {
    if constexpr (BITS == 8) {
#if defined(__AVX2__)  // which GCC does not find by itself
        if constexpr (sizeof(V) == sizeof(Ints8)) {
            return (V)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane)));
        }
#endif
        typedef uint8_t Bytes __attribute__((vector_size(sizeof(V) / 4)));
        Bytes bytes;
        std::memcpy(&bytes, plane, sizeof bytes);
        return __builtin_convertvector(bytes, V);
    } else if constexpr (sizeof(V) == sizeof(Ints8)) {
        constexpr V shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
        int32_t word = 0;
        std::memcpy(&word, plane, BITS);
        return ((V{} + word) >> shifts) & ((1 << BITS) - 1);
    } else if constexpr (BITS == 4) {
        constexpr V shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
        uint64_t word;
        std::memcpy(&word, plane, 8);
        const V halves = (V)(Words8{} + word);
        return (SHUFFLE(V, halves, halves, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1) >> shifts) & 15;
    } else {
        // clang-format off
        constexpr V shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS, 8 * BITS, 9 * BITS,
                              10 * BITS, 11 * BITS, 12 * BITS, 13 * BITS, 14 * BITS, 15 * BITS};
        // clang-format on
        int32_t word = 0;
        std::memcpy(&word, plane, 2 * BITS);
        return ((V{} + word) >> shifts) & ((1 << BITS) - 1);
    }
}

// Codes as floats: HIGH bits of each in one bit plane and, where LOW is not 0, the LOW bits below them in another.
template <class V, class F, int HIGH, int LOW>
INLINE void copy_lanes(const uint8_t* high, const uint8_t* low, float* z) {
    V codes = lanes_of<V, HIGH>(high);
    if constexpr (LOW > 0) codes = codes << LOW | lanes_of<V, LOW>(low);
    store(z, __builtin_convertvector(codes, F));
}

constexpr int high_bits(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }  // of the first plane

// A tier: 16 channels at once where a vector holds them, then what is left, 8 at once.
template <int BITS>
INLINE void copy_codes(const uint8_t* row, int width, float* z) {
    constexpr int HIGH = high_bits(BITS), LOW = BITS - HIGH;
    const uint8_t* low = row + width / 8 * HIGH;
    int i = 0;
    if constexpr (LANES == 16) {
        UNROLL(2) for (; i + 16 <= width; i += 16) {
            copy_lanes<Ints16, Floats16, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
        }
    }
    UNROLL(2) for (; i < width; i += 8) {
        copy_lanes<Ints8, Floats8, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
    }
}

// Float16 channels beside coded ones are divided by the scale with which the sum over all channels is multiplied.
INLINE void copy_float16(const uint8_t* row, int width, float* z, float factor = 1.0f) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= width; i += 8) {
        const Floats8 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i)));
        store(z + i, x * factor);
    }
#endif
    for (; i < width; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_float16(half) * factor;
    }
}

#include "trellis.h"
// Where windows of 16 channels of a ring come from, whose bits begin in the second of 16 bytes: for each of two times 8
// channels the two bytes that have the window, and the factor that brings it to the upper of them.
struct Spread {
    alignas(16) uint8_t bytes[2][16] = {};
    alignas(16) uint16_t factor[2][8] = {};

    constexpr explicit Spread(int bits) {
        for (int i = 0; i < 16; i++) {
            const int bit = (i + 1) * bits;
            bytes[i / 8][i % 8 * 2] = uint8_t(bit / 8), bytes[i / 8][i % 8 * 2 + 1] = uint8_t(bit / 8 + 1);
            factor[i / 8][i % 8] = uint16_t(1 << (8 - bit % 8));
        }
    }
};

[[maybe_unused]] constexpr Spread SPREADS[] = {Spread(1), Spread(2), Spread(3), Spread(4)};

#if defined(__SSSE3__) || (defined(__aarch64__) && !defined(__clang__))
// Bytes `at` of 16, all of them below 16.
INLINE Bytes16 picked(Bytes16 from, Bytes16 at) {
#if defined(__SSSE3__)
    return (Bytes16)_mm_shuffle_epi8((__m128i)from, (__m128i)at);
#else
    return __builtin_shuffle(from, at);
#endif
}

template <class V, class T>
INLINE V vector_of(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// A tier with a trellis code: 8 windows at once, each in a word of 16 bits.
INLINE void copy_trellis(const uint8_t* row, int bits, int width, float* z) {
    const Spread& its = SPREADS[bits - 1];
    const Bytes16 from = vector_of<Bytes16>(its.bytes[0]), levels = vector_of<Bytes16>(LEVELS);
    const Bytes16 offsets = vector_of<Bytes16>(OFFSETS), order = vector_of<Bytes16>(ORDER);
    const Halves8 factor = vector_of<Halves8>(its.factor[0]);
    for (int i = 0; i < width; i += 8) {
        const Words2 word = {bits_of_eight(row, width * bits / 8, bits, i), 0};
        const Halves8 windows = (Halves8)picked((Bytes16)word, from) * factor >> 8;
        const Halves8 low = windows & 15, high = windows >> 4;
        const Bytes16 level = picked(levels, (Bytes16)high ^ picked(order, (Bytes16)low));
        const Halves8 codes = (Halves8)(level + picked(offsets, (Bytes16)low)) & 255;
        store(z + i, __builtin_convertvector(codes, Floats8));
    }
}
#else
// A tier with a trellis code.
INLINE void copy_trellis(const uint8_t* row, int bits, int width, float* z) {
    for (int i = 0; i < width; i += 8) {
        const uint64_t word = bits_of_eight(row, width * bits / 8, bits, i);
        for (int j = 0; j < 8; j++) z[i + j] = float(TRELLIS[window_of(word, bits, j)]);
    }
}
#endif

INLINE void copy_bfloat16(const uint8_t* row, int width, float* z) {
    for (int i = 0; i < width; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_bits(uint32_t(half) << 16);
    }
}

#include "kernel_table.h"

constexpr int ROWS_OF_A_PART = 48;  // enough to make unpacking cheap

constexpr int whole_vectors(int tokens) { return (tokens + 15) / 16 * 16; }

// ------------------------------------------------------------------------------------------------ arguments

struct Rows {
    const uint8_t* data;
    int64_t batch, head, token;  // strides in elements; the last dimension is dense

    template <class T>
    const T* at(int64_t b, int64_t h, int64_t t) const {
        return reinterpret_cast<const T*>(data) + b * batch + h * head + t * token;
    }
};

struct Extent {
    const uint8_t* data;
    int64_t bytes;
};

enum MaskKind : int64_t { NO_MASK, BOOL_MASK, ADDITIVE_MASK };

struct Arguments {
    int64_t batch, heads, queries, tokens, key_heads, value_heads, threads;
    MaskKind mask_kind;
    Rows query;  // float32 [B,H,S,R_K], the stride of S in `token`
    Rows key, key_scale, value, value_scale;  // [B,J,T,...] and float16 [B,J,T]
    Rows mask;  // bool or float32 [B,H,S,T], the stride of S in `token`
    int64_t mask_token;  // the stride of T in it
    // clang-format off
    Rows pages;                               // int32 [B,U,pages], none: all tokens; a list for each U-th of the heads
    int64_t page_heads, page_count, page_tokens;
    float *output, *lse;                      // float32 [B,H,S,R_V] and [B,H,S], dense
    // clang-format on
    double scale, softcap;
    const Kernel* kernel;
    int64_t digits;  // at most so many bytes of queries and weights are multiplied: 3, or 2 for queries of 16 bits
    const Extent* later;  // what the thread reads after this call: fetched meanwhile, in place of later rows
    int64_t later_count;
    int64_t segment;  // tokens that the same queries read, 0: all of them
    int64_t query_segment;  // numbers from their queries to those of the next
    const float* shift;  // of the logits of a segment, float32 [segments, B, H, S], dense; none: 0
};

constexpr int SIDE_BY_SIDE = $page_quantum;  // tokens of a page are a multiple of it

// The tokens that are attended to, in order: all, or those of listed pages. Runs of SIDE_BY_SIDE from a multiple of it
// on lie one behind the other.
struct Listed {
    const int32_t* pages;  // ascending; what is not, such as -1 behind the last, ends the list
    int64_t page_tokens, count;
    int shift;  // of a power of two that page_tokens is; -1: it is none

    Listed(const Arguments& a, int64_t b, int64_t head)
        : pages(nullptr), page_tokens(a.page_tokens), count(a.tokens), shift(-1) {
        if (a.pages.data == nullptr) return;
        if ((page_tokens & (page_tokens - 1)) == 0) shift = __builtin_ctzll(page_tokens);
        pages = a.pages.at<int32_t>(b, head * a.page_heads / a.heads, 0);
        count = 0;
        for (int64_t i = 0; i < a.page_count && pages[i] > (i ? pages[i - 1] : -1); i++) {
            count += std::clamp<int64_t>(a.tokens - pages[i] * page_tokens, 0, page_tokens);
        }
    }
    INLINE int64_t at(int64_t i) const {
        if (!pages) return i;
        if (shift >= 0) return (int64_t(pages[i >> shift]) << shift) + (i & (page_tokens - 1));
        return pages[i / page_tokens] * page_tokens + i % page_tokens;
    }
    bool is_run(int64_t begin, int tokens) const { return !pages || begin % page_tokens + tokens <= page_tokens; }
    // The token whose row is fetched when that of number i is read; the distance is a multiple of SIDE_BY_SIDE.
    INLINE int64_t ahead(int64_t i, int64_t distance) const {
        return pages ? at(std::min(i + distance, (count - 1) / SIDE_BY_SIDE * SIDE_BY_SIDE)) : i + distance;
    }
};

// A range of tokens for some queries of the query heads that share latents. Row r: query r % queries, head r / queries.
struct Part {
    int64_t b, head, heads, query, queries, begin, end;
    Listed listed;

    int rows() const { return int(heads * queries); }
    int64_t row(const Arguments& a, int r) const {  // in the output
        return (b * a.heads + head + r / queries) * a.queries + query + r % queries;
    }
};

// Running softmax of a row: o = sum / total, lse = log2(total) + top.
struct State {
    // clang-format off
    float top, total, mass;  // mass: the sum of weight * scale, kept where weights are split
    float* sum;              // of weight * scale * (code - middle), as many as a row of values is padded to
    // clang-format on
};

// Weights of a row as words.
struct Split {
    float unit, total;
    bool low;  // they have lower bytes, or, of keys, a query's count
};

constexpr int PART_BYTES = WORDS ? 8 : 12;  // of the parts of a query, for each lane of a key

// ------------------------------------------------------------------------------------------------ two products

// Rows of a tile, `stride` numbers apart: as they are stored, or unpacked to floats. While one is read, the one of
// `next` is fetched, where there is any.
template <class Stored>
struct Tile {
    const typename Stored::Number* rows;
    int64_t stride;
    const typename Stored::Number* next;

    INLINE Floats at(int64_t t, int i) const { return Stored::load(rows + t * stride + i); }
    INLINE void fetch(int64_t t, int i) const {
        if (next && i * sizeof *rows % 64 == 0) __builtin_prefetch(next + t * stride + i, 0, 2);
    }
};

// logits[r][t] = q[r] . z[t] for ROWS rows and a multiple of TOKENS tokens.
template <int ROWS, int TOKENS, class Stored>
void score(const float* __restrict q, int pad, const Tile<Stored> z, int tokens, float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < pad; i += LANES) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const Floats zk = z.at(t + k, i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) sums[r][k] += load(q + r * pad + i) * zk;
            }
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(2) for (int k = 0; k < TOKENS; k += 4) {
                store(logits + r * TILE + t + k, sums_of(sums[r][k], sums[r][k + 1], sums[r][k + 2], sums[r][k + 3]));
            }
        }
    }
}

// The same for keys and queries in bfloat16, 32 products at a time: these are exact, and sums are of float32.
#if defined(__AVX512BF16__)
template <int ROWS, int TOKENS>
void score_pairs(const uint16_t* __restrict q, int pad, const Tile<BFloat16> z, int tokens, float factor,
                 float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < pad; i += 32) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const __m512i zk = _mm512_loadu_si512(z.rows + (t + k) * z.stride + i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) {
                    const __m512i qr = _mm512_loadu_si512(q + r * pad + i);
                    sums[r][k] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][k], (__m512bh)qr, (__m512bh)zk);
                }
            }
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(2) for (int k = 0; k < TOKENS; k += 4) {
                const Floats4 four = sums_of(sums[r][k], sums[r][k + 1], sums[r][k + 2], sums[r][k + 3]);
                store(logits + r * TILE + t + k, four * factor);
            }
        }
    }
}
#endif

// states[r].sum[c] += sum_t weights[r][t] (z[t][c] - middle[c]) for ROWS rows and VECTORS vectors of channels, given
// totals[r] = sum_t weights[r][t]. No middle: they are 0.
template <int ROWS, int VECTORS, class Stored>
INLINE void mix_channels(const float* __restrict weights, const float* __restrict totals, const float* middle,
                         const Tile<Stored> z, int tokens, State* __restrict states, int channel) {
    Floats sums[ROWS][VECTORS];
    UNROLL(4) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            const int c = channel + v * LANES;
            sums[r][v] = load(states[r].sum + c);
            if (middle) sums[r][v] -= totals[r] * load(middle + c);
        }
    }
    UNROLL(4) for (int t = 0; t < tokens; t++) {
        Floats zt[VECTORS];
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            zt[v] = z.at(t, channel + v * LANES);
            z.fetch(t, channel + v * LANES);
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            UNROLL(8) for (int v = 0; v < VECTORS; v++) sums[r][v] += weights[r * TILE + t] * zt[v];
        }
    }
    UNROLL(4) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) store(states[r].sum + channel + v * LANES, sums[r][v]);
    }
}

template <class F, int... I>
INLINE void for_count(int count, [[maybe_unused]] int first, [[maybe_unused]] F f, std::integer_sequence<int, I...>) {
    ((count == I + 1 ? f(first, std::integral_constant<int, I + 1>()) : void()), ...);
}

// Calls f(first, count) with `count` a compile-time number of at most MOST rows, sizes as even as they can be.
template <int MOST, class F>
INLINE void for_blocks_of_rows(int rows, F f) {
    for (int first = 0; first < rows;) {
        const int blocks = (rows - first + MOST - 1) / MOST;
        const int count = (rows - first + blocks - 1) / blocks;
        for_count(count, first, f, std::make_integer_sequence<int, MOST>());
        first += count;
    }
}

// All channels, as many of 4 (for a single row of 8) vectors at once as there are, then what is left.
template <int ROWS, class Stored>
void mix(const float* weights, const float* totals, const float* middle, int pad, const Tile<Stored> z, int tokens,
         State* states) {
    constexpr int VECTORS = ROWS == 1 ? 8 : 4;
    const int all = pad / LANES, rest = all % VECTORS;
    for (int v = 0; v + VECTORS <= all; v += VECTORS) {
        mix_channels<ROWS, VECTORS>(weights, totals, middle, z, tokens, states, v * LANES);
    }
    for_count(
        rest, (all - rest) * LANES,
        [&](int channel, auto count) {
            mix_channels<ROWS, decltype(count)::value>(weights, totals, middle, z, tokens, states, channel);
        },
        std::make_integer_sequence<int, VECTORS - 1>());
}

// ------------------------------------------------------------------------------------------------ softmax

#include "exponential.h"
INLINE Floats tanh(Floats x) {
    const Floats e = exp2((x < 0.0f ? x : -x) * float(2 * LOG2E));
    const Floats t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}

template <class T, class F>
INLINE void for_mask(const Arguments& a, const Part& p, int row, int64_t begin, int tokens, F f) {
    const T* m = a.mask.at<T>(p.b, p.head + row / p.queries, p.query + row % p.queries);
    for (int t = 0; t < tokens; t += SIDE_BY_SIDE) {
        const T* run = m + p.listed.at(begin + t) * a.mask_token;
        for (int i = 0; i < std::min(tokens - t, SIDE_BY_SIDE); i++) f(t + i, run[i * a.mask_token]);
    }
}

// The lowest finite number of a mask stays finite: a row that it hides whole still attends, evenly.
INLINE float in_base_2(float m) {
    return m == -INF ? m : std::max(m * float(LOG2E), std::numeric_limits<float>::lowest() / 2);
}

void add_mask(const Arguments& a, const Part& p, int row, int64_t begin, int tokens, float* __restrict x) {
    if (a.mask_kind == BOOL_MASK) {
        for_mask<uint8_t>(a, p, row, begin, tokens, [x](int t, uint8_t m) { x[t] = m ? x[t] : -INF; });
    } else if (a.mask_kind == ADDITIVE_MASK) {
        for_mask<float>(a, p, row, begin, tokens, [x](int t, float m) { x[t] += in_base_2(m); });
    }
}

// Nothing may be attended to, as with tokens of a fixed cache that have not come yet. Rows of other heads are looked at
// only where their masks differ.
bool is_hidden(const Arguments& a, const Part& p, int64_t begin, int tokens) {
    if (a.mask_kind == NO_MASK) return false;
    const int rows = int(a.mask.head == 0 ? p.queries : p.rows());
    bool seen = false;
    for (int r = 0; r < rows && !seen; r++) {
        if (a.mask_kind == BOOL_MASK) {
            for_mask<uint8_t>(a, p, r, begin, tokens, [&seen](int, uint8_t m) { seen |= m != 0; });
        } else {
            for_mask<float>(a, p, r, begin, tokens, [&seen](int, float m) { seen |= m != -INF; });
        }
    }
    return !seen;
}

void cap(float* x, int tokens, float softcap) {
    for (int t = 0; t < tokens; t += LANES) store(x + t, tanh(load(x + t)) * (softcap * float(LOG2E)));
}

// Logits of a tile become weights relative to the largest logit so far; earlier sums are brought to the same base.
void to_weights(float* __restrict x, int tokens, int sums, State& state) {
    Floats tops = load(x);
    for (int t = LANES; t < tokens; t += LANES) tops = load(x + t) > tops ? load(x + t) : tops;
    const float top = std::max(state.top, largest_of(tops));
    if (top > state.top) {
        const float factor = std::exp2(state.top - top);
        for (int i = 0; i < sums; i++) state.sum[i] *= factor;
        state.total *= factor;
        state.mass *= factor;
        state.top = top;
    }
    const float base = top == -INF ? 0.0f : top;  // all masked so far: weights are 0, not NaN
    Floats total = {};
    for (int t = 0; t < tokens; t += LANES) {
        const Floats w = exp2(load(x + t) - base);
        store(x + t, w);
        total += w;
    }
    state.total += sum_of(total);
}

// ------------------------------------------------------------------------------------------------ a part

template <class T>
T* allocate(int64_t count) {
    return static_cast<T*>(std::aligned_alloc(64, (count * int64_t(sizeof(T)) + 63) / 64 * 64));
}

// Memory that a thread keeps from call to call: a decode step makes many short ones.
struct Kept {
    uint8_t* data = nullptr;
    int64_t size = 0;

    Kept() = default;
    Kept(const Kept&) = delete;
    ~Kept() { std::free(data); }
    uint8_t* at_least(int64_t bytes) {
        if (size < bytes) {
            std::free(data);
            data = allocate<uint8_t>(bytes);
            size = bytes;
        }
        return data;
    }
};

// Memory that is fetched a few lines at a time, while something else is computed.
struct Later {
    const Extent *extent = nullptr, *end = nullptr;
    int64_t at = 0, step = 0;  // bytes of the extent that have been fetched, that are fetched at once

    // Calls of `fetch` until all is there: `steps`.
    void set(const Extent* extents, int64_t count, int64_t steps) {
        extent = extents, end = extents + count, at = 0;
        int64_t bytes = 0;
        for (int64_t i = 0; i < count; i++) bytes += extents[i].bytes;
        step = (bytes / std::max<int64_t>(steps, 1) + 64) / 64 * 64;
    }
    INLINE void fetch() {
        if (extent == end) return;
        const int64_t stop = std::min(at + step, extent->bytes);
        for (; at < stop; at += 64) __builtin_prefetch(extent->data + at, 0, 2);
        if (stop == extent->bytes) extent++, at = 0;
    }
};

// What a part needs while it is attended to. There is one at a time in a thread.
struct Scratch {
    const Kernel& kernel;
    const int64_t rows;
    float *tile, *query, *middle, *logits, *totals;  // [tokens, stride], [rows, R_K], [rows], [rows, TILE], [rows]
    // clang-format off
    State* states;                                   // [rows]
    float* sums;                                     // of the states, [rows, R_V]
    uint8_t *codes, *room;                           // of a tile; [16, whole rows with what is read behind them]
    uint8_t* looked_up;                              // [16, rows with what their trellis codes stand for]
    int8_t *parts, *weights;                         // of queries 2 times [rows, PART_BYTES key_dwords], of weights
    float *unit, *lowest, *coarse, *limits, *halves;  // [rows], [rows], [rows], [rows], [halves, TILE]
    uint16_t* pairs;                                 // queries in bfloat16, [rows, R_K], where they are multiplied so
    bool are_pairs;                                  // and they are such numbers
    float factor;                                    // that these are to be multiplied by
    // clang-format on
    Split* splits;  // of words: [rows]
    int32_t* products;  // and sums with values, [rows, 2, R_V]
    Later later;
    bool cleared;  // the tile has no numbers of calls before this one
    alignas(64) float scale[TILE];

    Scratch(const Kernel& k, int64_t rows)
        : kernel(k), rows(rows), are_pairs(k.pairs), factor(1), cleared(false), scale() {
        static thread_local Kept kept;
        place(kept.at_least(place(nullptr)));
        for (int64_t r = 0; r < rows; r++) states[r].sum = sums + r * k.value.pad;
    }
    Scratch(const Scratch&) = delete;

    // Places everything in memory from `begin` on; returns how many bytes that takes.
    int64_t place(uint8_t* begin) {
        const Kernel& k = kernel;
        int64_t used = 0;
        const auto take = [&](auto*& at, int64_t count) {
            at = reinterpret_cast<std::decay_t<decltype(at)>>(begin + used);
            used += (count * int64_t(sizeof *at) + 63) / 64 * 64;
        };
        take(tile, k.floats ? k.tokens * k.stride : 0);
        take(query, rows * k.key.pad), take(middle, rows), take(logits, rows * TILE), take(totals, rows);
        take(states, rows), take(sums, rows * k.value.pad);
        take(codes, k.codes), take(room, 16 * std::max(k.key.reach, k.value.reach));
        take(looked_up, 16 * std::max(k.key.layout.looked_up, k.value.layout.looked_up));
        take(parts, k.key.integer ? 2 * rows * PART_BYTES * k.key_dwords : 0);
        take(weights, k.value.integer ? (WORDS ? rows * 4 : 15) * TILE : 0);
        take(unit, rows), take(lowest, rows), take(coarse, rows), take(limits, rows), take(halves, TILE * k.halves);
        take(pairs, k.pairs ? rows * k.key.pad : 0);
        take(splits, WORDS ? rows : 0), take(products, WORDS && k.value.integer ? rows * 2 * k.value.pad : 0);
        return used;
    }
};

// A row that is not quantized, as floats.
INLINE void unpack_floats(const Side& side, const uint8_t* row, float* z) {
    if (side.stored == FLOAT32) std::memcpy(z, row, 4 * side.width);
    if (side.stored == BFLOAT16) copy_bfloat16(row, side.width, z);
    if (side.stored == FLOAT16) copy_float16(row, side.width, z);
}

// A quantized row: codes as floats.
INLINE void unpack_codes(const Side& side, const uint8_t* row, float scale, float* z) {
    for (const Tier& tier : side.tiers) {
        const int width = int(tier.width);
        switch (tier.is_trellis() ? 0 : tier.bits) {
            case 0: copy_trellis(row, int(tier.bits), width, z); break;
            case 1: copy_codes<1>(row, width, z); break;
            case 2: copy_codes<2>(row, width, z); break;
            case 3: copy_codes<3>(row, width, z); break;
            case 4: copy_codes<4>(row, width, z); break;
            case 5: copy_codes<5>(row, width, z); break;
            case 6: copy_codes<6>(row, width, z); break;
            case 8: copy_codes<8>(row, width, z); break;
            default: copy_float16(row, width, z, side.scaled ? 1 / scale : 1.0f);
        }
        row += width * tier.bits / 8;
        z += width;
    }
}

template <class Stored, class F>
INLINE void with_rows(const uint8_t* row, const uint8_t* next, int64_t stride, F f) {
    typedef typename Stored::Number Number;
    f(Tile<Stored>{reinterpret_cast<const Number*>(row), stride, reinterpret_cast<const Number*>(next)});
}

// Calls f(tile) with the rows of a tile: where they are, or unpacked into the scratch.
template <class F>
INLINE void with_tile(const Side& side, const Rows& rows, const Rows& scales, const Part& p, int64_t j, int64_t begin,
                      int tokens, Scratch& s, F f) {
    const uint8_t* head = rows.data + (p.b * rows.batch + j * rows.head) * side.element;
    const int64_t stride = rows.token * side.element;
    const int tile = s.kernel.tokens;
    if (side.in_place && tokens == whole_vectors(tokens) && p.listed.is_run(begin, tokens)) {
        const int distance = p.listed.pages ? (side.ahead + tile - 1) / tile * tile : side.ahead;
        const uint8_t* row = head + p.listed.at(begin) * stride;
        const uint8_t* next = head + p.listed.ahead(begin, distance) * stride;
        if (side.stored == FLOAT32) return with_rows<Float32>(row, next, rows.token, f);
        if (side.stored == BFLOAT16) return with_rows<BFloat16>(row, next, rows.token, f);
        return with_rows<Float16>(row, next, rows.token, f);
    }
    if (!s.cleared) std::fill(s.tile, s.tile + tile * s.kernel.stride, 0.0f);
    s.cleared = true;
    for (int t = 0; t < tokens; t++) {
        const int64_t token = p.listed.at(begin + t), ahead = p.listed.ahead(begin + t, side.ahead);
        for (int i = 0; i < side.bytes; i += 64) __builtin_prefetch(head + ahead * stride + i, 0, 2);
        if (side.scaled) {
            s.scale[t] = from_float16(*scales.at<uint16_t>(p.b, j, token));
            if (t % SIDE_BY_SIDE == 0) __builtin_prefetch(scales.at<uint16_t>(p.b, j, ahead), 0, 2);
        }
        float* z = s.tile + t * s.kernel.stride;
        if (side.tiers.empty()) unpack_floats(side, head + token * stride, z);
        else unpack_codes(side, head + token * stride, s.scale[t], z);
    }
    std::fill(s.scale + tokens, s.scale + whole_vectors(tokens), 0.0f);  // weights of no token are 0 times it
    f(Tile<Float32>{s.tile, s.kernel.stride, nullptr});
}

void scale_logits(int64_t row, int rows, int tokens, Scratch& s) {
    for (int64_t r = row; r < row + rows; r++) {
        float* x = s.logits + r * TILE;
        for (int t = 0; t < tokens; t += LANES) store(x + t, (load(x + t) - s.middle[r]) * load(s.scale + t));
    }
}

void scale_weights(int64_t row, int rows, int tokens, Scratch& s) {
    for (int64_t r = row; r < row + rows; r++) {
        float* w = s.logits + r * TILE;
        Floats total = {};
        for (int t = 0; t < tokens; t += LANES) {
            const Floats scaled = load(w + t) * load(s.scale + t);
            store(w + t, scaled);
            total += scaled;
        }
        s.totals[r] = sum_of(total);
    }
}

#include "quantized_rows.h"
#include "byte_tiles.h"
#include "word_tiles.h"

void score_tile(const Arguments& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const Side& side = s.kernel.key;
    const int pad = side.pad;
    const int64_t shared = a.heads / a.key_heads;  // query heads that read one latent head
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (side.integer) {
            score_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile(side, a.key, a.key_scale, p, j, begin, tokens, s, [&](const auto& z) {
            for_blocks_of_rows<MOST_ROWS>(rows, [&](int first, auto count) {
                constexpr int ROWS = decltype(count)::value;
                const int64_t r = row + first;
                constexpr int TOKENS = ROWS == 1 ? 8 : 4;
                float* logits = s.logits + r * TILE;
#if defined(__AVX512BF16__)
                if constexpr (std::is_same_v<std::decay_t<decltype(z)>, Tile<BFloat16>>) {
                    if (s.are_pairs) {
                        return score_pairs<ROWS, TOKENS>(s.pairs + r * pad, pad, z, whole, s.factor, logits);
                    }
                }
#endif
                score<ROWS, TOKENS>(s.query + r * pad, pad, z, whole, logits);
            });
        });
        if (side.scaled) scale_logits(row, rows, whole, s);
    }
}

void update_softmax(const Arguments& a, const Part& p, int64_t begin, int tokens, int64_t segment, Scratch& s) {
    const int whole = whole_vectors(tokens);
    for (int r = 0; r < p.rows(); r++) {
        float* x = s.logits + r * TILE;
        if (s.kernel.softcap) cap(x, whole, float(a.softcap));
        if (a.shift) {
            const float shift = a.shift[segment * a.batch * a.heads * a.queries + p.row(a, r)] * LOG2E;
            for (int t = 0; t < whole; t += LANES) store(x + t, load(x + t) + shift);
        }
        add_mask(a, p, r, begin, tokens, x);
        std::fill(x + tokens, x + whole, -INF);
        to_weights(x, whole, s.kernel.value.pad, s.states[r]);
    }
}

void mix_tile(const Arguments& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const Side& side = s.kernel.value;
    const float* middle = side.scaled ? side.middle.data() : nullptr;
    const int64_t shared = a.heads / a.value_heads;
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (side.integer) {
            mix_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile(side, a.value, a.value_scale, p, j, begin, tokens, s, [&](const auto& z) {
            if (side.scaled) scale_weights(row, rows, whole, s);
            for_blocks_of_rows<MOST_ROWS>(rows, [&](int first, auto count) {
                const int64_t r = row + first;
                // clang-format off
                mix<decltype(count)::value>(
                    s.logits + r * TILE, s.totals + r, middle, side.pad, z, tokens, s.states + r);
                // clang-format on
            });
        });
    }
}

// Queries as digits, in the order in which they are multiplied.
void split_queries(const Arguments& a, const Part& p, Scratch& s) {
    const Kernel& k = s.kernel;
    const int64_t bytes = PART_BYTES * k.key_dwords, shared = a.heads / a.key_heads * p.queries;
    int8_t* parts = s.parts + (WORDS ? s.rows * bytes : 0);  // words are arranged anew, all of them
    const int fine = fine_keys(a, int(shared), k);
    for (int r = 0; r < p.rows(); r++) {
        to_parts(k, s.query + r * k.key.pad, fine, parts + r * bytes, s.unit[r], s.middle[r], s.lowest[r], s.coarse[r]);
    }
    for (int64_t row = 0; row < p.rows(); row += shared) arrange_queries(a, row, int(shared), s);
}

// Queries of a segment with everything folded in that may be: scale, steps, base 2. Also q . middle, to be taken from
// each logit.
void load_queries(const Arguments& a, const Part& p, int64_t segment, Scratch& s) {
    const Kernel& k = s.kernel;
    const int width = k.key.width, pad = k.key.pad;
    const float factor = float(k.softcap ? a.scale / a.softcap : a.scale * LOG2E);
    s.factor = factor;
    s.are_pairs = k.pairs;
    for (int r = 0; r < p.rows(); r++) {
        const float* q = a.query.at<float>(p.b, p.head + r / p.queries, p.query + r % p.queries);
        q += segment * a.query_segment;
        for (int i = 0; k.pairs && i < width; i++) {
            uint32_t bits;
            std::memcpy(&bits, q + i, sizeof bits);
            s.are_pairs &= (bits & 0xffff) == 0;
            s.pairs[r * pad + i] = uint16_t(bits >> 16);
        }
        float* out = s.query + r * pad;
        for (int i = 0; i < width; i++) out[i] = q[i] * (factor * k.key.step[i]);
        std::fill(out + width, out + pad, 0.0f);
        Floats middle = {};
        for (int i = 0; i < pad; i += LANES) middle += load(out + i) * load(k.key.middle.data() + i);
        s.middle[r] = sum_of(middle);
    }
    if (k.key.integer) split_queries(a, p, s);
}

// Where the tokens end that the same queries read as number `begin`.
int64_t end_of_segment(const Arguments& a, const Part& p, int64_t begin) {
    if (!a.segment) return p.end;
    const int64_t end = (p.listed.at(begin) / a.segment + 1) * a.segment;
    if (!p.listed.pages) return std::min(p.end, end);
    while (begin < p.end && p.listed.at(begin) < end) begin = (begin / a.page_tokens + 1) * a.page_tokens;
    return std::min(p.end, begin);
}

void attend(const Arguments& a, const Part& p, Scratch& s) {
    for (int r = 0; r < p.rows(); r++) {
        s.states[r].top = -INF;
        s.states[r].total = s.states[r].mass = 0;
        std::fill(s.states[r].sum, s.states[r].sum + s.kernel.value.pad, 0.0f);
    }
    for (int64_t next = p.begin, end; next < p.end; next = end) {
        const int64_t segment = a.segment ? p.listed.at(next) / a.segment : 0;
        end = end_of_segment(a, p, next);
        load_queries(a, p, segment, s);
        for (int64_t begin = next; begin < end; begin += s.kernel.tokens) {
            const int tokens = int(std::min<int64_t>(s.kernel.tokens, end - begin));
            if (is_hidden(a, p, begin, tokens)) continue;
            score_tile(a, p, begin, tokens, s);
            update_softmax(a, p, begin, tokens, segment, s);
            mix_tile(a, p, begin, tokens, s);
        }
    }
}

// ------------------------------------------------------------------------------------------------ all parts

// How the whole is cut: `units` groups of query heads that share latents, blocks of queries, ranges of tokens.
struct Cut {
    static constexpr int64_t LONG_RANGE = 8192, SHORT_RANGE = 64;  // tokens
    int64_t heads, units, queries, blocks, tokens, ranges, threads;

    explicit Cut(const Arguments& a) {
        heads = std::lcm(a.heads / a.key_heads, a.heads / a.value_heads);
        units = a.heads / heads;
        queries = std::clamp<int64_t>(ROWS_OF_A_PART / heads, 1, std::max<int64_t>(a.queries, 1));
        blocks = (a.queries + queries - 1) / queries;
        const int64_t most = a.pages.data ? std::min(a.tokens, a.page_count * a.page_tokens) : a.tokens;
        const Kernel& k = *a.kernel;
        const int64_t products = a.batch * a.heads * a.queries * most * (k.key.width + k.value.width);
        threads = std::clamp<int64_t>(products / 200000, 1, a.threads);  // a thread is worth about 10 us of work
        const int64_t parts = std::max<int64_t>(a.batch * units * blocks, 1);
        const bool several = threads > 1 && parts < 4 * threads;  // ranges of tokens
        const int64_t listed = several && a.pages.data ? longest(a) : most;
        const int64_t wanted = several ? even(a, parts, listed) : 1;
        const int64_t whole = a.pages.data ? k.tokens : 16;  // a tile of pages that begins with one may stay in place
        tokens = std::max<int64_t>((listed + wanted * whole - 1) / (wanted * whole), 1) * whole;
        ranges = std::max<int64_t>((listed + tokens - 1) / tokens, 1);
    }

    // How many ranges of tokens: so that all threads get as many parts, where few ranges do. More where parts are long
    // or not alike, lest all wait for one; a thread waits for memory where a range begins.
    int64_t even(const Arguments& a, int64_t parts, int64_t listed) const {
        const int64_t step = threads / std::gcd(parts, threads), many = (4 * threads + parts - 1) / parts;
        const bool alike = a.mask_kind == NO_MASK && !a.pages.data;
        int64_t count = std::min(step, many);
        while (count < many && !(alike && listed <= count * LONG_RANGE)) count += step;
        return std::clamp<int64_t>(count, 1, std::max<int64_t>(listed / SHORT_RANGE, 1));
    }

    // Tokens of the longest list: lists have room for more than most queries read.
    int64_t longest(const Arguments& a) const {
        int64_t count = 0;
        for (int64_t i = 0; i < a.batch * units; i++) {
            count = std::max(count, Listed(a, i / units, i % units * heads).count);
        }
        return count;
    }

    int64_t parts(const Arguments& a) const { return a.batch * units * blocks * ranges; }

    Part part(const Arguments& a, int64_t index) const {
        const int64_t range = index % ranges, block = index / ranges % blocks;
        const int64_t unit = index / (ranges * blocks) % units, b = index / (ranges * blocks * units);
        const int64_t query = block * queries;
        const Listed listed(a, b, unit * heads);
        // clang-format off
        return {b, unit * heads, heads, query, std::min(queries, a.queries - query),
                range * tokens, std::min(listed.count, (range + 1) * tokens), listed};
        // clang-format on
    }
};

// Joins the ranges of tokens of one row: states [ranges] -> output [R_V], lse.
void merge(const Side& side, const State* states, int64_t ranges, float* output, float& lse) {
    float top = -INF, total = 0;
    for (int64_t i = 0; i < ranges; i++) top = std::max(top, states[i].top);
    std::fill(output, output + side.width, 0.0f);
    for (int64_t i = 0; i < ranges; i++) {
        const float factor = states[i].top == -INF ? 0.0f : std::exp2(states[i].top - top);
        total += states[i].total * factor;
        for (int c = 0; c < side.width; c++) output[c] += states[i].sum[c] * factor;
    }
    const float inverse = total == 0 ? 0.0f : 1 / total;
    for (int c = 0; c < side.width; c++) output[c] *= inverse * side.step[c];
    lse = float((top + std::log2(total)) * LN2);
}

// States of all ranges, [B, H, S, ranges], where there are several.
struct Ranges {
    State* states;
    float* sums;
    int pad;

    Ranges(int64_t count, int width)
        : states(allocate<State>(count)), sums(allocate<float>(count * width)), pad(width) {}
    Ranges(const Ranges&) = delete;
    ~Ranges() {
        std::free(states);
        std::free(sums);
    }
    void set(int64_t index, const State& state) {
        states[index] = state;
        states[index].sum = sums + index * pad;
        std::copy(state.sum, state.sum + pad, states[index].sum);
    }
};

}  // namespace

// The table of a kind of latent: of keys and of values bit groups, how many there are (none: not quantized), channels;
// the type of what is not quantized; whether logits are capped. It lives until the process ends.
extern "C" const void* new_kernel(const Tier* keys, int64_t key_count, int64_t key_width, const Tier* values,
                                  int64_t value_count, int64_t value_width, int64_t type, int64_t softcap) {
    const Side key(keys, key_count, key_width, type, false), value(values, value_count, value_width, type, true);
    return new Kernel(key, value, softcap != 0);
}

extern "C" void latent_attention(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const Kernel& k = *a.kernel;
    const Cut cut(a);
    const int64_t rows = a.batch * a.heads * a.queries;
    Ranges ranges(cut.ranges > 1 ? rows * cut.ranges : 0, k.value.pad);
#pragma omp parallel num_threads(int(cut.threads)) if (cut.threads > 1)
    {
        Scratch s(k, cut.heads * cut.queries);
        if (a.later_count) s.later.set(a.later, a.later_count, (a.key_heads + a.value_heads) * (a.tokens / 16));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < cut.parts(a); i++) {
            const Part p = cut.part(a, i);
            attend(a, p, s);
            for (int r = 0; r < p.rows(); r++) {
                const int64_t row = p.row(a, r);
                if (cut.ranges > 1) ranges.set(row * cut.ranges + i % cut.ranges, s.states[r]);
                else merge(k.value, s.states + r, 1, a.output + row * k.value.width, a.lse[row]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < (cut.ranges > 1 ? rows : 0); row++) {
            const State* states = ranges.states + row * cut.ranges;
            merge(k.value, states, cut.ranges, a.output + row * k.value.width, a.lse[row]);
        }
    }
}
