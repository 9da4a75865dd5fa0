"""The main job as one call: find, calibrate, fit. `fhopt.fit`, `fhopt fit` and `fhopt demo` all come through here."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt import __version__, calibrate, data, fitting, gathering, passes
from fhopt.capture import Captured, capture
from fhopt.dispatched import Dispatched, find_dispatched, is_dispatched
from fhopt.errors import FhoptError
from fhopt.evaluate import check_length
from fhopt.fitting import check_options, fingerprint, weight_prints
from fhopt.machine import find_device
from fhopt.models import LoadedModel, encoder_path, is_inside
from fhopt.offloaded import Weights
from fhopt.sharding import check_whole
from fhopt.spec import LatentPlan, SiteStatistics, sealed_tokens

LEAST_FAR_TOKENS = 512  # with fewer, the moments say more about the sample than about the model
Progress = Callable[[str, int, int], None]
Source = Captured | Dispatched  # what calibration runs


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class FitOptions:
    """What `fit` needs beside a model.

    texts: calibration texts, read in turn. sequences, rate_sequences: how many calibration sequences of `context`
    tokens the bases are fitted to, and how many more the bits. tokens: length of context that the plan is made for, at
    which its size is counted. device: what the plan will run on, for layouts that differ in arithmetic. checkpoint:
    file that lets an interrupted calibration go on. The rest as in `fitting.fit`.
    """

    texts: tuple[str, ...] = ("topics",)
    ratio: float = 4.0
    layout: str = fitting.AUTO
    bits: tuple[int, ...] = fitting.BITS
    sequences: int = 12
    rate_sequences: int = 8
    context: int = 1024
    sinks: int = 4
    recent: int = 128
    block: int = 64
    window_bits: int = 8
    tokens: int = 8192
    seed: int = 0
    device: str | None = None
    checkpoint: Path | None = None

    def check(self) -> None:
        """Raise FhoptError for values that cannot work, before anything slow starts."""
        self.check_sizes()
        far = self.sequences * max(0, self.context - self.sinks - self.recent)
        if far < LEAST_FAR_TOKENS or self.rate_sequences < 1:
            raise FhoptError(
                f"{self.sequences} + {self.rate_sequences} sequences of {self.context} tokens leave {far} beyond sinks "
                f"and recent tokens to calibrate on; expected at least {LEAST_FAR_TOKENS}, and one more sequence to "
                "choose bits by. Use more or longer sequences."
            )

    def check_sizes(self) -> None:
        """The part of it that does not depend on the sample: sizes, layout, device."""
        if self.device is not None:
            find_device(self.device)
        check_options(self.ratio, self.layout, self.bits, self.device)
        if self.recent < 1 or self.block < 1 or self.sinks < 0 or self.window_bits not in (8, 16):
            raise FhoptError(
                f"sinks={self.sinks}, recent={self.recent}, block={self.block}, window_bits={self.window_bits}: "
                "expected sinks of at least 0, recent and block of at least 1, and a window of 8 or 16 bits."
            )
        if sealed_tokens(self.tokens, self.sinks, self.recent, self.block) == 0:
            raise FhoptError(
                f"a context of {self.tokens} tokens has none beyond sinks and window; expected at least "
                f"{self.sinks + self.recent + self.block}. Make the plan for a longer context."
            )

    @property
    def is_lossless(self) -> bool:
        """True when no bits are to be chosen."""
        return self.ratio == 1 or (self.layout == "input" and self.ratio <= 2)


@dataclass
class Measured:
    """What calibration found out about a model: enough for plans of any size."""

    statistics: dict[str, SiteStatistics]
    found: fitting.Candidates
    outcome: passes.Outcome
    provenance: dict[str, Any]
    weights: Mapping[str, Tensor]


def find_sites(loaded: LoadedModel, tokens: int = 16) -> passes.Outcome:
    """Capture the model and find its attention. Raises FhoptError when there is none."""
    outcome = explain_sites(loaded, tokens)
    if not outcome.sites:
        _nothing_found(loaded.name, outcome)
    return outcome


def _nothing_found(name: str, outcome: passes.Outcome) -> None:
    reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "there is no softmax between two contractions"
    raise FhoptError(f"no attention was found in {name}: {reasons}. See fhopt explain.")


def explain_sites(loaded: LoadedModel, tokens: int = 16) -> passes.Outcome:
    """Capture the model and find its attention, over all graphs that its forward pass falls into."""
    captured = loaded.captures(tokens)
    if not captured:
        raise FhoptError(f"{loaded.name} computes nothing that can be captured; expected a module that uses tensors.")
    return passes.merge([passes.find(graph.program) for graph in captured])


def fit(loaded: LoadedModel, options: FitOptions, progress: Progress = silent) -> tuple[LatentPlan, passes.Outcome]:
    """Calibrate `loaded` (a causal language model) and fit a plan. Raises FhoptError."""
    measured = measure(loaded, options, progress)
    return plan_for(measured, options), measured.outcome


def plan_for(measured: Measured, options: FitOptions) -> LatentPlan:
    """A plan from what was measured, with its provenance. Raises FhoptError."""
    plan = fitting.fit(
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
    ids = data.calibration_ids(loaded.tokenizer, options.texts, count=count, length=options.context)
    batches = [{"input_ids": row.unsqueeze(0)} for row in ids]
    captured: Source = find_dispatched(model, batches[0]) if is_dispatched(model) else loaded.capture(options.context)
    provenance = {
        "model": loaded.name,
        "texts": list(options.texts),
        "text_sha256": data.digest(ids),
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
    with gathering.together():
        return _measure_batches(captured, batches, options, weights, name, progress, data_digest, encoder)


def _measure_batches(
    captured: Source, batches: Iterable[Mapping[str, Tensor]], options: FitOptions, weights: Mapping[str, Tensor],
    name: str, progress: Progress, data_digest: Any, encoder: str | None,
) -> Measured:  # fmt: skip
    outcome = captured.outcome if isinstance(captured, Dispatched) else passes.find(captured.program)
    decoding = {node: site for node, site in outcome.sites.items() if not is_inside(site.name, encoder)}
    outcome = replace(outcome, sites=decoding or outcome.sites)
    if not outcome.sites:
        _nothing_found(name, outcome)
    if not options.is_lossless:
        budget = fitting.Budget(
            options.ratio, options.sinks, options.recent, options.block, options.window_bits, options.tokens
        )
        fitting.check_reach(list(outcome.sites.values()), budget, options.bits, options.device)
    far = dict(sinks=options.sinks, recent=options.recent, seed=options.seed)
    given = iter(batches)
    saved = gathering.Checkpoint(options.checkpoint, _key(options, name, data_digest, weights, outcome))
    statistics = calibrate.empty_statistics(outcome.sites.values())
    stage = gathering.Stage("moments", options.sequences, progress, saved)
    calibrate.collect(
        captured, outcome, stage.batches(given, gathering.moments(statistics)), into=statistics, done=stage.done, **far
    )
    gathering.share(gathering.moments(statistics))
    if not any(int(s.key.count) for s in statistics.values()):
        raise FhoptError("no calibration batch was given; expected at least one.")
    context = options.sinks + max(int(s.key.count) for s in statistics.values()) // max(1, stage.sequences)
    found = fitting.candidates(
        statistics, options.layout, context=context, tokens=options.tokens, device=options.device
    )
    if not options.is_lossless:
        stage = gathering.Stage("rates", options.rate_sequences, progress, saved)
        rates = gathering.rates(found, (0, *fitting.STEPS))
        calibrate.measure_rates(
            captured, outcome, stage.batches(given, rates), found, fitting.STEPS, done=stage.done, **far
        )
        gathering.share(rates)
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
    options: FitOptions, name: str, data_digest: Any, weights: Mapping[str, Tensor], outcome: passes.Outcome
) -> dict[str, Any]:
    """What an interrupted calibration must have in common with the one that goes on."""
    irrelevant = {"ratio", "bits", "block", "window_bits", "checkpoint"}
    about = {"model": name, "data": str(data_digest), "version": __version__}
    if options.checkpoint is not None:
        names = sorted({n for site in outcome.sites.values() for role in site.projections.values() for n in role})
        sums = [float(weights[n].double().square().sum()) for n in names if n in weights]
        about["weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()
    return about | {k: str(v) for k, v in asdict(options).items() if k not in irrelevant}
