"""C++ ops that graphs compiled for a CPU call instead of the Python ones.

before                                                        after, in an inference graph for CPUs
fhopt.latent_attention(q, k, s_k, v, s_v, mask, tiers...)     fhopt.latent_kernel(NAME, q, k, s_k, v, s_v, mask, ...)
fhopt.pack(z, tiers...)                                       fhopt.pack_kernel(z, tiers...)
fhopt.attend_latents(q, k, v, latents, window, masks...)      fhopt.attend_kernel(NAME, NAME, NAME, q, k, v, ...)
F.linear(x, w, b) of few rows, or many of 16 bits             fhopt.linear_kernel(x, w, b)

The ops on the right are implemented in one C++ library, which is compiled against the stable part of torch's
C++ interface (torch/csrc/stable) and knows kernels by the name of their `KernelSpec`. A call costs 3 to 5 microseconds
versus 20 to 40 for a Python implementation. They do what the ops on the left do, for tensors that a graph has
checked, and know no gradients. `attend_kernel` is a decoder layer's attention on a KV cache as a whole: it absorbs the
queries, runs the kernels of packed latents, residual window and newest tokens, expands and merges, where eight
operations did. `round_rows_into` and `pack_window`, which append to a residual window of 8 bits and pack its oldest
tokens, are called in eager mode only.

Without a compiler graphs keep the ops on the left.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fhopt.codegen.build import build_kernel
from fhopt.codegen.cpu import gguf_blocks, packing, skinny_linear, wide_linear
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.codegen.tiers import UNCODED_DTYPES, is_scaled
from fhopt.ops.cache_operands import OPERANDS, CacheOperands
from fhopt.ops.packing import empty_packed
from fhopt.plan.kernel_spec import KernelSpec

_DTYPES = {getattr(torch, name): name for name in UNCODED_DTYPES}
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "latent_kernel(str kernel, Tensor query, Tensor key, Tensor? key_scale, Tensor value, Tensor? value_scale, "
    "Tensor? mask, Tensor? lengths, Tensor? pages, int page_tokens, float scale, float softcap, int value_width) "
    "-> (Tensor, Tensor)"
)
_LIB.define(f"attend_kernel(str latents, str window, str opened, {OPERANDS}, float scale, float softcap) -> Tensor")
_LIB.define("linear_kernel(Tensor input, Tensor weight, Tensor? bias, Tensor? scale=None, int format=0) -> Tensor")
_LIB.define("round_rows_into(Tensor x, Tensor? mean, Tensor(a!) codes, Tensor(b!) scale, int at) -> ()")
_LIB.define(
    "pack_window(Tensor codes, Tensor scale, Tensor? mean, int type, Tensor basis, Tensor(a!) packed, "
    "Tensor(b!) packed_scale, int at, Tensor? turn_pairs, Tensor? turn_phases, int segment, int[] bits, int[] widths, "
    "float[] steps) -> float"
)
_LIB.define("pack_kernel(Tensor latent, int[] bits, int[] widths, float[] steps) -> (Tensor, Tensor)")


def _latent_kernel_fake(
    kernel: str, query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
    mask: Tensor | None, lengths: Tensor | None, pages: Tensor | None, page_tokens: int, scale: float, softcap: float,
    value_width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = query.shape[:3]
    return query.new_empty((*shape, value_width)), query.new_empty(shape, dtype=torch.float32)


torch.library.register_fake("fhopt::latent_kernel", _latent_kernel_fake, lib=_LIB)


def _attend_kernel_fake(
    latents: str, window: str, opened: str, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


torch.library.register_fake("fhopt::attend_kernel", _attend_kernel_fake, lib=_LIB)
torch.library.register_fake("fhopt::pack_kernel", empty_packed, lib=_LIB)


def _linear_kernel_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, format: int = 0
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


torch.library.register_fake("fhopt::linear_kernel", _linear_kernel_fake, lib=_LIB)


def _unpack_rows(values: Tensor, format: int, width: int, which: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = skinny_linear.BlockedWeight(values, format, width)
    found = gguf_blocks.unpack_rows(blocks, dtype, which=which)
    assert found is not None, "its library is loaded"
    return found


def _unpack_rows_fake(values: Tensor, format: int, width: int, which: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty((which.shape[0], width), dtype=dtype)


_LIB.define("unpack_rows(Tensor values, int format, int width, Tensor which, ScalarType dtype) -> Tensor")
_LIB.impl("unpack_rows", _unpack_rows, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::unpack_rows", _unpack_rows_fake, lib=_LIB)


# --------------------------------------------------------------------------------------------------- graphs


def call_kernels(
    module: fx.GraphModule, products: bool = True, fixed: Collection[fx.Node] = frozenset()
) -> fx.GraphModule:
    """Replace the ops of a graph by C++ ones wherever they serve; the same module where none does.

    For graphs without gradients, whose nodes have `meta["example_value"]`, as Dynamo's have. products: linear
    layers, too. fixed: nodes that stay as they are.
    """
    products = products and not _casts(module.graph)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n not in fixed]
    served = {n.name for n in calls if _native_call(n, products) is not None}
    if not served or LIBRARY.load() is None:
        return module
    changed = fx.GraphModule(module, copy.deepcopy(module.graph))
    changed.meta.update(module.meta)
    for node in changed.graph.nodes:
        call = _native_call(node, products) if node.name in served else None
        if call is not None:
            node.target, node.args, node.kwargs = call
    changed.recompile()
    return changed


def _native_call(node: fx.Node, products: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return (target, args, kwargs) that do in C++ what the node says; None where nothing does."""
    if node.target in _LINEAR:
        return _linear_call(node) if products else None
    name = getattr(node.target, "_qualified_op_name", None) or str(getattr(node.target, "_name", ""))
    if name == "fhopt::latent_attention":
        return _attention_call(node)
    if name == "fhopt::attend_latents":
        return _attend_call(node)
    if name == "fhopt::pack":
        return _pack_call(node)
    return None


_LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


def _casts(graph: fx.Graph) -> bool:
    """Return True under autocast: what a product computes in is then not what its operands say."""
    entered = any("autocast" in str(getattr(n.target, "__name__", "")) for n in graph.nodes)
    return entered or torch.is_autocast_enabled("cpu")


def _linear_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Replace a linear layer whose weight no cache of the CPU holds, if rows are few, or torch multiplies by loops."""
    names = ("input", "weight", "bias")
    operands = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, weight, bias = (_value(operands.get(name)) for name in names)
    if not all(_is_plain(v) for v in (x, weight, bias) if v is not None) or weight.dim() != 2 or x.dim() < 1:
        return None
    if x.dtype not in _DTYPES or any(v.dtype != x.dtype for v in (weight, bias) if v is not None):
        return None
    rows = math.prod(x.shape[:-1])
    if not all(isinstance(n, int) for n in weight.shape) or weight.stride(1) != 1:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    few = isinstance(rows, int) and skinny_linear.takes_rows(rows, weight)
    many = wide_linear.takes_many_rows(_known(rows), x.dtype)
    if not (few or (many and serve_wide())) or not serve_linear():
        return None
    return torch.ops.fhopt.linear_kernel.default, tuple(operands.get(name) for name in names), {}


def _known(rows: int | torch.SymInt) -> int:
    """Return a number of rows; many, where it is not known yet: the op itself looks how many there are."""
    return rows if isinstance(rows, int) else skinny_linear.MAX_ROWS + 1


def _is_plain(x: Any) -> bool:
    """Return True for a dense tensor on the CPU that is no subclass with a meaning of its own."""
    plain = type(x) in (Tensor, torch.nn.Parameter, FakeTensor)
    return plain and x.device.type == "cpu" and x.layout == torch.strided


def _attention_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Replace `fhopt::latent_attention` where a compiled kernel serves."""
    query, key, key_scale, value, value_scale, mask = node.args
    values = {k: _value(x) for k, x in (("query", query), ("key", key), ("value", value))}
    if any(not isinstance(v, Tensor) or v.device.type != "cpu" for v in values.values()):
        return None
    lengths, pages = node.kwargs.get("lengths"), node.kwargs.get("pages")
    page_tokens = node.kwargs.get("page_tokens", 0)
    if not _lists(_value(pages), page_tokens):
        return None
    if values["query"].dtype not in _DTYPES or not _masks(_value(mask)) or not _counts(_value(lengths)):
        return None
    spec = _spec(values, node.kwargs)
    if spec is None or not register_kernel(spec):
        return None
    numbers = (node.kwargs["scale"], node.kwargs.get("softcap", 0.0), spec.value_width)
    operands = (query, key, key_scale, value, value_scale, mask, lengths, pages, page_tokens)
    return torch.ops.fhopt.latent_kernel.default, (spec.name, *operands, *numbers), {}


