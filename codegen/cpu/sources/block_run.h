// A decode step on an engine's blocks: its arguments, pieces and memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.h"
#include "typed_numbers.h"
#include "cache_parts.h"
#include "block_call.h"

namespace {

// ------------------------------------------------------------------------------------------------ arguments

// Of the token at a position behind the attention sinks, and how many there are up to it.
int64_t segment_of(const BlockLayer& l, int64_t position) {
    return l.turn.segment ? (position - l.sinks) / l.turn.segment : 0;
}
int64_t segments_of(const BlockLayer& l, int64_t quantized) {
    return quantized ? segment_of(l, l.sinks + quantized - 1) + 1 : 0;
}

struct Step : BlockStep {
    int64_t token(int64_t i) const { return numbers[i]; }
    int64_t owner(int64_t i) const { return numbers[count + i]; }
    int64_t position(int64_t i) const { return numbers[2 * count + i]; }
    int64_t quantized(int64_t i) const { return numbers[3 * count + i]; }
};

constexpr int32_t NO_BLOCK = 0;  // of tokens that are not kept

// A cache's memory and a batch's blocks in it.
struct Blocks : BlockCache, BlockTable {
    using BlockCache::block, BlockCache::row;

    int32_t number(int64_t owner, int64_t position) const { return blocks[owner * BlockTable::row + position / size]; }
    uint8_t* at(int64_t owner, int64_t position) const {
        return data + number(owner, position) * block + position % size * row;
    }
    // Calls f(address, bytes) with the rows of tokens from `begin` on, a block at a time.
    template <class F>
    void for_runs(int64_t owner, int64_t begin, int64_t tokens, F f) const {
        for (int64_t position = begin, end = begin + tokens, count; position < end; position += count) {
            count = std::min(size - position % size, end - position);
            f(at(owner, position), count * row);
        }
    }
};

struct Call : BlockCall {
    Blocks latents, window, first;

    explicit Call(const BlockCall& a)
        : BlockCall(a), latents{a.caches[0], *a.tables[0]}, window{a.caches[1], *a.tables[1]},
          first{a.caches[2], *a.tables[2]} {}
};

// ------------------------------------------------------------------------------------------------ what is to be done

constexpr int64_t ROOM = 192 << 10;  // bytes of rows that are brought together: they stay in the second-level cache
constexpr int64_t QUANTUM = 64;  // tokens of which a range has a multiple
constexpr int64_t MIN_RANGE = 128;  // tokens of a range of latents that pay for what it costs beside them

enum Kind { LATENTS, WINDOW, SINKS };

// What one kernel attends to at once, and where its results go: [H, width] and [H].
struct Piece {
    Kind kind;
    int64_t sequence, begin, tokens;
    float *output, *lse;
};

int64_t tokens_of_a_range(int64_t all, int64_t ranges, int64_t row) {
    const int64_t most = std::max(ROOM / row / QUANTUM * QUANTUM, QUANTUM);
    return std::clamp((all / ranges + QUANTUM - 1) / QUANTUM * QUANTUM, QUANTUM, most);
}

// All pieces: those of latents first, which take longest, of every kind those of the first sequence first.
struct Pieces {
    std::vector<Piece> all;
    std::vector<int64_t> first[3];  // of each sequence, and the end
    int64_t threads;

    explicit Pieces(const Call& c) {
        const BlockLayer& l = *c.layer;
        const Step s{*c.step};
        const auto start = [&](int64_t i) { return l.sinks + s.quantized(i); };  // of the window
        int64_t latents = 0, window = 0;
        for (int64_t i = 0; i < s.count; i++) {
            latents += s.quantized(i);
            window += std::max<int64_t>(s.position(i) + 1 - start(i), 0);
        }
        const int64_t width = l.sides[0].width + l.sides[1].width, size = l.sizes[0] + l.sizes[1];
        const int64_t products = l.heads * (latents * width + window * size);
        threads = std::clamp<int64_t>(products / 200000, 1, s.threads);  // a thread is worth about 10 us of work
        const int64_t ranges = threads == 1 ? 1 : std::clamp(latents / MIN_RANGE, threads, 4 * threads);
        int64_t of_latents = tokens_of_a_range(latents, ranges, c.latents.row);
        if (l.turn.segment) {  // all of a piece have the same queries
            const int64_t parts = (l.turn.segment + of_latents - 1) / of_latents;
            of_latents = (l.turn.segment / parts + QUANTUM - 1) / QUANTUM * QUANTUM;
        }
        const int64_t of_window = tokens_of_a_range(window, threads, c.window.row);
        for (int64_t i = 0; i < s.count; i++) {
            first[LATENTS].push_back(int64_t(all.size()));
            const int64_t segment = l.turn.segment ? l.turn.segment : s.quantized(i);
            for (int64_t begin = l.sinks; begin < start(i); begin += segment) {
                add(LATENTS, i, begin, std::min(begin + segment, start(i)), of_latents);
            }
        }
        for (int64_t i = 0; i < s.count; i++) cut(WINDOW, i, start(i), s.position(i) + 1, of_window);
        for (int64_t i = 0; i < s.count; i++) cut(SINKS, i, 0, std::min(l.sinks, s.position(i) + 1), QUANTUM);
        for (std::vector<int64_t>& one : first) one.push_back(int64_t(&one == &first[2] ? all.size() : 0));
        first[LATENTS].back() = first[WINDOW].empty() ? 0 : first[WINDOW][0];
        first[WINDOW].back() = first[SINKS].empty() ? 0 : first[SINKS][0];
    }

