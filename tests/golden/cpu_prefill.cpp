// open_attention
//
// Attention of many queries to keys and values as they are, as a prompt asks for it:
//
//     x[s][t] = cap(scale * q[s] . k[t]) + mask[s][t]    o[s] = sum_t softmax(x)[s][t] v[t]    lse[s] = log sum_t e^x
//
//     q [B,H,S,D]   k [B,G,T,D]   v [B,G,T,E]   mask [B,H,S,T]   ->   o [B,H,S,E]   lse [B,H,S]
//
//     B batch, H query heads, G kv heads, S queries, T keys, D and E head size of keys and values
//
// A block of queries of one head walks over the keys, a tile at a time, and keeps the largest logit, the sum of weights
// and the mix of values that it has so far (online softmax: arXiv 1805.02867, 2205.14135). Tiles that no query of the
// block sees are left out. Both products run on sums of ROWS by up to COLUMNS vectors; keys and values are brought
// into the order in which these read them once for all queries:
//
//     keys      panels of COLUMNS vectors of tokens        [D'][tokens]
//     values    panels of up to COLUMNS vectors of sizes   [T'][sizes]
//
// With AVX-512 BF16 or AMX, neighbours of D and T are pairs of bfloat16, which one instruction multiplies and adds;
// weights are rounded to bfloat16. AMX multiplies 16 rows of 32 numbers by 16 columns at once, and D' is filled up to
// 16 pairs. Other numbers become floats, and D' is D, T' is T.
//
// Build: c++ -O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX_UNIT true
#else
#define MATRIX_UNIT false
#endif

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
// ------------------------------------------------------------------------------------------------ numbers

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const float magnitude = std::abs(x);
    if (x != x) return uint16_t(sign | 0x7e00);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
    const float step = magnitude < 0x1p-14f ? 0x1p-24f : std::ldexp(1.0f, std::ilogb(magnitude) - 10);
    const float whole = std::nearbyint(magnitude / step) * step;  // on the grid of float16
    uint32_t there;
    std::memcpy(&there, &whole, sizeof there);
    if (whole < 0x1p-14f) return uint16_t(sign | uint16_t(whole * 0x1p24f));
    return uint16_t(sign | (((there >> 23) - 112) << 10 | (there >> 13 & 0x3ff)));
#endif
}

// sum + x * w, rounded once where the CPU can: compilers would choose so for some numbers of rows and not for others.
INLINE Floats add_product(Floats sum, Floats x, Floats w) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return sum + x * w;
#endif
}

INLINE float add_product(float sum, float x, float w) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(x, w, sum);
#else
    return sum + x * w;
#endif
}

// What differs between types: how STEP numbers of the weight and of the input are read, and multiplied.
template <class Stored>
struct Floating {
    typedef typename Stored::Number Element, Weight;  // of input and output, of the weight
    typedef float Input;
    typedef Floats Vector;
    static constexpr int STEP = LANES;

    static INLINE int64_t place(int64_t k) { return k; }  // of the k-th number of a row of the input
    static INLINE Vector weight(const Element* p) { return Stored::load(p); }
    static INLINE Vector input(const Input* p) { return load(p); }
    static INLINE Floats add(Floats sum, Vector x, Vector w) { return add_product(sum, x, w); }
};

INLINE Floats floats_of_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Floats x;
    for (int i = 0; i < LANES; i++) x[i] = p[i];
    return x;
#endif
}

struct OfFloat32 : Floating<Float32> {
    static INLINE float number(Element x) { return x; }
    static INLINE Element rounded(float x) { return x; }
    static INLINE Input prepared(Element x) { return x; }
};

struct OfBFloat16 : Floating<BFloat16> {
    static INLINE float number(Element x) { return from_bits(uint32_t(x) << 16); }
    static INLINE Element rounded(float x) { return to_bfloat16(x); }
    static INLINE Input prepared(Element x) { return number(x); }
};

#if defined(__AVX512BF16__)
struct OfBFloat16Pairs : OfBFloat16 {
    typedef uint16_t Input;
    typedef __m512i Vector;
    static constexpr int STEP = 32;

    static INLINE Vector weight(const Element* p) { return _mm512_loadu_si512(p); }
    static INLINE Vector input(const Input* p) { return _mm512_loadu_si512(p); }
    static INLINE Floats add(Floats sum, Vector x, Vector w) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }
    static INLINE Input prepared(Element x) { return x; }
};
#else
// The even and the odd numbers of 2 LANES: no number moves to another lane, which costs more than to multiply.
struct OfBFloat16Pairs : OfBFloat16 {
    struct Vector {
        Floats even, odd;
    };
    static constexpr int STEP = 2 * LANES;

