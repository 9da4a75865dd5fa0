"""Weighing pages by the sketches of their tokens, choosing among them, and reading them: operations, and plain torch.

    fhopt::page_weights(weights, constant, codes, scales, tiers..., page_tokens, far, lengths)    log weights [B,J,M,P]
    fhopt::attend_pages(what a `PageStep` has)        output [B,H,1,R_V], lse [B,H,1], and `list_counts` int64 [4]

`fhopt.pages` says what the numbers mean. Generated kernels come in by `use_page_kernels`.

Letters: B batch, H query heads, J latent heads, M query rows of a latent head, U units, S queries, T sealed tokens, P
pages, N pages of a list, r channels of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

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


def factors(query: Tensor, mean: Tensor, deviation: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """What channels of a sketch and 1 are multiplied by, for absorbed queries: [B,H,S,R], and mean and deviation [J,R]
    and kept channels [J,r] of the latents -> [B,J,H/J*S,r], [B,J,H/J*S], float32 or more exact."""
    rows = grouped(query, mean.shape[0])
    weighted = rows * deviation.unsqueeze(1)
    index = channels.unsqueeze(1).expand(*rows.shape[:-1], -1)
    return weighted.gather(-1, index), (rows * mean.unsqueeze(1)).sum(-1)


def grouped(query: Tensor, heads: int) -> Tensor:
    """[B,H,S,R] -> [B,J,H/J*S,R], J = `heads`, float32 or more exact."""
    b, h, s, width = query.shape
    return query.to(torch.promote_types(query.dtype, torch.float32)).reshape(b, heads, h // heads * s, width)


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


def stand_in(
    output: Tensor, lse: Tensor, mean: Tensor | None, odds: Tensor, fill: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What was read, (output [B,H,S,R], lse [B,H,S]), with a mean of values [B,n,S or 1,R] for what was not,
    n a divisor of H; without a mean or a fill as it was.

    odds [B,H,S]: log of the weight that was left out over that which was read, as sketches have it. By itself, what
    sketches give may be wrong by a common factor, where keys of a text have another mean than those of the calibration.
    fill [H]: log of the part of it that the mean takes.
    """
    if mean is None or fill is None:
        return output, lse
    share = odds + fill.unsqueeze(-1)
    part = torch.sigmoid(share).unsqueeze(-1).to(output.dtype)
    every = mean.to(output.dtype).repeat_interleave(output.shape[1] // mean.shape[1], 1).expand_as(output)
    return torch.lerp(output, every, part), lse + torch.nn.functional.softplus(share)


# --------------------------------------------------------------------------------------------------- operations


class PageStep(NamedTuple):
    """What attention of one query a head to the pages that it chooses needs: the operands of `fhopt::attend_pages`.

    query [B,H,1,R] is absorbed; key, value, their scales and tiers, far and lengths: as of `fhopt::latent_attention`,
    but far as of `page_weights_reference`. codes, scales and tiers of sketches; channels [J,r], mean and deviation
    [J,R]: of a `SketchPlan`. near [B,H,1]: as of `expected_weights`. page_tokens to lift, fill: as of a `PageIndex`.
    values [B,n,1,R_V], n a divisor of H: what takes the place of others with a fill.
    """

    query: Tensor
    key: Tensor
    key_scale: Tensor | None
    value: Tensor
    value_scale: Tensor | None
    far: Tensor | None
    lengths: Tensor | None
    key_bits: Sequence[int]
    key_widths: Sequence[int]
    key_steps: Sequence[float]
    value_bits: Sequence[int]
    value_widths: Sequence[int]
    value_steps: Sequence[float]
    scale: float
    codes: Tensor
    scales: Tensor
    bits: Sequence[int]
    widths: Sequence[int]
    steps: Sequence[float]
    channels: Tensor
    mean: Tensor
    deviation: Tensor
    near: Tensor | None
    page_tokens: int
    units: int
    most: int
    share: float
    least: int
    mass: float
    lift: float
    fill: Tensor | None
    values: Tensor | None

    @property
    def latents(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Rows and scales of both sides, and the mask."""
        return self.key, self.key_scale, self.value, self.value_scale, self.far

    @property
    def tiers(self) -> dict[str, Any]:
        """Of both sides, as `ops.tier_options` gives them."""
        names = (f"{side}_{what}" for side in ("key", "value") for what in ("bits", "widths", "steps"))
        return {name: getattr(self, name) for name in names}

    def available(self) -> Tensor | int:
        """Pages that there are to choose from: a number, or one integer, [1,1,1,1], where there are lengths."""
        if self.lengths is None:
            return -(-self.codes.shape[2] // self.page_tokens)
        return -(-self.lengths.reshape(1, 1, 1, 1) // self.page_tokens)


class WeighPages(Protocol):
    """A kernel of `fhopt::page_weights`; `codegen.cpu.pages.weigh_pages` says what the arguments are."""

    def __call__(  # noqa: D102  # see above
        self, weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int],
        widths: Sequence[int], steps: Sequence[float], page_tokens: int, mask: Tensor | None, length: int,
    ) -> Tensor | None: ...  # fmt: skip


class AttendPages(Protocol):
    """A kernel of `fhopt::attend_pages`."""

    def __call__(self, step: PageStep) -> tuple[Tensor, Tensor, Tensor] | None: ...  # noqa: D102  # see above


class PageKernels(NamedTuple):
    """Those of a device type."""

    weigh: WeighPages
    attend: AttendPages


_KERNELS: dict[str, PageKernels] = {}


def use_page_kernels(device_type: str, kernels: PageKernels | None) -> PageKernels | None:
    """Weigh and read pages by these on that device type; None: by torch operations.

    A kernel returns None for what it does not serve. Returns what was used before, None likewise.
    """
    before = _KERNELS.pop(device_type, None)
    if kernels is not None:
        _KERNELS[device_type] = kernels
    return before


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


def page_weights(weights: Tensor, *operands: Any) -> Tensor:
    """`fhopt::page_weights`, or its reference where a gradient is asked for."""
    run: Any = page_weights_reference if ops.learns(weights) else torch.ops.fhopt.page_weights
    found: Tensor = run(weights, *operands)
    return found


def _page_weights(*operands: Any) -> Tensor:
    kernels, (weights, constant, codes, *others, lengths) = _KERNELS.get(operands[0].device.type), operands
    if kernels is None:
        return page_weights_reference(*operands)
    weigh: Any = kernels.weigh
    found = weigh(weights, constant, codes, *others, codes.shape[2] if lengths is None else int(lengths))
    return page_weights_reference(*operands) if found is None else found


def _page_weights_fake(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    return weights.new_empty((*weights.shape[:3], -(-codes.shape[2] // page_tokens)))


def attend_pages_reference(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """What one query a head reads of the pages that it chooses: output [B,H,1,R_V] in the dtype of query and lse
    [B,H,1], the mean of values standing for what is not read where there is a fill; and the `list_counts`."""
    lists, odds, counts = choose_pages(step)
    output, lse = ops.latent_attention(
        step.query, *step.latents, **step.tiers, scale=step.scale, lengths=step.lengths, pages=lists,
        page_tokens=step.page_tokens,
    )  # fmt: skip
    return *stand_in(output, lse, step.values, odds, step.fill), counts


def choose_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the pages that weigh most, int32 [B,U,N], ascending, -1 behind them: of `most` places as many as
    `pages_read` of the pages that there are and as weigh enough. The `odds_left_out` of each head, [B,H,1]; and the
    `list_counts`."""
    weights, constant = factors(step.query, step.mean, step.deviation, step.channels)
    sketches = step.codes, step.scales, list(step.bits), list(step.widths), list(step.steps)
    found = page_weights(
        weights * step.scale, constant * step.scale, *sketches, step.page_tokens, step.far, step.lengths
    )
    logits = found.reshape(found.shape[0], -1, 1, found.shape[3])
    count = step.available()
    expected = expected_weights(logits, step.units, step.near)
    threshold = Threshold(step.mass, step.lift, count)
    chosen = best_of(expected, step.most, pages_read(count, step.share, step.least), threshold)
    return page_lists(chosen.squeeze(2), step.most), odds_left_out(logits, chosen), list_counts(chosen, count)


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


def attend_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """`fhopt::attend_pages`, or its reference where a gradient is asked for."""
    if ops.learns(step.query, step.key, step.value):
        return attend_pages_reference(step)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.fhopt.attend_pages(*step)
    return found


def _attend_pages(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    step = PageStep(*operands)
    kernels = _KERNELS.get(step.query.device.type)
    found = None if kernels is None else kernels.attend(step)
    return attend_pages_reference(step) if found is None else found


def _attend_pages_fake(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    step = PageStep(*operands)
    width = sum(step.value_widths) if step.value_widths else step.value.shape[-1]
    lse = step.query.new_empty(step.query.shape[:3], dtype=torch.float32)
    counts = step.codes.new_empty(4, dtype=torch.int64)
    return step.query.new_empty((*step.query.shape[:3], width)), lse, counts


_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "page_weights(Tensor weights, Tensor constant, Tensor codes, Tensor scales, int[] bits, int[] widths, "
    "float[] steps, int page_tokens, Tensor? far, Tensor? lengths) -> Tensor"
)
_LIB.define(
    "attend_pages(Tensor query, Tensor key, Tensor? key_scale, Tensor value, Tensor? value_scale, Tensor? far, "
    "Tensor? lengths, int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, "
    "float[] value_steps, float scale, Tensor codes, Tensor scales, int[] bits, int[] widths, float[] steps, "
    "Tensor channels, Tensor mean, Tensor deviation, Tensor? near, int page_tokens, int units, SymInt most, "
    "float share, int least, float mass, float lift, Tensor? fill, Tensor? values) -> (Tensor, Tensor, Tensor)"
)
_LIB.impl("page_weights", _page_weights, "CompositeExplicitAutograd")
_LIB.impl("attend_pages", _attend_pages, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::page_weights", _page_weights_fake, lib=_LIB)
torch.library.register_fake("fhopt::attend_pages", _attend_pages_fake, lib=_LIB)
