// open_attention
//
// Attention of many queries to keys and values as they are, as a prompt asks for it:
//
//     x[s][t] = cap(scale * q[s] . k[t]) + mask[s][t]    o[s] = sum_t softmax(x)[s][t] v[t]    lse[s] = log sum_t e^x
//
//     q [B,H,S,D]   k [B,G,T,D]   v [B,G,T,E]   mask [B,H,S,T]   ->   o [B,H,S,E]   lse [B,H,S]
//
//     B batch, H query heads, G kv heads, S queries, T keys, D and E head size of keys and values
//
// A block of queries of one head walks over the keys, a tile at a time, and keeps the largest logit, the sum of weights
// and the mix of values that it has so far (online softmax: arXiv 1805.02867, 2205.14135). Tiles that no query of the
// block sees are left out. Both products run on sums of ROWS by up to COLUMNS vectors; keys and values are brought
// into the order in which these read them once for all queries:
//
//     keys      panels of COLUMNS vectors of tokens        [D'][tokens]
//     values    panels of up to COLUMNS vectors of sizes   [T'][sizes]
//
// With AVX-512 BF16 or AMX, neighbours of D and T are pairs of bfloat16, which one instruction multiplies and adds;
// weights are rounded to bfloat16. AMX multiplies 16 rows of 32 numbers by 16 columns at once, and D' is filled up to
// 16 pairs. Other numbers become floats, and D' is D, T' is T.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "prefill_operands.h"
#include "static_counts.h"

namespace {

// ------------------------------------------------------------------------------------------------ products

// How sizes of values are cut into panels: as few as registers allow, as even as can be.
struct ValuePanels {
    int64_t count, vectors;  // vectors of each

    explicit ValuePanels(int64_t size) {
        const int64_t all = ceil_div(size, LANES);
        count = ceil_div(all, COLUMNS);
        vectors = ceil_div(all, count);
    }
    int64_t panel() const { return vectors * LANES; }
    int64_t size() const { return count * panel(); }  // with what pads it
};

// ------------------------------------------------------------------------------------------------ keys and values

// Keys and values of one kv head in the order in which products read them.
template <class K>
struct Ordered {
    int64_t key_depth, value_depth, tiles;  // words of a query; words of a tile's weights
    ValuePanels panels;
    uint32_t *keys, *values;

    explicit Ordered(const OpenAttention& a)
        : key_depth(up_to(ceil_div(a.key_size, K::DEPTH), K::WORDS)), value_depth(TILE / K::DEPTH),
          tiles(ceil_div(a.tokens, TILE)), panels(a.value_size), keys(nullptr), values(nullptr) {}

    int64_t key_words() const { return tiles * TILE * key_depth; }
    int64_t value_words() const { return tiles * value_depth * panels.size(); }
    int64_t words() const { return key_words() + value_words(); }
    uint32_t* tile_keys(int64_t tile) const { return keys + tile * TILE * key_depth; }
    uint32_t* tile_values(int64_t tile) const { return values + tile * value_depth * panels.size(); }

    void place(uint32_t* memory) {
        keys = memory;
        values = memory + key_words();
    }

    void order_keys(const OpenAttention& a, int64_t b, int64_t g, int64_t tile) const {
        uint32_t row[PANEL][MAX_DEPTH] = {};
        const int64_t end = std::min(a.tokens, (tile + 1) * TILE);
        for (int64_t t = tile * TILE, p = 0; t < end; t += PANEL, p++) {
            uint32_t* to = tile_keys(tile) + p * PANEL * key_depth;
            const int64_t count = std::min(PANEL, end - t);
            for (int64_t from = 0; from < key_depth; from += MAX_DEPTH) {
                const int64_t depth = std::min(MAX_DEPTH, key_depth - from), at = from * K::DEPTH;
                const int64_t size = std::min(depth * K::DEPTH, a.key_size - at);
                for (int64_t c = 0; c < count; c++)
                    K::row(typed_row_at(a.key, a.type, b, g, t + c) + at * bytes_of(a.type), a.type, size, row[c]);
                for (int64_t i = 0; i < depth; i++) {
                    uint32_t* words = to + (from + i) * PANEL;
                    for (int64_t c = 0; c < count; c++) words[c] = row[c][i];
                    for (int64_t c = count; c < PANEL; c++) words[c] = 0;
                }
            }
        }
    }

