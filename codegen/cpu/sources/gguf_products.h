// Products of a few rows of input with eight rows of a weight in the blocks of GGUF files.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "gguf_blocks.h"
#include "static_counts.h"

namespace {

template <class T>
constexpr int NUMBERS = int(size_of(T::FORMAT).numbers);
template <class T>
constexpr int BYTES = int(size_of(T::FORMAT).bytes);

// Rows of the input as two bytes of each number, x = unit * (RADIX high + low), with a unit for each group: 15 bits of
// the largest number there, which is more than bfloat16 has. sum: of 16 numbers each, or of a group.
struct ByteRows {
    static constexpr int RADIX = 254;

    int64_t width;
    int8_t *high, *low;  // [rows, K]
    float* unit;  // [rows, K / 32]
    float* sum[2];  // of a group, [rows, K / 32], and of its parts, [rows, K / 16]
    float* numbers;  // [K], of a row

    ByteRows(int64_t rows, int64_t K) : width(K) {
        high = array<int8_t>(rows * K), low = array<int8_t>(rows * K);
        numbers = array<float>(K), unit = array<float>(rows * K / 32);
        for (int i = 0; i < 2; i++) sum[i] = array<float>(rows * K / 32 * (i + 1));
    }
    ByteRows(const ByteRows&) = delete;
    ~ByteRows() {
        for (void* p : {(void*)high, (void*)low, (void*)numbers, (void*)unit, (void*)sum[0], (void*)sum[1]}) {
            std::free(p);
        }
    }
    template <class T>
    static T* array(int64_t count) {
        return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64));
    }
    static INLINE void split_group(const Floats8 (&x)[4], float inverse, int8_t* high, int8_t* low) {
#if defined(__AVX2__)
        __m256i upper[4], lower[4];
        for (int i = 0; i < 4; i++) {
            const Floats8 whole = x[i] * inverse;
            upper[i] = _mm256_cvtps_epi32((__m256)(whole * (1.0f / RADIX)));
            lower[i] = _mm256_cvtps_epi32((__m256)(whole - (Floats8)_mm256_cvtepi32_ps(upper[i]) * float(RADIX)));
        }
        const auto bytes = [](const __m256i* v, int8_t* to) {
            const __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), all);
        };
        bytes(upper, high), bytes(lower, low);
#else
        for (int i = 0; i < GROUP; i++) {
            const float whole = x[i / 8][i % 8] * inverse;
            if (!(whole - whole == 0.0f)) {  // the unit says so
                high[i] = low[i] = 0;
                continue;
            }
            const int upper = int(std::lrint(whole * (1.0f / RADIX)));
            high[i] = int8_t(upper), low[i] = int8_t(std::lrint(whole - float(upper * RADIX)));
        }
#endif
    }
    void split(int64_t row) {
        for (int64_t at = 0; at < width; at += GROUP) {
            const int64_t to = row * width + at;
            Floats8 eight[4], top = {};
            std::memcpy(eight, numbers + at, sizeof eight);
            for (const Floats8& v : eight) {
                const Floats8 magnitude = v < 0.0f ? -v : v;
                top = magnitude > top ? magnitude : top;
            }
            float largest = 0;
            for (int i = 0; i < 8; i++) largest = std::max(largest, top[i]);
            constexpr int MAX_LEVEL = 127 * RADIX + RADIX / 2 - 1;
            const float inverse = largest > 1e-30f ? MAX_LEVEL / largest : 0.0f;
            split_group(eight, inverse, high + to, low + to);
            for (int part = 0; part < 2; part++) {
                const Floats8 both = eight[2 * part] + eight[2 * part + 1];
                float added = 0;
                for (int i = 0; i < 8; i++) added += both[i];
                sum[1][to / 16 + part] = added;
            }
            const float total = sum[0][to / GROUP] = sum[1][to / 16] + sum[1][to / 16 + 1];
            unit[to / GROUP] = largest / MAX_LEVEL + 0.0f * total;  // NaN where a number is, or is infinite
        }
    }
};

