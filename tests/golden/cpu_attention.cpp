// latent_k16b8x32b4_v32b3x16b16_bfloat16_cap_ab5d923f
//
// Latent attention for one kind of latent, on a CPU:
//
//     x[t] = cap(scale * q . z_K[t]) + mask[t]      cap(x) = softcap tanh(x / softcap)
//     lse  = log sum_t exp(x[t])
//     o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked
//
//     q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]
//
//     B batch, H query heads, J latent heads (H/J query heads read one; keys and values may differ in J), S queries,
//     T tokens, R channels of a latent.
//
//     channels of a key row:    16 x 8, 32 x 4 bits
//     channels of a value row:  32 x 3, 16 x 16 bits
//
// A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
// A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
// one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
//
// Codes are multiplied as they are: steps go into the query and the output, the middle (2^b - 1)/2 is subtracted from
// whole sums, and the token's scale multiplies its logit and its weight. Products are
// of floats or, with AVX-512 VNNI, of bytes.
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

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(times) PRAGMA(unroll times)
#else
#define UNROLL(times) PRAGMA(GCC unroll times)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

namespace {

// ------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, MOST_ROWS = 2;
#else
constexpr int LANES = 4, MOST_ROWS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));  // 8 channels: every tier is a multiple of them
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));  // used where LANES is 16
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint64_t Words8 __attribute__((vector_size(64)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

INLINE Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

INLINE Floats4 load4(const float* p) {
    Floats4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class F>
INLINE Floats4 fold(Floats v, F f) {
    Floats4 parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) parts[0] = f(parts[0], parts[i]);
    return parts[0];
}

INLINE Floats4 fold_sum(Floats v) {
    return fold(v, [](Floats4 a, Floats4 b) { return a + b; });
}

INLINE float sum_of_four(Floats4 s) { return (s[0] + s[2]) + (s[1] + s[3]); }

INLINE float sum_of(Floats v) { return sum_of_four(fold_sum(v)); }

INLINE float largest_of(Floats v) {
    const Floats4 s = fold(v, [](Floats4 a, Floats4 b) { return a > b ? a : b; });
    return std::max(std::max(s[0], s[1]), std::max(s[2], s[3]));
}

INLINE Floats4 sums_of_four(Floats4 p, Floats4 q, Floats4 r, Floats4 s) {
    const Floats4 pq = SHUFFLE(Ints4, p, q, 0, 4, 1, 5) + SHUFFLE(Ints4, p, q, 2, 6, 3, 7);
    const Floats4 rs = SHUFFLE(Ints4, r, s, 0, 4, 1, 5) + SHUFFLE(Ints4, r, s, 2, 6, 3, 7);
    return SHUFFLE(Ints4, pq, rs, 0, 1, 4, 5) + SHUFFLE(Ints4, pq, rs, 2, 3, 6, 7);
}

INLINE Floats4 sums_of(Floats a, Floats b, Floats c, Floats d) {
    return sums_of_four(fold_sum(a), fold_sum(b), fold_sum(c), fold_sum(d));
}

// A float of these bits; a float16 as a float.
INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_float16(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#endif
    const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
    const float finite = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent, also of subnormals
    const float x = magnitude < 0x7c00 ? finite : from_bits(magnitude << 13 | 0x7f800000);
    return sign ? -x : x;
}

// LANES numbers of memory as floats.
struct Float32 {
    typedef float Number;
    static INLINE Floats load(const Number* p) { return ::load(p); }
};

struct BFloat16 {
    typedef uint16_t Number;
    static INLINE Floats load(const Number* p) {
        typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
        Halves halves;
        std::memcpy(&halves, p, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Ints) << 16);
    }
};

struct Float16 {
    typedef uint16_t Number;
    static INLINE Floats load(const Number* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        float x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = from_float16(p[i]);
        return ::load(x);
#endif
    }
};

// ------------------------------------------------------------------------------------------------ from rows to floats

// 8 or 16 channels of a bit plane, in channel order: V is Ints8 or Ints16.
template <class V, int BITS>
INLINE V lanes_of(const uint8_t* plane) {
    if constexpr (BITS == 8) {
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
        constexpr V shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS, 8 * BITS, 9 * BITS,
                              10 * BITS, 11 * BITS, 12 * BITS, 13 * BITS, 14 * BITS, 15 * BITS};
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

// A tier: 16 channels at once where a vector holds them, then what is left, 8 at once.
template <int BITS, int WIDTH>
INLINE void copy_codes(const uint8_t* row, float* z) {
    constexpr int HIGH = BITS >= 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1, LOW = BITS - HIGH;
    constexpr int WIDE = LANES == 16 ? WIDTH / 16 * 16 : 0;
    const uint8_t* low = row + WIDTH / 8 * HIGH;
    if constexpr (WIDE > 0) {
        UNROLL(16) for (int i = 0; i < WIDE; i += 16) {
            copy_lanes<Ints16, Floats16, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
        }
    }
    UNROLL(16) for (int i = WIDE; i < WIDTH; i += 8) {
        copy_lanes<Ints8, Floats8, HIGH, LOW>(row + i / 8 * HIGH, low + i / 8 * LOW, z + i);
    }
}

// Float16 channels beside coded ones are divided by the scale with which the sum over all channels is multiplied.
template <int WIDTH>
INLINE void copy_float16(const uint8_t* row, float* z, float factor = 1.0f) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= WIDTH; i += 8) {
        const Floats8 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i)));
        store(z + i, x * factor);
    }
#endif
    for (; i < WIDTH; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_float16(half) * factor;
    }
}

template <int WIDTH>
INLINE void copy_bfloat16(const uint8_t* row, float* z) {
    for (int i = 0; i < WIDTH; i++) {
        uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        z[i] = from_bits(uint32_t(half) << 16);
    }
}

template <int WIDTH>
INLINE void copy_float32(const uint8_t* row, float* z) {
    std::memcpy(z, row, 4 * WIDTH);
}

// Rows are fetched so many bytes before they are read, into the second-level cache: more lines can be under way to it
// than to the first, and memory answers within the time of some KB of rows.
constexpr int FETCHED = 16384;

// Rows between the one that is read and the one that is fetched.
template <class Side>
constexpr int AHEAD = std::max(FETCHED / Side::BYTES / 16 * 16, 16);

// ------------------------------------------------------------------------------------------------ the spec

constexpr bool SOFTCAP = true;

struct Tier {
    int bits, width;  // 16 bits and more: floats, not codes
    float step;
};

