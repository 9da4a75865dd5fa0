"""Matmuls on CPUs for which torch has a several times faster implementation than its default.

    dtype       CPUs                              torch's default                        here
    float32     AMD with AVX-512                  MKL, which uses half the vectors       oneDNN
    bfloat16    no instructions for it (AVX2)     loops: 11 to 16 GFLOP/s                a kernel: 140 to 170
    float16     no instructions for it (most)     loops                                  a kernel; AVX-512: float32

(2 threads, torch 2.15: float32 on Zen 5, 218 GFLOP/s with MKL, 487 with oneDNN; bfloat16 on Zen 3, 1,024 rows.)
Products of 16-bit elements are exact in float32, and sums are in float32 either way, so only the result is rounded.
fhopt/codegen/cpu/wide_linear.py computes them. If that is not built, and for gradients, the weight is converted some
rows at a time, so that the converted part stays in the CPU caches.

    linear             a linear layer without gradients: thread-safe
    by_parts           the same for a 16-bit weight and float32 inputs
    fast_products      redirects matmuls in the context: float32 in the whole process, 16-bit in linear layers

For float32 matmuls torch has a switch that allows rounding operands to bfloat16 (`torch.backends.mkldnn.matmul`), but
oneDNN does so only with AMX, which these CPUs lack. A test matmul, once per process, checks that no operand is rounded.

Dimensions: M rows, K width of the input, N width of the output.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fhopt import codegen
from fhopt.system import multiplies_by_loops, reported

_P = ParamSpec("_P")
_R = TypeVar("_R")
HALVES = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)  # dense tensor types without special semantics
ROWS = 256  # rows are padded to a multiple: oneDNN caches 100 KB of native code per row count
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a matmul with SIDE terms, relative to its norm
SIDE = 128
MAX_FEW_ROWS = 16  # up to this many rows, converting the weight does not pay
CONVERTED = 1 << 20  # elements of a weight that are in float32 at once


def fastest_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x [..., K] w^T [K, N] + bias [N] -> [..., N], without gradients, by the fastest method on this CPU."""
    return _way(x, weight, bias)(x, weight, bias)


def _way(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the fastest implementation of a linear layer."""
    plain = type(x) is Tensor and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    if plain and _takes(x, weight, bias, torch.float32, ROWS) and is_onednn_faster():
        return _by_onednn
    sixteen_bits = plain and x.dtype in HALVES and _takes(x, weight, bias, x.dtype, MAX_FEW_ROWS + 1)
    return _in_float32 if sixteen_bits and multiplies_by_loops(x.dtype) else torch.nn.functional.linear


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (columns, width) = x.numel() // x.shape[-1], weight.shape
    missing = -rows % ROWS
    whole = torch.nn.functional.pad(x.reshape(rows, width), (0, 0, 0, missing)) if missing else x.reshape(rows, width)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(whole, weight, bias, "none", [], "")
    return product[:rows].view(*x.shape[:-1], columns)


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 16-bit linear layer by float32 matmuls."""
    found = codegen.dispatch_linear(x, weight, bias)
    if found is not None:
        return found
    return by_parts(x, weight, bias)


def by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: int | None = None) -> Tensor:
    """Compute a linear layer of x [..., K] and w [N, K] in float32, some rows of the weight at a time.

    The result has the dtype of x. At most `numbers` elements of the weight, which may be 16-bit, are in float32 at once
    (default: CONVERTED).
    """
    rows, (columns, width) = x.numel() // x.shape[-1], weight.shape
    given, output = x.reshape(rows, width).float(), x.new_empty(*x.shape[:-1], columns)
    flat = output.view(rows, columns)
    for part in _parts(columns, width, numbers):
        added = None if bias is None else bias[part].float()
        flat[:, part] = fastest_linear(given, weight[part].float(), added)
    return output  # not a view: a view returned by an autograd function may not be written to


