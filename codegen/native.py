"""Kernels of a compiled graph, called from C++: `fhopt::latent_kernel` and `fhopt::pack_kernel`.

before                                                        after, in an inference graph for CPUs
fhopt.latent_attention(q, k, s_k, v, s_v, mask, tiers...)     fhopt.latent_kernel(NAME, q, k, s_k, v, s_v, mask, ...)
fhopt.pack(z, tiers...)                                       fhopt.pack_kernel(z, tiers...)

The two ops on the right are implemented in one C++ library, which is compiled against the stable part of torch's
C++ interface (torch/csrc/stable) and knows kernels by the name of their `KernelSpec`. A call costs 3 to 5 microseconds
in place of the 30 to 40 of a Python implementation: a step of decoding makes five such calls a layer. They do what the
ops on the left do, for tensors that a graph has checked, and know no gradients.

Without a compiler graphs keep the ops on the left.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.codegen import pack as packing
from fhopt.codegen.build import CompileError, build, load
from fhopt.codegen.call import LibraryKernel
from fhopt.codegen.tiers import UNCODED_DTYPES, is_scaled
from fhopt.spec import KernelSpec

log = logging.getLogger(__name__)
_DTYPES = {getattr(torch, name): name for name in UNCODED_DTYPES}
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "latent_kernel(str kernel, Tensor query, Tensor key, Tensor? key_scale, Tensor value, Tensor? value_scale, "
    "Tensor? mask, Tensor? lengths, float scale, float softcap, int value_width) -> (Tensor, Tensor)"
)
_LIB.define("pack_kernel(Tensor latent, int[] bits, int[] widths, float[] steps) -> (Tensor, Tensor)")


def _latent_kernel_fake(
    kernel: str, query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
    mask: Tensor | None, lengths: Tensor | None, scale: float, softcap: float, value_width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = query.shape[:3]
    return query.new_empty((*shape, value_width)), query.new_empty(shape, dtype=torch.float32)


def _pack_kernel_fake(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    size = sum(b * w for b, w in zip(bits, widths, strict=True)) // 8
    shape = latent.shape[:-1]
    return latent.new_empty((*shape, size), dtype=torch.uint8), latent.new_empty(shape, dtype=torch.float16)


torch.library.register_fake("fhopt::latent_kernel", _latent_kernel_fake, lib=_LIB)
torch.library.register_fake("fhopt::pack_kernel", _pack_kernel_fake, lib=_LIB)


# --------------------------------------------------------------------------------------------------- graphs


def call_kernels(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the ops on the right wherever they serve; the same module where they do not.

    For graphs without gradients, whose nodes have `meta["example_value"]`, as Dynamo's have.
    """
    wanted = [n for n in module.graph.nodes if n.op == "call_function" and _native_call(n) is not None]
    if not wanted or library() is None:
        return module
    changed = fx.GraphModule(module, copy.deepcopy(module.graph))
    changed.meta.update(module.meta)
    for node in changed.graph.nodes:
        found = _native_call(node) if node.op == "call_function" else None
        if found is not None:
            node.target, node.args, node.kwargs = found
    changed.recompile()
    return changed


def _native_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """(target, args, kwargs) that do in C++ what the node says, None where nothing does."""
    name = getattr(node.target, "_qualified_op_name", None) or str(getattr(node.target, "_name", ""))
    if name == "fhopt::latent_attention":
        return _attention_call(node)
    if name == "fhopt::pack":
        return _pack_call(node)
    return None


def _attention_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    query, key, key_scale, value, value_scale, mask = node.args
    values = {k: _value(x) for k, x in (("query", query), ("key", key), ("value", value))}
    if any(not isinstance(v, Tensor) or v.device.type != "cpu" for v in values.values()):
        return None
    lengths = node.kwargs.get("lengths")
    if values["query"].dtype not in _DTYPES or not _masks(_value(mask)) or not _counts(_value(lengths)):
        return None
    spec = _spec(values, node.kwargs)
    if spec is None or not serve(spec):
        return None
    numbers = (node.kwargs["scale"], node.kwargs.get("softcap", 0.0), spec.value_width)
    operands = (query, key, key_scale, value, value_scale, mask, lengths)
    return torch.ops.fhopt.latent_kernel.default, (spec.name, *operands, *numbers), {}