struct Keys {
    typedef Float32 Stored;  // numbers of a row that is read as it is
    static constexpr int WIDTH = 48;                   // R, channels of a row
    static constexpr int PAD = padded(WIDTH);          // floats of an unpacked row: whole vectors
    static constexpr int BYTES = 32;                   // of a stored row
    static constexpr int ELEMENT = 1;                  // bytes of what strides count
    static constexpr bool SCALED = true;               // a token has a scale
    static constexpr bool IN_PLACE = false;            // rows can be read as they are
    static constexpr Tier TIERS[] = {                  // bits, width, step
        {8, 16, 0.02f},
        {4, 32, 0.25f},
    };

    static void unpack(const uint8_t* row, float /*scale*/, float* z) {
        copy_codes<8, 16>(row + 0, z + 0);
        copy_codes<4, 32>(row + 16, z + 16);
    }
};

struct Values {
    typedef Float32 Stored;  // numbers of a row that is read as it is
    static constexpr int WIDTH = 48;                   // R, channels of a row
    static constexpr int PAD = padded(WIDTH);          // floats of an unpacked row: whole vectors
    static constexpr int BYTES = 44;                   // of a stored row
    static constexpr int ELEMENT = 1;                  // bytes of what strides count
    static constexpr bool SCALED = true;               // a token has a scale
    static constexpr bool IN_PLACE = false;            // rows can be read as they are
    static constexpr Tier TIERS[] = {                  // bits, width, step
        {3, 32, 0.5f},
        {16, 16, 0.0f},
    };

    static void unpack(const uint8_t* row, float scale, float* z) {
        copy_codes<3, 32>(row + 0, z + 0);
        copy_float16<16>(row + 12, z + 32, 1 / scale);
    }
};

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
// a code b is then 2^(8-b) times itself is folded into the query or the output.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && \
    !defined(FHOPT_FLOAT)
#define INTEGER true
#else
#define INTEGER false
#endif

// A code of a row: in its first plane it has `high` bits from bit `high_bit` of the row on, `low` in its second.
struct Code {
    int channel, high, high_bit, low, low_bit;

    constexpr int shift() const { return 8 - high - low; }  // of the code in its byte
};

template <class Side>
struct Layout {
    Code codes[Side::WIDTH + 1] = {};
    int count = 0, halves = 0;  // codes, float16 channels
    int half_channel[Side::WIDTH + 1] = {}, half_byte[Side::WIDTH + 1] = {};

    constexpr Layout() {
        int bit = 0, channel = 0;
        for (Tier tier : Side::TIERS) {
            const int high = tier.bits >= 8 ? 8 : tier.bits >= 4 ? 4 : tier.bits >= 2 ? 2 : 1, low = tier.bits - high;
            for (int i = 0; i < tier.width; i++) {
                if (tier.bits < 16) add({channel + i, high, bit + i * high, low, bit + tier.width * high + i * low});
                if (tier.bits == 16) add_half(channel + i, bit / 8 + 2 * i);
            }
            bit += tier.bits * tier.width;
            channel += tier.width;
        }
    }
    constexpr void add(Code code) { codes[count++] = code; }
    constexpr void add_half(int channel, int byte) {
        half_channel[halves] = channel;
        half_byte[halves++] = byte;
    }
};

constexpr Layout<Keys> KEY_LAYOUT;
constexpr Layout<Values> VALUE_LAYOUT;
constexpr int KEY_VECTORS = KEY_LAYOUT.count / 4, VALUE_VECTORS = (VALUE_LAYOUT.count + 15) / 16;
constexpr int KEY_DWORDS = (KEY_VECTORS + 15) / 16 * 16;  // of a part of a query, in whole vectors
constexpr bool INTEGER_KEYS = INTEGER && Keys::SCALED;
constexpr bool INTEGER_VALUES = INTEGER && Values::SCALED && VALUE_LAYOUT.halves == 0;

// Per channel: what a code is multiplied with, and the code that stands for 0.
template <class Side>
struct Channels {
    float step[Side::PAD] = {}, middle[Side::PAD] = {};

    constexpr Channels() {
        int channel = 0;
        for (Tier tier : Side::TIERS) {
            for (int i = 0; i < tier.width; i++, channel++) {
                step[channel] = tier.bits < 16 ? tier.step : 1.0f;
                middle[channel] = tier.bits < 16 ? 0.5f * ((1 << tier.bits) - 1) : 0.0f;
            }
        }
    }
};

constexpr Channels<Keys> KEY_CHANNELS;

constexpr int SUMS = Values::PAD;  // of values

struct ValueChannels : Channels<Values> {
    constexpr ValueChannels() {  // codes as bytes are shifted
        for (int i = 0; i < (INTEGER_VALUES ? VALUE_LAYOUT.count : 0); i++) {
            const Code& code = VALUE_LAYOUT.codes[i];
            step[code.channel] /= float(1 << code.shift());
            middle[code.channel] *= float(1 << code.shift());
        }
    }
};

constexpr ValueChannels VALUE_CHANNELS;

// Tokens of a tile: 24 KB of floats or codes, so that it stays in the first-level cache beside the queries.
constexpr int FLOATS = std::max(INTEGER_KEYS ? 0 : Keys::PAD, INTEGER_VALUES ? 0 : Values::PAD);  // of a token
constexpr int CODES = std::max(INTEGER_KEYS ? 4 * KEY_VECTORS : 0, INTEGER_VALUES ? 16 * VALUE_VECTORS : 0);
constexpr int HALVES = INTEGER_KEYS ? KEY_LAYOUT.halves : 0;
constexpr int TILE = std::clamp(24576 / std::max(4 * FLOATS, CODES + 4 * HALVES) / 16 * 16, 16, FLOATS ? 64 : 256);
constexpr int STRIDE = FLOATS + 16;  // of a tile's rows; a power of two would put all of them on the same cache sets
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

enum MaskKind : int64_t { NO_MASK, BOOL_MASK, ADDITIVE_MASK };

struct Arguments {
    int64_t batch, heads, queries, tokens, key_heads, value_heads, threads;
    MaskKind mask_kind;
    Rows query;                               // float32 [B,H,S,R_K], the stride of S in `token`
    Rows key, key_scale, value, value_scale;  // [B,J,T,...] and float16 [B,J,T]
    Rows mask;                                // bool or float32 [B,H,S,T], the stride of S in `token`
    int64_t mask_token;                       // the stride of T in it
    Rows pages;                               // int32 [B,U,pages], none: all tokens; a list for each U-th of the heads
    int64_t page_heads, page_count, page_tokens;
    float *output, *lse;                      // float32 [B,H,S,R_V] and [B,H,S], dense
    double scale, softcap;
};

