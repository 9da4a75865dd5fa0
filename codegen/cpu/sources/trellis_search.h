// Rings of trellis codes from numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "trellis.h"
#include "vectors_of_8.h"

namespace {

// ------------------------------------------------------------------------------------------------ search of a trellis
//
// The Viterbi algorithm: a state is the WINDOW - BITS newest bits, of which each window, 2^BITS of them, leads to one.
// The cost of a window is its error's square. Sums are made in the order of fhopt/ops/trellis.py, and of equal costs
// the first counts.

constexpr int WINDOWS = 1 << WINDOW;
constexpr int AROUND = 12;          // channels on either side of the seam that the first search sees
constexpr float FARTHEST = 1024;    // numbers are searched for up to so many steps
constexpr float UNREACHED = 1e30f;  // cost of a state in which no ring may begin

INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// Of 16 numbers, those at even places and those at odd ones.
INLINE Floats even_of(Floats a, Floats b) { return SHUFFLE(Ints, a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
INLINE Floats odd_of(Floats a, Floats b) { return SHUFFLE(Ints, a, b, 1, 3, 5, 7, 9, 11, 13, 15); }

// Window s 2^BITS + r leads to state s, from state i 2^BITS + r, where i = s mod GROUPS. For each r, 8 states of a
// vector come from 8 others (1 and 2 bits: states stand in their order, and are taken apart by r) or from the same one
// (3 and 4 bits: a vector has states that differ by multiples of GROUPS).
template <int BITS>
struct Trellis {
    static constexpr int BRANCHES = 1 << BITS, STATES = WINDOWS >> BITS, GROUPS = STATES / BRANCHES;

    // Where the cost of a state stands.
    static constexpr int place(int state) { return BITS == 3 ? state % 4 * 8 + state / 4 : state; }

    // Values of windows in steps: in their order, and by r and the place of the state that they lead to.
    struct Values {
        alignas(64) float value[WINDOWS], by_branch[BRANCHES][STATES];

        Values() {
            for (int w = 0; w < WINDOWS; w++) {
                value[w] = float(TRELLIS[w]) - 127.5f;
                by_branch[w % BRANCHES][place(w / BRANCHES)] = value[w];
            }
        }
    };

    static inline const Values values;

    // Costs before a channel by r, [BRANCHES, GROUPS].
    static INLINE void take_apart(const float* before, Floats (&parts)[BRANCHES][std::max(GROUPS / 8, 1)]) {
        if constexpr (BITS == 1) {
            for (int v = 0; v < GROUPS / 8; v++) {
                const Floats a = load<Floats>(before + 16 * v), b = load<Floats>(before + 16 * v + 8);
                parts[0][v] = even_of(a, b), parts[1][v] = odd_of(a, b);
            }
        } else if constexpr (BITS == 2) {
            Floats even[4], odd[4];
            for (int v = 0; v < 4; v++) {
                const Floats a = load<Floats>(before + 16 * v), b = load<Floats>(before + 16 * v + 8);
                even[v] = even_of(a, b), odd[v] = odd_of(a, b);
            }
            for (int v = 0; v < 2; v++) {
                parts[0][v] = even_of(even[2 * v], even[2 * v + 1]), parts[2][v] = odd_of(even[2 * v], even[2 * v + 1]);
                parts[1][v] = even_of(odd[2 * v], odd[2 * v + 1]), parts[3][v] = odd_of(odd[2 * v], odd[2 * v + 1]);
            }
        }
    }

    // Costs of states behind one more channel, from those before it.
    static INLINE void step(const float* before, float x, float* after) {
        Floats parts[BRANCHES][std::max(GROUPS / 8, 1)];
        take_apart(before, parts);
        for (int v = 0; v < STATES / 8; v++) {
            Floats least;
            for (int r = 0; r < BRANCHES; r++) {
                const Floats error = x - load<Floats>(values.by_branch[r] + 8 * v), square = error * error;
                Floats cost;
                if constexpr (BITS <= 2) cost = parts[r][v % (GROUPS / 8)] + square;
                else cost = before[place((BITS == 3 ? v : 0) * BRANCHES + r)] + square;
                least = r ? lesser(cost, least) : cost;
            }
            store(after + 8 * v, least);
        }
    }

    // The window of the channel between costs `before` and a state.
    static INLINE int window(const float* before, float x, int state) {
        const int first = state * BRANCHES, from = first & (STATES - 1);
        alignas(32) float costs[BRANCHES];
        for (int r = 0; r < BRANCHES; r++) {
            const float error = x - values.value[first + r];
            costs[r] = before[place(from + r)] + error * error;
        }
        if constexpr (BITS >= 3) return first + first_of_least(costs);
        int found = 0;
        for (int r = 1; r < BRANCHES; r++) found = costs[r] < costs[found] ? r : found;
        return first + found;
    }

    // The first of the least of 8 or 16 numbers.
    static INLINE int first_of_least(const float* costs) {
        const Floats low = load<Floats>(costs), high = load<Floats>(costs + (BRANCHES - 8));
        Floats least = lesser(low, high);
        least = lesser(least, SHUFFLE(Ints, least, least, 4, 5, 6, 7, 0, 1, 2, 3));
        least = lesser(least, SHUFFLE(Ints, least, least, 2, 3, 0, 1, 6, 7, 4, 5));
        least = lesser(least, SHUFFLE(Ints, least, least, 1, 0, 3, 2, 5, 4, 7, 6));
#if defined(__AVX__)
        const auto places = [&](Floats x) {
            return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)least, _CMP_EQ_OQ)));
        };
        return __builtin_ctz(places(low) | places(high) << (BRANCHES - 8));
#else
        int found = 0;
        while (costs[found] != least[0]) found++;
        return found;
#endif
    }

    // The windows of least error for x [width] from channel `first` on, from any state to any, or from the state
    // `closed` to itself. costs [width + 1, STATES].
    static void search(const float* x, int64_t width, int closed, float* costs, uint8_t* found, int64_t first = 0) {
        std::fill_n(costs, STATES, closed < 0 ? 0.0f : UNREACHED);
        if (closed >= 0) costs[place(closed)] = 0;
        for (int64_t c = 0; c < width; c++) step(costs + c * STATES, x[c], costs + (c + 1) * STATES);
        const float* last = costs + width * STATES;
        int state = std::max(closed, 0);
        for (int s = 1; closed < 0 && s < STATES; s++) state = last[place(s)] < last[place(state)] ? s : state;
        for (int64_t c = width - 1; c >= first; c--) {
            found[c] = uint8_t(window(costs + c * STATES, x[c], state));
            state = found[c] & (STATES - 1);
        }
    }

    // x [width], a multiple of 8 -> a ring
    static void encode(const float* x, int64_t width, uint8_t* ring) {
        const int64_t around = std::min<int64_t>(AROUND, width / 2);
        thread_local std::vector<float> costs;
        thread_local std::vector<uint8_t> found;
        if (costs.size() < size_t(width + 1) * STATES) costs.resize((width + 1) * STATES);
        if (found.size() < size_t(width)) found.resize(width);
        float seam[2 * AROUND];
        std::copy_n(x + width - around, around, seam);
        std::copy_n(x, around, seam + around);
        search(seam, 2 * around, -1, costs.data(), found.data(), around - 1);
        search(x, width, found[around - 1] >> BITS, costs.data(), found.data());
        for (int64_t i = 0; i < width; i += 8) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= uint64_t(found[i + j] >> (WINDOW - BITS)) << j * BITS;
            std::memcpy(ring + i / 8 * BITS, &word, BITS);
        }
    }
};

void write_ring(const float* x, int64_t width, int bits, uint8_t* ring) {
    switch (bits) {
        case 1: return Trellis<1>::encode(x, width, ring);
        case 2: return Trellis<2>::encode(x, width, ring);
        case 3: return Trellis<3>::encode(x, width, ring);
        default: return Trellis<4>::encode(x, width, ring);
    }
}

}  // namespace
