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

from fhopt.cache.store import Store

MEANS = "means"  # the store's name in files


class SequenceMeans(Store):
    """Means of keys [B,G,1,D] and of values [B,G,1,E], float32, each of the tokens that came first."""

    def __init__(self, sinks: int, tokens: int, of_keys: bool) -> None:
        self.sinks, self.tokens, self.of_keys = sinks, tokens, of_keys

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Begin with zeros, for keys and values like these."""
        self.parts = tuple([x.new_zeros((*x.shape[:2], 1, x.shape[3]), dtype=torch.float32) for x in (keys, values)])

    def see(self, keys: Tensor, values: Tensor, length: int | Tensor) -> None:
        """Take the means of new tokens [B,G,S,D], `length` tokens before them, unless there are means already.

        The means are of the first call with a token behind the sinks. length on a device changes the means in place.
        """
        on_host = isinstance(length, int)
        if on_host and not length <= self.sinks < length + keys.shape[2]:
            return
        seen = min(keys.shape[2], self.sinks + self.tokens)
        behind = torch.arange(seen, device=keys.device) + length - self.sinks
        counted = ((behind >= 0) & (behind < self.tokens)).float()
        weights = (counted / counted.sum().clamp(min=1)).unsqueeze(1)
        means = [(x[:, :, :seen].detach().float() * weights).sum(2, keepdim=True) for x in (keys, values)]
        if not self.of_keys:
            means[0] = self.parts[0]
        if on_host:
            self.parts = tuple(means)
            return
        is_first = (length <= self.sinks) & (behind[-1] >= 0)
        for part, mean in zip(self.parts, means, strict=True):
            part.copy_(torch.where(is_first, mean, part))

    def differences(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B,G,S,D] less the means, float32 or as exact as they come."""
        return keys - self.parts[0], values - self.parts[1]
