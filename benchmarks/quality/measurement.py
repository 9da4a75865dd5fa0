"""Quality measurement of KV caches: implementations, texts, and per-token costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks.quality.methods.quantized_caches import Baseline
from benchmarks.recording import screen
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, paired, read_steps, switched
from fhopt.evaluation.statistics import Comparison, TokenCosts
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens

OURS = "fhopt"
TEXTS = ("source", "license", "docstrings", "scripture")
MIN_TOKENS = 512  # of a text: in a shorter one, most attended tokens are still full-precision
COUNTED_AT = 8192


@dataclass(frozen=True)
class Implementation:
    """A cache to measure: of a plan or of another method. bytes_held: for one sequence of COUNTED_AT tokens."""

    name: str
    family: str
    bytes_held: int
    ratio: float
    plan: LatentPlan | None = None
    baseline: Baseline | None = None

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache."""
        return new_cache(model, self.plan) if self.baseline is None else self.baseline.new_cache(model)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return the context in which `model` runs with the cache."""
        return nullcontext() if self.baseline is None else self.baseline.reading(model)

    @property
    def token_bytes(self) -> float:
        """Bytes per token, with a share of all fixed overhead."""
        return self.bytes_held / COUNTED_AT

    def is_larger(self, other: Implementation) -> bool:
        """Return whether it takes at least as many bytes as `other`."""
        return self.bytes_held >= other.bytes_held


@dataclass(frozen=True, eq=False)
class QualityText:
    """Token ids [T]; `is_unseen` if its domain was not used for calibration."""

    name: str
    ids: Tensor
    is_unseen: bool


class QualityResult:
    """The costs of one implementation on each text."""

    def __init__(self, impl: Implementation) -> None:
        self.impl = impl
        self.costs: dict[QualityText, TokenCosts] = {}

    @cached_property
    def by_text(self) -> dict[QualityText, Comparison]:
        """Comparisons by text; valid once all are measured."""
        return {text: costs.compare() for text, costs in self.costs.items()}

    @cached_property
    def mean(self) -> Comparison:
        """Comparison over the tokens of all held-out texts."""
        parts = [costs for text, costs in self.costs.items() if text.is_unseen]
        return TokenCosts(
            torch.cat([c.exact for c in parts], 1),
            torch.cat([c.plan for c in parts], 1),
            torch.cat([c.kl for c in parts], 1),
        ).compare()

    @property
    def worst(self) -> tuple[QualityText, Comparison]:
        """The held-out text with the largest perplexity increase."""
        return max(((t, c) for t, c in self.by_text.items() if t.is_unseen), key=lambda pair: pair[1].increase_percent)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yield a function of (done, total) that advances it."""
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_texts(
    loaded: LoadedModel, names: Sequence[str], calibration: Sequence[str], context: int, with_seen: bool
) -> list[QualityText]:
    """Load the held-out half of each text, or all of it if the half is too short; at most `context` tokens.

    A built-in text that is not installed, or one that is too short, is skipped with a message.
    """
    texts = []
    for name in dict.fromkeys([*names, *(calibration if with_seen else [])]):
        is_unseen = name not in calibration
        try:
            ids = _tokens(loaded, name, context, whole=is_unseen)
        except FhoptError as error:
            if name not in TEXTS:
                raise
            screen().print(f"{name} is left out: {error}", markup=False)
            continue
        texts.append(QualityText(Path(name).name, ids, is_unseen))
    if not any(text.is_unseen for text in texts):
        raise FhoptError(f"no text is left but {', '.join(calibration)}, which calibrates. Give another with --texts.")
    return texts


def _tokens(loaded: LoadedModel, name: str, context: int, whole: bool) -> Tensor:
    """Return up to `context` token ids [T] of the text called `name`."""
    text = tokens.read_text(name)
    ids = _tokenized(loaded, tokens.halves(text)[1], context)
    if len(ids) < context and whole:
        ids = _tokenized(loaded, text, context)
    if len(ids) < min(MIN_TOKENS, context):
        raise FhoptError(f"{name} has {len(ids)} tokens; expected at least {MIN_TOKENS}. Give a longer text.")
    return ids


def _tokenized(loaded: LoadedModel, text: str, context: int) -> Tensor:
    start = text[: tokens.CHARACTERS_PER_TOKEN * context]
    return torch.as_tensor(loaded.tokenizer(start, return_tensors="pt", verbose=False).input_ids[0][:context])


def measure(
    model: Any, impls: Sequence[Implementation], texts: Sequence[QualityText], steps: LatentPlan
) -> list[QualityResult]:
    """Measure every implementation on every text, in the steps of the plan `steps`."""
    results = [QualityResult(impl) for impl in impls]
    with progress_bar("texts and caches") as bar:
        for index, text in enumerate(texts):
            log_p = exact_log_probabilities(model, text.ids, steps)
            for done, result in enumerate(results, 1):
                result.costs[text] = costs(model, text.ids, result.impl, log_p, steps)
                bar(index * len(results) + done, len(texts) * len(results))
    return results


@torch.inference_mode()
def exact_log_probabilities(model: Any, ids: Tensor, steps: LatentPlan) -> Tensor:
    """Return log p of every next token [T-1, V] with the full-precision cache, float32."""
    with switched(model, None):
        read = read_steps(model, ids[None, :-1], [new_cache(model, None)], steps)
        return torch.cat([logits[0].double().log_softmax(-1).float() for _, (logits,) in read])


def exact_perplexity(model: Any, text: QualityText, steps: LatentPlan) -> float:
    """Return the perplexity of a text with the full-precision cache."""
    log_p = exact_log_probabilities(model, text.ids, steps)
    return float(log_p.gather(1, text.ids[1:, None]).double().mean().neg().exp())


@torch.inference_mode()
def costs(model: Any, ids: Tensor, impl: Implementation, log_p: Tensor, steps: LatentPlan) -> TokenCosts:
    """Return the cost of each token of ids [T] with the cache of `impl`, and with the full-precision cache."""
    with switched(model, impl.plan), impl.reading(model):
        parts = [
            paired(log_p[start : start + logits.shape[1]], logits[0], ids[start + 1 :])
            for start, (logits,) in read_steps(model, ids[None, :-1], [impl.new_cache(model)], steps)
        ]
    return TokenCosts(*torch.cat(parts, -1)[:, None])