    static INLINE int64_t place(int64_t k) { return k / STEP * STEP + k % 2 * LANES + k % STEP / 2; }
    static INLINE Vector weight(const Element* p) {
        Ints pairs;
        std::memcpy(&pairs, p, sizeof pairs);
        return {(Floats)(pairs << 16), (Floats)(pairs & int32_t(0xffff0000))};
    }
    static INLINE Vector input(const Input* p) { return {load(p), load(p + LANES)}; }
    static INLINE Floats add(Floats sum, Vector x, Vector w) {
        return add_product(add_product(sum, x.even, w.even), x.odd, w.odd);
    }
};
#endif

struct OfFloat16 : Floating<Float16> {
    static INLINE float number(Element x) { return from_float16(x); }
    static INLINE Element rounded(float x) { return to_float16(x); }
    static INLINE Input prepared(Element x) { return number(x); }
};

// Weights of signed bytes; input and output are those of T.
template <class T>
struct OfBytes : T {
    typedef int8_t Weight;

    static INLINE typename T::Vector weight(const Weight* p) { return floats_of_bytes(p); }
};

// ------------------------------------------------------------------------------------------------ a block

constexpr int BLOCK_ROWS = 8;  // rows of the input that are multiplied at once

constexpr int columns_for(int rows) {  // as many sums as registers hold beside what is read
    return std::clamp((LANES == 16 ? 24 : 10) / rows, 1, 8);
}

// Rows of the weight are `weight_row` apart; those of the next call, which only several rows of input fetch ahead, are
// `next` behind these.
template <class T, int ROWS, int COLUMNS>
INLINE void multiply(const typename T::Input* input, int64_t stride, const typename T::Weight* weight,
                     int64_t weight_row, int64_t next, int64_t width, float* sums) {
    Floats sum[ROWS][COLUMNS] = {};
    const auto add = [&](int64_t i, const typename T::Vector (&w)[COLUMNS]) {
        UNROLL(8) for (int r = 0; r < ROWS; r++) {
            const auto x = T::input(input + r * stride + i);
            UNROLL(8) for (int c = 0; c < COLUMNS; c++) sum[r][c] = T::add(sum[r][c], x, w[c]);
        }
    };
    const int64_t whole = width / T::STEP * T::STEP;
    if (ROWS == 1) {  // a weight is used once: it needs no register of its own
        UNROLL(1) for (int64_t i = 0; i < whole; i += T::STEP) {
            const auto x = T::input(input + i);
            UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
                sum[0][c] = T::add(sum[0][c], x, T::weight(weight + c * weight_row + i));
            }
        }
    }
    UNROLL(1) for (int64_t i = ROWS == 1 ? whole : 0; i < whole; i += T::STEP) {
        typename T::Vector w[COLUMNS];
        UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
            w[c] = T::weight(weight + c * weight_row + i);
            // Into the second-level cache; of one row of input the CPU's own prefetching is faster.
            __builtin_prefetch(weight + c * weight_row + next + i, 0, 2);
        }
        add(i, w);
    }
    if (whole < width) {
        typename T::Vector w[COLUMNS];
        UNROLL(8) for (int c = 0; c < COLUMNS; c++) {
            typename T::Weight rest[T::STEP] = {};
            std::memcpy(rest, weight + c * weight_row + whole, (width - whole) * sizeof *rest);
            w[c] = T::weight(rest);
        }
        add(whole, w);
    }
    constexpr int ALL = ROWS * COLUMNS;
    const Floats* all = &sum[0][0];
    UNROLL(8) for (int i = 0; i + 4 <= ALL; i += 4) {
        store(sums + i, sums_of(all[i], all[i + 1], all[i + 2], all[i + 3]));
    }
    UNROLL(4) for (int i = ALL / 4 * 4; i < ALL; i++) sums[i] = sum_of(all[i]);
}
// ------------------------------------------------------------------------------------------------ types

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

void to_floats(const uint8_t* from, Type type, int64_t count, float* to) {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    if (type == FLOAT32) std::memcpy(to, from, count * sizeof *to);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = from_bits(uint32_t(halves[i]) << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_float16(halves[i]);
}

void from_floats(const float* from, Type type, int64_t count, uint8_t* to) {
    auto* halves = reinterpret_cast<uint16_t*>(to);
    if (type == FLOAT32) std::memcpy(to, from, count * sizeof *from);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) halves[i] = to_float16(from[i]);
}

