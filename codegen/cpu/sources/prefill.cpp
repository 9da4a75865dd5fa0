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
// block sees are left out. Both products run on registers of ROWS by up to COLUMNS vectors; keys and values are brought
// into the order in which these read them once for all queries:
//
//     keys      panels of COLUMNS vectors of tokens        [D'][tokens]
//     values    panels of up to COLUMNS vectors of sizes   [T'][sizes]
//
// With AVX-512 BF16, neighbours of D and T are pairs of bfloat16, which one instruction multiplies and adds; weights
// are rounded to bfloat16. Other numbers become floats, and D' is D, T' is T.
//
// Build: c++ -O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "vectors.h"
#include "exponential.h"
#include "products.h"
#include "typed_numbers.h"

// ------------------------------------------------------------------------------------------------ arguments

enum MaskKind : int64_t { NONE, BOOL, ADDITIVE };

struct Rows {
    const uint8_t* data;
    int64_t strides[3];  // batch, head, token; in numbers, of which those of a row are dense
};

struct Arguments {
    int64_t batch, heads, groups, queries, tokens, key_size, value_size, threads;
    Type type;  // of queries, keys and values
    Rows query, key, value;
    MaskKind mask_kind;
    const void* mask;
    int64_t mask_strides[4];  // the last is 0 or 1
    const int64_t* spans;  // [S,2], or null: which keys a query may see, from the first to behind the last
    Type output_type;
    uint8_t* output;
    int64_t output_strides[3];
    float* lse;  // [B,H,S]
    double scale, softcap;

    const uint8_t* row(const Rows& rows, int64_t b, int64_t h, int64_t t) const {
        return rows.data + (b * rows.strides[0] + h * rows.strides[1] + t * rows.strides[2]) * bytes_of(type);
    }

    int64_t first_of(int64_t query) const { return spans ? std::clamp<int64_t>(spans[2 * query], 0, tokens) : 0; }

    int64_t end_of(int64_t query) const {
        return spans ? std::clamp<int64_t>(spans[2 * query + 1], 0, tokens) : tokens;
    }
};

constexpr int ROWS = 6, COLUMNS = LANES == 16 ? 4 : 2;  // of sums in registers: rows, vectors of a row
constexpr int64_t PANEL = COLUMNS * LANES;  // tokens
constexpr int64_t TILE = 256, BLOCK = 96;  // tokens and queries
constexpr int64_t MOST_BYTES = 1 << 24;  // of keys and values in order at once, if not of one head
static_assert(TILE % PANEL == 0 && TILE % 2 == 0 && BLOCK % ROWS == 0, "whole panels, pairs and rows");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ operands

INLINE Ints load_words(const uint32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Numbers as floats: a word holds one.
struct Singles {
    static constexpr int64_t DEPTH = 1;  // numbers in a word
    static INLINE Floats add(Floats sum, uint32_t left, Ints right) {
        return add_product(sum, Floats{} + from_bits(left), (Floats)right);
    }
    static void row(const uint8_t* from, Type type, int64_t size, uint32_t* to) {
        to_floats(from, type, size, reinterpret_cast<float*>(to));
    }
    static void pair(const uint8_t* from, const uint8_t*, Type type, int64_t size, uint32_t* to) {
        row(from, type, size, to);
    }
    static INLINE void weights(Floats x, uint32_t* row, int64_t t) { store(reinterpret_cast<float*>(row) + t, x); }
};

#if defined(__AVX512BF16__)
// Numbers of bfloat16: a word holds two neighbours.
struct Pairs {
    static constexpr int64_t DEPTH = 2;
    static INLINE Floats add(Floats sum, uint32_t left, Ints right) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
    }
    static void row(const uint8_t* from, Type, int64_t size, uint32_t* to) {
        to[(size - 1) / 2] = 0;
        std::memcpy(to, from, size * 2);
    }
    static void pair(const uint8_t* even, const uint8_t* odd, Type, int64_t size, uint32_t* to) {
        const auto *low = reinterpret_cast<const uint16_t*>(even), *high = reinterpret_cast<const uint16_t*>(odd);
        if (!odd)
            for (int64_t i = 0; i < size; i++) to[i] = low[i];
        else
            for (int64_t i = 0; i < size; i++) to[i] = uint32_t(low[i]) | uint32_t(high[i]) << 16;
    }
    static INLINE void weights(Floats x, uint32_t* row, int64_t t) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
        std::memcpy(reinterpret_cast<uint16_t*>(row) + t, &rounded, sizeof rounded);
    }
};
#else
typedef Singles Pairs;
#endif

