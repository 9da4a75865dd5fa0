// ops
//
// What stands between torch's dispatcher and the kernels: these ops take tensors, check what machine code trusts, and
// hand addresses and strides on in one struct.
//
//     query [B,H,S,R_K]   key, value [B,J,T,...]   scales [B,J,T]   mask, broadcast to [B,H,S,T]   lengths []
//     ->  output [B,H,S,R_V] in the type of query, lse [B,H,S]
//
// `attend_kernel` does so for a cache: latents (queries absorbed by a basis [G,D,R_K], outputs expanded by one
// [G,E,R_V]), a window of codes, open tokens; the parts are merged by log-sum-exp.
//
// `round_rows_into` writes new tokens [B,G,S,D], less a mean, as rows of 8 bits into places of a window; `pack_window`
// reads such rows again, encodes them by a basis [J,R,n*D] and packs them behind the packed latents of a cache.
//
// Kernels compute in float32: queries and outputs of 16 bits are converted here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // what torch 2.11 calls it
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include "attend_operands.h"
#include "cache_attention.h"
#include "gguf_formats.h"
#include "pack_call.h"
#include "served_kernels.h"
#include "skinny_call.h"
#include "typed_numbers.h"
#include "window_packing.h"
#include "window_rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------------------------------------ checks

Type type_of(ScalarType type) {
    return type == ScalarType::Float ? FLOAT32 : type == ScalarType::BFloat16 ? BFLOAT16 : FLOAT16;
}

