// Scores of a tile of keys as bytes, with AVX-512 VNNI.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "byte_codes.h"

namespace {

#if BYTES

// 16 numbers of a query of floats, for the codes of keys from `first` on; 0 behind the last.
INLINE Floats16 query_of_codes(const Kernel& k, const float* query, int first) {
    const int lanes = std::min(k.key.layout.count() - first, 16);
    const Code* codes = k.key.layout.codes.data() + first;
    if (lanes <= 0) return Floats16{};
    if (k.in_order) {
        const __mmask16 mask = __mmask16((1 << lanes) - 1);
        return (Floats16)_mm512_maskz_loadu_ps(mask, query + codes->channel) * load(k.key_factor.data() + first);
    }
    alignas(64) float q[16] = {};
    for (int lane = 0; lane < lanes; lane++) q[lane] = query[codes[lane].channel] * k.key_factor[first + lane];
    return load(q);
}

// A query of floats in the order of channels -> its parts, [3, key_dwords, 4], and what one stands for. What the middle
// of all codes adds to a logit: by all digits but the lowest, and by the lowest. Channels from `fine` on have one part,
// where others have their lowest digit, in units of `coarse`; what their middle adds is among the former.
void to_parts(const Kernel& k, const float* query, int fine, int8_t* parts, float& unit, float& middle, float& lowest,
              float& coarse) {
    const int padded = 4 * k.key_dwords;
    Floats most = {}, least = {}, nothing = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i), size = q < 0.0f ? -q : q;
        if (i < fine) most = size > most ? size : most;
        else least = size > least ? size : least;
        nothing += q * 0.0f;  // NaN stays NaN
    }
    const float largest = largest_of(most), none = sum_of(nothing);
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    coarse = largest_of(least) / largest_integer(1);
    const float inverse_of_coarse = coarse > 1e-30f ? 1 / coarse : 0.0f;
    Floats sum = {}, low = {}, one = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i);
        if (i >= fine) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse_of_coarse));
            store_parts<1>(x, parts + i, padded);
            one += __builtin_convertvector(x, Floats16) * load(k.key_middle.data() + i);
            continue;
        }
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse));
        store_parts<3>(x, parts + i, padded);
        const Ints16 digit = (x << 24) >> 24;
        sum += __builtin_convertvector(x - digit, Floats16) * load(k.key_middle.data() + i);
        low += __builtin_convertvector(digit, Floats16) * load(k.key_middle.data() + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit + sum_of(one) * coarse;
    lowest = sum_of(low) * unit;
}

// Logits without the lowest of the three digits of queries; of codes from dword `fine` on with the one they have.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int fine, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * k.key_dwords;
    multiply<ROWS, VECTORS, 2>(codes, 1, k.key_vectors, query, k.key_dwords, fine, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] = joined(sums[r][v]) * unit - s.middle[row + r];
    }
    if (fine < k.key_vectors) {
        __m512i rest[ROWS][VECTORS][1];
        const int32_t* parts = query - k.key_dwords + fine;
        multiply<ROWS, VECTORS, 1>(codes + fine, 1, k.key_vectors, parts, k.key_dwords, k.key_vectors - fine, rest);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] += joined(rest[r][v]) * s.coarse[row + r];
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] *= load(s.scale + t + 16 * v);
    }
    UNROLL(1) for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(5) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) store(s.logits + (row + r) * TILE + t + 16 * v, x[r][v]);
    }
}

// What the lowest digit adds to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][1];
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * k.key_dwords;
    multiply<ROWS, VECTORS, 1>(codes, 1, k.key_vectors, query, k.key_dwords, k.key_vectors, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 16 * v;
            const Floats16 more = joined(sums[r][v]) * s.unit[row + r] - s.lowest[row + r];
            store(x, load(x) + more * load(s.scale + t + 16 * v));
        }
    }
}