constexpr int SIDE_BY_SIDE = 8;  // tokens of a page are a multiple of it

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
    float top, total, mass;       // mass: the sum of weight * scale, kept where weights are split
    alignas(64) float sum[SUMS];  // of weight * scale * (code - middle)
};

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
void score(const float* __restrict q, const Tile<Stored> z, int tokens, float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < Keys::PAD; i += LANES) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const Floats zk = z.at(t + k, i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) sums[r][k] += load(q + r * Keys::PAD + i) * zk;
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
constexpr bool PAIRS = Keys::IN_PLACE && std::is_same_v<Keys::Stored, BFloat16> && Keys::PAD % 32 == 0;

template <int ROWS, int TOKENS>
void score_pairs(const uint16_t* __restrict q, const Tile<BFloat16> z, int tokens, float factor,
                 float* __restrict logits) {
    for (int t = 0; t < tokens; t += TOKENS) {
        Floats sums[ROWS][TOKENS] = {};
        UNROLL(4) for (int i = 0; i < Keys::PAD; i += 32) {
            UNROLL(8) for (int k = 0; k < TOKENS; k++) {
                const __m512i zk = _mm512_loadu_si512(z.rows + (t + k) * z.stride + i);
                z.fetch(t + k, i);
                UNROLL(4) for (int r = 0; r < ROWS; r++) {
                    const __m512i qr = _mm512_loadu_si512(q + r * Keys::PAD + i);
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
#else
constexpr bool PAIRS = false;
#endif

// states[r].sum[c] += sum_t weights[r][t] (z[t][c] - middle[c]) for ROWS rows and VECTORS vectors of channels, given
// totals[r] = sum_t weights[r][t].
template <int ROWS, int VECTORS, class Stored>
INLINE void mix_channels(const float* __restrict weights, const float* __restrict totals, const Tile<Stored> z,
                         int tokens, State* __restrict states, int channel) {
    Floats sums[ROWS][VECTORS];
    UNROLL(4) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            const int c = channel + v * LANES;
            sums[r][v] = load(states[r].sum + c);
            if (Values::SCALED) sums[r][v] -= totals[r] * load(VALUE_CHANNELS.middle + c);
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

template <int ROWS, class Stored>
void mix(const float* weights, const float* totals, const Tile<Stored> z, int tokens, State* states) {
    constexpr int VECTORS = ROWS == 1 ? 8 : 4, ALL = Values::PAD / LANES, REST = ALL % VECTORS;
    for (int v = 0; v + VECTORS <= ALL; v += VECTORS) {
        mix_channels<ROWS, VECTORS>(weights, totals, z, tokens, states, v * LANES);
    }
    if constexpr (REST > 0) mix_channels<ROWS, REST>(weights, totals, z, tokens, states, (ALL - REST) * LANES);
}

template <class F, int... I>
INLINE void for_count(int count, int first, F f, std::integer_sequence<int, I...>) {
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

// ------------------------------------------------------------------------------------------------ softmax

// 2^f for f in [-1/2, 1/2].
INLINE Floats power_of_2(Floats f) {
    Floats y = f * 0.00015353361f + 0.0013398874f;
    y = y * f + 0.0096184374f;
    y = y * f + 0.0555033247f;
    y = y * f + 0.2402264791f;
    y = y * f + 0.6931472029f;
    return y * f + 1.0f;
}

// 2^x to 1e-7, for x <= 0; 0 below 2^-126.
INLINE Floats exp2(Floats x) {
#if defined(__AVX512F__)
    const __m512 least = _mm512_max_ps((__m512)x, _mm512_set1_ps(-150.0f));
    const __m512 whole = _mm512_roundscale_ps(least, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats part = (Floats)_mm512_sub_ps(least, whole);  // [-1/2, 1/2]
    return (Floats)_mm512_scalef_ps((__m512)power_of_2(part), whole);
#else
    constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const Floats low = x < -126.0f ? Floats{} - 126.0f : x;
    const Floats shifted = low + ROUND;
    const Floats part = low - (shifted - ROUND);  // [-1/2, 1/2]
    const Ints power = ((Ints)shifted - (Ints)(Floats{} + ROUND) + 127) << 23;
    return x < -126.0f ? Floats{} : power_of_2(part) * (Floats)power;
#endif
}
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
void to_weights(float* __restrict x, int tokens, State& state) {
    Floats tops = load(x);
    for (int t = LANES; t < tokens; t += LANES) tops = load(x + t) > tops ? load(x + t) : tops;
    const float top = std::max(state.top, largest_of(tops));
    if (top > state.top) {
        const float factor = std::exp2(state.top - top);
        for (int i = 0; i < SUMS; i++) state.sum[i] *= factor;
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

struct Scratch {
    float *tile, *query, *middle, *logits, *totals;  // [TILE, STRIDE], [rows, R_K], [rows], [rows, TILE], [rows]
    State* states;                                   // [rows]
    uint8_t* codes;                                  // [TILE, CODES]
    int8_t *parts, *weights;                         // of queries [rows, 3, 4 KEY_DWORDS], of weights [9, 3, TILE]
    float *unit, *halves;                            // [rows], [HALVES, TILE]
    uint16_t* pairs;                                 // queries in bfloat16, [rows, R_K], where PAIRS
    bool are_pairs;                                  // and they are such numbers
    float factor;                                    // that these are to be multiplied by
    alignas(64) float scale[TILE];

    explicit Scratch(int64_t rows)
        : tile(allocate<float>(FLOATS ? TILE * STRIDE : 0)), query(allocate<float>(rows * Keys::PAD)),
          middle(allocate<float>(rows)), logits(allocate<float>(rows * TILE)), totals(allocate<float>(rows)),
          states(allocate<State>(rows)), codes(allocate<uint8_t>(TILE * CODES)),
          parts(allocate<int8_t>(INTEGER_KEYS ? rows * 12 * KEY_DWORDS : 0)),
          weights(allocate<int8_t>(INTEGER_VALUES ? 27 * TILE : 0)), unit(allocate<float>(rows)),
          halves(allocate<float>(TILE * HALVES)), pairs(allocate<uint16_t>(PAIRS ? rows * Keys::PAD : 0)),
          are_pairs(PAIRS), factor(1), scale() {
        if (FLOATS) std::fill(tile, tile + TILE * STRIDE, 0.0f);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        for (float* memory : {tile, query, middle, logits, totals, unit, halves}) std::free(memory);
        for (void* memory : {(void*)states, (void*)codes, (void*)parts, (void*)weights}) std::free(memory);
        std::free(pairs);
    }
};

// Calls f(tile) with the rows of a tile: where they are, or unpacked into the scratch.
template <class Side, class F>
INLINE void with_tile(const Rows& rows, const Rows& scales, const Part& p, int64_t j, int64_t begin, int tokens,
                      Scratch& s, F f) {
    const uint8_t* head = rows.data + (p.b * rows.batch + j * rows.head) * Side::ELEMENT;
    const int64_t stride = rows.token * Side::ELEMENT;
    if constexpr (Side::IN_PLACE) {
        typedef typename Side::Stored Stored;
        typedef typename Stored::Number Number;
        if (tokens == TILE && p.listed.is_run(begin, tokens)) {
            const int distance = p.listed.pages ? (AHEAD<Side> + TILE - 1) / TILE * TILE : AHEAD<Side>;
            const auto* row = reinterpret_cast<const Number*>(head + p.listed.at(begin) * stride);
            const auto* next = reinterpret_cast<const Number*>(head + p.listed.ahead(begin, distance) * stride);
            return f(Tile<Stored>{row, rows.token, next});
        }
    }
    for (int t = 0; t < tokens; t++) {
        const int64_t token = p.listed.at(begin + t), ahead = p.listed.ahead(begin + t, AHEAD<Side>);
        for (int i = 0; i < Side::BYTES; i += 64) __builtin_prefetch(head + ahead * stride + i, 0, 2);
        if (Side::SCALED) {
            s.scale[t] = from_float16(*scales.at<uint16_t>(p.b, j, token));
            if (t % SIDE_BY_SIDE == 0) __builtin_prefetch(scales.at<uint16_t>(p.b, j, ahead), 0, 2);
        }
        Side::unpack(head + token * stride, s.scale[t], s.tile + t * STRIDE);
    }
    f(Tile<Float32>{s.tile, STRIDE, nullptr});
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

// ------------------------------------------------------------------------------------------------ products of bytes

#if INTEGER

template <class F, int... I>
INLINE void each(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(0), ..., f(N - 1), each with a compile-time argument.
template <int N, class F>
INLINE void each(F f) {
    each(std::make_integer_sequence<int, N>(), f);
}

// How 64 codes of a row come to 64 bytes. `source`: the byte of the row, -1 for none, that each byte of eight is; of
// these eight bytes each code then takes the bits from `from` on that `keep` keeps, of its first and second plane.
struct Slice {
    int source[64];
    alignas(64) uint8_t from[2][64], keep[2][64];

    constexpr Slice() : source(), from(), keep() {
        for (int& byte : source) byte = -1;
    }
    constexpr int slot(int to, int byte) {  // of a byte of the row among the eight around `to`
        int i = to / 8 * 8;
        while (source[i] >= 0 && source[i] != byte) i++;
        source[i] = byte;
        return i % 8;
    }
    constexpr void put(int to, int plane, int bits, int bit, int shift) {
        if (bits == 0) return;
        from[plane][to] = uint8_t((8 * slot(to, bit / 8) + bit % 8 - shift) & 63);
        keep[plane][to] = uint8_t(((1 << bits) - 1) << shift);
    }
    constexpr void put(int to, Code code) {
        put(to, 0, code.high, code.high_bit, code.shift() + code.low);
        put(to, 1, code.low, code.low_bit, code.shift());
    }
    constexpr bool has_low() const {
        for (int mask : keep[1]) if (mask) return true;
        return false;
    }
    constexpr bool is_whole() const {  // bytes are codes
        for (int i = 0; i < 64; i++) if (keep[0][i] && (keep[0][i] != 255 || from[0][i] != 8 * (i % 8))) return false;
        return true;
    }
};

constexpr int slices_for(int bytes) { return (bytes + 63) / 64; }

template <class Side, int SLICES>
struct Apart {
    static constexpr int BYTES = Side::BYTES, BLOCKS = slices_for(BYTES);
    Slice slices[SLICES + 1];
    alignas(64) uint8_t index[SLICES + 1][BLOCKS][64] = {};  // which byte of a block of the row goes where
    uint64_t mask[SLICES + 1][BLOCKS] = {};

    constexpr void settle() {
        for (int s = 0; s < SLICES; s++) {
            for (int to = 0; to < 64; to++) {
                const int byte = slices[s].source[to];
                if (byte < 0) continue;
                index[s][byte / 64][to] = uint8_t(byte % 64);
                mask[s][byte / 64] |= uint64_t(1) << to;
            }
        }
    }
    constexpr int blocks(int slice) const {  // that a slice needs
        int count = 0;
        for (uint64_t m : mask[slice]) count += m != 0;
        return count;
    }
    constexpr bool stays(int slice, int block) const {  // bytes are where they should be
        for (int to = 0; to < 64; to++) if (mask[slice][block] >> to & 1 && index[slice][block][to] != to) return false;
        return true;
    }
};

// Keys: byte i of a slice is its channel i, so that a dword has four channels.
constexpr auto keys_apart() {
    Apart<Keys, slices_for(KEY_LAYOUT.count)> apart;
    for (int i = 0; i < KEY_LAYOUT.count; i++) apart.slices[i / 64].put(i % 64, KEY_LAYOUT.codes[i]);
    apart.settle();
    return apart;
}

// Values: where `interleave` makes vectors of 16 channels of them.
constexpr auto values_apart() {
    Apart<Values, slices_for(VALUE_LAYOUT.count)> apart;
    for (int i = 0; i < VALUE_LAYOUT.count; i++) {
        apart.slices[i / 64].put(i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4, VALUE_LAYOUT.codes[i]);
    }
    apart.settle();
    return apart;
}

// Float16 channels of keys, 32 to a slice.
constexpr auto halves_apart() {
    Apart<Keys, slices_for(2 * KEY_LAYOUT.halves)> apart;
    for (int i = 0; i < 2 * KEY_LAYOUT.halves; i++) {
        apart.slices[i / 64].source[i % 64] = KEY_LAYOUT.half_byte[i / 2] + i % 2;
    }
    apart.settle();
    return apart;
}

constexpr auto KEYS_APART = keys_apart();
constexpr auto VALUES_APART = values_apart();
constexpr auto HALVES_APART = halves_apart();

// The bytes of slice S of a row; nothing is read behind the end of the row, and what no code needs is arbitrary.
template <const auto& APART, int S>
INLINE __m512i bytes_of(const uint8_t* row) {
    __m512i out = {};
    each<APART.BLOCKS>([&](auto b) {
        constexpr int B = decltype(b)::value, LEFT = std::min(APART.BYTES - 64 * B, 64);
        if constexpr (APART.mask[S][B] != 0) {
            constexpr bool ALONE = APART.blocks(S) == 1;
            __m512i bytes = LEFT == 64 ? _mm512_loadu_si512(row + 64 * B)
                                       : _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - LEFT), row + 64 * B);
            const __m512i index = _mm512_load_si512(APART.index[S][B]);
            if constexpr (ALONE && !APART.stays(S, B)) bytes = _mm512_permutexvar_epi8(index, bytes);
            if constexpr (!ALONE) bytes = _mm512_maskz_permutexvar_epi8(APART.mask[S][B], index, bytes);
            out |= bytes;
        }
    });
    return out;
}

// The codes of slice S of a row.
template <const auto& APART, int S>
INLINE __m512i codes_of(const uint8_t* row) {
    constexpr const Slice& slice = APART.slices[S];
    constexpr bool IS_WHOLE = slice.is_whole(), HAS_LOW = slice.has_low();
    const __m512i bytes = bytes_of<APART, S>(row);
    if constexpr (IS_WHOLE) return bytes;
    const __m512i high = _mm512_multishift_epi64_epi8(_mm512_load_si512(slice.from[0]), bytes);
    const __m512i kept = high & _mm512_load_si512(slice.keep[0]);
    if constexpr (!HAS_LOW) return kept;
    const __m512i low = _mm512_multishift_epi64_epi8(_mm512_load_si512(slice.from[1]), bytes);
    return kept | (low & _mm512_load_si512(slice.keep[1]));
}

// x[i] = dwords of token i  ->  x[i] = dword i of 16 tokens
INLINE void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    UNROLL(4) for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    UNROLL(4) for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// Bytes of token i  ->  out[i]: of each 16 bytes of the tokens 4 i ... 4 i + 3, a dword for each with the four tokens
INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd), out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(high_ab, high_cd), out[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

// 16 tokens of keys -> codes [vectors of 4 channels].
INLINE void unpack_keys(const uint8_t* const* rows, __m512i* codes) {
    each<slices_for(KEY_LAYOUT.count)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(KEY_VECTORS - 16 * S, 16);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = codes_of<KEYS_APART, S>(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < COUNT; i++) _mm512_store_si512(codes + 16 * S + i, x[i]);
    });
}

// Their float16 channels as floats [channels, TILE].
INLINE void unpack_halves(const uint8_t* const* rows, float* halves) {
    each<slices_for(2 * KEY_LAYOUT.halves)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(KEY_LAYOUT.halves / 2 - 16 * S, 16);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = bytes_of<HALVES_APART, S>(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < COUNT; i++) {
            float* out = halves + (32 * S + 2 * i) * TILE;
            _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[i])));
            _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16))));
        }
    });
}

