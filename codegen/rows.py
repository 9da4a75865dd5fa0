"""The format of the packed latents that a kernel takes, and checks of their tensors.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.codegen.tiers import Tiers, is_scaled

PAGE_QUANTUM = 8  # the tokens of a page are a multiple of this
NO_TENSOR = (0, 0, 0, 0)  # address and three strides, in the argument struct of a C++ kernel


class RowFormat:
    """Format of the packed latents, or of the uncoded ones, of one side: keys or values."""

    def __init__(self, name: str, tiers: Tiers, width: int, dtype: str) -> None:
        self.name = name
        self.coded = bool(tiers)
        self.scaled = is_scaled(tiers)
        self.dtype: torch.dtype = torch.uint8 if tiers else getattr(torch, dtype)
        self.row = sum(bits * w for bits, w, _ in tiers) // 8 or width  # elements

    def rows(self, x: Tensor) -> Tensor:
        """Convert `x` to the kernel's type with a dense last dimension. Raises ValueError."""
        if x.dtype != self.dtype:
            if self.coded:
                raise ValueError(f"{self.name} is {x.dtype}; expected torch.uint8. Pass the result of fhopt::pack.")
            x = x.to(self.dtype)
        return x if x.stride(3) == 1 else x.contiguous()

    def check(self, x: Tensor, scale: Tensor | None, query: tuple[int, ...], tokens: int) -> None:
        """Raise ValueError if `x` or `scale` do not fit a query of shape `query` and `tokens` tokens."""
        batch, heads, rows, width = x.shape
        if batch != query[0] or query[1] % heads or rows != tokens or width != self.row:
            raise ValueError(
                f"{self.name} has shape {tuple(x.shape)}; expected, for queries {query}, [{query[0]}, J, "
                f"{tokens}, {self.row}], J a divisor of {query[1]}. Build the kernel of these tiers."
            )
        if self.scaled and (scale is None or scale.dtype != torch.float16 or scale.shape != (batch, heads, rows)):
            actual = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(f"{self.name}_scale is {actual}; expected torch.float16 {(batch, heads, rows)}.")

    def addresses(self, x: Tensor, scale: Tensor | None) -> tuple[int, ...]:
        """Return address and strides over [B, J, T] of the rows, then of the scales."""
        scales = (scale.data_ptr(), *scale.stride()) if self.scaled and scale is not None else NO_TENSOR
        return (x.data_ptr(), *x.stride()[:3], *scales)
