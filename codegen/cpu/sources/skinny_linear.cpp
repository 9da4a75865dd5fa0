// skinny
//
// Products of a few rows with a weight, bound by reading the weight once:
//
//     y[m][n] = scale[n] sum_k x[m][k] w[n][k] + bias[n]    x [M,K]   w [N,K]   scale, bias [N]   ->   y [M,N]
//
// Weights are of the type of the input, and have no scale; or signed bytes, and have one for each row. Those in the
// blocks of GGUF files are handed on to another library.
//
//     M rows, K width of the input, N width of the output
//
// Of up to 8 rows of input, a thread cuts its rows of the weight into COLUMNS runs, and walks over all of them at once:
// a CPU that fetches ahead follows several long runs through memory, and finds the way anew wherever a short one ends.
// Next to each other, eight rows of a kilobyte are read at half the speed of memory. More rows of input take a few
// rows of the weight at a time, next to each other. For several rows of input the next rows are fetched meanwhile, into
// the second-level cache, where more lines can be under way than into the first. Each vector of the weight is read once
// and multiplied with all rows of the input, which stay in the caches; sums are of float32. With AVX-512 BF16, pairs of
// bfloat16 are multiplied as they are; other numbers of 16 bits become floats in registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "vectors.h"
#include "number_types.h"
#include "products.h"
#include "static_counts.h"
#include "gguf_formats.h"
#include "skinny_call.h"

namespace {

constexpr int64_t CACHED = 24;  // rows of a weight that are taken at once where the rows of the input are not
constexpr int64_t SHARE = 8;  // rows of a weight of which a thread takes a multiple, where it can

// ROWS rows of the input times COLUMNS rows of the weight that are `apart`; the next ones are `next` behind these.
template <class T, int ROWS, int COLUMNS>
void block(const Skinny& a, const typename T::Input* input, int64_t stride, int64_t row, int64_t column, int64_t apart,
           int64_t next) {
    float sums[ROWS * COLUMNS];
    const auto* weight = static_cast<const typename T::Weight*>(a.weight) + column * a.weight_row;
    multiply<T, ROWS, COLUMNS>(input + row * stride, stride, weight, apart * a.weight_row, next * a.weight_row, a.width,
                               sums);
    const auto* bias = static_cast<const typename T::Element*>(a.bias);
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            const int64_t at = column + c * apart;
            const float added = bias ? T::number(bias[at]) : 0.0f;
            const float sum = sums[r * COLUMNS + c];
            const float y = a.scale ? add_product(added, sum, a.scale[at]) : sum + added;
            const int64_t place = (row + r) * a.columns + at;
            if (a.is_float) static_cast<float*>(a.output)[place] = y;
            else static_cast<typename T::Element*>(a.output)[place] = T::rounded(y);
        }
    }
}

// Columns [begin, end) for ROWS rows of the input.
template <class T, int ROWS>
void block_of_columns(const Skinny& a, const typename T::Input* input, int64_t stride, int64_t row, int64_t begin,
                      int64_t end) {
    constexpr int COLUMNS = columns_for(ROWS);
    const int64_t count = (end - begin) / COLUMNS, apart = end - begin > CACHED ? count : 1;
    const int64_t next = apart > 1 ? 1 : COLUMNS;
    for (int64_t i = 0; i < count; i++) {
        block<T, ROWS, COLUMNS>(a, input, stride, row, begin + i * next, apart, next);
    }
    for (int64_t c = begin + count * COLUMNS; c < end; c++) block<T, ROWS, 1>(a, input, stride, row, c, 1, 1);
}

// ------------------------------------------------------------------------------------------------ all of it

// Products of one input with `count` weights.
template <class T>
void products(const Skinny* all, int64_t count) {
    const Skinny& a = all[0];
    const int64_t stride = (a.width + T::STEP - 1) / T::STEP * T::STEP + 64 / int64_t(sizeof(typename T::Input));
    const int64_t bytes = (std::max<int64_t>(a.rows, 1) * stride * int64_t(sizeof(typename T::Input)) + 63) / 64 * 64;
    auto* input = static_cast<typename T::Input*>(std::aligned_alloc(64, bytes));
    std::fill(input, input + a.rows * stride, typename T::Input());
    for (int64_t r = 0; r < a.rows; r++) {
        auto* row = input + r * stride;
        if (a.is_float) {
            const float* x = static_cast<const float*>(a.input) + r * a.input_row;
            for (int64_t k = 0; k < a.width; k++) row[T::place(k)] = T::prepared(T::rounded(x[k]));
        } else {
            const auto* x = static_cast<const typename T::Element*>(a.input) + r * a.input_row;
            for (int64_t k = 0; k < a.width; k++) row[T::place(k)] = T::prepared(x[k]);
        }
    }
    const int64_t blocks = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t step = blocks > 1 ? CACHED : SHARE;
    const auto steps_of = [&](const Skinny& p) { return (p.columns + step - 1) / step; };
    int64_t steps = 0, size = 0;
    for (int64_t p = 0; p < count; p++) {
        steps += steps_of(all[p]);
        size += all[p].columns * all[p].width * int64_t(sizeof(typename T::Weight));
    }
    const int threads = int(std::clamp<int64_t>(std::min(steps, size / 100000), 1, a.threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int share = 0; share < threads; share++) {
        int64_t begin = steps * share / threads, end = steps * (share + 1) / threads;  // of the steps of all weights
        for (const Skinny* its = all; its < all + count; its++) {
            const int64_t its_steps = steps_of(*its), last = std::min(end, its_steps);
            const int64_t at_once = blocks > 1 ? 1 : std::max<int64_t>(last, 1);
            for (int64_t s = std::max<int64_t>(begin, 0); s < last; s += at_once) {
                const int64_t column = s * step, stop = std::min(std::min(s + at_once, last) * step, its->columns);
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t row = a.rows * b / blocks, rows = a.rows * (b + 1) / blocks - row;
                    with_count<BLOCK_ROWS>(rows, [&](auto count) {
                        block_of_columns<T, decltype(count)::value>(*its, input, stride, row, column, stop);
                    });
                }
            }
            begin -= its_steps;
            end -= its_steps;
        }
    }
    std::free(input);
}

void (*run_blocks)(const Skinny*, int64_t) = nullptr;  // of block_linear.cpp

}  // namespace

extern "C" void serve_blocks(void (*run)(const Skinny*, int64_t)) { run_blocks = run; }

// Products of one input with `count` weights, all of one type.
extern "C" void skinny_group(const Skinny* all, int64_t count) {
    if (all->type >= FORMATS) return run_blocks(all, count);
    switch (all->type) {
        case FLOAT32: return products<OfFloat32>(all, count);
        case BFLOAT16: return products<OfBFloat16Pairs>(all, count);
        case FLOAT16: return products<OfFloat16>(all, count);
        case FLOAT32 + SIGNED_BYTES: return products<OfBytes<OfFloat32>>(all, count);
        case BFLOAT16 + SIGNED_BYTES: return products<OfBytes<OfBFloat16>>(all, count);
        default: return products<OfBytes<OfFloat16>>(all, count);
    }
}

extern "C" void skinny(const Skinny* arguments) { skinny_group(arguments, 1); }
