// What attention on a cache does around its kernels, wherever the cache stands: products with bases, means, merging.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cache_call.h"
#include "products.h"
#include "static_counts.h"
#include "turning.h"
#include "typed_numbers.h"

namespace {

// ------------------------------------------------------------------------------------------------ products with bases

// y(r)[c] = sum_i x(r)[i] basis[i * step + c] for ROWS rows and VECTORS vectors of columns, added to what is there if
// `adds` says so. T: of products.h, the type of the basis.
template <class T, int ROWS, int VECTORS, class X, class Y>
INLINE void times_vectors(X x, const typename T::Element* basis, int64_t step, int64_t n, bool adds, Y y) {
    Floats sums[ROWS][VECTORS] = {};
    UNROLL(8) for (int r = 0; r < ROWS && adds; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) sums[r][v] = load(y(r) + v * LANES);
    }
    UNROLL(1) for (int64_t i = 0; i < n; i++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) {
            const Floats b = T::weight(basis + i * step + v * LANES);
            UNROLL(8) for (int r = 0; r < ROWS; r++) sums[r][v] += x(r)[i] * b;
        }
    }
    UNROLL(8) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int v = 0; v < VECTORS; v++) store(y(r) + v * LANES, sums[r][v]);
    }
}

// y[m] = x[n] B, of fewer columns than a vector has.
template <class T>
void times_few(const float* x, const typename T::Element* basis, int64_t n, int64_t m, float* y) {
    std::fill(y, y + m, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t c = 0; c < m; c++) y[c] += x[i] * T::number(basis[i * m + c]);
    }
}

// Sums of so many rows, and of so many vectors of each, stay in registers.
constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : 4;
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

// Columns [begin, end) of y(r) = x(r) B for `count` rows, added to what is there if `adds` says so. B [n,m], dense.
template <class T, class X, class Y>
void times(const typename T::Element* basis, int64_t n, int64_t m, int64_t begin, int64_t end, int64_t count, bool adds,
           X x, Y y) {
    for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
        with_count<ROWS_AT_ONCE>(std::min<int64_t>(count - first, ROWS_AT_ONCE), [&](auto rows) {
            constexpr int ROWS = decltype(rows)::value;
            const float* from[ROWS];
            float *to[ROWS], last[ROWS][LANES];
            for (int r = 0; r < ROWS; r++) from[r] = x(first + r), to[r] = y(first + r);
            const auto row = [&](int r) { return from[r]; };
            int64_t c = begin;
            for (int64_t left; (left = (end - c) / LANES) > 0;) {
                with_count<vectors_for(ROWS)>(std::min<int64_t>(left, vectors_for(ROWS)), [&](auto vectors) {
                    constexpr int VECTORS = decltype(vectors)::value;
                    times_vectors<T, ROWS, VECTORS>(row, basis + c, m, n, adds, [&](int r) { return to[r] + c; });
                    c += VECTORS * LANES;
                });
            }
            if (c == end) return;
            if (end >= LANES) {  // a whole vector, which begins with columns that others have
                times_vectors<T, ROWS, 1>(row, basis + end - LANES, m, n, false, [&](int r) { return last[r]; });
            } else {
                for (int r = 0; r < ROWS; r++) times_few<T>(from[r], basis, n, m, last[r] + LANES - end);
            }
            for (int r = 0; r < ROWS; r++) {
                for (int64_t k = c; k < end; k++) to[r][k] = (adds ? to[r][k] : 0.0f) + last[r][LANES - end + k];
            }
        });
    }
}

// Calls f(type, matrix) with a matrix of a basis, of its type.
template <class F>
void with_matrix(const CacheBasis& basis, int64_t matrix, F f) {
    with_type(basis.type, [&](auto type) {
        typedef typename decltype(type)::Element Element;
        f(type, static_cast<const Element*>(basis.data) + matrix * basis.n * basis.m);
    });
}

// The same with a matrix of a basis.
template <class X, class Y>
void times(const CacheBasis& basis, int64_t matrix, int64_t begin, int64_t end, int64_t count, bool adds, X x, Y y) {
    with_matrix(basis, matrix, [&](auto type, auto data) {
        times<decltype(type)>(data, basis.n, basis.m, begin, end, count, adds, x, y);
    });
}

