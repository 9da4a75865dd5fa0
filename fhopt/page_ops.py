"""Weighing pages by the sketches of their tokens, and choosing among them: the operations, and plain torch for them.

    fhopt::page_weights(weights, constant, codes, scales, tiers..., page_tokens, far, lengths)    log weights [B,J,M,P]
    fhopt::choose_pages(the same, near, units, most, share, least, mass, lift)                    lists int32 [B,U,N],
                                            the log odds of what they leave out [B,J,M], and `list_counts` int64 [4]

`fhopt.pages` says what the numbers mean. Generated kernels come in by `use_page_kernel`.

Letters: B batch, H query heads, J latent heads, M query rows of a latent head, U units, S queries, T sealed tokens, P
pages, N pages of a list, r channels of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from fhopt import ops

TILE = 4096  # tokens whose sketches are made numbers at a time
FEWEST = 4  # pages that are listed where no page weighs enough


# --------------------------------------------------------------------------------------------------- plain torch


def sketch_logits(
    weights: Tensor, constant: Tensor, codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float],
) -> Tensor:  # fmt: skip
    """constant + scale (weights . value of the codes): [B,J,M,r], [B,J,M] and sketches of T tokens -> [B,J,M,T]."""
    tiles = []
    for tile, factor in zip(codes.split(TILE, 2), scale.split(TILE, 2), strict=True):
        units = ops.unscaled(tile, bits, widths, steps).to(weights.dtype)
        tiles.append(weights @ units.mT * factor.to(weights.dtype).unsqueeze(2))
    return torch.cat(tiles, -1) + constant.unsqueeze(-1)


@overload
def pages_read(count: int, share: float, least: int) -> int: ...


@overload
def pages_read(count: Tensor, share: float, least: int) -> Tensor: ...


def pages_read(count: Tensor | int, share: float, least: int) -> Tensor | int:
    """How many of `count` pages are read at most."""
    if isinstance(count, Tensor):
        return torch.minimum(count, (count.double() * share).long().clamp(min=least))
    return min(count, max(least, int(count * share)))


def expected_weights(logits: Tensor, units: int, near: Tensor | None = None) -> Tensor:
    """The share that each unit expects of each page in the weight of all: [B,H,S,P] -> [B,U,S,P].

    near [B,H,S]: log of the weight of what is read in any case; None: nothing is. Zeros where nothing has weight.
    """
    all_pages = logits.logsumexp(-1)
    total = all_pages if near is None else torch.logaddexp(all_pages, near.to(logits.dtype))
    weights = (logits - total.masked_fill(total == -math.inf, 0.0).unsqueeze(-1)).exp()
    return weights.unflatten(1, (units, -1)).mean(2)


@dataclass(frozen=True)
class Threshold:
    """Which pages weigh enough to be read: enough that those that are not have at most 1 - `mass` of the weight, and
    `lift` times the mean share, 1 / `pages`, or more; FEWEST of them in any case. pages: a number, or integers
    broadcastable to [B,U,S,1]."""

    mass: float
    lift: float
    pages: Tensor | int


def best_of(weights: Tensor, most: int, read: Tensor | int, threshold: Threshold) -> Tensor:
    """The pages that weigh most: weights [B,U,S,P] -> bool [B,U,S,P].

    The first `read` of `most` places, and no more than weigh enough. Never those without any weight.
    """
    best, order = weights.topk(most, -1)
    place = torch.arange(most, device=weights.device)
    kept = (place < read) & (best > 0)
    if threshold.mass < 1:  # what comes before does not suffice
        kept &= weights.sum(-1, keepdim=True) - (best.cumsum(-1) - best) > 1 - threshold.mass
    if threshold.lift > 0:
        kept &= (best * threshold.pages >= threshold.lift) | (place < FEWEST)
    return torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter(-1, order, kept)


def page_lists(chosen: Tensor, length: int) -> Tensor:
    """Lists of chosen pages, ascending, -1 behind them. bool [B,U,P] -> int32 [B,U,N], N = `length`."""
    count = chosen.shape[-1]
    numbers = torch.where(chosen, torch.arange(count, device=chosen.device), count)
    lists = numbers.topk(length, -1, largest=False, sorted=True).values if length < count else numbers.sort(-1).values
    return torch.where(lists < count, lists, -1).to(torch.int32)


# --------------------------------------------------------------------------------------------------- operations


class PageKernel(Protocol):
    """Weighs pages, or chooses among them: `codegen.cpp_pages.weigh_pages` says what the arguments are."""

    def __call__(  # noqa: D102  # see above
        self, weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int],
        widths: Sequence[int], steps: Sequence[float], page_tokens: int, mask: Tensor | None, length: int,
        choice: Choice | None = None,
    ) -> tuple[Tensor, ...] | None: ...  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which pages each of `units` lists: `read`, of `most` places, and no more than weigh enough by the threshold.

    near [B,J,M]: as of `expected_weights`.
    """

    units: int
    most: int
    read: int
    threshold: Threshold
    near: Tensor | None


_KERNELS: dict[str, PageKernel] = {}


def use_page_kernel(device_type: str, kernel: PageKernel | None) -> PageKernel | None:
    """Weigh pages by `kernel` on that device type; None: by torch operations.

    A kernel returns None for what it does not serve. Returns what was used before, None likewise.
    """
    before = _KERNELS.pop(device_type, None)
    if kernel is not None:
        _KERNELS[device_type] = kernel
    return before