def _spec(values: dict[str, Any], options: dict[str, Any]) -> KernelSpec | None:
    """What the call needs, None where the kernel would have to convert keys or values."""
    tiers = {
        side: tuple(zip(*(options[f"{side}_{what}"] for what in ("bits", "widths", "steps")), strict=True))
        for side in ("key", "value")
    }
    uncoded = {values[side].dtype for side in tiers if not tiers[side]}
    if len(uncoded) > 1 or not uncoded <= _DTYPES.keys():
        return None
    width = sum(w for _, w, _ in tiers["value"]) or values["value"].shape[-1]
    sizes = (values["query"].shape[-1], width)
    if not all(isinstance(n, int) for n in sizes):
        return None
    dtype = _DTYPES[uncoded.pop()] if uncoded else "float32"
    return KernelSpec(tiers["key"], tiers["value"], *sizes, dtype, options.get("softcap", 0.0) != 0.0)


def _pack_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    latent, bits, widths, steps = node.args
    value, tiers = _value(latent), [tuple(x) for x in (bits, widths, steps) if isinstance(x, (list, tuple))]
    table = packing.tier_table(*tiers) if len(tiers) == 3 else None
    if table is None or not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in _DTYPES:
        return None
    return (torch.ops.fhopt.pack_kernel.default, node.args, {}) if value.dim() <= 4 else None


def _value(x: Any) -> Any:
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


def _masks(mask: Any) -> bool:
    """True for masks that kernels read as they are."""
    return mask is None or (isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.float32) and mask.dim() <= 4)


def _counts(lengths: Any) -> bool:
    """True for lengths that are one number for all sequences, or none."""
    return lengths is None or (isinstance(lengths, Tensor) and lengths.dtype == torch.int64 and lengths.dim() == 0)


# --------------------------------------------------------------------------------------------------- library

_served: dict[str, bool] = {}


def serve(spec: KernelSpec) -> bool:
    """Build the kernel of `spec` and make it known to the library; False where that cannot be done."""
    known = _served.get(spec.name)
    if known is None:
        loaded, kernel = library(), build(spec)
        known = loaded is not None and isinstance(kernel, LibraryKernel)
        if loaded is not None and isinstance(kernel, LibraryKernel):
            flags = is_scaled(spec.key_tiers) + 2 * is_scaled(spec.value_tiers)
            loaded.fhopt_serve(spec.name.encode(), kernel.address, spec.key_width, spec.value_width, flags)
        _served[spec.name] = known
    return known


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C++ library, loaded; None where it cannot be built."""
    functions = packing.library()
    if functions is None:
        return None
    root = Path(torch.__file__).parent
    flags = (
        "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-DFHOPT_TORCH=\"{torch.__version__}\"",  # a file for each version of torch
    )  # fmt: skip
    try:
        loaded = load("ops", TEXT, flags, ("-ltorch_cpu",))
    except CompileError as error:
        log.info("%s Calls of kernels go through Python, which costs some 30 microseconds each.", error)
        return None
    loaded.fhopt_serve.argtypes = (ctypes.c_char_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3)
    loaded.fhopt_serve.restype = None
    loaded.fhopt_serve_pack.argtypes, loaded.fhopt_serve_pack.restype = (ctypes.c_void_p,), None
    loaded.fhopt_serve_pack(ctypes.cast(functions[0], ctypes.c_void_p))
    return loaded


TEXT = r"""// ops
//
// What stands between torch's dispatcher and the kernels: `fhopt::latent_kernel` and `fhopt::pack_kernel` take tensors,
// check what machine code trusts, and hand addresses and strides on in one struct.
//
//     query [B,H,S,R_K]   key, value [B,J,T,...]   scales [B,J,T]   mask, broadcast to [B,H,S,T]   lengths []
//     ->  output [B,H,S,R_V] in the type of query, lse [B,H,S]
//
// Kernels compute in float32: queries and outputs of 16 bits are converted here.
//
// Build: c++ -O3 -std=c++20 -shared -fPIC -I TORCH/include -L TORCH/lib -ltorch_cpu

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------------------------------------ structs of kernels

