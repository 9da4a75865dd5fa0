"""Calibration: one run of a model over its data, from which plans of any size can be fitted.

    statistics   collected over the first batches             fhopt/calibration/collect.py
    bases        fitted to the statistics                     fhopt/fitting/candidates.py
    costs        of the bases' channels, over other batches   fhopt/calibration/collect.py
    losses       of two plans, on held-out text               fhopt/calibration/loss_check.py
    plan         bits allocated by the costs                  fhopt/fitting/fit_plan.py

A calibration can be saved to a file (fhopt/calibration/statistics_file.py). fhopt/planning/pipeline.py calls the steps
in order, from data to a plan with page selection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration.checkpoint import MOMENTS, RATES, BatchPass, Checkpoint, named_costs, named_moments
from fhopt.calibration.collect import collect, measure_costs
from fhopt.calibration.data import CalibrationData
from fhopt.calibration.loss_check import check_losses
from fhopt.calibration.offloaded_probe import Dispatched
from fhopt.calibration.options import FitOptions
from fhopt.calibration.probe import Batch, Probed, probed
from fhopt.codegen.build import has_kernels
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
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import decoder_sites
from fhopt.models.sites import raise_nothing_found
from fhopt.parallel import collectives
from fhopt.parallel.offloaded_weights import Weights
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.plan.cache_size import is_compressible, layers_of, record_of, sliding_windows
from fhopt.plan.expected_loss import EXPECTED
from fhopt.plan.fingerprint import fingerprint, weight_prints
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.window import MIN_SLIDING
from fhopt.progress import Progress, silent
from fhopt.version import __version__

LOSSES = "losses"  # progress stage that measures the KL of plans
CHECKED_RATIOS = (4.0, 8.0)  # of the plans whose held-out KL is measured


@dataclass(frozen=True)
class Calibration:
    """Result of calibrating a model: everything needed to fit plans of any size."""

    statistics: dict[str, SiteStatistics]
    bases: CandidateBases
    costs: Costs
    provenance: dict[str, Any]
    options: FitOptions  # options under which statistics and costs were collected
    prints: dict[str, Any]  # fingerprint, and hashes of the weights of each site
    outcome: passes_outcome.Outcome | None = None  # sites found in the model; None if loaded from a file

    def with_provenance(self, **values: Any) -> Calibration:
        """Return the calibration with further provenance, JSON values."""
        return replace(self, provenance=self.provenance | values)

    @property
    def sites(self) -> dict[str, AttentionSite]:
        """Sites by name."""
        return {name: s.site for name, s in self.statistics.items()}

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise FhoptError if this is a calibration of another model than `loaded`."""
        weights = Weights(loaded.language_model())
        if fingerprint(weights, list(self.sites.values())) != self.prints["fingerprint"]:
            raise FhoptError(
                f"the statistics are of another model ({self.provenance.get('model', 'unknown')}) than {loaded.name}; "
                "their fingerprints differ. Calibrate this one: fhopt calibrate MODEL -o FILE."
            )


