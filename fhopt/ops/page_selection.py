"""Weighing pages by the sketches of their tokens, choosing among them, and reading them: operations, and plain torch.

    fhopt::page_weights(weights, constant, codes, scales, tiers..., page_tokens, far, lengths)    log weights [B,J,M,P]
    fhopt::attend_pages(what a `PageStep` has)        output [B,H,1,R_V], lse [B,H,1], and `list_counts` int64 [4]

`fhopt.attention.sketches` says what the numbers mean.

Letters: B batch, H query heads, J latent heads, M query rows of a latent head, U units, S queries, T sealed tokens, P
pages, N pages of a list, r channels of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.ops import algebra, latent_attention, masks, registry
from fhopt.ops.page_choice import (
    Threshold,
    best_of,
    expected_weights,
    factors,
    list_counts,
    odds_left_out,
    page_lists,
    pages_read,
    sketch_logits,
    stand_in,
)

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


def page_weights_reference(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Log of the sum over the tokens of a page of exp(constant + scale (weights . value of the codes)), [B,J,M,P].

    weights [B,J,M,r], constant [B,J,M], codes uint8 [B,J,T,bytes], scales float16 [B,J,T]. far, bool [1 or B,1,1,T]:
    tokens that count; lengths, one integer: so many first ones do.
    """
    logits = sketch_logits(weights, constant, codes, scales, bits, widths, steps)
    bias = masks.additive(masks.within(lengths, codes.shape[2], far), logits.dtype)
    return algebra.page_logits(logits if bias is None else logits + bias, page_tokens)


def page_weights(weights: Tensor, *operands: Any) -> Tensor:
    """`fhopt::page_weights`, or its reference where a gradient is asked for."""
    run: Any = page_weights_reference if latent_attention.learns(weights) else torch.ops.fhopt.page_weights
    found: Tensor = run(weights, *operands)
    return found


def _page_weights(*operands: Any) -> Tensor:
    weights, constant, codes, *others, lengths = operands
    kernel = registry.kernel_of("page_weights", weights.device.type)
    if kernel is None:
        return page_weights_reference(*operands)
    found: Tensor | None = kernel(
        weights, constant, codes, *others, codes.shape[2] if lengths is None else int(lengths)
    )
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
    output, lse = latent_attention.latent_attention(
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


def attend_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """`fhopt::attend_pages`, or its reference where a gradient is asked for."""
    if latent_attention.learns(step.query, step.key, step.value):
        return attend_pages_reference(step)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.fhopt.attend_pages(*step)
    return found


def _attend_pages(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    step = PageStep(*operands)
    kernel = registry.kernel_of("attend_pages", step.query.device.type)
    found: tuple[Tensor, Tensor, Tensor] | None = None if kernel is None else kernel(step)
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
