// The scan of a quantized language-model head: hidden states as codes, bounds of the logits of all rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"
#include "byte_products.h"
#include "products.h"
#include "static_counts.h"
#include "typed_numbers.h"
#include "lm_head_call.h"

namespace {

constexpr int BLOCK = HEAD_BLOCK;
constexpr float UNIT = 0x1p-24f;     // of rounding in float32

struct Numbers {                     // of the rows of a block, behind its codes
    uint16_t scale1[BLOCK], scale2[BLOCK], error1[BLOCK], error2[BLOCK], norm1[BLOCK], norm2[BLOCK];
    int32_t row[BLOCK];
};

// A hidden state as the scan reads it.
struct Query {
    bool finite;
    float offset, slack;             // h.centre; what float32 may be wrong by in an exact logit, and in the estimate
    float step1, step2;              // half the steps of the codes of h'
    int32_t sum1, sum2;              // 255 and 15 times the sums of the codes
    float norm1, norm2;              // |h'|, rounded up
    float lost1, lost2;              // |h' - h^|, rounded up
    float norm;                      // |h'| of both
};

INLINE Floats16 numbers(const uint16_t* p) {
    typedef uint16_t Halves16 __attribute__((vector_size(32)));
    Halves16 halves;
    std::memcpy(&halves, p, sizeof halves);
    return (Floats16)(__builtin_convertvector(halves, Ints16) << 16);
}

// ------------------------------------------------------------------------------------------------ hidden states

double norm_of(const float* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += double(x[i]) * double(x[i]);
    return std::sqrt(sum);
}

INLINE float up(double x) { return float(x) * (1 + 0x1p-20f); }

// Codes of x [n] in 8 bits and half their step; returns the norm of what they lose.
double to_codes(const float* x, int64_t n, int8_t* codes, float& half_step, int32_t& sum) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) top = std::max(top, std::abs(x[i]));
    const float step = top > 1e-30f ? top / 127 : 0, inverse = top > 1e-30f ? 127 / top : 0;
    double lost = 0;
    sum = 0;
    for (int64_t i = 0; i < n; i++) {
        codes[i] = int8_t(std::nearbyint(x[i] * inverse));
        const double rest = double(x[i]) - double(step) * codes[i];
        lost += rest * rest;
        sum += codes[i];
    }
    half_step = step / 2;
    return std::sqrt(lost);
}

// What the scan needs of h [C] and h' [R], beside the codes of h'.
Query prepare(const HeadSearch& a, const float* h, const float* rotated, int8_t* codes) {
    Query q{};
    const double norm = norm_of(h, a.width), size = norm_of(rotated, a.rank);
    double offset = 0;
    for (int64_t i = 0; i < a.width; i++) offset += double(h[i]) * double(a.centre[i]);
    q.finite = norm * a.largest < 1e30 && size < 1e18 && std::abs(offset) < 1e30;
    if (!q.finite) {
        std::fill(codes, codes + a.rank, int8_t(0));
        return q;
    }
    const double terms = double(a.width) / 4 + 32;  // of a sum in float32 that is made in four parts at least
    const double wrong = a.transform ? terms * UNIT * a.transform_norm * norm : 0;
    const double norm1 = norm_of(rotated, a.lead), norm2 = norm_of(rotated + a.lead, a.rank - a.lead);
    const double lost1 = to_codes(rotated, a.lead, codes, q.step1, q.sum1) + wrong;
    const double lost2 = to_codes(rotated + a.lead, a.rank - a.lead, codes + a.lead, q.step2, q.sum2) + wrong;
    q.sum1 *= 255;
    q.sum2 *= 15;
    q.norm1 = up(norm1 + wrong);
    q.norm2 = up(norm2 + wrong);
    q.lost1 = up(lost1 + 16 * UNIT * norm1);  // and the rounding of the estimate
    q.lost2 = up(lost2 + 16 * UNIT * norm2);
    q.norm = up(size + 2 * wrong);
    q.offset = float(offset);
    q.slack = up(2 * terms * UNIT * norm * a.largest + 4 * UNIT * std::abs(offset));
    return q;
}

