// Products of rows with panels of vectors, whose sums stay in registers.

#pragma once

#include <cstdint>
#include <cstring>

#include "products.h"

namespace {

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

}  // namespace
