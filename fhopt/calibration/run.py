"""Calibration and fitting as one call, for `fhopt.fit`, `fhopt fit` and `fhopt demo`.

    statistics   collected over the first batches             fhopt/calibration/collect.py
    bases        fitted to the statistics                     fhopt/fitting/candidates.py
    costs        of the bases' channels, over other batches   fhopt/calibration/collect.py
    losses       of two plans, on held-out text               fhopt/calibration/loss_check.py
    plan         bits allocated by the costs                  fhopt/fitting/fit_plan.py

Statistics, bases and costs of one calibration serve plans of any size, and can be kept in a file
(fhopt/calibration/statistics_file.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration.checkpoint import MOMENTS, RATES, BatchPass, Checkpoint, named_costs, named_moments
from fhopt.calibration.collect import collect, measure_costs
from fhopt.calibration.loss_check import check_losses
from fhopt.calibration.offloaded_probe import Dispatched, find_dispatched, is_dispatched
from fhopt.calibration.options import FitOptions
from fhopt.calibration.probe import Batch, Probed, probed
from fhopt.codegen.compiler import has_compiler
from fhopt.errors import FhoptError
from fhopt.fitting import allocation, codes, fit_plan
from fhopt.fitting.allocation import STEPS
from fhopt.fitting.bases import CandidateBases
from fhopt.fitting.candidates import fit_bases, fit_layouts, select_bases
from fhopt.fitting.costs import Costs, empty_costs
from fhopt.fitting.loss_interval import CHECKS, checks_of, loss_interval
from fhopt.fitting.statistics import SiteStatistics, empty_statistics
from fhopt.hardware.devices import find_device
from fhopt.hardware.float_products import fast_products
from fhopt.models.cache_layers import measured_layers
from fhopt.models.capture import Captured, capture
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length, check_segments, counts_in_images, decoder_sites, encoder_path
from fhopt.models.sites import raise_nothing_found
from fhopt.parallel import collectives
from fhopt.parallel.offloaded_weights import Weights
from fhopt.parallel.tensor_parallel import check_whole
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.plan.cache_size import is_compressible, layers_of, record_of, sliding_windows
from fhopt.plan.expected_loss import EXPECTED
from fhopt.plan.fingerprint import fingerprint, weight_prints
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.window import MIN_SLIDING
from fhopt.progress import Progress, silent
from fhopt.texts import tokens as texts_tokens
from fhopt.version import __version__

Source = Captured | Dispatched  # what calibration runs
LOSSES = "losses"  # the stage that measures them
CHECKED_RATIOS = (4.0, 8.0)  # of which held-out losses are measured
CHECKED_TEXTS = 8  # at most


@dataclass
class Calibration:
    """Result of calibrating a model: enough for plans of any size."""

    statistics: dict[str, SiteStatistics]
    bases: CandidateBases
    costs: Costs
    provenance: dict[str, Any]
    options: FitOptions  # with which statistics and costs were collected
    prints: dict[str, Any]  # fingerprint, and prints of the weights of each site
    outcome: passes_outcome.Outcome | None = None  # what was found in the model; None where read from a file

    @property
    def sites(self) -> dict[str, AttentionSite]:
        """Sites by name."""
        return {name: s.site for name, s in self.statistics.items()}

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise FhoptError when this is a calibration of another model than `loaded`."""
        weights = Weights(loaded.language_model())
        if fingerprint(weights, list(self.sites.values())) != self.prints["fingerprint"]:
            raise FhoptError(
                f"the statistics are of another model ({self.provenance.get('model', 'unknown')}) than {loaded.name}; "
                "their fingerprints differ. Calibrate this one: fhopt calibrate MODEL -o FILE."
            )


def fit(
    loaded: LoadedModel, options: FitOptions, progress: Progress = silent
) -> tuple[LatentPlan, passes_outcome.Outcome]:
    """Calibrate `loaded` (a causal language model) and fit a plan. Raises FhoptError."""
    calibration = measure(loaded, options, progress)
    assert calibration.outcome is not None
    return plan_for(calibration, options), calibration.outcome