#if defined(__AVX2__)
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOUR_PRODUCTS _mm256_dpbusd_epi32  // four products of bytes and their sum, to a lane of 32 bits
#elif defined(__AVXVNNI__)
#define FOUR_PRODUCTS _mm256_dpbusd_avx_epi32
#endif
// Keeps a compiler from adding later, for which products would have to wait in memory.
INLINE void in_register(__m256i& sums) { asm("" : "+v"(sums)); }
#elif !defined(__ARM_FEATURE_DOTPROD)
// On other CPUs: a function of its own, since there are many calls.
template <bool SIGNED>
__attribute__((noinline)) void add_word(const Codes& codes, const int8_t* high, const int8_t* low, Ints8& sums) {
    for (int k = 0; k < 4; k++) {
        const Ints8 code = SIGNED ? (Ints8)codes << (24 - 8 * k) >> 24 : (Ints8)codes >> 8 * k & 255;
        sums += code * (high[k] * ByteRows::RADIX + low[k]);
    }
}
#endif

// Sums over codes of eight rows times numbers of two bytes each, WORDS times four of them.
template <class T, int WORDS>
struct WholeSums {
    Ints8 sums = {};
#if defined(FOUR_PRODUCTS)
    __m256i upper = {}, lower = {};

    template <int WORD>
    INLINE void add(Codes codes, const int8_t* high, const int8_t* low) {
        const auto added = [&](__m256i to, const int8_t* four) {
            int32_t bits;
            std::memcpy(&bits, four, sizeof bits);
            const __m256i x = _mm256_set1_epi32(bits);
            if constexpr (!T::SIGNED) return FOUR_PRODUCTS(to, (__m256i)codes, x);
            else return FOUR_PRODUCTS(to, _mm256_abs_epi8((__m256i)codes), _mm256_sign_epi8(x, (__m256i)codes));
        };
        upper = added(upper, high), lower = added(lower, low);
        in_register(upper), in_register(lower);
        if constexpr (WORD == WORDS - 1) sums = (Ints8)upper * ByteRows::RADIX + (Ints8)lower;
    }
#elif defined(__AVX2__)
    // Words whose products sums of 16 bits have room for.
    static constexpr int HELD = std::min(WORDS, 32767 / (2 * T::MAX_CODE * 127));
    static_assert(HELD >= 1 && WORDS % HELD == 0);
    __m256i upper = {}, lower = {};

    template <int WORD>
    INLINE void add(Codes codes, const int8_t* high, const int8_t* low) {
        const auto pairs = [&](const int8_t* four) {
            int32_t bits;
            std::memcpy(&bits, four, sizeof bits);
            const __m256i x = _mm256_set1_epi32(bits);
            if constexpr (!T::SIGNED) return _mm256_maddubs_epi16((__m256i)codes, x);
            else return _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)codes), _mm256_sign_epi8(x, (__m256i)codes));
        };
        if constexpr (WORD % HELD == 0) {
            upper = pairs(high), lower = pairs(low);
        } else {
            upper = _mm256_add_epi16(upper, pairs(high)), lower = _mm256_add_epi16(lower, pairs(low));
        }
        in_register(upper), in_register(lower);
        if constexpr (WORD % HELD == HELD - 1) {
            const Ints8 added = (Ints8)_mm256_madd_epi16(upper, _mm256_set1_epi16(ByteRows::RADIX)) +
                                (Ints8)_mm256_madd_epi16(lower, _mm256_set1_epi16(1));
            sums = WORD < HELD ? added : sums + added;
        }
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t upper[2] = {}, lower[2] = {};

    template <int WORD>
    INLINE void add(Codes codes, const int8_t* high, const int8_t* low) {
        int8x16_t halves[2];
        std::memcpy(halves, &codes, sizeof halves);
        const auto of_row = [](const int8_t* four) {
            int32_t bits;
            std::memcpy(&bits, four, sizeof bits);
            return vreinterpretq_s8_s32(vdupq_n_s32(bits));
        };
        const int8x16_t x = of_row(high), rest = of_row(low);
        for (int i = 0; i < 2; i++) {
            upper[i] = vdotq_s32(upper[i], halves[i], x), lower[i] = vdotq_s32(lower[i], halves[i], rest);
        }
        if constexpr (WORD == WORDS - 1) {
            for (int i = 0; i < 2; i++) upper[i] = vmlaq_n_s32(lower[i], upper[i], ByteRows::RADIX);
            std::memcpy(&sums, upper, sizeof sums);
        }
    }
