"""Cases of benchmarks/cpu/attention.py: shapes, tokens, batches, dtypes and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

SHAPES = {"MHA 32x128": (32, 32, 128), "GQA 32/8x128": (32, 8, 128), "GQA 9/3x64": (9, 3, 64)}
TOKENS = (4096, 16384, 32768)
BATCHES = (1, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARE = 0.5  # of the free memory that a case may use


@dataclass(frozen=True)
class AttentionCase:
    """One combination of shape, tokens, batch, dtype and threads."""

    shape: str
    tokens: int
    batch: int
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        """Return the name of the case in the results."""
        plural = "thread" if self.threads == 1 else "threads"
        return f"{self.shape}, T={self.tokens}, B={self.batch}, {self.dtype}, {self.threads} {plural}"

    @property
    def exact_bytes(self) -> int:
        """Bytes of the full-precision keys and values."""
        _, groups, dim = SHAPES[self.shape]
        return 2 * self.batch * groups * self.tokens * dim * DTYPES[self.dtype].itemsize


def cases(
    shapes: Sequence[str], tokens: Sequence[int], batches: Sequence[int], dtypes: Sequence[str], threads: Sequence[int]
) -> tuple[list[AttentionCase], list[str]]:
    """Return the cases that fit into memory, and a line about each that does not."""
    fitting, left_out = [], []
    available = psutil.virtual_memory().available
    for shape in shapes:
        for count in tokens:
            for batch in batches:
                for dtype in dtypes:
                    made = [AttentionCase(shape, count, batch, dtype, n) for n in threads]
                    needed = 3.3 * made[0].exact_bytes  # latents, and copies that inductor and flex make
                    if needed <= SHARE * available:
                        fitting += made
                    else:
                        left_out += [f"{case.name}: needs {needed / 1e9:.0f} GB" for case in made]
    return fitting, left_out
