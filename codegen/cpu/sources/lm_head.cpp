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

#include "head_scan.h"

namespace {

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
