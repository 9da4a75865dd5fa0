"""The main job as one call: find, calibrate, fit. `fhopt.fit`, `fhopt fit` and `fhopt demo` all come through here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fhopt import __version__, calibrate, data, passes
from fhopt.errors import FhoptError
from fhopt.fitting import check_options, fingerprint
from fhopt.fitting import fit as fit_plan
from fhopt.models import LoadedModel
from fhopt.spec import LatentPlan, SiteStatistics

LEAST_FAR_TOKENS = 512  # with fewer, the moments say more about the sample than about the model
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class FitOptions:
    """What `fit` needs beside a model. Context and sequences are calibration tokens; the rest as in `fitting.fit`."""

    text: str = "topics"
    ratio: float = 4.0
    layout: str = "freq"
    bits: tuple[int, ...] = (2, 4, 8)
    sequences: int = 16
    context: int = 512
    sinks: int = 4
    recent: int = 64
    block: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raise FhoptError for values that cannot work, before anything slow starts."""
        check_options(self.ratio, self.layout, self.bits)
        far = self.sequences * max(0, self.context - self.sinks - self.recent)
        if far < LEAST_FAR_TOKENS:
            raise FhoptError(
                f"{self.sequences} sequences of {self.context} tokens leave {far} beyond sinks and recent tokens to "
                f"calibrate on; expected at least {LEAST_FAR_TOKENS}. Use more or longer sequences."
            )


def find_sites(loaded: LoadedModel, tokens: int = 16) -> passes.Outcome:
    """Capture the model and find its attention. Raises FhoptError when there is none."""
    outcome = explain_sites(loaded, tokens)
    if not outcome.sites:
        reasons = (
            "; ".join(sorted({m.reason for m in outcome.missed})) or "there is no softmax between two contractions"
        )
        raise FhoptError(f"no attention was found in {loaded.name}: {reasons}. See fhopt explain.")
    return outcome


def explain_sites(loaded: LoadedModel, tokens: int = 16) -> passes.Outcome:
    """Capture the model and find its attention, over all graphs that its forward pass falls into."""
    captured = loaded.captures(tokens)
    if not captured:
        raise FhoptError(f"{loaded.name} computes nothing that can be captured; expected a module that uses tensors.")
    return passes.merge([passes.find(graph.program) for graph in captured])


def fit(loaded: LoadedModel, options: FitOptions, progress: Progress = silent) -> tuple[LatentPlan, passes.Outcome]:
    """Calibrate `loaded` (a causal language model) and fit a plan. Raises FhoptError."""
    statistics, outcome, provenance = measure(loaded, options, progress)
    return plan_for(loaded, statistics, options, provenance), outcome


def plan_for(
    loaded: LoadedModel, statistics: dict[str, SiteStatistics], options: FitOptions, provenance: dict[str, Any]
) -> LatentPlan:
    """A plan from statistics, with its provenance."""
    plan = fit_plan(
        statistics, ratio=options.ratio, layout=options.layout, bits=options.bits, sinks=options.sinks,
        recent=options.recent, block=options.block,
    )  # fmt: skip
    parameters = dict(loaded.language_model().named_parameters())
    return plan.with_provenance(fingerprint=fingerprint(parameters, [s.site for s in plan.sites]), **provenance)


def measure(
    loaded: LoadedModel, options: FitOptions, progress: Progress = silent
) -> tuple[dict[str, SiteStatistics], passes.Outcome, dict[str, Any]]:
    """(statistics, what was found, provenance) of `loaded` on the calibration half of the text."""
    options.check()
    loaded.language_model()
    text, _ = data.halves(data.read_text(options.text))
    ids = data.sequences(
        loaded.tokenizer,
        text,
        count=options.sequences,
        length=options.context,
        what=f"the first half of {options.text!r}",
    )
    captured = loaded.capture(options.context)
    outcome = passes.find(captured.program)
    if not outcome.sites:
        find_sites(loaded)
    total = len(ids)
    statistics = calibrate.collect(
        captured, outcome, [{"input_ids": row.unsqueeze(0)} for row in ids],
        sinks=options.sinks, recent=options.recent, seed=options.seed,
        progress=lambda done: progress("calibrate", done, total),
    )  # fmt: skip
    provenance = {
        "model": loaded.name,
        "text": options.text,
        "text_sha256": data.digest(ids),
        "tokens": int(ids.numel()),
        "context": options.context,
        "seed": options.seed,
        "versions": {"fhopt": __version__, "torch": torch.__version__},
    }
    return statistics, outcome, provenance
