"""Check of a plan on one decoder: fit on random tokens, apply, decode the full-precision model's tokens, compare."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fhopt
from benchmarks.zoo.wide_check import one_line
from fhopt.cache.layer_map import LATENT_LAYERS
from fhopt.calibration import run
from fhopt.calibration.data import of_batches
from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan

PROMPT, NEW, CONTEXT = 96, 6, 96
OPTIONS = FitOptions(
    sequences=6,
    rate_sequences=2,
    context=CONTEXT,
    sinks=2,
    recent=8,
    block=8,
    window_bits=16,
    tokens=512,
    mean_tokens=0,
)
EXACT_NATS = 1e-5  # of an exact plan: other summation orders, in float32
FACTOR, MIN_NATS = 5.0, 1e-3  # max measured KL: factor of the expected KL, and lower limit


@dataclass
class PlanRow:
    """The result of a plan on one class.

    ratio: requested. sites: in the plan. expected: KL expected by the fit, in nats/token. measured: KL divergence from
    the full-precision model over the decoded tokens. status: "works", "more" (above the expected KL), "refused",
    "wrong", "crashed", "not built".
    """

    case: str
    ratio: float
    sites: int = 0
    expected: float = 0.0
    measured: float = 0.0
    status: str = ""
    why: list[str] = field(default_factory=list)

    def as_result(self) -> dict[str, Any]:
        """Return the row in the form of the results: the common fields, and further ones."""
        said = {"status": self.status, "sites": self.sites} | ({"why": self.why} if self.why else {})
        figures = {
            "metric": "kl_nats",
            "value": self.measured,
            "unit": "nats",
            "baseline": self.expected,
            "ratio": None,
        }
        return {"case": self.case, "impl": f"plan {self.ratio:g}x", **figures, **said}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def line(self) -> str:
        """Return one line for the screen."""
        why = f": {'; '.join(self.why)}" if self.why else ""
        return f"{self.case} {self.ratio:g}x {self.status}, {self.measured:.1e} nats, expected {self.expected:.1e}{why}"


def check_plan(row: PlanRow, model: Any) -> PlanRow:
    """Fill the row with the results of a plan of its ratio on the model."""
    ids = torch.randint(3, 90, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    try:
        tokens = _generated(model, ids)
    except Exception as error:  # a class that does not generate, with or without a plan
        row.status, row.why = "not built", [f"it does not generate: {one_line(error)}"]
        return row
    try:
        plan = _fitted(model, row.ratio)
        fhopt.apply(model, plan)
        cache = latent_cache(model)
        again, ours = _generated(model, ids), _decoded(model, tokens, cache)
        fhopt.unapply(model)
    except FhoptError as error:
        row.status, row.why = "refused", [str(error)]
        return row
    row.sites, row.expected = len(plan.sites), float(plan.provenance.get("predicted_nats", 0.0))
    row.measured = _divergence(_decoded(model, tokens, DynamicCache(config=model.config)), ours)
    allowed = EXACT_NATS if row.ratio == 1 else max(MIN_NATS, FACTOR * row.expected)
    row.status = "works" if row.measured <= allowed else "more" if row.ratio > 1 and row.measured < 1 else "wrong"
    if again.shape != tokens.shape:
        row.status, row.why = "wrong", [f"{again.shape[1]} tokens were generated, {tokens.shape[1]} without a plan"]
    if not any(isinstance(layer, LATENT_LAYERS) and layer.get_seq_length() >= PROMPT for layer in _layers(cache)):
        row.status, row.why = "wrong", ["the cache holds no latents: the plan was applied and is not used"]
    return row


def _layers(cache: Any) -> list[Any]:
    return list(getattr(cache, "self_attention_cache", cache).layers)


def _fitted(model: Any, ratio: float) -> LatentPlan:
    options = replace(OPTIONS, ratio=ratio)
    return run.plan_from_calibration(run.calibrate(of_batches(model, batches(model)), options), options)


def batches(model: Any) -> Iterator[dict[str, Any]]:
    """Yield batches of random tokens to calibrate a model with."""
    generator = torch.Generator().manual_seed(2)
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for _ in range(OPTIONS.sequences + OPTIONS.rate_sequences):
        yield {"input_ids": torch.randint(3, 90, (1, CONTEXT), generator=generator), **more}


def _generated(model: Any, ids: Tensor) -> Tensor:
    """Return the tokens [1, T + NEW] that the model generates."""
    tokens: Tensor = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return tokens


@torch.no_grad()
def _decoded(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the logits [NEW, V] of a prefill of PROMPT tokens and of decode steps on given tokens.

    Each step gets all tokens as `generate` prepares them: some classes use more than the new one.
    """
    name, rows = cache_argument(model), []
    for end in range(PROMPT, PROMPT + NEW):
        start = 0 if end == PROMPT else end - 1
        known = {name: cache, "use_cache": True, "attention_mask": torch.ones(1, end, dtype=torch.long)}
        options = {"next_sequence_length": None if start == 0 else 1, "is_first_iteration": start == 0}
        inputs = model.prepare_inputs_for_generation(tokens[:, :end], **known, **options)
        rows.append(model(**inputs, return_dict=True).logits[:, -1])
    return torch.cat(rows)


def _divergence(exact: Tensor, ours: Tensor) -> float:
    """Return the mean KL divergence of logits from the full-precision ones; infinite if they are not finite."""
    if not ours.isfinite().all():
        return math.inf
    expected, found = exact.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).nan_to_num(0.0).sum(-1).mean())
