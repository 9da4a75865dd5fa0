// Latent attention for any kind of latent, on a CPU:
//
//     x[t] = cap(scale * q . z_K[t]) + mask[t]      cap(x) = softcap tanh(x / softcap), or x
//     lse  = log sum_t exp(x[t])
//     o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked
//
//     q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]
//
//     B batch, H query heads, J latent heads (H/J query heads read one; keys and values may differ in J), S queries,
//     T tokens, R channels of a latent.
//
// What differs from kind to kind (bit groups, widths, softcap) is a table, `Kernel`, which `new_kernel` makes once and
// every call points to: no plan needs a compiler. Loops over bit groups stand outside of loops over tokens, or choose
// between unpackings of whole groups.
//
// A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
// A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
// one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
// With a negative step it has a trellis code: 8 bits of a ring of bits are looked up, u is a code of 8 bits then.
//
// Codes are multiplied as they are: steps go into the query and the output, the middle (2^b - 1)/2 is subtracted from
// whole sums, and the token's scale multiplies its logit and its weight. Products are
// of floats or, with AVX-512 VNNI, of bytes or, with AVX2, of words of 16 bits.
//
// Work is cut into parts: (batch, query heads that share latents, some queries, a range of tokens). A part walks over
// its tokens in tiles that fit the first-level cache, and passes over those that are masked whole: unpack a tile of
// keys once, score it with all rows (query head x query), update the running softmax, unpack the values of the same
// tokens, mix. Ranges of tokens are then merged by their log-sum-exp. Logits are kept in base 2: exp2 is cheaper than
// exp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "float_tiles.h"
#include "softmax.h"
#include "byte_keys.h"
#include "byte_values.h"
#include "word_keys.h"
#include "word_values.h"

