"""Fitting pipeline: the only way from a model to a plan.

    data          of text, batches or recorded calls               fhopt/calibration/data.py
    calibration   statistics, bases, costs, KL of two plans        fhopt/calibration/run.py
    plan          of a ratio, bytes per token or a loss target     fhopt/calibration/run.py, fhopt/refine/loss_target.py
    pages         page selection                                   fhopt/refine/page_budget.py

No step modifies the results of earlier ones. `fhopt fit`, `fhopt calibrate`, `fhopt plans fit`, `fhopt demo`,
`fhopt.fit` and the backend's online fit run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration import data as calibration_data
from fhopt.calibration.data import CalibrationData
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import Calibration, calibrate, plan_from_calibration
from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import Comparison
from fhopt.models.loaded_model import LoadedModel
from fhopt.parallel import collectives
from fhopt.plan.cache_size import exact_bytes, layers_of
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.request import PlanRequest
from fhopt.progress import Progress, silent
from fhopt.refine import loss_target, page_budget, page_options


@dataclass(frozen=True)
class FitSource:
    """A model and the data that a plan is fitted to.

    calibration_data: loads the data; not called if there is a calibration. loaded: the language model that loss targets
    and page selection run; None for modules without token ids. held_out: token ids [N, T] for a loss target; None: load
    them from its texts.
    """

    calibration_data: Callable[[FitOptions], CalibrationData]
    loaded: LoadedModel | None = None
    held_out: Tensor | None = None


@dataclass(frozen=True)
class FittedPlan:
    """A plan, the calibration that it was fitted to, and the quality of the plans that were tried, by ratio."""

    plan: LatentPlan
    calibration: Calibration
    trials: dict[float, Comparison] = field(default_factory=dict)


def text_source(loaded: LoadedModel | None) -> FitSource:
    """Fit a causal language model to text. loaded: None if the request has a calibration and does not run a model.

    Raises FhoptError if it is no causal language model with a tokenizer.
    """
    if loaded is not None:
        loaded.language_model()

    def read(options: FitOptions) -> CalibrationData:
        assert loaded is not None, "a request without a calibration comes with a model"
        return calibration_data.of_text(loaded, options)

    return FitSource(read, loaded)


def batches_source(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> FitSource:
    """Fit any module to batches of keyword arguments."""
    return FitSource(lambda _: calibration_data.of_batches(model, batches))


def calls_source(model: Any, ids: Tensor, held_out: Tensor) -> FitSource:
    """Fit a causal language model to recorded token ids [N, T]; held_out: ids for measuring quality."""
    name = type(model).__name__
    loaded = LoadedModel(name, model, tokenizer=model)  # placeholder tokenizer, never called: all text is token ids
    return FitSource(lambda _: calibration_data.of_sequences(model, ids), loaded, held_out)


def calibrate_source(
    source: FitSource, options: FitOptions, progress: Progress = silent, layouts: Sequence[str] = (), **about: Any
) -> Calibration:
    """Calibrate a model. about: further provenance. Raises FhoptError."""
    data = source.calibration_data(options)
    return calibrate(replace(data, about={**data.about, **about}), options, progress, layouts)


def fit_plan(source: FitSource, request: PlanRequest, progress: Progress = silent) -> FittedPlan:
    """Run the pipeline; under torchrun all processes get the same plan. Raises FhoptError."""
    request, held_out = _for_source(request, source), _held_out(source, request)
    calibration = request.calibration or calibrate_source(source, request.options, progress)
    return _finished(source, calibration, request, held_out, progress)


def fit_to_text(loaded: LoadedModel, options: FitOptions, progress: Progress = silent) -> FittedPlan:
    """Run the pipeline for a causal language model with the texts and ratio of the options. Raises FhoptError."""
    return fit_plan(text_source(loaded), PlanRequest(options), progress)


def fit_in_first_process(
    source: FitSource, request: PlanRequest, progress: Progress = silent, **about: Any
) -> FittedPlan | None:
    """Run the pipeline; under torchrun, all but the first process leave after calibration and get None.

    about: further provenance of the plan. Raises FhoptError.
    """
    request, held_out = _for_source(request, source), _held_out(source, request)
    calibration = request.calibration or calibrate_source(source, request.options, progress, **about)
    if collectives.leave() > 0:
        return None
    return _finished(source, calibration, request, held_out, progress)


def _finished(
    source: FitSource, calibration: Calibration, request: PlanRequest, held_out: Tensor | None, progress: Progress
) -> FittedPlan:
    """Fit the plan to the calibration, with page selection if it is requested. Raises FhoptError."""
    fitted = _sized(source, calibration, request, held_out, progress)
    if request.pages is None or source.loaded is None:
        return fitted
    return replace(fitted, plan=page_budget.calibrate_pages(source.loaded, fitted.plan, request.pages, progress))


def _for_source(request: PlanRequest, source: FitSource) -> PlanRequest:
    """Check a request against the model, before anything slow starts. Raises FhoptError."""
    if request.runs_model and source.loaded is None:
        raise FhoptError(
            "max_loss and pages require text; expected a causal language model and its tokenizer. Pass both, "
            "or drop max_loss and pages."
        )
    if request.calibration is not None and source.loaded is not None:
        request.calibration.check_model(source.loaded)
    if request.pages is None or source.loaded is None:
        return request
    options = request.options
    pages = page_options.for_model(source.loaded, request.pages, options.block, options.window.first_length)
    return replace(request, pages=pages)


def _held_out(source: FitSource, request: PlanRequest) -> Tensor | None:
    """Return the token ids [N, T] for measuring a loss target; None without a target. Raises FhoptError."""
    if request.gate is None or source.loaded is None:
        return None
    if source.held_out is not None:
        return source.held_out
    return loss_target.held_out(source.loaded, request.options, request.gate)


def _sized(
    source: FitSource, calibration: Calibration, request: PlanRequest, held_out: Tensor | None, progress: Progress
) -> FittedPlan:
    """Fit the plan at the requested size. Raises FhoptError."""
    options = request.options
    if request.bytes_per_token is not None:
        options = replace(options, ratio=_ratio_of(calibration, request.bytes_per_token, options.tokens))
        options.check()
    if request.gate is None or held_out is None or source.loaded is None:
        return FittedPlan(plan_from_calibration(calibration, options), calibration)
    plan, trials = loss_target.smallest_plan(source.loaded, calibration, options, request.gate, held_out, progress)
    return FittedPlan(plan, calibration, trials)


def _ratio_of(calibration: Calibration, bytes_per_token: float, tokens: int) -> float:
    """Return the compression ratio of a cache with `bytes_per_token`, at a context of `tokens` tokens."""
    sites = [s.site for s in calibration.statistics.values()]
    exact = exact_bytes(sites, tokens, layers_of(calibration.provenance)) / tokens
    if not 0 < bytes_per_token <= exact:
        raise FhoptError(
            f"{bytes_per_token:g} bytes per token is out of range; expected more than 0 and at most {exact:,.0f}, the "
            "size of the full-precision KV cache. Set a size in this range."
        )
    return float(exact / bytes_per_token)
