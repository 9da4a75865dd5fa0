"""Linear layers on few rows, as a decode step has them beside attention, in one C++ file for CPUs.

    y[m][n] = scale[n] sum_k x[m][k] w[n][k] + bias[n]      x [M,K]   w [N,K]   scale, bias [N]   ->   y [M,N]

With few rows such a product is bound by reading the weight once. Libraries of matrix products bring a weight into an
order of their own at each call, which costs more than the product: on two cores of a Zen 4 that read 32 GB/s, torch's
float32 products of 8 rows read SmolLM2's weights at 6 to 11 GB/s, these at 18 to 23. Rows of the weight stream through
registers once, all rows of the input with them. Sums are of float32; products of 16-bit numbers are exact, those of
float32 rounded as in any other order. Weights that a library keeps as signed bytes with a scale for each row (torchao's
`Int8WeightOnlyConfig`) are read as they are: half the bytes of bfloat16; other weights have no scale.

Letters: M rows (new tokens of all sequences), K width of the input, N width of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.cpu.library import CppLibrary

MAX_ROWS = 16  # more rows are worth bringing the weight into order
MAX_BLOCK_ROWS = 128  # beside a weight in blocks, of any format: `gguf_blocks.most_rows` is for one
MIN_BYTES = 1 << 16  # of a weight: smaller ones stay in the cache, and a call costs 3 microseconds
DTYPES = tuple(TYPES)
_PLAIN = (Tensor, torch.nn.Parameter)  # types of dense tensors that mean no more than their numbers


def takes_rows(rows: int, weight: Tensor) -> bool:
    """Return whether the kernel pays for this number of rows; torch multiplies plain weights below MIN_BYTES."""
    is_quantized = type(weight) not in (*_PLAIN, FakeTensor)
    is_large = is_quantized or weight.numel() * weight.element_size() >= MIN_BYTES
    most = MAX_BLOCK_ROWS if is_quantized and hasattr(weight, "gguf_blocks") else MAX_ROWS
    return 1 <= rows <= most and is_large


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether kernels take the operands of an eager call: plain dense tensors of one type on the CPU."""
    if type(weight) not in _PLAIN or not _takes(x, weight.shape, bias):
        return False
    return weight.is_cpu and weight.dtype == x.dtype and weight.stride(-1) == 1


def _takes(x: Tensor, shape: torch.Size, bias: Tensor | None) -> bool:
    """Return whether input and bias are ones that kernels take, beside a weight of that shape."""
    if type(x) is not Tensor or x.dtype not in DTYPES or not x.is_cpu or x.shape[-1] != shape[1]:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return bias is None or (bias.dtype == x.dtype and bias.shape == shape[:1] and type(bias) in _PLAIN)


@dataclass(frozen=True, eq=False)
class SignedBytes:
    """A weight that a library keeps as signed bytes: its values int8 [N,K], its scales as float32 [N]."""

    values: Tensor
    scale: Tensor
    given: Tensor  # the library's scales, and their version then
    version: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that they represent."""
        return self.values.shape

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What kernels read."""
        return self.values, self.scale

    def is_current(self, weight: Any) -> bool:
        """Return whether the weight still has these values and scales."""
        return weight.qdata is self.values and weight.scale is self.given and _version(self.given) == self.version


@dataclass(frozen=True, eq=False)
class BlockedWeight:
    """A weight [N, width] in blocks: uint8 [N, bytes of a row], dense, on the CPU (of `gguf_blocks.arranged`)."""

    values: Tensor
    format: int
    width: int

    def is_current(self, weight: Any) -> bool:
        """Return whether the weight still has these blocks."""
        return getattr(weight, "gguf_blocks", None) is self

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that they represent."""
        return torch.Size((self.values.shape[0], self.width))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What kernels read."""
        return (self.values,)


_signed_bytes = WeakIdKeyDictionary()  # quantized weight -> its `SignedBytes`; None where kernels do not take it


def quantized(x: Tensor, weight: Tensor, bias: Tensor | None) -> SignedBytes | BlockedWeight | None:
    """Return what a quantized weight is kept as, where kernels take it with these operands; None for others."""
    if type(weight) in _PLAIN:
        return None
    found = kept_quantized(weight)
    return found if found is not None and _takes(x, found.shape, bias) else None


def kept_quantized(weight: Tensor) -> SignedBytes | BlockedWeight | None:
    """Return what a quantized weight is kept as now, the same object as long as that is so; None of any other."""
    blocks = getattr(weight, "gguf_blocks", None)
    if isinstance(blocks, BlockedWeight):
        return blocks
    found: SignedBytes | None = _signed_bytes.get(weight)
    if found is None and weight in _signed_bytes:
        return None
    if found is None or not found.is_current(weight):
        found = _signed_bytes[weight] = _rows_of_bytes(weight)
    return found


def _rows_of_bytes(weight: Tensor) -> SignedBytes | None:
    """Read a weight as torchao keeps it, where it is symmetric, with a scale a row, and for plain activations."""
    values, scale, zero = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    if not isinstance(values, Tensor) or not isinstance(scale, Tensor) or values.dtype != torch.int8:
        return None
    if getattr(weight, "act_quant_kwargs", None) is not None or getattr(weight, "act_pre_scale", None) is not None:
        return None
    is_symmetric = zero is None or not bool(zero.any())
    is_plain = values.dim() == 2 and values.is_cpu and values.stride(1) == 1 and scale.numel() == values.shape[0]
    if not is_symmetric or not is_plain or list(getattr(weight, "block_size", ())) != [1, values.shape[1]]:
        return None
    return SignedBytes(values, scale.detach().reshape(-1).float().contiguous(), scale, _version(scale))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


LIBRARY = CppLibrary(
    "skinny", "skinny_linear.cpp", lambda library: library, "Skinny GEMMs run on torch operations, which is slower."
)
