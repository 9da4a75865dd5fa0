// A decode step's attention on a KV cache, by addresses.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cache_call.h"
#include "cache_parts.h"
#include "turning.h"

namespace {

// ------------------------------------------------------------------------------------------------ a KV cache

// Of the basis of a query head.
inline int64_t matrix_at(const CacheBasis& basis, int64_t head, int64_t heads) {
    return head / (heads / basis.groups) * basis.n * basis.m;
}

constexpr int64_t SMALL = 1 << 16;  // products that are worth a thread

// All of them or one: libgomp ends the threads that a smaller team leaves, and makes them again.
inline int threads_for(int64_t items, int64_t products, int64_t threads) {
    return items > 1 && products > SMALL ? int(threads) : 1;
}

// y[m] = x[n] B[n, m]
template <class T>
void times(const float* x, const typename T::Element* basis, int64_t n, int64_t m, float* y) {
    std::fill(y, y + m, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const float factor = x[i];
        const typename T::Element* row = basis + i * m;
#pragma omp simd
        for (int64_t j = 0; j < m; j++) y[j] += factor * T::number(row[j]);
    }
}

// y[n] += B[n, m] x[m]
template <class T>
void add_times(const typename T::Element* basis, const float* x, int64_t n, int64_t m, float* y) {
    for (int64_t i = 0; i < n; i++) {
        const typename T::Element* row = basis + i * m;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < m; j++) sum += T::number(row[j]) * x[j];
        y[i] += sum;
    }
}

// Sums of so many rows and vectors stay in registers.
constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : 4, VECTORS_AT_ONCE = LANES == 16 ? 1 : 16 / LANES;

// Rows of x, `step` apart, and of y, `out` apart: y[m] = x[n] B[n, m].
template <class T>
void times_all(const float* x, int64_t rows, int64_t step, const typename T::Element* basis, int64_t n, int64_t m,
               float* y, int64_t out) {
    int64_t r = 0;
    for (int64_t count; m >= LANES && rows - r > 1; r += count) {
        count = std::min<int64_t>(rows - r, ROWS_AT_ONCE);
        with_count<ROWS_AT_ONCE>(count, [&](auto rows_at_once) {
            constexpr int ROWS = decltype(rows_at_once)::value;
            const auto columns = [&](auto vectors, int64_t c) {
                const auto from = [&](int i) { return x + (r + i) * step; };
                const auto to = [&](int i) { return y + (r + i) * out + c; };
                times_vectors<T, ROWS, decltype(vectors)::value>(from, basis + c, m, n, false, to);
            };
            constexpr int64_t WIDTH = VECTORS_AT_ONCE * LANES;
            int64_t c = 0;
            for (; c + WIDTH <= m; c += WIDTH) columns(std::integral_constant<int, VECTORS_AT_ONCE>(), c);
            for (; c < m; c += LANES) columns(std::integral_constant<int, 1>(), std::min<int64_t>(c, m - LANES));
        });
    }
    for (; r < rows; r++) times<T>(x + r * step, basis, n, m, y + r * out);
}

// Calls f(type, matrix) with that of a query head, of its type.
template <class F>
void with_matrix(const CacheBasis& basis, int64_t head, int64_t heads, F f) {
    const int64_t at = matrix_at(basis, head, heads);
    if (basis.type == BFLOAT16) f(OfBFloat16(), static_cast<const uint16_t*>(basis.data) + at);
    else if (basis.type == FLOAT16) f(OfFloat16(), static_cast<const uint16_t*>(basis.data) + at);
    else f(OfFloat32(), static_cast<const float*>(basis.data) + at);
}

// Of several queries of one head, `step` apart, to rows that are `out` apart.
void absorb(const CacheBasis& basis, const float* x, int64_t rows, int64_t step, int64_t head, int64_t heads, float* y,
            int64_t out) {
    with_matrix(basis, head, heads, [&](auto type, auto matrix) {
        times_all<decltype(type)>(x, rows, step, matrix, basis.n, basis.m, y, out);
    });
}

void expand(const CacheBasis& basis, const float* x, int64_t head, int64_t heads, float* y) {
    with_matrix(basis, head, heads,
                [&](auto type, auto matrix) { add_times<decltype(type)>(matrix, x, basis.n, basis.m, y); });
}

