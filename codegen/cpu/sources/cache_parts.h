// What attention on a cache does around its kernels, wherever the cache stands: products with bases, means, merging.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "cache_call.h"
#include "products.h"

namespace {

// ------------------------------------------------------------------------------------------------ products with bases

// Calls f(count) with `count` a compile-time number of at most MAX.
template <class F, int... I>
INLINE void with_count(int64_t count, F f, std::integer_sequence<int, I...>) {
    ((count == I + 1 ? f(std::integral_constant<int, I + 1>()) : void()), ...);
}

template <int MAX, class F>
INLINE void with_count(int64_t count, F f) {
    with_count(count, f, std::make_integer_sequence<int, MAX>());
}

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

// ------------------------------------------------------------------------------------------------ means and merging

// Of a query head of a sequence.
inline const float* mean_of(const CacheMean& mean, int64_t b, int64_t h) {
    return mean.data + b * mean.sequence + h / mean.group * mean.head;
}

// What a mean of keys, from which those of a part are differences, adds to the logits of a query.
inline float mean_logit(const float* query, const float* mean, int64_t size, double scale) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < size; c++) sum += query[c] * mean[c];
    return float(scale) * sum;
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

inline void add_mean(const float* mean, float weight, int64_t size, float* out) {
    for (int64_t c = 0; c < size; c++) out[c] += weight * mean[c];
}

}  // namespace
