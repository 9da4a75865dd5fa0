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
// A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
// one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
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

#if defined(__SSSE3__)
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
typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));

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
#if defined(__AVX2__) && !defined(__AVX512F__)  // which GCC does not find by itself
        const __m256i halves8 = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return (Floats)_mm256_slli_epi32(halves8, 16);
#endif
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

// Rows are fetched so many bytes before they are read, into the second-level cache: more lines can be under way to it
// than to the first, and memory answers within the time of some KB of rows.
constexpr int FETCHED = 16384;

enum Stored : int64_t { FLOAT32, BFLOAT16, FLOAT16 };  // numbers of rows that are not quantized

// A bit group: 16 bits are float16, not codes. With a negative step it has a trellis code, of steps of its magnitude.
struct Tier {
    int64_t bits, width;
    double step;

    bool is_trellis() const { return bits < 16 && step < 0; }
    float middle() const { return bits < 16 ? 0.5f * ((1 << (is_trellis() ? 8 : bits)) - 1) : 0.0f; }
};

constexpr int MOST_TOKENS = 256;  // of a tile
// From one row of logits to the next: more than a tile's tokens, since a power of two would put all rows on the same
// cache sets.
constexpr int TILE = MOST_TOKENS + 16;

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

constexpr int MOST_PAIRS = 128;  // 256 products of a word and a byte are below 2^31

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
        const Run run = {bits, count, form, added > MOST_PAIRS, {}};
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
        const Group group = {word(first.high_bit, here.high_bit), 0,
                             first.low ? word(first.low_bit, here.low_bit) : 0, (here.low_bit - first.low_bit) % 16};
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
        const Group group = {dword(first.high_bit, here.high_bit), at(first.high_bit, here.high_bit),
                             first.low ? dword(first.low_bit, here.low_bit) : 0, at(first.low_bit, here.low_bit)};
        add(group, tier.bits, form, count);
        for (int k = 0; k < count; k++) codes.insert(codes.end(), {code(tier, i + k), code(tier, i + k + count)});
        return 2 * count;
    }
};

#endif

// Rows of keys or of values.
struct Side {
    std::vector<Tier> tiers;  // none: not quantized
    Stored stored;
    int width, pad, bytes, element;  // R; floats of an unpacked row, whole vectors; of a row; of what strides count
    int reach;                       // bytes from the begin of a row to the end of what may be read with it
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
            layout.add(bits, int(tier.width), bit, channel, tier.is_trellis());
            for (int i = 0; i < tier.width; i++, channel++) {
                step[channel] = bits < 16 ? float(std::abs(tier.step)) : 1.0f;
                middle[channel] = tier.middle();
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
        tokens = std::clamp(24576 / most / 16 * 16, 16, floats ? 64 : MOST_TOKENS);  // stay in the first-level cache
        codes = std::max(key.integer ? key.layout.bytes_of_tile(false, tokens) : 0,
                         value.integer ? value.layout.bytes_of_tile(true, tokens) : 0);
    }
};

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
    Rows pages;                               // int32 [B,U,pages], none: all tokens; a list for each U-th of the heads
    int64_t page_heads, page_count, page_tokens;
    float *output, *lse;                      // float32 [B,H,S,R_V] and [B,H,S], dense
    double scale, softcap;
    const Kernel* kernel;
    int64_t digits;  // at most so many bytes of queries and weights are multiplied: 3, or 2 for queries of 16 bits
    const Extent* later;  // what the thread reads after this call: fetched meanwhile, in place of later rows
    int64_t later_count;
    int64_t segment;  // tokens that the same queries read, 0: all of them
    int64_t query_segment;  // numbers from their queries to those of the next
    const float* shift;  // of the logits of a segment, float32 [segments, B, H, S], dense; none: 0
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
    float top, total, mass;  // mass: the sum of weight * scale, kept where weights are split
    float* sum;              // of weight * scale * (code - middle), as many as a row of values is padded to
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
    State* states;                                   // [rows]
    float* sums;                                     // of the states, [rows, R_V]
    uint8_t *codes, *room;                           // of a tile; [16, whole rows with what is read behind them]
    uint8_t* looked_up;                              // [16, rows with what their trellis codes stand for]
    int8_t *parts, *weights;                         // of queries 2 times [rows, PART_BYTES key_dwords], of weights
    float *unit, *lowest, *coarse, *limits, *halves;  // [rows], [rows], [rows], [rows], [halves, TILE]
    uint16_t* pairs;                                 // queries in bfloat16, [rows, R_K], where they are multiplied so
    bool are_pairs;                                  // and they are such numbers
    float factor;                                    // that these are to be multiplied by
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

// ------------------------------------------------------------------------------------------------ rows of a tile

#if INTEGER

// Rows of 16 tokens: SIDE_BY_SIDE of them lie one behind the other.
struct Sixteen {
    const uint8_t* runs[16 / SIDE_BY_SIDE];
    int64_t stride;

    INLINE const uint8_t* operator[](int i) const { return runs[i / SIDE_BY_SIDE] + i % SIDE_BY_SIDE * stride; }
};

// Queries of 16 bits have 9 or 12 of precision: two digits, 15 bits, are more, and weights have no more then. Of
// queries of 32 bits the third digit counts.
//
// Weights of a tile have two parts where the largest is at most 1/SMALL of all so far: rounding to 2^-16 of it then
// moves the output by about 2^-16 / SMALL * sqrt(TILE) of a latent. Where it counts for more, they have three.
constexpr float SMALL = 256;

// How many channels are multiplied by all digits of `rows` queries, and by all of their weights; others by one. Of one
// row unpacking takes longest.
INLINE int fine_keys(const Arguments& a, int rows, const Kernel& k) {
    return a.digits == 2 && rows > 1 ? k.key_fine : 4 * k.key_dwords;
}
INLINE int fine_values(const Arguments& a, const Kernel& k) {
    return a.digits == 2 ? k.value_fine : 16 * k.value_vectors;
}

// Into the second-level cache, rows of `count` tokens.
INLINE void fetch(const Side& side, const uint8_t* row, int64_t stride, int count) {
    const bool dense = stride <= side.reach;  // one row behind the other
    const int64_t bytes = dense ? count * stride : side.bytes, end = dense ? stride : count * stride;
    for (int64_t from = 0; from < end; from += stride) {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + from + byte, 0, 2);
    }
}

// `count` rows of a tile from token t on are copied to where there is room behind them, the last one again up to 16.
void copy_rows(const Side& side, const Rows& rows, const Part& p, int64_t j, int64_t t, int count, uint8_t* room) {
    for (int i = 0; i < 16; i++, room += side.reach) {
        std::memcpy(room, rows.at<uint8_t>(p.b, j, p.listed.at(t + std::min(i, count - 1))), side.bytes);
    }
}

// Where 16 tokens of a tile are, from t on, the last one again behind the end. What comes later is fetched, if
// `fetches` says so: rows, or what the call names. Rows may be read in whole blocks of 64 bytes.
INLINE Sixteen rows_of(const Arguments& a, const Side& side, const Rows& rows, const Part& p, int64_t j, int64_t begin,
                       int t, int tokens, bool fetches, Scratch& s) {
    const int64_t from = begin + t, stride = rows.token;
    const auto at = [&](int64_t token) { return rows.at<uint8_t>(p.b, j, token); };
    if (fetches && a.later_count) s.later.fetch(), fetches = false;
    if (fetches && !p.listed.pages) fetch(side, at(from + side.ahead), stride, 16);
    for (int i = 0; fetches && p.listed.pages && i < std::min(tokens - t, 16); i += SIDE_BY_SIDE) {
        fetch(side, at(p.listed.ahead(from + i, side.ahead)), stride, SIDE_BY_SIDE);
    }
    if (tokens - t >= 16) {
        const Sixteen z = {{at(p.listed.at(from)), at(p.listed.at(from + SIDE_BY_SIDE))}, stride};
        if (z[15] + side.reach <= at(a.tokens - 1) + side.bytes) return z;
    }
    copy_rows(side, rows, p, j, from, std::min(tokens - t, 16), s.room);
    return {{s.room, s.room + SIDE_BY_SIDE * side.reach}, side.reach};
}

