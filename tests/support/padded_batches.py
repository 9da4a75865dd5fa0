"""Left-padded batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_models import cached, token_ids
from torch import Tensor

from fhopt.evaluation.perplexity import switched
from fhopt.hf.apply import latent_cache
from fhopt.plan.latent_plan import LatentPlan


def padded(lengths: Sequence[int], later: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B,T], of prompts of these lengths followed by `later` tokens."""
    longest = max(lengths)
    ids = token_ids(len(lengths), longest + later)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return ids, mask


def alone(ids: Tensor, mask: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Return one sequence of a batch without its padding."""
    own = ids[row : row + 1, mask[row].bool()]
    return own, torch.ones_like(own)


@torch.no_grad()
def read(model: Any, plan: LatentPlan | None, batch: tuple[Tensor, Tensor], later: int, **options: Any) -> Any:
    """Prefill, then decode `later` tokens one by one; return the logits [B,1+later,V] and the cache.

    plan: None for the unmodified model.
    """
    with switched(model, plan):
        cache = options.pop("cache", None) or (latent_cache(model, **options) if plan else None)
        parts, prompt = [], batch[0].shape[1] - later
        output = call(model, batch, (0, prompt), cache)
        cache = output.get("cache", output.get("past_key_values"))
        parts.append(output.logits[:, -1:])
        parts += [call(model, batch, (t, t + 1), cache).logits for t in range(prompt, prompt + later)]
    return torch.cat(parts, 1), cache


def call(model: Any, batch: tuple[Tensor, Tensor], part: tuple[int, int], cache: Any) -> Any:
    """Call a model on a range of the tokens, with the mask and positions that `generate` passes."""
    (start, stop), (ids, mask) = part, batch
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
    options = {} if cache is None else cached(cache)
    return model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, use_cache=True, **options)


def divergence(found: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of logits from the expected ones, in nats."""
    log, other = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((log.exp() * (log - other)).sum(-1).mean())
