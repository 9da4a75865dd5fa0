"""Long generation: drift of a plan from the exact model, by position of the generated token.

    text = own_text(model, prompt, tokens)         sampled from the exact model
    drift = drift_of(model, prompt, text, plan)    KL and agreement at every position, on the same text

Teacher forcing: both caches process the exact model's own text, so a plan's errors do not lead to another text, and
their growth with the number of generated tokens shows. For free greedy decoding this gives the first token that would
differ. `repeated` detects loops, which small models fall into with any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.evaluation.perplexity import decode_options, new_cache, paired, read_steps, switched
from fhopt.evaluation.statistics import Interval, bootstrap_interval
from fhopt.models.model_facts import check_length
from fhopt.plan.latent_plan import LatentPlan

BLOCK = 64  # generated tokens per bootstrap block
GRAM, NEAR = 4, 256  # a loop: four tokens that also occurred in sequence within the last 256


@dataclass(frozen=True)
class Drift:
    """A plan compared with the full-precision cache on T generated tokens.

    kl [T]: KL(exact || plan) of the distribution that each token is drawn from, in nats, float64. agrees [T]: whether
    both have the same most likely token. change [T]: increase of the token's negative log-likelihood, in nats.
    """

    kl: Tensor
    agrees: Tensor
    change: Tensor

    @property
    def first_difference(self) -> int | None:
        """Number of generated tokens before the first whose most likely token differs; None if all agree."""
        differs = (~self.agrees).nonzero()
        return int(differs[0]) if len(differs) else None

    def kl_between(self, start: int, stop: int) -> tuple[float, Interval | None]:
        """Return the mean KL of tokens [start, stop), and its 95% interval over blocks of 64."""
        part = self.kl[start:stop]
        blocks = part.split(BLOCK)
        return float(part.mean()), bootstrap_interval([float(b.sum()) for b in blocks], [len(b) for b in blocks])


@torch.inference_mode()
def own_text(
    model: Any, prompt: Sequence[int], tokens: int, *, temperature: float = 1.0, seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> list[int]:  # fmt: skip
    """Return `tokens` token ids that the exact model generates after `prompt`, continuing past end tokens.

    temperature: of sampling; 0 is greedy. Raises FhoptError if the model has too few positions.
    """
    check_length(model, len(prompt) + tokens)
    generator = torch.Generator().manual_seed(seed)
    with switched(model, None):
        options = decode_options(model, new_cache(model, None))
        written: list[int] = []
        fed = list(prompt)
        while len(written) < tokens:
            logits = model(torch.tensor([fed], device=model.device), **options).logits[0, -1].float().cpu()
            if temperature:
                fed = [int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))]
            else:
                fed = [int(logits.argmax())]
            written += fed
            progress(len(written))
    return written


@torch.inference_mode()
def drift_of(
    model: Any, prompt: Sequence[int], text: Sequence[int], plan: LatentPlan,
    progress: Callable[[int], None] = lambda n: None,
) -> Drift:  # fmt: skip
    """Compare a plan with the full-precision cache on `text` after `prompt`, in one pass with both.

    Applies the plan, and restores the model afterwards. Raises FhoptError if the plan is not for this model, or the
    text exceeds the model's positions.
    """
    check_length(model, len(prompt) + len(text))
    ids = torch.tensor([[*prompt, *text]])
    first = len(prompt) - 1
    kl, agrees, change = [], [], []
    with switched(model, plan):
        caches = [new_cache(model, None), new_cache(model, plan)]
        for at, (exact, planned) in read_steps(model, ids[:, :-1], caches, plan, first):
            costs = paired(exact[0], planned[0], ids[0, at + 1 :])
            kl.append(costs[2])
            change.append(costs[1] - costs[0])
            agrees.append((exact[0].argmax(-1) == planned[0].argmax(-1)).cpu())
            progress(at - first + exact.shape[1])
    return Drift(torch.cat(kl), torch.cat(agrees), torch.cat(change))


def repeated(text: Sequence[int]) -> float:
    """Return the share of tokens that complete a 4-gram seen in the previous 256 tokens: near 1 in loops."""
    if len(text) < GRAM:
        return 0.0
    last: dict[tuple[int, ...], int] = {}
    hits = 0
    for end in range(GRAM, len(text) + 1):
        gram = tuple(text[end - GRAM : end])
        hits += gram in last and end - last[gram] <= NEAR
        last[gram] = end
    return hits / (len(text) - GRAM + 1)