// Rows of [M, width] as they stand in memory, each with zeros behind it that a vector may read.
struct Matrix {
    float* data;
    int64_t stride;

    static int64_t stride_for(int64_t width) { return (width + 15) / 16 * 16 + 16; }
    float* at(int64_t m) const { return data + m * stride; }
};

// y[m][n] = x[m] . w[n] for bfloat16 rows w [N, width]: one of each eighth at a time, for all x (skinny_linear.cpp says
// why).
void product(const uint16_t* w, int64_t rows, int64_t width, const Matrix& x, int64_t count, const Matrix& y,
             int threads) {
    constexpr int COLUMNS = 8;
    const int64_t whole = rows / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i <= whole; i++) {
        for (int64_t m = 0; m < count; m++) {
            if (i < whole) {
                float sums[COLUMNS];
                multiply<OfBFloat16, 1, COLUMNS>(x.at(m), 0, w + i * width, whole * width, 0, width, sums);
                UNROLL(8) for (int c = 0; c < COLUMNS; c++) y.at(m)[i + c * whole] = sums[c];
            }
            for (int64_t n = whole * COLUMNS; i == whole && n < rows; n++) {
                multiply<OfBFloat16, 1, 1>(x.at(m), 0, w + n * width, width, 0, width, y.at(m) + n);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ scan

struct Scan {
    const HeadSearch& a;
    const Query* queries;            // [M]
    const int8_t* codes;             // [M,R]
    float* bounds;                   // [M, blocks * BLOCK]
    float* largest;                  // [M, blocks]

    const Numbers& numbers_of(int64_t block) const {
        const int64_t bytes = a.block_bytes - int64_t(sizeof(Numbers));
        return *reinterpret_cast<const Numbers*>(a.codes + block * a.block_bytes + bytes);
    }
};

INLINE float bias_at(const HeadSearch& a, int64_t row) {
    return with_type(a.type, [&](auto t) {
        typedef decltype(t) T;
        return T::number(static_cast<const typename T::Element*>(a.bias)[row]);
    });
}

// What the sums of a block and a hidden state amount to.
void finish(const Scan& s, int64_t m, int64_t block, const Ints16& sums1, const Ints16& sums2) {
    const Query& q = s.queries[m];
    const Numbers& n = s.numbers_of(block);
    const Floats16 centred1 = __builtin_convertvector(sums1 * 2 - q.sum1, Floats16);
    const Floats16 centred2 = __builtin_convertvector(sums2 * 2 - q.sum2, Floats16);
    Floats16 estimate = numbers(n.scale1) * q.step1 * centred1 + numbers(n.scale2) * q.step2 * centred2 + q.offset;
    Floats16 bound = numbers(n.error1) * q.norm1 + numbers(n.error2) * q.norm2 + numbers(n.norm1) * q.lost1 +
                     numbers(n.norm2) * q.lost2;
    Ints16 row;
    std::memcpy(&row, n.row, sizeof row);
    if (s.a.bias) {
        for (int i = 0; i < BLOCK; i++) estimate[i] += bias_at(s.a, std::max(row[i], 0));
    }
    const Floats16 size = estimate < 0 ? -estimate : estimate;
    bound = estimate + bound * (1 + 0x1p-16f) + size * 0x1p-21f + q.slack;
    bound = row < 0 ? Floats16{} - INF : bound;
    std::memcpy(s.bounds + (m * s.a.blocks + block) * BLOCK, &bound, sizeof bound);
    float top = -INF;
    for (int i = 0; i < BLOCK; i++) top = std::max(top, bound[i]);
    s.largest[m * s.a.blocks + block] = top;
    if (s.a.estimates) {
        for (int i = 0; i < BLOCK; i++) {
            if (row[i] < 0) continue;
            s.a.estimates[m * s.a.vocabulary + row[i]] = estimate[i];
            s.a.bounds[m * s.a.vocabulary + row[i]] = bound[i];
        }
    }
}

// BLOCKS blocks for ROWS hidden states.
template <int ROWS, int BLOCKS>
void scan_blocks(const Scan& s, int64_t m, int64_t block) {
    const uint8_t* codes = s.a.codes + block * s.a.block_bytes;
    const int8_t* h = s.codes + m * s.a.rank;
    Ints16 sums1[ROWS][BLOCKS] = {}, sums2[ROWS][BLOCKS] = {};
    UNROLL(1) for (int64_t g = 0; g < s.a.lead / 4; g++) {
        Ints16 bytes[BLOCKS];
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            bytes[b] = bytes_at(codes + b * s.a.block_bytes + g * 64);
            __builtin_prefetch(codes + (b + BLOCKS) * s.a.block_bytes + g * 64, 0, 2);
        }
        UNROLL(16) for (int r = 0; r < ROWS; r++) {
            const int32_t x = four_at(h + r * s.a.rank + g * 4);
            UNROLL(8) for (int b = 0; b < BLOCKS; b++) sums1[r][b] = add_products(sums1[r][b], bytes[b], x);
        }
    }
    codes += s.a.lead * BLOCK;
    h += s.a.lead;
    UNROLL(1) for (int64_t g = 0; g < (s.a.rank - s.a.lead) / 8; g++) {
        Ints16 low[BLOCKS], high[BLOCKS];
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            const Ints16 bytes = bytes_at(codes + b * s.a.block_bytes + g * 64);
            low[b] = low_halves(bytes), high[b] = high_halves(bytes);
            __builtin_prefetch(codes + (b + BLOCKS) * s.a.block_bytes + g * 64, 0, 2);
        }
        UNROLL(16) for (int r = 0; r < ROWS; r++) {
            const int32_t x = four_at(h + r * s.a.rank + g * 8), y = four_at(h + r * s.a.rank + g * 8 + 4);
            UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
                sums2[r][b] = add_small_products(add_small_products(sums2[r][b], low[b], x), high[b], y);
            }
        }
    }
    Ints16 sums[ROWS][BLOCKS][2];    // in memory, so that the ones above need not be
    UNROLL(8) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            std::memcpy(&sums[r][b][0], &sums1[r][b], sizeof(Ints16));
            std::memcpy(&sums[r][b][1], &sums2[r][b], sizeof(Ints16));
        }
    }
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        UNROLL(1) for (int b = 0; b < BLOCKS; b++) finish(s, m + r, block + b, sums[r][b][0], sums[r][b][1]);
    }
}

