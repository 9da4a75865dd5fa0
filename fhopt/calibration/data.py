"""Calibration data: a captured model and its batches, from text, user batches or recorded calls.

of_text        sequences of the first halves of texts, for causal language models
of_batches     keyword arguments, for any module
of_sequences   token ids recorded from calls of a language model
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration.offloaded_probe import Dispatched, find_dispatched, is_dispatched
from fhopt.calibration.options import FitOptions
from fhopt.calibration.probe import Batch
from fhopt.errors import FhoptError
from fhopt.models.cache_layers import measured_layers
from fhopt.models.capture import Captured, capture
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length, check_segments, counts_in_images, encoder_path
from fhopt.parallel.offloaded_weights import Weights
from fhopt.parallel.tensor_parallel import check_whole
from fhopt.plan.cache_size import record_of
from fhopt.texts import tokens as texts_tokens

Source = Captured | Dispatched  # what calibration runs
MAX_CHECKED_TEXTS = 8  # held-out sequences for measuring the KL of plans


@dataclass(frozen=True)
class CalibrationData:
    """A captured model and its calibration batches.

    source: the captured model. batches: keyword arguments, all of the same shapes; the first `FitOptions.sequences` fit
    the bases, the next `rate_sequences` choose the bits. weights: parameters by name. name: of the model, in messages
    and provenance. digest: identifies the data in checkpoints. encoder: path of a module whose sites get no bytes,
    because nothing of it is cached. held_out: (text, batch) pairs for measuring the KL of plans. about: provenance of
    the plans, JSON values. has_means, has_segments: whether latents may be relative to means and to segments of a
    sequence.
    """

    source: Source
    batches: Iterable[Mapping[str, Tensor]]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "model"
    digest: str = ""
    encoder: str | None = None
    held_out: Sequence[tuple[str, Batch]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    has_means: bool = True
    has_segments: bool = True


def of_text(loaded: LoadedModel, options: FitOptions) -> CalibrationData:
    """Load calibration sequences of a causal language model from the first halves of the texts. Raises FhoptError."""
    options.check()
    model = loaded.language_model()
    in_images = counts_in_images(model.config)
    check_segments(model.config, 0 if in_images and options.segment is None else options.segment_tokens, loaded.name)
    check_whole(model)
    check_length(model, options.context)
    count = options.sequences + options.rate_sequences
    ids = texts_tokens.calibration_ids(loaded.tokenizer, options.texts, count=count, length=options.context)
    batches = [_batch(row) for row in ids]
    source: Source = find_dispatched(model, batches[0]) if is_dispatched(model) else loaded.capture(options.context)
    digest = texts_tokens.tokens_digest(ids)
    about = {
        "model": loaded.name,
        "texts": list(options.texts),
        "text_sha256": digest,
        "tokens": int(ids.numel()),
        "context": options.context,
    }
    return CalibrationData(
        source, batches, Weights(model), loaded.name, digest, held_out=_held_out(loaded, options),
        about=about | record_of(measured_layers(model)), has_segments=not in_images,
    )  # fmt: skip


def _batch(ids: Tensor) -> Batch:
    """Return the keyword arguments for one sequence [T]."""
    return {"input_ids": ids.unsqueeze(0)}


def _held_out(loaded: LoadedModel, options: FitOptions) -> list[tuple[str, Batch]]:
    """Return a sequence from the second half of each text, by text name; two sequences for a single text."""
    names = options.texts[:MAX_CHECKED_TEXTS] if len(options.texts) > 1 else options.texts * 2
    try:
        ids = texts_tokens.held_out_ids(loaded.tokenizer, options.texts, count=len(names), length=options.context)
    except FhoptError:  # too short: skip the KL check
        return []
    return [(name, _batch(row)) for name, row in zip(names, ids, strict=True)]


def of_batches(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> CalibrationData:
    """Use batches of keyword arguments of any module, all of the same shapes. Raises FhoptError.

    For a transformers encoder-decoder, only the decoder's sites are fitted. Latents are relative neither to means nor
    to segments, because only fhopt's KV cache handles these and a module may store its latents elsewhere.
    """
    check_whole(model)
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise FhoptError("there are no batches; expected an iterable of dicts of keyword arguments. Pass at least one.")
    source: Source = find_dispatched(model, first) if is_dispatched(model) else capture(model, (), first)
    return CalibrationData(
        source, itertools.chain([first], remaining), Weights(model), type(model).__name__, encoder=encoder_path(model),
        about=record_of(measured_layers(model)), has_means=False,
    )  # fmt: skip


def of_sequences(model: Any, ids: Tensor) -> CalibrationData:
    """Use recorded token ids [N, T] of a causal language model."""
    first = {"input_ids": ids[:1].to(next(model.parameters()).device), "use_cache": False}
    name = type(model).__name__
    return CalibrationData(
        capture(model, (), first, reset=False), map(_batch, ids), dict(model.named_parameters()), name,
        about={"model": name, "texts": ["the calls of the model"], "tokens": int(ids.numel())}, has_means=False,
    )  # fmt: skip