def plan_for(calibration: Calibration, options: FitOptions) -> LatentPlan:
    """Fit a plan to a calibration, with its provenance. Raises FhoptError.

    Of `options`, those count that choose size and form: ratio, layout, bits, code, device, tokens, kernel shapes, and
    sizes of the window.
    """
    bases = select_bases(
        calibration.bases, calibration.sites, options.layout, tokens=options.tokens, device=options.device
    )
    plan = fit_plan.fit(
        calibration.statistics, bases=bases, costs=calibration.costs, ratio=options.ratio, layout=options.layout,
        bits=options.bits, sinks=options.sinks, recent=options.recent_tokens, block=options.block,
        window_bits=options.window_bits, tokens=options.tokens, device=options.device,
        mean_tokens=calibration.options.mean_tokens, kernel_shapes=options.kernel_shapes,
        code=code_of(options, calibration.options.mean_tokens),
        sliding=sliding_windows(calibration.sites.values(), layers_of(calibration.provenance)),
    )  # fmt: skip
    plan = plan.with_provenance(**calibration.prints, **calibration.provenance)
    checks = checks_of(calibration.provenance.get(CHECKS, ()))
    if not checks or options.is_lossless:
        return plan
    nats, least, most = loss_interval(checks, plan.provenance["predicted_nats"])
    return plan.with_provenance(**{EXPECTED: {"nats": nats, "least": least, "most": most}})


def code_of(options: FitOptions, mean_tokens: int) -> str:
    """Return how plans of these options are quantized, which have means of so many tokens.

    No GPU reads trellis codes, nor does what has no means; and without a compiler rings take minutes to find.
    """
    device = options.device
    on_cpu = not torch.accelerator.is_available() if device is None else find_device(device).kind == "cpu"
    return codes.chosen(options.code, options.ratio, on_cpu and mean_tokens > 0 and has_compiler())


def measure(
    loaded: LoadedModel, options: FitOptions, progress: Progress = silent, layouts: Sequence[str] = ()
) -> Calibration:
    """Calibrate a causal language model on the first halves of the texts.

    layouts: to fit bases of, those that `options` choose from when none is named. Raises FhoptError.
    """
    options.check()
    model = loaded.language_model()
    if options.segment is None and counts_in_images(model.config):
        options = replace(options, segment=0)
    check_segments(model.config, options.segment_tokens, loaded.name)
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
    calibration = measure_batches(
        captured, batches, options, weights, loaded.name, progress, digest, layouts=layouts,
        held_out=_held_out(loaded, options),
    )  # fmt: skip
    calibration.provenance |= provenance | record_of(measured_layers(model))
    return calibration


def _held_out(loaded: LoadedModel, options: FitOptions) -> list[tuple[str, Batch]]:
    """Return a sequence of the second half of each text, by its name; two of a single text."""
    names = options.texts[:CHECKED_TEXTS] if len(options.texts) > 1 else options.texts * 2
    try:
        ids = texts_tokens.held_out_ids(loaded.tokenizer, options.texts, count=len(names), length=options.context)
    except FhoptError:  # too short: losses are not checked
        return []
    return [(name, {"input_ids": row.unsqueeze(0)}) for name, row in zip(names, ids, strict=True)]


def measure_module(
    model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, progress: Progress = silent
) -> Calibration:
    """Calibrate any module on batches of keyword arguments, all of the same shapes. Raises FhoptError.

    The first `options.sequences` batches fit the bases, the others the bits; further options of the text are not used.
    Of an encoder-decoder of transformers, the decoder's sites are fitted: nothing of its encoder is cached. Latents are
    of keys and values as they are: a module may hold them without a cache of fhopt's, which keeps means and turns
    queries.
    """
    options = replace(options, mean_tokens=0, segment=0)
    options.check_sizes()
    check_whole(model)
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise FhoptError("there are no batches; expected an iterable of dicts of keyword arguments.")
    captured: Source = find_dispatched(model, first) if is_dispatched(model) else capture(model, (), first)
    chained = itertools.chain([first], source)
    weights, name = Weights(model), type(model).__name__
    calibration = measure_batches(captured, chained, options, weights, name, progress, encoder=encoder_path(model))
    calibration.provenance |= record_of(measured_layers(model))
    return calibration


