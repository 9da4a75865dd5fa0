"""Ops for single-query attention on selected pages: page weights, and selection with attention.

    fhopt::page_weights(weights, constant, codes, scales, groups..., page_tokens, far, lengths)   log weights [B,J,M,P]
    fhopt::attend_pages(the fields of a `PageStep`)    output [B,H,1,R_V], lse [B,H,1], and `list_counts` int64 [4]

`fhopt.ops.page_selection` defines the selection, `fhopt.attention.sketches` the sketches. `fhopt.attention.paged`
handles calls that `fhopt::attend_pages` does not support, such as several queries.

Letters: B batch, H query heads, J latent heads, M query rows of a latent head, U units, S queries, T quantized tokens,
P pages, N pages of a list, R latent width, r channels of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.ops import latent_attention, masks, page_selection, registry

# --------------------------------------------------------------------------------------------------- operations


class PageStep(NamedTuple):
    """One decode step on selected pages: the operands of `fhopt::attend_pages`, in schema order.

    query [B,H,1,R] is absorbed. key, value, their scales and bit groups, far and lengths: as in
    `fhopt::latent_attention`, but far as in `page_weights_reference`. codes, scales and their bit groups: sketches.
    channels [J,r], mean and deviation [J,R]: of a `SketchPlan`. near [B,H,1]: as in `expected_weights`. units, most,
    share, least, mass, lift: of a `SelectionRule`. fill: as in `PageIndex`. values [B,n,1,R_V], n a divisor of H: the
    mean for unselected pages.
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
    def bit_groups(self) -> dict[str, Any]:
        """Bit groups of both sides, in the format of `group_options`."""
        names = (f"{side}_{what}" for side in ("key", "value") for what in ("bits", "widths", "steps"))
        return {name: getattr(self, name) for name in names}

    @property
    def rule(self) -> page_selection.SelectionRule:
        """The rule that decides which pages are selected."""
        return page_selection.SelectionRule(self.units, self.most, self.share, self.least, self.mass, self.lift)

    def available(self) -> Tensor | int:
        """Return the number of pages: an int, or with lengths an integer tensor [1,1,1,1]."""
        if self.lengths is None:
            return -(-self.codes.shape[2] // self.page_tokens)
        return -(-self.lengths.reshape(1, 1, 1, 1) // self.page_tokens)


def page_weights_reference(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute the log weight of each page, the log of the sum of exp(logit) over its tokens, [B,J,M,P].

    Logits are those of `sketch_logits`: weights [B,J,M,r], constant [B,J,M], codes uint8 [B,J,T,bytes], scales float16
    [B,J,T]. far, bool [1 or B,1,1,T]: tokens to use. lengths, an integer: number of leading tokens to use.
    """
    logits = page_selection.sketch_logits(weights, constant, codes, scales, bits, widths, steps)
    bias = masks.additive(masks.within(lengths, codes.shape[2], far), logits.dtype)
    return page_selection.page_logits(logits if bias is None else logits + bias, page_tokens)


def page_weights(weights: Tensor, *operands: Any) -> Tensor:
    """Run `fhopt::page_weights`, or its reference if a gradient is required."""
    run: Any = page_weights_reference if latent_attention.needs_gradient(weights) else torch.ops.fhopt.page_weights
    result: Tensor = run(weights, *operands)
    return result


def _page_weights(*operands: Any) -> Tensor:
    weights, constant, codes, *others, lengths = operands
    kernel = registry.kernel_of("page_weights", weights.device.type)
    if kernel is None:
        return page_weights_reference(*operands)
    result: Tensor | None = kernel(
        weights, constant, codes, *others, codes.shape[2] if lengths is None else int(lengths)
    )
    return page_weights_reference(*operands) if result is None else result


def _page_weights_fake(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, far: Tensor | None, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    return weights.new_empty((*weights.shape[:3], -(-codes.shape[2] // page_tokens)))


def attend_pages_reference(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the pages that one query per sequence selects.

    Returns output [B,H,1,R_V] in the dtype of query, and lse [B,H,1], including the value-mean fill if any; and the
    `list_counts` int64 [4].
    """
    lists, odds, counts = list_selected_pages(step)
    output, lse = latent_attention.latent_attention(
        step.query, *step.latents, **step.bit_groups, scale=step.scale, lengths=step.lengths, pages=lists,
        page_tokens=step.page_tokens,
    )  # fmt: skip
    return *page_selection.fill_with_mean(output, lse, step.values, odds, step.fill), counts


def list_selected_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """List the pages that `select_pages` selects for one query per sequence.

    Returns the lists int32 [B,U,N], N = `step.most`, as from `page_lists`; the `odds_left_out` [B,H,1]; and the
    `list_counts` int64 [4].
    """
    weights, constant = page_selection.factors(step.query, step.mean, step.deviation, step.channels)
    sketches = step.codes, step.scales, list(step.bits), list(step.widths), list(step.steps)
    logits = page_weights(
        weights * step.scale, constant * step.scale, *sketches, step.page_tokens, step.far, step.lengths
    )
    estimates = logits.reshape(logits.shape[0], -1, 1, logits.shape[3])
    selected, counts = page_selection.select_pages(estimates, step.rule, step.available(), step.near)
    lists = page_selection.page_lists(selected.squeeze(2), step.most)
    return lists, page_selection.odds_left_out(estimates, selected), counts


def attend_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """Run `fhopt::attend_pages`, or its reference if a gradient is required."""
    if latent_attention.needs_gradient(step.query, step.key, step.value):
        return attend_pages_reference(step)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fhopt.attend_pages(*step)
    return result


def _attend_pages(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    step = PageStep(*operands)
    kernel = registry.kernel_of("attend_pages", step.query.device.type)
    result: tuple[Tensor, Tensor, Tensor] | None = None if kernel is None else kernel(step)
    return attend_pages_reference(step) if result is None else result


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