template <int ROWS, int VECTORS, class F>
INLINE void for_vectors(int whole, F f) {
    int t = 0;
    for (; t + 16 * VECTORS <= whole; t += 16 * VECTORS) f(t, std::integral_constant<int, VECTORS>());
    for (; t < whole; t += 16) f(t, std::integral_constant<int, 1>());
}

// Sums of 16 vectors: those of four and four, then of the quarters that are left.
INLINE Floats16 sums_of_4(const Floats16 (&x)[4]) {
    const __m512 ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)) + _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
}

INLINE Floats16 sums_of_quarters(Floats16 x, Floats16 y) {
    return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd);
}

// PARTS digits of the query of one row, from `parts` on, times the codes of 16 tokens as they lie in their rows.
template <Kind KIND, int PARTS>
INLINE Floats16 products_of_row(const Kernel& k, const Sixteen& rows, const int8_t* parts) {
    Floats16 fours[4];
    UNROLL(2) for (int i = 0; i < 4; i += 2) {
        __m512i sums[8][PARTS] = {};
        const int8_t* part = parts;
        for (const Slice& slice : k.key.layout.slices) {
            const Taken<KIND> taken(slice);
            __m512i query[PARTS];
            UNROLL(2) for (int n = 0; n < PARTS; n++) query[n] = _mm512_loadu_si512(part + n * 4 * k.key_dwords);
            UNROLL(8) for (int t = 0; t < 8; t++) {
                const __m512i codes = taken.codes_of(rows[4 * i + t]);
                UNROLL(2) for (int n = 0; n < PARTS; n++) sums[t][n] = add_products(sums[t][n], codes, query[n]);
            }
            part += 64;
        }
        UNROLL(2) for (int n = 0; n < 2; n++) {
            Floats16 x[4];
            UNROLL(4) for (int t = 0; t < 4; t++) x[t] = joined(sums[4 * n + t]);
            fours[i + n] = sums_of_4(x);
        }
    }
    return sums_of_quarters(sums_of_quarters(fours[0], fours[1]), sums_of_quarters(fours[2], fours[3]));
}

// Logits of a tile of keys for one row; KIND serves all slices.
template <Kind KIND>
void score_row(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    const int8_t* parts = s.parts + row * 12 * k.key_dwords;
    float* logits = s.logits + row * TILE;
    const float unit = s.unit[row];
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        const Floats16 high = products_of_row<KIND, 2>(k, z, parts + 4 * k.key_dwords);
        Floats16 x = (high * (unit * 256.0f) - s.middle[row]) * load(s.scale + t);
        unpack_halves(k, z, s.halves + t);
        for (int i = 0; i < k.halves; i++) {
            x += s.query[row * k.key.pad + k.key.layout.half_channel[i]] * load(s.halves + i * TILE + t);
        }
        store(logits + t, x);
    }
    if (a.digits == 2) return;
    set_limits(a, row, 1, s);
    for (int t = 0; t < whole; t += 16) {
        if (are_minor<1>(row, t, 16, s)) continue;
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s);
        const Floats16 more = products_of_row<KIND, 1>(k, z, parts) * unit - s.lowest[row];
        store(logits + t, load(logits + t) + more * load(s.scale + t));
    }
}

// Digits of the queries of few rows from `row` on, as `score_slice` reads them: int32 [key_dwords, 3, rows].
INLINE int32_t* digits_of_few(int64_t row, const Scratch& s) {
    return reinterpret_cast<int32_t*>(s.parts) + (s.rows + row) * 3 * s.kernel.key_dwords;
}

void arrange_queries(const Attention& a, int64_t row, int rows, Scratch& s) {
    if (!are_few(a, rows)) return;
    const int width = s.kernel.key_dwords;
    const int32_t* parts = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * width;
    int32_t* out = digits_of_few(row, s);
    for (int part = 0; part < 3; part++) {
        for (int r = 0; r < rows; r++) {
            const int32_t* from = parts + (3 * r + part) * width;
            for (int i = 0; i < width; i++) out[(3 * i + part) * rows + r] = from[i];
        }
    }
}

