// A decode step's attention on a KV cache, by addresses.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cache_call.h"
#include "cache_parts.h"
#include "rows.h"
#include "turning.h"

namespace {

constexpr int64_t SMALL = 1 << 16;  // products that are worth a thread

// All of them or one: libgomp ends the threads that a smaller team leaves, and makes them again.
inline int threads_for(int64_t items, int64_t products, int64_t threads) {
    return items > 1 && products > SMALL ? int(threads) : 1;
}

// y[n] += B[n,m] x[m]
void expand(const CacheBasis& basis, int64_t matrix, const float* x, float* y) {
    with_matrix(basis, matrix, [&](auto type, auto data) {
        for (int64_t i = 0; i < basis.n; i++, data += basis.m) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < basis.m; j++) sum += decltype(type)::number(data[j]) * x[j];
            y[i] += sum;
        }
    });
}

void run_part(const CachePart& part, const Rows& query, float* output, float* lse) {
    Attention call = part.call;
    call.query = query;
    call.output = output;
    call.lse = lse;
    part.run(&call);
}

// A step and its memory: rows are those of the output.
struct CacheRun {
    const CacheAttention& a;
    int64_t rows, width, value_width, segments, threads;
    bool some, window, runs;  // there are latents, a window; see `is_in_runs`
    float *queries, *absorbed, *shifts, *sums, *mixed, *outputs, *lse;

    CacheRun(const CacheAttention& a, Memory& memory)
        : a(a), rows(a.batch * a.heads * a.queries), width(a.encode.m), value_width(a.decode.m), segments(1),
          threads(a.opened.call.threads), some(a.latents.run), window(a.window.run),
          runs(a.turn.segment && is_in_runs(a.turn)) {
        const int64_t segment = a.turn.segment;
        if (segment) segments = std::max<int64_t>((a.latents.call.tokens + segment - 1) / segment, 1);
        memory.want(queries, some && segment ? segments * rows * a.head_size : 0);
        memory.want(absorbed, some ? segments * rows * width : 0);
        memory.want(shifts, segments * rows);
        memory.want(sums, some ? rows * value_width : 0);
        memory.want(mixed, some ? rows * value_width : 0);
        memory.want(outputs, 2 * rows * a.value_size);
        memory.want(lse, 3 * rows);  // of latents, window, open tokens
        memory.give();
    }

    int64_t sequence(int64_t row) const { return row / (a.heads * a.queries); }
    int64_t head(int64_t row) const { return row / a.queries % a.heads; }
    int64_t matrix(const CacheBasis& basis, int64_t row) const { return head(row) / (a.heads / basis.groups); }
    const float* query(int64_t row) const {
        return row_at<const float>(a.query, sequence(row), head(row), row % a.queries);
    }
    const float* mean(const CacheMean& means, int64_t row) const { return mean_of(means, sequence(row), head(row)); }

    void absorb(int64_t row) const {
        const int64_t size = a.head_size;
        const float* query = this->query(row);
        float* turned = queries + (a.turn.segment ? row * segments * size : 0);
        rotate_query(a.turn, runs, sequence(row), query, size, segments, turned, size,
                     a.turn.segment ? mean(a.key_mean, row) : nullptr, a.scale, shifts + row, rows);
        const float* from = a.turn.segment ? turned : query;
        times(
            a.encode, matrix(a.encode, row), 0, width, segments, false, [&](int64_t k) { return from + k * size; },
            [&](int64_t k) { return absorbed + (k * rows + row) * width; });
    }

    void attend() const {
        if (some) {
            CachePart latents = a.latents;
            if (a.turn.segment) latents.call.segment = a.turn.segment, latents.call.query_segment = rows * width;
            latents.call.shift = a.key_mean.data && a.turn.segment ? shifts : nullptr;
            run_part(latents, {absorbed, a.heads * a.queries * width, a.queries * width, width}, sums, lse);
        }
        if (window) run_part(a.window, a.query, outputs, lse + rows);
        run_part(a.opened, a.query, outputs + rows * a.value_size, lse + 2 * rows);
    }

    void merge(int64_t row) const {
        const int64_t size = a.value_size;
        // Logits of latents and window are differences from means; those of segments have been shifted.
        const float* mean = this->mean(a.key_mean, row);
        const float shift = mean ? mean_logit(query(row), mean, a.head_size, a.scale) : 0.0f;
        const auto each = [&](auto f) {
            if (some) f(ReadPart{lse[row] + (a.turn.segment ? 0.0f : shift), sums + row * value_width, true, true});
            if (window) f(ReadPart{lse[rows + row] + shift, outputs + row * size, false, true});
            f(ReadPart{lse[2 * rows + row], outputs + (rows + row) * size, false, false});
        };
        float *out = a.output + row * size, *latents = mixed + row * value_width;
        const float of_means = merge_parts(each, out, size, latents, some ? value_width : 0);
        if (some) expand(a.decode, matrix(a.decode, row), latents, out);
        add_mean(this->mean(a.value_mean, row), of_means, size, out);
    }
};

// Queries are absorbed by `encode` and outputs expanded by `decode`; the parts are merged by log-sum-exp.
void attend_cache(const CacheAttention& a) {
    static thread_local Memory memory;
    const CacheRun run(a, memory);
    const int64_t rows = run.rows;
    if (run.some) {
        const int threads = threads_for(rows, run.segments * rows * a.head_size * run.width, run.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t row = 0; row < rows; row++) run.absorb(row);
    }
    run.attend();
    const int threads = threads_for(rows, run.some ? rows * a.value_size * run.value_width : 0, run.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) run.merge(row);
}

}  // namespace
