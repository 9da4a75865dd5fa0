"""Compile a hand-written block with multi-query attention, and print the report of its attention site.

python examples/compile_any_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fhopt


class MultiQueryBlock(nn.Module):
    """Multi-query attention: 4 query heads on 1 kv head of size 16."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 16).transpose(1, 2)
        k, v = (y.unsqueeze(1).expand(b, 4, t, 16) for y in self.kv(x).chunk(2, -1))
        weights = (q @ k.mT * 0.25).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(b, t, 64))


def main() -> None:
    block, x = MultiQueryBlock().eval(), torch.randn(2, 10, 64)
    compiled = torch.compile(block, backend="flashhead", options={"ratio": 1})
    with torch.no_grad():
        print("largest difference:", float((compiled(x) - block(x)).abs().max()))
    print(fhopt.report(compiled))


if __name__ == "__main__":
    main()
