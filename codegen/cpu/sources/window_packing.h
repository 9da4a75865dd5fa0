// The oldest tokens of a window in 8 bits, encoded again.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cache_attention.h"
#include "rows.h"
#include "window_rows.h"

namespace {

// Rows of 8 bits: codes [B,G,T,D], scales [B,G,T]; token 0 is number `first` behind the sinks. type: of the tokens that
// were rounded.
struct WindowTokens {
    Rows codes, scales;
    int64_t tokens, width, first;
    Type type;
    CacheMean means;
    Turning turn;

    // Those of one head, turned, less their mean, to columns of x [D,T]. runs: see `is_in_runs`.
    void read(int64_t b, int64_t g, bool runs, float* x) const {
        static thread_local Memory memory;
        float *row, *input;
        memory.want(row, width), memory.want(input, width);
        memory.give();
        const float* mean = mean_of(means, b, g);
        for (int64_t t = 0; t < tokens; t++) {
            const float scale = from_float16(*row_at<uint16_t>(scales, b, g, t));
            unround_row(row_at<uint8_t>(codes, b, g, t), scale, mean, width, type, row);
            set_encoder_input(turn, runs, b, row, width, first + t, mean, input);
            for (int64_t i = 0; i < width; i++) x[i * tokens + t] = input[i];
        }
    }
};

// Latents [B,J,T,R] of tokens of B sequences, by a basis [J,R,n*D]. share: n.
void encode_window(const WindowTokens& window, const float* basis, int64_t batch, int64_t heads, int64_t rank,
                   int64_t share, int64_t threads, float* latents) {
    const int64_t tokens = window.tokens, width = window.width, wide = share * width;
    const bool runs = window.turn.segment && is_in_runs(window.turn);
    const int team = threads_for(batch * heads, batch * heads * tokens * rank * wide, threads);
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t i = 0; i < batch * heads; i++) {
        static thread_local Memory memory;
        float *x, *columns;
        memory.want(x, wide * tokens), memory.want(columns, rank * tokens);
        memory.give();
        for (int64_t g = 0; g < share; g++) {
            window.read(i / heads, i % heads * share + g, runs, x + g * width * tokens);
        }
        const float* encoder = basis + i % heads * rank * wide;
        times<OfFloat32>(
            x, wide, tokens, 0, tokens, rank, false, [&](int64_t r) { return encoder + r * wide; },
            [&](int64_t r) { return columns + r * tokens; });
        float* rows = latents + i * tokens * rank;
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t r = 0; r < rank; r++) rows[t * rank + r] = columns[r * tokens + t];
        }
    }
}

// The mean square of rows [count,width].
inline double mean_square(const float* x, int64_t count, int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++, x += width) sum += double(dot(x, x, width));
    return count ? sum / double(count * width) : 0;
}

}  // namespace
