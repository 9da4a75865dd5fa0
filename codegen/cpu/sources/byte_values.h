// Mixes of a tile of values as bytes, with AVX-512 VNNI.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "byte_codes.h"

namespace {

#if BYTES

constexpr Ints16 LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What the integers of a row's weights stand for, and their sum; that of the same weights in one byte.
struct Weights {
    float unit, total, bytes;
};

// What becomes of a tile's weights: two or three digits, one byte each beside two digits, or that byte alone.
enum Digits { ALL_DIGITS, TWO_AND_BYTES, BYTES_ALONE };

// Weights of a tile of values times the tokens' scales, split into as many parts as is returned; weights in one byte
// stand in the third. What that rounds away goes to the token that stands 16 behind, so that many small weights are not
// lost together: where their tokens share a mean, it would be missing.
template <int ROWS>
int scale_and_split(Digits wanted, int64_t row, int whole, int64_t digits, Weights* weights, Scratch& s) {
    Floats tops[ROWS] = {}, masses[ROWS] = {};
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        const Floats scale = load(s.scale + t);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            float* w = s.logits + (row + r) * TILE + t;
            const Floats scaled = load(w) * scale;
            store(w, scaled);
            masses[r] += scaled;
            tops[r] = scaled > tops[r] ? scaled : tops[r];
        }
    }
    bool small = true;  // in all rows
    float inverse[ROWS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        State& state = s.states[row + r];
        state.mass += sum_of(masses[r]);
        weights[r].unit = largest_of(tops[r]);
        small &= weights[r].unit * SMALL <= state.mass;
    }
    small |= wanted != ALL_DIGITS || digits == 2;
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float limit = largest_integer(small ? 2 : 3);
        inverse[r] = weights[r].unit > 1e-30f ? limit / weights[r].unit : 0.0f;
        weights[r].unit /= limit;
    }
    Ints16 sums[ROWS] = {}, bytes[ROWS] = {}, rest[ROWS];
    for (Ints16& x : rest) x = (LANE_NUMBERS - 7) * 16 + 120;  // not all lanes round up at once
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(s.logits + (row + r) * TILE + t) * inverse[r]));
            int8_t* parts = s.weights + 3 * r * TILE + t;
            if (wanted != BYTES_ALONE) {
                sums[r] += x;
                if (small) store_parts<2>(x, parts, TILE);
                else store_parts<3>(x, parts, TILE);
            }
            if (wanted == ALL_DIGITS) continue;
            rest[r] = (rest[r] & 255) + x;
            const Ints16 byte = rest[r] >> 8;
            bytes[r] += byte;
            _mm_store_si128(reinterpret_cast<__m128i*>(parts + 2 * TILE), _mm512_cvtepi32_epi8((__m512i)byte));
        }
    }
    const auto all = [](Ints16 y) { return float(_mm512_reduce_add_epi32((__m512i)y)); };
    UNROLL(5) for (int r = 0; r < ROWS; r++) weights[r].total = all(sums[r]), weights[r].bytes = all(bytes[r]);
    return small ? 2 : 3;
}

// Sums of products from vector `vector` on, without the middle of the codes, are added to a state.
template <int VECTORS, int PARTS>
INLINE void add_sums(const __m512i (&sums)[VECTORS][PARTS], const Side& side, int vector, int count, float unit,
                     float total, State& to) {
    UNROLL(4) for (int v = 0; v < VECTORS; v++) {
        if (v >= count) continue;
        float* sum = to.sum + 16 * (vector + v);
        const Floats16 x = joined(sums[v]) - total * load(side.middle.data() + 16 * (vector + v));
        store(sum, load(sum) + unit * x);
    }
}

// Of PARTS 1 the weights in one byte.
template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const Weights* weights, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    const auto* parts = reinterpret_cast<const int32_t*>(s.weights + (PARTS == 1 ? 2 * TILE : 0));
    multiply<ROWS, VECTORS, PARTS>(codes, s.kernel.value_vectors, 1, parts, TILE / 4, count, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        const float unit = PARTS == 1 ? 256 * w.unit : w.unit, total = PARTS == 1 ? w.bytes : w.total;
        add_sums(sums[r], s.kernel.value, vector, VECTORS, unit, total, states[r]);
    }
}

// Vectors of channels from `begin` to `end`.
template <int ROWS, int PARTS>
void mix_block(int begin, int end, int count, const Weights* weights, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS);
    const int rest = (end - begin) % VECTORS;
    for (int v = begin; v < end - rest; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, weights, states, s);
    with_count<VECTORS - 1>(rest, [&](auto vectors) {
        mix_bytes<ROWS, decltype(vectors)::value, PARTS>(end - rest, count, weights, states, s);
    });
}

