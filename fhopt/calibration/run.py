"""The main job as one call: find, calibrate, fit. `fhopt.fit`, `fhopt fit` and `fhopt demo` all come through here."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration import checkpoint as calibration_checkpoint
from fhopt.calibration import collect
from fhopt.calibration.offloaded_probe import Dispatched, find_dispatched, is_dispatched
from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.fitting import allocation, fit_plan
from fhopt.fitting import statistics as fitting_statistics
from fhopt.fitting.statistics import SiteStatistics
from fhopt.models.capture import Captured, capture
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length, encoder_path, is_inside
from fhopt.models.sites import raise_nothing_found
from fhopt.parallel import collectives
from fhopt.parallel.offloaded_weights import Weights
from fhopt.parallel.tensor_parallel import check_whole
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.plan.fingerprint import fingerprint, weight_prints
from fhopt.plan.latent_plan import LatentPlan
from fhopt.progress import Progress, silent
from fhopt.texts import tokens as texts_tokens
from fhopt.version import __version__

Source = Captured | Dispatched  # what calibration runs


@dataclass
class Measured:
    """What calibration found out about a model: enough for plans of any size."""

    statistics: dict[str, SiteStatistics]
    found: allocation.Candidates
    outcome: passes_outcome.Outcome
    provenance: dict[str, Any]
    weights: Mapping[str, Tensor]


def fit(
    loaded: LoadedModel, options: FitOptions, progress: Progress = silent
) -> tuple[LatentPlan, passes_outcome.Outcome]:
    """Calibrate `loaded` (a causal language model) and fit a plan. Raises FhoptError."""
    measured = measure(loaded, options, progress)
    return plan_for(measured, options), measured.outcome


def plan_for(measured: Measured, options: FitOptions) -> LatentPlan:
    """A plan from what was measured, with its provenance. Raises FhoptError."""
    plan = fit_plan.fit(
        measured.statistics, found=measured.found, ratio=options.ratio, layout=options.layout, bits=options.bits,
        sinks=options.sinks, recent=options.recent, block=options.block, window_bits=options.window_bits,
        tokens=options.tokens, device=options.device,
    )  # fmt: skip
    sites = [s.site for s in plan.sites]
    prints = dict(fingerprint=fingerprint(measured.weights, sites), weights=weight_prints(measured.weights, sites))
    return plan.with_provenance(**prints, **measured.provenance)


def measure(loaded: LoadedModel, options: FitOptions, progress: Progress = silent) -> Measured:
    """Calibrate a causal language model on the first halves of the texts. Raises FhoptError."""
    options.check()
    model = loaded.language_model()
    check_whole(model)
    check_length(model, options.context)
    count = options.sequences + options.rate_sequences
    ids = texts_tokens.calibration_ids(loaded.tokenizer, options.texts, count=count, length=options.context)
    batches = [{"input_ids": row.unsqueeze(0)} for row in ids]
    captured: Source = find_dispatched(model, batches[0]) if is_dispatched(model) else loaded.capture(options.context)
    provenance = {
        "model": loaded.name,
        "texts": list(options.texts),
        "text_sha256": texts_tokens.digest(ids),
        "tokens": int(ids.numel()),
        "context": options.context,
    }
    weights, digest = Weights(model), provenance["text_sha256"]
    measured = measure_batches(captured, batches, options, weights, loaded.name, progress, digest)
    measured.provenance |= provenance
    return measured


def measure_module(
    model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, progress: Progress = silent
) -> Measured:
    """Calibrate any module on batches of keyword arguments, all of the same shapes. Raises FhoptError.

    The first `options.sequences` batches fit the bases, the others the bits; further options of the text are not used.
    Of an encoder-decoder of transformers, the decoder's sites are fitted: nothing of its encoder is cached.
    """
    options.check_sizes()
    check_whole(model)
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise FhoptError("there are no batches; expected an iterable of dicts of keyword arguments.")
    captured: Source = find_dispatched(model, first) if is_dispatched(model) else capture(model, (), first)
    chained = itertools.chain([first], given)
    weights, name = Weights(model), type(model).__name__
    return measure_batches(captured, chained, options, weights, name, progress, encoder=encoder_path(model))


def measure_batches(
    captured: Source, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, weights: Mapping[str, Tensor],
    name: str, progress: Progress = silent, data_digest: Any = "", encoder: str | None = None,
) -> Measured:  # fmt: skip
    """The two calibration passes over batches. Under torchrun, each process takes its share and all get the sum.

    What fails in one process fails in all (`gathering.together`). data_digest tells the data of one calibration from
    another's, for checkpoints. encoder: path of a module of which nothing is cached, so that its sites get no bytes; a
    model that is nothing else keeps them.
    """
    with collectives.together():
        return _measure_batches(captured, batches, options, weights, name, progress, data_digest, encoder)


def _measure_batches(
    captured: Source, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, weights: Mapping[str, Tensor],
    name: str, progress: Progress, data_digest: Any, encoder: str | None,
) -> Measured:  # fmt: skip
    outcome = captured.outcome if isinstance(captured, Dispatched) else pipeline.find(captured.program)
    decoding = {node: site for node, site in outcome.sites.items() if not is_inside(site.name, encoder)}
    outcome = replace(outcome, sites=decoding or outcome.sites)
    if not outcome.sites:
        raise_nothing_found(name, outcome)
    if not options.is_lossless:
        budget = allocation.Budget(options.ratio, options.window, options.tokens)
        allocation.check_reach(list(outcome.sites.values()), budget, options.bits, options.device)
    far = dict(sinks=options.sinks, recent=options.recent, seed=options.seed)
    given = iter(batches)
    saved = calibration_checkpoint.Checkpoint(options.checkpoint, _key(options, name, data_digest, weights, outcome))
    statistics = fitting_statistics.empty_statistics(outcome.sites.values())
    stage = calibration_checkpoint.Stage("moments", options.sequences, progress, saved)
    collect.collect(
        captured,
        outcome,
        stage.batches(given, calibration_checkpoint.moments(statistics)),
        into=statistics,
        done=stage.done,
        **far,
    )
    collectives.share(calibration_checkpoint.moments(statistics))
    if not any(int(s.key.count) for s in statistics.values()):
        raise FhoptError("no calibration batch was given; expected at least one.")
    context = options.sinks + max(int(s.key.count) for s in statistics.values()) // max(1, stage.sequences)
    found = fit_plan.candidates(
        statistics, options.layout, context=context, tokens=options.tokens, device=options.device
    )
    if not options.is_lossless:
        stage = calibration_checkpoint.Stage("rates", options.rate_sequences, progress, saved)
        rates = calibration_checkpoint.rates(found, (0, *allocation.STEPS))
        collect.measure_rates(
            captured, outcome, stage.batches(given, rates), found, allocation.STEPS, done=stage.done, **far
        )
        collectives.share(rates)
        if not stage.sequences:
            raise FhoptError(
                f"the {options.sequences} batches for the bases took all there were, and bits are chosen by others; "
                "give more batches, or a smaller number of sequences."
            )
    saved.remove()
    versions = {"fhopt": __version__, "torch": torch.__version__}
    provenance = {"seed": options.seed, "sequences": options.sequences, "versions": versions}
    return Measured(statistics, found, outcome, provenance, weights)


def _key(
    options: FitOptions, name: str, data_digest: Any, weights: Mapping[str, Tensor], outcome: passes_outcome.Outcome
) -> dict[str, Any]:
    """What an interrupted calibration must have in common with the one that goes on."""
    irrelevant = {"ratio", "bits", "block", "window_bits", "checkpoint"}
    about = {"model": name, "data": str(data_digest), "version": __version__}
    if options.checkpoint is not None:
        names = sorted({n for site in outcome.sites.values() for role in site.projections.values() for n in role})
        sums = [float(weights[n].double().square().sum()) for n in names if n in weights]
        about["weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()
    return about | {k: str(v) for k, v in asdict(options).items() if k not in irrelevant}
