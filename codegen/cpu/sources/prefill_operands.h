// Operands of products in attention of many queries: floats, pairs of bfloat16, tiles of the matrix unit.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX_UNIT true
#else
#define MATRIX_UNIT false
#endif

#include "vectors.h"
#include "exponential.h"
#include "typed_numbers.h"
#include "panels.h"
#include "prefill_call.h"

namespace {

int64_t first_of(const OpenAttention& a, int64_t query) {
    return a.spans ? std::clamp<int64_t>(a.spans[2 * query], 0, a.tokens) : 0;
}

int64_t end_of(const OpenAttention& a, int64_t query) {
    return a.spans ? std::clamp<int64_t>(a.spans[2 * query + 1], 0, a.tokens) : a.tokens;
}

constexpr int64_t TILE = 256, BLOCK = 96;  // tokens and queries
constexpr int64_t MAX_BYTES = 1 << 24;  // of keys and values in order at once, if not of one head
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

}  // namespace
