"""Products of matrices on CPUs on which torch has a way that is several times as fast as the one that it takes.

    numbers     where                             torch takes                            here
    float32     AMD with AVX-512                  MKL, which uses half the vectors       oneDNN
    bfloat16    no instructions for it (AVX2)     loops: 11 to 16 GFLOP/s                a kernel: 140 to 170
    float16     no instructions for it (most)     loops                                  a kernel; AVX-512: float32

(2 threads, torch 2.15: float32 on Zen 5, 218 GFLOP/s by MKL, 487 by oneDNN; bfloat16 on Zen 3, 1,024 rows.) Products
of 16-bit numbers are exact in float32, in which sums are either way; only the result is rounded. They are computed by
fhopt/codegen/cpu/wide_linear.py; where that is not built, and for gradients, a weight is converted some rows at a time,
so that what it takes stays in the caches.

    linear             a linear layer without gradients: safe in any thread
    by_parts           the same of a 16-bit weight and numbers of float32
    fast_products      lets all products inside go there: of float32 in the whole process, of 16 bits in linear layers

For products of float32 torch has a switch that allows to round operands to bfloat16 (`torch.backends.mkldnn.matmul`),
but oneDNN does so by AMX alone, which these CPUs do not have. That no operand is rounded is checked by a product before
it is relied on, once in a process.

Letters: M rows, K width of the input, N width of the output.
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
from fhopt.hardware.this_cpu import reported
from fhopt.system import multiplies_by_loops

_P = ParamSpec("_P")
_R = TypeVar("_R")
HALVES = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)  # types of dense tensors that mean no more than their numbers
ROWS = 256  # to a multiple of which rows are filled up: oneDNN keeps 100 KB of machine code for each number of them
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a product of SIDE terms, relative to its norm
SIDE = 128
MOST_FEW_ROWS = 16  # no more than these are worth a loop over the weight as it is
CONVERTED = 1 << 20  # numbers of a weight that are float32 at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x [..., K] w^T [K, N] + bias [N] -> [..., N], without gradients, in the fastest way of this CPU."""
    return _way(x, weight, bias)(x, weight, bias)


def _way(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return what computes a linear layer fastest."""
    plain = type(x) is Tensor and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    if plain and _takes(x, weight, bias, torch.float32, ROWS) and is_onednn_faster():
        return _by_onednn
    sixteen_bits = plain and x.dtype in HALVES and _takes(x, weight, bias, x.dtype, MOST_FEW_ROWS + 1)
    return _in_float32 if sixteen_bits and multiplies_by_loops(x.dtype) else torch.nn.functional.linear


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (columns, width) = x.numel() // x.shape[-1], weight.shape
    missing = -rows % ROWS
    whole = torch.nn.functional.pad(x.reshape(rows, width), (0, 0, 0, missing)) if missing else x.reshape(rows, width)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(whole, weight, bias, "none", [], "")
    return product[:rows].view(*x.shape[:-1], columns)


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer of 16-bit numbers by products of float32."""
    found = codegen.linear(x, weight, bias)
    if found is not None:
        return found
    return by_parts(x, weight, bias)


def by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: int | None = None) -> Tensor:
    """Compute a linear layer of x [..., K] and w [N, K] in float32, some rows of the weight at a time.

    The result has the dtype of x; of the weight, which may be of 16 bits, never more than `numbers` are there in
    float32, CONVERTED where nothing else is said.
    """
    rows, (columns, width) = x.numel() // x.shape[-1], weight.shape
    given, output = x.reshape(rows, width).float(), x.new_empty(*x.shape[:-1], columns)
    flat = output.view(rows, columns)
    for part in _parts(columns, width, numbers):
        added = None if bias is None else bias[part].float()
        flat[:, part] = linear(given, weight[part].float(), added)
    return output  # no view: the output of an autograd function that is one may not be written to


def _parts(columns: int, width: int, numbers: int | None = None) -> list[slice]:
    """Divide the rows of a weight [N,K] into parts of so many numbers; None: CONVERTED."""
    step = max(1, (numbers or CONVERTED) // width)
    return [slice(first, first + step) for first in range(0, columns, step)]


class _InFloat32(torch.autograd.Function):
    """`_in_float32` with the gradient of its input, of weights that need none; nothing but the weight is kept."""

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
    """Return whether these are dense and of one type on the CPU, with rows enough, as linear layers have them."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(t.dtype == dtype and t.is_cpu and t.layout is torch.strided for t in operands):
        return False
    if weight.dim() != 2 or not x.dim() or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    enough = weight.numel() > 0 and x.numel() >= rows * x.shape[-1] and x.shape[-1] == weight.shape[1]
    return enough and not torch.is_autocast_enabled("cpu")


class _Linears(TorchFunctionMode):
    """Computes linear layers of 16-bit numbers in float32, with gradients of inputs.

    Not inside a backward pass, of which torch takes all modes away: who runs layers again there enters it again.
    Graphs that are compiled or traced, and functions that torch.func transforms, keep torch's products.
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
        codegen.prepare_linear()  # all products are then made in one way, from the first on
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (input, weight, bias) if t is not None):
            return _in_float32(input, weight, bias)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return torch.nn.functional.linear(input, weight, bias)
        output: Tensor = _InFloat32.apply(input, weight, bias)
        return output


LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


def _is_transformed() -> bool:
    """Return whether tensors stand for others: under torch.func, or where a mode sees every operation."""
    functorch: Any = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None


@contextmanager
def fast_products(weights: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Let matrices be multiplied in the fastest way of this CPU that is as exact; elsewhere nothing changes.

    Products of float32 of the whole process, until the last thread that is inside leaves, and linear layers of 16-bit
    numbers of this thread. weights: those of the layers inside, where they are known: every operation of torch takes
    some microseconds longer where linear layers are watched.
    """
    with ExitStack() as entered:
        if is_onednn_faster():
            entered.enter_context(_allowed)
        if _has_loops(weights) and not any(type(mode) is _Linears for mode in _get_current_function_mode_stack()):
            entered.enter_context(_Linears())
        yield


def _has_loops(weights: Iterable[Tensor] | None) -> bool:
    """Return whether torch has only loops for some weights, of which those on meta come to it; None: of any type."""
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
    """Return whether this CPU is one of those, and a product by oneDNN has the accuracy of float32."""
    flags = reported("flags").split()
    if reported("vendor_id") != "AuthenticAMD" or "avx512_bf16" not in flags or "amx_bf16" in flags:
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return _error() < ROUNDING


def _error() -> float:
    """Return the relative error of a product by oneDNN."""
    x, y = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with _allowed, torch.no_grad():
        product = x @ y
    exact = x.double() @ y.double()
    return float((product - exact).norm() / exact.norm())


class _Switch:
    """A context in which torch asks oneDNN, until the last thread that is inside leaves."""

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