constexpr int MAX_STATES = 8;        // hidden states that are multiplied at once

constexpr int blocks_for(int rows) { return std::clamp((LANES == 16 ? 8 : 4) / rows, 1, 8); }

template <int ROWS>
void scan_range(const Scan& s, int64_t m, int64_t begin, int64_t end) {
    constexpr int BLOCKS = blocks_for(ROWS);
    int64_t block = begin;
    for (; block + BLOCKS <= end; block += BLOCKS) scan_blocks<ROWS, BLOCKS>(s, m, block);
    for (; block < end; block++) scan_blocks<ROWS, 1>(s, m, block);
}

// clang-format off
constexpr int64_t STEP = 16;         // blocks that a thread takes at once: they stay in its cache for all hidden states
// clang-format on

void scan_all(const Scan& s, int threads) {
    const int64_t steps = (s.a.blocks + STEP - 1) / STEP, groups = (s.a.rows + MAX_STATES - 1) / MAX_STATES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = s.a.rows * g / groups, last = s.a.rows * (g + 1) / groups;
            with_count<MAX_STATES>(last - first, [&](auto rows) {
                scan_range<decltype(rows)::value>(s, first, i * STEP, std::min((i + 1) * STEP, s.a.blocks));
            });
        }
    }
}

}  // namespace
