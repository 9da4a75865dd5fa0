// wide
//
// Products of many rows with a weight, for CPUs without instructions for numbers of 16 bits:
//
//     y[m][n] = scale[n] sum_k x[m][k] w[n][k] + bias[n]    x [M,K]   w [N,K]   scale, bias [N]   ->   y [M,N]
//
// Weights are of the type of the input, and have no scale; or signed bytes, and have one for each row. All numbers
// become floats, a weight's once for MAX_INPUT_ROWS rows of the input, in the order in which a product reads them (Goto
// and van de Geijn 2008, doi 10.1145/1356052.1356053):
//
//     x    [K / DEPTH][M'][DEPTH]             of all threads
//     w    [block / PANEL][DEPTH][PANEL]      of a thread, for DEPTH of a block's columns: in its second-level cache
//
// VECTOR_ROWS rows of the input, in the first-level cache, walk over the panels of a block; the sums of a block go
// through memory once for DEPTH numbers. A sum runs over K in one order, whatever rows, columns and threads there are.
//
//     M rows, K width of the input, N width of the output

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "vectors.h"
#include "products.h"
#include "typed_numbers.h"
#include "panels.h"
#include "skinny_call.h"

namespace {

constexpr int64_t MAX_INPUT_ROWS = 128 * VECTOR_ROWS;  // at once
constexpr int64_t DEPTH = 384, BLOCK = 128;  // numbers of a row, columns at once
constexpr int64_t INPUT_ROW = DEPTH + 16, SUMS_ROW = BLOCK + 16;  // powers of two would share cache sets
constexpr int64_t BLOCKS = 4;  // of a thread, where there are columns enough: threads are not equally fast
constexpr int64_t SHARE = 1 << 20;  // products that are worth a thread
static_assert(BLOCK % PANEL == 0 && PANEL % 8 == 0 && DEPTH % 8 == 0, "whole panels of whole squares");

// ------------------------------------------------------------------------------------------------ operands

// 8 numbers of a weight as floats.
struct Floats32 {
    typedef float Number;
    static INLINE Floats8 load8(const Number* p) {
        Floats8 v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

struct BFloats16 {
    typedef uint16_t Number;
    static INLINE Floats8 load8(const Number* p) {
#if defined(__AVX2__)
        const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return (Floats8)_mm256_slli_epi32(words, 16);
#else
        Halves8 halves;
        std::memcpy(&halves, p, sizeof halves);
        return (Floats8)(__builtin_convertvector(halves, Ints8) << 16);
#endif
    }
};

struct Floats16Bits {
    typedef uint16_t Number;
    static INLINE Floats8 load8(const Number* p) {
#if defined(__F16C__)
        return (Floats8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        Floats8 v;
        for (int i = 0; i < 8; i++) v[i] = from_float16(p[i]);
        return v;
#endif
    }
};

struct SignedBytes {
    typedef int8_t Number;
    static INLINE Floats8 load8(const Number* p) {
#if defined(__AVX2__)
        const __m256i words = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return (Floats8)_mm256_cvtepi32_ps(words);
#else
        Floats8 v;
        for (int i = 0; i < 8; i++) v[i] = p[i];
        return v;
#endif
    }
};

// Rows of a square become its columns.
INLINE void transpose(Floats8 (&v)[8]) {
    Floats8 pairs[8], fours[8];
    UNROLL(4) for (int i = 0; i < 8; i += 2) {
        pairs[i] = SHUFFLE(Ints8, v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SHUFFLE(Ints8, v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLL(2) for (int i = 0; i < 8; i += 4) {
        UNROLL(2) for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = SHUFFLE(Ints8, pairs[i + j], pairs[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = SHUFFLE(Ints8, pairs[i + j], pairs[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    UNROLL(4) for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLE(Ints8, fours[i], fours[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
        v[4 + i] = SHUFFLE(Ints8, fours[i], fours[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

template <class T>
INLINE Floats8 some_of_8(const typename T::Number* p, int64_t count) {
    if (count >= 8) return T::load8(p);
    typename T::Number rest[8] = {};
    if (count > 0) std::memcpy(rest, p, count * sizeof *rest);
    return T::load8(rest);
}

// Numbers [from, from + depth) of `columns` rows of a weight, in panels; zeros fill the last panel up.
template <class T>
void order_weight(const Skinny& a, int64_t first, int64_t columns, int64_t from, int64_t depth, float* panels) {
    const auto* weight = static_cast<const typename T::Number*>(a.weight) + first * a.weight_row + from;
    for (int64_t c = 0; c < up_to(columns, PANEL); c += 8) {
        float* to = panels + c / PANEL * PANEL * DEPTH + c % PANEL;
        for (int64_t k = 0; k < depth; k += 8) {
            Floats8 square[8];
            UNROLL(8) for (int64_t i = 0; i < 8; i++) {
                const int64_t row = std::min(c + i, columns - 1);
                square[i] = some_of_8<T>(weight + row * a.weight_row + k, c + i < columns ? depth - k : 0);
            }
            transpose(square);
            UNROLL(8) for (int64_t i = 0; i < 8; i++) store(to + (k + i) * PANEL, square[i]);
        }
    }
}

// ------------------------------------------------------------------------------------------------ a block of columns

struct Freed {
    void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float, Freed> Memory;

Memory memory_for(int64_t floats) { return Memory(static_cast<float*>(std::aligned_alloc(64, up_to(4 * floats, 64)))); }

template <bool ADDS>
void multiply_block(const float* input, int64_t rows, const float* panels, int64_t columns, int64_t depth,
                    float* sums) {
    for (int64_t r = 0; r < rows; r += VECTOR_ROWS) {
        const auto* left = reinterpret_cast<const uint32_t*>(input + r * INPUT_ROW);
        for (int64_t c = 0; c < columns; c += PANEL) {
            const auto* right = reinterpret_cast<const uint32_t*>(panels + c * DEPTH);
            multiply_rows<FloatWords, COLUMNS, ADDS>(left, INPUT_ROW, right, depth, sums + r * SUMS_ROW + c, SUMS_ROW);
        }
    }
}

// Columns [first, first + columns) of the output, of rows [row, row + rows).
template <class T>
void block_of_columns(const Skinny& a, const float* input, int64_t row, int64_t rows, int64_t first, int64_t columns,
                      float* panels, float* sums) {
    const Type type = Type(a.type % SIGNED_BYTES);
    const int64_t all = up_to(rows, VECTOR_ROWS);
    for (int64_t from = 0; from < a.width; from += DEPTH) {
        const int64_t depth = std::min(DEPTH, a.width - from);
        order_weight<T>(a, first, columns, from, depth, panels);
        const float* part = input + from / DEPTH * all * INPUT_ROW;
        if (from) multiply_block<true>(part, all, panels, columns, depth, sums);
        else multiply_block<false>(part, all, panels, columns, depth, sums);
    }
    if (!a.width) std::fill(sums, sums + rows * SUMS_ROW, 0.0f);
    float bias[BLOCK] = {};
    if (a.bias) to_floats(static_cast<const uint8_t*>(a.bias) + first * bytes_of(type), type, columns, bias);
    for (int64_t r = 0; r < rows; r++) {
        float* sum = sums + r * SUMS_ROW;
        if (a.scale)
            for (int64_t c = 0; c < columns; c++) sum[c] = add_product(bias[c], sum[c], a.scale[first + c]);
        else if (a.bias)
            for (int64_t c = 0; c < columns; c++) sum[c] += bias[c];
        const int64_t place = (row + r) * a.columns + first;
        from_floats(sum, type, columns, static_cast<uint8_t*>(a.output) + place * bytes_of(type));
    }
}

// ------------------------------------------------------------------------------------------------ all of it

template <class T>
void products(const Skinny& a) {
    if (!a.rows || !a.columns) return;
    const Type type = Type(a.type % SIGNED_BYTES);
    const int64_t parts = ceil_div(a.width, DEPTH);
    const int64_t times = ceil_div(a.rows, MAX_INPUT_ROWS);  // a weight is read so many times
    const int64_t most = up_to(ceil_div(a.rows, times), VECTOR_ROWS);
    const int64_t size = most * a.width * a.columns;
    const int threads = int(std::clamp<int64_t>(size / SHARE, 1, a.threads));
    const int64_t wanted = std::max(ceil_div(a.columns, BLOCK), BLOCKS * threads);
    const int64_t block = up_to(ceil_div(a.columns, up_to(wanted, threads)), PANEL);
    const Memory inputs = memory_for(parts * most * INPUT_ROW);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Memory panels = memory_for(block * DEPTH), sums = memory_for(most * SUMS_ROW);
        for (int64_t row = 0; row < a.rows; row += most) {
            const int64_t rows = std::min(most, a.rows - row), all = up_to(rows, VECTOR_ROWS);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < all; r++) {
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t from = part * DEPTH, depth = std::min(DEPTH, a.width - from);
                    float* to = inputs.get() + (part * all + r) * INPUT_ROW;
                    const auto* x = static_cast<const uint8_t*>(a.input);
                    if (r >= rows) std::fill(to, to + depth, 0.0f);
                    else to_floats(x + ((row + r) * a.input_row + from) * bytes_of(type), type, depth, to);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < a.columns; first += block) {
                const int64_t columns = std::min(block, a.columns - first);
                block_of_columns<T>(a, inputs.get(), row, rows, first, columns, panels.get(), sums.get());
            }
        }
    }
}

}  // namespace

// Output and input are of the type, whatever `is_float` says.
extern "C" void wide(const Skinny* a) {
    switch (a->type) {
        case FLOAT32: return products<Floats32>(*a);
        case BFLOAT16: return products<BFloats16>(*a);
        case FLOAT16: return products<Floats16Bits>(*a);
        default: return products<SignedBytes>(*a);
    }
}