void run_part(const CachePart& part, const Rows& query, float* output, float* lse) {
    Attention call = part.call;
    call.query = query;
    call.output = output;
    call.lse = lse;
    part.run(&call);
}

// Floats that a thread keeps from one call to the next, for new memory takes longer than what is done with it. What
// stands there is what was left.
class Kept {
    std::vector<float> numbers;

  public:
    float* room(int64_t count) {
        if (int64_t(numbers.size()) < count) numbers.resize(count);
        return numbers.data();
    }
};

// Queries are absorbed by `encode` and outputs expanded by `decode`; the parts are merged by log-sum-exp.
void attend_cache(const CacheAttention& a) {
    const int64_t h = a.heads, s = a.queries, e = a.value_size, rows = a.batch * h * s;
    const int64_t width = a.encode.m, value_width = a.decode.m;
    const auto at = [&](int64_t i) {
        return static_cast<const float*>(a.query.data) + i / (h * s) * a.query.batch + i / s % h * a.query.head +
               i % s * a.query.token;
    };
    const bool some = a.latents.run != nullptr, window = a.window.run != nullptr;
    const int64_t segment = a.turn.segment, tokens = a.latents.call.tokens;
    const int64_t segments = segment ? std::max<int64_t>((tokens + segment - 1) / segment, 1) : 1;
    static thread_local Kept kept[5];
    float* absorbed = kept[0].room(some ? segments * rows * width : 0);
    float* sums = kept[1].room(some ? rows * value_width : 0);
    float* outputs = kept[2].room(2 * rows * e);
    const bool shifted = some && segment && a.key_mean.data, runs = segment && is_in_runs(a.turn);
    float* shifts = kept[3].room(shifted ? segments * rows : 0);
    float* lse = kept[4].room(3 * rows);  // of latents, window, open tokens
    std::fill(lse, lse + 3 * rows, -INFINITY);
    if (some) {
        const int threads = threads_for(rows, segments * rows * a.head_size * width, a.opened.call.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < rows; i++) {
            const int64_t head = i / s % h, size = a.head_size;
            if (!segment) {
                absorb(a.encode, at(i), 1, size, head, h, &absorbed[i * width], width);
                continue;
            }
            static thread_local Kept of_row;
            float* turned = of_row.room(segments * size);
            for (int64_t k = 0; k < segments; k++) {
                float* query = turned + k * size;
                rotate(a.turn, at(i), size, k, query, i / (h * s), runs);
                if (shifted) {
                    shifts[k * rows + i] = mean_logit(query, mean_of(a.key_mean, i / (h * s), head), size, a.scale);
                }
            }
            absorb(a.encode, turned, segments, size, head, h, &absorbed[i * width], rows * width);
        }
        CachePart latents = a.latents;
        latents.call.segment = segment, latents.call.query_segment = rows * width;
        latents.call.shift = shifted ? shifts : nullptr;
        run_part(latents, {absorbed, h * s * width, s * width, width}, sums, &lse[0]);
    }
    if (window) run_part(a.window, a.query, &outputs[0], &lse[rows]);
    run_part(a.opened, a.query, &outputs[rows * e], &lse[2 * rows]);
    const int threads = threads_for(rows, some ? rows * e * value_width : 0, a.opened.call.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        const int64_t sequence = i / (h * s), head = i / s % h;
        // Logits of latents and window are differences from means; those of segments have been shifted.
        const float* mean = a.key_mean.data ? mean_of(a.key_mean, sequence, head) : nullptr;
        const float shift = mean ? mean_logit(at(i), mean, a.head_size, a.scale) : 0.0f;
        static thread_local Kept kept_latents;
        float *out = a.output + i * e, *latents = kept_latents.room(value_width);
        const auto each = [&](auto f) {
            if (some) f(ReadPart{lse[i] + (segment ? 0.0f : shift), &sums[i * value_width], true, true});
            if (window) f(ReadPart{lse[rows + i] + shift, &outputs[i * e], false, true});
            f(ReadPart{lse[2 * rows + i], &outputs[(rows + i) * e], false, false});
        };
        const float of_means = merge_parts(each, out, e, latents, some ? value_width : 0);
        if (some) expand(a.decode, latents, head, h, out);
        if (a.value_mean.data) add_mean(mean_of(a.value_mean, sequence, head), of_means, e, out);
    }
}

}  // namespace