def _by_kernel(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None, *, choice: Choice | None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    kernel = _KERNELS.get(weights.device.type)
    if kernel is None:
        return None
    length = codes.shape[2] if lengths is None else int(lengths)
    return kernel(weights, constant, codes, scales, bits, widths, steps, page_tokens, far, length, choice)


def page_weights_reference(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Log of the sum over the tokens of a page of exp(constant + scale (weights . value of the codes)), [B,J,M,P].

    weights [B,J,M,r], constant [B,J,M], codes uint8 [B,J,T,bytes], scales float16 [B,J,T]. far, bool [1 or B,1,1,T]:
    tokens that count; lengths, one integer: so many first ones do.
    """
    logits = sketch_logits(weights, constant, codes, scales, bits, widths, steps)
    bias = ops.additive(ops.within(lengths, codes.shape[2], far), logits.dtype)
    return ops.page_logits(logits if bias is None else logits + bias, page_tokens)


def _page_weights(*operands: Any) -> Tensor:
    found = _by_kernel(*operands, choice=None)
    return page_weights_reference(*operands) if found is None else found[0]


def _page_weights_fake(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    return weights.new_empty((*weights.shape[:3], -(-codes.shape[2] // page_tokens)))


def choose_pages_reference(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None, near: Tensor | None,
    units: int, most: int, share: float, least: int, mass: float, lift: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists of the pages that weigh most, int32 [B,U,N], ascending, -1 behind them: `page_weights_reference`, and of
    `most` places as many as `pages_read` of the pages that there are and as weigh enough. near [B,J,M]: as of
    `expected_weights`; units, mass, lift: as of a `PageIndex`. The `odds_left_out` of each row, [B,J,M]; and the
    `list_counts`."""
    operands = (weights, constant, codes, scales, bits, widths, steps, page_tokens, far, lengths)
    found = page_weights_reference(*operands)
    logits = found.reshape(found.shape[0], -1, 1, found.shape[3])
    count = _pages_of(codes, page_tokens, lengths)
    expected = expected_weights(logits, units, None if near is None else near.reshape(logits.shape[:3]))
    chosen = best_of(expected, most, pages_read(count, share, least), Threshold(mass, lift, count))
    odds = odds_left_out(logits, chosen).reshape(found.shape[:3])
    return page_lists(chosen.squeeze(2), most), odds, list_counts(chosen, count)


def list_counts(chosen: Tensor, available: Tensor | int) -> Tensor:
    """What is added to the counters of a `PageIndex` for chosen pages, bool [B,U,S,P], of so many, a number or one for
    each sequence: int64 [4]."""
    lists = chosen.shape[0] * chosen.shape[1] * chosen.shape[2]
    there = torch.as_tensor(available, device=chosen.device).expand(chosen.shape[0], 1, 1, 1).sum()
    made = there.new_tensor(lists)
    return torch.stack([made, made * 0, chosen.sum(), there * (lists // max(1, chosen.shape[0]))]).to(torch.int64)


def odds_left_out(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log of the weight of pages that are not chosen over that of those that are: [B,H,S,P], bool [B,U,S,P] -> [B,H,S];
    -inf where there are none of either."""
    taken = chosen.repeat_interleave(logits.shape[1] // chosen.shape[1], 1)
    left, read = (logits.masked_fill(mask, -math.inf).logsumexp(-1) for mask in (taken, ~taken))
    return torch.where(read > -math.inf, left - read, -math.inf)


def _pages_of(codes: Tensor, page_tokens: int, lengths: Tensor | None) -> int:
    return -(-(codes.shape[2] if lengths is None else int(lengths)) // page_tokens)


def _choose_pages(*operands: Any) -> tuple[Tensor, ...]:
    *of_pages, near, units, most, share, least, mass, lift = operands
    codes, page_tokens, lengths = of_pages[2], of_pages[7], of_pages[9]
    count = _pages_of(codes, page_tokens, lengths)
    choice = Choice(units, most, pages_read(count, share, least), Threshold(mass, lift, count), near)
    found = _by_kernel(*of_pages, choice=choice)
    return choose_pages_reference(*operands) if found is None else found


def _choose_pages_fake(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None, near: Tensor | None,
    units: int, most: int, share: float, least: int, mass: float, lift: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lists = codes.new_empty((codes.shape[0], units, most), dtype=torch.int32)
    return lists, torch.empty_like(constant), codes.new_empty(4, dtype=torch.int64)


_OPERANDS = (
    "Tensor weights, Tensor constant, Tensor codes, Tensor scales, int[] bits, int[] widths, float[] steps, "
    "int page_tokens, Tensor? far, Tensor? lengths"
)
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(f"page_weights({_OPERANDS}) -> Tensor")
_LIB.define(
    f"choose_pages({_OPERANDS}, Tensor? near, int units, int most, float share, int least, float mass, float lift) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIB.impl("page_weights", _page_weights, "CompositeExplicitAutograd")
_LIB.impl("choose_pages", _choose_pages, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::page_weights", _page_weights_fake, lib=_LIB)
torch.library.register_fake("fhopt::choose_pages", _choose_pages_fake, lib=_LIB)
