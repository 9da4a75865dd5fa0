// decode_program
//
// Runs the segments of a decode program: lists of instructions on floats, for a few tokens, between the attentions of a
// model. Norms, rotations, activations and sums are short compared with the matmuls, so that an instruction is one
// operation on one array, and what varies with the model is data.
//
//     arena      floats that belong to one run: every value of the program has its place there
//     externals  addresses of tensors: weights, and what goes in and out; LOAD and STORE convert their types
//
// Sizes have four dimensions, the last one innermost; strides count floats, 0 where a value is repeated.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "exponential.h"
#include "products.h"
#include "typed_numbers.h"
#include "window_rows.h"
#include "cache_attention.h"
#include "program_call.h"

namespace {

// ------------------------------------------------------------------------------------------------ loops

// Calls f(out, a, b, size, strides) for every innermost row.
template <class F>
void rows(const PackedInstruction& i, float* arena, F f) {
    for (int64_t x = 0; x < i.sizes[0]; x++) {
        for (int64_t y = 0; y < i.sizes[1]; y++) {
            for (int64_t z = 0; z < i.sizes[2]; z++) {
                const auto at = [&](const View& v) {
                    return arena + v.offset + x * v.strides[0] + y * v.strides[1] + z * v.strides[2];
                };
                f(at(i.out), at(i.a), at(i.b));
            }
        }
    }
}

template <class F>
void two(const PackedInstruction& i, float* arena, F f) {
    const int64_t n = i.sizes[3], out_step = i.out.strides[3], a_step = i.a.strides[3], b_step = i.b.strides[3];
    rows(i, arena, [&](float* out, const float* a, const float* b) {
        if (out_step == 1 && a_step == 1 && b_step == 1) {
            for (int64_t k = 0; k < n; k++) out[k] = f(a[k], b[k]);
        } else if (out_step == 1 && a_step == 1 && b_step == 0) {
            const float number = *b;
            for (int64_t k = 0; k < n; k++) out[k] = f(a[k], number);
        } else {
            for (int64_t k = 0; k < n; k++) out[k * out_step] = f(a[k * a_step], b[k * b_step]);
        }
    });
}

template <class F>
void one(const PackedInstruction& i, float* arena, F f) {
    two(i, arena, [&](float a, float) { return f(a); });
}

// f of vectors.
template <class F>
void vectors(const PackedInstruction& i, float* arena, F f) {
    const int64_t n = i.sizes[3], out_step = i.out.strides[3], step = i.a.strides[3];
    rows(i, arena, [&](float* out, const float* a, const float*) {
        int64_t k = 0;
        if (out_step == 1 && step == 1) {
            for (; k + LANES <= n; k += LANES) store(out + k, f(load(a + k)));
        }
        while (k < n) {
            float some[LANES] = {};
            const int64_t count = std::min<int64_t>(LANES, n - k);
            for (int64_t c = 0; c < count; c++) some[c] = a[(k + c) * step];
            store(some, f(load(some)));
            for (int64_t c = 0; c < count; c++) out[(k + c) * out_step] = some[c];
            k += count;
        }
    });
}

void sums(const PackedInstruction& i, float* arena, float factor) {
    const int64_t n = i.sizes[3], step = i.a.strides[3];
    rows(i, arena, [&](float* out, const float* a, const float*) {
        Floats total = {};
        float sum = 0;
        int64_t k = 0;
        if (step == 1) {
            for (; k + LANES <= n; k += LANES) total += load(a + k);
        }
        for (; k < n; k++) sum += a[k * step];
        *out = factor * (sum_of(total) + sum);
    });
}

// ------------------------------------------------------------------------------------------------ functions

INLINE Floats exponential_of_less(Floats x) { return exp2(x * float(LOG2E)); }  // for x <= 0

INLINE Floats sigmoid(Floats x) {
    const Floats e = exponential_of_less(x > 0.0f ? -x : x);
    const Floats y = (x > 0.0f ? Floats{} + 1.0f : e) / (e + 1.0f);
    return x == x ? y : x;  // exp2 does not keep NaN on every CPU
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: to 1.5e-7.
INLINE Floats error_function(Floats x) {
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats t = 1.0f / (magnitude * 0.3275911f + 1.0f);
    Floats y = t * 1.061405429f - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    y = 1.0f - y * t * exponential_of_less(-magnitude * magnitude);
    return x < 0.0f ? -y : y;
}

INLINE Floats gelu(Floats x) { return x * (error_function(x * 0.70710678f) + 1.0f) * 0.5f; }

INLINE Floats gelu_tanh(Floats x) { return x * sigmoid((x * x * 0.044715f + 1.0f) * x * 1.5957691216f); }

// ------------------------------------------------------------------------------------------------ tensors

// Calls f(arena, tensor) for every number of a LOAD or a STORE.
template <class T, class F>
void each(const PackedInstruction& i, float* arena, void* tensor, F f) {
    T* numbers = static_cast<T*>(tensor) + i.offset;
    const View& v = i.out;
    for (int64_t x = 0; x < i.sizes[0]; x++) {
        for (int64_t y = 0; y < i.sizes[1]; y++) {
            for (int64_t z = 0; z < i.sizes[2]; z++) {
                float* here = arena + v.offset + x * v.strides[0] + y * v.strides[1] + z * v.strides[2];
                T* there = numbers + x * i.strides[0] + y * i.strides[1] + z * i.strides[2];
                if (v.strides[3] == 1 && i.strides[3] == 1) {
                    for (int64_t k = 0; k < i.sizes[3]; k++) f(here[k], there[k]);
                } else {
                    for (int64_t k = 0; k < i.sizes[3]; k++) f(here[k * v.strides[3]], there[k * i.strides[3]]);
                }
            }
        }
    }
}

template <class T>
void convert(const PackedInstruction& i, float* arena, void* tensor) {
    typedef typename T::Element Element;
    if (i.code == LOAD) each<Element>(i, arena, tensor, [](float& x, Element& y) { x = T::number(y); });
    else each<Element>(i, arena, tensor, [](float& x, Element& y) { y = T::rounded(x); });
}

void transfer(const PackedInstruction& i, float* arena, void* tensor) {
    with_type(Type(i.type), [&](auto type) { convert<decltype(type)>(i, arena, tensor); });
}

void linear(const ProgramRun& run, const PackedInstruction* first, float* arena) {
    Skinny products[16];
    for (int64_t p = 0; p < first->joined; p++) {
        const PackedInstruction& i = first[p];
        const auto external = [&](int64_t index) { return index < 0 ? nullptr : run.externals[index]; };
        products[p] = {i.sizes[1],
                       i.sizes[2],
                       i.sizes[3],
                       run.threads,
                       i.type,
                       arena + i.a.offset,
                       i.a.strides[1],
                       external(i.external),
                       i.weight_row,
                       external(i.bias),
                       arena + i.out.offset,
                       static_cast<const float*>(external(i.scale)),
                       1};
    }
    run.skinny(products, first->joined);
}

void step(const ProgramRun& run, const PackedInstruction& i, float* arena) {
    switch (i.code) {
        case LOAD:
        case STORE: return transfer(i, arena, run.externals[i.external]);
        case COPY: return one(i, arena, [](float x) { return x; });
        case FILL: return one(i, arena, [&](float) { return float(i.number); });
        case ADD: return two(i, arena, [](float x, float y) { return x + y; });
        case SUBTRACT: return two(i, arena, [](float x, float y) { return x - y; });
        case MULTIPLY: return two(i, arena, [](float x, float y) { return x * y; });
        case DIVIDE: return two(i, arena, [](float x, float y) { return x / y; });
        case MAXIMUM: return two(i, arena, [](float x, float y) { return x != x || x > y ? x : y; });
        case MINIMUM: return two(i, arena, [](float x, float y) { return x != x || x < y ? x : y; });
        case NEGATE: return one(i, arena, [](float x) { return -x; });
        case ABSOLUTE: return one(i, arena, [](float x) { return std::abs(x); });
        case SQUARE_ROOT: return one(i, arena, [](float x) { return std::sqrt(x); });
        case INVERSE_ROOT: return one(i, arena, [](float x) { return 1 / std::sqrt(x); });
        case INVERSE: return one(i, arena, [](float x) { return 1 / x; });
        case EXPONENTIAL: return one(i, arena, [](float x) { return std::exp(x); });
        case TANH: return one(i, arena, [](float x) { return std::tanh(x); });
        case SIGMOID: return vectors(i, arena, [](Floats x) { return sigmoid(x); });
        case SILU: return vectors(i, arena, [](Floats x) { return x * sigmoid(x); });
        case GELU: return vectors(i, arena, [](Floats x) { return gelu(x); });
        case GELU_TANH: return vectors(i, arena, [](Floats x) { return gelu_tanh(x); });
        case RELU: return one(i, arena, [](float x) { return x < 0 ? 0.0f : x; });
        case COSINE: return one(i, arena, [](float x) { return std::cos(x); });
        case SINE: return one(i, arena, [](float x) { return std::sin(x); });
        case MEAN: return sums(i, arena, 1.0f / float(i.sizes[3]));
        case SUM: return sums(i, arena, 1.0f);
        case LINEAR: return linear(run, &i, arena);
    }
}

// ------------------------------------------------------------------------------------------------ decode steps

// The new token goes behind the open ones, for attention to read.
void open(const CacheAppend& side, int64_t batch, int64_t size) {
    const int64_t row = side.width * size;
    for (int64_t i = 0; i < batch * side.heads; i++) {
        std::memcpy(static_cast<char*>(side.opened) + (i * side.open_tokens + side.open_tokens - 1) * row,
                    static_cast<const char*>(side.tokens) + i * row, row);
    }
}

// Means: of keys or values, as query heads read them.
void append(CacheAppend& side, CacheMean means, int64_t batch, Type type) {
    const int64_t *codes = side.code_strides, *scales = side.scale_strides;
    means.group = 1;
    round_tokens(type, {side.tokens, side.heads * side.width, side.width, 0}, {batch, side.heads, 1, side.width}, means,
                 {side.codes, codes[0], codes[1], codes[2]}, {side.scale, scales[0], scales[1], scales[2]}, side.at, 1);
    side.at++;
}

// Calls f, and adds what it takes to `seconds`; null: nobody asks.
template <class F>
void timed(double* seconds, F f) {
    if (!seconds) return f();
    const auto start = std::chrono::steady_clock::now();
    f();
    *seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void attend(LayerStep& s) {
    CacheAttention a = s.attention;
    static thread_local Memory memory;
    const int64_t rows = a.batch * a.heads;
    float* query;
    memory.want(query, rows * a.head_size), memory.want(a.output, rows * a.value_size);
    memory.give();
    to_floats(static_cast<const uint8_t*>(s.query), s.type, rows * a.head_size, query);
    a.query = {query, a.heads * a.head_size, a.head_size, a.head_size};
    for (const CacheAppend& side : s.sides) open(side, a.batch, bytes_of(s.type));
    attend_cache(a);
    from_floats(a.output, s.type, rows * a.value_size, static_cast<uint8_t*>(s.attended));
    append(s.sides[0], a.key_mean, a.batch, s.type);
    append(s.sides[1], a.value_mean, a.batch, s.type);
    s.attention.window.call.tokens++;
}

void run_all(const ProgramRun& run, SpentSeconds* spent) {
    thread_local std::vector<float> arena;
    if (int64_t(arena.size()) < run.arena) arena.resize(run.arena);
    for (int64_t i = 0; i < run.count; i += std::max<int64_t>(run.instructions[i].joined, 1)) {
        const PackedInstruction& next = run.instructions[i];
        timed(spent && next.code == LINEAR ? &spent->linear : nullptr, [&] { step(run, next, arena.data()); });
    }
}

// ------------------------------------------------------------------------------------------------ Python's objects

constexpr int64_t AHEAD = 16;  // dictionaries whose heads are fetched before they are looked at

}  // namespace

// Whether dictionaries of Python hold what they held, nothing being as good as None, and others are empty. The caller
// keeps Python's lock, where there is one, and all of the objects; what is found is compared and never followed.
extern "C" int64_t are_held(const Access* access, const HeldEntry* entries, int64_t count, void* const* empty,
                            int64_t empty_count) {
    for (int64_t i = 0; i < empty_count; i++) {
        __builtin_prefetch(empty[std::min(i + AHEAD, empty_count - 1)]);
        if (access->size(empty[i]) != 0) return 0;
    }
    for (int64_t i = 0; i < count; i++) {
        __builtin_prefetch(entries[std::min(i + AHEAD, count - 1)].dictionary);
        void* found = access->item(entries[i].dictionary, entries[i].name);
        if ((found ? found : access->none) != entries[i].value) return 0;
    }
    return 1;
}

extern "C" void run_segment(const ProgramRun* run) { run_all(*run, nullptr); }

// What comes before attention, attention on the cache, what comes after; the new token is in the cache then.
// Of several layers, one after the other. spent: null where nobody asks.
extern "C" void run_decode_steps(LayerStep* const* steps, int64_t count, SpentSeconds* spent) {
    for (int64_t i = 0; i < count; i++) {
        run_all(steps[i]->before, spent);
        timed(spent ? &spent->attention : nullptr, [&] { attend(*steps[i]); });
        run_all(steps[i]->after, spent);
    }
}