    void order_values(const OpenAttention& a, int64_t b, int64_t g, int64_t tile) const {
        const int64_t first = tile * TILE, end = std::min(a.tokens, first + TILE), size = panels.panel();
        const int64_t depth = ceil_div(std::min(TILE, up_to(end - first, PANEL)), K::DEPTH);
        for (int64_t p = 0; p < panels.count; p++) {
            const int64_t start = p * size, width = std::clamp<int64_t>(a.value_size - start, 0, size);
            uint32_t* to = tile_values(tile) + p * value_depth * size;
            for (int64_t i = 0; i < depth; i++, to += size) {
                const int64_t t = first + i * K::DEPTH;
                std::fill(to + (t < end ? width : 0), to + size, 0u);
                if (t >= end || !width) continue;
                const auto at = [&](int64_t token) {
                    return token < end ? typed_row_at(a.value, a.type, b, g, token) + start * bytes_of(a.type)
                                       : nullptr;
                };
                K::pair(at(t), at(t + 1), a.type, width, to);
            }
        }
    }

    static constexpr int64_t MAX_DEPTH = 64;  // words of a key that are moved at once
};

// ------------------------------------------------------------------------------------------------ a block of queries

template <class K>
class Block {
    const OpenAttention& a;
    const Ordered<K>& ordered;
    std::unique_ptr<uint32_t, decltype(&std::free)> memory;
    uint32_t *queries, *weights;
    float *scores, *mixed, *bias;
    float top[BLOCK], total[BLOCK];
    int64_t b = 0, h = 0, first = 0, count = 0;

    static constexpr int64_t WEIGHT_ROW = TILE / K::DEPTH;

  public:
    Block(const OpenAttention& arguments, const Ordered<K>& o) : a(arguments), ordered(o), memory(nullptr, std::free) {
        const int64_t query = BLOCK * o.key_depth, weight = BLOCK * WEIGHT_ROW, score = BLOCK * TILE;
        const int64_t mix = BLOCK * o.panels.size();
        const int64_t bytes = up_to((query + weight + score + mix + TILE) * 4, 64);
        memory.reset(static_cast<uint32_t*>(std::aligned_alloc(64, bytes)));
        scores = reinterpret_cast<float*>(memory.get());
        mixed = scores + score;
        bias = mixed + mix;
        weights = reinterpret_cast<uint32_t*>(bias + TILE);
        queries = weights + weight;
    }

    // Queries [from, from + size) of head `head` of sequence `sequence`; keys and values are those of its kv head.
    void attend(const Ordered<K>& group, int64_t sequence, int64_t head, int64_t from, int64_t size) {
        b = sequence, h = head, first = from, count = size;
        std::memset(queries, 0, rows() * ordered.key_depth * 4);
        for (int64_t r = 0; r < count; r++) {
            K::row(typed_row_at(a.query, a.type, b, h, first + r), a.type, a.key_size, queries + r * ordered.key_depth);
        }
        std::fill(mixed, mixed + rows() * ordered.panels.size(), 0.0f);
        std::fill(top, top + rows(), -INF);
        std::fill(total, total + rows(), 0.0f);
        int64_t begin = a.tokens, end = 0;
        for (int64_t r = 0; r < count; r++) {
            begin = std::min(begin, first_of(a, first + r));
            end = std::max(end, end_of(a, first + r));
        }
        for (int64_t t = begin / TILE * TILE; t < end; t += TILE) {
            const int64_t tokens = std::min(TILE, end - t);
            if (is_hidden(t, tokens)) continue;
            const int64_t unseen = std::max<int64_t>(begin - t, 0) / PANEL, panels = ceil_div(tokens, PANEL);
            score(group.tile_keys(t / TILE), unseen, panels);
            for (int64_t r = 0; r < rows(); r++) weigh(r, t, tokens, panels * PANEL);
            mix(group.tile_values(t / TILE), unseen * PANEL / K::DEPTH, panels * PANEL / K::DEPTH);
        }
        finish();
    }