struct Rows {
    const void* data = nullptr;
    int64_t strides[3] = {};
};

struct Attention {
    int64_t batch, heads, queries, tokens, key_heads, value_heads, threads, mask_kind;
    Rows query, key, key_scale, value, value_scale, mask;
    int64_t mask_token;
    void *output, *lse;
    double scale, softcap;
};

struct Tier {
    int64_t bits, width;
    double step;
};

struct Pack {
    int64_t shape[3], threads, type;
    const void* tiers;
    int64_t count, width;
    Rows latent, codes, scale;
};

struct Kernel {
    void (*run)(const Attention*);
    int64_t key_width, value_width, flags;

    bool scaled(int side) const { return flags >> side & 1; }
};

std::unordered_map<std::string, Kernel> kernels;
std::shared_mutex guard;
void (*run_pack)(const Pack*) = nullptr;

// ------------------------------------------------------------------------------------------------ checks

void expect(bool holds, const std::string& name, const char* what) {
    if (!holds) throw std::runtime_error("fhopt: the kernel " + name + " was called with " + what);
}

Kernel find(const std::string& name) {
    std::shared_lock lock(guard);
    const auto found = kernels.find(name);
    expect(found != kernels.end(), name, "a name that nothing was built for; compile the graph again");
    return found->second;
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

Rows rows_of(const Tensor& x) { return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}}; }

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
    a.mask_kind = mask.scalar_type() == ScalarType::Bool ? 1 : 2;
    a.mask = {mask.data_ptr(), {strides[0], strides[1], strides[2]}};
    a.mask_token = strides[3];
}

// ------------------------------------------------------------------------------------------------ 16 bits and 32

template <class T>
std::vector<float> floats_of(const Tensor& x) {  // [B,H,S,R], dense
    const T* data = static_cast<const T*>(x.data_ptr());
    std::vector<float> out(x.numel());
    float* to = out.data();
    for (int64_t b = 0; b < x.size(0); b++) {
        for (int64_t h = 0; h < x.size(1); h++) {
            for (int64_t s = 0; s < x.size(2); s++) {
                const T* row = data + b * x.stride(0) + h * x.stride(1) + s * x.stride(2);
                for (int64_t c = 0; c < x.size(3); c++) *to++ = float(row[c * x.stride(3)]);
            }
        }
    }
    return out;
}

template <class T>
void store_as(const std::vector<float>& from, const Tensor& to) {
    T* out = static_cast<T*>(to.data_ptr());
    for (size_t i = 0; i < from.size(); i++) out[i] = T(from[i]);
}

// ------------------------------------------------------------------------------------------------ ops