#else
    template <int WORD>
    INLINE void add(Codes codes, const int8_t* high, const int8_t* low) {
        add_word<T::SIGNED>(codes, high, low, sums);
    }
#endif
};

constexpr int64_t FETCHED = 4096;  // bytes behind those that are multiplied

// Keeps a compiler from holding what it has read there, of which there is more than registers.
INLINE const uint8_t* read_again(const uint8_t* blocks) {
    asm("" : "+r"(blocks));
    return blocks;
}

// Scales of all groups of a block of each of eight rows.
template <class T>
struct BlockScales {
    Scales of[NUMBERS<T> / GROUP * T::PARTS];

    explicit INLINE BlockScales(const uint8_t* blocks) {
        for_counts<NUMBERS<T> / GROUP * T::PARTS>(
            [&](auto part) INLINE_CALL { of[part] = T::template scales<decltype(part)::value>(blocks); });
    }
};

// Products of ROWS rows of the input, from `row` on, with eight rows of a weight: [ROWS, 8].
template <class T, int ROWS>
void eight_columns(const ByteRows& x, int64_t row, const uint8_t* blocks, float* products) {
    constexpr int WORDS = 8 / T::PARTS;
    const int64_t width = x.width;
    const int8_t *high[ROWS], *low[ROWS];
    const float *unit[ROWS], *sum[ROWS];
    for (int r = 0; r < ROWS; r++) {
        high[r] = x.high + (row + r) * width, low[r] = x.low + (row + r) * width;
        unit[r] = x.unit + (row + r) * (width / GROUP);
        sum[r] = x.sum[T::PARTS - 1] + (row + r) * (width / GROUP) * T::PARTS;
    }
    Floats8 totals[ROWS] = {};
    for (int64_t at = 0; at < width; at += NUMBERS<T>, blocks += EIGHT * BYTES<T>) {
        for (int p = 0; p < EIGHT * BYTES<T>; p += 64) __builtin_prefetch(blocks + FETCHED + p);
        const BlockScales<T> scales(blocks);
        for (int chunk = 0; chunk < NUMBERS<T> / GROUP / T::CHUNK; chunk++) {
            for_counts<T::CHUNK * T::PARTS>([&](auto part) INLINE_CALL {
                constexpr int PART = decltype(part)::value, AT = PART / T::PARTS, FIRST = PART % T::PARTS * WORDS;
                const int64_t group = at / GROUP + chunk * T::CHUNK + AT;
                WholeSums<T, WORDS> sums[ROWS];
                const uint8_t* from = read_again(blocks);
                for_counts<WORDS>([&](auto word) INLINE_CALL {
                    constexpr int WORD = decltype(word)::value;
                    const Codes codes = T::template codes<AT>(Word<FIRST + WORD>{from}, chunk);
                    UNROLL(4) for (int r = 0; r < ROWS; r++) {
                        const int64_t four = GROUP * group + 4 * (FIRST + WORD);
                        sums[r].template add<WORD>(codes, high[r] + four, low[r] + four);
                    }
                });
                const Scales its = scales.of[chunk * T::CHUNK * T::PARTS + PART];
                UNROLL(4) for (int r = 0; r < ROWS; r++) {
                    totals[r] = add_eight(totals[r], as_floats(sums[r].sums), its.scale * unit[r][group]);
                    if (!T::OFFSET) continue;
                    totals[r] = add_eight(totals[r], its.offset,
                                          sum[r][group * T::PARTS + PART % T::PARTS] - Floats8{});
                }
            });
        }
    }
    for (int r = 0; r < ROWS; r++) store(products + EIGHT * r, totals[r]);
}

constexpr int MAX_AT_ONCE = 4;  // rows of the input that are multiplied with a block

// Products of MAX_AT_ONCE rows of the input, from `row` on, with two eights of rows of a weight: [2, MAX_AT_ONCE, 8].
template <class T>
void sixteen_columns(const ByteRows& x, int64_t row, const uint8_t* first, const uint8_t* second, float* products);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr bool HAS_SIXTEEN_COLUMNS = true;

// Two vectors as one.
template <class Wide, class Half>
INLINE Wide joined(Half a, Half b) {
    return (Wide)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}