// ------------------------------------------------------------------------------------------------ products

// out [ROWS][N vectors] (+)= left [ROWS][depth] . right [depth][N vectors]
template <class K, int N, bool ADDS>
INLINE void multiply_panel(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t depth, float* out,
                           int64_t out_row) {
    Floats sum[ROWS][N];
    UNROLL(6) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int c = 0; c < N; c++) sum[r][c] = ADDS ? load(out + r * out_row + c * LANES) : Floats{};
    }
    UNROLL(1) for (int64_t i = 0; i < depth; i++) {
        Ints panel[N];
        UNROLL(4) for (int c = 0; c < N; c++) panel[c] = load_words(right + (i * N + c) * LANES);
        UNROLL(6) for (int r = 0; r < ROWS; r++) {
            UNROLL(4) for (int c = 0; c < N; c++) sum[r][c] = K::add(sum[r][c], left[r * left_row + i], panel[c]);
        }
    }
    UNROLL(6) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int c = 0; c < N; c++) store(out + r * out_row + c * LANES, sum[r][c]);
    }
}

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

template <class K, int... I>
INLINE void mix_panel(std::integer_sequence<int, I...>, int64_t vectors, const uint32_t* weights, int64_t weight_row,
                      const uint32_t* values, int64_t depth, float* out, int64_t out_row) {
    ((vectors == I + 1 ? multiply_panel<K, I + 1, true>(weights, weight_row, values, depth, out, out_row) : void()),
     ...);
}

// ------------------------------------------------------------------------------------------------ keys and values

// Keys and values of one kv head in the order in which products read them.
template <class K>
struct Ordered {
    int64_t key_depth, value_depth, tiles;  // words of a query; words of a tile's weights
    ValuePanels panels;
    uint32_t *keys, *values;

    explicit Ordered(const Arguments& a)
        : key_depth(ceil_div(a.key_size, K::DEPTH)), value_depth(TILE / K::DEPTH), tiles(ceil_div(a.tokens, TILE)),
          panels(a.value_size), keys(nullptr), values(nullptr) {}

    int64_t key_words() const { return tiles * TILE * key_depth; }
    int64_t value_words() const { return tiles * value_depth * panels.size(); }
    int64_t words() const { return key_words() + value_words(); }
    uint32_t* tile_keys(int64_t tile) const { return keys + tile * TILE * key_depth; }
    uint32_t* tile_values(int64_t tile) const { return values + tile * value_depth * panels.size(); }

    void place(uint32_t* memory) {
        keys = memory;
        values = memory + key_words();
    }

    void order_keys(const Arguments& a, int64_t b, int64_t g, int64_t tile) const {
        uint32_t row[PANEL][MOST_DEPTH];
        const int64_t end = std::min(a.tokens, (tile + 1) * TILE);
        for (int64_t t = tile * TILE, p = 0; t < end; t += PANEL, p++) {
            uint32_t* to = tile_keys(tile) + p * PANEL * key_depth;
            const int64_t count = std::min(PANEL, end - t);
            for (int64_t from = 0; from < key_depth; from += MOST_DEPTH) {
                const int64_t depth = std::min(MOST_DEPTH, key_depth - from), at = from * K::DEPTH;
                const int64_t size = std::min(depth * K::DEPTH, a.key_size - at);
                for (int64_t c = 0; c < count; c++)
                    K::row(a.row(a.key, b, g, t + c) + at * bytes_of(a.type), a.type, size, row[c]);
                for (int64_t i = 0; i < depth; i++) {
                    uint32_t* words = to + (from + i) * PANEL;
                    for (int64_t c = 0; c < count; c++) words[c] = row[c][i];
                    for (int64_t c = count; c < PANEL; c++) words[c] = 0;
                }
            }
        }
    }

    void order_values(const Arguments& a, int64_t b, int64_t g, int64_t tile) const {
        const int64_t first = tile * TILE, end = std::min(a.tokens, first + TILE), size = panels.panel();
        const int64_t depth = ceil_div(std::min(TILE, ceil_div(end - first, PANEL) * PANEL), K::DEPTH);
        for (int64_t p = 0; p < panels.count; p++) {
            const int64_t start = p * size, width = std::clamp<int64_t>(a.value_size - start, 0, size);
            uint32_t* to = tile_values(tile) + p * value_depth * size;
            for (int64_t i = 0; i < depth; i++, to += size) {
                const int64_t t = first + i * K::DEPTH;
                std::fill(to + (t < end ? width : 0), to + size, 0u);
                if (t >= end || !width) continue;
                const auto at = [&](int64_t token) {
                    return token < end ? a.row(a.value, b, g, token) + start * bytes_of(a.type) : nullptr;
                };
                K::pair(at(t), at(t + 1), a.type, width, to);
            }
        }
    }