// Logits of a tile of keys for few rows from a slice on that begins with dword `first`; in the scratch are sums of the
// slices before, of each digit. Codes from dword `fine` on are multiplied by the lowest digits, others by the two more.
template <int ROWS, Kind KIND>
INLINE void score_slice(const Taken<KIND>& taken, const Attention& a, const Part& p, int64_t j, int64_t begin,
                        int tokens, int64_t row, int first, int fine, Scratch& s) {
    const Kernel& k = s.kernel;
    const int count = k.key_vectors - first, of_two = fine - first;
    const bool is_last = count <= 16;
    const int32_t* digits = digits_of_few(row, s) + first * 3 * ROWS;
    auto* kept = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < tokens; t += 16, kept += 3 * ROWS) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, first == 0, s);
        __m512i x[16], sums[3][ROWS];
        UNROLL(16) for (int i = 0; i < 16; i++) x[i] = taken.codes_of(z[i]);
        transpose(x);
        UNROLL(3) for (int part = 0; part < 3; part++) {
            UNROLL(3) for (int r = 0; r < ROWS; r++) {
                sums[part][r] = first ? _mm512_load_si512(kept + part * ROWS + r) : __m512i{};
            }
        }
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            if (i >= count) break;
            if (i < of_two) {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[1][r] = add_products(sums[1][r], x[n], digits[(3 * n + 1) * ROWS + r]);
                        sums[2][r] = add_products(sums[2][r], x[n], digits[(3 * n + 2) * ROWS + r]);
                    }
                }
            } else {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[0][r] = add_products(sums[0][r], x[n], digits[3 * n * ROWS + r]);
                    }
                }
            }
        }
        if (!is_last) {
            UNROLL(3) for (int part = 0; part < 3; part++) {
                UNROLL(3) for (int r = 0; r < ROWS; r++) _mm512_store_si512(kept + part * ROWS + r, sums[part][r]);
            }
            continue;
        }
        if (k.halves) unpack_halves(k, z, s.halves + t);
        UNROLL(3) for (int r = 0; r < ROWS; r++) {
            const __m512i high[2] = {sums[1][r], sums[2][r]};
            Floats16 logits = joined(high) * (s.unit[row + r] * 256.0f) - s.middle[row + r];
            logits += __builtin_convertvector((Ints16)sums[0][r], Floats16) * s.coarse[row + r];
            logits *= load(s.scale + t);
            for (int i = 0; i < k.halves; i++) {
                const float q = s.query[(row + r) * k.key.pad + k.key.layout.half_channel[i]];
                logits += q * load(s.halves + i * TILE + t);
            }
            store(s.logits + (row + r) * TILE + t, logits);
        }
    }
}

template <int ROWS>
void score_few(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
               Scratch& s) {
    int first = 0;
    for (const Slice& slice : s.kernel.key.layout.slices) {
        with_slice(slice,
                   [&](const auto& taken) { score_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, s); });
        first += 16;
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        return with_kind(k.key.layout.kind,
                         [&](auto kind) { score_row<decltype(kind)::value>(a, p, j, begin, tokens, row, s); });
    }
    const int whole = whole_vectors(tokens), fine = std::min(fine_keys(a, rows, k) / 4, k.key_vectors);  // dwords
    if (are_few(a, rows)) {
        if (rows == 2) score_few<2>(a, p, j, begin, tokens, row, fine, s);
        else score_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        unpack_keys(k, z, codes + t / 16 * k.key_vectors);
        unpack_halves(k, z, s.halves + t);
    }
    for_blocks_of_rows<MAX_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        // clang-format off
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, fine, s);
        });
        if (a.digits == 2) return;
        set_limits(a, row + first, ROWS, s);
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            if (!are_minor<ROWS>(row + first, t, 16 * VECTORS, s)) score_low<ROWS, VECTORS>(row + first, t, s);
        });
        // clang-format on
    });
}

#endif

}  // namespace