// The scales of a tile as floats. Later ones are fetched: nothing else foresees where those of pages are.
INLINE void load_scales(const Side& side, const Rows& scales, const Part& p, int64_t j, int64_t begin, int tokens,
                        Scratch& s) {
    std::fill_n(s.scale + whole_vectors(tokens) - 16, 16, 0.0f);  // weights of no token are 0 times it
    int t = 0;
    if (!p.listed.pages && scales.token == 1) {
        const uint16_t* scale = scales.at<uint16_t>(p.b, j, begin);
        for (; t + LANES <= tokens; t += LANES) {
            __builtin_prefetch(scale + t + side.ahead, 0, 2);
            store(s.scale + t, Float16::load(scale + t));
        }
    }
    for (; t < tokens; t += SIDE_BY_SIDE) {
        const uint16_t* scale = scales.at<uint16_t>(p.b, j, p.listed.at(begin + t));
        __builtin_prefetch(scales.at<uint16_t>(p.b, j, p.listed.ahead(begin + t, side.ahead)), 0, 2);
        const int last = std::min(tokens - t, SIDE_BY_SIDE) - 1;
        if (scales.token == 1 && last == SIDE_BY_SIDE - 1) {
            _mm256_store_ps(s.scale + t, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale))));
        } else {
            for (int i = 0; i <= last; i++) s.scale[t + i] = from_float16(scale[i * scales.token]);
        }
    }
}

// The lowest digit of queries counts for tokens whose weight may be more than 1/MINOR of all so far: without it a logit
// is off by some 2^-15 of what its largest products are, and the output by that times the root of the largest weight.
constexpr float MINOR = 256;

// Of each of `rows` rows the largest logit for which it does not count.
INLINE void set_limits(const Arguments& a, int64_t row, int rows, Scratch& s) {
    const bool all = s.kernel.softcap || a.mask_kind == ADDITIVE_MASK;  // logits are not yet what the softmax sees
    for (int64_t r = row; r < row + rows; r++) {
        s.limits[r] = all ? -INF : s.states[r].top + std::log2(s.states[r].total / MINOR);
    }
}

// Whether no logit of ROWS rows and `count` tokens from t on is larger.
template <int ROWS>
INLINE bool are_minor(int64_t row, int t, int count, const Scratch& s) {
    Floats top = Floats{} - INF;
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        for (int i = t; i < t + count; i += LANES) {
            const Floats over = load(s.logits + (row + r) * TILE + i) - s.limits[row + r];
            top = over > top ? over : top;
        }
    }
    return !(largest_of(top) > 0.0f);
}

#else

template <class... T>
void score_codes(const T&...) {}
template <class... T>
void mix_codes(const T&...) {}
template <class... T>
int fine_keys(const T&...) {
    return 0;
}
template <class... T>
void to_parts(const T&...) {}
template <class... T>
void arrange_queries(const T&...) {}

#endif
// ------------------------------------------------------------------------------------------------ products of bytes

#if BYTES

// What takes a slice apart, in registers.
template <Kind KIND>
struct Taken {
    static constexpr bool MANY = is_many(KIND), LOW = depth_of(KIND) >= ONE_LOW, LOOKED = depth_of(KIND) == ONE_TRELLIS;
    const Slice::Block *block, *end;
    __m512i index, from[2], keep[2], levels, offsets, order;
    __mmask64 looked;
    int offset;

    INLINE explicit Taken(const Slice& slice) : block(slice.blocks.data()), end(block + slice.blocks.size()) {
        index = _mm512_load_si512(block->index);
        offset = block->offset;
        UNROLL(2) for (int i = 0; i < 1 + LOW; i++) {
            from[i] = _mm512_load_si512(slice.from[i]);
            keep[i] = _mm512_load_si512(slice.keep[i]);
        }
        looked = slice.looked;
        if (!LOOKED) return;
        const auto in_each_quarter = [](const void* p) {
            return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p)));
        };
        levels = in_each_quarter(LEVELS), offsets = in_each_quarter(OFFSETS), order = in_each_quarter(ORDER);
    }
    // The bytes of a row; what no code needs is arbitrary.
    INLINE __m512i bytes_of(const uint8_t* row) const {
        if (!MANY) return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(row + offset));
        __m512i out = {};
        for (const Slice::Block* b = block; b < end; b++) {
            const __m512i bytes = _mm512_loadu_si512(row + b->offset);
            out |= _mm512_maskz_permutexvar_epi8(b->mask, _mm512_load_si512(b->index), bytes);
        }
        return out;
    }
    INLINE __m512i codes_of(const uint8_t* row) const {
        if (KIND == WHOLE) return _mm512_loadu_si512(row + offset);
        const __m512i bytes = bytes_of(row);
        const __m512i high = _mm512_multishift_epi64_epi8(from[0], bytes) & keep[0];
        if (!LOW) return high;
        const __m512i codes = high | (_mm512_multishift_epi64_epi8(from[1], bytes) & keep[1]);
        return LOOKED ? _mm512_mask_mov_epi8(codes, looked, looked_up(high)) : codes;
    }
    // The codes of windows. Tables of 16 stand in every quarter, so that bits 4 and 5 of an index do not count.
    INLINE __m512i looked_up(__m512i window) const {
        const __m512i high = _mm512_srli_epi16(window, 4) ^ _mm512_permutexvar_epi8(window, order);
        return _mm512_add_epi8(_mm512_permutexvar_epi8(high, levels), _mm512_permutexvar_epi8(window, offsets));
    }
};

// Calls f(kind) with a compile-time kind of slices.
template <class F>
INLINE auto with_kind(Kind kind, F f) {
    switch (kind) {
        case WHOLE: return f(std::integral_constant<Kind, WHOLE>());
        case ONE_HIGH: return f(std::integral_constant<Kind, ONE_HIGH>());
        case ONE_LOW: return f(std::integral_constant<Kind, ONE_LOW>());
        case ONE_TRELLIS: return f(std::integral_constant<Kind, ONE_TRELLIS>());
        case MANY_HIGH: return f(std::integral_constant<Kind, MANY_HIGH>());
        case MANY_LOW: return f(std::integral_constant<Kind, MANY_LOW>());
        default: return f(std::integral_constant<Kind, MANY_TRELLIS>());
    }
}

// Calls f(taken), whose type says of what kind the slice is.
template <class F>
INLINE void with_slice(const Slice& slice, F f) {
    with_kind(slice.kind, [&](auto kind) { f(Taken<decltype(kind)::value>(slice)); });
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
INLINE void unpack_keys(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.key_vectors;
    for (const Slice& slice : k.key.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i x[16];
            UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.codes_of(rows[t]);
            transpose(x);
            UNROLL(16) for (int i = 0; i < 16; i++) if (i < left) _mm512_store_si512(codes + i, x[i]);
        });
        codes += 16;
        left -= 16;
    }
}

// Their float16 channels as floats [channels, TILE].
INLINE void unpack_halves(const Kernel& k, const Sixteen& rows, float* halves) {
    int left = k.halves / 2;
    for (const Slice& slice : k.key.layout.half_slices) {
        const Taken<MANY_HIGH> taken(slice);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.bytes_of(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < 16; i++) {
            if (i >= left) continue;
            float* out = halves + 2 * i * TILE;
            _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[i])));
            _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16))));
        }
        halves += 32 * TILE;
        left -= 16;
    }
}

