// block_tables
//
// A decode step of one layer on an engine's blocks: writing and reading of every sequence's new token in one call.
//
//     write    the token as it came into the residual window, its packed latents beside it
//     read     attention sinks, residual window, packed latents: each by its kernel, merged by log-sum-exp
//
//     query [B,H,D]   key [B,G,D]   value [B,G,E]   caches [blocks, tokens of a block, bytes]   ->   output [B,H,E]
//
//     B sequences, H query heads, G kv heads, J latent heads, D and E head size of keys and values, R latent width.
//
// A token at position p of a sequence stands in block table[sequence][p / size], at place p % size. Kernels read rows
// that lie one behind the other: a range of tokens is brought together, a block at a time, in memory of the thread that
// stays in its second-level cache, and read from there. That is one pass over bytes that come from memory anyway.
//
// Four loops, each over what can be done side by side:
//
//     sequences           numbers as floats, rows of the window
//     columns of bases    latents = encode (x - mean), absorbed queries = decode_K^T q: of all sequences at once
//     ranges of tokens    attention; latents are packed
//     heads               merge, expand

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "block_run.h"
#include "turning.h"
#include "window_rows.h"

namespace {

// ------------------------------------------------------------------------------------------------ writing

// The window's row of a new token, of heads as they came and as floats.
void write_window(const Run& run, int64_t i, const uint8_t* head, const float* x, int side, int64_t group) {
    const BlockLayer& l = run.l;
    const Blocks& window = run.c.window;
    if (window.number(run.s.owner(i), run.s.position(i)) == NO_BLOCK) return;
    uint8_t* row = window.at(run.s.owner(i), run.s.position(i));
    const int64_t size = l.sizes[side];
    if (l.is_rounded) {
        uint16_t scale;
        round_row(x, nullptr, size, row + l.window[side] + group * size, scale);
        std::memcpy(row + l.window[2 + side] + 2 * group, &scale, sizeof scale);
    } else {
        const int64_t bytes = size * bytes_of(l.type);
        std::memcpy(row + l.window[side] + group * bytes, head, bytes);
    }
}

// What the encoder of a side reads of a head.
void set_input(const Run& run, int64_t i, const float* x, int side, int64_t group) {
    const BlockLayer& l = run.l;
    const int64_t size = l.sizes[side], both = l.sizes[0] + l.sizes[1];
    float* to = l.is_shared ? run.inputs[0] + (i * l.kv_heads + group) * both + side * l.sizes[0]
                            : run.inputs[side] + (i * l.kv_heads + group) * size;
    const float* mean = l.means_from ? run.mean(i, side, group) : nullptr;
    const Turning turn = side == 0 ? l.turn : Turning{};
    set_encoder_input(turn, run.runs, 0, x, size, run.s.position(i) - l.sinks, mean, to);
}

// As they read latents of each segment.
void set_queries(const Run& run, int64_t i) {
    const BlockLayer& l = run.l;
    const int64_t size = l.sizes[0], segments = segments_of(l, run.s.quantized(i));
    for (int64_t h = 0; segments && h < l.heads; h++) {
        const float* mean = l.means_from ? run.mean(i, 0, h / (l.heads / l.kv_heads)) : nullptr;
        rotate_query(l.turn, run.runs, 0, run.query(i, h), size, segments, run.query(i, 0, h), l.heads * size, mean,
                     l.scale, run.shifts + run.row(i, 0, h), l.heads);
    }
}

void prepare(const Run& run, int64_t i) {
    const BlockLayer& l = run.l;
    const auto head_of = [&](const BlockNumbers& x, int64_t head) {
        return x.data + (run.s.token(i) * x.token + head * x.head) * bytes_of(l.type);
    };
    for (int64_t h = 0; h < l.heads; h++) to_floats(head_of(run.c.query, h), l.type, l.sizes[0], run.query(i, h));
    set_queries(run, i);
    if (!run.c.writes) return;
    std::vector<float> x(std::max(l.sizes[0], l.sizes[1]));
    for (int side = 0; side < 2; side++) {
        for (int64_t group = 0; group < l.kv_heads; group++) {
            const uint8_t* head = head_of(side ? run.c.value : run.c.key, group);
            to_floats(head, l.type, l.sizes[side], x.data());
            write_window(run, i, head, x.data(), side, group);
            if (run.s.position(i) >= l.means_from) set_input(run, i, x.data(), side, group);
        }
    }
}

void pack(const Run& run, int64_t i, int side) {
    const BlockSide& one = run.l.sides[side];
    const Blocks& cache = run.c.latents;
    if (cache.number(run.s.owner(i), run.s.position(i)) == NO_BLOCK) return;
    uint8_t* row = cache.at(run.s.owner(i), run.s.position(i));
    if (one.tier_count == 0) {
        for (int64_t j = 0; j < one.heads; j++) {
            from_floats(run.latent(side, i, j), run.l.type, one.width, row + one.start + j * one.bytes);
        }
        return;
    }
    Pack a{1, one.heads, 1, 1, FLOAT32, one.tiers, one.tier_count, one.width, {}, {}, {}};
    a.latent = {run.latent(side, i, 0), 0, one.width, 0};
    a.codes = {row + one.start, 0, one.bytes, 0};
    a.scale = {row + one.scale, 0, 1, 0};
    run.l.pack(&a);
}

// ------------------------------------------------------------------------------------------------ bases

constexpr int64_t COLUMNS = 64;  // of a basis, in one task

int64_t tasks_of(const CacheBasis& basis) { return basis.groups * ((basis.m + COLUMNS - 1) / COLUMNS); }

int64_t encode_tasks(const Run& run, int side) {
    return run.encoded.empty() || side >= run.sides() ? 0 : tasks_of(run.l.sides[side].encode);
}

int64_t absorb_tasks(const Run& run) { return run.far.empty() ? 0 : tasks_of(run.l.sides[0].decode); }

// Calls f(matrix, begin, end) with some columns.
template <class F>
void with_columns(const CacheBasis& basis, int64_t task, F f) {
    const int64_t begin = task / basis.groups * COLUMNS;
    f(task % basis.groups, begin, std::min(begin + COLUMNS, basis.m));
}

void encode(const Run& run, int side, int64_t task) {
    const CacheBasis& basis = run.l.sides[side].encode;
    with_columns(basis, task, [&](int64_t j, int64_t begin, int64_t end) {
        const auto from = [&](int64_t r) {
            return run.inputs[side] + run.encoded[r] * run.input_width(side) + j * basis.n;
        };
        const auto to = [&](int64_t r) { return run.latent(side, run.encoded[r], j); };
        times(basis, j, begin, end, int64_t(run.encoded.size()), false, from, to);
    });
}

void absorb(const Run& run, int64_t task) {
    const BlockLayer& l = run.l;
    const int64_t shared = l.heads / l.kv_heads;
    const CacheBasis& basis = l.sides[0].decode;
    with_columns(basis, task, [&](int64_t group, int64_t begin, int64_t end) {
        const auto row = [&](int64_t r) { return r / shared * l.heads + group * shared + r % shared; };
        const auto from = [&](int64_t r) {
            const int64_t head = group * shared + r % shared;
            return l.turn.segment ? run.turned + row(r) * l.sizes[0] : run.query(run.far[r / shared], head);
        };
        const auto to = [&](int64_t r) { return run.absorbed + row(r) * basis.m; };
        times(basis, group, begin, end, run.read * shared, false, from, to);
    });
}

void multiply(const Run& run, int64_t task) {
    const int64_t keys = encode_tasks(run, 0), both = keys + encode_tasks(run, 1);
    if (task < keys) encode(run, 0, task);
    else if (task < both) encode(run, 1, task - keys);
    else absorb(run, task - both);
}

// ------------------------------------------------------------------------------------------------ reading

// Rows of tokens from `begin` on, one behind the other: where they are, or brought together in `room`.
const uint8_t* rows_of(const Blocks& blocks, int64_t owner, int64_t begin, int64_t tokens, std::vector<uint8_t>& room) {
    if (begin / blocks.size == (begin + tokens - 1) / blocks.size) return blocks.at(owner, begin);
    if (int64_t(room.size()) < tokens * blocks.row) room.resize(tokens * blocks.row);
    uint8_t* to = room.data();
    blocks.for_runs(owner, begin, tokens, [&](const uint8_t* rows, int64_t bytes) {
        std::memcpy(to, rows, bytes);
        to += bytes;
    });
    return room.data();
}

// Keys or values of a piece, and their scales, as a kernel takes them.
struct SideRows {
    int64_t heads;
    Rows numbers, scales;
};

SideRows side_of(const Run& run, const Piece& piece, int side, const uint8_t* rows) {
    const BlockLayer& l = run.l;
    const BlockSide& one = l.sides[side];
    const int64_t size = l.sizes[side], number = bytes_of(l.type);
    if (piece.kind == LATENTS) {
        const int64_t row = run.c.latents.row, element = one.tier_count ? 1 : number;
        const Rows scales = {rows + one.scale, 0, 1, row / 2};
        return {one.heads, {rows + one.start, 0, one.bytes / element, row / element}, scales};
    }
    if (piece.kind == SINKS) {
        const uint8_t* first = rows + l.sink_starts[side] + piece.begin * l.kv_heads * size * number;
        return {l.kv_heads, {first, 0, size, l.kv_heads * size}, {}};
    }
    const int64_t row = run.c.window.row, element = l.is_rounded ? 1 : number;
    const Rows scales = {rows + l.window[2 + side], 0, 1, row / 2};
    return {l.kv_heads, {rows + l.window[side], 0, size, row / element}, scales};
}

const uint8_t* rows_of(const Run& run, const Piece& piece) {
    static thread_local std::vector<uint8_t> room;
    if (piece.kind == SINKS) return run.page(piece.sequence);
    return rows_of(run.blocks_of(piece), run.s.owner(piece.sequence), piece.begin, piece.tokens, room);
}

// Where the rows of a piece are.
void extents_of(const Run& run, const Piece& piece, std::vector<Extent>& extents) {
    extents.clear();
    if (piece.kind == SINKS) return;
    run.blocks_of(piece).for_runs(run.s.owner(piece.sequence), piece.begin, piece.tokens,
                                  [&](const uint8_t* rows, int64_t bytes) { extents.push_back({rows, bytes}); });
}

// later: what the thread attends to next.
void attend(const Run& run, const Piece& piece, const Piece* later) {
    static thread_local std::vector<Extent> extents;
    extents.clear();
    if (later) extents_of(run, *later, extents);
    const BlockLayer& l = run.l;
    const bool latents = piece.kind == LATENTS;
    const BlockKernel& kernel = latents ? l.latents_kernel : piece.kind == WINDOW ? l.window_kernel : l.sinks_kernel;
    const uint8_t* rows = rows_of(run, piece);
    const SideRows key = side_of(run, piece, 0, rows), value = side_of(run, piece, 1, rows);
    const int64_t width = latents ? l.sides[0].width : l.sizes[0];
    Attention a{1, l.heads, 1, piece.tokens, key.heads, value.heads, 1, NO_MASK};
    const int64_t row = latents ? run.row(piece.sequence, segment_of(l, piece.begin), 0) : piece.sequence * l.heads;
    a.query = {(latents ? run.absorbed : run.queries) + row * width, 0, width, width};
    a.key = key.numbers, a.key_scale = key.scales;
    a.value = value.numbers, a.value_scale = value.scales;
    a.output = piece.output, a.lse = piece.lse;
    a.scale = l.scale, a.digits = l.digits;
    a.kernel = kernel.table;
    a.later = extents.data(), a.later_count = int64_t(extents.size());
    kernel.run(&a);
}

// ------------------------------------------------------------------------------------------------ merging

constexpr int64_t MERGED = 4;  // sequences whose outputs are expanded at once

// Of one head: open tokens to its output, latents, weighted alike, to `mixed`.
void mix(const Run& run, int64_t i, int64_t head) {
    const BlockLayer& l = run.l;
    const int64_t row = i * l.heads + head, group = head / (l.heads / l.kv_heads);
    const auto each = [&](auto f) {
        for (int kind = LATENTS; kind <= SINKS; kind++) {
            for (int64_t p = run.pieces.first[kind][i]; p < run.pieces.first[kind][i + 1]; p++) {
                const Piece& piece = run.pieces.all[p];
                const bool far = kind == LATENTS;
                const float shift = far ? run.shifts[run.row(i, segment_of(l, piece.begin), head)] : 0.0f;
                f(ReadPart{piece.lse[head] + shift, piece.output + head * run.width_of(piece.kind), far, far});
            }
        }
    };
    float *out = run.outputs + row * l.sizes[1], *latents = run.mixed + row * l.sides[1].width;
    const float far = merge_parts(each, out, l.sizes[1], latents, l.sides[1].width);
    if (l.means_from && far > 0) add_mean(run.mean(i, 1, group), far, l.sizes[1], out);
}

int64_t merges(const Run& run) { return (run.s.count + MERGED - 1) / MERGED * run.l.kv_heads; }

// Heads of a group, of some sequences: merge, expand, round.
void merge(const Run& run, int64_t task) {
    const BlockLayer& l = run.l;
    const CacheBasis& basis = l.sides[1].decode;
    const int64_t group = task % l.kv_heads, shared = l.heads / l.kv_heads, begin = task / l.kv_heads * MERGED;
    const int64_t rows = std::min(MERGED, run.s.count - begin) * shared;
    const auto sequence = [&](int64_t r) { return begin + r / shared; };
    const auto head = [&](int64_t r) { return group * shared + r % shared; };
    const auto row = [&](int64_t r) { return sequence(r) * l.heads + head(r); };
    const auto output = [&](int64_t r) { return run.outputs + row(r) * basis.m; };
    for (int64_t r = 0; r < rows; r++) mix(run, sequence(r), head(r));
    if (!run.far.empty()) {
        const auto latents = [&](int64_t r) { return run.mixed + row(r) * basis.n; };
        times(basis, group, 0, basis.m, rows, true, latents, output);
    }
    for (int64_t r = 0; r < rows; r++) {
        const BlockNumbers& to = run.c.output;
        uint8_t* at = to.data + (run.s.token(sequence(r)) * to.token + head(r) * to.head) * bytes_of(l.type);
        from_floats(output(r), l.type, l.sizes[1], at);
    }
}

}  // namespace

