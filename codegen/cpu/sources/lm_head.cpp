// head
//
// Which rows of a language-model head may have the largest logits:
//
//     h' = A h                                                            [R]
//     s_w = offset + h^.w^                                                estimate of the logit of row w, from codes
//     u_w = s_w + |h'_1| e1_w + |h'_2| e2_w + g_1 n1_w + g_2 n2_w         upper bound: Cauchy-Schwarz in both tiers
//     scored exactly: rows with u_w >= the k-th largest exact logit found so far, less a margin
//
//     h [M,C]   weight [V,C]   A [R,C]   ->   ids, logits [M, budget], largest first; how many [M], -1: dense
//
//     M hidden states, C their width, R width of the basis (`lead` coordinates of 8 bits, the others of 4), V
//     vocabulary, K clusters; e: norms of what rounding took from a row, n: norms of what it left, g: of what rounding
//     to 8 bits took from h'
//
// The codes are read once for all hidden states, a block of 16 rows in the lanes of a vector. Products of bytes are
// exact; the rest is float32, whose own errors are within the bounds. Exact logits have the bits of `skinny`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "byte_products.h"
#include "products.h"
#include "lm_head_call.h"

namespace {

constexpr int BLOCK = HEAD_BLOCK;
constexpr float UNIT = 0x1p-24f;     // of rounding in float32

struct Numbers {                     // of the rows of a block, behind its codes
    uint16_t scale1[BLOCK], scale2[BLOCK], error1[BLOCK], error2[BLOCK], norm1[BLOCK], norm2[BLOCK];
    int32_t row[BLOCK];
};

// A hidden state as the scan reads it.
struct Query {
    bool finite;
    float offset, slack;             // h.centre; what float32 may be wrong by in an exact logit, and in the estimate
    float step1, step2;              // half the steps of the codes of h'
    int32_t sum1, sum2;              // 255 and 15 times the sums of the codes
    float norm1, norm2;              // |h'|, rounded up
    float lost1, lost2;              // |h' - h^|, rounded up
    float norm;                      // |h'| of both
};

INLINE Floats16 numbers(const uint16_t* p) {
    typedef uint16_t Halves16 __attribute__((vector_size(32)));
    Halves16 halves;
    std::memcpy(&halves, p, sizeof halves);
    return (Floats16)(__builtin_convertvector(halves, Ints16) << 16);
}

// ------------------------------------------------------------------------------------------------ hidden states

double norm_of(const float* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += double(x[i]) * double(x[i]);
    return std::sqrt(sum);
}

INLINE float up(double x) { return float(x) * (1 + 0x1p-20f); }

// Codes of x [n] in 8 bits and half their step; returns the norm of what they lose.
double to_codes(const float* x, int64_t n, int8_t* codes, float& half_step, int32_t& sum) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) top = std::max(top, std::abs(x[i]));
    const float step = top > 1e-30f ? top / 127 : 0, inverse = top > 1e-30f ? 127 / top : 0;
    double lost = 0;
    sum = 0;
    for (int64_t i = 0; i < n; i++) {
        codes[i] = int8_t(std::nearbyint(x[i] * inverse));
        const double rest = double(x[i]) - double(step) * codes[i];
        lost += rest * rest;
        sum += codes[i];
    }
    half_step = step / 2;
    return std::sqrt(lost);
}

// What the scan needs of h [C] and h' [R], beside the codes of h'.
Query prepare(const HeadSearch& a, const float* h, const float* rotated, int8_t* codes) {
    Query q{};
    const double norm = norm_of(h, a.width), size = norm_of(rotated, a.rank);
    double offset = 0;
    for (int64_t i = 0; i < a.width; i++) offset += double(h[i]) * double(a.centre[i]);
    q.finite = norm * a.largest < 1e30 && size < 1e18 && std::abs(offset) < 1e30;
    if (!q.finite) {
        std::fill(codes, codes + a.rank, int8_t(0));
        return q;
    }
    const double terms = double(a.width) / 4 + 32;  // of a sum in float32 that is made in four parts at least
    const double wrong = a.transform ? terms * UNIT * a.transform_norm * norm : 0;
    const double norm1 = norm_of(rotated, a.lead), norm2 = norm_of(rotated + a.lead, a.rank - a.lead);
    const double lost1 = to_codes(rotated, a.lead, codes, q.step1, q.sum1) + wrong;
    const double lost2 = to_codes(rotated + a.lead, a.rank - a.lead, codes + a.lead, q.step2, q.sum2) + wrong;
    q.sum1 *= 255;
    q.sum2 *= 15;
    q.norm1 = up(norm1 + wrong);
    q.norm2 = up(norm2 + wrong);
    q.lost1 = up(lost1 + 16 * UNIT * norm1);  // and the rounding of the estimate
    q.lost2 = up(lost2 + 16 * UNIT * norm2);
    q.norm = up(size + 2 * wrong);
    q.offset = float(offset);
    q.slack = up(2 * terms * UNIT * norm * a.largest + 4 * UNIT * std::abs(offset));
    return q;
}