constexpr int64_t bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

// A float16, made of a float and read as one.
struct HalfBits {
    uint16_t bits;
    explicit HalfBits(float x) : bits(to_float16(x)) {}
    explicit operator float() const { return from_float16(bits); }
};

constexpr int VECTOR_ROWS = 6, COLUMNS = LANES == 16 ? 4 : 2;  // of sums in registers: rows, vectors of a row
constexpr int64_t PANEL = COLUMNS * LANES;                     // numbers of a row of a panel

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t up_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }  // the next multiple of b

INLINE Ints load_words(const uint32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// out [VECTOR_ROWS][N vectors] (+)= left [VECTOR_ROWS][depth] . right [depth][N vectors]
template <class K, int N, bool ADDS>
INLINE void multiply_rows(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t depth, float* out,
                          int64_t out_row) {
    Floats sum[VECTOR_ROWS][N];
    UNROLL(6) for (int r = 0; r < VECTOR_ROWS; r++) {
        UNROLL(4) for (int c = 0; c < N; c++) sum[r][c] = ADDS ? load(out + r * out_row + c * LANES) : Floats{};
    }
    constexpr int HALF = VECTOR_ROWS / 2;  // of the rows: so few offsets stay in registers
    const uint32_t *upper = left, *lower = left + HALF * left_row;
    UNROLL(1) for (int64_t i = 0; i < depth; i++, upper++, lower++) {
        Ints panel[N];
        UNROLL(4) for (int c = 0; c < N; c++) panel[c] = load_words(right + (i * N + c) * LANES);
        UNROLL(3) for (int r = 0; r < HALF; r++) {
            UNROLL(4) for (int c = 0; c < N; c++) {
                sum[r][c] = K::add(sum[r][c], upper[r * left_row], panel[c]);
                sum[HALF + r][c] = K::add(sum[HALF + r][c], lower[r * left_row], panel[c]);
            }
        }
    }
    UNROLL(6) for (int r = 0; r < VECTOR_ROWS; r++) {
        UNROLL(4) for (int c = 0; c < N; c++) store(out + r * out_row + c * LANES, sum[r][c]);
    }
}

// Words that hold a float.
struct FloatWords {
    static INLINE Floats add(Floats sum, uint32_t left, Ints right) {
        return add_product(sum, from_bits(left) - Floats{}, (Floats)right);  // x + 0 is not x where x is -0
    }
};

// ------------------------------------------------------------------------------------------------ arguments

enum MaskKind : int64_t { NONE, BOOL, ADDITIVE };

struct Rows {
    const uint8_t* data;
    int64_t strides[3];  // batch, head, token; in numbers, of which those of a row are dense
};

struct Arguments {
    int64_t batch, heads, groups, queries, tokens, key_size, value_size, threads;
    Type type;  // of queries, keys and values
    Rows query, key, value;
    MaskKind mask_kind;
    const void* mask;
    int64_t mask_strides[4];  // the last is 0 or 1
    const int64_t* spans;  // [S,2], or null: which keys a query may see, from the first to behind the last
    Type output_type;
    uint8_t* output;
    int64_t output_strides[3];
    float* lse;  // [B,H,S]
    double scale, softcap;

    const uint8_t* row(const Rows& rows, int64_t b, int64_t h, int64_t t) const {
        return rows.data + (b * rows.strides[0] + h * rows.strides[1] + t * rows.strides[2]) * bytes_of(type);
    }

    int64_t first_of(int64_t query) const { return spans ? std::clamp<int64_t>(spans[2 * query], 0, tokens) : 0; }

    int64_t end_of(int64_t query) const {
        return spans ? std::clamp<int64_t>(spans[2 * query + 1], 0, tokens) : tokens;
    }
};

constexpr int64_t TILE = 256, BLOCK = 96;  // tokens and queries
constexpr int64_t MOST_BYTES = 1 << 24;  // of keys and values in order at once, if not of one head
static_assert(TILE % PANEL == 0 && TILE % 2 == 0 && BLOCK % VECTOR_ROWS == 0, "whole panels, pairs and rows");

// ------------------------------------------------------------------------------------------------ operands

// Products in vectors: those of K::add.
template <class K>
struct ByVectors {
    struct Unit {};  // what a thread needs while it multiplies
    static constexpr int64_t ROWS = VECTOR_ROWS, WORDS = 1;  // rows and depth are multiples of these

    // out [rows][N vectors] (+)= left [rows][depth] . right [depth][N vectors]
    template <int N, bool ADDS>
    static void multiply(const uint32_t* left, int64_t left_row, int64_t rows, const uint32_t* right, int64_t depth,
                         float* out, int64_t out_row) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            multiply_rows<K, N, ADDS>(left + r * left_row, left_row, right, depth, out + r * out_row, out_row);
        }
    }
};

