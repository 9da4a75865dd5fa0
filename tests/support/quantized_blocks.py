"""Random weights in GGUF blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fhopt.codegen.cpu.gguf_blocks import FORMATS, interleave_rows
from fhopt.codegen.cpu.skinny_linear import BlockedWeight

# Offsets of a block's float16 values, by format: random bytes there could be infinite or NaN.
HALVES = {2: (0,), 3: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,), 20: (0,), 23: (0,)}


def random_blocks(format: int, rows: int, width: int, seed: int = 0) -> BlockedWeight:
    """A weight [rows, width] with random codes and scales."""
    return interleave_rows(random_rows(format, rows, width, seed), format, width)


def random_rows(format: int, rows: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """The weight's rows as stored in a file: uint8 [rows, bytes of a row]."""
    random = np.random.default_rng(seed)
    numbers, size = FORMATS[format]
    blocks = random.integers(0, 256, (rows * width // numbers, size), dtype=np.uint8)
    for at in HALVES[format]:
        scale = (random.uniform(-1, 1, (len(blocks), 1)) / 256).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)