// Rows of [M, width] as they stand in memory, each with zeros behind it that a vector may read.
struct Matrix {
    float* data;
    int64_t stride;

    static int64_t stride_for(int64_t width) { return (width + 15) / 16 * 16 + 16; }
    float* at(int64_t m) const { return data + m * stride; }
};

// y[m][n] = x[m] . w[n] for bfloat16 rows w [N, width]: one of each eighth at a time, for all x (skinny_linear.cpp says
// why).
void product(const uint16_t* w, int64_t rows, int64_t width, const Matrix& x, int64_t count, const Matrix& y,
             int threads) {
    constexpr int COLUMNS = 8;
    const int64_t whole = rows / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i <= whole; i++) {
        for (int64_t m = 0; m < count; m++) {
            if (i < whole) {
                float sums[COLUMNS];
                multiply<OfBFloat16, 1, COLUMNS>(x.at(m), 0, w + i * width, whole * width, 0, width, sums);
                UNROLL(8) for (int c = 0; c < COLUMNS; c++) y.at(m)[i + c * whole] = sums[c];
            }
            for (int64_t n = whole * COLUMNS; i == whole && n < rows; n++) {
                multiply<OfBFloat16, 1, 1>(x.at(m), 0, w + n * width, width, 0, width, y.at(m) + n);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ scan

struct Scan {
    const HeadSearch& a;
    const Query* queries;            // [M]
    const int8_t* codes;             // [M,R]
    float* bounds;                   // [M, blocks * BLOCK]
    float* largest;                  // [M, blocks]

    const Numbers& numbers_of(int64_t block) const {
        const int64_t bytes = a.block_bytes - int64_t(sizeof(Numbers));
        return *reinterpret_cast<const Numbers*>(a.codes + block * a.block_bytes + bytes);
    }
};

INLINE float bias_at(const HeadSearch& a, int64_t row) {
    if (a.type == FLOAT32) return static_cast<const float*>(a.bias)[row];
    const uint16_t half = static_cast<const uint16_t*>(a.bias)[row];
    return a.type == BFLOAT16 ? from_bits(uint32_t(half) << 16) : from_float16(half);
}

// What the sums of a block and a hidden state amount to.
void finish(const Scan& s, int64_t m, int64_t block, const Ints16& sums1, const Ints16& sums2) {
    const Query& q = s.queries[m];
    const Numbers& n = s.numbers_of(block);
    const Floats16 centred1 = __builtin_convertvector(sums1 * 2 - q.sum1, Floats16);
    const Floats16 centred2 = __builtin_convertvector(sums2 * 2 - q.sum2, Floats16);
    Floats16 estimate = numbers(n.scale1) * q.step1 * centred1 + numbers(n.scale2) * q.step2 * centred2 + q.offset;
    Floats16 bound = numbers(n.error1) * q.norm1 + numbers(n.error2) * q.norm2 + numbers(n.norm1) * q.lost1 +
                     numbers(n.norm2) * q.lost2;
    Ints16 row;
    std::memcpy(&row, n.row, sizeof row);
    if (s.a.bias) {
        for (int i = 0; i < BLOCK; i++) estimate[i] += bias_at(s.a, std::max(row[i], 0));
    }
    const Floats16 size = estimate < 0 ? -estimate : estimate;
    bound = estimate + bound * (1 + 0x1p-16f) + size * 0x1p-21f + q.slack;
    bound = row < 0 ? Floats16{} - INF : bound;
    std::memcpy(s.bounds + (m * s.a.blocks + block) * BLOCK, &bound, sizeof bound);
    float top = -INF;
    for (int i = 0; i < BLOCK; i++) top = std::max(top, bound[i]);
    s.largest[m * s.a.blocks + block] = top;
    if (s.a.estimates) {
        for (int i = 0; i < BLOCK; i++) {
            if (row[i] < 0) continue;
            s.a.estimates[m * s.a.vocabulary + row[i]] = estimate[i];
            s.a.bounds[m * s.a.vocabulary + row[i]] = bound[i];
        }
    }
}

// BLOCKS blocks for ROWS hidden states.
template <int ROWS, int BLOCKS>
void scan_blocks(const Scan& s, int64_t m, int64_t block) {
    const uint8_t* codes = s.a.codes + block * s.a.block_bytes;
    const int8_t* h = s.codes + m * s.a.rank;
    Ints16 sums1[ROWS][BLOCKS] = {}, sums2[ROWS][BLOCKS] = {};
    UNROLL(1) for (int64_t g = 0; g < s.a.lead / 4; g++) {
        Ints16 bytes[BLOCKS];
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            bytes[b] = bytes_at(codes + b * s.a.block_bytes + g * 64);
            __builtin_prefetch(codes + (b + BLOCKS) * s.a.block_bytes + g * 64, 0, 2);
        }
        UNROLL(16) for (int r = 0; r < ROWS; r++) {
            const int32_t x = four_at(h + r * s.a.rank + g * 4);
            UNROLL(8) for (int b = 0; b < BLOCKS; b++) sums1[r][b] = add_products(sums1[r][b], bytes[b], x);
        }
    }
    codes += s.a.lead * BLOCK;
    h += s.a.lead;
    UNROLL(1) for (int64_t g = 0; g < (s.a.rank - s.a.lead) / 8; g++) {
        Ints16 low[BLOCKS], high[BLOCKS];
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            const Ints16 bytes = bytes_at(codes + b * s.a.block_bytes + g * 64);
            low[b] = low_halves(bytes), high[b] = high_halves(bytes);
            __builtin_prefetch(codes + (b + BLOCKS) * s.a.block_bytes + g * 64, 0, 2);
        }
        UNROLL(16) for (int r = 0; r < ROWS; r++) {
            const int32_t x = four_at(h + r * s.a.rank + g * 8), y = four_at(h + r * s.a.rank + g * 8 + 4);
            UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
                sums2[r][b] = add_small_products(add_small_products(sums2[r][b], low[b], x), high[b], y);
            }
        }
    }
    Ints16 sums[ROWS][BLOCKS][2];    // in memory, so that the ones above need not be
    UNROLL(8) for (int r = 0; r < ROWS; r++) {
        UNROLL(8) for (int b = 0; b < BLOCKS; b++) {
            std::memcpy(&sums[r][b][0], &sums1[r][b], sizeof(Ints16));
            std::memcpy(&sums[r][b][1], &sums2[r][b], sizeof(Ints16));
        }
    }
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        UNROLL(1) for (int b = 0; b < BLOCKS; b++) finish(s, m + r, block + b, sums[r][b][0], sums[r][b][1]);
    }
}