// Sums as of WholeSums, of sixteen rows.
template <class T>
struct WideSums {
    __m512i upper = {}, lower = {};

    INLINE void add(__m512i codes, __mmask64 negative, const int8_t* high, const int8_t* low) {
        const auto added = [&](__m512i to, const int8_t* four) {
            int32_t bits;
            std::memcpy(&bits, four, sizeof bits);
            __m512i x = _mm512_set1_epi32(bits);
            if constexpr (T::SIGNED) x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
            return _mm512_dpbusd_epi32(to, codes, x);
        };
        upper = added(upper, high), lower = added(lower, low);
    }
    INLINE Floats16 floats() const {
        return __builtin_convertvector((Ints16)upper * ByteRows::RADIX + (Ints16)lower, Floats16);
    }
};

template <class T>
void sixteen_columns(const ByteRows& x, int64_t row, const uint8_t* first, const uint8_t* second, float* products) {
    constexpr int WORDS = 8 / T::PARTS, ROWS = MAX_AT_ONCE;
    const int64_t width = x.width, groups = width / GROUP;
    const int8_t *high = x.high + row * width, *low = x.low + row * width;
    const float *unit = x.unit + row * groups, *sum = x.sum[T::PARTS - 1] + row * groups * T::PARTS;
    Floats16 totals[ROWS] = {};
    for (int64_t at = 0; at < width; at += NUMBERS<T>, first += EIGHT * BYTES<T>, second += EIGHT * BYTES<T>) {
        for (int p = 0; p < EIGHT * BYTES<T>; p += 64) {
            __builtin_prefetch(first + FETCHED + p), __builtin_prefetch(second + FETCHED + p);
        }
        const BlockScales<T> scales(first), others(second);
        for (int chunk = 0; chunk < NUMBERS<T> / GROUP / T::CHUNK; chunk++) {
            for_counts<T::CHUNK * T::PARTS>([&](auto part) INLINE_CALL {
                constexpr int PART = decltype(part)::value, AT = PART / T::PARTS, FIRST = PART % T::PARTS * WORDS;
                const int64_t group = at / GROUP + chunk * T::CHUNK + AT;
                WideSums<T> sums[ROWS];
                const uint8_t *one = read_again(first), *other = read_again(second);
                for_counts<WORDS>([&](auto word) INLINE_CALL {
                    constexpr int WORD = FIRST + decltype(word)::value;
                    __m512i codes = (__m512i)joined<Ints16>(T::template codes<AT>(Word<WORD>{one}, chunk),
                                                            T::template codes<AT>(Word<WORD>{other}, chunk));
                    __mmask64 negative = 0;
                    if constexpr (T::SIGNED) negative = _mm512_movepi8_mask(codes), codes = _mm512_abs_epi8(codes);
                    UNROLL(4) for (int r = 0; r < ROWS; r++) {
                        const int64_t four = r * width + GROUP * group + 4 * WORD;
                        sums[r].add(codes, negative, high + four, low + four);
                    }
                });
                const int number = chunk * T::CHUNK * T::PARTS + PART;
                const Floats16 scale = joined<Floats16>(scales.of[number].scale, others.of[number].scale);
                const Floats16 offset = joined<Floats16>(scales.of[number].offset, others.of[number].offset);
                UNROLL(4) for (int r = 0; r < ROWS; r++) {
                    const int64_t its = r * groups + group;
                    totals[r] = add_product(totals[r], sums[r].floats(), scale * unit[its]);
                    if (!T::OFFSET) continue;
                    totals[r] = add_product(totals[r], offset, sum[its * T::PARTS + PART % T::PARTS] - Floats16{});
                }
            });
        }
    }
    for (int r = 0; r < ROWS; r++) {
        Floats8 halves[2];
        std::memcpy(halves, &totals[r], sizeof halves);
        store(products + EIGHT * r, halves[0]), store(products + EIGHT * (ROWS + r), halves[1]);
    }
}
#else
constexpr bool HAS_SIXTEEN_COLUMNS = false;
#endif

