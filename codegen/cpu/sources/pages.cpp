// pages
//
// The weight of each page of a cache by the sketches of its tokens, the pages that weigh most, and attention to them:
//
//     x[t] = constant + scale[t] sum_c w[c] u[c][t]        weight[p] = sum over t in p of exp(x[t])
//
//     weigh_pages     weights [B,J,M,r]   constant [B,J,M]   codes [B,J,T,bytes]   scale [B,J,T]
//                     ->  log weight [B,J,M,P]
//     attend_pages    query [B,H,1,R], the sketches, and a call of the kernel of the latents
//                     ->  output and lse of that call on the pages of each unit that weigh most, the mean of values
//                         in place of the others
//
//     B batch, H = J M query heads, J latent heads, M query rows of a latent head, T tokens, P pages, U units, N pages
//     of a list, r channels of a sketch, R latent width
//
// A lane is a token: words of four bytes of 16 rows, a row each, are cut into codes, each kind four to a lane, and
// multiplied with the query's weights in 8 bits. Weights are kept in base 2, relative to the largest logit of a run of
// pages, so that no logarithm is needed for a choice.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "page_weights.h"

namespace {

// ------------------------------------------------------------------------------------------------ the choice

// Log of the weight that a row expects of pages that are not listed over that of those that are; `listed` is 1 or 0.
float odds_left_out(const Weights& w, int64_t m, const float* listed) {
    const float *tops = &w.tops[m * w.runs], *pages = &w.pages[m * w.count];
    const float top = *std::max_element(tops, tops + w.runs);
    double left = 0, read = 0;
    for (int64_t r = 0; r < w.runs; r++) {
        const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
        float of_list = 0, others = 0;
#pragma omp simd reduction(+ : of_list, others)
        for (int64_t p = from; p < to; p++) {
            of_list += pages[p] * listed[p];
            others += pages[p] * (1 - listed[p]);
        }
        const double factor = tops[r] == -INF ? 0 : std::exp2(double(tops[r]) - top);
        left += factor * others;
        read += factor * of_list;
    }
    return left > 0 && read > 0 ? float(LN2 * std::log2(left / read)) : -INF;
}

// What a unit expects of each page: the mean over its rows of the page's share in all weight, near included.
std::vector<float> expected(const Sketches& a, const Choice& c, const Weights& w, int64_t first, int64_t rows) {
    std::vector<float> share(w.count, 0.0f);
    for (int64_t m = first; m < first + rows; m++) {
        const float *tops = &w.tops[m * w.runs], *pages = &w.pages[m * w.count];
        const double highest = *std::max_element(tops, tops + w.runs);
        if (highest == -INF) continue;
        const double near = c.near ? (double(c.near[m]) - a.constant[m]) / LN2 : -INF;  // in base 2, as tops are
        const double top = std::max(highest, near);
        std::vector<double> factors(w.runs);
        double total = std::exp2(near - top);
        for (int64_t r = 0; r < w.runs; r++) {
            const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
            factors[r] = tops[r] == -INF ? 0 : std::exp2(double(tops[r]) - top);
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = from; p < to; p++) sum += pages[p];
            total += factors[r] * sum;
        }
        for (int64_t r = 0; r < w.runs; r++) {
            const int64_t from = r * w.pages_of_run, to = std::min(from + w.pages_of_run, w.count);
            const float factor = float(factors[r] / total / rows);
#pragma omp simd
            for (int64_t p = from; p < to; p++) share[p] += factor * pages[p];
        }
    }
    return share;
}

// How many of the first `room` pages by weight are needed, so that the others have at most 1 - mass of it.
int64_t needed_for(double mass, std::vector<float> share, int64_t room) {
    const double all = std::accumulate(share.begin(), share.end(), 0.0);
    std::partial_sort(share.begin(), share.begin() + room, share.end(), std::greater<float>());
    double before = 0;
    int64_t needed = 0;
    while (needed < room && all - before > 1 - mass) before += share[needed++];
    return needed;
}

// The nth largest of numbers that are not negative: their first bits sort them into bins.
float nth_largest(const std::vector<float>& x, int64_t nth) {
    constexpr int SHIFT = 20;
    std::array<int32_t, 1 << (32 - SHIFT)> bins{};
    const auto bin = [](float v) {
        uint32_t bits;
        std::memcpy(&bits, &v, sizeof bits);
        return bits >> SHIFT;
    };
    for (const float v : x) bins[bin(v)]++;
    int64_t before = 0;
    uint32_t at = bins.size() - 1;
    while (before + bins[at] < nth) before += bins[at--];
    std::vector<float> some;
    for (const float v : x) {
        if (bin(v) == at) some.push_back(v);
    }
    std::nth_element(some.begin(), some.begin() + (nth - 1 - before), some.end(), std::greater<float>());
    return some[nth - 1 - before];
}