constexpr int MOST = 8;              // hidden states that are multiplied at once

constexpr int blocks_for(int rows) { return std::clamp((LANES == 16 ? 8 : 4) / rows, 1, 8); }

template <int ROWS>
void scan_range(const Scan& s, int64_t m, int64_t begin, int64_t end) {
    constexpr int BLOCKS = blocks_for(ROWS);
    int64_t block = begin;
    for (; block + BLOCKS <= end; block += BLOCKS) scan_blocks<ROWS, BLOCKS>(s, m, block);
    for (; block < end; block++) scan_blocks<ROWS, 1>(s, m, block);
}

template <int... I>
void scan_rows(std::integer_sequence<int, I...>, int rows, const Scan& s, int64_t m, int64_t begin, int64_t end) {
    ((rows == I + 1 ? scan_range<I + 1>(s, m, begin, end) : void()), ...);
}

// clang-format off
constexpr int64_t STEP = 16;         // blocks that a thread takes at once: they stay in its cache for all hidden states
// clang-format on

void scan_all(const Scan& s, int threads) {
    const int64_t steps = (s.a.blocks + STEP - 1) / STEP, groups = (s.a.rows + MOST - 1) / MOST;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = s.a.rows * g / groups, last = s.a.rows * (g + 1) / groups;
            scan_rows(std::make_integer_sequence<int, MOST>(), int(last - first), s, first, i * STEP,
                      std::min((i + 1) * STEP, s.a.blocks));
        }
    }
}

