"""Trellis-coded quantization of bit groups: each stored bit contributes to several channels.

A bit group of `bits` b and width W is a ring of W b bits, b new ones per channel. A channel's value is a table entry at
the `WINDOW` newest bits of the ring, its own b and those of the channels before it:

    window[c] = bits (c + 1) b - WINDOW ... (c + 1) b - 1 of the ring, the newest the high-order ones
    z[c]      = (code(window[c]) - 127.5) * step * scale
    code(w)   = LEVELS[h ^ ORDER[l]] + OFFSETS[l]    w = 16 h + l, of 8 bits as is the sum

Every value can be decoded independently, with a shift and a table look-up, as with a uniform quantizer. Only the
encoder has to search for the ring with the least error (`encode_rings`: the Viterbi algorithm). Trellis-coded
quantization: Marcellin and Fischer 1990; bit windows instead of a state machine, with tail biting: Tseng et al. 2024
(QTIP, arXiv 2406.11235). The tables are our own, optimized on Gaussian samples jointly for 1 to 4 bits by
`benchmarks/quality/trellis_table.py`: three tables of 16 bytes, which fit vector registers, are only slightly worse
than one of 256 bytes.

A ring is stored as bits in channel order, low-order bits first within a byte. A bit group with a trellis code has a
negative step, whose magnitude is the step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 8  # bits that determine a value
TOGETHER = 1024  # rows searched at once: each needs memory for the costs of all states and channels
FARTHEST = 1024.0  # values are clamped to this many steps
AROUND = 12  # channels on either side of the seam in the first search
# Indexed by half windows, see above.
LEVELS = (74, 0, 122, 154, 143, 132, 90, 82, 106, 98, 55, 45, 34, 65, 186, 114)
OFFSETS = (31, 27, 27, 47, 29, 49, 36, 33, 41, 23, 19, 41, 53, 69, 0, 15)
ORDER = (9, 13, 5, 1, 3, 13, 15, 1, 9, 1, 13, 5, 6, 9, 1, 8)


@functools.cache
def window_values(device: torch.device) -> Tensor:
    """Return the value of each window, in steps, float32 [256]."""
    return values_of(LEVELS, OFFSETS, ORDER).to(device)


def values_of(levels: Sequence[int], offsets: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return the value of each window, in steps, for other tables [16]: float32 [256]."""
    codes = [levels[w // 16 ^ order[w % 16]] + offsets[w % 16] for w in range(1 << WINDOW)]
    return torch.tensor(codes, dtype=torch.float32) - 127.5


def windows(ring: Tensor, bits: int) -> Tensor:
    """Return the windows of rings: uint8 [..., W*bits/8] -> uint8 [..., W]."""
    count = 8 * ring.shape[-1] // bits
    first = (torch.arange(count, device=ring.device) + 1) * bits - WINDOW  # bit, cyclic
    byte, shift = (first // 8) % ring.shape[-1], first % 8
    following = (byte + 1) % ring.shape[-1]
    pair = ring[..., byte].to(torch.int32) | ring[..., following].to(torch.int32) << 8
    return (pair >> shift & 255).to(torch.uint8)


def decode_rings(ring: Tensor, bits: int) -> Tensor:
    """Decode rings: uint8 [..., W*bits/8] -> float32 [..., W], in steps."""
    return window_values(ring.device)[windows(ring, bits).long()]


def encode_rings(x: Tensor, bits: int) -> Tensor:
    """Encode x [..., W], in steps, to rings uint8 [..., W*bits/8] of approximately these values."""
    rows = x.to(torch.float32).flatten(0, -2) if x.dim() > 1 else x.to(torch.float32)[None]
    rows = torch.where(rows > -FARTHEST, rows, -FARTHEST).clamp(max=FARTHEST)  # NaN becomes the minimum
    values, parts = window_values(rows.device), rows.split(TOGETHER)
    ring = torch.cat([_ring(closed(part, bits, values), bits) for part in parts])
    return ring.view(*x.shape[:-1], x.shape[-1] * bits // 8)


def closed(x: Tensor, bits: int, values: Tensor) -> Tensor:
    """Return the windows [n, W] of rings that approximate x [n, W], where windows have `values` [256].

    A first search over the channels around the seam, from any state, finds the state at which to close the ring; a
    second one over all channels, from that state back to it, is exact.
    """
    width, around = x.shape[-1], min(AROUND, x.shape[-1] // 2)
    seam = torch.cat([x[:, width - around :], x[:, :around]], -1)
    state = viterbi_search(seam, bits, values)[:, around - 1] >> bits
    return viterbi_search(x, bits, values, state)


def viterbi_search(x: Tensor, bits: int, values: Tensor, seam: Tensor | None = None) -> Tensor:
    """Return the windows [n, W] of least error for x [n, W], given their `values` [256], by the Viterbi algorithm.

    seam [n]: the state before the first and after the last channel; None: any.
    A state is the WINDOW - bits newest bits. Costs are squared errors in float32, in this order of operations, which
    the C++ of codegen/cpu/sources/trellis_search.h shares.
    """
    branches, states = 1 << bits, 1 << (WINDOW - bits)
    at = torch.arange(1 << WINDOW, device=x.device)  # windows: old state in the low-order bits, new bits above
    cost = x.new_zeros(len(x), states)
    if seam is not None:
        cost = x.new_full((len(x), states), 1e30).scatter_(1, seam[:, None].long(), 0.0)
    costs = []
    for column in x.unbind(-1):
        costs.append(cost)
        error = column[:, None] - values
        # A window is (new bits, old state); the next state drops the low-order bits.
        total = cost[:, at & (states - 1)] + error * error
        cost = total.view(-1, states, branches).amin(-1)
    state = cost.argmin(-1) if seam is None else seam.long()
    found = []
    for column, before in zip(reversed(x.unbind(-1)), reversed(costs), strict=True):
        candidates = state[:, None] * branches + torch.arange(branches, device=x.device)
        error = column[:, None] - values[candidates]
        total = before.gather(1, candidates & (states - 1)) + error * error
        window = candidates.gather(1, total.argmin(-1, keepdim=True))[:, 0]
        found.append(window)
        state = window & (states - 1)
    return torch.stack(found[::-1], -1)


def _ring(windows: Tensor, bits: int) -> Tensor:
    """Pack the newest bits of windows [n, W] into rings uint8 [n, W*bits/8]."""
    newest = windows >> (WINDOW - bits)
    single = newest[..., None] >> torch.arange(bits, device=windows.device) & 1  # [n, W, bits], low-order first
    octets = single.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << torch.arange(8, device=windows.device)).sum(-1).to(torch.uint8)
