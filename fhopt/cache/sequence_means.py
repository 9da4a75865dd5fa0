"""Means of a sequence's keys and values, from which packed latents are differences.

What keys and values have in common over a text (a key bias, a language, a subject) is not the same in another text, and
no basis that was fitted before has bits for all of it; and what a latent loses of it is lost in all tokens alike, so
that attention does not average it out. Encoded is therefore x - m, with m the mean over the first tokens behind the
attention sinks that a cache sees, at most `LatentPlan.mean_tokens`: it costs a vector a sequence, and attention adds it
back once a query (`fhopt.attention.operands.with_means`). As zero points of KIVI (2402.02750) it adapts to the text;
that a mean of keys cancels in a softmax is what SageAttention (2410.02367) smooths keys by.

Where logits are capped, a mean of keys would not cancel, and is zero.

Letters: B batch, G kv heads, S new tokens, D and E head size of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.cache.left_padding import LeftPadding
from fhopt.cache.store import Store

MEANS = "means"  # the store's name in files


class SequenceMeans(Store):
    """Means of keys [B,G,1,D] and of values [B,G,1,E], float32, each of the tokens that came first."""

    def __init__(self, sinks: int, tokens: int, of_keys: bool) -> None:
        self.sinks, self.tokens, self.of_keys = sinks, tokens, of_keys

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Begin with zeros, for keys and values like these."""
        self.parts = tuple([x.new_zeros((*x.shape[:2], 1, x.shape[3]), dtype=torch.float32) for x in (keys, values)])

    def see(self, keys: Tensor, values: Tensor, length: int | Tensor, padding: LeftPadding | None = None) -> None:
        """Take the means of new tokens [B,G,S,D], `length` tokens before them, unless there are means already.

        The means are of the first call with a token behind the sinks: with padding, behind those of each sequence.
        length on a device changes the means in place.
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
        """Take means of each sequence, behind its own attention sinks."""
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
        """Compute means of keys and values [B,G,S,D]. behind, [N] or [B,1,N]: of the first N, from the start."""
        counted = ((behind >= 0) & (behind < self.tokens)).float()
        weights = (counted / counted.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        seen = behind.shape[-1]
        means = [(x[:, :, :seen].detach().float() * weights).sum(2, keepdim=True) for x in (keys, values)]
        return tuple(means) if self.of_keys else (self.parts[0], means[1])

    def _replace(self, means: tuple[Tensor, ...], where: Tensor) -> None:
        """Take these means in place, where this is so."""
        for part, mean in zip(self.parts, means, strict=True):
            part.copy_(torch.where(where, mean, part))

    def differences(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B,G,S,D] less the means, float32 or as exact as they come."""
        return keys - self.parts[0], values - self.parts[1]