// ------------------------------------------------------------------------------------------------ clusters

// The bounds of rows in clusters that are not looked at: what their cluster allows.
void bound_cluster(const Scan& s, int64_t m, int64_t cluster, float centre) {
    const Query& q = s.queries[m];
    for (int64_t block = cluster * s.a.cluster_blocks; block < (cluster + 1) * s.a.cluster_blocks; block++) {
        for (const int32_t row : s.numbers_of(block).row) {
            if (row < 0) continue;
            s.a.estimates[m * s.a.vocabulary + row] = -INF;
            const float own = s.a.bias ? bias_at(s.a, row) : 0.0f;
            const float bound = q.offset + centre + q.norm * s.a.radii[cluster] + own;
            s.a.bounds[m * s.a.vocabulary + row] = bound + 0x1p-21f * (std::abs(bound) + std::abs(own)) + q.slack;
        }
    }
}

// The `probes` clusters that come first by h'.m + spread |h'| r, in the order of memory.
void choose_clusters(const Scan& s, int64_t m, const float* centres, int32_t* chosen) {
    const HeadSearch& a = s.a;
    std::vector<std::pair<float, int32_t>> order(a.clusters);
    for (int64_t k = 0; k < a.clusters; k++) {
        order[k] = {-(centres[k] + float(a.spread) * s.queries[m].norm * a.radii[k]), int32_t(k)};
    }
    std::nth_element(order.begin(), order.begin() + (a.probes - 1), order.end());
    for (int64_t p = 0; p < a.probes; p++) chosen[p] = order[p].second;
    std::sort(chosen, chosen + a.probes);
    if (!a.estimates) return;
    for (int64_t p = a.probes; p < a.clusters; p++) bound_cluster(s, m, order[p].second, centres[order[p].second]);
}

void scan_probed(const Scan& s, const Matrix& rotated, const Matrix& centres, int threads) {
    const HeadSearch& a = s.a;
    product(a.centroids, a.clusters, a.rank, rotated, a.rows, centres, threads);
    std::fill(s.largest, s.largest + a.rows * a.blocks, -INF);
    std::vector<int32_t> chosen(a.rows * a.probes, -1);
    for (int64_t m = 0; m < a.rows; m++) {
        if (s.queries[m].finite) choose_clusters(s, m, centres.at(m), &chosen[m * a.probes]);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a.rows * a.probes; i++) {
        const int64_t first = chosen[i] * a.cluster_blocks;
        if (chosen[i] >= 0) scan_range<1>(s, i / a.probes, first, first + a.cluster_blocks);
    }
}

// ------------------------------------------------------------------------------------------------ exact rows

struct Candidate {
    float bound;
    int32_t row;
};

// The least logit that may become equal to `top` when it is rounded, capped and rounded again.
float lowest_tie(const HeadSearch& a, float top) {
    const float unit = a.type == FLOAT32 ? 0x1p-22f : a.type == BFLOAT16 ? 0x1p-6f : 0x1p-9f;
    const float faint = a.type == FLOAT16 ? 0x1p-24f : 0x1p-100f;  // numbers below it may become zero
    const float lowest = top - unit * std::abs(top) - faint;
    if (a.softcap <= 0) return lowest;
    const double capped = std::tanh(top / a.softcap), below = 2 * (unit * std::abs(capped) + faint / a.softcap);
    return std::min<float>(a.softcap * std::atanh(std::max(capped - below, -1.0)), lowest);
}

