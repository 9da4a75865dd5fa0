"""Retrieval head in a model: the kernel of `fhopt::head_logits`, and the module that replaces the dense head.

    before                                      after `apply`
    logits = lm_head(x)      [B,S,V]            logits = fhopt::head_logits(x, weight, codes...)     [B,S,V]
    logits = x @ embedding.weight.T             logits = fhopt::head_logits(x, weight, codes...), by interception

Logits that are not computed are -inf (or estimates): they are certainly smaller than the `keep` largest. A search takes
up to 16 hidden states. The dense head handles more of them (all logits of a prompt, training), gradients, weights that
have changed, and everything if no compiler is found. On GPUs the search runs in Triton.

Dimensions: M hidden states, C their width, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fhopt.codegen.cpu import lm_head as cpu_lm_head
from fhopt.codegen.cpu.graph_kernels import serve_linear
from fhopt.codegen.cpu.lm_head import Candidates, Codes, Search
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.errors import FhoptError
from fhopt.lm_head.head import TENSORS, Head
from fhopt.ops import registry
from fhopt.system import has_triton

log = logging.getLogger(__name__)


def search_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, transform: Tensor | None, centre: Tensor,
    centroids: Tensor, radii: Tensor, counts: Tensor, sizes: list[int], norms: list[float], wanted: list[int],
    limits: list[float], stamp: list[int],
) -> Tensor:  # fmt: skip
    """Compute `fhopt.ops.head_logits.head_logits` by search, with the dense head as fallback."""
    (rank, lead), (transform_norm, largest) = sizes, norms
    quantized = Codes(codes, transform, centre, centroids, radii, rank, lead, weight.shape[0], transform_norm, largest)
    keep, probes, budget, estimates = wanted
    margin, spread, softcap = limits
    options = Search(keep, margin, probes, spread, budget, softcap, bounds=bool(estimates), logits=True)
    counts[0] += len(hidden)
    if not can_search(hidden, weight) or not _is_fresh(weight, stamp):
        counts[1] += len(hidden)
        return dense(hidden, weight, bias)
    result = search_candidates(hidden, weight, bias, quantized, options)
    logits = result.logits
    assert logits is not None
    if result.estimates is not None:  # estimates are below the certain logits, as their bounds are
        logits = torch.where(logits > -math.inf, logits, result.estimates.to(logits.dtype))
    left = (result.counts < 0).nonzero().flatten()
    counts[1] += len(left)
    counts[2] += result.counts.clamp_min(0).sum()
    if len(left):
        logits[left] = dense(hidden[left], weight, bias)
    return logits


for _device in ("cpu", "cuda"):
    registry.use("head_logits", _device, search_logits)


def stamp_of(weight: Tensor) -> list[int]:
    """Return [version, address] of a weight, which change with its values."""
    return [-1 if weight.is_inference() else weight._version, weight.data_ptr()]


def _is_fresh(weight: Tensor, stamp: list[int]) -> bool:
    if stamp_of(weight) == stamp:
        return True
    _warn_of_change()
    return False


@functools.cache
def _warn_of_change() -> None:
    """Warn, once per process, that a head no longer matches its weight."""
    log.warning("The head's weight has changed since it was fitted, so the head stays dense. Fit it again: fhopt head.")


def can_search(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether a kernel accepts these hidden states: few, on the device and of the dtype of the weight."""
    typed = hidden.device == weight.device and hidden.dtype == weight.dtype and weight.dtype in cpu_lm_head.TYPES
    if not typed or not 1 <= len(hidden) <= MAX_ROWS or weight.stride(1) != 1:
        return False
    if hidden.is_cpu:
        return cpu_lm_head.LIBRARY.load() is not None
    return hidden.is_cuda and has_triton()