// 4 tokens of values, from `first` of 16 on -> codes of a slice, [4 vectors of 16 channels].
template <class T>
INLINE void unpack_slice(const T& taken, const Sixteen& rows, int first, __m512i* codes) {
    __m512i x[4];
    UNROLL(4) for (int t = 0; t < 4; t++) x[t] = taken.codes_of(rows[first + t]);
    interleave(x[0], x[1], x[2], x[3], codes);
}

// 16 tokens of values -> codes [4, vectors of 16 channels].
INLINE void unpack_values(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.value_vectors;
    for (const Slice& slice : k.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            UNROLL(4) for (int t = 0; t < 4; t++) {
                __m512i mixed[4];
                unpack_slice(taken, rows, 4 * t, mixed);
                UNROLL(4) for (int i = 0; i < 4; i++) {
                    if (i < left) _mm512_store_si512(codes + t * k.value_vectors + i, mixed[i]);
                }
            }
        });
        codes += 4;
        left -= 4;
    }
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

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], `step` and `next` vectors of codes from one i or v to the
// next, `width` factors from one part to the next.
template <int ROWS, int VECTORS, int PARTS>
INLINE void multiply(const __m512i* codes, int64_t step, int64_t next, const int32_t* factors, int64_t width, int count,
                     __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * step + v * next);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(3) for (int part = 0; part < PARTS; part++) {
                const int32_t& factor = factors[(3 * r + part) * width + i];
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
constexpr float largest_integer(int parts) { return parts == 3 ? 8355000.0f : parts == 2 ? 32500.0f : 127.0f; }

// 16 integers as PARTS times 16 signed bytes: digits of base 256.
template <int PARTS>
INLINE void store_parts(Ints16 x, int8_t* out, int64_t stride) {
    constexpr int half = PARTS == 3 ? 0x808080 : PARTS == 2 ? 0x8080 : 0x80;
    const __m512i digits = (__m512i)((x + half) ^ half);
    UNROLL(3) for (int i = 0; i < PARTS; i++) {
        _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8 * i)));
    }
}

// 16 numbers of a query of floats, for the codes of keys from `first` on; 0 behind the last.
INLINE Floats16 query_of_codes(const Kernel& k, const float* query, int first) {
    const int lanes = std::min(k.key.layout.count() - first, 16);
    const Code* codes = k.key.layout.codes.data() + first;
    if (lanes <= 0) return Floats16{};
    if (k.in_order) {
        const __mmask16 mask = __mmask16((1 << lanes) - 1);
        return (Floats16)_mm512_maskz_loadu_ps(mask, query + codes->channel) * load(k.key_factor.data() + first);
    }
    alignas(64) float q[16] = {};
    for (int lane = 0; lane < lanes; lane++) q[lane] = query[codes[lane].channel] * k.key_factor[first + lane];
    return load(q);
}

// A query of floats in the order of channels -> its parts, [3, key_dwords, 4], and what one stands for. What the middle
// of all codes adds to a logit: by all digits but the lowest, and by the lowest. Channels from `fine` on have one part,
// where others have their lowest digit, in units of `coarse`; what their middle adds is among the former.
void to_parts(const Kernel& k, const float* query, int fine, int8_t* parts, float& unit, float& middle, float& lowest,
              float& coarse) {
    const int padded = 4 * k.key_dwords;
    Floats most = {}, least = {}, nothing = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i), size = q < 0.0f ? -q : q;
        if (i < fine) most = size > most ? size : most;
        else least = size > least ? size : least;
        nothing += q * 0.0f;  // NaN stays NaN
    }
    const float largest = largest_of(most), none = sum_of(nothing);
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    coarse = largest_of(least) / largest_integer(1);
    const float inverse_of_coarse = coarse > 1e-30f ? 1 / coarse : 0.0f;
    Floats sum = {}, low = {}, one = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i);
        if (i >= fine) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse_of_coarse));
            store_parts<1>(x, parts + i, padded);
            one += __builtin_convertvector(x, Floats16) * load(k.key_middle.data() + i);
            continue;
        }
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse));
        store_parts<3>(x, parts + i, padded);
        const Ints16 digit = (x << 24) >> 24;
        sum += __builtin_convertvector(x - digit, Floats16) * load(k.key_middle.data() + i);
        low += __builtin_convertvector(digit, Floats16) * load(k.key_middle.data() + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit + sum_of(one) * coarse;
    lowest = sum_of(low) * unit;
}

// Logits without the lowest of the three digits of queries; of codes from dword `fine` on with the one they have.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int fine, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * k.key_dwords;
    multiply<ROWS, VECTORS, 2>(codes, 1, k.key_vectors, query, k.key_dwords, fine, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] = joined(sums[r][v]) * unit - s.middle[row + r];
    }
    if (fine < k.key_vectors) {
        __m512i rest[ROWS][VECTORS][1];
        const int32_t* parts = query - k.key_dwords + fine;
        multiply<ROWS, VECTORS, 1>(codes + fine, 1, k.key_vectors, parts, k.key_dwords, k.key_vectors - fine, rest);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] += joined(rest[r][v]) * s.coarse[row + r];
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] *= load(s.scale + t + 16 * v);
    }
    UNROLL(1) for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(5) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
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
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * k.key_dwords;
    multiply<ROWS, VECTORS, 1>(codes, 1, k.key_vectors, query, k.key_dwords, k.key_vectors, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 16 * v;
            const Floats16 more = joined(sums[r][v]) * s.unit[row + r] - s.lowest[row + r];
            store(x, load(x) + more * load(s.scale + t + 16 * v));
        }
    }
}

template <int ROWS, int VECTORS, class F>
INLINE void for_vectors(int whole, F f) {
    int t = 0;
    for (; t + 16 * VECTORS <= whole; t += 16 * VECTORS) f(t, std::integral_constant<int, VECTORS>());
    for (; t < whole; t += 16) f(t, std::integral_constant<int, 1>());
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
template <Kind KIND, int PARTS>
INLINE Floats16 products_of_row(const Kernel& k, const Sixteen& rows, const int8_t* parts) {
    Floats16 fours[4];
    UNROLL(2) for (int i = 0; i < 4; i += 2) {
        __m512i sums[8][PARTS] = {};
        const int8_t* part = parts;
        for (const Slice& slice : k.key.layout.slices) {
            const Taken<KIND> taken(slice);
            __m512i query[PARTS];
            UNROLL(2) for (int n = 0; n < PARTS; n++) query[n] = _mm512_loadu_si512(part + n * 4 * k.key_dwords);
            UNROLL(8) for (int t = 0; t < 8; t++) {
                const __m512i codes = taken.codes_of(rows[4 * i + t]);
                UNROLL(2) for (int n = 0; n < PARTS; n++) sums[t][n] = add_products(sums[t][n], codes, query[n]);
            }
            part += 64;
        }
        UNROLL(2) for (int n = 0; n < 2; n++) {
            Floats16 x[4];
            UNROLL(4) for (int t = 0; t < 4; t++) x[t] = joined(sums[4 * n + t]);
            fours[i + n] = sums_of_4(x);
        }
    }
    return sums_of_quarters(sums_of_quarters(fours[0], fours[1]), sums_of_quarters(fours[2], fours[3]));
}

// Logits of a tile of keys for one row; KIND serves all slices.
template <Kind KIND>
void score_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    const int8_t* parts = s.parts + row * 12 * k.key_dwords;
    float* logits = s.logits + row * TILE;
    const float unit = s.unit[row];
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        const Floats16 high = products_of_row<KIND, 2>(k, z, parts + 4 * k.key_dwords);
        Floats16 x = (high * (unit * 256.0f) - s.middle[row]) * load(s.scale + t);
        unpack_halves(k, z, s.halves + t);
        for (int i = 0; i < k.halves; i++) {
            x += s.query[row * k.key.pad + k.key.layout.half_channel[i]] * load(s.halves + i * TILE + t);
        }
        store(logits + t, x);
    }
    if (a.digits == 2) return;
    set_limits(a, row, 1, s);
    for (int t = 0; t < whole; t += 16) {
        if (are_minor<1>(row, t, 16, s)) continue;
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s);
        const Floats16 more = products_of_row<KIND, 1>(k, z, parts) * unit - s.lowest[row];
        store(logits + t, load(logits + t) + more * load(s.scale + t));
    }
}

