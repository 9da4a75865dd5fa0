"""What generated C++ files share: vectors of floats by compiler extensions, and numbers of 16 bits.

The text needs <algorithm>, <cstdint>, <cstring> and <limits>, opens the file's anonymous namespace and leaves it open.
"""

VECTORS = r"""#if defined(__F16C__)
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
"""

EXPONENTIAL = r"""// 2^f for f in [-1/2, 1/2].
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
"""

BYTES = r"""INLINE Ints16 bytes_at(const uint8_t* p) {
    Ints16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE int32_t four_at(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// sums[i] += sum over k < 4 of byte k of codes[i] (unsigned) times byte k of h (signed).
INLINE Ints16 add_products(Ints16 sums, Ints16 codes, int32_t h) {
#if defined(__AVX512VNNI__)
    return (Ints16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(h));
#else
    for (int k = 0; k < 4; k++) sums += (codes >> 8 * k & 255) * int32_t(int8_t(h >> 8 * k));
    return sums;
#endif
}

// The same for codes below 16.
INLINE Ints16 add_small_products(Ints16 sums, Ints16 codes, int32_t h) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    __m256i halves[2], added[2];
    std::memcpy(halves, &codes, sizeof codes);
    std::memcpy(added, &sums, sizeof sums);
    for (int i = 0; i < 2; i++) {  // pairs are at most 2 * 15 * 127
        const __m256i pairs = _mm256_maddubs_epi16(halves[i], _mm256_set1_epi32(h));
        added[i] = _mm256_add_epi32(added[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    std::memcpy(&sums, added, sizeof sums);
    return sums;
#else
    return add_products(sums, codes, h);
#endif
}

INLINE Ints16 low_halves(Ints16 x) { return x & 0x0f0f0f0f; }
INLINE Ints16 high_halves(Ints16 x) { return x >> 4 & 0x0f0f0f0f; }
"""
