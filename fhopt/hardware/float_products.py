"""Products of float32 matrices on CPUs of AMD with AVX-512: by oneDNN, in the place of MKL.

torch leaves them to MKL, which uses half the width of the vector unit of these CPUs: 218 GFLOP/s where oneDNN reaches
487 (Zen 5, 2 threads, torch 2.15, 1,024 rows).

    linear             calls oneDNN's product itself: safe in any thread
    onednn_products    lets all products inside go there, of the whole process

For the second, torch has a switch that allows to round operands to bfloat16 (`torch.backends.mkldnn.matmul`), but
oneDNN does so by AMX alone, which these CPUs do not have. That no operand is rounded is checked by a product before it
is relied on, once in a process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fhopt.hardware.this_cpu import reported

_PLAIN = (Tensor, torch.nn.Parameter)  # types of dense tensors that mean no more than their numbers
ROWS = 256  # to a multiple of which rows are filled up: oneDNN keeps 100 KB of machine code for each number of them
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a product of SIDE terms, relative to its norm
SIDE = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x [..., K] w^T [K, N] + bias [N] -> [..., N], without gradients, by oneDNN where that is faster."""
    plain = type(x) is Tensor and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    if not plain or not _takes(x, weight, bias) or not is_onednn_faster():
        return torch.nn.functional.linear(x, weight, bias)
    rows, (columns, width) = x.numel() // x.shape[-1], weight.shape
    missing = -rows % ROWS
    whole = torch.nn.functional.pad(x.reshape(rows, width), (0, 0, 0, missing)) if missing else x.reshape(rows, width)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(whole, weight, bias, "none", [], "")
    return product[:rows].view(*x.shape[:-1], columns)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether these are of float32 on the CPU, with rows enough."""
    alike = all(t.dtype == torch.float32 and t.is_cpu for t in (x, weight, *(() if bias is None else (bias,))))
    enough = weight.numel() > 0 and x.numel() >= ROWS * x.shape[-1]
    return alike and enough and x.shape[-1] == weight.shape[1] and not torch.is_autocast_enabled("cpu")


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices where it is faster than MKL and as exact; elsewhere nothing changes.

    For the whole process, until the last thread that is inside leaves.
    """
    if not is_onednn_faster():
        yield
        return
    with _allowed:
        yield


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
