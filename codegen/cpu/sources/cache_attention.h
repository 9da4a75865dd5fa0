// A decode step's attention on a KV cache, by addresses.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cache_call.h"
#include "turning.h"

namespace {

// ------------------------------------------------------------------------------------------------ a KV cache

// Of the basis of a query head.
inline int64_t matrix_at(const CacheBasis& basis, int64_t head, int64_t heads) {
    return head / (heads / basis.groups) * basis.n * basis.m;
}

// Of a query head of a sequence.
inline const float* mean_of(const CacheMean& mean, int64_t b, int64_t h) {
    return mean.data + b * mean.sequence + h / mean.group * mean.head;
}

inline float dot(const CacheMean& mean, const float* query, int64_t b, int64_t h) {
    const float* its = mean_of(mean, b, h);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < mean.width; c++) sum += query[c] * its[c];
    return sum;
}

constexpr int64_t SMALL = 1 << 16;  // products that are worth a thread

// All of them or one: libgomp ends the threads that a smaller team leaves, and makes them again.
inline int threads_for(int64_t items, int64_t products, int64_t threads) {
    return items > 1 && products > SMALL ? int(threads) : 1;
}

struct Bits16 {
    uint16_t bits;
    operator float() const {
        const uint32_t whole = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &whole, sizeof x);
        return x;
    }
};

// y[m] = x[n] B[n, m]
template <class T>
void times(const float* x, const T* basis, int64_t n, int64_t m, float* y) {
    std::fill(y, y + m, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const float factor = x[i];
        const T* row = basis + i * m;
#pragma omp simd
        for (int64_t j = 0; j < m; j++) y[j] += factor * float(row[j]);
    }
}

// y[n] += factor B[n, m] x[m]
template <class T>
void add_times(const T* basis, const float* x, int64_t n, int64_t m, float factor, float* y) {
    for (int64_t i = 0; i < n; i++) {
        const T* row = basis + i * m;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < m; j++) sum += float(row[j]) * x[j];
        y[i] += factor * sum;
    }
}

// Sums of so many rows and strips stay in registers.
#if defined(__AVX512F__)
constexpr int STRIP = 16, ROWS_AT_ONCE = 8, STRIPS_AT_ONCE = 1;
#else
constexpr int STRIP = 8, ROWS_AT_ONCE = 4, STRIPS_AT_ONCE = 2;
#endif
typedef float Strip __attribute__((vector_size(4 * STRIP)));

inline Strip strip_of(const float* p) {
    Strip x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Strip strip_of(const Bits16* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * STRIP)));
    typedef uint32_t Words __attribute__((vector_size(4 * STRIP)));
    Halves x;
    std::memcpy(&x, p, sizeof x);
    return (Strip)(__builtin_convertvector(x, Words) << 16);
}

template <int ROWS, int STRIPS, class T>
void times_strips(const float* x, int64_t step, const T* basis, int64_t n, int64_t m, float* y, int64_t out) {
    Strip sums[ROWS][STRIPS] = {};
    for (int64_t i = 0; i < n; i++) {
        for (int c = 0; c < STRIPS; c++) {
            const Strip row = strip_of(basis + i * m + c * STRIP);
            for (int r = 0; r < ROWS; r++) sums[r][c] += x[r * step + i] * row;
        }
    }
    for (int r = 0; r < ROWS; r++) std::memcpy(y + r * out, &sums[r], sizeof sums[r]);
}

// ROWS rows of x, `step` apart, and of y, `out` apart: y[m] = x[n] B[n, m], of at least a strip.
template <int ROWS, class T>
void times_rows(const float* x, int64_t step, const T* basis, int64_t n, int64_t m, float* y, int64_t out) {
    int64_t c = 0;
    for (; c + STRIPS_AT_ONCE * STRIP <= m; c += STRIPS_AT_ONCE * STRIP) {
        times_strips<ROWS, STRIPS_AT_ONCE>(x, step, basis + c, n, m, y + c, out);
    }
    for (; c < m; c += STRIP) {
        const int64_t at = std::min(c, m - STRIP);
        times_strips<ROWS, 1>(x, step, basis + at, n, m, y + at, out);
    }
}

// The same of `count` rows: 2 more than the numbers of the sequence say.
template <int... I, class T>
void times_some(std::integer_sequence<int, I...>, int64_t count, const float* x, int64_t step, const T* basis,
                int64_t n, int64_t m, float* y, int64_t out) {
    ((count == I + 2 ? times_rows<I + 2>(x, step, basis, n, m, y, out) : void()), ...);
}

template <class T>
void times_all(const float* x, int64_t rows, int64_t step, const T* basis, int64_t n, int64_t m, float* y,
               int64_t out) {
    int64_t r = 0;
    for (int64_t count; m >= STRIP && rows - r > 1; r += count) {
        count = std::min<int64_t>(rows - r, ROWS_AT_ONCE);
        times_some(std::make_integer_sequence<int, ROWS_AT_ONCE - 1>(), count, x + r * step, step, basis, n, m,
                   y + r * out, out);
    }
    for (; r < rows; r++) times(x + r * step, basis, n, m, y + r * out);
}

// Of several queries of one head, `step` apart, to rows that are `out` apart.
void absorb(const CacheBasis& basis, const float* x, int64_t rows, int64_t step, int64_t head, int64_t heads, float* y,
            int64_t out) {
    const int64_t at = matrix_at(basis, head, heads), n = basis.n, m = basis.m;
    if (basis.is_bfloat) times_all(x, rows, step, static_cast<const Bits16*>(basis.data) + at, n, m, y, out);
    else times_all(x, rows, step, static_cast<const float*>(basis.data) + at, n, m, y, out);
}

void expand(const CacheBasis& basis, const float* x, int64_t head, int64_t heads, float factor, float* y) {
    const int64_t at = matrix_at(basis, head, heads);
    if (basis.is_bfloat) add_times(static_cast<const Bits16*>(basis.data) + at, x, basis.n, basis.m, factor, y);
    else add_times(static_cast<const float*>(basis.data) + at, x, basis.n, basis.m, factor, y);
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
                if (shifted) shifts[k * rows + i] = float(a.scale) * dot(a.key_mean, query, i / (h * s), head);
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
        // Logits of latents and window are differences from means; those of segments have been shifted.
        const float shift = a.key_mean.data ? float(a.scale) * dot(a.key_mean, at(i), i / (h * s), i / s % h) : 0.0f;
        lse[i] += segment ? 0.0f : shift, lse[rows + i] += shift;
        const float top = std::max(std::max(lse[i], lse[rows + i]), lse[2 * rows + i]);
        float weights[3], total = 0;
        for (int part = 0; part < 3; part++) {
            weights[part] = top == -INFINITY ? 0.0f : std::exp(lse[part * rows + i] - top);
            total += weights[part];
        }
        const float inverse = total == 0 ? 0.0f : 1 / total;
        const float *first = &outputs[i * e], *second = &outputs[(rows + i) * e];
        float* out = a.output + i * e;
        for (int64_t c = 0; c < e; c++) {
            out[c] = inverse * ((window ? weights[1] * first[c] : 0.0f) + weights[2] * second[c]);
        }
        if (some) expand(a.decode, &sums[i * value_width], i / s % h, h, inverse * weights[0], out);
        if (a.value_mean.data) {
            const float* mean = mean_of(a.value_mean, i / (h * s), i / s % h);
            for (int64_t c = 0; c < e; c++) out[c] += inverse * (weights[0] + weights[1]) * mean[c];
        }
    }
}

}  // namespace
