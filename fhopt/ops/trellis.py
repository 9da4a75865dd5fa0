"""Trellis codes of bit groups: quantized values that overlap, so that a bit serves more than one channel.

A bit group of `bits` b and width W is a ring of W b bits, b new ones for each channel. The value of a channel is that
of a table at the `WINDOW` newest bits of the ring, its own b and those of the channels before it:

    window[c] = bits (c + 1) b - WINDOW ... (c + 1) b - 1 of the ring, the newest the high-order ones
    z[c]      = (TABLE[window[c]] - 127.5) * step * scale

Every value can be had on its own, from a shift and a look-up, as with a uniform quantizer; only who encodes has to
search for the ring that errs least (`encode`: the Viterbi algorithm). Trellis-coded quantization: Marcellin and
Fischer 1990; with windows of bits in place of a state machine, closed to a ring: Tseng et al. 2024 (QTIP, arXiv
2406.11235). The table is our own, trained on Gaussian numbers at 1 to 4 bits at once by `benchmarks/trellis_table.py`.

A ring is stored as it is, the bits of the first channel first within a byte. A bit group with a trellis code has a
negative step, of which the magnitude counts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WINDOW = 8  # bits that a value depends on
TOGETHER = 1024  # rows that are searched for at once: each takes memory for the costs of all states and channels
FARTHEST = 1024.0  # numbers are searched for up to so many steps
AROUND = 12  # channels on either side of the seam that the first search sees
TABLE = (  # codes by window, hexadecimal
    "009f66818e76b6509979c35c46a86d87779256bca1318469ac4a8a6f7d985fd5"
    "56be77908269a5378c70ac4e60d17d9b6580119eb4509074c55d96786b8746a7"
    "c45f947c6c8944a9658321a0b7518f728b70ae4b62d47b9a57be74918367a22f"
    "ac4f8c6f7e995fd1789253bda4378369987ac35b47a76a891ea065828e75b652"
    "82669e2852b473905ccd7b96896ea841bb57927769863aa3708c4aafe05e9a7c"
    "9378bb593ea468854baf728c9880dc60a0258265729153b27e985acca942896d"
    "7b975ac8a840896d9f2e8164739152b34aae6e89977ce8609274b5593da26883"
    "6e8c49aef860987dbc58927566873aa25dca7b978870a64185679e3354b27690"
)


@functools.cache
def table(device: torch.device) -> Tensor:
    """Return the value of each window in steps, float32 [256]."""
    return torch.tensor(list(bytes.fromhex(TABLE)), dtype=torch.float32, device=device) - 127.5


def windows(ring: Tensor, bits: int) -> Tensor:
    """Return the windows of rings uint8 [..., W*bits/8] as uint8 [..., W]."""
    count = 8 * ring.shape[-1] // bits
    first = (torch.arange(count, device=ring.device) + 1) * bits - WINDOW  # bit, cyclic
    byte, shift = (first // 8) % ring.shape[-1], first % 8
    following = (byte + 1) % ring.shape[-1]
    pair = ring[..., byte].to(torch.int32) | ring[..., following].to(torch.int32) << 8
    return (pair >> shift & 255).to(torch.uint8)


def decode(ring: Tensor, bits: int) -> Tensor:
    """Return the values of rings uint8 [..., W*bits/8] in steps: float32 [..., W]."""
    return table(ring.device)[windows(ring, bits).long()]


def encode(x: Tensor, bits: int) -> Tensor:
    """Return rings uint8 [..., W*bits/8] whose values are near x [..., W], which is in steps."""
    rows = x.to(torch.float32).flatten(0, -2) if x.dim() > 1 else x.to(torch.float32)[None]
    rows = torch.where(rows > -FARTHEST, rows, -FARTHEST).clamp(max=FARTHEST)  # NaN is the least
    values, parts = table(rows.device), rows.split(TOGETHER)
    ring = torch.cat([_ring(closed(part, bits, values), bits) for part in parts])
    return ring.view(*x.shape[:-1], x.shape[-1] * bits // 8)


def closed(x: Tensor, bits: int, values: Tensor) -> Tensor:
    """Return the windows [n, W] of rings near x [n, W], where windows have `values` [256].

    A search over the channels around the seam, from any state, says in which state the ring is closed; a second one
    over all channels, from that state to the same, is exact.
    """
    width, around = x.shape[-1], min(AROUND, x.shape[-1] // 2)
    seam = torch.cat([x[:, width - around :], x[:, :around]], -1)
    state = search(seam, bits, values)[:, around - 1] >> bits
    return search(x, bits, values, state)


def search(x: Tensor, bits: int, values: Tensor, seam: Tensor | None = None) -> Tensor:
    """Return the windows [n, W] of least error for x [n, W], where windows have `values` [256]: the Viterbi algorithm.

    seam [n]: the state before the first and after the last; None: any.
    A state is the WINDOW - bits newest bits. Costs are squares of errors in float32, in this order of operations, which
    the C++ of codegen/cpu/sources/trellis_search.h shares.
    """
    branches, states = 1 << bits, 1 << (WINDOW - bits)
    at = torch.arange(1 << WINDOW, device=x.device)  # windows: old state in the low-order bits, new bits above them
    cost = x.new_zeros(len(x), states)
    if seam is not None:
        cost = x.new_full((len(x), states), 1e30).scatter_(1, seam[:, None].long(), 0.0)
    costs = []
    for column in x.unbind(-1):
        costs.append(cost)
        error = column[:, None] - values
        # A window is (new bits, old state); the state behind it drops the low-order bits.
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
    """Pack the newest bits of windows [n, W] to rings uint8 [n, W*bits/8]."""
    newest = windows >> (WINDOW - bits)
    single = newest[..., None] >> torch.arange(bits, device=windows.device) & 1  # [n, W, bits], low-order first
    octets = single.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << torch.arange(8, device=windows.device)).sum(-1).to(torch.uint8)