// 4 tokens of values -> codes of slice S, [4 vectors of 16 channels].
template <int S>
INLINE void unpack_slice(const uint8_t* const* rows, __m512i* codes) {
    __m512i x[4];
    UNROLL(4) for (int t = 0; t < 4; t++) x[t] = codes_of<VALUES_APART, S>(rows[t]);
    interleave(x[0], x[1], x[2], x[3], codes);
}

// 4 tokens of values -> codes [vectors of 16 channels].
INLINE void unpack_values(const uint8_t* const* rows, __m512i* codes) {
    each<slices_for(VALUE_LAYOUT.count)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(VALUE_VECTORS - 4 * S, 4);
        __m512i mixed[4];
        unpack_slice<S>(rows, mixed);
        UNROLL(4) for (int i = 0; i < COUNT; i++) _mm512_store_si512(codes + 4 * S + i, mixed[i]);
    });
}

constexpr int MOST_BYTE_ROWS = 5;  // 15 sums of 3 parts; with more rows at once only the compiler has more to do

// Vectors at once: enough sums to keep the multipliers busy, no more than registers hold.
constexpr int vectors_for(int rows, int parts) { return std::clamp(24 / (rows * parts), 1, 4); }

// To each of 16 sums, four bytes of codes times four signed bytes, which are the same for all. As an instruction of its
// own: given the intrinsic, GCC copies each sum back and forth.
INLINE __m512i add_products(__m512i sum, __m512i codes, const int32_t& factor) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(factor));
    return sum;
}