Tensor empty(std::vector<int64_t> sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (int i = int(sizes.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        int64_t(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Rows side(const std::string& name, const Tensor& x, const Tensor& query, int64_t tokens) {
    const bool fits = x.dim() == 4 && x.size(0) == query.size(0) && query.size(1) % x.size(1) == 0 &&
                      x.size(2) == tokens && (x.stride(3) == 1 || x.size(3) <= 1);
    expect(fits, name, "keys or values that do not fit the queries");
    return rows_of(x);
}

Rows scales(const std::string& name, const std::optional<Tensor>& scale, const Tensor& x, bool wanted) {
    if (!wanted) return {};
    bool fits = scale.has_value() && scale->dim() == 3 && scale->scalar_type() == ScalarType::Half;
    for (int i = 0; fits && i < 3; i++) fits = scale->size(i) == x.size(i);
    expect(fits, name, "scales that do not fit");
    return rows_of(*scale);
}

void set_mask(const std::string& name, const Tensor& mask, const int64_t (&sizes)[4], Attention& a) {
    int64_t strides[4] = {};
    const int missing = 4 - int(mask.dim());
    for (int i = missing; i < 4; i++) {
        const int64_t size = mask.size(i - missing);
        expect(size == sizes[i] || size == 1, name, "a mask that does not fit");
        strides[i] = size == 1 ? 0 : mask.stride(i - missing);
    }
    a.mask_kind = mask.scalar_type() == ScalarType::Bool ? BOOL_MASK : ADDITIVE_MASK;
    a.mask = {mask.data_ptr(), strides[0], strides[1], strides[2]};
    a.mask_token = strides[3];
}

void set_pages(const std::string& name, const Tensor& pages, int64_t page_tokens, Attention& a) {
    const bool fits = pages.dim() == 3 && pages.scalar_type() == ScalarType::Int && pages.size(0) == a.batch &&
                      pages.size(1) > 0 && std::gcd(a.key_heads, a.value_heads) % pages.size(1) == 0 &&
                      (pages.stride(2) == 1 || pages.size(2) <= 1) && page_tokens > 0 &&
                      page_tokens % PAGE_QUANTUM == 0;
    expect(fits, name, "lists of pages that do not fit");
    static const int32_t end = -1;
    const bool empty = pages.size(2) == 0;  // has no address, and none means all pages
    a.pages = empty ? Rows{&end} : rows_of(pages);
    a.page_heads = pages.size(1);
    a.page_count = empty ? 1 : pages.size(2);
    a.page_tokens = page_tokens;
}

// ------------------------------------------------------------------------------------------------ 16 bits and 32

// Queries of 32 bits, dense in the last dimension: those of the tensor, or converted.
struct Queries {
    Tensor tensor;
    std::vector<float> memory;
    Rows rows;

    Queries(const Tensor& x) : tensor(x.stride(3) == 1 ? x : torch::stable::contiguous(x)), rows(rows_of(tensor)) {
        const int64_t h = x.size(1), s = x.size(2), width = x.size(3);
        const Type type = type_of(x.scalar_type());
        if (type == FLOAT32) return;
        memory.resize(x.numel());
        for (int64_t i = 0; i < x.size(0) * h * s; i++) {
            to_floats(typed_row_at(rows, type, i / (h * s), i / s % h, i % s), type, width, &memory[i * width]);
        }
        rows = {memory.data(), h * s * width, s * width, width};
    }
};

void store(const std::vector<float>& from, const Tensor& to) {
    from_floats(from.data(), type_of(to.scalar_type()), int64_t(from.size()), static_cast<uint8_t*>(to.data_ptr()));
}

// What a kernel is called with, but for the queries and the output.
struct Call {
    std::string name;
    const Tensor &key, &value;
    const std::optional<Tensor>&key_scale, &value_scale, &mask, &lengths;
    double scale, softcap;
    const std::optional<Tensor>& pages;
    int64_t page_tokens = 0;
};

// The kernel of `c`, for queries [B,H,S,R_K].
CachePart part(const ServedKernel& kernel, const Call& c, const Tensor& query) {
    const int64_t b = query.size(0), h = query.size(1), s = query.size(2), tokens = c.key.size(2);
    Attention a{b, h, s, tokens, c.key.size(1), c.value.size(1), int64_t(torch::stable::get_num_threads()), NO_MASK};
    a.key = side(c.name, c.key, query, tokens);
    a.value = side(c.name, c.value, query, tokens);
    a.key_scale = scales(c.name, c.key_scale, c.key, kernel.scaled(0));
    a.value_scale = scales(c.name, c.value_scale, c.value, kernel.scaled(1));
    if (c.mask) set_mask(c.name, *c.mask, {b, h, s, tokens}, a);
    if (c.pages) set_pages(c.name, *c.pages, c.page_tokens, a);
    if (c.lengths) a.tokens = std::clamp<int64_t>(*static_cast<const int64_t*>(c.lengths->data_ptr()), 0, tokens);
    a.scale = c.scale;
    a.softcap = c.softcap;
    a.kernel = kernel.table;
    a.digits = query.scalar_type() == ScalarType::Float ? 3 : 2;
    return {kernel.run, a};
}

// ------------------------------------------------------------------------------------------------ ops

// clang-format off
std::tuple<Tensor, Tensor> latent_kernel(
    std::string name, Tensor query, Tensor key, std::optional<Tensor> key_scale, Tensor value,
    std::optional<Tensor> value_scale, std::optional<Tensor> mask, std::optional<Tensor> lengths,
    std::optional<Tensor> pages, int64_t page_tokens, double scale, double softcap, int64_t value_width) {
    // clang-format on
    const ServedKernel kernel = find(name);
    expect(query.dim() == 4 && query.size(3) == kernel.key_width, name, "queries of another width");
    expect(value_width == kernel.value_width, name, "another width of values");
    const int64_t b = query.size(0), h = query.size(1), s = query.size(2);
    const bool is_float = query.scalar_type() == ScalarType::Float;
    const Queries queries(query);
    Tensor output = empty({b, h, s, value_width}, query.scalar_type()), lse = empty({b, h, s}, ScalarType::Float);
    std::vector<float> sums(is_float ? 0 : b * h * s * value_width);
    float* to = is_float ? static_cast<float*>(output.data_ptr()) : sums.data();
    const Call call{name, key, value, key_scale, value_scale, mask, lengths, scale, softcap, pages, page_tokens};
    run_part(part(kernel, call, query), queries.rows, to, static_cast<float*>(lse.data_ptr()));
    if (!is_float) store(sums, output);
    return {output, lse};
}

// Of a basis [G,n,m] for so many query heads. x: made dense.
CacheBasis basis_of(const std::string& name, Tensor& x, int64_t heads, int64_t n, int64_t m) {
    const bool fits = x.dim() == 3 && heads % x.size(0) == 0 && x.size(1) == n && x.size(2) == m;
    expect(fits, name, "bases that do not fit");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    return {x.data_ptr(), type_of(x.scalar_type()), x.size(0), n, m};
}

// Means of keys or values of each sequence, float [B,G,1,D].
CacheMean means(const std::string& name, const std::optional<Tensor>& mean, int64_t b, int64_t h, int64_t d) {
    if (!mean) return {};
    const bool fits = mean->dim() == 4 && mean->scalar_type() == ScalarType::Float && mean->size(0) == b &&
                      h % mean->size(1) == 0 && mean->size(3) == d && mean->stride(3) == 1;
    expect(fits, name, "means that do not fit");
    return {static_cast<const float*>(mean->data_ptr()), mean->stride(0), mean->stride(1), h / mean->size(1), d};
}

// How queries of b sequences turn for segments of keys: channels int64 [2,F], cosines and sines float [N,2,F], or of
// each sequence [B,N,2,F].
Turning turning_of(const std::string& name, const std::optional<Tensor>& pairs, const std::optional<Tensor>& phases,
                   int64_t segment, int64_t tokens, int64_t b, int64_t size) {
    if (!segment || !pairs || !phases) return {};
    const int64_t count = pairs->size(1), of_each = phases->dim() == 4;
    const bool fits = segment > 0 && pairs->dim() == 2 && pairs->scalar_type() == ScalarType::Long &&
                      pairs->is_contiguous() && phases->dim() == 3 + of_each && (!of_each || phases->size(0) == b) &&
                      phases->scalar_type() == ScalarType::Float && phases->is_contiguous() &&
                      phases->size(2 + of_each) == count && 2 * count <= size &&
                      phases->size(of_each) * segment >= tokens;
    expect(fits, name, "a rotation that does not fit");
    return {static_cast<const int64_t*>(pairs->data_ptr()), static_cast<const float*>(phases->data_ptr()), count,
            segment, of_each ? phases->stride(0) : 0};
}

// Its operands are named in fhopt/ops/cache_operands.py.
Tensor attend_kernel(std::string latents, std::string window, std::string opened, ATTEND_OPERANDS, double scale,
                     double softcap) {
    const ServedKernel of_latents = find(latents), of_opened = find(opened);
    const int64_t b = query.size(0), h = query.size(1), s = query.size(2), d = query.size(3), e = value.size(3);
    const int64_t width = of_latents.key_width, value_width = of_latents.value_width;
    expect(query.dim() == 4 && d == of_opened.key_width && e == of_opened.value_width, opened, "other widths");
    const Queries queries(query);
    const bool is_float = query.scalar_type() == ScalarType::Float;
    Tensor output = empty({b, h, s, e}, query.scalar_type());
    std::vector<float> memory(is_float ? 0 : b * h * s * e);
    const std::optional<Tensor> none;
    CacheAttention a{b, h, s, d, e, scale, queries.rows};
    if (key_rows.size(2) > 0) {  // none while all tokens are in sinks and window
        a.latents = part(of_latents,
                         {latents, key_rows, value_rows, key_scale, value_scale, far, lengths, scale, softcap, none},
                         query);
    }
    if (window_keys && window_values) {
        // clang-format off
        const Call call{window,             *window_keys, *window_values, window_key_scale,
                        window_value_scale, inside,       none,           scale,
                        softcap,            none};
        // clang-format on
        a.window = part(find(window), call, query);
    }
    a.opened = part(of_opened, {opened, key, value, none, none, near, none, scale, softcap, none}, query);
    a.encode = basis_of(latents, key_decode, h, d, width),
    a.decode = basis_of(latents, value_decode, h, e, value_width);
    a.turn = turning_of(latents, turn_pairs, turn_phases, segment, a.latents.call.tokens, b, d);
    a.key_mean = means(latents, key_mean, b, h, d), a.value_mean = means(latents, value_mean, b, h, e);
    a.output = is_float ? static_cast<float*>(output.data_ptr()) : memory.data();
    attend_cache(a);
    if (!is_float) store(memory, output);
    return output;
}

struct Tiers {
    std::vector<Tier> all;
    int64_t width = 0, row_bits = 0;

    Tiers(const std::vector<int64_t>& bits, const std::vector<int64_t>& widths, const std::vector<double>& steps)
        : all(bits.size()) {
        for (size_t i = 0; i < bits.size(); i++) {
            all[i] = {bits[i], widths[i], steps[i]};
            width += widths[i];
            row_bits += bits[i] * widths[i];
        }
    }
};

// clang-format off
std::tuple<Tensor, Tensor> pack_kernel(
    Tensor latent, std::vector<int64_t> bits, std::vector<int64_t> widths, std::vector<double> steps) {
    // clang-format on
    const int dims = int(latent.dim()) - 1;
    const Tiers tiers(bits, widths, steps);
    Pack a{1, 1, 1, int64_t(torch::stable::get_num_threads())};
    a.width = tiers.width;
    expect(dims >= 0 && dims <= 3 && latent.size(dims) == a.width, "pack", "latents of another width");
    if (latent.stride(dims) != 1) latent = torch::stable::contiguous(latent);
    std::vector<int64_t> sizes(latent.sizes().begin(), latent.sizes().end() - 1);
    Tensor scale = empty(sizes, ScalarType::Half);
    sizes.push_back(tiers.row_bits / 8);
    Tensor codes = empty(sizes, ScalarType::Byte);
    const ScalarType type = latent.scalar_type();
    a.type = type_of(type);
    a.tiers = tiers.all.data();
    a.tier_count = int64_t(tiers.all.size());
    // Of up to three leading dimensions, the last ones: those that are missing have one row.
    const auto rows = [&](const Tensor& x) {
        const auto stride = [&](int i) { return i < 3 - dims ? 1 : x.stride(i - 3 + dims); };
        return Rows{x.data_ptr(), stride(0), stride(1), stride(2)};
    };
    a.batch = dims > 2 ? latent.size(dims - 3) : 1;
    a.heads = dims > 1 ? latent.size(dims - 2) : 1;
    a.tokens = dims > 0 ? latent.size(dims - 1) : 1;
    a.latent = rows(latent), a.codes = rows(codes), a.scale = rows(scale);
    run_pack(&a);
    return {codes, scale};
}

void round_rows_into(Tensor x, std::optional<Tensor> mean, Tensor codes, Tensor scale, int64_t at) {
    const std::string name = "round_rows";
    expect(x.dim() == 4 && codes.dim() == 4 && scale.dim() == 3, name, "tensors of other dimensions");
    const int64_t tokens = x.size(2), width = x.size(3);
    bool fits = codes.scalar_type() == ScalarType::Byte && scale.scalar_type() == ScalarType::Half && at >= 0 &&
                codes.size(3) == width && (codes.stride(3) == 1 || width <= 1);
    for (int i = 0; i < 3; i++) {
        const int64_t needed = i == 2 ? at + tokens : x.size(i);
        fits = fits && (i == 2 ? codes.size(i) >= needed : codes.size(i) == needed) && scale.size(i) == codes.size(i);
    }
    expect(fits, name, "a window that does not fit");
    if (width > 1 && x.stride(3) != 1) x = torch::stable::contiguous(x);
    const CacheMean its = means(name, mean, x.size(0), x.size(1), width);
    const ScalarType type = x.scalar_type();
    expect(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
           "other numbers");
    round_tokens(type_of(type), rows_of(x), {x.size(0), x.size(1), tokens, width}, its, rows_of(codes), rows_of(scale),
                 at, 1);
}

// The mean square of all latents is returned. type: of the tokens that were rounded, a Type.
double pack_window(Tensor codes, Tensor scale, std::optional<Tensor> mean, int64_t type, Tensor basis, Tensor packed,
                   Tensor packed_scale, int64_t at, std::optional<Tensor> turn_pairs, std::optional<Tensor> turn_phases,
                   int64_t segment, std::vector<int64_t> bits, std::vector<int64_t> widths, std::vector<double> steps) {
    const std::string name = "pack_window";
    const Tiers tiers(bits, widths, steps);
    expect(codes.dim() == 4 && scale.dim() == 3 && basis.dim() == 3 && packed.dim() == 4 && packed_scale.dim() == 3,
           name, "tensors of other dimensions");
    const int64_t batch = codes.size(0), groups = codes.size(1), tokens = codes.size(2), width = codes.size(3);
    const int64_t heads = basis.size(0), rank = basis.size(1), wide = basis.size(2);
    bool fits = codes.scalar_type() == ScalarType::Byte && scale.scalar_type() == ScalarType::Half &&
                (codes.stride(3) == 1 || width <= 1) && type >= 0 && type <= 2;
    for (int i = 0; i < 3; i++) fits = fits && scale.size(i) == codes.size(i);
    expect(fits, name, "a window that does not fit");
    expect(basis.scalar_type() == ScalarType::Float && basis.is_contiguous() && heads > 0 && groups % heads == 0 &&
               wide == groups / heads * width && rank == tiers.width,
           name, "a basis that does not fit");
    fits = packed.scalar_type() == ScalarType::Byte && packed_scale.scalar_type() == ScalarType::Half && at >= 0 &&
           packed.size(0) == batch && packed.size(1) == heads && packed.size(2) >= at + tokens &&
           packed.size(3) == tiers.row_bits / 8 && packed.stride(3) == 1;
    for (int i = 0; i < 3; i++) fits = fits && packed_scale.size(i) == packed.size(i);
    expect(fits, name, "places that do not fit");
    const Turning turn = turning_of(name, turn_pairs, turn_phases, segment, at + tokens, batch, width);
    const WindowTokens window{
        rows_of(codes), rows_of(scale), tokens, width, at, Type(type), means(name, mean, batch, groups, width), turn};
    const int64_t threads = torch::stable::get_num_threads();
    static thread_local Memory memory;
    float* latents;
    memory.want(latents, batch * heads * tokens * rank);
    memory.give();
    encode_window(window, static_cast<const float*>(basis.data_ptr()), batch, heads, rank, groups / heads, threads,
                  latents);
    Pack a{batch, heads, tokens, threads, FLOAT32, tiers.all.data(), int64_t(tiers.all.size()), tiers.width};
    a.latent = {latents, heads * tokens * rank, tokens * rank, rank};
    a.codes = {static_cast<uint8_t*>(packed.data_ptr()) + at * packed.stride(2), packed.stride(0), packed.stride(1),
               packed.stride(2)};
    a.scale = {static_cast<c10::Half*>(packed_scale.data_ptr()) + at * packed_scale.stride(2), packed_scale.stride(0),
               packed_scale.stride(1), packed_scale.stride(2)};
    run_pack(&a);
    return mean_square(latents, batch * heads * tokens, rank);
}

// format: of the blocks that the weight stands in, 0: it is no such weight.
Tensor linear_kernel(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
                     int64_t format) {
    const std::string name = "linear";
    expect(run_skinny != nullptr, name, "no code to run; compile the graph again");
    const int dims = int(input.dim());
    const ScalarType type = input.scalar_type();
    expect(dims >= 1 && weight.dim() == 2, name, "a weight of other dimensions");
    const int64_t width = input.size(dims - 1);
    const FormatSize size = size_of(format);
    expect(!format || has_blocks, name, "no code to run on the blocks of a weight");
    const bool is_wide = format ? size.numbers && width % size.numbers == 0 &&
                                      weight.size(1) == width / size.numbers * size.bytes
                                : weight.size(1) == width;
    expect(is_wide, name, "a weight of another width");
    const ScalarType held = format ? ScalarType::Byte : scale ? ScalarType::Char : type;
    const bool fits = weight.scalar_type() == held;
    const bool has_rows = weight.stride(1) == 1 || weight.size(1) <= 1;
    expect(fits && has_rows && (!format || weight.is_contiguous()), name, "another weight");
    if (scale) {
        const bool is_row = scale->numel() == weight.size(0) && scale->scalar_type() == ScalarType::Float;
        expect(is_row && scale->is_contiguous(), name, "other scales");
    }
    if (bias) {
        expect(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type, name,
               "another bias");
        if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    }
    if (!input.is_contiguous()) input = torch::stable::contiguous(input);
    std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
    sizes.back() = weight.size(0);
    Tensor output = empty(sizes, type);
    int64_t rows = 1;
    for (int i = 0; i < dims - 1; i++) rows *= input.size(i);
    // clang-format off
    const Skinny a{rows, width, weight.size(0), int64_t(torch::stable::get_num_threads()),
                   type_of(type) +
                       (format ? FORMATS * format : scale ? SIGNED_BYTES : 0),
                   input.data_ptr(), width, weight.data_ptr(), weight.stride(0),
                   bias ? bias->data_ptr() : nullptr, output.data_ptr(),
                   scale ? static_cast<const float*>(scale->data_ptr()) : nullptr, 0};
    // clang-format on
    const auto wide = run_wide.load();
    (wide && !format && rows > most_skinny ? wide : run_skinny)(&a);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fhopt, CPU, m) {
    m.impl("latent_kernel", TORCH_BOX(&latent_kernel));
    m.impl("pack_kernel", TORCH_BOX(&pack_kernel));
    m.impl("attend_kernel", TORCH_BOX(&attend_kernel));
    m.impl("round_rows_into", TORCH_BOX(&round_rows_into));
    m.impl("pack_window", TORCH_BOX(&pack_window));
    m.impl("linear_kernel", TORCH_BOX(&linear_kernel));
}
