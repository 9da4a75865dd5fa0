"""Linear layers on many rows, as a prompt has them, in one C++ file for CPUs on which torch has only loops for 16 bits.

    y[m][n] = scale[n] sum_k x[m][k] w[n][k] + bias[n]      x [M,K]   w [N,K]   scale, bias [N]   ->   y [M,N]

All elements become floats inside the matmul. Instead of this one can convert a weight and let a library multiply; that
writes and reads it once more, and MKL is made for CPUs of another maker. GFLOP/s on 2 threads of a Zen 3 (AVX2; 197 are
possible), bfloat16, weights of 1536 x 8960 and 8960 x 1536 numbers:

    rows              32           128          512          512 (8960 x 1536)
    by MKL            44 to 77     86 to 126    116          105
    here              104 to 127   151 to 169   140          151

Weights that a library keeps as signed bytes with a scale for each row are read as they are
(fhopt/codegen/cpu/skinny_linear.py, which has the skinny GEMMs).

Letters: M rows, K width of the input, N width of the output.
"""

from __future__ import annotations

import torch

from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.system import multiplies_by_loops

_HALVES = (torch.bfloat16, torch.float16)


def takes_many_rows(rows: int, dtype: torch.dtype) -> bool:
    """Return whether the kernel takes this number of rows, and is the fastest way that this CPU has for them.

    With AVX-512, where torch has loops for float16 alone, it was not measured beside products of float32.
    """
    return is_wanted() and rows > MAX_ROWS and dtype in _HALVES and multiplies_by_loops(dtype)


def is_wanted() -> bool:
    """Return whether there are numbers that `takes_many_rows` says yes to on this CPU."""
    return multiplies_by_loops(torch.bfloat16)


LIBRARY = CppLibrary(
    "wide", "wide_linear.cpp", lambda library: library, "GEMMs run on torch operations, which is slower."
)