def _attend_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Replace `fhopt::attend_latents` where compiled kernels serve all its parts."""
    names = _attend_names(CacheOperands(*map(_value, node.args)), node.kwargs)
    if names is None:
        return None
    numbers = node.kwargs["scale"], node.kwargs.get("softcap", 0.0)
    return torch.ops.fhopt.attend_kernel.default, (*names, *node.args, *numbers), {}


def call_attend_latents(operands: CacheOperands, options: dict[str, Any]) -> Tensor | None:
    """Compute `fhopt::attend_latents` of operands and options; None where no kernel serves.

    For calls without gradients.
    """
    names = _attend_names(operands, options)
    if names is None:
        return None
    output: Tensor = torch.ops.fhopt.attend_kernel.default(
        *names, *operands, options["scale"], options.get("softcap", 0.0)
    )
    return output


def cache_kernels(operands: CacheOperands, options: dict[str, Any]) -> tuple[LibraryKernel | None, ...] | None:
    """Return the kernels of latents, of the window (None without one) and of other tokens; None where one is missing.

    operands, options: as of `attend_latents`.
    """
    names = _attend_names(operands, options)
    return None if names is None else tuple(_kernels[name] if name else None for name in names)


Names = tuple[str, str, str]  # of the kernels of latents, of the residual window ("": there is none), of other tokens
_TIERS = tuple(f"{side}_{what}" for side in ("key", "value") for what in ("bits", "widths", "steps"))
_attended: dict[tuple[Any, ...], Names] = {}


def _attend_names(operands: CacheOperands, options: dict[str, Any]) -> Names | None:
    """Return the names of the kernels that serve `fhopt::attend_latents`; None where one does not."""
    x, dtype = operands, operands.query.dtype
    if dtype not in _DTYPES or not all(x.is_cpu for x in operands if isinstance(x, Tensor)):
        return None
    if not dtype == x.key.dtype == x.value.dtype == x.key_decode.dtype == x.value_decode.dtype:
        return None
    if not all(map(_masks, (x.near, x.inside, x.far))) or not _counts(x.lengths):
        return None
    tiers = [tuple(options[name]) for name in _TIERS]
    sizes = x.key_decode.shape[2], x.key.shape[3], x.value.shape[3], x.value_rows.shape[3]
    has_window = x.window_keys is not None
    cap = options.get("softcap", 0.0) != 0.0
    call = (*tiers, *sizes, dtype, x.key_rows.dtype, x.value_rows.dtype, cap, has_window)
    names = _attended.get(call)
    if names is None:
        latent = _spec({"query": x.key_decode, "key": x.key_rows, "value": x.value_rows}, options)
        names = _served_names(latent, sizes[1], sizes[2], _DTYPES[dtype], cap, has_window)
        if names is not None:
            _attended[call] = names
    return names


def _served_names(
    latent: KernelSpec | None, key_width: int, value_width: int, dtype: str, cap: bool, with_window: bool
) -> Names | None:
    """Make the kernels of a KV cache known to the library and return their names; None where one does not serve."""
    opened = KernelSpec((), (), key_width, value_width, dtype, cap)
    rounded = KernelSpec(((8, key_width, 1.0),), ((8, value_width, 1.0),), key_width, value_width, "float32", cap)
    specs = [latent, rounded, opened] if with_window else [latent, opened]
    if any(spec is None or not register_kernel(spec) for spec in specs):
        return None
    assert latent is not None
    return latent.name, rounded.name if with_window else "", opened.name


def _spec(values: dict[str, Any], options: dict[str, Any]) -> KernelSpec | None:
    """Return the spec of the kernel that a call needs; None where it would have to convert keys or values."""
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
    """Replace `fhopt::pack` of latents that the C++ file packs."""
    latent, bits, widths, steps = node.args
    value, tiers = _value(latent), [tuple(x) for x in (bits, widths, steps) if isinstance(x, (list, tuple))]
    table = packing.tier_table(*tiers) if len(tiers) == 3 else None
    if table is None or not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in _DTYPES:
        return None
    return (torch.ops.fhopt.pack_kernel.default, node.args, {}) if value.dim() <= 4 else None


def _value(x: Any) -> Any:
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


def _masks(mask: Any) -> bool:
    """Return True for masks that kernels read as they are, or none."""
    return mask is None or (isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.float32) and mask.dim() <= 4)


def _lists(pages: Any, page_tokens: Any) -> bool:
    """Return True for page lists that kernels read as they are, or none."""
    if pages is None:
        return True
    fits = isinstance(pages, Tensor) and pages.dtype == torch.int32 and pages.dim() == 3
    return fits and isinstance(page_tokens, int) and page_tokens > 0 and page_tokens % PAGE_QUANTUM == 0


def _counts(lengths: Any) -> bool:
    """Return True for lengths that are one number for all sequences, or none."""
    return lengths is None or (isinstance(lengths, Tensor) and lengths.dtype == torch.int64 and lengths.dim() == 0)


# --------------------------------------------------------------------------------------------------- library

_served: dict[str, bool] = {}
_kernels: dict[str, LibraryKernel] = {}  # of those that are served


def register_kernel(spec: KernelSpec) -> bool:
    """Build the kernel of `spec` and make it known to the library; False where that cannot be done."""
    known = _served.get(spec.name)
    if known is None:
        loaded, kernel = LIBRARY.load(), build_kernel(spec)
        known = loaded is not None and isinstance(kernel, LibraryKernel)
        if loaded is not None and isinstance(kernel, LibraryKernel):
            flags = is_scaled(spec.key_tiers) + 2 * is_scaled(spec.value_tiers)
            sizes = spec.key_width, spec.value_width, flags
            loaded.fhopt_serve(spec.name.encode(), kernel.address, kernel.table, *sizes)
            _kernels[spec.name] = kernel
        _served[spec.name] = known
    return known


@functools.cache
def serve_linear() -> bool:
    """Make linear layers known to the library, on few rows at least; False where that cannot be done."""
    loaded, skinny = LIBRARY.load(), skinny_linear.LIBRARY.load()
    if loaded is None or skinny is None:
        return False
    loaded.fhopt_serve_skinny.argtypes = ctypes.c_void_p, ctypes.c_int64
    loaded.fhopt_serve_skinny.restype = None
    loaded.fhopt_serve_skinny(ctypes.cast(skinny.skinny, ctypes.c_void_p), skinny_linear.MAX_ROWS)
    if wide_linear.is_wanted():
        serve_wide()
    return True


@functools.cache
def serve_wide() -> bool:
    """Make linear layers on many rows known to the library; False where that cannot be done."""
    loaded, wide = LIBRARY.load(), wide_linear.LIBRARY.load()
    if loaded is None or wide is None:
        return False
    loaded.fhopt_serve_wide.argtypes, loaded.fhopt_serve_wide.restype = (ctypes.c_void_p,), None
    loaded.fhopt_serve_wide(ctypes.cast(wide.wide, ctypes.c_void_p))
    return True


@functools.cache
def serve_blocks() -> bool:
    """Make linear layers with weights in blocks of GGUF files known to the library; False where that cannot be done."""
    if not serve_linear() or not gguf_blocks.register_blocks():
        return False
    loaded = LIBRARY.load()
    assert loaded is not None
    loaded.fhopt_serve_blocks()
    return True


def compiles_blocks() -> bool:
    """Return whether `serve_blocks` runs a compiler."""
    return compiles_linear() or gguf_blocks.LIBRARY.compiles()


def compiles_linear() -> bool:
    """Return whether `serve_linear` runs a compiler, which takes seconds; once on a machine it does."""
    products = [skinny_linear.LIBRARY, *([wide_linear.LIBRARY] if wide_linear.is_wanted() else [])]
    return any(library.compiles() for library in (*products, LIBRARY, packing.LIBRARY))


def _torch_here() -> tuple[str, ...]:
    """Return the paths of torch, and its version, so that each version has a file."""
    root = Path(torch.__file__).parent
    return f"-I{root / 'include'}", f"-L{root / 'lib'}", f'-DFHOPT_TORCH="{torch.__version__}"'


def _bind(library: ctypes.CDLL) -> ctypes.CDLL | None:
    functions = packing.LIBRARY.load()
    if functions is None:
        return None
    library.fhopt_serve.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3)
    library.fhopt_serve.restype = None
    library.fhopt_serve_pack.argtypes, library.fhopt_serve_pack.restype = (ctypes.c_void_p,), None
    library.fhopt_serve_pack(ctypes.cast(functions[0], ctypes.c_void_p))
    return library


LIBRARY = CppLibrary(
    "ops", "graph_kernels.cpp", _bind, "Kernel calls go through Python, which adds about 30 microseconds each.",
    # The stable part of torch's C++ interface, as of torch 2.11, so that one file serves all later versions.
    ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"), ("-ltorch_cpu",), _torch_here,
)  # fmt: skip