def _parts(columns: int, width: int, numbers: int | None = None) -> list[slice]:
    """Divide the rows of a weight [N,K] into parts of `numbers` elements; None: CONVERTED."""
    step = max(1, (numbers or CONVERTED) // width)
    return [slice(first, first + step) for first in range(0, columns, step)]


class _InFloat32(torch.autograd.Function):
    """`_in_float32` with the gradient of its input, for weights without gradients; saves only the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _in_float32(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), grad = ctx.saved_tensors, gradients[0]
        columns, width = weight.shape
        rows = grad.reshape(-1, columns)
        total = torch.zeros(len(rows), width, dtype=torch.float32)
        for part in _parts(columns, width):
            total.addmm_(rows[:, part].float(), weight[part].float())
        return total.to(grad.dtype).view(*grad.shape[:-1], width), None, None


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> bool:
    """Return whether the operands of a linear layer are dense, of one dtype, on the CPU, and have enough rows."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(t.dtype == dtype and t.is_cpu and t.layout is torch.strided for t in operands):
        return False
    if weight.dim() != 2 or not x.dim() or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    enough = weight.numel() > 0 and x.numel() >= rows * x.shape[-1] and x.shape[-1] == weight.shape[1]
    return enough and not torch.is_autocast_enabled("cpu")


class _Linears(TorchFunctionMode):
    """Torch function mode that computes 16-bit linear layers in float32, with gradients of inputs.

    Inactive inside a backward pass, in which torch disables all modes: recomputation there must enter it again.
    Compiled or traced graphs, and functions under torch.func, use torch's matmuls.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in LINEAR or torch.compiler.is_compiling() or _is_transformed():
            return func(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _way(input, weight, bias) is not _in_float32:
            return torch.nn.functional.linear(input, weight, bias)
        codegen.prepare_linear()  # build first, so that all matmuls use one implementation
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (input, weight, bias) if t is not None):
            return _in_float32(input, weight, bias)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return torch.nn.functional.linear(input, weight, bias)
        output: Tensor = _InFloat32.apply(input, weight, bias)
        return output


LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


def _is_transformed() -> bool:
    """Return whether tensors are wrapped: under torch.func, or if a dispatch mode is active."""
    functorch: Any = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None


@contextmanager
def fast_products(weights: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Run matmuls by the fastest equally exact method on this CPU inside the context; no effect on other CPUs.

    Affects float32 matmuls of the whole process until the last thread leaves, and 16-bit linear layers of this thread.
    weights: of the layers inside, if known. Without a 16-bit weight that needs it, the mode is not entered; it adds
    some microseconds to every torch operation.
    """
    with ExitStack() as entered:
        if is_onednn_faster():
            entered.enter_context(_allowed)
        if _has_loops(weights) and not any(type(mode) is _Linears for mode in _get_current_function_mode_stack()):
            entered.enter_context(_Linears())
        yield


def _has_loops(weights: Iterable[Tensor] | None) -> bool:
    """Return whether torch has only loops for some weights on the CPU or on meta; None: for any 16-bit dtype."""
    if weights is None:
        return any(map(multiplies_by_loops, HALVES))
    there = {weight.dtype for weight in weights if weight.device.type in ("cpu", "meta")}
    return any(dtype in there and multiplies_by_loops(dtype) for dtype in HALVES)


def with_fast_products(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function whose first argument is a model: it runs inside `fast_products`."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        model: Any = args[0]
        with fast_products(model.parameters()):
            return function(*args, **kwargs)

    return run


@functools.cache
def is_onednn_faster() -> bool:
    """Return whether oneDNN is faster for float32 on this CPU, and a test matmul has float32 accuracy."""
    flags = reported("flags").split()
    if reported("vendor_id") != "AuthenticAMD" or "avx512_bf16" not in flags or "amx_bf16" in flags:
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return _error() < ROUNDING


def _error() -> float:
    """Return the relative error of a oneDNN matmul."""
    x, y = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with _allowed, torch.no_grad():
        product = x @ y
    exact = x.double() @ y.double()
    return float((product - exact).norm() / exact.norm())


class _Switch:
    """Context in which torch uses oneDNN for float32, until the last thread leaves."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ""
        self._of: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._of.fp32_precision
                self._of.fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._of.fp32_precision = self._before


_allowed = _Switch()
