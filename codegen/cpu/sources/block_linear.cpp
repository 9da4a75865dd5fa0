// blocks
//
// Products of a few rows with a weight that stands in the blocks of a GGUF file, bound by reading the weight once:
//
//     y[m][n] = sum_k x[m][k] w[n][k] + bias[n]    x [M,K]   w [N,K]   bias [N]   ->   y [M,N]
//
//     M rows, K width of the input, N width of the output
//
// Eight rows of the weight stand side by side, so that a vector holds sums of eight columns, with AVX-512 VNNI those of
// two eights where four rows of the input are multiplied. Each block is read once for four rows of the input, which are
// multiplied as two bytes of each number; so products are of whole numbers, and as good as those of floats with 15
// bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "products.h"
#include "typed_numbers.h"
#include "skinny_call.h"
#include "gguf_formats.h"
#include "gguf_products.h"

namespace {

// Columns of an output: those of eight rows of a weight, or of what is left of them.
struct Eight {
    int64_t first, count;
    const uint8_t* blocks;
    float added[EIGHT];  // of a bias
};

// Products of one input with columns [begin, end) of a weight; begin is a multiple of EIGHT.
template <class T>
void columns_of(const Skinny& its, Type type, const ByteRows& x, int64_t begin, int64_t end) {
    const auto* bias = static_cast<const uint8_t*>(its.bias);
    auto* output = static_cast<uint8_t*>(its.output);
    const Type written = its.is_float ? FLOAT32 : type;
    const auto* weight = static_cast<const uint8_t*>(its.weight);
    const auto eight_of = [&](int64_t first, int64_t count, const uint8_t* blocks) {
        Eight eight = {first, count, blocks, {}};
        if (bias) to_floats(bias + first * bytes_of(type), type, count, eight.added);
        return eight;
    };
    const auto write = [&](const Eight& eight, int64_t row, int64_t rows, const float* products) {
        for (int64_t r = row; r < row + rows; r++, products += EIGHT) {
            float sums[EIGHT];
            for (int i = 0; i < EIGHT; i++) sums[i] = products[i] + eight.added[i];
            from_floats(sums, written, eight.count, output + (r * its.columns + eight.first) * bytes_of(written));
        }
    };
    const auto multiply_from = [&](const Eight& eight, int64_t row) {  // of the input
        for (int64_t rows; row < its.rows; row += rows) {
            float products[MAX_AT_ONCE * EIGHT];
            rows = eight_columns_of<T>(its.rows - row, x, row, eight.blocks, products);
            write(eight, row, rows, products);
        }
    };
    int64_t next = begin;
    if constexpr (HAS_SIXTEEN_COLUMNS) {
        const int64_t fours = its.rows / MAX_AT_ONCE * MAX_AT_ONCE, whole = its.columns / EIGHT * EIGHT;
        for (; fours && next + 2 * EIGHT <= std::min(end, whole); next += 2 * EIGHT) {
            const uint8_t* blocks = weight + next * its.weight_row;
            const Eight both[2] = {eight_of(next, EIGHT, blocks),
                                   eight_of(next + EIGHT, EIGHT, blocks + EIGHT * its.weight_row)};
            for (int64_t row = 0; row < fours; row += MAX_AT_ONCE) {
                float products[2][MAX_AT_ONCE * EIGHT];
                sixteen_columns<T>(x, row, both[0].blocks, both[1].blocks, products[0]);
                for (int i = 0; i < 2; i++) write(both[i], row, MAX_AT_ONCE, products[i]);
            }
            for (const Eight& eight : both) multiply_from(eight, fours);
        }
    }
    for_eights<T>(
        weight, its.weight_row, its.columns, next, end,
        [&](int64_t first, int64_t count, const uint8_t* blocks) { multiply_from(eight_of(first, count, blocks), 0); });
}

constexpr int64_t SPLIT_ROWS = 16;  // of the input that are split into bytes, and multiplied, at once

constexpr int64_t eights_of(int64_t columns) { return (columns + EIGHT - 1) / EIGHT; }

}  // namespace