  private:
    int64_t rows() const { return up_to(count, K::ROWS); }

    template <class T>
    const T* mask_row(int64_t r, int64_t t) const {
        const int64_t* strides = a.mask_strides;
        const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2] + t * strides[3];
        return static_cast<const T*>(a.mask) + at;
    }

    // Whether the mask hides all of these tokens from the whole block.
    bool is_hidden(int64_t t, int64_t tokens) const {
        if (a.mask_kind != BOOL_MASK) return false;
        const int64_t read = a.mask_strides[3] ? tokens : 1;
        for (int64_t r = 0; r < (a.mask_strides[2] ? count : 1); r++) {
            if (std::memchr(mask_row<uint8_t>(r, t), 1, read)) return false;
        }
        return true;
    }

    // Panels of a tile from `begin` on, those before which no query of the block sees.
    void score(const uint32_t* keys, int64_t begin, int64_t end) {
        const int64_t depth = ordered.key_depth;
        for (int64_t p = begin; p < end; p++) {
            K::template multiply<COLUMNS, false>(queries, depth, rows(), keys + p * PANEL * depth, depth,
                                                 scores + p * PANEL, TILE);
        }
    }

    void mix(const uint32_t* values, int64_t begin, int64_t end) {
        const ValuePanels& panels = ordered.panels;
        for (int64_t p = 0; p < panels.count; p++) {
            with_count<COLUMNS>(panels.vectors, [&](auto vectors) {
                K::template multiply<decltype(vectors)::value, true>(
                    weights + begin, WEIGHT_ROW, rows(), values + (p * ordered.value_depth + begin) * panels.panel(),
                    end - begin, mixed + p * panels.panel(), panels.size());
            });
        }
    }

    // Whether logits are products times a positive number, which `weigh` multiplies with as it goes.
    bool are_plain() const { return a.mask_kind == NO_MASK && a.softcap == 0.0 && a.scale > 0.0; }

    // Turns the scores of a row into logits, in units of log 2, the first `seen` of them.
    void cap_and_mask(int64_t r, int64_t t, int64_t seen, float* x) {
        const float scale = float(a.scale * (a.softcap != 0.0 ? 1.0 / a.softcap : LOG2E));
        const float cap = float(a.softcap * LOG2E);
        for (int64_t c = 0; c < seen; c += LANES) {
            const Floats scaled = load(x + c) * scale;
            store(x + c, a.softcap != 0.0 ? tanh(scaled) * cap : scaled);
        }
        if (a.mask_kind == BOOL_MASK) {
            const uint8_t* mask = mask_row<uint8_t>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] ? 0.0f : -INF;
        } else if (a.mask_kind == ADDITIVE_MASK) {
            const float* mask = mask_row<float>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] * float(LOG2E);
        }
        if (a.mask_kind != NO_MASK)
            for (int64_t c = 0; c < seen; c++) x[c] += bias[c];
    }

    // Turns the scores of a row into weights, up to column `end`.
    void weigh(int64_t r, int64_t t, int64_t tokens, int64_t end) {
        float* x = scores + r * TILE;
        uint32_t* row = weights + r * WEIGHT_ROW;
        const int64_t seen = r < count ? std::clamp<int64_t>(end_of(a, first + r) - t, 0, tokens) : 0;
        const int64_t begin = r < count ? std::clamp<int64_t>(first_of(a, first + r) - t, 0, tokens) : 0;
        const int64_t start = begin / PANEL * PANEL, stop = up_to(seen, PANEL);  // of the panels that the row sees
        float largest = -INF, factor = 1;
        if (begin < seen) {
            if (are_plain()) factor = float(a.scale * LOG2E);
            else cap_and_mask(r, t, seen, x);
            std::fill(x + start, x + begin, -INF);
            std::fill(x + seen, x + stop, -INF);
            largest = largest_product(x, start, stop, factor, top[r]);
        }
        if (largest == -INF) {
            std::memset(row, 0, end / K::DEPTH * 4);
            return;
        }
        std::memset(row, 0, start / K::DEPTH * 4);
        Floats sums[COLUMNS] = {};
        for (int64_t c = start; c < stop; c += PANEL) {
            UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) {
                const Floats y = K::power(load(x + c + i * LANES) * factor - largest);
                sums[i] += y;
                K::weights(y, row, c + i * LANES);
            }
        }
        std::memset(row + stop / K::DEPTH, 0, (end - stop) / K::DEPTH * 4);
        if (largest > top[r]) {
            const float less = exp2(Floats{} + (top[r] - largest))[0];
            float* out = mixed + r * ordered.panels.size();
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * less);
            total[r] *= less;
            top[r] = largest;
        }
        UNROLL(4) for (int64_t i = 1; i < COLUMNS; i++) sums[0] += sums[i];
        total[r] += sum_of(sums[0]);
    }

    // The largest of `least` and the numbers of x in [start, stop) times `factor`.
    static float largest_product(const float* x, int64_t start, int64_t stop, float factor, float least) {
        Floats most[COLUMNS];
        UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) most[i] = Floats{} + least;
        for (int64_t c = start; c < stop; c += PANEL) {
            UNROLL(4) for (int64_t i = 0; i < COLUMNS; i++) {
                const Floats y = load(x + c + i * LANES) * factor;
                most[i] = y > most[i] ? y : most[i];
            }
        }
        UNROLL(4) for (int64_t i = 1; i < COLUMNS; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
        return largest_of(most[0]);
    }

    void finish() {
        for (int64_t r = 0; r < count; r++) {
            float* out = mixed + r * ordered.panels.size();
            const float share = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * share);
            const int64_t* strides = a.output_strides;
            const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2];
            from_floats(out, a.output_type, a.value_size, a.output + at * bytes_of(a.output_type));
            a.lse[(b * a.heads + h) * a.queries + first + r] = log_sum_exp(top[r], total[r]);
        }
    }
};