def measure_batches(
    captured: Source, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, weights: Mapping[str, Tensor],
    name: str, progress: Progress = silent, data_digest: Any = "", encoder: str | None = None,
    layouts: Sequence[str] = (), held_out: Sequence[tuple[str, Batch]] = (),
) -> Calibration:  # fmt: skip
    """Calibrate in two passes over batches. Under torchrun, each process takes its share and all get the sum.

    What fails in one process fails in all (`collectives.together`). data_digest distinguishes the data of calibrations,
    for checkpoints. encoder: path of a module of which nothing is cached, so that its sites get no bytes; a model that
    is nothing else keeps them. layouts: as of `measure`. held_out: other batches, by the names of their texts, on which
    the losses of plans are measured.
    """
    with collectives.together(), fast_products():
        return _measure_batches(
            captured, batches, options, weights, name, progress, data_digest, encoder, layouts, held_out
        )


def _measure_batches(
    captured: Source, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, weights: Mapping[str, Tensor],
    name: str, progress: Progress, data_digest: Any, encoder: str | None, layouts: Sequence[str],
    held_out: Sequence[tuple[str, Batch]],
) -> Calibration:  # fmt: skip
    outcome = _sites(captured, name, encoder)
    if options.is_lossless:
        options = replace(options, mean_tokens=0)
    options = replace(options, segment=0 if options.is_lossless else options.segment_tokens)
    if not options.is_lossless and not layouts:
        found = list(outcome.sites.values())
        sliding = sliding_windows(found, outcome.program.layers)
        budget = allocation.Budget(options.ratio, options.window, options.tokens, sliding=sliding)
        allocation.check_reach(found, budget, options.bits, options.device)
    key = _key(options, name, data_digest, weights, outcome) | ({"layouts": list(layouts)} if layouts else {})
    checkpoints = [Checkpoint(options.checkpoint, key, stage) for stage in (MOMENTS, RATES)]
    source, kept = iter(batches), {"sinks": options.sinks, "recent": options.near_tokens}
    span = max(0, options.tokens - options.context)  # over which the tokens of a long context stand
    far: dict[str, Any] = kept | {"seed": options.seed, "mean_tokens": options.mean_tokens, "span": span}

    moments = BatchPass(options.sequences, checkpoints[0], progress)
    sliding = sliding_windows(list(outcome.sites.values()), outcome.program.layers)
    statistics = empty_statistics(outcome.sites.values(), options.segment_tokens, sliding)
    sums = named_moments(statistics)
    collect(captured, outcome, moments.batches(source, sums), into=statistics, done=moments.done, **far)
    collectives.share(sums)
    if not any(int(s.key.count) for s in statistics.values()):
        raise FhoptError("no calibration batch was given; expected at least one.")

    context = options.sinks + max(int(s.key.count) for s in statistics.values()) // max(1, moments.sequences)
    if layouts:
        bases = fit_layouts(statistics, layouts, context=context, tokens=options.tokens)
    else:
        bases = fit_bases(statistics, options.layout, context=context, tokens=options.tokens, device=options.device)
    costs: Costs = {}
    if not options.is_lossless:
        rates = BatchPass(options.rate_sequences, checkpoints[1], progress)
        costs = empty_costs(bases, (0, *STEPS))
        sums = named_costs(costs)
        rated = rates.batches(source, sums)
        far["segments"] = {name: s.segment for name, s in statistics.items()}
        measure_costs(captured, outcome, rated, bases, STEPS, into=costs, done=rates.done, **far)
        collectives.share(sums)
        if not rates.sequences:
            raise FhoptError(
                f"the {options.sequences} batches for the bases took all there were, and bits are chosen by others; "
                "give more batches, or a smaller number of sequences."
            )
    versions = {"fhopt": __version__, "torch": torch.__version__}
    provenance = {"seed": options.seed, "sequences": options.sequences, "versions": versions}
    provenance |= record_of(outcome.program.layers)
    sites = list(outcome.sites.values())
    prints = {"fingerprint": fingerprint(weights, sites), "weights": weight_prints(weights, sites)}
    calibration = Calibration(statistics, bases, costs, provenance, options, prints, outcome)
    if held_out and costs:
        calibration.provenance[CHECKS] = _check_losses(calibration, probed(captured, outcome), held_out, progress)
    for checkpoint in checkpoints:
        checkpoint.remove()
    return calibration