extern "C" void attend_blocks(const BlockCall* arguments) {
    static thread_local Memory memory;
    const Call call(*arguments);
    const Run run(call, memory);
    const int64_t count = run.s.count, products = encode_tasks(run, 0) + encode_tasks(run, 1) + absorb_tasks(run);
    const int64_t pieces = int64_t(run.pieces.all.size()), packed = int64_t(run.encoded.size()) * run.sides();
    const int threads = int(run.pieces.threads);
    std::atomic<int64_t> queue{0};  // the next piece that no thread has taken
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) prepare(run, i);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < products; i++) multiply(run, i);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < packed; i++) pack(run, run.encoded[i / run.sides()], int(i % run.sides()));
        for (int64_t i = queue++, next; i < pieces; i = next) {
            const bool early = i + 2 * threads < pieces;  // not at the end, where other threads may have none
            next = early ? queue++ : pieces;
            attend(run, run.pieces.all[i], next < pieces ? &run.pieces.all[next] : nullptr);
            if (!early) next = queue++;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < merges(run); i++) merge(run, i);
    }
}

// ------------------------------------------------------------------------------------------------ rows of prompts

// Numbers as rows of a window in 8 bits.
extern "C" void round_rows(const RowRounding* rounding) {
    const RowRounding& a = *rounding;
    const Rows x = {a.x.data, 0, a.x.head, a.x.token};
    const Rows codes = {a.rows + a.start, 0, a.size, a.row}, scales = {a.rows + a.scale, 0, 1, a.row / 2};
    round_tokens(a.type, x, {1, a.heads, a.tokens, a.size}, {}, codes, scales, 0, a.threads);
}

// Rows into blocks.
extern "C" void place_rows(const RowPlacing* placing) {
    const RowPlacing& a = *placing;
#pragma omp parallel for schedule(static) num_threads(int(a.threads)) if (a.threads > 1)
    for (int64_t i = 0; i < a.count; i++) {
        uint8_t* to = a.cache.data + a.blocks[i] * a.cache.block + a.offsets[i] * a.cache.row;
        std::memcpy(to, a.rows + i * a.row, a.bytes);
    }
}