    void cut(Kind kind, int64_t sequence, int64_t begin, int64_t end, int64_t range) {
        first[kind].push_back(int64_t(all.size()));
        add(kind, sequence, begin, end, range);
    }

    void add(Kind kind, int64_t sequence, int64_t begin, int64_t end, int64_t range) {
        for (; begin < end; begin += range) {
            all.push_back({kind, sequence, begin, std::min(range, end - begin), nullptr, nullptr});
        }
    }
};

struct Run {
    const Call& c;
    const BlockLayer& l;
    const Step s;
    Pieces pieces;
    bool runs;  // see `is_in_runs`
    std::vector<int64_t> encoded, far;  // sequences whose new token is encoded; that read latents
    std::vector<int64_t> slots;  // of each sequence, the first of its segments among all of them
    int64_t read = 0;  // segments of all sequences
    float *queries, *turned, *shifts, *inputs[2], *latents[2], *absorbed, *mixed, *outputs, *lse;

    Run(const Call& call, Memory& memory)
        : c(call), l(*call.layer), s{*call.step}, pieces(call), runs(l.turn.segment && is_in_runs(l.turn)) {
        for (int64_t i = 0; i < s.count; i++) {
            if (c.writes && s.position(i) >= l.means_from) encoded.push_back(i);
            if (s.quantized(i)) far.push_back(i);
            slots.push_back(i ? slots.back() + segments_of(l, s.quantized(i - 1)) : 0);
        }
        const int64_t rows = s.count * l.heads;
        if (s.count) read = slots.back() + segments_of(l, s.quantized(s.count - 1));
        memory.want(queries, rows * l.sizes[0]);
        memory.want(turned, l.turn.segment ? read * l.heads * l.sizes[0] : 0);
        memory.want(shifts, read * l.heads);
        memory.want(absorbed, read * l.heads * l.sides[0].width);
        memory.want(mixed, rows * l.sides[1].width);
        memory.want(outputs, rows * l.sizes[1]);
        for (int side = 0; side < sides(); side++) {
            memory.want(inputs[side], s.count * input_width(side));
            memory.want(latents[side], s.count * l.sides[side].heads * l.sides[side].width);
        }
        memory.want(lse, int64_t(pieces.all.size()) * l.heads);
        for (Piece& piece : pieces.all) memory.want(piece.output, l.heads * width_of(piece.kind));
        memory.give();
        for (size_t p = 0; p < pieces.all.size(); p++) pieces.all[p].lse = lse + int64_t(p) * l.heads;
    }

    int sides() const { return l.is_shared ? 1 : 2; }
    int64_t width_of(Kind kind) const { return kind == LATENTS ? l.sides[1].width : l.sizes[1]; }
    int64_t input_width(int side) const { return l.sides[side].heads * l.sides[side].encode.n; }
    float* query(int64_t i, int64_t head) const { return queries + (i * l.heads + head) * l.sizes[0]; }
    int64_t row(int64_t i, int64_t segment, int64_t head) const { return (slots[i] + segment) * l.heads + head; }
    // As it reads latents of a segment.
    float* query(int64_t i, int64_t segment, int64_t head) const {
        return l.turn.segment ? turned + row(i, segment, head) * l.sizes[0] : query(i, head);
    }
    float* latent(int side, int64_t i, int64_t j) const {
        const BlockSide& one = l.sides[side];
        return latents[side] + (i * one.heads + j) * one.width;
    }
    const Blocks& blocks_of(const Piece& piece) const { return piece.kind == LATENTS ? c.latents : c.window; }
    const uint8_t* page(int64_t i) const { return c.first.at(s.owner(i), 0); }
    const float* mean(int64_t i, int side, int64_t group) const {  // of a plan that has means
        return reinterpret_cast<const float*>(page(i) + l.mean_starts[side]) + group * l.sizes[side];
    }
};

}  // namespace