// Few rows share codes: these are multiplied while they are in registers. Sums of at most so many rows leave room for
// the codes of 16 tokens.
constexpr int FEW_ROWS = 3;

INLINE bool are_few(const Arguments& a, int rows) { return a.digits == 2 && rows > 1 && rows <= FEW_ROWS; }

// Digits of the queries of few rows from `row` on, as `score_slice` reads them: int32 [key_dwords, 3, rows].
INLINE int32_t* digits_of_few(int64_t row, const Scratch& s) {
    return reinterpret_cast<int32_t*>(s.parts) + (s.rows + row) * 3 * s.kernel.key_dwords;
}

void arrange_queries(const Arguments& a, int64_t row, int rows, Scratch& s) {
    if (!are_few(a, rows)) return;
    const int width = s.kernel.key_dwords;
    const int32_t* parts = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * width;
    int32_t* out = digits_of_few(row, s);
    for (int part = 0; part < 3; part++) {
        for (int r = 0; r < rows; r++) {
            const int32_t* from = parts + (3 * r + part) * width;
            for (int i = 0; i < width; i++) out[(3 * i + part) * rows + r] = from[i];
        }
    }
}

// Logits of a tile of keys for few rows from a slice on that begins with dword `first`; in the scratch are sums of the
// slices before, of each digit. Codes from dword `fine` on are multiplied by the lowest digits, others by the two more.
template <int ROWS, Kind KIND>
INLINE void score_slice(const Taken<KIND>& taken, const Arguments& a, const Part& p, int64_t j, int64_t begin,
                        int tokens, int64_t row, int first, int fine, Scratch& s) {
    const Kernel& k = s.kernel;
    const int count = k.key_vectors - first, of_two = fine - first;
    const bool is_last = count <= 16;
    const int32_t* digits = digits_of_few(row, s) + first * 3 * ROWS;
    auto* kept = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < tokens; t += 16, kept += 3 * ROWS) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, first == 0, s);
        __m512i x[16], sums[3][ROWS];
        UNROLL(16) for (int i = 0; i < 16; i++) x[i] = taken.codes_of(z[i]);
        transpose(x);
        UNROLL(3) for (int part = 0; part < 3; part++) {
            UNROLL(3) for (int r = 0; r < ROWS; r++) {
                sums[part][r] = first ? _mm512_load_si512(kept + part * ROWS + r) : __m512i{};
            }
        }
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            if (i >= count) break;
            if (i < of_two) {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[1][r] = add_products(sums[1][r], x[n], digits[(3 * n + 1) * ROWS + r]);
                        sums[2][r] = add_products(sums[2][r], x[n], digits[(3 * n + 2) * ROWS + r]);
                    }
                }
            } else {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[0][r] = add_products(sums[0][r], x[n], digits[3 * n * ROWS + r]);
                    }
                }
            }
        }
        if (!is_last) {
            UNROLL(3) for (int part = 0; part < 3; part++) {
                UNROLL(3) for (int r = 0; r < ROWS; r++) _mm512_store_si512(kept + part * ROWS + r, sums[part][r]);
            }
            continue;
        }
        if (k.halves) unpack_halves(k, z, s.halves + t);
        UNROLL(3) for (int r = 0; r < ROWS; r++) {
            const __m512i high[2] = {sums[1][r], sums[2][r]};
            Floats16 logits = joined(high) * (s.unit[row + r] * 256.0f) - s.middle[row + r];
            logits += __builtin_convertvector((Ints16)sums[0][r], Floats16) * s.coarse[row + r];
            logits *= load(s.scale + t);
            for (int i = 0; i < k.halves; i++) {
                const float q = s.query[(row + r) * k.key.pad + k.key.layout.half_channel[i]];
                logits += q * load(s.halves + i * TILE + t);
            }
            store(s.logits + (row + r) * TILE + t, logits);
        }
    }
}

template <int ROWS>
void score_few(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
               Scratch& s) {
    int first = 0;
    for (const Slice& slice : s.kernel.key.layout.slices) {
        with_slice(slice,
                   [&](const auto& taken) { score_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, s); });
        first += 16;
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        return with_kind(k.key.layout.kind,
                         [&](auto kind) { score_row<decltype(kind)::value>(a, p, j, begin, tokens, row, s); });
    }
    const int whole = whole_vectors(tokens), fine = std::min(fine_keys(a, rows, k) / 4, k.key_vectors);  // dwords
    if (are_few(a, rows)) {
        if (rows == 2) score_few<2>(a, p, j, begin, tokens, row, fine, s);
        else score_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        unpack_keys(k, z, codes + t / 16 * k.key_vectors);
        unpack_halves(k, z, s.halves + t);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, fine, s);
        });
        if (a.digits == 2) return;
        set_limits(a, row + first, ROWS, s);
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            if (!are_minor<ROWS>(row + first, t, 16 * VECTORS, s)) score_low<ROWS, VECTORS>(row + first, t, s);
        });
    });
}

constexpr Ints16 LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What the integers of a row's weights stand for, and their sum; that of the same weights in one byte.
struct Weights {
    float unit, total, bytes;
};

// What becomes of a tile's weights: two or three digits, one byte each beside two digits, or that byte alone.
enum Digits { ALL_DIGITS, TWO_AND_BYTES, BYTES_ALONE };

// Weights of a tile of values times the tokens' scales, split into as many parts as is returned; weights in one byte
// stand in the third. What that rounds away goes to the token that stands 16 behind, so that many small weights are not
// lost together: where their tokens share a mean, it would be missing.
template <int ROWS>
int scale_and_split(Digits wanted, int64_t row, int whole, int64_t digits, Weights* weights, Scratch& s) {
    Floats tops[ROWS] = {}, masses[ROWS] = {};
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        const Floats scale = load(s.scale + t);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            float* w = s.logits + (row + r) * TILE + t;
            const Floats scaled = load(w) * scale;
            store(w, scaled);
            masses[r] += scaled;
            tops[r] = scaled > tops[r] ? scaled : tops[r];
        }
    }
    bool small = true;  // in all rows
    float inverse[ROWS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        State& state = s.states[row + r];
        state.mass += sum_of(masses[r]);
        weights[r].unit = largest_of(tops[r]);
        small &= weights[r].unit * SMALL <= state.mass;
    }
    small |= wanted != ALL_DIGITS || digits == 2;
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float limit = largest_integer(small ? 2 : 3);
        inverse[r] = weights[r].unit > 1e-30f ? limit / weights[r].unit : 0.0f;
        weights[r].unit /= limit;
    }
    Ints16 sums[ROWS] = {}, bytes[ROWS] = {}, rest[ROWS];
    for (Ints16& x : rest) x = (LANE_NUMBERS - 7) * 16 + 120;  // not all lanes round up at once
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(s.logits + (row + r) * TILE + t) * inverse[r]));
            int8_t* parts = s.weights + 3 * r * TILE + t;
            if (wanted != BYTES_ALONE) {
                sums[r] += x;
                if (small) store_parts<2>(x, parts, TILE);
                else store_parts<3>(x, parts, TILE);
            }
            if (wanted == ALL_DIGITS) continue;
            rest[r] = (rest[r] & 255) + x;
            const Ints16 byte = rest[r] >> 8;
            bytes[r] += byte;
            _mm_store_si128(reinterpret_cast<__m128i*>(parts + 2 * TILE), _mm512_cvtepi32_epi8((__m512i)byte));
        }
    }
    const auto all = [](Ints16 y) { return float(_mm512_reduce_add_epi32((__m512i)y)); };
    UNROLL(5) for (int r = 0; r < ROWS; r++) weights[r].total = all(sums[r]), weights[r].bytes = all(bytes[r]);
    return small ? 2 : 3;
}

