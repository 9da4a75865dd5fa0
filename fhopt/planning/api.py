"""Python entry point for fitting a plan: `fhopt.fit`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration.options import DEFAULT_TEXTS
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.expected_loss import calibration_warning
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.pipeline import FitSource, batches_source, fit_plan, text_source
from fhopt.planning.request import PlanRequest, read_request


def fit(
    model: torch.nn.Module | None,
    tokenizer: Any = None,
    *,
    text: str | Sequence[str] | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    statistics: str | Path | None = None,
    ratio: float | None = None,
    bytes_per_token: float | None = None,
    max_loss: float | str | None = None,
    gate_text: str | Sequence[str] = (),
    pages: float | str | None = None,
    mass: float | str | None = None,
    **options: Any,
) -> LatentPlan:
    """Calibrate a model and fit a plan for it: `fhopt fit` from Python, with the same options and defaults.

    A causal language model with its tokenizer is calibrated on `text`: a file, a folder or a built-in name (see
    `fhopt.texts.tokens`), or several. Any other module is calibrated on `batches`: dicts of keyword arguments, all of
    the same shapes; its output counts as logits if the model names it so. statistics: file of `fhopt calibrate` to use
    instead of a calibration; the model is then needed only for `max_loss` and `pages`.

    One of these sets the size: ratio, how many times smaller than the 16-bit KV cache (default 4); bytes_per_token;
    max_loss, the largest increase of perplexity, such as 0.01 or "1%", measured on the second half of `gate_text`
    (default: of `text`). pages: page selection, the share of quantized tokens that a decode step attends to on average,
    such as "1/8". mass: select fewer pages as long as they hold this share of the attention weight. options: other
    fields of `fhopt.calibration.options.FitOptions`, such as `device="here"` for a plan that is fast on this CPU.

    Raises FhoptError for invalid options and models without attention. Warns if the bases were fitted to too few
    tokens.
    """
    texts = DEFAULT_TEXTS if text is None else (text,) if isinstance(text, str) else tuple(text)
    given = {*options, *(() if text is None else ("texts",))}
    request = read_request(
        ratio=ratio, bytes_per_token=bytes_per_token, max_loss=max_loss,
        gate_texts=(gate_text,) if isinstance(gate_text, str) else gate_text, pages=pages, mass=mass,
        statistics=statistics, options={"texts": texts} | options, given=given,
        has_texts=batches is None,
    )  # fmt: skip
    plan = fit_plan(_source(model, tokenizer, batches, request), request).plan
    if warning := calibration_warning(plan):
        warnings.warn(warning, UserWarning, stacklevel=2)
    return plan


def _source(
    model: torch.nn.Module | None, tokenizer: Any, batches: Iterable[Mapping[str, Tensor]] | None, request: PlanRequest
) -> FitSource:
    """Return the model and data that the plan is fitted to. Raises FhoptError."""
    if batches is not None:
        if model is None or request.calibration is not None:
            raise FhoptError(
                "batches require a model and exclude statistics. Pass a model, and either batches or statistics."
            )
        return batches_source(model, batches)
    if not request.needs_model:
        return text_source(None)
    if model is None or tokenizer is None:
        raise FhoptError(
            "neither a tokenizer nor batches was passed; expected a language model's tokenizer, or "
            "`batches=` with keyword arguments for any other module. Pass one of them."
        )
    return text_source(LoadedModel(type(model).__name__, model, tokenizer))
