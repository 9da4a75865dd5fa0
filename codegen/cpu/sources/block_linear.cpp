// blocks
//
// Products of a few rows with a weight that stands in the blocks of a GGUF file, bound by reading the weight once:
//
//     y[m][n] = sum_k x[m][k] w[n][k] + bias[n]    x [M,K]   w [N,K]   bias [N]   ->   y [M,N]
//
//     M rows, K width of the input, N width of the output
//
// Each block of the weight is read once for four rows of the input, which are multiplied as two bytes of each number
// where the CPU multiplies bytes; so products are of whole numbers, and as good as those of floats with 15 bits.
//
// Build: c++ -O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "vectors.h"
#include "products.h"
#include "typed_numbers.h"
#include "skinny_call.h"
#include "gguf_formats.h"
#include "gguf_blocks.h"

constexpr int AT_ONCE = 4;  // rows of the input that are multiplied with a block

// Products of one input with rows [begin, end) of `count` weights, one weight behind the other.
template <class Format>
void columns_of(const Skinny* all, int64_t count, const ByteRows& x, int64_t begin, int64_t end) {
    const Type type = Type(all->type % FORMATS);
    for (const Skinny* its = all; its < all + count; its++) {
        const auto* bias = static_cast<const uint8_t*>(its->bias);
        auto* output = static_cast<uint8_t*>(its->output);
        const Type written = its->is_float ? FLOAT32 : type;
        for (int64_t c = std::max<int64_t>(begin, 0); c < std::min(end, its->columns); c++) {
            const auto* blocks = static_cast<const uint8_t*>(its->weight) + c * its->weight_row;
            float added = 0;
            if (bias) to_floats(bias + c * bytes_of(type), type, 1, &added);
            for (int64_t row = 0; row < its->rows; row += AT_ONCE) {
                const int rows = int(std::min<int64_t>(AT_ONCE, its->rows - row));
                float sums[AT_ONCE];
                block_rows_at<Format>(std::make_integer_sequence<int, AT_ONCE>(), rows, x, row, blocks, sums);
                for (int r = 0; r < rows; r++) {
                    const float y = sums[r] + added;
                    from_floats(&y, written, 1, output + ((row + r) * its->columns + c) * bytes_of(written));
                }
            }
        }
        begin -= its->columns;
        end -= its->columns;
    }
}

}  // namespace

// Products of one input with `count` weights, all of one type and format.
extern "C" void block_group(const Skinny* all, int64_t count) {
    const Skinny& a = all[0];
    const Type type = Type(a.type % FORMATS), read = a.is_float ? FLOAT32 : type;
    ByteRows x(a.rows, a.width);
    for (int64_t r = 0; r < a.rows; r++) {
        float* row = x.numbers + r * a.width;
        to_floats(static_cast<const uint8_t*>(a.input) + r * a.input_row * bytes_of(read), read, a.width, row);
        if (read != type) {  // rounded as the layer's input would be
            for (int64_t k = 0; k < a.width; k++) {
                row[k] = type == BFLOAT16 ? from_bits(uint32_t(to_bfloat16(row[k])) << 16)
                                          : from_float16(to_float16(row[k]));
            }
        }
        x.split(r);
    }
    int64_t columns = 0;
    for (int64_t p = 0; p < count; p++) columns += all[p].columns;
    const int threads = int(std::clamp<int64_t>(std::min(columns, columns * a.width / 100000), 1, a.threads));
    with_format(a.type / FORMATS, [&](auto format) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int share = 0; share < threads; share++) {
            const int64_t begin = columns * share / threads, end = columns * (share + 1) / threads;
            columns_of<decltype(format)>(all, count, x, begin, end);
        }
    });
}

// The numbers of `rows` rows of blocks that are `row_bytes` apart: [rows, width], of a type.
extern "C" void unpack_blocks(int64_t format, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t width,
                              uint8_t* numbers, int64_t type, int64_t threads) {
    with_format(format, [&](auto its) {
        typedef decltype(its) T;
        const int64_t size = NUMBERS<T> * bytes_of(Type(type));
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t* from = blocks + r * row_bytes;
            uint8_t* to = numbers + r * width * bytes_of(Type(type));
            for (int64_t at = 0; at < width; at += NUMBERS<T>, from += BYTES<T>, to += size) {
                float block[NUMBERS<T>];
                unpack_block<T>(from, block);
                from_floats(block, Type(type), NUMBERS<T>, to);
            }
        }
    });
}
