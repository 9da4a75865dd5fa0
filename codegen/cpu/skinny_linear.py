"""Linear layers on few rows, as a decode step has them beside attention, in one C++ file for CPUs.

    y[m][n] = sum_k x[m][k] w[n][k] + bias[n]        x [M,K]   w [N,K]   bias [N]   ->   y [M,N]

With few rows such a product is bound by reading the weight once. Libraries of matrix products bring a weight into an
order of their own at each call, which costs more than the product: on two cores of a Zen 4 that read 32 GB/s, torch's
float32 products of 8 rows read SmolLM2's weights at 6 to 11 GB/s, these at 18 to 23. Rows of the weight stream through
registers once, all rows of the input with them. Sums are of float32; products of 16-bit numbers are exact, those of
float32 rounded as in any other order.

Letters: M rows (new tokens of all sequences), K width of the input, N width of the output.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from fhopt.codegen.compiler import CompileError, load
from fhopt.codegen.source_files import read_source

NAME = "skinny"  # of the library
MOST_ROWS = 16  # more rows are worth bringing the weight into order
LEAST_BYTES = 1 << 16  # of a weight: smaller ones stay in the cache, and a call costs 3 microseconds
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel takes an eager call: plain dense tensors of one type on the CPU, few rows.

    Rows and columns are what the module says; weights of less than LEAST_BYTES are left to torch.
    """
    if type(x) is not Tensor or x.dtype not in _DTYPES or weight.dtype != x.dtype or x.device.type != "cpu":
        return False
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type != "cpu" or weight.stride(-1) != 1:
        return False
    if not 1 <= x.numel() // max(x.shape[-1], 1) <= MOST_ROWS or x.shape[-1] != weight.shape[1]:
        return False
    if weight.numel() * weight.element_size() < LEAST_BYTES or torch.is_autocast_enabled("cpu"):
        return False
    return bias is None or (bias.dtype == x.dtype and type(bias) in (Tensor, torch.nn.Parameter))


def render() -> str:
    """Render the C++ file; it is always the same."""
    return read_source("fhopt.codegen.cpu", "skinny_linear.cpp").substitute()


@functools.cache
def address() -> int | None:
    """Return the address of the compiled function `skinny`; None where it cannot be compiled."""
    try:
        return ctypes.cast(load(NAME, render()).skinny, ctypes.c_void_p).value
    except CompileError as error:
        log.info("%s Products of few rows are left to torch.", error)
        return None