// One row: codes are multiplied as soon as they are there.
template <int PARTS>
void mix_row(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, float unit, float total,
             State& state, Scratch& s) {
    const Side& side = s.kernel.value;
    int vector = 0;
    for (const Slice& slice : side.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i sums[4][PARTS] = {};
            for (int t = 0; t < tokens; t += 16) {
                const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, vector == 0, s);
                UNROLL(4) for (int i = 0; i < 16; i += 4) {
                    __m512i codes[4];
                    unpack_slice(taken, z, i, codes);
                    UNROLL(3) for (int part = 0; part < PARTS; part++) {
                        const int32_t& weight = *reinterpret_cast<const int32_t*>(s.weights + part * TILE + t + i);
                        UNROLL(4) for (int v = 0; v < 4; v++) {
                            sums[v][part] = add_products(sums[v][part], codes[v], weight);
                        }
                    }
                }
            }
            add_sums(sums, side, vector, s.kernel.value_vectors - vector, unit, total, state);
        });
        vector += 4;
    }
}

// The weights of a tile for vectors of 16 channels, of which those from `fine` on are multiplied by one byte.
template <int ROWS>
INLINE int split_for(const Attention& a, int fine, int64_t row, int whole, Weights* weights, Scratch& s) {
    const bool all = fine == s.kernel.value_vectors;
    const Digits wanted = all ? ALL_DIGITS : fine == 0 ? BYTES_ALONE : TWO_AND_BYTES;
    return scale_and_split<ROWS>(wanted, row, whole, a.digits, weights, s);
}

// Few rows: codes of a slice that begins with vector `first` are multiplied as soon as they are there.
template <int ROWS, Kind KIND>
INLINE void mix_slice(const Taken<KIND>& taken, const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens,
                      int64_t row, int first, int fine, const Weights* weights, Scratch& s) {
    const Side& side = s.kernel.value;
    const int count = s.kernel.value_vectors - first, of_two = fine - first;
    const auto* digits = reinterpret_cast<const int32_t*>(s.weights);
    __m512i sums[ROWS][4][2] = {};
    for (int t = 0; t < tokens; t += 16) {
        const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, first == 0, s);
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            __m512i codes[4];
            unpack_slice(taken, z, i, codes);
            const int32_t* digit = digits + (t + i) / 4;
            UNROLL(4) for (int v = 0; v < 4; v++) {
                if (v >= count) break;
                if (v < of_two) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        UNROLL(2) for (int part = 0; part < 2; part++) {
                            const int32_t& factor = digit[(3 * r + part) * (TILE / 4)];
                            sums[r][v][part] = add_products(sums[r][v][part], codes[v], factor);
                        }
                    }
                } else {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[r][v][0] = add_products(sums[r][v][0], codes[v], digit[(3 * r + 2) * (TILE / 4)]);
                    }
                }
            }
        }
    }
    UNROLL(3) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        State& state = s.states[row + r];
        UNROLL(4) for (int v = 0; v < 4; v++) {
            if (v >= count) break;
            const __m512i two[1][2] = {{sums[r][v][0], sums[r][v][1]}}, one[1][1] = {{sums[r][v][0]}};
            if (v < of_two) add_sums(two, side, first + v, 1, w.unit, w.total, state);
            else add_sums(one, side, first + v, 1, 256 * w.unit, w.bytes, state);
        }
    }
}

template <int ROWS>
void mix_few(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
             Scratch& s) {
    Weights weights[ROWS];
    split_for<ROWS>(a, fine, row, whole_vectors(tokens), weights, s);
    int first = 0;
    for (const Slice& slice : s.kernel.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            mix_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, weights, s);
        });
        first += 4;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Attention& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    const Kernel& k = s.kernel;
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        Weights w;
        const int parts = scale_and_split<1>(ALL_DIGITS, row, whole, a.digits, &w, s);
        if (parts == 2) mix_row<2>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        else mix_row<3>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        return;
    }
    const int fine = std::min(fine_values(a, k) / 16, k.value_vectors);
    if (are_few(a, rows)) {
        if (rows == 2) mix_few<2>(a, p, j, begin, tokens, row, fine, s);
        else mix_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.value, a.value, p, j, begin, t, tokens, true, s);
        unpack_values(k, z, codes + t / 4 * k.value_vectors);
    }
    for_blocks_of_rows<MAX_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        Weights weights[ROWS];
        State* states = s.states + row + first;
        const int parts = split_for<ROWS>(a, fine, row + first, whole, weights, s);
        if (parts == 2) mix_block<ROWS, 2>(0, fine, whole / 4, weights, states, s);
        else mix_block<ROWS, 3>(0, fine, whole / 4, weights, states, s);
        mix_block<ROWS, 1>(fine, k.value_vectors, whole / 4, weights, states, s);
    });
}

#endif

}  // namespace
