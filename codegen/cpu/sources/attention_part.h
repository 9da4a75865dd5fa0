// A part of a call of attention: its tokens, its running softmax, its memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "kernel_call.h"
#include "kernel_table.h"
#include "rows.h"
#include "static_counts.h"
#include "vectors.h"

namespace {

constexpr int ROWS_OF_A_PART = 48;  // enough to make unpacking cheap

constexpr int whole_vectors(int tokens) { return (tokens + 15) / 16 * 16; }

constexpr int SIDE_BY_SIDE = PAGE_QUANTUM;  // tokens of a page are a multiple of it

// The tokens that are attended to, in order: all, or those of listed pages. Runs of SIDE_BY_SIDE from a multiple of it
// on lie one behind the other.
struct Listed {
    const int32_t* pages;  // ascending; what is not, such as -1 behind the last, ends the list
    int64_t page_tokens, count;
    int shift;  // of a power of two that page_tokens is; -1: it is none

    Listed(const Attention& a, int64_t b, int64_t head)
        : pages(nullptr), page_tokens(a.page_tokens), count(a.tokens), shift(-1) {
        if (a.pages.data == nullptr) return;
        if ((page_tokens & (page_tokens - 1)) == 0) shift = __builtin_ctzll(page_tokens);
        pages = row_at<int32_t>(a.pages, b, head * a.page_heads / a.heads, 0);
        count = 0;
        for (int64_t i = 0; i < a.page_count && pages[i] > (i ? pages[i - 1] : -1); i++) {
            count += std::clamp<int64_t>(a.tokens - pages[i] * page_tokens, 0, page_tokens);
        }
    }
    INLINE int64_t at(int64_t i) const {
        if (!pages) return i;
        if (shift >= 0) return (int64_t(pages[i >> shift]) << shift) + (i & (page_tokens - 1));
        return pages[i / page_tokens] * page_tokens + i % page_tokens;
    }
    bool is_run(int64_t begin, int tokens) const { return !pages || begin % page_tokens + tokens <= page_tokens; }
    // The token whose row is fetched when that of number i is read; the distance is a multiple of SIDE_BY_SIDE.
    INLINE int64_t ahead(int64_t i, int64_t distance) const {
        return pages ? at(std::min(i + distance, (count - 1) / SIDE_BY_SIDE * SIDE_BY_SIDE)) : i + distance;
    }
};

// A range of tokens for some queries of the query heads that share latents. Row r: query r % queries, head r / queries.
struct Part {
    int64_t b, head, heads, query, queries, begin, end;
    Listed listed;

    int rows() const { return int(heads * queries); }
    int64_t row(const Attention& a, int r) const {  // in the output
        return (b * a.heads + head + r / queries) * a.queries + query + r % queries;
    }
};

// Running softmax of a row: o = sum / total, lse = log2(total) + top.
struct State {
    // clang-format off
    float top, total, mass;  // mass: the sum of weight * scale, kept where weights are split
    float* sum;              // of weight * scale * (code - middle), as many as a row of values is padded to
    // clang-format on
};

// Weights of a row as words.
struct Split {
    float unit, total;
    bool low;  // they have lower bytes, or, of keys, a query's count
};

constexpr int PART_BYTES = WORDS ? 8 : 12;  // of the parts of a query, for each lane of a key

// Calls f(first, count) with `count` a compile-time number of at most MAX rows, sizes as even as they can be.
template <int MAX, class F>
INLINE void for_blocks_of_rows(int rows, F f) {
    for (int first = 0; first < rows;) {
        const int blocks = (rows - first + MAX - 1) / MAX;
        const int count = (rows - first + blocks - 1) / blocks;
        with_count<MAX>(count, [&](auto known) INLINE_CALL { f(first, known); });
        first += count;
    }
}

template <class T>
T* allocate(int64_t count) {
    return static_cast<T*>(std::aligned_alloc(64, (count * int64_t(sizeof(T)) + 63) / 64 * 64));
}

// Memory that a thread keeps from call to call: a decode step makes many short ones.
struct Kept {
    uint8_t* data = nullptr;
    int64_t size = 0;