// ------------------------------------------------------------------------------------------------ memory

// Floats of a call, in memory that a thread keeps from one call to the next: what is asked for first, then where it is.
// What stands there is what was left.
class Memory {
    std::vector<float> floats;
    std::vector<std::pair<float**, int64_t>> wanted;

  public:
    void want(float*& at, int64_t count) { wanted.push_back({&at, (count + 15) / 16 * 16}); }

    void give() {
        int64_t all = 0;
        for (const auto& [at, count] : wanted) all += count;
        if (int64_t(floats.size()) < all) floats.resize(all);
        float* next = floats.data();
        for (const auto& [at, count] : wanted) {
            *at = next;
            next += count;
        }
        wanted.clear();
    }
};

// ------------------------------------------------------------------------------------------------ means and merging

// Of a query head of a sequence; null where there is none.
inline const float* mean_of(const CacheMean& mean, int64_t b, int64_t h) {
    return mean.data ? mean.data + b * mean.sequence + h / mean.group * mean.head : nullptr;
}

// What a mean of keys, from which those of a part are differences, adds to the logits of a query.
inline float mean_logit(const float* query, const float* mean, int64_t size, double scale) {
    return float(scale) * dot(query, mean, size);
}

// A query as it reads latents of each segment, and what a mean of keys, from which those are differences, adds to its
// logits (0 without one): rows of `to` and of `shifts`, steps apart. runs: see `is_in_runs`. b: the sequence.
inline void rotate_query(const Turning& turn, bool runs, int64_t b, const float* query, int64_t size, int64_t segments,
                         float* to, int64_t step, const float* mean, double scale, float* shifts, int64_t shift_step) {
    for (int64_t k = 0; k < segments; k++, to += step) {
        if (turn.segment) rotate(turn, query, size, k, to, b, runs);
        shifts[k * shift_step] = mean ? mean_logit(turn.segment ? to : query, mean, size, scale) : 0.0f;
    }
}

// A key or value, number `token` behind the sinks, as its basis encodes it: rotated back to its segment, less the mean.
inline void set_encoder_input(const Turning& turn, bool runs, int64_t b, const float* x, int64_t size, int64_t token,
                              const float* mean, float* to) {
    if (turn.segment) rotate(turn, x, size, token / turn.segment, to, b, runs);
    else std::copy(x, x + size, to);
    for (int64_t c = 0; mean && c < size; c++) to[c] -= mean[c];
}

// A part of what a query head attends to, as its kernel leaves it: of latents the output is not expanded. has_mean: its
// values are differences from a mean.
struct ReadPart {
    float lse;
    const float* output;
    bool is_latents, has_mean;
};

// Merges parts by their log-sum-exps; `each` calls its argument with every part. Outputs go to out [width], of latents
// to `latents` [rank]. Returns how much those parts weigh, of 1, whose values are differences from a mean.
template <class Each>
float merge_parts(Each each, float* out, int64_t width, float* latents, int64_t rank) {
    float top = -INF, total = 0, of_means = 0;
    each([&](const ReadPart& part) { top = std::max(top, part.lse); });
    const float base = top == -INF ? 0.0f : top;  // nothing is seen: weights are 0, not NaN
    each([&](const ReadPart& part) { total += std::exp(part.lse - base); });
    const float inverse = total == 0 ? 0.0f : 1 / total;
    std::fill(out, out + width, 0.0f);
    std::fill(latents, latents + rank, 0.0f);
    each([&](const ReadPart& part) {
        const float weight = inverse * std::exp(part.lse - base);
        float* to = part.is_latents ? latents : out;
        const int64_t count = part.is_latents ? rank : width;
        for (int64_t c = 0; c < count; c++) to[c] += weight * part.output[c];
        of_means += part.has_mean ? weight : 0.0f;
    });
    return of_means;
}

// Where there is one.
inline void add_mean(const float* mean, float weight, int64_t size, float* out) {
    for (int64_t c = 0; mean && c < size; c++) out[c] += weight * mean[c];
}

}  // namespace