// The rows of hidden state m whose bounds reach `least`, at most `most` of them; false when there are more.
bool collect(const Scan& s, int64_t m, float least, int64_t most, std::vector<Candidate>& found) {
    found.clear();
    for (int64_t block = 0; block < s.a.blocks; block++) {
        if (!(s.largest[m * s.a.blocks + block] >= least)) continue;
        const float* bounds = s.bounds + (m * s.a.blocks + block) * BLOCK;
        const Numbers& n = s.numbers_of(block);
        for (int i = 0; i < BLOCK; i++) {
            if (bounds[i] >= least && n.row[i] >= 0) found.push_back({bounds[i], n.row[i]});
        }
        if (int64_t(found.size()) > most) return false;
    }
    std::sort(found.begin(), found.end(), [](const Candidate& x, const Candidate& y) { return x.bound > y.bound; });
    return true;
}

template <class T>
struct Exact {
    const HeadSearch& a;
    // clang-format off
    typename T::Input* input;        // [C], padded
    // clang-format on

    Exact(const HeadSearch& arguments, int64_t m, void* memory)
        : a(arguments), input(static_cast<typename T::Input*>(memory)) {
        const int64_t stride = (a.width + T::STEP - 1) / T::STEP * T::STEP;
        const auto* x = static_cast<const typename T::Element*>(a.hidden) + m * a.hidden_row;
        std::fill(input, input + stride, typename T::Input());
        for (int64_t k = 0; k < a.width; k++) input[T::place(k)] = T::prepared(x[k]);
    }

    const typename T::Element* at(int32_t row) const {
        return static_cast<const typename T::Element*>(a.weight) + row * a.weight_row;
    }

    void fetch(int32_t row) const {
        const char* p = reinterpret_cast<const char*>(at(row));
        const int64_t bytes = std::min<int64_t>(a.width * sizeof(typename T::Element), 4096);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
    }

    float logit(int32_t row) const {  // as it is in the type of the weight
        float sum;
        multiply<T, 1, 1>(input, 0, at(row), a.weight_row, 0, a.width, &sum);
        const auto* bias = static_cast<const typename T::Element*>(a.bias);
        return T::number(T::rounded(sum + (bias ? T::number(bias[row]) : 0.0f)));
    }
};

typedef std::pair<float, int32_t> Scored;
bool before(const Scored& x, const Scored& y) { return x.first != y.first ? x.first > y.first : x.second < y.second; }

// Exact logits of `found`, largest bounds first, until no bound reaches the k-th largest logit less the margin.
template <class T>
void score(const HeadSearch& a, const Exact<T>& exact, const std::vector<Candidate>& found,
           std::vector<Scored>& scored) {
    // clang-format off
    std::vector<float> best;         // the k largest logits, a heap with the least on top
    // clang-format on
    const auto larger = [](float x, float y) { return x > y; };
    scored.clear();
    for (size_t i = 0; i < found.size(); i++) {
        if (int64_t(best.size()) == a.keep && !(found[i].bound >= lowest_tie(a, best[0]) - a.margin)) break;
        if (i + 1 < found.size()) exact.fetch(found[i + 1].row);
        const float value = exact.logit(found[i].row);
        scored.push_back({value, found[i].row});
        best.push_back(value);
        std::push_heap(best.begin(), best.end(), larger);
        if (int64_t(best.size()) > a.keep) std::pop_heap(best.begin(), best.end(), larger), best.pop_back();
    }
    std::sort(scored.begin(), scored.end(), before);
}

// The k-th largest of the largest bounds of blocks: at least k rows reach it, unless there are fewer blocks.
float kth_largest(const Scan& s, int64_t m, std::vector<float>& memory) {
    const float* largest = s.largest + m * s.a.blocks;
    if (s.a.keep > s.a.blocks) return -INF;
    if (s.a.keep == 1) return *std::max_element(largest, largest + s.a.blocks);
    memory.assign(largest, largest + s.a.blocks);
    std::nth_element(memory.begin(), memory.begin() + (s.a.keep - 1), memory.end(), std::greater<float>());
    return memory[s.a.keep - 1];
}