    static constexpr int64_t MOST_DEPTH = 64;  // words of a key that are moved at once
};

// ------------------------------------------------------------------------------------------------ a block of queries

// tanh, to the accuracy of exp2.
INLINE Floats tanh_of(Floats y) {
    const Floats size = y < 0.0f ? -y : y;
    const Floats e = exp2(size * float(-2 * LOG2E));
    const Floats x = (1.0f - e) / (1.0f + e);
    return y < 0.0f ? -x : x;
}

template <class K>
class Block {
    const Arguments& a;
    const Ordered<K>& ordered;
    std::unique_ptr<uint32_t, decltype(&std::free)> memory;
    uint32_t *queries, *weights;
    float *scores, *mixed, *bias;
    float top[BLOCK], total[BLOCK];
    int64_t b = 0, h = 0, first = 0, count = 0;

    static constexpr int64_t WEIGHT_ROW = TILE / K::DEPTH;

  public:
    Block(const Arguments& arguments, const Ordered<K>& o) : a(arguments), ordered(o), memory(nullptr, std::free) {
        const int64_t query = BLOCK * o.key_depth, weight = BLOCK * WEIGHT_ROW, score = BLOCK * TILE;
        const int64_t mix = BLOCK * o.panels.size();
        const int64_t bytes = ceil_div((query + weight + score + mix + TILE) * 4, 64) * 64;
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
            K::row(a.row(a.query, b, h, first + r), a.type, a.key_size, queries + r * ordered.key_depth);
        }
        std::fill(mixed, mixed + rows() * ordered.panels.size(), 0.0f);
        std::fill(top, top + rows(), -INF);
        std::fill(total, total + rows(), 0.0f);
        int64_t begin = a.tokens, end = 0;
        for (int64_t r = 0; r < count; r++) {
            begin = std::min(begin, a.first_of(first + r));
            end = std::max(end, a.end_of(first + r));
        }
        for (int64_t t = begin / TILE * TILE; t < end; t += TILE) {
            const int64_t tokens = std::min(TILE, end - t);
            if (is_hidden(t, tokens)) continue;
            const int64_t panels = ceil_div(tokens, PANEL);
            score(group.tile_keys(t / TILE), panels);
            for (int64_t r = 0; r < rows(); r++) weigh(r, t, tokens, panels * PANEL);
            mix(group.tile_values(t / TILE), panels * PANEL / K::DEPTH);
        }
        finish();
    }

  private:
    int64_t rows() const { return ceil_div(count, ROWS) * ROWS; }

    template <class T>
    const T* mask_row(int64_t r, int64_t t) const {
        const int64_t* strides = a.mask_strides;
        const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2] + t * strides[3];
        return static_cast<const T*>(a.mask) + at;
    }

    // Whether the mask hides all of these tokens from the whole block.
    bool is_hidden(int64_t t, int64_t tokens) const {
        if (a.mask_kind != BOOL) return false;
        const int64_t read = a.mask_strides[3] ? tokens : 1;
        for (int64_t r = 0; r < (a.mask_strides[2] ? count : 1); r++) {
            if (std::memchr(mask_row<uint8_t>(r, t), 1, read)) return false;
        }
        return true;
    }

    void score(const uint32_t* keys, int64_t panels) {
        const int64_t depth = ordered.key_depth;
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t r = 0; r < rows(); r += ROWS) {
                multiply_panel<K, COLUMNS, false>(queries + r * depth, depth, keys + p * PANEL * depth, depth,
                                                  scores + r * TILE + p * PANEL, TILE);
            }
        }
    }

    void mix(const uint32_t* values, int64_t depth) {
        const ValuePanels& panels = ordered.panels;
        for (int64_t p = 0; p < panels.count; p++) {
            for (int64_t r = 0; r < rows(); r += ROWS) {
                mix_panel<K>(std::make_integer_sequence<int, COLUMNS>(), panels.vectors, weights + r * WEIGHT_ROW,
                             WEIGHT_ROW, values + p * ordered.value_depth * panels.panel(), depth,
                             mixed + r * panels.size() + p * panels.panel(), panels.size());
            }
        }
    }

    // Turns the scores of a row into logits, in units of log 2; `end` of them, of which those outside [begin, seen) are
    // -inf.
    void cap_and_mask(int64_t r, int64_t t, int64_t begin, int64_t seen, int64_t end, float* x) {
        const float scale = float(a.scale * (a.softcap != 0.0 ? 1.0 / a.softcap : LOG2E));
        const float cap = float(a.softcap * LOG2E);
        for (int64_t c = 0; c < seen; c += LANES) {
            const Floats scaled = load(x + c) * scale;
            store(x + c, a.softcap != 0.0 ? tanh_of(scaled) * cap : scaled);
        }
        if (a.mask_kind == BOOL) {
            const uint8_t* mask = mask_row<uint8_t>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] ? 0.0f : -INF;
        } else if (a.mask_kind == ADDITIVE) {
            const float* mask = mask_row<float>(r, t);
            const int64_t step = a.mask_strides[3];
            for (int64_t c = 0; c < seen; c++) bias[c] = mask[c * step] * float(LOG2E);
        }
        if (a.mask_kind != NONE)
            for (int64_t c = 0; c < seen; c++) x[c] += bias[c];
        std::fill(x, x + begin, -INF);
        std::fill(x + seen, x + end, -INF);
    }

    void weigh(int64_t r, int64_t t, int64_t tokens, int64_t end) {
        float* x = scores + r * TILE;
        uint32_t* row = weights + r * WEIGHT_ROW;
        const int64_t seen = r < count ? std::clamp<int64_t>(a.end_of(first + r) - t, 0, tokens) : 0;
        const int64_t begin = r < count ? std::clamp<int64_t>(a.first_of(first + r) - t, 0, tokens) : 0;
        float largest = -INF;
        if (begin < seen) {
            cap_and_mask(r, t, begin, seen, end, x);
            Floats most = Floats{} + top[r];
            for (int64_t c = 0; c < end; c += LANES) {
                const Floats y = load(x + c);
                most = y > most ? y : most;
            }
            largest = largest_of(most);
        }
        if (largest == -INF) {
            std::memset(row, 0, end / K::DEPTH * 4);
            return;
        }
        Floats sum = {};
        for (int64_t c = 0; c < end; c += LANES) {
            const Floats y = exp2(load(x + c) - largest);
            sum += y;
            K::weights(y, row, c);
        }
        if (largest > top[r]) {
            const float factor = exp2(Floats{} + (top[r] - largest))[0];
            float* out = mixed + r * ordered.panels.size();
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * factor);
            total[r] *= factor;
            top[r] = largest;
        }
        total[r] += sum_of(sum);
    }

    void finish() {
        for (int64_t r = 0; r < count; r++) {
            float* out = mixed + r * ordered.panels.size();
            const float share = total[r] > 0.0f || total[r] != total[r] ? 1.0f / total[r] : 0.0f;
            for (int64_t e = 0; e < ordered.panels.size(); e += LANES) store(out + e, load(out + e) * share);
            const int64_t* strides = a.output_strides;
            const int64_t at = b * strides[0] + h * strides[1] + (first + r) * strides[2];
            from_floats(out, a.output_type, a.value_size, a.output + at * bytes_of(a.output_type));
            const float lse = total[r] == 0.0f ? -INF : float((double(top[r]) + std::log2(double(total[r]))) * LN2);
            a.lse[(b * a.heads + h) * a.queries + first + r] = lse;
        }
    }
};

// ------------------------------------------------------------------------------------------------ all of it

template <class K>
void attend(const Arguments& a) {
    const Ordered<K> shape(a);
    const int64_t copies = a.heads / a.groups, blocks = ceil_div(a.queries, BLOCK), bytes = shape.words() * 4;
    const int64_t at_once = std::clamp<int64_t>(MOST_BYTES / std::max<int64_t>(bytes, 1), 1, a.groups);
    const std::unique_ptr<uint32_t, decltype(&std::free)> memory(
        static_cast<uint32_t*>(std::aligned_alloc(64, ceil_div(std::max<int64_t>(bytes, 1) * at_once, 64) * 64)),
        std::free);
    for (int64_t i = 0; i < a.batch * a.groups; i += at_once) {
        const int64_t groups = std::min(at_once, a.batch * a.groups - i), tasks = groups * copies * blocks;
        const auto group = [&](int64_t n) {
            Ordered<K> its = shape;
            its.place(memory.get() + n * shape.words());
            return its;
        };
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
        {
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

extern "C" void open_attention(const Arguments* arguments) {
    arguments->type == BFLOAT16 ? attend<Pairs>(*arguments) : attend<Singles>(*arguments);
}