namespace {

void scale_logits(int64_t row, int rows, int tokens, Scratch& s) {
    for (int64_t r = row; r < row + rows; r++) {
        float* x = s.logits + r * TILE;
        for (int t = 0; t < tokens; t += LANES) store(x + t, (load(x + t) - s.middle[r]) * load(s.scale + t));
    }
}

void scale_weights(int64_t row, int rows, int tokens, Scratch& s) {
    for (int64_t r = row; r < row + rows; r++) {
        float* w = s.logits + r * TILE;
        Floats total = {};
        for (int t = 0; t < tokens; t += LANES) {
            const Floats scaled = load(w + t) * load(s.scale + t);
            store(w + t, scaled);
            total += scaled;
        }
        s.totals[r] = sum_of(total);
    }
}

void score_tile(const Attention& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const Side& side = s.kernel.key;
    const int pad = side.pad;
    const int64_t shared = a.heads / a.key_heads;  // query heads that read one latent head
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (side.integer) {
            score_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile(side, a.key, a.key_scale, p, j, begin, tokens, s, [&](const auto& z) {
            for_blocks_of_rows<MAX_ROWS>(rows, [&](int first, auto count) {
                constexpr int ROWS = decltype(count)::value;
                const int64_t r = row + first;
                constexpr int TOKENS = ROWS == 1 ? 8 : 4;
                float* logits = s.logits + r * TILE;
#if defined(__AVX512BF16__)
                if constexpr (std::is_same_v<std::decay_t<decltype(z)>, Tile<BFloat16>>) {
                    if (s.are_pairs) {
                        return score_pairs<ROWS, TOKENS>(s.pairs + r * pad, pad, z, whole, s.factor, logits);
                    }
                }
#endif
                score<ROWS, TOKENS>(s.query + r * pad, pad, z, whole, logits);
            });
        });
        if (side.scaled) scale_logits(row, rows, whole, s);
    }
}

void update_softmax(const Attention& a, const Part& p, int64_t begin, int tokens, int64_t segment, Scratch& s) {
    const int whole = whole_vectors(tokens);
    for (int r = 0; r < p.rows(); r++) {
        float* x = s.logits + r * TILE;
        if (s.kernel.softcap) cap(x, whole, float(a.softcap));
        if (a.shift) {
            const float shift = a.shift[segment * a.batch * a.heads * a.queries + p.row(a, r)] * LOG2E;
            for (int t = 0; t < whole; t += LANES) store(x + t, load(x + t) + shift);
        }
        add_mask(a, p, r, begin, tokens, x);
        std::fill(x + tokens, x + whole, -INF);
        to_weights(x, whole, s.kernel.value.pad, s.states[r]);
    }
}

void mix_tile(const Attention& a, const Part& p, int64_t begin, int tokens, Scratch& s) {
    const Side& side = s.kernel.value;
    const float* middle = side.scaled ? side.middle.data() : nullptr;
    const int64_t shared = a.heads / a.value_heads;
    const int rows = int(shared * p.queries), whole = whole_vectors(tokens);
    for (int64_t head = 0; head < p.heads; head += shared) {
        const int64_t j = (p.head + head) / shared;
        const int64_t row = head * p.queries;
        if (side.integer) {
            mix_codes(a, p, j, begin, tokens, row, rows, s);
            continue;
        }
        with_tile(side, a.value, a.value_scale, p, j, begin, tokens, s, [&](const auto& z) {
            if (side.scaled) scale_weights(row, rows, whole, s);
            for_blocks_of_rows<MAX_ROWS>(rows, [&](int first, auto count) {
                const int64_t r = row + first;
                // clang-format off
                mix<decltype(count)::value>(
                    s.logits + r * TILE, s.totals + r, middle, side.pad, z, tokens, s.states + r);
                // clang-format on
            });
        });
    }
}

// Queries as digits, in the order in which they are multiplied.
void split_queries(const Attention& a, const Part& p, Scratch& s) {
    const Kernel& k = s.kernel;
    const int64_t bytes = PART_BYTES * k.key_dwords, shared = a.heads / a.key_heads * p.queries;
    int8_t* parts = s.parts + (WORDS ? s.rows * bytes : 0);  // words are arranged anew, all of them
    const int fine = fine_keys(a, int(shared), k);
    for (int r = 0; r < p.rows(); r++) {
        to_parts(k, s.query + r * k.key.pad, fine, parts + r * bytes, s.unit[r], s.middle[r], s.lowest[r], s.coarse[r]);
    }
    for (int64_t row = 0; row < p.rows(); row += shared) arrange_queries(a, row, int(shared), s);
}

// Queries of a segment with everything folded in that may be: scale, steps, base 2. Also q . middle, to be taken from
// each logit.
void load_queries(const Attention& a, const Part& p, int64_t segment, Scratch& s) {
    const Kernel& k = s.kernel;
    const int width = k.key.width, pad = k.key.pad;
    const float factor = float(k.softcap ? a.scale / a.softcap : a.scale * LOG2E);
    s.factor = factor;
    s.are_pairs = k.pairs;
    for (int r = 0; r < p.rows(); r++) {
        const float* q = row_at<float>(a.query, p.b, p.head + r / p.queries, p.query + r % p.queries);
        q += segment * a.query_segment;
        for (int i = 0; k.pairs && i < width; i++) {
            uint32_t bits;
            std::memcpy(&bits, q + i, sizeof bits);
            s.are_pairs &= (bits & 0xffff) == 0;
            s.pairs[r * pad + i] = uint16_t(bits >> 16);
        }
        float* out = s.query + r * pad;
        for (int i = 0; i < width; i++) out[i] = q[i] * (factor * k.key.step[i]);
        std::fill(out + width, out + pad, 0.0f);
        Floats middle = {};
        for (int i = 0; i < pad; i += LANES) middle += load(out + i) * load(k.key.middle.data() + i);
        s.middle[r] = sum_of(middle);
    }
    if (k.key.integer) split_queries(a, p, s);
}

// Where the tokens end that the same queries read as number `begin`.
int64_t end_of_segment(const Attention& a, const Part& p, int64_t begin) {
    if (!a.segment) return p.end;
    const int64_t end = (p.listed.at(begin) / a.segment + 1) * a.segment;
    if (!p.listed.pages) return std::min(p.end, end);
    while (begin < p.end && p.listed.at(begin) < end) begin = (begin / a.page_tokens + 1) * a.page_tokens;
    return std::min(p.end, begin);
}

void attend(const Attention& a, const Part& p, Scratch& s) {
    for (int r = 0; r < p.rows(); r++) {
        s.states[r].top = -INF;
        s.states[r].total = s.states[r].mass = 0;
        std::fill(s.states[r].sum, s.states[r].sum + s.kernel.value.pad, 0.0f);
    }
    for (int64_t next = p.begin, end; next < p.end; next = end) {
        const int64_t segment = a.segment ? p.listed.at(next) / a.segment : 0;
        end = end_of_segment(a, p, next);
        load_queries(a, p, segment, s);
        for (int64_t begin = next; begin < end; begin += s.kernel.tokens) {
            const int tokens = int(std::min<int64_t>(s.kernel.tokens, end - begin));
            if (is_hidden(a, p, begin, tokens)) continue;
            score_tile(a, p, begin, tokens, s);
            update_softmax(a, p, begin, tokens, segment, s);
            mix_tile(a, p, begin, tokens, s);
        }
    }
}

// ------------------------------------------------------------------------------------------------ all parts

// How the whole is cut: `units` groups of query heads that share latents, blocks of queries, ranges of tokens.
struct Cut {
    static constexpr int64_t LONG_RANGE = 8192, SHORT_RANGE = 64;  // tokens
    int64_t heads, units, queries, blocks, tokens, ranges, threads;

