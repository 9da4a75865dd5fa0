"""Healing: recompute a plan's decoder matrices by least squares on the attention of a text.

    keys    minimize  sum over tokens   w |k - D z|^2                    w: total attention weight of the token
    values  minimize  sum over queries  |sum over tokens p (v - D z)|^2  p: attention weight of the token in this query

Only `decode` of each side of each site changes, so the size of the plan does not; z is the quantized latent as cached.
A plan is fitted as if errors of tokens were independent, but they are not: rounding errors average out over the tokens
that a query attends to, while a common error does not. The decoder of values is therefore fitted to attention-weighted
averages. A key acts before the softmax, one token at a time, so it is enough to weight tokens by their attention.

Both are linear least squares. The normal equations are sums over forward passes of the exact model: no gradient, no
learning rate, and the order of the text does not matter. A ridge regularizes towards the plan's decoder, because a text
has few distinct averages: solved for the values of 4 sequences with almost no ridge, SmolLM2's loss falls by 40% on
these and rises by 15% on others. Only tokens that a cache would quantize count. Channels that decode to no common
element stay separate, so the layout does not change.

Least squares on the output of a layer, as for weights in AdaRound (2004.10568) and GPTQ (2210.17323).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from fhopt.calibration.checkpoint import SAVE_EVERY, Checkpoint, ResumableStage
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import switched, token_costs
from fhopt.evaluation.statistics import Comparison
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length
from fhopt.plan.fingerprint import check_fingerprint, fingerprint
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import QUALITY
from fhopt.progress import Progress, silent
from fhopt.refine.decoder_equations import CapturedModel, Equations, solved
from fhopt.refine.options import HealOptions
from fhopt.texts import tokens as texts_tokens
from fhopt.version import __version__

HEALING = ResumableStage("heal", "healing", "heal", "model, plan, text or version", unit="sequences", is_suffix=False)


def heal(
    loaded: LoadedModel, plan: LatentPlan, options: HealOptions | None = None, progress: Progress = silent
) -> LatentPlan:
    """Return the plan with decoders refitted on a text, at the same size; provenance under `healing`.

    `loaded` is a causal language model with its tokenizer; it is not modified. The KL and perplexity in the provenance
    are measured with the real KV cache. Raises FhoptError for invalid options, for another model's plan or checkpoint,
    and if the KL did not fall.
    """
    options = options or HealOptions()
    options.check()
    options.check_plan(plan)
    network = loaded.language_model()
    check_length(network, options.context)
    check_fingerprint(plan, dict(network.named_parameters()), loaded.name)
    ids, test = _texts(loaded, options)
    checkpoint = Checkpoint(options.checkpoint, _key(loaded, plan, ids), HEALING)
    checkpoint.check()
    with switched(network, None):
        reader = CapturedModel.of(loaded.capture(options.context), plan)
    before = _measure(network, test, plan, "before", progress)
    healed = solved(plan, read(reader, ids, checkpoint, progress), options.ridge)
    after = _measure(network, test, healed, "after", progress)
    checkpoint.remove()
    if not after.kl < before.kl:
        raise FhoptError(
            f"healing changed the held-out KL from {before.kl:.4g} to {after.kl:.4g} nats/token; expected a "
            "decrease. Use more tokens or text closer to the model's use, or raise --ridge."
        )
    return _with_provenance(healed, _record(plan, options, ids, before, after))


def _texts(loaded: LoadedModel, options: HealOptions) -> tuple[Tensor, Tensor]:
    """Return token ids (for solving [N, T], held out [M, T])."""
    length = options.context
    ids = texts_tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=length)
    return ids, texts_tokens.held_out_ids(loaded.tokenizer, options.texts, count=options.held_out, length=length)


def _measure(network: nn.Module, ids: Tensor, plan: LatentPlan, stage: str, progress: Progress) -> Comparison:
    """Compare the plan with the exact model on ids [N, T], with the real KV cache."""
    done = 0

    def count(sequences: int) -> None:
        nonlocal done
        done += sequences
        progress(stage, done, len(ids))

    return token_costs(network, ids, plan, count).compare()


def _record(
    plan: LatentPlan,
    options: HealOptions,
    ids: Tensor,
    before: Comparison,
    after: Comparison,
) -> dict[str, Any]:
    """Return the provenance entry; JSON values only."""
    return {
        "texts": list(options.texts),
        "text_sha256": texts_tokens.tokens_digest(ids),
        "tokens": int(ids.numel()),
        "context": options.context,
        "ridge": options.ridge,
        "healed_from": plan.digest(),
        "before": asdict(before),
        "after": asdict(after),
        "versions": {"fhopt": __version__, "torch": torch.__version__},
    }


def _with_provenance(plan: LatentPlan, record: dict[str, Any]) -> LatentPlan:
    """Add the record of the healing and drop measurements of the previous decoders."""
    kept = {name: value for name, value in plan.provenance.items() if name not in ("gate", QUALITY)}
    return replace(plan, provenance=kept | {"healing": record})


# --------------------------------------------------------------------------------------------------- reading


def read(reader: CapturedModel, ids: Tensor, checkpoint: Checkpoint, progress: Progress = silent) -> Equations:
    """Accumulate the equations over all rows of ids [N, T]. Raises FhoptError if keys or values are not finite."""
    tensors, done = checkpoint.load()
    equations = Equations.of(tensors)
    for row in range(done, len(ids)):
        reader.read(ids[row : row + 1], equations)
        if not all(bool(x.isfinite().all()) for x in equations.error.values()):
            checkpoint.remove()
            raise FhoptError("the model's keys or values are not finite on this text. Use another dtype or text.")
        progress(HEALING.name, row + 1, len(ids))
        if (row + 1) % SAVE_EVERY == 0 or row + 1 == len(ids):
            checkpoint.save(equations.tensors(), row + 1)
    return equations


# --------------------------------------------------------------------------------------------------- checkpoints


def _key(loaded: LoadedModel, plan: LatentPlan, ids: Tensor) -> dict[str, Any]:
    """Return what must be equal when an interrupted healing resumes; JSON values only."""
    weights = dict(loaded.language_model().named_parameters())
    return {
        "model": loaded.name,
        "weights": fingerprint(weights, [p.site for p in plan.sites]),
        "dtype": str(next(iter(weights.values())).dtype),
        "plan": plan.digest(),
        "data": texts_tokens.tokens_digest(ids),
        "version": __version__,
    }