// Products of up to SPLIT_ROWS rows of an input, which the cache has room for, with `count` weights.
static void block_rows(const Skinny* all, int64_t count) {
    const Skinny& a = all[0];
    const Type type = Type(a.type % FORMATS), read = a.is_float ? FLOAT32 : type;
    ByteRows x(a.rows, a.width);
    for (int64_t r = 0; r < a.rows; r++) {
        float* row = x.numbers;
        to_floats(static_cast<const uint8_t*>(a.input) + r * a.input_row * bytes_of(read), read, a.width, row);
        if (read != type) round_to(type, a.width, row);  // as the layer's input would be
        x.split(r);
    }
    int64_t eights = 0;
    for (int64_t p = 0; p < count; p++) eights += eights_of(all[p].columns);
    const int threads = int(std::clamp<int64_t>(std::min(eights, eights * EIGHT * a.width / 100000), 1, a.threads));
    with_format(a.type / FORMATS, [&](auto format) INLINE_CALL {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int share = 0; share < threads; share++) {
            int64_t begin = eights * share / threads, end = eights * (share + 1) / threads;
            for (const Skinny* its = all; its < all + count; its++) {
                const int64_t last = std::min(EIGHT * end, its->columns);
                columns_of<decltype(format)>(*its, type, x, EIGHT * std::max<int64_t>(begin, 0), last);
                begin -= eights_of(its->columns), end -= eights_of(its->columns);
            }
        }
    });
}

// Products of one input with `count` weights, all of one type and format.
extern "C" void block_group(const Skinny* all, int64_t count) {
    if (all[0].rows <= SPLIT_ROWS) return block_rows(all, count);
    std::vector<Skinny> some(all, all + count);
    const Type type = Type(all[0].type % FORMATS), read = all[0].is_float ? FLOAT32 : type;
    for (int64_t row = 0; row < all[0].rows; row += SPLIT_ROWS) {
        for (int64_t i = 0; i < count; i++) {
            some[i].rows = std::min<int64_t>(SPLIT_ROWS, all[i].rows - row);
            some[i].input = static_cast<const uint8_t*>(all[i].input) + row * all[i].input_row * bytes_of(read);
            some[i].output = static_cast<uint8_t*>(all[i].output) + row * all[i].columns * bytes_of(read);
        }
        block_rows(some.data(), count);
    }
}

// For how many rows of a type products are faster than with the numbers that blocks stand for. Measured on Zen 3 with
// AVX2, where all types are multiplied as floats, and on Zen 5 with AVX-512 VNNI, which multiplies bfloat16 as it is;
// AMX multiplies that faster still, and there, as without products of bytes of the width of those of floats, blocks are
// left to few rows.
extern "C" int64_t most_block_rows([[maybe_unused]] int64_t format, [[maybe_unused]] int64_t type) {
    [[maybe_unused]] const bool is_light = format == Q4_0 || format == Q4_1;
#if defined(__AMX_BF16__)
    if (type == BFLOAT16) return SPLIT_ROWS;
#elif defined(__AVX512BF16__)
    const bool is_heavy = format == Q3_K || format == Q6_K || format == IQ4_NL || format == IQ4_XS;
    if (HAS_SIXTEEN_COLUMNS && type == BFLOAT16) return is_light ? 96 : is_heavy ? 32 : 48;
#endif
#if defined(__AVX512F__) || !defined(__AVX2__)
    return HAS_SIXTEEN_COLUMNS ? 128 : SPLIT_ROWS;
#else
    return is_light ? 128 : format == Q4_K ? 64 : 48;
#endif
}

// The numbers of rows of a weight of N rows that are `row_bytes` apart: [rows, width], of a type. Which rows: those of
// a list, or those from the first on.
extern "C" void unpack_blocks(int64_t format, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t width,
                              int64_t first, const int64_t* which, int64_t rows, uint8_t* numbers, int64_t type,
                              int64_t threads) {
    const int64_t unit = bytes_of(Type(type));
    with_format(format, [&](auto its) INLINE_CALL {
        typedef decltype(its) T;
        // Rows [begin, end) of the result stand in the eight of the weight that `of` is in.
        const auto unpack = [&](int64_t of, int64_t begin, int64_t end) {
            const auto add = [&](int64_t eight, int64_t, const uint8_t* blocks) {
                for (int64_t at = 0; at < width; at += NUMBERS<T>, blocks += EIGHT * BYTES<T>) {
                    float block[EIGHT * NUMBERS<T>];
                    unpack_eight<T>(blocks, block);
                    for (int64_t r = begin; r < end; r++) {
                        const int64_t row = (which ? which[r] : first + r) - eight;
                        from_floats(block + row * NUMBERS<T>, Type(type), NUMBERS<T>,
                                    numbers + (r * width + at) * unit);
                    }
                }
            };
            for_eights<T>(weight, row_bytes, N, of / EIGHT * EIGHT, of / EIGHT * EIGHT + 1, add);
        };
        const int64_t before = which ? 0 : first % EIGHT, eights = which ? rows : eights_of(before + rows);
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
        for (int64_t i = 0; i < eights; i++) {
            const int64_t begin = which ? i : std::max<int64_t>(EIGHT * i - before, 0);
            const int64_t end = which ? i + 1 : std::min(EIGHT * (i + 1) - before, rows);
            unpack(which ? which[i] : first + begin, begin, end);
        }
    });
}