// Numbers as floats: a word holds one.
struct Singles : FloatWords, ByVectors<FloatWords> {
    static constexpr int64_t DEPTH = 1;  // numbers in a word
    static void row(const uint8_t* from, Type type, int64_t size, uint32_t* to) {
        to_floats(from, type, size, reinterpret_cast<float*>(to));
    }
    static void pair(const uint8_t* from, const uint8_t*, Type type, int64_t size, uint32_t* to) {
        row(from, type, size, to);
    }
    static INLINE Floats power(Floats x) { return exp2(x); }
    static INLINE void weights(Floats x, uint32_t* row, int64_t t) { store(reinterpret_cast<float*>(row) + t, x); }
};

#if defined(__AVX512BF16__)
// Numbers of bfloat16: a word holds two neighbours.
struct BFloat16Words {
    static constexpr int64_t DEPTH = 2;
    static void row(const uint8_t* from, Type, int64_t size, uint32_t* to) {
        to[(size - 1) / 2] = 0;
        std::memcpy(to, from, size * 2);
    }
    static void pair(const uint8_t* even, const uint8_t* odd, Type, int64_t size, uint32_t* to) {
        const auto *low = reinterpret_cast<const uint16_t*>(even), *high = reinterpret_cast<const uint16_t*>(odd);
        if (!odd)
            for (int64_t i = 0; i < size; i++) to[i] = low[i];
        else
            for (int64_t i = 0; i < size; i++) to[i] = uint32_t(low[i]) | uint32_t(high[i]) << 16;
    }
    // 2^x to 3e-6, for x <= 0: weights are rounded to 2e-3. The polynomial's relative error is least over [0, 1).
    static INLINE Floats power(Floats x) {
        const __m512 least = _mm512_max_ps((__m512)x, _mm512_set1_ps(-150.0f));
        const Floats part = (Floats)_mm512_reduce_ps(least, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats y = part * 0.01353416775f + 0.05201146094f;
        y = y * part + 0.2414427567f;
        y = y * part + 0.6930038345f;
        y = y * part + 1.000002593f;
        return (Floats)_mm512_scalef_ps((__m512)y, least);  // times 2^floor(x)
    }
    static INLINE void weights(Floats x, uint32_t* row, int64_t t) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
        std::memcpy(reinterpret_cast<uint16_t*>(row) + t, &rounded, sizeof rounded);
    }
};

struct Pairs : BFloat16Words, ByVectors<Pairs> {
    static INLINE Floats add(Floats sum, uint32_t left, Ints right) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
    }
};
#else
typedef Singles Pairs;
#endif

// ------------------------------------------------------------------------------------------------ the matrix unit

#if MATRIX_UNIT
// Pairs in AMX: tiles of 16 rows by 16 words. Sums are tiles 0 to 3, two rows of tiles by two columns; 4 and 5 are of
// the left operand, 6 and 7 of the right one.
struct Tiles : BFloat16Words {
    static constexpr int64_t ROWS = 16, WORDS = 16;

    // Whether the system lets this process use the unit: Linux asks for that once.
    static bool are_allowed() {
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
        return allowed;
    }

    // The unit of a thread, all eight tiles of full size.
    struct Unit {
        Unit() {
            struct {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } shape;
            _tile_loadconfig(&shape);
        }
        Unit(const Unit&) = delete;
        ~Unit() { _tile_release(); }
    };