INLINE __m512i add_products(__m512i sum, __m512i codes, __m512i factors) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(factors));
    return sum;
}

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], STEP and NEXT vectors from one i or v to the next.
template <int ROWS, int VECTORS, int PARTS, int STEP, int NEXT, int COUNT>
INLINE void multiply(const __m512i* codes, const int32_t* factors, int count, __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * STEP + v * NEXT);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(3) for (int part = 0; part < PARTS; part++) {
                const int32_t& factor = factors[(3 * r + part) * COUNT + i];
                UNROLL(4) for (int v = 0; v < VECTORS; v++) {
                    sums[r][v][part] = add_products(sums[r][v][part], z[v], factor);
                }
            }
        }
    }
}

template <int PARTS>
INLINE Floats16 joined(const __m512i (&parts)[PARTS]) {
    Floats16 sum = __builtin_convertvector((Ints16)parts[PARTS - 1], Floats16);
    UNROLL(2) for (int i = PARTS - 2; i >= 0; i--) {
        sum = sum * 256.0f + __builtin_convertvector((Ints16)parts[i], Floats16);
    }
    return sum;
}

// The largest integer that PARTS signed bytes make is a little more.
constexpr float largest_integer(int parts) { return parts == 3 ? 8355000.0f : 32600.0f; }

// 16 integers as PARTS times 16 signed bytes: digits of base 256.
template <int PARTS>
INLINE void store_parts(Ints16 x, int8_t* out, int64_t stride) {
    constexpr int half = PARTS == 3 ? 0x808080 : 0x8080;
    const __m512i digits = (__m512i)((x + half) ^ half);
    UNROLL(3) for (int i = 0; i < PARTS; i++) {
        _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8 * i)));
    }
}

// A query of floats in the order of channels -> its parts, [3, KEY_DWORDS, 4], and what one stands for. `middle` is
// what the middle of all codes adds to a logit.
void to_parts(const float* query, int8_t* parts, float& unit, float& middle) {
    alignas(64) float q[4 * KEY_DWORDS + 1] = {}, middles[4 * KEY_DWORDS + 1] = {};
    float largest = 0, none = 0;
    for (int i = 0; i < KEY_LAYOUT.count; i++) {
        const Code& code = KEY_LAYOUT.codes[i];
        const float factor = float(1 << code.shift());
        q[i] = query[code.channel] / factor;
        middles[i] = KEY_CHANNELS.middle[code.channel] * factor;
        largest = std::max(largest, std::abs(q[i]));
        none += q[i] * 0.0f;  // NaN stays NaN
    }
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    Floats sum = {};
    for (int i = 0; i < 4 * KEY_DWORDS; i += 16) {
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(q + i) * inverse));
        store_parts<3>(x, parts + i, 4 * KEY_DWORDS);
        sum += __builtin_convertvector(x, Floats16) * load(middles + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit;
}

// Weights of a tile have two parts where the largest is at most 1/SMALL of all so far: rounding to 2^-16 of it then
// moves the output by about 2^-16 / SMALL * sqrt(TILE) of a latent. Where it counts for more, they have three.
constexpr float SMALL = 256;