    explicit Cut(const Attention& a) {
        heads = std::lcm(a.heads / a.key_heads, a.heads / a.value_heads);
        units = a.heads / heads;
        queries = std::clamp<int64_t>(ROWS_OF_A_PART / heads, 1, std::max<int64_t>(a.queries, 1));
        blocks = (a.queries + queries - 1) / queries;
        const int64_t most = a.pages.data ? std::min(a.tokens, a.page_count * a.page_tokens) : a.tokens;
        const Kernel& k = kernel_of(a);
        const int64_t products = a.batch * a.heads * a.queries * most * (k.key.width + k.value.width);
        threads = std::clamp<int64_t>(products / 200000, 1, a.threads);  // a thread is worth about 10 us of work
        const int64_t parts = std::max<int64_t>(a.batch * units * blocks, 1);
        const bool several = threads > 1 && parts < 4 * threads;  // ranges of tokens
        const int64_t listed = several && a.pages.data ? longest(a) : most;
        const int64_t wanted = several ? even(a, parts, listed) : 1;
        const int64_t whole = a.pages.data ? k.tokens : 16;  // a tile of pages that begins with one may stay in place
        tokens = std::max<int64_t>((listed + wanted * whole - 1) / (wanted * whole), 1) * whole;
        ranges = std::max<int64_t>((listed + tokens - 1) / tokens, 1);
    }

    // How many ranges of tokens: so that all threads get as many parts, where few ranges do. More where parts are long
    // or not alike, lest all wait for one; a thread waits for memory where a range begins.
    int64_t even(const Attention& a, int64_t parts, int64_t listed) const {
        const int64_t step = threads / std::gcd(parts, threads), many = (4 * threads + parts - 1) / parts;
        const bool alike = a.mask_kind == NO_MASK && !a.pages.data;
        int64_t count = std::min(step, many);
        while (count < many && !(alike && listed <= count * LONG_RANGE)) count += step;
        return std::clamp<int64_t>(count, 1, std::max<int64_t>(listed / SHORT_RANGE, 1));
    }

    // Tokens of the longest list: lists have room for more than most queries read.
    int64_t longest(const Attention& a) const {
        int64_t count = 0;
        for (int64_t i = 0; i < a.batch * units; i++) {
            count = std::max(count, Listed(a, i / units, i % units * heads).count);
        }
        return count;
    }