    Kept() = default;
    Kept(const Kept&) = delete;
    ~Kept() { std::free(data); }
    uint8_t* at_least(int64_t bytes) {
        if (size < bytes) {
            std::free(data);
            data = allocate<uint8_t>(bytes);
            size = bytes;
        }
        return data;
    }
};

// Memory that is fetched a few lines at a time, while something else is computed.
struct Later {
    const Extent *extent = nullptr, *end = nullptr;
    int64_t at = 0, step = 0;  // bytes of the extent that have been fetched, that are fetched at once

    // Calls of `fetch` until all is there: `steps`.
    void set(const Extent* extents, int64_t count, int64_t steps) {
        extent = extents, end = extents + count, at = 0;
        int64_t bytes = 0;
        for (int64_t i = 0; i < count; i++) bytes += extents[i].bytes;
        step = (bytes / std::max<int64_t>(steps, 1) + 64) / 64 * 64;
    }
    INLINE void fetch() {
        if (extent == end) return;
        const int64_t stop = std::min(at + step, extent->bytes);
        for (; at < stop; at += 64) __builtin_prefetch(extent->data + at, 0, 2);
        if (stop == extent->bytes) extent++, at = 0;
    }
};

// What a part needs while it is attended to. There is one at a time in a thread.
struct Scratch {
    const Kernel& kernel;
    const int64_t rows;
    float *tile, *query, *middle, *logits, *totals;  // [tokens, stride], [rows, R_K], [rows], [rows, TILE], [rows]
    // clang-format off
    State* states;                                   // [rows]
    float* sums;                                     // of the states, [rows, R_V]
    uint8_t *codes, *room;                           // of a tile; [16, whole rows with what is read behind them]
    uint8_t* looked_up;                              // [16, rows with what their trellis codes stand for]
    int8_t *parts, *weights;                         // of queries 2 times [rows, PART_BYTES key_dwords], of weights
    float *unit, *lowest, *coarse, *limits, *halves;  // [rows], [rows], [rows], [rows], [halves, TILE]
    uint16_t* pairs;                                 // queries in bfloat16, [rows, R_K], where they are multiplied so
    bool are_pairs;                                  // and they are such numbers
    float factor;                                    // that these are to be multiplied by
    // clang-format on
    Split* splits;  // of words: [rows]
    int32_t* products;  // and sums with values, [rows, 2, R_V]
    Later later;
    bool cleared;  // the tile has no numbers of calls before this one
    alignas(64) float scale[TILE];

    Scratch(const Kernel& k, int64_t rows)
        : kernel(k), rows(rows), are_pairs(k.pairs), factor(1), cleared(false), scale() {
        static thread_local Kept kept;
        place(kept.at_least(place(nullptr)));
        for (int64_t r = 0; r < rows; r++) states[r].sum = sums + r * k.value.pad;
    }
    Scratch(const Scratch&) = delete;

    // Places everything in memory from `begin` on; returns how many bytes that takes.
    int64_t place(uint8_t* begin) {
        const Kernel& k = kernel;
        int64_t used = 0;
        const auto take = [&](auto*& at, int64_t count) {
            at = reinterpret_cast<std::decay_t<decltype(at)>>(begin + used);
            used += (count * int64_t(sizeof *at) + 63) / 64 * 64;
        };
        take(tile, k.floats ? k.tokens * k.stride : 0);
        take(query, rows * k.key.pad), take(middle, rows), take(logits, rows * TILE), take(totals, rows);
        take(states, rows), take(sums, rows * k.value.pad);
        take(codes, k.codes), take(room, 16 * std::max(k.key.reach, k.value.reach));
        take(looked_up, 16 * std::max(k.key.layout.looked_up, k.value.layout.looked_up));
        take(parts, k.key.integer ? 2 * rows * PART_BYTES * k.key_dwords : 0);
        take(weights, k.value.integer ? (WORDS ? rows * 4 : 15) * TILE : 0);
        take(unit, rows), take(lowest, rows), take(coarse, rows), take(limits, rows), take(halves, TILE * k.halves);
        take(pairs, k.pairs ? rows * k.key.pad : 0);
        take(splits, WORDS ? rows : 0), take(products, WORDS && k.value.integer ? rows * 2 * k.value.pad : 0);
        return used;
    }
};

}  // namespace