// Of up to MAX_AT_ONCE rows, and of how many: 1, 2 or 4.
template <class T>
int eight_columns_of(int64_t rows, const ByteRows& x, int64_t row, const uint8_t* blocks, float* products) {
    if (rows >= 4) return eight_columns<T, 4>(x, row, blocks, products), 4;
    if (rows >= 2) return eight_columns<T, 2>(x, row, blocks, products), 2;
    return eight_columns<T, 1>(x, row, blocks, products), 1;
}

// The numbers of a block of each of eight rows, [8, numbers].
template <class T>
INLINE void unpack_eight(const uint8_t* blocks, float* to) {
    const BlockScales<T> scales(blocks);
    for (int chunk = 0; chunk < NUMBERS<T> / GROUP / T::CHUNK; chunk++) {
        for_counts<T::CHUNK>([&](auto at) INLINE_CALL {
            constexpr int AT = decltype(at)::value;
            const int group = chunk * T::CHUNK + AT;
            uint32_t words[8][EIGHT];
            for_counts<8>([&](auto word) INLINE_CALL {
                const Codes codes = T::template codes<AT>(Word<decltype(word)::value>{blocks}, chunk);
                std::memcpy(words[word], &codes, sizeof codes);
            });
            float scale[T::PARTS][EIGHT], offset[T::PARTS][EIGHT];
            for (int part = 0; part < T::PARTS; part++) {
                const Scales its = scales.of[group * T::PARTS + part];
                store(scale[part], its.scale), store(offset[part], its.offset);
            }
            typedef std::conditional_t<T::SIGNED, int8_t, uint8_t> Byte;
            for (int r = 0; r < EIGHT; r++) {
                uint32_t of_row[8];  // codes of a group
                for (int i = 0; i < 8; i++) of_row[i] = words[i][r];
                const auto* codes = reinterpret_cast<const uint8_t*>(of_row);
                for (int at = 0; at < GROUP; at += 8) {  // numbers of a vector
                    const int part = at / (GROUP / T::PARTS);
                    Floats8 numbers = as_floats(bytes_at<Byte>(codes, at / 8)) * scale[part][r];
                    if (T::OFFSET) numbers += offset[part][r];
                    store(to + r * NUMBERS<T> + GROUP * group + at, numbers);
                }
            }
        });
    }
}

// Up to eight rows as they stand in a file, side by side; what is missing is zeros.
template <class T>
struct SideBySide {
    uint8_t* blocks;

    SideBySide(const uint8_t* rows, int64_t row_bytes, int64_t count) {
        blocks = static_cast<uint8_t*>(std::calloc(EIGHT, row_bytes));
        for (int64_t r = 0; r < count; r++) {
            for (int64_t at = 0; at < row_bytes; at++) {
                const int64_t block = at / BYTES<T>, of_block = at % BYTES<T>;
                const int64_t place = PLACES<T::FORMAT>.first[of_block] + r * PLACES<T::FORMAT>.step[of_block];
                blocks[block * EIGHT * BYTES<T> + place] = rows[r * row_bytes + at];
            }
        }
    }
    SideBySide(const SideBySide&) = delete;
    ~SideBySide() { std::free(blocks); }
};

// Calls f with the blocks of each eight of N rows, from `begin`, a multiple of EIGHT, on: f(first, count, blocks).
template <class T, class F>
INLINE void for_eights(const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < end; first += EIGHT) {
        const int64_t count = std::min<int64_t>(N - first, EIGHT);
        if (count == EIGHT) {
            f(first, count, weight + first * row_bytes);
        } else {
            const SideBySide<T> last(weight + first * row_bytes, row_bytes, count);
            f(first, count, static_cast<const uint8_t*>(last.blocks));
        }
    }
}

// Calls f of the format.
template <class F>
void with_format(int64_t format, F f) {
    switch (format) {
        case Q4_0: return f(OfQ4_0());
        case Q4_1: return f(OfQ4_1());
        case Q8_0: return f(OfQ8_0());
        case Q2_K: return f(OfQ2_K());
        case Q3_K: return f(OfQ3_K());
        case Q4_K: return f(OfQ4_K());
        case Q5_K: return f(OfQ5_K());
        case Q6_K: return f(OfQ6_K());
        case IQ4_NL: return f(OfIQ4_NL());
        case IQ4_XS: return f(OfIQ4_XS());
    }
}

}  // namespace
