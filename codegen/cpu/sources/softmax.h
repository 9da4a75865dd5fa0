// The running softmax: masks, caps, weights.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention_part.h"
#include "exponential.h"

namespace {

// ------------------------------------------------------------------------------------------------ softmax

template <class T, class F>
INLINE void for_mask(const Attention& a, const Part& p, int row, int64_t begin, int tokens, F f) {
    const T* m = row_at<T>(a.mask, p.b, p.head + row / p.queries, p.query + row % p.queries);
    for (int t = 0; t < tokens; t += SIDE_BY_SIDE) {
        const T* run = m + p.listed.at(begin + t) * a.mask_token;
        for (int i = 0; i < std::min(tokens - t, SIDE_BY_SIDE); i++) f(t + i, run[i * a.mask_token]);
    }
}

// The lowest finite number of a mask stays finite: a row that it hides whole still attends, evenly.
INLINE float in_base_2(float m) {
    return m == -INF ? m : std::max(m * float(LOG2E), std::numeric_limits<float>::lowest() / 2);
}

void add_mask(const Attention& a, const Part& p, int row, int64_t begin, int tokens, float* __restrict x) {
    if (a.mask_kind == BOOL_MASK) {
        for_mask<uint8_t>(a, p, row, begin, tokens, [x](int t, uint8_t m) { x[t] = m ? x[t] : -INF; });
    } else if (a.mask_kind == ADDITIVE_MASK) {
        for_mask<float>(a, p, row, begin, tokens, [x](int t, float m) { x[t] += in_base_2(m); });
    }
}

// Nothing may be attended to, as with tokens of a fixed cache that have not come yet. Rows of other heads are looked at
// only where their masks differ.
bool is_hidden(const Attention& a, const Part& p, int64_t begin, int tokens) {
    if (a.mask_kind == NO_MASK) return false;
    const int rows = int(a.mask.head == 0 ? p.queries : p.rows());
    bool seen = false;
    for (int r = 0; r < rows && !seen; r++) {
        if (a.mask_kind == BOOL_MASK) {
            for_mask<uint8_t>(a, p, r, begin, tokens, [&seen](int, uint8_t m) { seen |= m != 0; });
        } else {
            for_mask<float>(a, p, r, begin, tokens, [&seen](int, float m) { seen |= m != -INF; });
        }
    }
    return !seen;
}

void cap(float* x, int tokens, float softcap) {
    for (int t = 0; t < tokens; t += LANES) store(x + t, tanh(load(x + t)) * (softcap * float(LOG2E)));
}

// Logits of a tile become weights relative to the largest logit so far; earlier sums are brought to the same base.
void to_weights(float* __restrict x, int tokens, int sums, State& state) {
    Floats tops = load(x);
    for (int t = LANES; t < tokens; t += LANES) tops = load(x + t) > tops ? load(x + t) : tops;
    const float top = std::max(state.top, largest_of(tops));
    if (top > state.top) {
        const float factor = std::exp2(state.top - top);
        for (int i = 0; i < sums; i++) state.sum[i] *= factor;
        state.total *= factor;
        state.mass *= factor;
        state.top = top;
    }
    const float base = top == -INF ? 0.0f : top;  // all masked so far: weights are 0, not NaN
    Floats total = {};
    for (int t = 0; t < tokens; t += LANES) {
        const Floats w = exp2(load(x + t) - base);
        store(x + t, w);
        total += w;
    }
    state.total += sum_of(total);
}

}  // namespace