// Sums of products from vector `vector` on, without the middle of the codes, are added to a state.
template <int VECTORS, int PARTS>
INLINE void add_sums(const __m512i (&sums)[VECTORS][PARTS], const Side& side, int vector, int count, float unit,
                     float total, State& to) {
    UNROLL(4) for (int v = 0; v < VECTORS; v++) {
        if (v >= count) continue;
        float* sum = to.sum + 16 * (vector + v);
        const Floats16 x = joined(sums[v]) - total * load(side.middle.data() + 16 * (vector + v));
        store(sum, load(sum) + unit * x);
    }
}

// Of PARTS 1 the weights in one byte.
template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const Weights* weights, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    const auto* parts = reinterpret_cast<const int32_t*>(s.weights + (PARTS == 1 ? 2 * TILE : 0));
    multiply<ROWS, VECTORS, PARTS>(codes, s.kernel.value_vectors, 1, parts, TILE / 4, count, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        const float unit = PARTS == 1 ? 256 * w.unit : w.unit, total = PARTS == 1 ? w.bytes : w.total;
        add_sums(sums[r], s.kernel.value, vector, VECTORS, unit, total, states[r]);
    }
}

// Vectors of channels from `begin` to `end`.
template <int ROWS, int PARTS>
void mix_block(int begin, int end, int count, const Weights* weights, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS);
    const int rest = (end - begin) % VECTORS;
    for (int v = begin; v < end - rest; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, weights, states, s);
    const auto mix_rest = [&](int v, auto vectors) {
        mix_bytes<ROWS, decltype(vectors)::value, PARTS>(v, count, weights, states, s);
    };
    for_count(rest, end - rest, mix_rest, std::make_integer_sequence<int, VECTORS - 1>());
}

// One row: codes are multiplied as soon as they are there.
template <int PARTS>
void mix_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, float unit, float total,
             State& state, Scratch& s) {
    const Side& side = s.kernel.value;
    int vector = 0;
    for (const Slice& slice : side.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i sums[4][PARTS] = {};
            for (int t = 0; t < tokens; t += 16) {
                const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, vector == 0, s);
                UNROLL(4) for (int i = 0; i < 16; i += 4) {
                    __m512i codes[4];
                    unpack_slice(taken, z, i, codes);
                    UNROLL(3) for (int part = 0; part < PARTS; part++) {
                        const int32_t& weight = *reinterpret_cast<const int32_t*>(s.weights + part * TILE + t + i);
                        UNROLL(4) for (int v = 0; v < 4; v++) {
                            sums[v][part] = add_products(sums[v][part], codes[v], weight);
                        }
                    }
                }
            }
            add_sums(sums, side, vector, s.kernel.value_vectors - vector, unit, total, state);
        });
        vector += 4;
    }
}

// The weights of a tile for vectors of 16 channels, of which those from `fine` on are multiplied by one byte.
template <int ROWS>
INLINE int split_for(const Arguments& a, int fine, int64_t row, int whole, Weights* weights, Scratch& s) {
    const bool all = fine == s.kernel.value_vectors;
    const Digits wanted = all ? ALL_DIGITS : fine == 0 ? BYTES_ALONE : TWO_AND_BYTES;
    return scale_and_split<ROWS>(wanted, row, whole, a.digits, weights, s);
}

// Few rows: codes of a slice that begins with vector `first` are multiplied as soon as they are there.
template <int ROWS, Kind KIND>
INLINE void mix_slice(const Taken<KIND>& taken, const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens,
                      int64_t row, int first, int fine, const Weights* weights, Scratch& s) {
    const Side& side = s.kernel.value;
    const int count = s.kernel.value_vectors - first, of_two = fine - first;
    const auto* digits = reinterpret_cast<const int32_t*>(s.weights);
    __m512i sums[ROWS][4][2] = {};
    for (int t = 0; t < tokens; t += 16) {
        const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, first == 0, s);
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            __m512i codes[4];
            unpack_slice(taken, z, i, codes);
            const int32_t* digit = digits + (t + i) / 4;
            UNROLL(4) for (int v = 0; v < 4; v++) {
                if (v >= count) break;
                if (v < of_two) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        UNROLL(2) for (int part = 0; part < 2; part++) {
                            const int32_t& factor = digit[(3 * r + part) * (TILE / 4)];
                            sums[r][v][part] = add_products(sums[r][v][part], codes[v], factor);
                        }
                    }
                } else {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[r][v][0] = add_products(sums[r][v][0], codes[v], digit[(3 * r + 2) * (TILE / 4)]);
                    }
                }
            }
        }
    }
    UNROLL(3) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        State& state = s.states[row + r];
        UNROLL(4) for (int v = 0; v < 4; v++) {
            if (v >= count) break;
            const __m512i two[1][2] = {{sums[r][v][0], sums[r][v][1]}}, one[1][1] = {{sums[r][v][0]}};
            if (v < of_two) add_sums(two, side, first + v, 1, w.unit, w.total, state);
            else add_sums(one, side, first + v, 1, 256 * w.unit, w.bytes, state);
        }
    }
}

template <int ROWS>
void mix_few(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
             Scratch& s) {
    Weights weights[ROWS];
    split_for<ROWS>(a, fine, row, whole_vectors(tokens), weights, s);
    int first = 0;
    for (const Slice& slice : s.kernel.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            mix_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, weights, s);
        });
        first += 4;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    const Kernel& k = s.kernel;
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        Weights w;
        const int parts = scale_and_split<1>(ALL_DIGITS, row, whole, a.digits, &w, s);
        if (parts == 2) mix_row<2>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        else mix_row<3>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        return;
    }
    const int fine = std::min(fine_values(a, k) / 16, k.value_vectors);
    if (are_few(a, rows)) {
        if (rows == 2) mix_few<2>(a, p, j, begin, tokens, row, fine, s);
        else mix_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.value, a.value, p, j, begin, t, tokens, true, s);
        unpack_values(k, z, codes + t / 4 * k.value_vectors);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        Weights weights[ROWS];
        State* states = s.states + row + first;
        const int parts = split_for<ROWS>(a, fine, row + first, whole, weights, s);
        if (parts == 2) mix_block<ROWS, 2>(0, fine, whole / 4, weights, states, s);
        else mix_block<ROWS, 3>(0, fine, whole / 4, weights, states, s);
        mix_block<ROWS, 1>(fine, k.value_vectors, whole / 4, weights, states, s);
    });
}

#endif
// ------------------------------------------------------------------------------------------------ products of words

#if WORDS

// To each of 8 sums, two words of codes times two others. As instructions of their own: given intrinsics, GCC keeps
// some of the sums in memory.
INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i factors) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(factors));
    return sum;
#else
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(factors));
    return sum;
#endif
}