    // R by C tiles of sums.
    template <int R, int C, bool ADDS>
    static INLINE void multiply_tiles(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t right_row,
                                      int64_t depth, float* out, int64_t out_row) {
        float* below = out + ROWS * out_row;
        if constexpr (ADDS) {
            _tile_loadd(0, out, out_row * 4);
            if constexpr (C > 1) _tile_loadd(1, out + LANES, out_row * 4);
            if constexpr (R > 1) _tile_loadd(2, below, out_row * 4);
            if constexpr (R > 1 && C > 1) _tile_loadd(3, below + LANES, out_row * 4);
        } else {
            _tile_zero(0);
            if constexpr (C > 1) _tile_zero(1);
            if constexpr (R > 1) _tile_zero(2);
            if constexpr (R > 1 && C > 1) _tile_zero(3);
        }
        UNROLL(1) for (int64_t i = 0; i < depth; i += WORDS) {
            _tile_loadd(4, left + i, left_row * 4);
            if constexpr (R > 1) _tile_loadd(5, left + ROWS * left_row + i, left_row * 4);
            _tile_loadd(6, right + i * right_row, right_row * 4);
            if constexpr (C > 1) _tile_loadd(7, right + i * right_row + LANES, right_row * 4);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
            if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
            if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, out_row * 4);
        if constexpr (C > 1) _tile_stored(1, out + LANES, out_row * 4);
        if constexpr (R > 1) _tile_stored(2, below, out_row * 4);
        if constexpr (R > 1 && C > 1) _tile_stored(3, below + LANES, out_row * 4);
    }

    template <int R, int N, bool ADDS>
    static INLINE void multiply_columns(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t depth,
                                        float* out, int64_t out_row) {
        constexpr int64_t WIDTH = N * LANES;
        for (int c = 0; c + 2 <= N; c += 2) {
            multiply_tiles<R, 2, ADDS>(left, left_row, right + c * LANES, WIDTH, depth, out + c * LANES, out_row);
        }
        if constexpr (N % 2 == 1) {
            constexpr int64_t LAST = (N - 1) * LANES;
            multiply_tiles<R, 1, ADDS>(left, left_row, right + LAST, WIDTH, depth, out + LAST, out_row);
        }
    }

    template <int N, bool ADDS>
    static void multiply(const uint32_t* left, int64_t left_row, int64_t rows, const uint32_t* right, int64_t depth,
                         float* out, int64_t out_row) {
        int64_t r = 0;
        for (; r + 2 * ROWS <= rows; r += 2 * ROWS) {
            multiply_columns<2, N, ADDS>(left + r * left_row, left_row, right, depth, out + r * out_row, out_row);
        }
        if (r < rows) {
            multiply_columns<1, N, ADDS>(left + r * left_row, left_row, right, depth, out + r * out_row, out_row);
        }
    }
};
static_assert(BLOCK % Tiles::ROWS == 0 && PANEL / 2 % Tiles::WORDS == 0 && LANES == Tiles::ROWS, "whole tiles");
#endif

// ------------------------------------------------------------------------------------------------ products

// How sizes of values are cut into panels: as few as registers allow, as even as can be.
struct ValuePanels {
    int64_t count, vectors;  // vectors of each

    explicit ValuePanels(int64_t size) {
        const int64_t all = ceil_div(size, LANES);
        count = ceil_div(all, COLUMNS);
        vectors = ceil_div(all, count);
    }
    int64_t panel() const { return vectors * LANES; }
    int64_t size() const { return count * panel(); }  // with what pads it
};

template <class K, int... I>
INLINE void mix_panel(std::integer_sequence<int, I...>, int64_t vectors, const uint32_t* weights, int64_t weight_row,
                      int64_t rows, const uint32_t* values, int64_t depth, float* out, int64_t out_row) {
    ((vectors == I + 1 ? K::template multiply<I + 1, true>(weights, weight_row, rows, values, depth, out, out_row)
                       : void()),
     ...);
}

// ------------------------------------------------------------------------------------------------ keys and values

// Keys and values of one kv head in the order in which products read them.
template <class K>
struct Ordered {
    int64_t key_depth, value_depth, tiles;  // words of a query; words of a tile's weights
    ValuePanels panels;
    uint32_t *keys, *values;

    explicit Ordered(const Arguments& a)
        : key_depth(up_to(ceil_div(a.key_size, K::DEPTH), K::WORDS)), value_depth(TILE / K::DEPTH),
          tiles(ceil_div(a.tokens, TILE)), panels(a.value_size), keys(nullptr), values(nullptr) {}

    int64_t key_words() const { return tiles * TILE * key_depth; }
    int64_t value_words() const { return tiles * value_depth * panels.size(); }
    int64_t words() const { return key_words() + value_words(); }
    uint32_t* tile_keys(int64_t tile) const { return keys + tile * TILE * key_depth; }
    uint32_t* tile_values(int64_t tile) const { return values + tile * value_depth * panels.size(); }

    void place(uint32_t* memory) {
        keys = memory;
        values = memory + key_words();
    }