def _check_losses(
    calibration: Calibration, model: Probed, held_out: Sequence[tuple[str, Batch]], progress: Progress
) -> list[dict[str, Any]]:
    """Measure what plans of a calibration lose on held-out batches, as JSON values; none where no plan can be made."""
    options, plans = calibration.options, []
    for ratio in CHECKED_RATIOS:
        try:
            plan = plan_for(calibration, replace(options, ratio=ratio, code=codes.UNIFORM))
        except FhoptError:  # a size that cannot be reached
            continue
        plans.append((plan.provenance["predicted_nats"], plan))
    recent = options.near_tokens + options.block // 2  # a window grows by a block, and is cut again

    def done(number: int) -> None:
        progress(LOSSES, number + 1, len(held_out))

    if not plans or not model.is_logits:
        return []
    progress(LOSSES, 0, len(held_out))
    return [check.as_json() for check in check_losses(model, held_out, plans, recent, done)]


def _sites(captured: Source, name: str, encoder: str | None) -> passes_outcome.Outcome:
    """Find the sites that are to be fitted: those that a cache compresses. Raises FhoptError when there are none."""
    if isinstance(captured, Dispatched):
        outcome = captured.outcome
    else:
        outcome = pipeline.find(captured.program, assume_finite=True)
    cached = {site.name for site in decoder_sites(outcome.sites.values(), encoder)}
    decoding = {node: site for node, site in outcome.sites.items() if site.name in cached}
    if not decoding:
        raise_nothing_found(name, outcome)
    layers = outcome.program.layers
    compressible = {node: site for node, site in decoding.items() if is_compressible(site, layers)}
    if not compressible:
        kept = max(layer.window for layer in layers)
        what = f"windows of at most {kept:,}" if kept else "its cache keeps keys and values beside a state"
        raise FhoptError(
            f"no attention layer of {name} keeps tokens enough in a layer of its own ({what}), so there is nothing to "
            f"compress; expected a model in which some layers attend to all tokens, or to {MIN_SLIDING} or more."
        )
    return replace(outcome, sites=compressible)


def _print_of(weight: Tensor) -> tuple[str, float]:
    """Return what tells a weight from others, for checkpoints."""
    return str(weight.dtype), float(weight.double().square().sum())


def _key(
    options: FitOptions, name: str, data_digest: Any, weights: Mapping[str, Tensor], outcome: passes_outcome.Outcome
) -> dict[str, Any]:
    """Return what an interrupted calibration must have in common with the one that goes on; JSON values only."""
    irrelevant = {"ratio", "bits", "block", "window_bits", "checkpoint", "kernel_shapes", "code"}
    about = {"model": name, "data": str(data_digest), "version": __version__}
    if options.checkpoint is not None:
        names = sorted({n for site in outcome.sites.values() for role in site.projections.values() for n in role})
        sums = [_print_of(weights[n]) for n in names if n in weights]  # read one by one where they are offloaded
        about["weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()
    return about | {k: str(v) for k, v in asdict(options).items() if k not in irrelevant}