INLINE __m256i load_words(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// 16 bytes of two rows.
INLINE __m256i two_rows(const uint8_t* a, const uint8_t* b) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 16 bytes of 8 rows -> out[i]: dword i of each.
INLINE void transpose_dwords(const uint8_t* rows, int64_t stride, __m256i* out) {
    __m256i x[4];
    UNROLL(4) for (int i = 0; i < 4; i++) x[i] = two_rows(rows + i * stride, rows + (i + 4) * stride);
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
}

// 16 bytes of 16 rows -> out[i]: word i of each, `step` vectors from one to the next.
INLINE void transpose_words(const Sixteen& rows, int offset, int64_t step, __m256i* out) {
    __m256i x[8], y[8];
    UNROLL(8) for (int i = 0; i < 8; i++) x[i] = two_rows(rows[i] + offset, rows[i + 8] + offset);
    UNROLL(4) for (int i = 0; i < 4; i++) {
        y[i] = _mm256_unpacklo_epi16(x[2 * i], x[2 * i + 1]), y[i + 4] = _mm256_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    UNROLL(2) for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(y[i], y[i + 1]), b = _mm256_unpackhi_epi32(y[i], y[i + 1]);
        const __m256i c = _mm256_unpacklo_epi32(y[i + 2], y[i + 3]), d = _mm256_unpackhi_epi32(y[i + 2], y[i + 3]);
        _mm256_store_si256(out + i * step, _mm256_unpacklo_epi64(a, c));
        _mm256_store_si256(out + (i + 1) * step, _mm256_unpackhi_epi64(a, c));
        _mm256_store_si256(out + (i + 2) * step, _mm256_unpacklo_epi64(b, d));
        _mm256_store_si256(out + (i + 3) * step, _mm256_unpackhi_epi64(b, d));
    }
}

INLINE __m256i in_both_halves(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
}

// What 32 windows stand for.
INLINE __m256i codes_of_windows(__m256i windows, __m256i levels, __m256i offsets, __m256i order) {
    const __m256i half = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(windows, half), high = _mm256_and_si256(_mm256_srli_epi16(windows, 4), half);
    const __m256i level = _mm256_shuffle_epi8(levels, _mm256_xor_si256(high, _mm256_shuffle_epi8(order, low)));
    return _mm256_add_epi8(level, _mm256_shuffle_epi8(offsets, low));
}

// What a ring stands for in 16 rows, `step` bytes from one to the next.
void look_up(const Ring& ring, const Sixteen& rows, uint8_t* to, int64_t step) {
    const __m256i levels = in_both_halves(LEVELS), offsets = in_both_halves(OFFSETS), order = in_both_halves(ORDER);
    const Spread& its = SPREADS[ring.bits - 1];
    const __m256i first = in_both_halves(its.bytes[0]), second = in_both_halves(its.bytes[1]);
    const __m256i factor = in_both_halves(its.factor[0]), factor_of_second = in_both_halves(its.factor[1]);
    const int last = ring.bits * ring.width / 8 - 1;
    UNROLL(1) for (int t = 0; t < 16; t++, to += step) {
        const uint8_t* row = rows[t] + ring.byte;
        const __m128i begin = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        __m128i low = _mm_insert_epi8(_mm_slli_si128(begin, 1), row[last], 0);
        UNROLL(1) for (int i = 0; i < ring.width; i += 32) {
            const uint8_t* from = row + i / 8 * ring.bits - 1;
            if (i) low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * ring.bits));
            const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            const __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, first), factor);
            const __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, second), factor_of_second);
            const __m256i windows = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            const __m256i codes = codes_of_windows(windows, levels, offsets, order);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), codes);
        }
    }
}

// Rows as they are taken apart: with what their trellis codes stand for, if they have any.
INLINE Sixteen looked_up(const Side& side, const Sixteen& rows, Scratch& s) {
    const int64_t step = side.layout.looked_up;
    if (!step) return rows;
    UNROLL(1) for (int t = 0; t < 16; t++) {
        for (int i = 0; i < side.bytes; i += 32) {
            const auto* from = reinterpret_cast<const __m256i*>(rows[t] + i);
            _mm256_store_si256(reinterpret_cast<__m256i*>(s.looked_up + t * step + i), _mm256_loadu_si256(from));
        }
    }
    for (const Ring& ring : side.layout.rings) look_up(ring, rows, s.looked_up + ring.at, step);
    return {{s.looked_up, s.looked_up + SIDE_BY_SIDE * step}, step};
}

// Words shifted to the left, or with a negative count to the right.
template <int COUNT>
INLINE __m256i shifted(__m256i x) {
    if constexpr (COUNT == 0) return x;
    else if constexpr (COUNT > 0) return _mm256_slli_epi16(x, COUNT);
    else return _mm256_srli_epi16(x, -COUNT);
}

// Code K of each word of `high`, with its lower bits from `low`, at the upper end of a byte.
template <int HIGH, int LOW, int K>
INLINE __m256i code_of(__m256i high, __m256i low) {
    constexpr int TOP = 8 - HIGH, NEXT = TOP - LOW;
    const __m256i code = shifted<TOP - HIGH * K>(high) & _mm256_set1_epi16(((1 << HIGH) - 1) << TOP);
    if constexpr (LOW == 0) return code;
    else return code | (shifted<NEXT - LOW * K>(low) & _mm256_set1_epi16(((1 << LOW) - 1) << NEXT));
}

// Where bytes of both words of four dwords come from: byte `at` of each and the next one, or the same one.
#define SPREAD_BYTES(a, b) {a, 128, b, 128, a + 4, 128, b + 4, 128, a + 8, 128, b + 8, 128, a + 12, 128, b + 12, 128}
alignas(16) constexpr uint8_t SPREAD[2][4][16] = {
    {SPREAD_BYTES(0, 1), SPREAD_BYTES(1, 2), SPREAD_BYTES(2, 3), SPREAD_BYTES(3, 3)},
    {SPREAD_BYTES(0, 0), SPREAD_BYTES(1, 1), SPREAD_BYTES(2, 2), SPREAD_BYTES(3, 3)},
};

// A dword of keys in its form: codes in both words.
template <Form FORM>
INLINE __m256i in_words(__m256i x, int at) {
    if constexpr (FORM == FOUR_BYTES) return x;
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD[FORM == ONE_BYTE][at]));
    x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(bytes));
    if constexpr (FORM == TWO_BYTES) return x;
    return _mm256_blend_epi16(x, _mm256_srli_epi16(x, 4), 0xaa);
}

// Calls f(bits of the first plane, of the second).
template <class F>
INLINE void with_planes(int bits, F f) {
    const auto call = [&](auto high, auto low) { f(high, low); };
    typedef std::integral_constant<int, 0> None;
    typedef std::integral_constant<int, 1> One;
    typedef std::integral_constant<int, 2> Two;
    typedef std::integral_constant<int, 4> Four;
    switch (bits) {
        case 1: return call(One(), None());
        case 2: return call(Two(), None());
        case 3: return call(Two(), One());
        case 4: return call(Four(), None());
        case 5: return call(Four(), One());
        case 6: return call(Four(), Two());
        default: return call(std::integral_constant<int, 8>(), None());
    }
}

// Calls f(K) for K < COUNT as compile-time numbers.
template <class F, int... K>
INLINE void for_each(F f, std::integer_sequence<int, K...>) {
    (f(std::integral_constant<int, K>()), ...);
}

// 16 tokens of keys -> dwords [2, 4 pieces], and halves [channels, TILE] of float16 channels.
INLINE void unpack_keys(const Layout& layout, const Sixteen& rows, __m256i* dwords, float* halves) {
    for (int v = 0; v < 16; v += 8, halves += 8) {
        for (const int piece : layout.pieces) {
            transpose_dwords(rows[v] + piece, rows.stride, dwords);
            dwords += 4;
        }
        float* half = halves;
        for (const int piece : layout.half_pieces) {
            UNROLL(4) for (int i = 0; i < 4; i++, half += 2 * TILE) {
                const __m256i x = load_words(dwords + 4 * (piece - int(layout.pieces.size())) + i);
                const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(x, 16);
                const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
                _mm256_store_ps(half, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
                _mm256_store_ps(half + TILE, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
            }
        }
    }
}

constexpr int MOST_KEY_ROWS = 10, MOST_VALUE_ROWS = 5;  // with sums of all there are registers for codes

constexpr float LARGEST = 32600.0f;  // the largest word, and 1/256 of the largest number that has a byte below

// 16 integers as words, and where `low` is not null as the signed bytes below them.
INLINE void store_words(__m256i a, __m256i b, int16_t* high, int16_t* low) {
    const auto joined = [](__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8); };
    if (low) {
        const __m256i byte = _mm256_set1_epi32(255), half = _mm256_set1_epi32(128);
        const __m256i bytes = joined(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        const __m256i digits = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(low), digits);
        a = _mm256_srai_epi32(_mm256_add_epi32(a, half), 8), b = _mm256_srai_epi32(_mm256_add_epi32(b, half), 8);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), joined(a, b));
}