    void order_keys(const Arguments& a, int64_t b, int64_t g, int64_t tile) const {
        uint32_t row[PANEL][MOST_DEPTH] = {};
        const int64_t end = std::min(a.tokens, (tile + 1) * TILE);
        for (int64_t t = tile * TILE, p = 0; t < end; t += PANEL, p++) {
            uint32_t* to = tile_keys(tile) + p * PANEL * key_depth;
            const int64_t count = std::min(PANEL, end - t);
            for (int64_t from = 0; from < key_depth; from += MOST_DEPTH) {
                const int64_t depth = std::min(MOST_DEPTH, key_depth - from), at = from * K::DEPTH;
                const int64_t size = std::min(depth * K::DEPTH, a.key_size - at);
                for (int64_t c = 0; c < count; c++)
                    K::row(a.row(a.key, b, g, t + c) + at * bytes_of(a.type), a.type, size, row[c]);
                for (int64_t i = 0; i < depth; i++) {
                    uint32_t* words = to + (from + i) * PANEL;
                    for (int64_t c = 0; c < count; c++) words[c] = row[c][i];
                    for (int64_t c = count; c < PANEL; c++) words[c] = 0;
                }
            }
        }
    }

    void order_values(const Arguments& a, int64_t b, int64_t g, int64_t tile) const {
        const int64_t first = tile * TILE, end = std::min(a.tokens, first + TILE), size = panels.panel();
        const int64_t depth = ceil_div(std::min(TILE, up_to(end - first, PANEL)), K::DEPTH);
        for (int64_t p = 0; p < panels.count; p++) {
            const int64_t start = p * size, width = std::clamp<int64_t>(a.value_size - start, 0, size);
            uint32_t* to = tile_values(tile) + p * value_depth * size;
            for (int64_t i = 0; i < depth; i++, to += size) {
                const int64_t t = first + i * K::DEPTH;
                std::fill(to + (t < end ? width : 0), to + size, 0u);
                if (t >= end || !width) continue;
                const auto at = [&](int64_t token) {
                    return token < end ? a.row(a.value, b, g, token) + start * bytes_of(a.type) : nullptr;
                };
                K::pair(at(t), at(t + 1), a.type, width, to);
            }
        }
    }

    static constexpr int64_t MOST_DEPTH = 64;  // words of a key that are moved at once
};

// ------------------------------------------------------------------------------------------------ a block of queries

// tanh, to the accuracy of exp2.
INLINE Floats tanh_of(Floats y) {
    const Floats size = y < 0.0f ? -y : y;
    const Floats e = exp2(size * float(-2 * LOG2E));
    const Floats x = (1.0f - e) / (1.0f + e);
    return y < 0.0f ? -x : x;
}

template <class K>
class Block {
    const Arguments& a;
    const Ordered<K>& ordered;
    std::unique_ptr<uint32_t, decltype(&std::free)> memory;
    uint32_t *queries, *weights;
    float *scores, *mixed, *bias;
    float top[BLOCK], total[BLOCK];
    int64_t b = 0, h = 0, first = 0, count = 0;

    static constexpr int64_t WEIGHT_ROW = TILE / K::DEPTH;