def search_candidates(hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes, options: Search) -> Candidates:
    """Search with the kernel for the device of the hidden states; `can_search` must hold."""
    if hidden.is_cpu:
        return cpu_lm_head.search_head(hidden, weight, bias, codes, options)
    from fhopt.codegen.gpu import lm_head as gpu_lm_head  # late: importing Triton takes a second

    return gpu_lm_head.search_head_triton(hidden, weight, bias, codes, options)


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute all logits, [M, C] -> [M, V], with the skinny-GEMM kernel if it supports them."""
    few = hidden.is_cpu and 1 <= len(hidden) <= MAX_ROWS and hidden.dtype == weight.dtype
    if few and weight.dtype in cpu_lm_head.TYPES and weight.stride(1) == 1 and serve_linear():
        return torch.ops.fhopt.linear_kernel(hidden, weight, bias)
    return F.linear(hidden, weight, bias)


# --------------------------------------------------------------------------------------------------- module


@dataclass(frozen=True)
class HeadReport:
    """Counts and bytes of a head.

    rows: hidden states. dense_rows: those that the dense head computed (many at once, too few rows excluded, not
    finite). exact_rows: total rows of the weight that the search loaded exactly. certified: share of hidden states with
    a certificate. bytes_per_row: loaded for one hidden state at a time, on average; dense_bytes_per_row: by the dense
    head.
    """

    rows: int
    dense_rows: int
    exact_rows: int
    certified: float
    bytes_per_row: float
    dense_bytes_per_row: int


class RetrievalHead(nn.Module):
    """Replacement of a linear layer, with the same weight and bias, that computes the largest logits by search.

    keep: number of the largest logits that are certain. margin: logits at most this far below the smallest of them are
    certain, too. probes: 0 for certainty; else the number of clusters to load, -1: the fitted number. budget: max rows
    of the weight loaded per hidden state; one that needs more falls back to the dense head. estimates: fill the other
    logits with estimates from quantized values instead of -inf: for beam search, whose scores are normalized, and for
    sampling without top-k.
    """

    def __init__(
        self, head: Head, weight: Tensor, bias: Tensor | None, keep: int = 1, margin: float = 0.0, probes: int = 0,
        budget: int = 4096,
        estimates: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head, self.search = head, head.search(keep=keep, margin=margin, probes=probes, budget=budget)
        _check_search(self.search, head)
        self.estimates = int(estimates)
        self.weight, self.bias = weight, bias
        self.stamp = stamp_of(weight)
        for name in TENSORS:
            self.register_buffer(name, getattr(head.codes, name), persistent=False)
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64), persistent=False)

    @property
    def in_features(self) -> int:
        """Width of hidden states, C, as in a linear layer."""
        return self.head.site.width

    @property
    def out_features(self) -> int:
        """Size of the vocabulary, V, as in a linear layer."""
        return self.head.site.vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden [..., C], before scale and softcap; -inf for those not computed."""
        rows = math.prod(hidden.shape[:-1])
        if rows > MAX_ROWS or rows < 1 or torch.is_grad_enabled() or hidden.dtype != self.weight.dtype:
            return F.linear(hidden, self.weight, self.bias)
        codes, search = self.head.codes, self.search
        logits = torch.ops.fhopt.head_logits(
            hidden.reshape(rows, hidden.shape[-1]), self.weight, self.bias, self.codes, self.transform, self.centre,
            self.centroids, self.radii, self.counts, [codes.rank, codes.lead], [codes.transform_norm, codes.largest],
            [search.keep, search.probes, search.budget, self.estimates], [search.margin, search.spread, search.softcap],
            self.stamp,
        )  # fmt: skip
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def _apply(self, fn: Any, recurse: bool = True) -> RetrievalHead:
        """Move the module; quantized values keep their dtypes. If the weight's dtype changes, it becomes dense."""
        dtype = self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in TENSORS:
            tensor = getattr(self.head.codes, name)
            setattr(self, name, tensor if tensor is None else tensor.to(self.weight.device))
        self.stamp = stamp_of(self.weight) if self.weight.dtype == dtype else [-2, 0]
        return self

    def extra_repr(self) -> str:
        """Describe the module as a linear layer, with its bits."""
        bits = 4 + 4 * self.head.codes.lead / self.head.codes.rank
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits:.3g}"

    def report(self) -> HeadReport:
        """Return counts and bytes so far."""
        rows, dense_rows, exact = self.counts.tolist()
        searched = rows - dense_rows
        one = self.in_features * self.weight.element_size()
        read = (searched * self.head.bytes_read + exact * one + dense_rows * self.head.dense_bytes) / max(rows, 1)
        certified = searched / max(rows, 1) if self.search.probes == 0 else 0.0
        return HeadReport(rows, dense_rows, exact, certified, read, self.head.dense_bytes)


def _check_search(search: Search, head: Head) -> None:
    vocabulary = head.site.vocabulary
    if not 1 <= search.keep <= vocabulary or search.budget < search.keep:
        raise FhoptError(
            f"keep={search.keep}, budget={search.budget} is invalid; expected keep from 1 to {vocabulary} and "
            "budget of at least keep."
        )
    if not 0 <= search.margin < math.inf:
        raise FhoptError(f"margin={search.margin} is invalid; expected at least 0.")
    if not 0 <= search.probes <= head.clusters:
        raise FhoptError(
            f"probes={search.probes} is invalid; expected at most {head.clusters}, the number of clusters."
        )