INLINE __m256 floats_of_words(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

// A query of floats in the order of channels -> its parts, and what one stands for. What the middle of all codes adds
// to a logit: by all digits but the lowest, and by the lowest. All channels have the same digits.
void to_parts(const Kernel& k, const float* query, int, int8_t* to, float& unit, float& middle, float& lowest, float&) {
    const int count = k.key.layout.count(), padded = 2 * k.key_dwords;
    int16_t* parts = reinterpret_cast<int16_t*>(to);
    float largest = 0, none = 0;
    for (int i = 0; i < count; i++) {
        const float q = query[k.key.layout.codes[i].channel] * k.key_factor[i];
        largest = std::max(largest, std::abs(q));
        none += q * 0.0f;  // NaN stays NaN
    }
    const float inverse = largest > 1e-30f ? 256 * LARGEST / largest : 0.0f;
    __m256 sum = {}, low = {};
    for (int i = 0; i < padded; i += 16) {
        alignas(32) float q[16] = {};
        for (int n = 0; n < std::min(count - i, 16); n++) {
            q[n] = query[k.key.layout.codes[i + n].channel] * k.key_factor[i + n] * inverse;
        }
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(q)), b = _mm256_cvtps_epi32(_mm256_load_ps(q + 8));
        store_words(a, b, parts + padded + i, parts + i);
        for (int n = i; n < i + 16; n += 8) {
            sum += floats_of_words(parts + padded + n) * _mm256_loadu_ps(k.key_middle.data() + n);
            low += floats_of_words(parts + n) * _mm256_loadu_ps(k.key_middle.data() + n);
        }
    }
    unit = largest / (256 * LARGEST) + none;
    middle = sum_of(sum) * unit * 256;
    lowest = sum_of(low) * unit;
}

// Parts of queries of `rows` rows from `row` on, [2, pairs] of each -> [2, pairs, ROWS] of each block of them.
void arrange_queries(const Arguments&, int64_t row, int rows, Scratch& s) {
    const Kernel& k = s.kernel;
    const int64_t dwords = k.key_dwords;
    const auto* from = reinterpret_cast<const int32_t*>(s.parts) + 2 * (s.rows + row) * dwords;
    for_blocks_of_rows<MOST_KEY_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        auto* to = reinterpret_cast<int32_t*>(s.parts) + 2 * (row + first) * dwords;
        for (int r = 0; r < ROWS; r++, from += 2 * dwords) {
            for (int i = 0; i < 2 * dwords; i++) to[i * ROWS + r] = from[i];
        }
    });
}

// Tokens of keys at once: 8 for each vector, as many as there are registers for sums.
constexpr int vectors_of_keys(int rows) { return rows <= 4 ? 2 : 1; }

// Adds the codes of a run of keys times a part of queries [pairs, ROWS] to sums.
template <Form FORM, int HIGH, int LOW, int ROWS, int VECTORS>
INLINE void add_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                    __m256i (&to)[ROWS][VECTORS]) {
    constexpr int COUNT = 16 / HIGH >> int(FORM);
    constexpr Form LOWER = LOW == 0 ? FOUR_BYTES : COUNT * LOW == 8 ? TWO_BYTES : ONE_BYTE;
    __m256i sums[ROWS][VECTORS];
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = to[r][v];
    UNROLL(1) for (const Group& g : run.groups) {
        __m256i high[VECTORS], low[VECTORS];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            high[v] = in_words<FORM>(load_words(dwords + v * lanes + g.high), g.high_at);
            low[v] = LOW ? in_words<LOWER>(load_words(dwords + v * lanes + g.low), g.low_at) : high[v];
        }
        for_each(
            [&](auto k) {
                constexpr int K = decltype(k)::value;
                __m256i codes[VECTORS];
                UNROLL(2) for (int v = 0; v < VECTORS; v++) codes[v] = code_of<HIGH, LOW, K>(high[v], low[v]);
                UNROLL(10) for (int r = 0; r < ROWS; r++) {
                    const __m256i q = _mm256_set1_epi32(query[ROWS * K + r]);
                    UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], codes[v], q);
                }
            },
            std::make_integer_sequence<int, COUNT>());
        query += ROWS * COUNT;
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) to[r][v] = sums[r][v];
}

template <int ROWS, int VECTORS>
INLINE void add_any_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                        __m256i (&sums)[ROWS][VECTORS]) {
    with_planes(run.bits, [&](auto high, auto low) {
        constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
        if (run.form == FOUR_BYTES) return add_run<FOUR_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        if constexpr (HIGH <= 2) {
            if (run.form == TWO_BYTES) return add_run<TWO_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        }
        if constexpr (HIGH == 1) add_run<ONE_BYTE, HIGH, LOW>(run, dwords, lanes, query, sums);
    });
}

// Products of a part of queries with codes of 8 VECTORS tokens.
template <int ROWS, int VECTORS>
INLINE void products_of_keys(const Kernel& k, const Scratch& s, int64_t row, int part, int vector,
                             __m256 (&x)[ROWS][VECTORS]) {
    const auto* query = reinterpret_cast<const int32_t*>(s.parts) + (2 * row + part * ROWS) * k.key_dwords;
    const int lanes = 4 * int(k.key.layout.pieces.size());
    const auto* dwords = reinterpret_cast<const __m256i*>(s.codes) + vector * lanes;
    __m256i sums[ROWS][VECTORS];
    const auto for_all = [&](auto f) {
        UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) f(x[r][v], sums[r][v]);
    };
    for_all([](__m256& x, __m256i& sum) { x = __m256{}, sum = __m256i{}; });
    for (const Run& run : k.key.layout.runs) {
        if (run.follows_floats) {
            for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum), sum = __m256i{}; });
        }
        add_any_run<ROWS, VECTORS>(run, dwords, lanes, query, sums);
        query += ROWS * run.count * int(run.groups.size());
    }
    for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum); });
}

// Logits without the lowest bytes of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int vector, Scratch& s) {
    const Kernel& k = s.kernel;
    __m256 x[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(k, s, row, 1, vector, x);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (x[r][v] * (s.unit[row + r] * 256) - s.middle[row + r]) * _mm256_load_ps(s.scale + t + 8 * v);
        }
    }
    for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            const __m256 half = _mm256_load_ps(s.halves + i * TILE + t + 8 * v);
            UNROLL(10) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
        }
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) _mm256_store_ps(s.logits + (row + r) * TILE + t + 8 * v, x[r][v]);
    }
}

// What the lowest bytes add to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, int vector, Scratch& s) {
    __m256 sums[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(s.kernel, s, row, 0, vector, sums);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 8 * v;
            const __m256 more = sums[r][v] * s.unit[row + r] - s.lowest[row + r];
            _mm256_store_ps(x, _mm256_load_ps(x) + more * _mm256_load_ps(s.scale + t + 8 * v));
        }
    }
}