  public:
    Block(const Arguments& arguments, const Ordered<K>& o) : a(arguments), ordered(o), memory(nullptr, std::free) {
        const int64_t query = BLOCK * o.key_depth, weight = BLOCK * WEIGHT_ROW, score = BLOCK * TILE;
        const int64_t mix = BLOCK * o.panels.size();
        const int64_t bytes = up_to((query + weight + score + mix + TILE) * 4, 64);
        memory.reset(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)));
        scores = reinterpret_cast<float*>(memory.get());
        mixed = scores + score;
        bias = mixed + mix;
        weights = reinterpret_cast<uint32_t*>(bias + TILE);
        queries = weights + weight;
    }

    // Queries [from, from + size) of head `head` of sequence `sequence`; keys and values are those of its kv head.
    void attend(const Ordered<K>& group, int64_t sequence, int64_t head, int64_t from, int64_t size) {
        b = sequence, h = head, first = from, count = size;
        std::memset(queries, 0, rows() * ordered.key_depth * 4);
        for (int64_t r = 0; r < count; r++) {
            K::row(a.row(a.query, b, h, first + r), a.type, a.key_size, queries + r * ordered.key_depth);
        }
        std::fill(mixed, mixed + rows() * ordered.panels.size(), 0.0f);
        std::fill(top, top + rows(), -INF);
        std::fill(total, total + rows(), 0.0f);
        int64_t begin = a.tokens, end = 0;
        for (int64_t r = 0; r < count; r++) {
            begin = std::min(begin, a.first_of(first + r));
            end = std::max(end, a.end_of(first + r));
        }
        for (int64_t t = begin / TILE * TILE; t < end; t += TILE) {
            const int64_t tokens = std::min(TILE, end - t);
            if (is_hidden(t, tokens)) continue;
            const int64_t unseen = std::max<int64_t>(begin - t, 0) / PANEL, panels = ceil_div(tokens, PANEL);
            score(group.tile_keys(t / TILE), unseen, panels);
            for (int64_t r = 0; r < rows(); r++) weigh(r, t, tokens, panels * PANEL);
            mix(group.tile_values(t / TILE), unseen * PANEL / K::DEPTH, panels * PANEL / K::DEPTH);
        }
        finish();
    }

  private:
    int64_t rows() const { return up_to(count, K::ROWS); }

    template <class T>
    const T* mask_row(int64_t r, int64_t t) const {
        const int64_t* strides = a.mask_strides;
        const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2] + t * strides[3];
        return static_cast<const T*>(a.mask) + at;
    }

    // Whether the mask hides all of these tokens from the whole block.
    bool is_hidden(int64_t t, int64_t tokens) const {
        if (a.mask_kind != BOOL) return false;
        const int64_t read = a.mask_strides[3] ? tokens : 1;
        for (int64_t r = 0; r < (a.mask_strides[2] ? count : 1); r++) {
            if (std::memchr(mask_row<uint8_t>(r, t), 1, read)) return false;
        }
        return true;
    }

    // Panels of a tile from `begin` on, those before which no query of the block sees.
    void score(const uint32_t* keys, int64_t begin, int64_t end) {
        const int64_t depth = ordered.key_depth;
        for (int64_t p = begin; p < end; p++) {
            K::template multiply<COLUMNS, false>(queries, depth, rows(), keys + p * PANEL * depth, depth,
                                                 scores + p * PANEL, TILE);
        }
    }

    void mix(const uint32_t* values, int64_t begin, int64_t end) {
        const ValuePanels& panels = ordered.panels;
        for (int64_t p = 0; p < panels.count; p++) {
            mix_panel<K>(std::make_integer_sequence<int, COLUMNS>(), panels.vectors, weights + begin, WEIGHT_ROW,
                         rows(), values + (p * ordered.value_depth + begin) * panels.panel(), end - begin,
                         mixed + p * panels.panel(), panels.size());
        }
    }

    // Whether logits are products times a positive number, which `weigh` multiplies with as it goes.
    bool are_plain() const { return a.mask_kind == NONE && a.softcap == 0.0 && a.scale > 0.0; }

    // Turns the scores of a row into logits, in units of log 2, the first `seen` of them.
    void cap_and_mask(int64_t r, int64_t t, int64_t seen, float* x) {
        const float scale = float(a.scale * (a.softcap != 0.0 ? 1.0 / a.softcap : LOG2E));
        const float cap = float(a.softcap * LOG2E);
        for (int64_t c = 0; c < seen; c += LANES) {
            const Floats scaled = load(x + c) * scale;
            store(x + c, a.softcap != 0.0 ? tanh_of(scaled) * cap : scaled);
        }
        if (a.mask_kind == BOOL) {
            const uint8_t* mask = mask_row<uint8_t>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] ? 0.0f : -INF;
        } else if (a.mask_kind == ADDITIVE) {
            const float* mask = mask_row<float>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] * float(LOG2E);
        }
        if (a.mask_kind != NONE)
            for (int64_t c = 0; c < seen; c++) x[c] += bias[c];
    }

    // Turns the scores of a row into weights, up to column `end`.
    void weigh(int64_t r, int64_t t, int64_t tokens, int64_t end) {
        float* x = scores + r * TILE;
        uint32_t* row = weights + r * WEIGHT_ROW;
        const int64_t seen = r < count ? std::clamp<int64_t>(a.end_of(first + r) - t, 0, tokens) : 0;
        const int64_t begin = r < count ? std::clamp<int64_t>(a.first_of(first + r) - t, 0, tokens) : 0;
        const int64_t start = begin / PANEL * PANEL, stop = up_to(seen, PANEL);  // of the panels that the row sees
        float largest = -INF, factor = 1;
        if (begin < seen) {
            if (are_plain()) factor = float(a.scale * LOG2E);
            else cap_and_mask(r, t, seen, x);
            std::fill(x + start, x + begin, -INF);
            std::fill(x + seen, x + stop, -INF);
            largest = largest_product(x, start, stop, factor, top[r]);
        }
        if (largest == -INF) {
            std::memset(row, 0, end / K::DEPTH * 4);
            return;
        }
        std::memset(row, 0, start / K::DEPTH * 4);
        Floats sums[COLUMNS] = {};
        for (int64_t c = start; c < stop; c += PANEL) {
            UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) {
                const Floats y = K::power(load(x + c + i * LANES) * factor - largest);
                sums[i] += y;
                K::weights(y, row, c + i * LANES);
            }
        }
        std::memset(row + stop / K::DEPTH, 0, (end - stop) / K::DEPTH * 4);
        if (largest > top[r]) {
            const float less = exp2(Floats{} + (top[r] - largest))[0];
            float* out = mixed + r * ordered.panels.size();
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * less);
            total[r] *= less;
            top[r] = largest;
        }
        UNROLL(4) for (int64_t i = 1; i < COLUMNS; i++) sums[0] += sums[i];
        total[r] += sum_of(sums[0]);
    }

    // The largest of `least` and the numbers of x in [start, stop) times `factor`.
    static float largest_product(const float* x, int64_t start, int64_t stop, float factor, float least) {
        Floats most[COLUMNS];
        UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) most[i] = Floats{} + least;
        for (int64_t c = start; c < stop; c += PANEL) {
            UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) {
                const Floats y = load(x + c + i * LANES) * factor;
                most[i] = y > most[i] ? y : most[i];
            }
        }
        UNROLL(4) for (int64_t i = 1; i < COLUMNS; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
        return largest_of(most[0]);
    }

    void finish() {
        for (int64_t r = 0; r < count; r++) {
            float* out = mixed + r * ordered.panels.size();
            const float share = total[r] > 0.0f || total[r] != total[r] ? 1.0f / total[r] : 0.0f;
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * share);
            const int64_t* strides = a.output_strides;
            const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2];
            from_floats(out, a.output_type, a.value_size, a.output + at * bytes_of(a.output_type));
            const float lse = total[r] == 0.0f ? -INF : float((double(top[r]) + std::log2(double(total[r]))) * LN2);
            a.lse[(b * a.heads + h) * a.queries + first + r] = lse;
        }
    }
};