std::tuple<Tensor, Tensor> latent_kernel(
    std::string name, Tensor query, Tensor key, std::optional<Tensor> key_scale, Tensor value,
    std::optional<Tensor> value_scale, std::optional<Tensor> mask, std::optional<Tensor> lengths, double scale,
    double softcap, int64_t value_width) {
    const Kernel kernel = find(name);
    expect(query.dim() == 4 && query.size(3) == kernel.key_width, name, "queries of another width");
    expect(value_width == kernel.value_width, name, "another width of values");
    const int64_t b = query.size(0), h = query.size(1), s = query.size(2), tokens = key.size(2);
    Attention a{b, h, s, tokens, key.size(1), value.size(1), int64_t(torch::stable::get_num_threads()), 0};
    a.key = side(name, key, query, tokens);
    a.value = side(name, value, query, tokens);
    a.key_scale = scales(name, key_scale, key, kernel.scaled(0));
    a.value_scale = scales(name, value_scale, value, kernel.scaled(1));
    if (mask) set_mask(name, *mask, {b, h, s, tokens}, a);
    if (lengths) a.tokens = std::clamp<int64_t>(*static_cast<const int64_t*>(lengths->data_ptr()), 0, tokens);
    a.scale = scale;
    a.softcap = softcap;

    const ScalarType type = query.scalar_type();
    const bool is_float = type == ScalarType::Float;
    std::vector<float> queries, sums;
    Tensor output = empty({b, h, s, value_width}, type), lse = empty({b, h, s}, ScalarType::Float);
    if (is_float && query.stride(3) == 1) {
        a.query = rows_of(query);
        a.output = output.data_ptr();
    } else {
        queries = type == ScalarType::BFloat16 ? floats_of<c10::BFloat16>(query)
                  : type == ScalarType::Half   ? floats_of<c10::Half>(query)
                                               : floats_of<float>(query);
        sums.resize(is_float ? 0 : b * h * s * value_width);
        const int64_t width = kernel.key_width;
        a.query = {queries.data(), {h * s * width, s * width, width}};
        a.output = is_float ? output.data_ptr() : sums.data();
    }
    a.lse = lse.data_ptr();
    kernel.run(&a);
    if (type == ScalarType::BFloat16) store_as<c10::BFloat16>(sums, output);
    if (type == ScalarType::Half) store_as<c10::Half>(sums, output);
    return {output, lse};
}

std::tuple<Tensor, Tensor> pack_kernel(
    Tensor latent, std::vector<int64_t> bits, std::vector<int64_t> widths, std::vector<double> steps) {
    const int dims = int(latent.dim()) - 1;
    std::vector<Tier> tiers(bits.size());
    Pack a{{1, 1, 1}, int64_t(torch::stable::get_num_threads())};
    int64_t row_bits = 0;
    for (size_t i = 0; i < bits.size(); i++) {
        tiers[i] = {bits[i], widths[i], steps[i]};
        a.width += widths[i];
        row_bits += bits[i] * widths[i];
    }
    expect(dims >= 0 && dims <= 3 && latent.size(dims) == a.width, "pack", "latents of another width");
    if (latent.stride(dims) != 1) latent = torch::stable::contiguous(latent);
    std::vector<int64_t> sizes(latent.sizes().begin(), latent.sizes().end() - 1);
    Tensor scale = empty(sizes, ScalarType::Half);
    sizes.push_back(row_bits / 8);
    Tensor codes = empty(sizes, ScalarType::Byte);
    const ScalarType type = latent.scalar_type();
    a.type = type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
    a.tiers = tiers.data();
    a.count = int64_t(tiers.size());
    a.latent.data = latent.data_ptr();
    a.codes.data = codes.data_ptr();
    a.scale.data = scale.data_ptr();
    for (int i = 0; i < 3; i++) {
        const int from = i - (3 - dims);
        a.shape[i] = from < 0 ? 1 : latent.size(from);
        a.latent.strides[i] = from < 0 ? 1 : latent.stride(from);
        a.codes.strides[i] = from < 0 ? 1 : codes.stride(from);
        a.scale.strides[i] = from < 0 ? 1 : scale.stride(from);
    }
    run_pack(&a);
    return {codes, scale};
}

}  // namespace

extern "C" void fhopt_serve(
    const char* name, void (*run)(const Attention*), int64_t key_width, int64_t value_width, int64_t flags) {
    std::unique_lock lock(guard);
    kernels[name] = {run, key_width, value_width, flags};
}

extern "C" void fhopt_serve_pack(void (*run)(const Pack*)) { run_pack = run; }

STABLE_TORCH_LIBRARY_IMPL(fhopt, CPU, m) {
    m.impl("latent_kernel", TORCH_BOX(&latent_kernel));
    m.impl("pack_kernel", TORCH_BOX(&pack_kernel));
}
"""