// Where 16 tokens of a tile are, from t on, the last one again behind the end. What comes later is fetched.
template <class Side>
INLINE void rows_of(const Rows& rows, const Part& p, int64_t j, int64_t begin, int t, int tokens, const uint8_t** z) {
    const int last = std::min(tokens - t, 16) - 1;
    UNROLL(2) for (int run = 0; run < 16; run += SIDE_BY_SIDE) {
        const int64_t from = begin + t + (run <= last ? run : 0);  // no list says where tokens behind the end are
        const uint8_t* row = rows.at<uint8_t>(p.b, j, p.listed.at(from));
        const uint8_t* ahead = rows.at<uint8_t>(p.b, j, p.listed.ahead(from, AHEAD<Side>));
        UNROLL(8) for (int i = 0; i < SIDE_BY_SIDE; i++) {
            z[run + i] = row + i * rows.token;
            UNROLL(4) for (int byte = 0; byte < Side::BYTES; byte += 64) {
                __builtin_prefetch(ahead + i * rows.token + byte, 0, 2);
            }
        }
    }
    for (int i = last + 1; i < 16; i++) z[i] = z[last];
}

// The scales of a tile as floats. Those of later pages are fetched: nothing else foresees where they are.
template <class Side>
INLINE void load_scales(const Rows& scales, const Part& p, int64_t j, int64_t begin, int tokens, Scratch& s) {
    _mm512_store_ps(s.scale + whole_vectors(tokens) - 16, _mm512_setzero_ps());  // weights of no token are 0 times it
    for (int t = 0; t < tokens; t += SIDE_BY_SIDE) {
        const uint16_t* scale = scales.at<uint16_t>(p.b, j, p.listed.at(begin + t));
        __builtin_prefetch(scales.at<uint16_t>(p.b, j, p.listed.ahead(begin + t, AHEAD<Side>)), 0, 2);
        const int last = std::min(tokens - t, SIDE_BY_SIDE) - 1;
        if (scales.token == 1) {
            const __m128i dense = _mm_maskz_loadu_epi16((2u << last) - 1, scale);
            _mm256_store_ps(s.scale + t, _mm256_cvtph_ps(dense));
        } else {
            for (int i = 0; i <= last; i++) s.scale[t + i] = from_float16(scale[i * scales.token]);
        }
    }
}

// Logits without the lowest of the three digits of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * KEY_DWORDS;
    multiply<ROWS, VECTORS, 2, 1, KEY_VECTORS, KEY_DWORDS>(codes, query, KEY_VECTORS, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (joined(sums[r][v]) * unit - s.middle[row + r]) * load(s.scale + t + 16 * v);
        }
    }
    UNROLL(1) for (int i = 0; i < KEY_LAYOUT.halves; i++) {
        const float* q = s.query + row * Keys::PAD + KEY_LAYOUT.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(5) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * Keys::PAD] * half;
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) store(s.logits + (row + r) * TILE + t + 16 * v, x[r][v]);
    }
}

// What the lowest digit adds to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][1];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * KEY_DWORDS;
    multiply<ROWS, VECTORS, 1, 1, KEY_VECTORS, KEY_DWORDS>(codes, query, KEY_VECTORS, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 16 * v;
            store(x, load(x) + joined(sums[r][v]) * s.unit[row + r] * load(s.scale + t + 16 * v));
        }
    }
}

template <int ROWS, int VECTORS, class F>
INLINE void for_vectors(int whole, F f) {
    int t = 0;
    for (; t + 16 * VECTORS <= whole; t += 16 * VECTORS) f(t, std::integral_constant<int, VECTORS>());
    for (; t < whole; t += 16) f(t, std::integral_constant<int, 1>());
}

// The lowest digit counts where a weight may be more than 1/MINOR of all so far: without it a logit is off by some
// 2^-15 of what its largest products are, and the output by that times the root of the largest weight.
constexpr float MINOR = 1024;

bool is_minor(const Arguments& a, int64_t row, int rows, int whole, const Scratch& s) {
    if (SOFTCAP || a.mask_kind == ADDITIVE_MASK) return false;  // logits are not yet what the softmax sees
    for (int64_t r = row; r < row + rows; r++) {
        const float* x = s.logits + r * TILE;
        Floats top = load(x);
        for (int t = 16; t < whole; t += 16) top = load(x + t) > top ? load(x + t) : top;
        const State& state = s.states[r];
        if (!(std::exp2(largest_of(top) - state.top) * MINOR <= state.total)) return false;
    }
    return true;
}

// Sums of 16 vectors: those of four and four, then of the quarters that are left.
INLINE Floats16 sums_of_4(const Floats16 (&x)[4]) {
    const __m512 ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)) + _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
}

INLINE Floats16 sums_of_quarters(Floats16 x, Floats16 y) {
    return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd);
}

// PARTS digits of the query of one row, from `parts` on, times the codes of 16 tokens as they lie in their rows.
template <int PARTS>
INLINE Floats16 products_of_row(const uint8_t* const* rows, const int8_t* parts) {
    Floats16 fours[4];
    UNROLL(4) for (int i = 0; i < 4; i++) {
        Floats16 x[4];
        UNROLL(4) for (int t = 0; t < 4; t++) {
            __m512i sums[PARTS] = {};
            each<slices_for(KEY_LAYOUT.count)>([&](auto s) {
                constexpr int S = decltype(s)::value;
                const __m512i codes = codes_of<KEYS_APART, S>(rows[4 * i + t]);
                UNROLL(2) for (int part = 0; part < PARTS; part++) {
                    const __m512i query = _mm512_loadu_si512(parts + part * 4 * KEY_DWORDS + 64 * S);
                    sums[part] = add_products(sums[part], codes, query);
                }
            });
            x[t] = joined(sums);
        }
        fours[i] = sums_of_4(x);
    }
    return sums_of_quarters(sums_of_quarters(fours[0], fours[1]), sums_of_quarters(fours[2], fours[3]));
}

