"""Means of a sequence's keys and values, subtracted before encoding.

What keys and values of a text have in common (key bias, language, subject) differs between texts, and no fitted basis
has bits for all of it. An error in it is the same for all tokens, so attention does not average it out. Encoded is
therefore x - m, with m the mean over the first tokens after the attention sinks, at most `LatentPlan.mean_tokens`. This
costs one vector per sequence, and attention adds m back once per query (`fhopt.attention.operands.with_means`). Like
the zero points of KIVI (2402.02750) it adapts to the text; that a mean of keys cancels in the softmax is also used by
SageAttention (2410.02367) to smooth keys.

With softcapped logits a mean of keys would not cancel, and is zero.

Letters: B batch, G kv heads, S new tokens, D and E head size of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.cache.left_padding import LeftPadding
from fhopt.cache.store import Store

MEANS = "means"  # store name in files


class SequenceMeans(Store):
    """Means of keys [B,G,1,D] and of values [B,G,1,E], float32, over a sequence's first tokens."""

    def __init__(self, sinks: int, tokens: int, of_keys: bool) -> None:
        self.sinks, self.tokens, self.of_keys = sinks, tokens, of_keys

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Start with zeros, for keys and values like these."""
        self.parts = tuple([x.new_zeros((*x.shape[:2], 1, x.shape[3]), dtype=torch.float32) for x in (keys, values)])

    def see(self, keys: Tensor, values: Tensor, length: int | Tensor, padding: LeftPadding | None = None) -> None:
        """Compute the means from new tokens [B,G,S,D] at index `length`, unless there are means already.

        The means are of the first call with a token after the sinks; with padding, after each sequence's own sinks. A
        `length` on the device updates the means in place.
        """
        if padding is not None and padding.parts:
            return self._see_each(keys, values, length, padding)
        on_host = isinstance(length, int)
        if on_host and not length <= self.sinks < length + keys.shape[2]:
            return None
        seen = min(keys.shape[2], self.sinks + self.tokens)
        behind = torch.arange(seen, device=keys.device) + length - self.sinks
        means = self._of(keys, values, behind)
        if on_host:
            self.parts = means
        else:
            self._replace(means, (length <= self.sinks) & (behind[-1] >= 0))
        return None

    def _see_each(self, keys: Tensor, values: Tensor, length: int | Tensor, padding: LeftPadding) -> None:
        """Compute the means of each sequence, after its own attention sinks."""
        seen, starts = keys.shape[2], padding.starts
        if isinstance(length, int):
            if length > padding.reach:
                return
            seen = min(seen, padding.reach + self.tokens)
        behind = torch.arange(seen, device=keys.device) + length - starts  # [B,1,N]
        is_first = ((length <= starts) & (behind[..., -1:] >= 0)).unsqueeze(-1)
        means = self._of(keys, values, behind)
        if isinstance(length, int):
            self.parts = tuple([torch.where(is_first, *pair) for pair in zip(means, self.parts, strict=True)])
        else:
            self._replace(means, is_first)

    def _of(self, keys: Tensor, values: Tensor, behind: Tensor) -> tuple[Tensor, ...]:
        """Compute means of keys and values [B,G,S,D]. behind, [N] or [B,1,N]: token indices after the sinks."""
        counted = ((behind >= 0) & (behind < self.tokens)).float()
        weights = (counted / counted.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        seen = behind.shape[-1]
        means = [(x[:, :, :seen].detach().float() * weights).sum(2, keepdim=True) for x in (keys, values)]
        return tuple(means) if self.of_keys else (self.parts[0], means[1])

    def _replace(self, means: tuple[Tensor, ...], where: Tensor) -> None:
        """Update the means in place where the condition holds."""
        for part, mean in zip(self.parts, means, strict=True):
            part.copy_(torch.where(where, mean, part))

    def differences(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract the means from keys and values [B,G,S,D], in float32 or the tokens' higher precision."""
        return keys - self.parts[0], values - self.parts[1]