def plan_from_calibration(calibration: Calibration, options: FitOptions) -> LatentPlan:
    """Fit a plan to a calibration, with its provenance. Raises FhoptError.

    Uses only the options for size and form: ratio, layout, bits, code, device, tokens, kernel shapes, and window sizes.
    """
    bases = select_bases(
        calibration.bases, calibration.sites, options.layout, tokens=options.tokens, device=options.device
    )
    plan = fit_plan.fit_ratio(
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
    """Resolve the code `auto` for plans whose means are over `mean_tokens` tokens.

    Trellis codes need a CPU, a cache with means, and compiled kernels, without which finding the rings takes minutes.
    """
    device = options.device
    on_cpu = not torch.accelerator.is_available() if device is None else find_device(device).kind == "cpu"
    return codes.chosen(options.code, options.ratio, on_cpu and mean_tokens > 0 and has_kernels())


def calibrate(
    data: CalibrationData, options: FitOptions, progress: Progress = silent, layouts: Sequence[str] = ()
) -> Calibration:
    """Calibrate in two passes over the batches. Raises FhoptError.

    Under torchrun, each process takes its share of the batches and all get the sum; an error in one process raises in
    all (`collectives.together`). layouts: fit bases of these instead of the options' layout.
    """
    with collectives.together(), fast_products():
        return _calibrate(data, _for_data(options, data), progress, layouts)


def _for_data(options: FitOptions, data: CalibrationData) -> FitOptions:
    """Disable means and segments if the data or a lossless plan do not support them. Raises FhoptError."""
    if not data.has_means or options.is_lossless:
        options = replace(options, mean_tokens=0, segment=0)
    elif not data.has_segments and options.segment is None:
        options = replace(options, segment=0)
    options.check_sizes()
    return replace(options, segment=options.segment_tokens)


def _calibrate(data: CalibrationData, options: FitOptions, progress: Progress, layouts: Sequence[str]) -> Calibration:
    outcome = find_compressible(data)
    if not options.is_lossless and not layouts:
        _check_reach(outcome, options)
    key = _key(options, data, outcome) | ({"layouts": list(layouts)} if layouts else {})
    checkpoints = [Checkpoint(options.checkpoint, key, stage) for stage in (MOMENTS, RATES)]
    passes = _Passes(data, outcome, options, iter(data.batches), progress)
    statistics = passes.statistics(checkpoints[0])
    bases = _bases(statistics, options, layouts, context=options.sinks + passes.tokens_per_sequence(statistics))
    costs = {} if options.is_lossless else passes.costs(checkpoints[1], statistics, bases)
    versions = {"fhopt": __version__, "torch": torch.__version__}
    provenance = {"seed": options.seed, "sequences": options.sequences, "versions": versions}
    provenance |= record_of(outcome.program.layers) | dict(data.about)
    sites = list(outcome.sites.values())
    prints = {"fingerprint": fingerprint(data.weights, sites), "weights": weight_prints(data.weights, sites)}
    calibration = Calibration(statistics, bases, costs, provenance, options, prints, outcome)
    if data.held_out and costs:
        checks = _check_losses(calibration, probed(data.source, outcome), data.held_out, progress)
        calibration = calibration.with_provenance(**{CHECKS: checks})
    for checkpoint in checkpoints:
        checkpoint.remove()
    return calibration


def _check_reach(outcome: passes_outcome.Outcome, options: FitOptions) -> None:
    """Raise FhoptError if no plan of the sites can reach the ratio."""
    sites = list(outcome.sites.values())
    sliding = sliding_windows(sites, outcome.program.layers)
    budget = allocation.Budget(options.ratio, options.window, options.tokens, sliding=sliding)
    allocation.check_reach(sites, budget, options.bits, options.device)


def _bases(
    statistics: dict[str, SiteStatistics], options: FitOptions, layouts: Sequence[str], context: int
) -> CandidateBases:
    """Fit the bases of `layouts`, or of the options' layout. context: tokens of a sequence."""
    if layouts:
        return fit_layouts(statistics, layouts, context=context, tokens=options.tokens)
    return fit_bases(statistics, options.layout, context=context, tokens=options.tokens, device=options.device)


@dataclass
class _Passes:
    """The two passes over the batches of a calibration; the second continues where the first stopped."""

    data: CalibrationData
    outcome: passes_outcome.Outcome
    options: FitOptions
    batches: Iterator[Batch]
    progress: Progress
    read: int = 0  # sequences in the first pass

    @property
    def _far(self) -> dict[str, Any]:
        """Keyword arguments for which tokens count; span: how far they are spread over a long context."""
        options = self.options
        return {
            "sinks": options.sinks, "recent": options.near_tokens, "seed": options.seed,
            "mean_tokens": options.mean_tokens, "span": max(0, options.tokens - options.context),
        }  # fmt: skip

    def statistics(self, checkpoint: Checkpoint) -> dict[str, SiteStatistics]:
        """Collect the statistics that bases are fitted to. Raises FhoptError if there is no batch."""
        sites, moments = self.outcome.sites.values(), BatchPass(self.options.sequences, checkpoint, self.progress)
        sliding = sliding_windows(list(sites), self.outcome.program.layers)
        statistics = empty_statistics(sites, self.options.segment_tokens, sliding)
        sums = named_moments(statistics)
        batches = moments.batches(self.batches, sums)
        collect(self.data.source, self.outcome, batches, into=statistics, done=moments.done, **self._far)
        collectives.reduce_sums(sums)
        self.read = moments.sequences
        if not any(int(s.key.count) for s in statistics.values()):
            raise FhoptError("there are no calibration batches; expected at least one. Pass more data.")
        return statistics

    def tokens_per_sequence(self, statistics: dict[str, SiteStatistics]) -> int:
        """Return how many tokens per sequence were counted."""
        return max(int(s.key.count) for s in statistics.values()) // max(1, self.read)

    def costs(self, checkpoint: Checkpoint, statistics: dict[str, SiteStatistics], bases: CandidateBases) -> Costs:
        """Measure the costs of the bases' channels on the remaining batches. Raises FhoptError if there is none."""
        rates = BatchPass(self.options.rate_sequences, checkpoint, self.progress)
        costs = empty_costs(bases, (0, *STEPS))
        sums = named_costs(costs)
        batches = rates.batches(self.batches, sums)
        segments = {name: s.segment for name, s in statistics.items()}
        measure_costs(
            self.data.source, self.outcome, batches, bases, STEPS, into=costs, done=rates.done, segments=segments,
            **self._far,
        )  # fmt: skip
        collectives.reduce_sums(sums)
        if not rates.sequences:
            raise FhoptError(
                f"the {self.options.sequences} batches for the bases leave none for the bit allocation. Pass "
                "more batches, or fewer sequences."
            )
        return costs


def _check_losses(
    calibration: Calibration, model: Probed, held_out: Sequence[tuple[str, Batch]], progress: Progress
) -> list[dict[str, Any]]:
    """Measure the KL of a calibration's plans on held-out batches, as JSON values; [] if no plan can be fitted."""
    options, plans = calibration.options, []
    for ratio in CHECKED_RATIOS:
        try:
            plan = plan_from_calibration(calibration, replace(options, ratio=ratio, code=codes.UNIFORM))
        except FhoptError:  # ratio out of reach
            continue
        plans.append((plan.provenance["predicted_nats"], plan))
    recent = options.near_tokens + options.block // 2  # average: the window grows by a block before it is quantized

    def done(number: int) -> None:
        progress(LOSSES, number + 1, len(held_out))

    if not plans or not model.is_logits:
        return []
    progress(LOSSES, 0, len(held_out))
    return [check.as_json() for check in check_losses(model, held_out, plans, recent, done)]


def find_compressible(data: CalibrationData) -> passes_outcome.Outcome:
    """Find the sites whose cache can be compressed. Raises FhoptError if there are none."""
    if isinstance(data.source, Dispatched):
        outcome = data.source.outcome
    else:
        outcome = pipeline.find_attentions(data.source.program, assume_finite=True)
    cached = {site.name for site in decoder_sites(outcome.sites.values(), data.encoder)}
    decoding = {node: site for node, site in outcome.sites.items() if site.name in cached}
    if not decoding:
        raise_nothing_found(data.name, outcome)
    layers = outcome.program.layers
    compressible = {node: site for node, site in decoding.items() if is_compressible(site, layers)}
    if not compressible:
        kept = max(layer.window for layer in layers)
        what = f"windows of at most {kept:,}" if kept else "its cache stores keys and values next to a recurrent state"
        raise FhoptError(
            f"no attention layer of {data.name} caches enough tokens to compress ({what}); expected some "
            f"layers that attend to all tokens, or to at least {MIN_SLIDING}. Use another model."
        )
    return replace(outcome, sites=compressible)


def _print_of(weight: Tensor) -> tuple[str, float]:
    """Return a fingerprint of a weight, for checkpoints."""
    return str(weight.dtype), float(weight.double().square().sum())


def _key(options: FitOptions, data: CalibrationData, outcome: passes_outcome.Outcome) -> dict[str, Any]:
    """Return what must be equal when an interrupted calibration resumes; JSON values only."""
    irrelevant = {"ratio", "bits", "block", "window_bits", "checkpoint", "kernel_shapes", "code"}
    about = {"model": data.name, "data": data.digest, "version": __version__}
    if options.checkpoint is not None:
        names = sorted({n for site in outcome.sites.values() for role in site.projections.values() for n in role})
        sums = [_print_of(data.weights[n]) for n in names if n in data.weights]  # one by one: weights may be offloaded
        about["weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()
    return about | {k: str(v) for k, v in asdict(options).items() if k not in irrelevant}