// Logits of a tile of keys for one row.
void score_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, Scratch& s) {
    const int whole = whole_vectors(tokens);
    const int8_t* parts = s.parts + row * 12 * KEY_DWORDS;
    float* logits = s.logits + row * TILE;
    const float unit = s.unit[row];
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        const Floats16 high = products_of_row<2>(z, parts + 4 * KEY_DWORDS);
        Floats16 x = (high * (unit * 256.0f) - s.middle[row]) * load(s.scale + t);
        unpack_halves(z, s.halves + t);
        for (int i = 0; i < KEY_LAYOUT.halves; i++) {
            x += s.query[row * Keys::PAD + KEY_LAYOUT.half_channel[i]] * load(s.halves + i * TILE + t);
        }
        store(logits + t, x);
    }
    if (is_minor(a, row, 1, whole, s)) return;
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        store(logits + t, load(logits + t) + products_of_row<1>(z, parts) * unit * load(s.scale + t));
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    load_scales<Keys>(a.key_scale, p, j, begin, tokens, s);
    if (rows == 1) return score_row(a, p, j, begin, tokens, row, s);
    const int whole = whole_vectors(tokens);
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        unpack_keys(z, codes + t / 16 * KEY_VECTORS);
        unpack_halves(z, s.halves + t);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
        if (is_minor(a, row + first, ROWS, whole, s)) return;
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            score_low<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
    });
}

// Weights of a tile of values times the tokens' scales, split into as many parts as is returned.
template <int ROWS>
INLINE int scale_and_split(int64_t row, int whole, float* unit, float* total, Scratch& s) {
    float largest[ROWS];
    bool small = true;
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        float* w = s.logits + (row + r) * TILE;
        Floats top = {}, sum = {};
        for (int t = 0; t < whole; t += 16) {
            const Floats scaled = load(w + t) * load(s.scale + t);
            store(w + t, scaled);
            sum += scaled;
            top = scaled > top ? scaled : top;
        }
        State& state = s.states[row + r];
        state.mass += sum_of(sum);
        largest[r] = largest_of(top);
        small &= largest[r] * SMALL <= state.mass;
    }
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        const float limit = largest_integer(small ? 2 : 3);
        const float inverse = largest[r] > 1e-30f ? limit / largest[r] : 0.0f;
        Ints16 sum = {};
        for (int t = 0; t < whole; t += 16) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(s.logits + (row + r) * TILE + t) * inverse));
            sum += x;
            if (small) store_parts<2>(x, s.weights + 3 * r * TILE + t, TILE);
            else store_parts<3>(x, s.weights + 3 * r * TILE + t, TILE);
        }
        unit[r] = largest[r] / limit;
        total[r] = float(_mm512_reduce_add_epi32((__m512i)sum));
    }
    return small ? 2 : 3;
}

// Sums of products from vector `vector` on, without the middle of the codes, are added to a state.
template <int VECTORS, int PARTS>
INLINE void add_sums(const __m512i (&sums)[VECTORS][PARTS], int vector, int count, float unit, float total, State& to) {
    UNROLL(4) for (int v = 0; v < VECTORS; v++) {
        if (v >= count) continue;
        float* sum = to.sum + 16 * (vector + v);
        const Floats16 x = joined(sums[v]) - total * load(VALUE_CHANNELS.middle + 16 * (vector + v));
        store(sum, load(sum) + unit * x);
    }
}

template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const float* unit, const float* total, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    multiply<ROWS, VECTORS, PARTS, VALUE_VECTORS, 1, TILE / 4>(
        codes, reinterpret_cast<const int32_t*>(s.weights), count, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) add_sums(sums[r], vector, VECTORS, unit[r], total[r], states[r]);
}

template <int ROWS, int PARTS>
void mix_block(int count, const float* unit, const float* total, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS), REST = VALUE_VECTORS % VECTORS, WHOLE = VALUE_VECTORS - REST;
    for (int v = 0; v < WHOLE; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, unit, total, states, s);
    if constexpr (REST > 0) mix_bytes<ROWS, REST, PARTS>(WHOLE, count, unit, total, states, s);
}

// One row: codes are multiplied as soon as they are there.
template <int PARTS>
void mix_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, float unit, float total,
             State& state, Scratch& s) {
    each<slices_for(VALUE_LAYOUT.count)>([&](auto slice) {
        constexpr int S = decltype(slice)::value, COUNT = std::min(VALUE_VECTORS - 4 * S, 4);
        __m512i sums[4][PARTS] = {};
        for (int t = 0; t < tokens; t += 16) {
            const uint8_t* z[16];
            rows_of<Values>(a.value, p, j, begin, t, tokens, z);
            UNROLL(4) for (int i = 0; i < 16; i += 4) {
                __m512i codes[4];
                unpack_slice<S>(z + i, codes);
                UNROLL(3) for (int part = 0; part < PARTS; part++) {
                    const int32_t& weight = *reinterpret_cast<const int32_t*>(s.weights + part * TILE + t + i);
                    UNROLL(4) for (int v = 0; v < COUNT; v++) {
                        sums[v][part] = add_products(sums[v][part], codes[v], weight);
                    }
                }
            }
        }
        add_sums(sums, 4 * S, COUNT, unit, total, state);
    });
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    load_scales<Values>(a.value_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        float unit, total;
        const int parts = scale_and_split<1>(row, whole, &unit, &total, s);
        if (parts == 2) mix_row<2>(a, p, j, begin, tokens, unit, total, s.states[row], s);
        else mix_row<3>(a, p, j, begin, tokens, unit, total, s.states[row], s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Values>(a.value, p, j, begin, t, tokens, z);
        for (int i = 0; i < 16; i += 4) unpack_values(z + i, codes + (t + i) / 4 * VALUE_VECTORS);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        float unit[ROWS], total[ROWS];
        State* states = s.states + row + first;
        const int parts = scale_and_split<ROWS>(row + first, whole, unit, total, s);
        if (parts == 2) mix_block<ROWS, 2>(whole / 4, unit, total, states, s);
        else mix_block<ROWS, 3>(whole / 4, unit, total, states, s);
    });
}

#else

template <class... T>
void score_codes(const T&...) {}
template <class... T>
void mix_codes(const T&...) {}
template <class... T>
void to_parts(const T&...) {}

#endif

void score_tile(const Arguments& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const int64_t shared = a.heads / a.key_heads;  // query heads that read one latent head
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (INTEGER_KEYS) {
            score_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile<Keys>(a.key, a.key_scale, p, j, begin, tokens, s, [&](const auto& z) {
            for_blocks_of_rows<MOST_ROWS>(rows, [&](int first, auto count) {
                constexpr int ROWS = decltype(count)::value;
                const int64_t r = row + first;
                constexpr int TOKENS = ROWS == 1 ? 8 : 4;
                float* logits = s.logits + r * TILE;
#if defined(__AVX512BF16__)
                if constexpr (PAIRS && std::is_same_v<std::decay_t<decltype(z)>, Tile<BFloat16>>) {
                    if (s.are_pairs) {
                        return score_pairs<ROWS, TOKENS>(s.pairs + r * Keys::PAD, z, whole, s.factor, logits);
                    }
                }
#endif
                score<ROWS, TOKENS>(s.query + r * Keys::PAD, z, whole, logits);
            });
        });
        if (Keys::SCALED) scale_logits(row, rows, whole, s);
    }
}