// One of both for 16 tokens.
template <int ROWS>
void score_sixteen(int64_t row, int t, bool low, Scratch& s) {
    constexpr int VECTORS = vectors_of_keys(ROWS);
    UNROLL(1) for (int v = 0; v < 2; v += VECTORS) {
        if (low) score_low<ROWS, VECTORS>(row, t + 8 * v, v, s);
        else score_high<ROWS, VECTORS>(row, t + 8 * v, v, s);
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    __m256i* dwords = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s), s);
        unpack_keys(k.key.layout, z, dwords, s.halves + t);
        for_blocks_of_rows<MOST_KEY_ROWS>(
            rows, [&](int first, auto count) { score_sixteen<decltype(count)::value>(row + first, t, false, s); });
    }
    if (a.digits == 2) return;
    set_limits(a, row, rows, s);
    for (int t = 0; t < whole; t += 16) {
        bool are_there = false;
        for_blocks_of_rows<MOST_KEY_ROWS>(rows, [&](int first, auto count) {
            constexpr int ROWS = decltype(count)::value;
            if (are_minor<ROWS>(row + first, t, 16, s)) return;
            const auto z = [&] {
                return looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s), s);
            };
            if (!are_there) unpack_keys(k.key.layout, z(), dwords, s.halves + t);
            are_there = true;
            score_sixteen<ROWS>(row + first, t, true, s);
        });
    }
}

// Weights of a tile of values times the tokens' scales, as words and where they count as the bytes below.
INLINE void split_weights(int64_t row, int whole, int64_t digits, Scratch& s) {
    float* w = s.logits + row * TILE;
    __m256 top = {}, sum = {};
    for (int t = 0; t < whole; t += 8) {
        const __m256 scaled = _mm256_load_ps(w + t) * _mm256_load_ps(s.scale + t);
        _mm256_store_ps(w + t, scaled);
        sum += scaled;
        top = _mm256_max_ps(scaled, top);
    }
    const float largest = largest_of(top);
    State& state = s.states[row];
    Split& split = s.splits[row];
    state.mass += sum_of(sum);
    split.low = digits > 2 && !(largest * SMALL <= state.mass);
    const float limit = split.low ? 256 * LARGEST : LARGEST, inverse = largest > 1e-30f ? limit / largest : 0.0f;
    int16_t* parts = reinterpret_cast<int16_t*>(s.weights) + 2 * row * TILE;
    Ints8 total = {};
    for (int t = 0; t < whole; t += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(w + t) * inverse);
        const __m256i b = _mm256_cvtps_epi32(_mm256_load_ps(w + t + 8) * inverse);
        total += (Ints8)a + (Ints8)b;
        store_words(a, b, parts + TILE + t, split.low ? parts + t : nullptr);
    }
    split.unit = largest / limit;
    int32_t whole_total = 0;
    UNROLL(8) for (int i = 0; i < 8; i++) whole_total += total[i];
    split.total = float(whole_total);
}

// Of each 128 bits of x and y, two sums of two lanes of x and y each.
INLINE __m256i sums_of_dwords(__m256i x, __m256i y) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}

// Codes K and K + 1 of all words of a tile, `low` bits `at` in a word, times weights: to sums [rows, 2, R_V].
template <int HIGH, int LOW, int K, int ROWS>
INLINE void multiply_values(const __m256i* high, const __m256i* low, __m128i at, const int16_t* weights, int vectors,
                            int pad, int32_t* to) {
    __m256i sums[ROWS][2];
    UNROLL(5) for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = __m256i{};
    UNROLL(1) for (int t = 0; t < vectors; t++) {
        const __m256i x = load_words(high + t), y = LOW ? _mm256_srl_epi16(load_words(low + t), at) : x;
        const __m256i a = code_of<HIGH, LOW, K>(x, y), b = code_of<HIGH, LOW, K + 1>(x, y);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const __m256i w = load_words(weights + 2 * r * TILE + 16 * t);
            sums[r][0] = add_products(sums[r][0], a, w);
            sums[r][1] = add_products(sums[r][1], b, w);
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r += 2) {
        const int other = std::min(r + 1, ROWS - 1);
        const __m256i x = sums_of_dwords(sums[r][0], sums[r][1]), y = sums_of_dwords(sums[other][0], sums[other][1]);
        const __m256i z = _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * r * pad), four);
        if (other == r) continue;
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * other * pad), _mm_unpackhi_epi64(four, four));
    }
}

// The codes of a run of values from a channel on, times a part of weights.
template <int HIGH, int LOW, int ROWS>
void mix_run(const Run& run, const __m256i* words, const int16_t* weights, int vectors, int pad, int32_t* sums) {
    for (const Group& g : run.groups) {
        const __m128i at = _mm_cvtsi32_si128(g.low_at);
        const __m256i *high = words + g.high * vectors, *low = words + g.low * vectors;
        for_each(
            [&](auto k) {
                constexpr int K = 2 * decltype(k)::value;
                if (K >= run.count) return;
                multiply_values<HIGH, LOW, K, ROWS>(high, low, at, weights, vectors, pad, sums + K);
            },
            std::make_integer_sequence<int, 8 / HIGH>());
        sums += run.count;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const Kernel& k = s.kernel;
    const Layout& layout = k.value.layout;
    const int whole = whole_vectors(tokens), vectors = whole / 16;
    __m256i* words = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    for (int t = 0; t < vectors; t++) {
        const Sixteen z = looked_up(k.value, rows_of(a, k.value, a.value, p, j, begin, 16 * t, tokens, true, s), s);
        __m256i* to = words + t;
        for (const int piece : layout.pieces) {
            transpose_words(z, piece, vectors, to);
            to += 8 * vectors;
        }
    }
    for (int r = 0; r < rows; r++) split_weights(row + r, whole, a.digits, s);
    for_blocks_of_rows<MOST_VALUE_ROWS>(rows, [&](int first, auto block) {
        constexpr int ROWS = decltype(block)::value;
        const int16_t* weights = reinterpret_cast<const int16_t*>(s.weights) + 2 * (row + first) * TILE;
        int32_t* sums = s.products + 2 * (row + first) * k.value.pad;
        bool any = false;
        for (int r = 0; r < ROWS; r++) any |= s.splits[row + first + r].low;
        for (const Run& run : layout.runs) {
            with_planes(run.bits, [&](auto high, auto low) {
                constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
                const int pad = k.value.pad;
                mix_run<HIGH, LOW, ROWS>(run, words, weights + TILE, vectors, pad, sums + pad);
                if (any) mix_run<HIGH, LOW, ROWS>(run, words, weights, vectors, pad, sums);
            });
            sums += run.count * int(run.groups.size());
        }
    });
    for (int64_t r = row; r < row + rows; r++) {
        const Split& split = s.splits[r];
        const int32_t *low = s.products + 2 * r * k.value.pad, *high = low + k.value.pad;
        float* sum = s.states[r].sum;
        for (int c = 0; c < k.value.width; c += 8) {
            __m256 x = _mm256_cvtepi32_ps(load_words(high + c));
            if (split.low) x = x * 256.0f + _mm256_cvtepi32_ps(load_words(low + c));
            const __m256 middle = _mm256_loadu_ps(k.value.middle.data() + c);
            _mm256_store_ps(sum + c, _mm256_load_ps(sum + c) + (x - split.total * middle) * split.unit);
        }
    }
}

#endif

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
                mix<decltype(count)::value>(
                    s.logits + r * TILE, s.totals + r, middle, side.pad, z, tokens, s.states + r);
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
        return {b, unit * heads, heads, query, std::min(queries, a.queries - query),
                range * tokens, std::min(listed.count, (range + 1) * tokens), listed};
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

extern "C" const void* table_ab5d923f() {
    static const Tier keys[] = {  // bits, width, step; none where rows are not quantized
        {8, 16, 0.02},
        {4, 32, 0.25},
    };
    static const Tier values[] = {
        {3, 32, 0.5},
        {16, 16, 0.0},
    };
    static const void* const kernel = new_kernel(keys, 2, 48, values, 2, 48, 1, 1);
    return kernel;
}