template <class T>
int32_t find(const Scan& s, int64_t m, void* memory) {
    const HeadSearch& a = s.a;
    if (!s.queries[m].finite) return -1;
    std::vector<Candidate> found;
    std::vector<Scored> scored;
    std::vector<float> copy;
    const Exact<T> exact(a, m, memory);
    const float start = kth_largest(s, m, copy);
    if (!collect(s, m, start, a.blocks * BLOCK, found) || int64_t(found.size()) < a.keep) return -1;
    found.resize(a.keep);
    score<T>(a, exact, found, scored);
    const float least = lowest_tie(a, scored[a.keep - 1].first) - float(a.margin);
    if (!(least == least) || !collect(s, m, least, a.budget, found)) return -1;
    score<T>(a, exact, found, scored);
    for (size_t i = 0; i < scored.size(); i++) {
        if (!std::isfinite(scored[i].first)) return -1;
        a.ids[m * a.budget + i] = scored[i].second;
        a.values[m * a.budget + i] = scored[i].first;
    }
    if (a.logits) {
        auto* logits = static_cast<typename T::Element*>(a.logits) + m * a.vocabulary;
        std::fill(logits, logits + a.vocabulary, T::rounded(-INF));
        for (const Scored& x : scored) logits[x.second] = T::rounded(x.first);
    }
    return int32_t(scored.size());
}

// ------------------------------------------------------------------------------------------------ all of it

// Memory that a thread keeps from call to call: fresh pages cost more than what is done with them.
struct Memory {
    char* data = nullptr;
    int64_t size = 0;

    char* of(int64_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + bytes / 4 + 63) / 64 * 64;
            data = static_cast<char*>(std::aligned_alloc(64, size));
        }
        return data;
    }

    ~Memory() { std::free(data); }
};

template <class T>
void search_as(const HeadSearch& a) {
    static thread_local Memory kept;
    const bool probing = a.probes > 0 && a.probes < a.clusters;
    const int64_t hidden_stride = Matrix::stride_for(a.width), rotated_stride = Matrix::stride_for(a.rank);
    const int64_t floats[] = {a.rows * a.blocks * BLOCK, (a.rows * a.blocks + 15) / 16 * 16, a.rows * hidden_stride,
                              a.rows * rotated_stride, probing ? a.rows * Matrix::stride_for(a.clusters) : 0};
    float* parts[6] = {reinterpret_cast<float*>(
        kept.of((floats[0] + floats[1] + floats[2] + floats[3] + floats[4]) * 4 + a.rows * a.rank + 64))};
    for (int i = 0; i < 5; i++) parts[i + 1] = parts[i] + floats[i];
    const Matrix hidden{parts[2], hidden_stride}, rotated{parts[3], rotated_stride};
    const Matrix centres{parts[4], Matrix::stride_for(a.clusters)};
    auto* codes = reinterpret_cast<int8_t*>(parts[5]);
    const int threads = int(std::clamp<int64_t>(a.blocks * a.block_bytes / 100000, 1, a.threads));

    std::fill(parts[2], parts[4], 0.0f);
    for (int64_t m = 0; m < a.rows; m++) {
        const auto* from = static_cast<const typename T::Element*>(a.hidden) + m * a.hidden_row;
        for (int64_t i = 0; i < a.width; i++) hidden.at(m)[i] = T::number(from[i]);
        if (!a.transform) std::copy(hidden.at(m), hidden.at(m) + a.width, rotated.at(m));
    }
    if (a.transform) product(a.transform, a.rank, a.width, hidden, a.rows, rotated, threads);
    std::vector<Query> queries(a.rows);
    for (int64_t m = 0; m < a.rows; m++) queries[m] = prepare(a, hidden.at(m), rotated.at(m), codes + m * a.rank);
    const Scan scan{a, queries.data(), codes, parts[0], parts[1]};
    if (probing) scan_probed(scan, rotated, centres, threads);
    else scan_all(scan, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && a.rows > 1)
    for (int64_t m = 0; m < a.rows; m++) a.counts[m] = find<T>(scan, m, hidden.at(m));
}

}  // namespace

extern "C" void search(const HeadSearch* arguments) {
    const HeadSearch& a = *arguments;
    if (a.type == FLOAT32) search_as<OfFloat32>(a);
    else if (a.type == BFLOAT16) search_as<OfBFloat16Pairs>(a);
    else search_as<OfFloat16>(a);
}