void update_softmax(const Arguments& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const int whole = whole_vectors(tokens);
    for (int r = 0; r < p.rows(); r++) {
        float* x = s.logits + r * TILE;
        if (SOFTCAP) cap(x, whole, float(a.softcap));
        add_mask(a, p, r, begin, tokens, x);
        std::fill(x + tokens, x + whole, -INF);
        to_weights(x, whole, s.states[r]);
    }
}

void mix_tile(const Arguments& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const int64_t shared = a.heads / a.value_heads;
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (INTEGER_VALUES) {
            mix_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile<Values>(a.value, a.value_scale, p, j, begin, tokens, s, [&](const auto& z) {
            if (Values::SCALED) scale_weights(row, rows, whole, s);
            for_blocks_of_rows<MOST_ROWS>(rows, [&](int first, auto count) {
                const int64_t r = row + first;
                mix<decltype(count)::value>(s.logits + r * TILE, s.totals + r, z, tokens, s.states + r);
            });
        });
    }
}

// Queries with everything folded in that may be: scale, steps, base 2. Also q . middle, to be taken from each logit.
void load_queries(const Arguments& a, const Part& p, Scratch& s) {
    const float factor = float(SOFTCAP ? a.scale / a.softcap : a.scale * LOG2E);
    s.factor = factor;
    s.are_pairs = PAIRS;
    for (int r = 0; r < p.rows(); r++) {
        const float* q = a.query.at<float>(p.b, p.head + r / p.queries, p.query + r % p.queries);
        for (int i = 0; PAIRS && i < Keys::WIDTH; i++) {
            uint32_t bits;
            std::memcpy(&bits, q + i, sizeof bits);
            s.are_pairs &= (bits & 0xffff) == 0;
            s.pairs[r * Keys::PAD + i] = uint16_t(bits >> 16);
        }
        float* out = s.query + r * Keys::PAD;
        for (int i = 0; i < Keys::WIDTH; i++) out[i] = q[i] * (factor * KEY_CHANNELS.step[i]);
        std::fill(out + Keys::WIDTH, out + Keys::PAD, 0.0f);
        Floats middle = {};
        for (int i = 0; i < Keys::PAD; i += LANES) middle += load(out + i) * load(KEY_CHANNELS.middle + i);
        s.middle[r] = sum_of(middle);
        if (INTEGER_KEYS) to_parts(out, s.parts + r * 12 * KEY_DWORDS, s.unit[r], s.middle[r]);
    }
}

void attend(const Arguments& a, const Part& p, Scratch& s) {
    load_queries(a, p, s);
    for (int r = 0; r < p.rows(); r++) {
        s.states[r].top = -INF;
        s.states[r].total = s.states[r].mass = 0;
        std::fill(s.states[r].sum, s.states[r].sum + SUMS, 0.0f);
    }
    for (int64_t begin = p.begin; begin < p.end; begin += TILE) {
        const int tokens = int(std::min<int64_t>(TILE, p.end - begin));
        if (is_hidden(a, p, begin, tokens)) continue;
        score_tile(a, p, begin, tokens, s);
        update_softmax(a, p, begin, tokens, s);
        mix_tile(a, p, begin, tokens, s);
    }
}

// ------------------------------------------------------------------------------------------------ all parts

// How the whole is cut: `units` groups of query heads that share latents, blocks of queries, ranges of tokens.
struct Cut {
    int64_t heads, units, queries, blocks, tokens, ranges, threads;

    explicit Cut(const Arguments& a) {
        heads = std::lcm(a.heads / a.key_heads, a.heads / a.value_heads);
        units = a.heads / heads;
        queries = std::clamp<int64_t>(ROWS_OF_A_PART / heads, 1, std::max<int64_t>(a.queries, 1));
        blocks = (a.queries + queries - 1) / queries;
        const int64_t most = a.pages.data ? std::min(a.tokens, a.page_count * a.page_tokens) : a.tokens;
        const int64_t products = a.batch * a.heads * a.queries * most * (Keys::WIDTH + Values::WIDTH);
        threads = std::clamp<int64_t>(products / 200000, 1, a.threads);  // a thread is worth about 10 us of work
        const int64_t parts = std::max<int64_t>(a.batch * units * blocks, 1);
        const int64_t wanted = threads == 1 ? 1 : (4 * threads + parts - 1) / parts;
        const int64_t listed = a.pages.data && wanted > 1 ? longest(a) : most;
        const int64_t tiles = std::max<int64_t>((listed + TILE - 1) / TILE, 1);
        tokens = (tiles + wanted - 1) / wanted * TILE;
        ranges = std::max<int64_t>((listed + tokens - 1) / tokens, 1);
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
        return {b, unit * heads, heads, query, std::min(queries, a.queries - query),
                range * tokens, std::min(listed.count, (range + 1) * tokens), listed};
    }
};

// Joins the ranges of tokens of one row: states [ranges] -> output [R_V], lse.
void merge(const State* states, int64_t ranges, float* output, float& lse) {
    float top = -INF, total = 0, sum[SUMS] = {};
    for (int64_t i = 0; i < ranges; i++) top = std::max(top, states[i].top);
    for (int64_t i = 0; i < ranges; i++) {
        const float factor = states[i].top == -INF ? 0.0f : std::exp2(states[i].top - top);
        total += states[i].total * factor;
        for (int c = 0; c < SUMS; c++) sum[c] += states[i].sum[c] * factor;
    }
    const float inverse = total == 0 ? 0.0f : 1 / total;
    for (int c = 0; c < Values::WIDTH; c++) output[c] = sum[c] * inverse * VALUE_CHANNELS.step[c];
    lse = float((top + std::log2(total)) * LN2);
}

}  // namespace

extern "C" void latent_attention(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const Cut cut(a);
    const int64_t rows = a.batch * a.heads * a.queries;
    State* states = cut.ranges > 1 ? allocate<State>(rows * cut.ranges) : nullptr;  // [B, H, S, ranges]
#pragma omp parallel num_threads(int(cut.threads)) if (cut.threads > 1)
    {
        Scratch s(cut.heads * cut.queries);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < cut.parts(a); i++) {
            const Part p = cut.part(a, i);
            attend(a, p, s);
            for (int r = 0; r < p.rows(); r++) {
                const int64_t row = p.row(a, r);
                if (cut.ranges > 1) states[row * cut.ranges + i % cut.ranges] = s.states[r];
                else merge(s.states + r, 1, a.output + row * Values::WIDTH, a.lse[row]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < (cut.ranges > 1 ? rows : 0); row++) {
            merge(states + row * cut.ranges, cut.ranges, a.output + row * Values::WIDTH, a.lse[row]);
        }
    }
    std::free(states);
}
