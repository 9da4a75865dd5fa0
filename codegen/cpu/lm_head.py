"""Search the rows of a language-model head that may have the largest logits, in one C++ file for CPUs.

    h' = A h                                                    hidden state in the basis of the head [R]
    s_w = offset + h^.w^          (few bits a value)            estimate of the logit of row w
    u_w = s_w + |h'_1| e1_w + |h'_2| e2_w + |h' - h^|_1 n1_w + |h' - h^|_2 n2_w                 upper bound of it
    scored: every row with u_w >= the k-th largest exact logit found, less a margin

Quantized values of all rows (or of those of the clusters that are probed) are read once, at the speed of memory; exact
rows are read in the order of their bounds until no bound reaches the k-th largest logit. By the Cauchy-Schwarz
inequality, used in both tiers of coordinates and for the rounding of the hidden state, the k largest logits are then
among those that were computed, whatever the hidden state is. What is computed in float32 is allowed for (`slack`).

A block is 16 rows of the head, one for each lane, so that sums need no reduction across lanes:

    [ lead/4 groups ][16 rows][4 coordinates of 8 bits]
    [ (R - lead)/8 groups ][16 rows][4 bytes: the low halves are coordinates 0..3, the high ones 4..7]
    [ scale1, scale2, e1, e2, n1, n2: bfloat16, 16 each ][ 16 int32: which row of the weight, -1: none ]

Letters: M hidden states, C their width, R width of the basis, V vocabulary, K clusters.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpu.calls.kernels import HEAD_BLOCK, HeadSearch
from fhopt.codegen.cpu.calls.kernels import TYPES as TYPES
from fhopt.codegen.cpu.library import CppLibrary

BLOCK = HEAD_BLOCK
NUMBERS = 6  # of a row of a block, beside its codes
WIDEST = 32_768  # coordinates: sums of products of codes stay below 2^31


@dataclass(frozen=True)
class Codes:
    """A quantized language-model head as the kernel reads it; fhopt/lm_head/quantize.py makes it.

    codes: uint8 [blocks, bytes of a block]. transform: bfloat16 [R, C], or None where h' = h. centre: float32 [C]: what
    was taken from every row. centroids: bfloat16 [K, R]; radii: float32 [K]. transform_norm: Frobenius norm of the
    transform. largest: largest norm of a row of the weight.
    """

    codes: Tensor
    transform: Tensor | None
    centre: Tensor
    centroids: Tensor
    radii: Tensor
    rank: int
    lead: int
    vocabulary: int
    transform_norm: float
    largest: float

    @property
    def cluster_blocks(self) -> int:
        """Number of blocks of a cluster."""
        return self.codes.shape[0] // self.centroids.shape[0]


@dataclass(frozen=True)
class Search:
    """Options of a search.

    keep: k: the k largest logits are found for certain. margin: logits that are at most this much below them, too.
    probes: clusters whose rows are searched, 0: all. spread: how much of a cluster's radius counts for its rank.
    budget: exact rows of a hidden state, at most; a hidden state that needs more is left to the dense head. softcap: of
    logits, after this search, 0: none. bounds: return estimates and upper bounds of all rows too.
    """

    keep: int = 1
    margin: float = 0.0
    probes: int = 0
    spread: float = 0.1
    budget: int = 4096
    softcap: float = 0.0
    bounds: bool = False
    logits: bool = False


@dataclass(frozen=True)
class Candidates:
    """Exact logits of the rows that may matter, largest first; rows of equal logits in order of the vocabulary.

    ids: int32 [M, budget]; values: float32 [M, budget], rounded as the dtype of the weight is; of both the first
    counts[m] count. counts: int32 [M]: -1 where the dense head has to decide. estimates, bounds: float32 [M, V], or
    None. logits: [M, V] of the type of the weight, -inf where none was computed (not written where counts[m] is -1), or
    None.
    """

    ids: Tensor
    values: Tensor
    counts: Tensor
    estimates: Tensor | None = None
    bounds: Tensor | None = None
    logits: Tensor | None = None


def search_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes, options: Search, function: Any | None = None
) -> Candidates:
    """Search candidates for hidden [M, C] and weight [V, C] of one type (float32, bfloat16, float16) on a CPU.

    bias: [V] of the same type, or None. function: of another build; None: `LIBRARY.load()`. Raises ValueError for
    tensors that do not fit, and where nothing can be compiled.
    """
    run = function or LIBRARY.load()
    if run is None:
        raise ValueError("there is no compiled kernel")
    _check(hidden, weight, bias, codes, options)
    rows, width = hidden.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    budget = min(options.budget, codes.vocabulary)
    ids = torch.empty(rows, budget, dtype=torch.int32)
    values, counts = torch.empty(rows, budget), torch.empty(rows, dtype=torch.int32)
    estimates, bounds = (torch.empty(rows, codes.vocabulary) if options.bounds else None for _ in range(2))
    logits = hidden.new_empty(rows, codes.vocabulary) if options.logits else None
    call = HeadSearch(
        rows=rows, width=width, rank=codes.rank, lead=codes.lead, blocks=codes.codes.shape[0],
        vocabulary=codes.vocabulary, clusters=codes.centroids.shape[0], threads=torch.get_num_threads(),
        type=TYPES[weight.dtype], hidden=hidden.data_ptr(), hidden_row=hidden.stride(0), weight=weight.data_ptr(),
        weight_row=weight.stride(0), bias=_address(bias), transform=_address(codes.transform),
        centre=codes.centre.data_ptr(), codes=codes.codes.data_ptr(), block_bytes=codes.codes.shape[1],
        centroids=codes.centroids.data_ptr(), radii=codes.radii.data_ptr(), cluster_blocks=codes.cluster_blocks,
        probes=options.probes, spread=options.spread, transform_norm=codes.transform_norm, largest=codes.largest,
        keep=options.keep, budget=budget, margin=options.margin, softcap=options.softcap, ids=ids.data_ptr(),
        values=values.data_ptr(), counts=counts.data_ptr(), estimates=_address(estimates), bounds=_address(bounds),
        logits=_address(logits),
    )  # fmt: skip
    run(ctypes.byref(call))
    return Candidates(ids, values, counts, estimates, bounds, logits)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes, options: Search) -> None:
    """Raise ValueError for what machine code would read or write past."""
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    if any(not x.is_cpu or x.dtype != weight.dtype or x.dtype not in TYPES for x in tensors):
        raise ValueError(f"expected tensors of one type on a CPU, found {[(x.dtype, str(x.device)) for x in tensors]}")
    if hidden.dim() != 2 or weight.shape != (codes.vocabulary, hidden.shape[1]) or weight.stride(1) != 1:
        raise ValueError(f"{tuple(hidden.shape)} and {tuple(weight.shape)} do not fit the head ({codes.vocabulary})")
    if bias is not None and (bias.shape != (codes.vocabulary,) or not bias.is_contiguous()):
        raise ValueError(f"a bias of shape {tuple(bias.shape)}")
    held = {
        torch.uint8: (codes.codes,), torch.bfloat16: (codes.centroids, codes.transform),
        torch.float32: (codes.centre, codes.radii),
    }  # fmt: skip
    for dtype, parts in held.items():
        if any(x.dtype != dtype or not x.is_cpu or not x.is_contiguous() for x in parts if x is not None):
            raise ValueError(f"codes of other types than `Codes` has: {[x.dtype for x in parts if x is not None]}")
    if codes.centre.shape != (hidden.shape[1],) or (codes.transform is None and codes.rank < hidden.shape[1]):
        raise ValueError(f"hidden states of {hidden.shape[1]} numbers, the head was made for {codes.centre.shape[0]}")
    if not 1 <= options.keep <= codes.vocabulary or options.budget < options.keep or options.margin < 0:
        raise ValueError(f"keep={options.keep}, budget={options.budget}, margin={options.margin}")


def head_block_bytes(rank: int, lead: int) -> int:
    """Return the bytes of a block of 16 rows: quantized values, numbers and which rows they are."""
    return BLOCK * (lead + (rank - lead) // 2 + 2 * NUMBERS + 4)


def _bind(library: ctypes.CDLL) -> Any:
    library.search.argtypes, library.search.restype = (ctypes.c_void_p,), None
    return library.search


LIBRARY = CppLibrary("head", "lm_head.cpp", _bind, "The head stays dense.")