// ------------------------------------------------------------------------------------------------ all of it

template <class K>
void attend(const Arguments& a) {
    const Ordered<K> shape(a);
    const int64_t copies = a.heads / a.groups, blocks = ceil_div(a.queries, BLOCK), bytes = shape.words() * 4;
    const int64_t at_once = std::clamp<int64_t>(MOST_BYTES / std::max<int64_t>(bytes, 1), 1, a.groups);
    const std::unique_ptr<uint32_t, decltype(&std::free)> memory(
        static_cast<uint32_t*>(std::aligned_alloc(64, up_to(std::max<int64_t>(bytes, 1) * at_once, 64))), std::free);
    for (int64_t i = 0; i < a.batch * a.groups; i += at_once) {
        const int64_t groups = std::min(at_once, a.batch * a.groups - i), tasks = groups * copies * blocks;
        const auto group = [&](int64_t n) {
            Ordered<K> its = shape;
            its.place(memory.get() + n * shape.words());
            return its;
        };
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
        {
            [[maybe_unused]] const typename K::Unit unit;
            Block<K> block(a, shape);
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < groups * shape.tiles; n++) {
                const int64_t at = i + n / shape.tiles, tile = n % shape.tiles;
                group(n / shape.tiles).order_keys(a, at / a.groups, at % a.groups, tile);
                group(n / shape.tiles).order_values(a, at / a.groups, at % a.groups, tile);
            }
            // The last queries see the most keys: they come first, so that no thread ends long after the others.
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < tasks; n++) {
                const int64_t from = (blocks - 1 - n / (groups * copies)) * BLOCK, which = n % (groups * copies);
                const int64_t at = i + which / copies, head = at % a.groups * copies + which % copies;
                block.attend(group(which / copies), at / a.groups, head, from, std::min(BLOCK, a.queries - from));
            }
        }
    }
}

}  // namespace

extern "C" int64_t lanes() { return LANES; }

extern "C" void open_attention(const Arguments* arguments) {
    if (arguments->type != BFLOAT16) return attend<Singles>(*arguments);
#if MATRIX_UNIT
    if (Tiles::are_allowed()) return attend<Tiles>(*arguments);
#endif
    attend<Pairs>(*arguments);
}