    int64_t parts(const Attention& a) const { return a.batch * units * blocks * ranges; }

    Part part(const Attention& a, int64_t index) const {
        const int64_t range = index % ranges, block = index / ranges % blocks;
        const int64_t unit = index / (ranges * blocks) % units, b = index / (ranges * blocks * units);
        const int64_t query = block * queries;
        const Listed listed(a, b, unit * heads);
        // clang-format off
        return {b, unit * heads, heads, query, std::min(queries, a.queries - query),
                range * tokens, std::min(listed.count, (range + 1) * tokens), listed};
        // clang-format on
    }
};

// Joins the ranges of tokens of one row: states [ranges] -> output [R_V], lse.
void merge(const Side& side, const State* states, int64_t ranges, float* output, float& lse) {
    float top = -INF, total = 0;
    for (int64_t i = 0; i < ranges; i++) top = std::max(top, states[i].top);
    std::fill(output, output + side.width, 0.0f);
    for (int64_t i = 0; i < ranges; i++) {
        const float factor = states[i].top == -INF ? 0.0f : std::exp2(states[i].top - top);
        total += states[i].total * factor;
        for (int c = 0; c < side.width; c++) output[c] += states[i].sum[c] * factor;
    }
    const float inverse = total == 0 ? 0.0f : 1 / total;
    for (int c = 0; c < side.width; c++) output[c] *= inverse * side.step[c];
    lse = log_sum_exp(top, total);
}

// States of all ranges, [B, H, S, ranges], where there are several.
struct Ranges {
    State* states;
    float* sums;
    int pad;

    Ranges(int64_t count, int width)
        : states(allocate<State>(count)), sums(allocate<float>(count * width)), pad(width) {}
    Ranges(const Ranges&) = delete;
    ~Ranges() {
        std::free(states);
        std::free(sums);
    }
    void set(int64_t index, const State& state) {
        states[index] = state;
        states[index].sum = sums + index * pad;
        std::copy(state.sum, state.sum + pad, states[index].sum);
    }
};

}  // namespace

// The table of a kind of latent: of keys and of values bit groups, how many there are (none: not quantized), channels;
// the type of what is not quantized; whether logits are capped. It lives until the process ends.
extern "C" const void* new_kernel(const Tier* keys, int64_t key_count, int64_t key_width, const Tier* values,
                                  int64_t value_count, int64_t value_width, int64_t type, int64_t softcap) {
    const Side key(keys, key_count, key_width, type, false), value(values, value_count, value_width, type, true);
    return new Kernel(key, value, softcap != 0);
}

extern "C" void latent_attention(const Attention* arguments) {
    const Attention& a = *arguments;
    const Kernel& k = kernel_of(a);
    const Cut cut(a);
    const int64_t rows = a.batch * a.heads * a.queries;
    Ranges ranges(cut.ranges > 1 ? rows * cut.ranges : 0, k.value.pad);
#pragma omp parallel num_threads(int(cut.threads)) if (cut.threads > 1)
    {
        Scratch s(k, cut.heads * cut.queries);
        if (a.later_count) s.later.set(a.later, a.later_count, (a.key_heads + a.value_heads) * (a.tokens / 16));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < cut.parts(a); i++) {
            const Part p = cut.part(a, i);
            attend(a, p, s);
            for (int r = 0; r < p.rows(); r++) {
                const int64_t row = p.row(a, r);
                if (cut.ranges > 1) ranges.set(row * cut.ranges + i % cut.ranges, s.states[r]);
                else merge(k.value, s.states + r, 1, a.output + row * k.value.width, a.lse[row]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < (cut.ranges > 1 ? rows : 0); row++) {
            const State* states = ranges.states + row * cut.ranges;
            merge(k.value, states, cut.ranges, a.output + row * k.value.width, a.lse[row]);
        }
    }
}