// ------------------------------------------------------------------------------------------------ all of it

template <class K>
void attend(const OpenAttention& a) {
    const Ordered<K> shape(a);
    const int64_t copies = a.heads / a.groups, blocks = ceil_div(a.queries, BLOCK), bytes = shape.words() * 4;
    const int64_t at_once = std::clamp<int64_t>(MAX_BYTES / std::max<int64_t>(bytes, 1), 1, a.groups);
    const std::unique_ptr<uint32_t, decltype(&std::free)> memory(
        static_cast<uint32_t*>(std::aligned_alloc(64, up_to(std::max<int64_t>(bytes, 1) * at_once, 64))), std::free);
    for (int64_t i = 0; i < a.batch * a.groups; i += at_once) {
        const int64_t groups = std::min(at_once, a.batch * a.groups - i), tasks = groups * copies * blocks;
        const auto group = [&](int64_t n) {
            Ordered<K> its = shape;
            its.place(memory.get() + n * shape.words());
            return its;
        };
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
        {
            [[maybe_unused]] const typename K::Unit unit;
            Block<K> block(a, shape);
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < groups * shape.tiles; n++) {
                const int64_t at = i + n / shape.tiles, tile = n % shape.tiles;
                group(n / shape.tiles).order_keys(a, at / a.groups, at % a.groups, tile);
                group(n / shape.tiles).order_values(a, at / a.groups, at % a.groups, tile);
            }
            // The last queries see the most keys: they come first, so that no thread ends long after the others.
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < tasks; n++) {
                const int64_t from = (blocks - 1 - n / (groups * copies)) * BLOCK, which = n % (groups * copies);
                const int64_t at = i + which / copies, head = at % a.groups * copies + which % copies;
                block.attend(group(which / copies), at / a.groups, head, from, std::min(BLOCK, a.queries - from));
            }
        }
    }
}

}  // namespace

extern "C" int64_t lanes() { return LANES; }

extern "C" void open_attention(const OpenAttention* arguments) {
    if (arguments->type != BFLOAT16) return attend<Singles>(*arguments);
#if MATRIX_UNIT
    if (Tiles::are_allowed()) return attend<Tiles>(*arguments);
#endif
    attend<Pairs>(*arguments);
}
