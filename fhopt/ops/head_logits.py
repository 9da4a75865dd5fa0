"""fhopt::head_logits: logits of a language-model head, of which a search kernel computes only the largest.

A search kernel (fhopt/lm_head/module.py) computes the `keep` largest logits and returns -inf or estimates for the
others. The reference computes all logits.

Letters: M hidden states, C their width, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fhopt.ops import registry


@torch.library.custom_op("fhopt::head_logits", mutates_args=("counts",))
def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, transform: Tensor | None, centre: Tensor,
    centroids: Tensor, radii: Tensor, counts: Tensor, sizes: list[int], norms: list[float], wanted: list[int],
    limits: list[float], stamp: list[int],
) -> Tensor:  # fmt: skip
    """Compute logits [M, V] of hidden [M, C], weight [V, C] and bias [V]: the largest exactly, -inf for the others.

    codes to radii, sizes (rank, lead) and norms (transform_norm, largest): of `codegen.cpu.lm_head.Codes`. wanted
    (keep, probes, budget, estimates: 1 to return estimates instead of -inf) and limits (margin, spread, softcap): of
    its `Search`. counts: int64 [3], incremented by the number of hidden states, of those sent to the dense head, and of
    weight rows loaded for the others. stamp: the expected stamp of the weight (`fhopt.lm_head.module.stamp_of`).
    """
    kernel = registry.kernel_of("head_logits", hidden.device.type) or head_logits_reference
    logits: Tensor = kernel(
        hidden, weight, bias, codes, transform, centre, centroids, radii, counts, sizes, norms, wanted, limits, stamp
    )
    return logits


def head_logits_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, transform: Tensor | None, centre: Tensor,
    centroids: Tensor, radii: Tensor, counts: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    """Compute all logits, ignoring the options."""
    counts[:2] += len(hidden)
    return F.linear(hidden, weight, bias)


@head_logits.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])