// The pages of one list: those of the largest share, as many as there is room for and as weigh enough.
void choose(const Sketches& a, const Choice& c, const Weights& w, int64_t unit, int32_t* list, float* odds) {
    const int64_t rows = a.heads / c.units * a.rows, first = unit * rows;
    const std::vector<float> share = expected(a, c, w, first, rows);
    int64_t kept = std::min({c.read, c.most, w.count}), found = 0;
    const float enough = c.lift > 0 ? float(c.lift / c.pages) : 0;
    const int64_t weighty = std::count_if(share.begin(), share.end(), [=](float x) { return x >= enough; });
    if (c.lift > 0) kept = std::min(kept, std::max(weighty, c.fewest));
    if (c.mass < 1) kept = needed_for(c.mass, share, kept);
    float least = kept == 0 ? INF : 0;
    if (kept > 0 && kept == weighty) {
        least = enough;
    } else if (kept > 0 && kept < w.count) {
        least = nth_largest(share, kept);
    }
    const int64_t more = std::count_if(share.begin(), share.end(), [=](float x) { return x > least; });
    int64_t ties = kept - more;  // places that are left for pages of the least weight
    std::vector<float> listed(w.count, 0.0f);
    for (int64_t p = 0; p < w.count && found < kept; p++) {
        if (share[p] <= 0 || share[p] < least) continue;
        if (share[p] == least && ties-- <= 0) continue;
        list[found++] = int32_t(p);
        listed[p] = 1;
    }
    std::fill(list + found, list + c.most, -1);
    for (int64_t m = first; odds && m < first + rows; m++) odds[m] = odds_left_out(w, m, listed.data());
}

// ------------------------------------------------------------------------------------------------ the step

// Weights of all pages, in memory that a thread keeps for the next call.
const Weights& weighed(const Sketches& a) {
    static thread_local Weights w;
    w.count = (a.tokens + a.page_tokens - 1) / a.page_tokens;
    w.pages_of_run = RUN / a.page_tokens;
    w.runs = (w.count + w.pages_of_run - 1) / w.pages_of_run;
    const int64_t all = a.batch * a.heads * a.rows;
    w.pages.resize(all * w.count);
    w.tops.resize(all * w.runs);
    weigh(a, w);
    return w;
}

// What channels of a sketch and 1 are multiplied by, for each row of queries.
void factors(const Sketches& a, const PagedCall& s, const Attention& call, float* weights, float* constant) {
    const int64_t heads = a.heads * a.rows, width = s.width;
    for (int64_t i = 0; i < a.batch * heads; i++) {
        const int64_t b = i / heads, h = i % heads, j = h / a.rows;
        const float* query = static_cast<const float*>(call.query.data) + b * call.query.batch + h * call.query.head;
        const float *mean = s.mean + j * width, *deviation = s.deviation + j * width;
        const int64_t* channels = s.channels + j * a.channels;
        for (int64_t c = 0; c < a.channels; c++) {
            weights[i * a.channels + c] = float(s.scale) * (query[channels[c]] * deviation[channels[c]]);
        }
        constant[i] = float(s.scale) * dot(query, mean, width);
    }
}

// The mean of values takes a part of the weight that was left out.
void stand_in(const Sketches& a, const PagedCall& s, const Attention& call, const float* odds) {
    const int64_t heads = a.heads * a.rows;
    for (int64_t i = 0; i < a.batch * heads; i++) {
        const int64_t b = i / heads, h = i % heads;
        const double share = double(odds[i]) + s.fill[h];
        const float part = float(1 / (1 + std::exp(-share)));
        const float* mean = s.values + (b * s.value_heads + h / (heads / s.value_heads)) * s.value_width;
        float* output = static_cast<float*>(call.output) + i * s.value_width;
        for (int64_t c = 0; c < s.value_width; c++) output[c] += part * (mean[c] - output[c]);
        static_cast<float*>(call.lse)[i] += float(share > 30 ? share : std::log1p(std::exp(share)));
    }
}

}  // namespace

extern "C" void weigh_pages(const Sketches* given, float* estimates) {
    const Sketches& a = *given;
    const Weights& w = weighed(a);
    for (int64_t i = 0; i < a.batch * a.heads * a.rows * w.count; i++) {
        const int64_t row = i / w.count, r = i % w.count / w.pages_of_run;
        const float sum = w.tops[row * w.runs + r] + std::log2(w.pages[i]);
        estimates[i] = w.pages[i] > 0 ? a.constant[row] + float(LN2) * sum : -INF;
    }
}

extern "C" void attend_pages(const Sketches* sketches, const Choice* choice, const Attention* given,
                             const PagedCall* step) {
    Sketches a = *sketches;
    Attention call = *given;
    const int64_t all = a.batch * a.heads * a.rows, units = a.batch * choice->units, most = choice->most;
    std::vector<float> weights(all * a.channels), constant(all), odds(all);
    std::vector<int32_t> lists(units * most);
    factors(a, *step, call, weights.data(), constant.data());
    a.weights = weights.data();
    a.constant = constant.data();
    const Weights& w = weighed(a);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
    for (int64_t u = 0; u < units; u++) choose(a, *choice, w, u, &lists[u * most], step->fill ? odds.data() : nullptr);
    call.pages = {lists.data(), choice->units * most, most, 1};
    call.page_heads = choice->units;
    call.page_count = most;
    call.page_tokens = a.page_tokens;
    step->attend(&call);
    if (step->fill) stand_in(a, *step, call, odds.data());
    const int64_t listed = std::count_if(lists.begin(), lists.end(), [](int32_t p) { return p >= 0; });
    const int64_t counts[4] = {units, 0, listed, units * choice->pages};
    std::copy(counts, counts + 4, step->counts);
}
