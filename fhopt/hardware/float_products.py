"""Products of float32 matrices on CPUs of AMD with AVX-512: by oneDNN, in the place of MKL.

torch leaves them to MKL, which uses half the width of the vector unit of these CPUs: 218 GFLOP/s where oneDNN reaches
487 (Zen 5, 2 threads, torch 2.15, 1,024 rows). torch asks oneDNN for them only where it may round operands to bfloat16
(`torch.backends.mkldnn.matmul.fp32_precision`), but oneDNN does so by AMX alone, which these CPUs do not have. That no
operand is rounded is checked by a product before it is relied on, once in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fhopt.hardware.this_cpu import reported

ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a product of SIDE terms, relative to its norm
SIDE = 128


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices where it is faster than MKL and as exact; elsewhere nothing changes."""
    if not is_onednn_faster():
        yield
        return
    with _allowed():
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
    with _allowed(), torch.no_grad():
        product = x @ y
    exact = x.double() @ y.double()
    return float((product - exact).norm() / exact.norm())


@contextmanager
def _allowed() -> Iterator[None]:
    precision: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before
